"""Statistics of a batch: BatchNorm statistics, and the gradient noise scale."""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from holofunc import random, tree
from holofunc.analysis.gradients import per_sample_grad_norms
from holofunc.analysis.mapped import BatchNorm, Replaced, has_rows, num_samples, value
from holofunc.model import Model
from holofunc.typing import Batch, Buffers, Key, Objective, Params

__all__ = ["NoiseScale", "calibrate", "gradient_noise_scale"]


def _batch_norm(*args: Any, **kwargs: Any) -> Tensor:
    """One that forgets what it has seen before this batch."""
    return F.batch_norm(*BatchNorm(*args, **kwargs)._replace(momentum=1.0))


def calibrate(model: Model, params: Params, buffers: Buffers, batch: Batch, *, key: Key | None = None) -> Buffers:
    """Buffers with the BatchNorm statistics of a batch: one pass in train mode, with momentum 1.

    In eval mode the model then computes what it computes in train mode on this batch, up to the factor n / (n - 1) of
    the stored variance, and samples can be asked one by one. At initialization the mean of the samples' gradients of a
    ResNet-18 has a cosine of 0.1 with the gradient of the batch in train mode before, and of 0.8 after; what remains
    is that in train mode samples reach each other through the statistics.

    Args:
        model: any; without BatchNorm the buffers stay as they are.
        params: of the model.
        buffers: of the model.
        batch: images, or ``(images, targets)``; the more images, the better the statistics.
        key: for layers that draw.

    Example:
        >>> import torch
        >>> from holofunc import analysis, models, random
        >>> model = models.smallnet()
        >>> params, buffers = model.init(random.key(0))
        >>> images = random.normal(random.key(1), (64, 3, 8, 8))
        >>> calibrated = analysis.calibrate(model, params, buffers, images)
        >>> same = [torch.equal(calibrated[n], buffers[n]) for n in buffers if n.endswith("running_mean")]
        >>> same
        [False, False, False]
    """
    images = batch[0] if isinstance(batch, (tuple, list)) else batch
    with Replaced({F.batch_norm: _batch_norm}):
        return model.apply(params, buffers, images, train=True, key=key)[1]


class NoiseScale(NamedTuple):
    """The result of `gradient_noise_scale`, 0-d tensors.

    Attributes:
        noise_scale: ``trace / squared_norm``, in samples: the batch size at which noise and gradient are equally
            long. Far below it, twice the batch saves nearly half of the steps; far above it, nearly none.
        trace: of the covariance of one sample's gradient.
        squared_norm: of the true gradient. An estimate: it may be negative, where the noise is larger than it.
    """

    noise_scale: Tensor
    trace: Tensor
    squared_norm: Tensor


def gradient_noise_scale(
    objective: Objective,
    params: Params,
    buffers: Buffers,
    batch: Batch,
    *,
    parts: int = 4,
    method: Literal["parts", "norms"] = "parts",
    key: Key | None = None,
) -> NoiseScale:
    """The critical batch size of a gradient, from gradients at two batch sizes.

    Both numbers are unbiased, their ratio is not, and one batch says little: average ``trace`` and ``squared_norm``
    over some batches, then divide.

    Args:
        objective: as in training; BatchNorm in train mode is all right with ``"parts"``.
        params: where to look.
        buffers: statistics.
        batch: N samples.
        parts: of equal size into which to cut the batch, at least 2. Costs one batch gradient.
        method: ``"parts"``; or ``"norms"``, which compares single samples with the batch by `per_sample_grad_norms`:
            less noise, 2 batch gradients, and BatchNorm must be in eval mode.
        key: for an objective that draws.

    Raises:
        ValueError: a batch that does not divide by ``parts``; less than 2 parts or samples.

    Source: McCandlish et al., "An empirical model of large-batch training" (arXiv 1812.06162), appendix A.1.

    Example:
        >>> import torch
        >>> from holofunc import analysis
        >>> loss = lambda params, buffers, batch, key: ((batch * params["w"]).mean(), None)
        >>> batch = torch.tensor([1.0, 3.0, 1.0, 3.0])
        >>> analysis.gradient_noise_scale(loss, {"w": torch.ones(())}, {}, batch).trace
        tensor(1.3333)
    """
    count = num_samples(batch)
    if method not in ("parts", "norms"):
        raise ValueError(f"method must be 'parts' or 'norms', got {method!r}")
    if method == "norms":
        parts = count
    if parts < 2 or count % parts:
        raise ValueError(f"parts must be at least 2 and divide the number of samples, got {parts} for {count} samples")

    def gradient(batch: Batch, key: Key | None) -> Params:
        return torch.func.grad(lambda params: value(objective, params, buffers, batch, key))(params)

    if method == "norms":
        norms = per_sample_grad_norms(objective, params, buffers, batch, key=key)
        mean, squares = gradient(batch, key), norms.square()
    else:
        size = count // parts
        keys = [None] * parts if key is None else list(random.split(key, parts).unbind())
        cuts = [
            tree.map(lambda x, i=i: x[i * size : (i + 1) * size] if has_rows(x) else x, batch) for i in range(parts)
        ]
        grads = [gradient(cut, k) for cut, k in zip(cuts, keys, strict=True)]
        mean = tree.map(lambda *g: torch.stack(g).mean(0), *grads)
        squares = torch.stack([tree.global_norm(g).square() for g in grads])
    of_small, of_large = squares.mean(), tree.global_norm(mean).square()
    small, large = count / parts, float(count)
    squared_norm = (large * of_large - small * of_small) / (large - small)
    trace = (of_small - of_large) / (1 / small - 1 / large)
    return NoiseScale(trace / squared_norm, trace, squared_norm)
