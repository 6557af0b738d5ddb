"""Per-sample gradients: full, reduced, norms, and clipped."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from holofunc import tree
from holofunc.analysis.mapped import check_real, over_samples, value
from holofunc.analysis.taps import Tapping, tapped
from holofunc.typing import Batch, Buffers, Key, Objective, Params, PyTree, Scalar

__all__ = ["clipped_grads", "per_sample_grad_norms", "per_sample_grads"]

Where = Callable[[str], bool] | str | Sequence[str] | None
"""Which parameters: a predicate of the name, glob patterns, or None for all."""


def per_sample_grads(
    objective: Objective,
    params: Params,
    buffers: Buffers,
    batch: Batch,
    *,
    reduce: Callable[[Params], PyTree] | None = None,
    where: Where = None,
    chunk_size: int | None = 16,
    key: Key | None = None,
) -> PyTree:
    """The gradient of each sample's loss, or a function ``reduce`` of it.

    Their mean is the gradient of the batch, if the loss is a mean over samples and no layer mixes them. Costs 2 to 20
    batch gradients: convolutions become grouped ones, which some devices are slow at.

    Args:
        objective: as in training, evaluated on batches of one. With BatchNorm it must be in eval mode, see
            `in_eval_mode` and `calibrate`.
        params: of the model.
        buffers: its statistics.
        batch: N samples.
        reduce: ``reduce(grads) -> tree`` of one sample's gradients, such as `holofunc.tree.global_norm`. It runs inside
            the map, so that the gradients of only ``chunk_size`` samples exist at a time.
        where: differentiate only these parameters: ``where(name) -> bool``, or glob patterns.
        chunk_size: samples at a time; None is all. The gradients of 16 samples of a ResNet-18 are 0.7 GiB.
        key: for an objective that draws; each sample has its own key, from `holofunc.random.split`.

    Returns:
        The gradients by name, each (N, *shape), or the results of ``reduce`` with a leading axis of N.

    Raises:
        ValueError: BatchNorm in train mode; an objective that draws, without a key; a ``where`` that chooses nothing.

    Example:
        >>> import torch
        >>> from holofunc import analysis, lift, losses, random, train, tree
        >>> model = lift(torch.nn.Linear, 3, 2)
        >>> objective, state = train.supervised(model, losses.cross_entropy), model.init(random.key(0))
        >>> batch = torch.ones(4, 3), torch.tensor([0, 1, 0, 1])
        >>> grads = analysis.per_sample_grads(objective, *state, batch)
        >>> grads["weight"].shape
        torch.Size([4, 2, 3])
        >>> analysis.per_sample_grads(objective, *state, batch, reduce=tree.global_norm).shape
        torch.Size([4])
    """
    names = chosen(params, where)

    def one(sample: Batch, key: Key | None) -> PyTree:
        def loss(part: Params) -> Tensor:
            return value(objective, {**params, **part}, buffers, sample, key)

        grads = torch.func.grad(loss)({name: params[name] for name in names})
        return grads if reduce is None else reduce(grads)

    return over_samples(one, batch, key, chunk_size=chunk_size)


def per_sample_grad_norms(
    objective: Objective,
    params: Params,
    buffers: Buffers,
    batch: Batch,
    *,
    method: Literal["taps", "vmap", "last_layer"] = "taps",
    where: Where = None,
    chunk_size: int | None = None,
    fallback: Literal["vmap", "error"] = "vmap",
    key: Key | None = None,
) -> Tensor:
    """The exact Euclidean norm of each sample's gradient, (N,).

    Args:
        objective: as for `per_sample_grads`.
        params: of the model.
        buffers: its statistics.
        batch: N samples.
        method: ``"taps"`` costs about one batch gradient: norms follow from what goes into the layers and the gradients
            of what comes out. ``"vmap"`` computes the gradients, chunk by chunk: 2 to 20 batch gradients.
            ``"last_layer"`` is ``"taps"`` for the module registered last (or for ``where``): it costs a forward pass.
        where: count only these parameters.
        chunk_size: samples at a time; by default all with taps, 8 with vmap (0.4 GiB of a ResNet-18's gradients).
        fallback: what taps do with a matrix that no rule covers, because it is shared, of a recurrent layer, or
            changed before its use: ``"vmap"`` computes its gradient for each sample, ``"error"`` names it.
        key: as for `per_sample_grads`.

    Raises:
        ValueError: as `per_sample_grads`; an unknown method; parameters without a rule, where that is to be an error.

    Source: Goodfellow, "Efficient per-example gradient computations" (arXiv 1510.01799) for linear layers; Rochette et
        al. (arXiv 1912.06015) for convolutions. Samples are followed by `vmap`, whatever a model does to their axis.

    Example:
        >>> import torch
        >>> from holofunc import analysis, losses, models, random, train
        >>> model = models.smallnet()
        >>> objective = analysis.in_eval_mode(train.supervised(model, losses.cross_entropy))
        >>> batch = torch.ones(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
        >>> analysis.per_sample_grad_norms(objective, *model.init(random.key(0)), batch).shape
        torch.Size([4])
    """
    if method not in ("taps", "vmap", "last_layer"):
        raise ValueError(f"method must be 'taps', 'vmap' or 'last_layer', got {method!r}")
    if fallback not in ("vmap", "error"):
        raise ValueError(f"fallback must be 'vmap' or 'error', got {fallback!r}")
    if method == "vmap":
        size = 8 if chunk_size is None else chunk_size
        return per_sample_grads(
            objective, params, buffers, batch, reduce=tree.global_norm, where=where, chunk_size=size, key=key
        )
    if method == "last_layer" and where is None:
        module = next(reversed(params)).rpartition(".")[0]
        where = [name for name in params if name.rpartition(".")[0] == module]
    return _tapped_norms(objective, params, buffers, batch, key, chosen(params, where), chunk_size, fallback)


def _tapped_norms(
    objective: Objective,
    params: Params,
    buffers: Buffers,
    batch: Batch,
    key: Key | None,
    names: list[str],
    chunk_size: int | None,
    fallback: str,
) -> Tensor:
    matrices = [name for name in names if params[name].ndim > 1]
    shapes = _taps(objective, params, buffers, batch, key, matrices)
    bare = [name for name in matrices if name not in shapes and sum(n > 1 for n in params[name].shape) > 1]
    if fallback == "error" and bare:
        raise ValueError(
            f"there is no tap rule for {', '.join(bare)}: fallback='vmap' computes the gradients of these per sample"
        )
    weights = {name: params[name] for name in shapes}
    small = {name: params[name] for name in names if name not in shapes}

    def one(sample: Batch, key: Key | None) -> Tensor:
        rules: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}

        def loss(small: Params, taps: Params) -> tuple[Tensor, Params]:
            mode = Tapping(weights, taps)
            with mode:
                loss = value(objective, {**params, **small}, buffers, sample, key)
            rules.update({name: call.squared_norm for name, call in mode.calls.items()})
            return loss, {name: call.x for name, call in mode.calls.items()}

        taps = {name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype, device) in shapes.items()}
        (grads, slopes), inputs = torch.func.grad(loss, argnums=(0, 1), has_aux=True)(small, taps)
        squares = [rules[name](_wide(inputs[name]), tree.upcast(slopes[name])) for name in shapes]
        squares += [tree.upcast(grad).square().sum() for grad in grads.values()]
        return torch.stack(squares).sum()

    return tree.safe_sqrt(over_samples(one, batch, key, chunk_size=chunk_size))


def _wide(x: Tensor) -> Tensor:
    return tree.upcast(x) if x.is_floating_point() else x


def _taps(
    objective: Objective, params: Params, buffers: Buffers, batch: Batch, key: Key | None, names: list[str]
) -> dict[str, tuple[torch.Size, torch.dtype, torch.device]]:
    """What a tap looks like, for each of the weights that can have one: seen on the first sample."""
    found: dict[str, tuple[torch.Size, torch.dtype, torch.device]] = {}
    weights = {name: params[name] for name in names}

    def one(sample: Batch, key: Key | None) -> Tensor:
        def run(weights: Params) -> None:
            value(objective, {**params, **weights}, buffers, sample, key)

        calls = tapped(run, weights)
        found.update({name: (call.out.shape, call.out.dtype, call.out.device) for name, call in calls.items()})
        return torch.zeros(())

    with torch.no_grad():
        over_samples(one, batch, key, first_only=True)
    return {name: found[name] for name in names if name in found}


def clipped_grads(
    objective: Objective,
    params: Params,
    buffers: Buffers,
    batch: Batch,
    *,
    max_norm: Scalar,
    method: Literal["taps", "vmap"] = "taps",
    chunk_size: int | None = None,
    key: Key | None = None,
) -> Params:
    """The mean of the per-sample gradients, each clipped to norm ``max_norm``.

    The norms are computed first, then one gradient of the weighted loss: 2 batch gradients with taps, and never the
    gradients themselves. With noise of `holofunc.optim.add_noise` this is the gradient of DP-SGD; privacy is not
    accounted for here.

    Args:
        objective: as for `per_sample_grads`.
        params: of the model.
        buffers: its statistics.
        batch: N samples.
        max_norm: positive, a number or a 0-d tensor.
        method: as for `per_sample_grad_norms`.
        chunk_size: likewise.
        key: likewise.

    Raises:
        ValueError: as `per_sample_grads`; a ``max_norm`` that is not positive.

    Source: Abadi et al., "Deep learning with differential privacy" (CCS 2016); Lee and Kifer (arXiv 2009.03106) for the
        two passes.

    Example:
        >>> import torch
        >>> from holofunc import analysis, lift, losses, random, train, tree
        >>> model = lift(torch.nn.Linear, 3, 2)
        >>> objective = train.supervised(model, losses.cross_entropy)
        >>> batch = torch.ones(4, 3), torch.tensor([0, 0, 0, 0])
        >>> grads = analysis.clipped_grads(objective, *model.init(random.key(0)), batch, max_norm=0.1)
        >>> tree.global_norm(grads)
        tensor(0.1000)
    """
    if not isinstance(max_norm, Tensor) and not max_norm > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    norms = per_sample_grad_norms(objective, params, buffers, batch, method=method, chunk_size=chunk_size, key=key)
    factors = (max_norm / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max(1.0)

    def loss(params: Params) -> Tensor:
        losses = over_samples(lambda sample, key: value(objective, params, buffers, sample, key), batch, key)
        return (losses * factors).mean()

    return torch.func.grad(loss)(params)


# --- shared --------------------------------------------------------------------------------------------------------


def chosen(params: Params, where: Where) -> list[str]:
    """The names that ``where`` chooses, in the order of ``params``."""
    if where is None:
        names = list(params)
    elif callable(where):
        names = [name for name in params if where(name)]
    else:
        found: Any = tree.select(params, where)
        names = [name for name in params if name in found]
    if not names and where is not None:
        raise ValueError(f"where must choose at least one parameter, got none of {', '.join(list(params)[:8])}, ...")
    check_real({name: params[name] for name in names})
    return names
