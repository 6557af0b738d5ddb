"""Detectors: models of boxes, with a loss on padded targets and a decoding of fixed size.

A detector is a `Model` and a head. The model maps images to raw outputs, as any other does; the head, which has no
parameters, knows what they mean: which of them answer for which true box (`Detector.loss`), and which boxes they are
(`Detector.decode`). All three are pure functions of tensors of fixed shape: they compile into one graph, map over
images, and have derivatives.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holofunc.model import Model
from holofunc.model.normalization import normalized
from holofunc.models import surgery
from holofunc.models.derived import Derived
from holofunc.models.heads import Head, Predictions, check_share
from holofunc.models.weights import read, resolve
from holofunc.ops.boxes import nms
from holofunc.ops.checks import check_counts
from holofunc.ops.targets import Detections, Targets, check_layout, check_targets
from holofunc.typing import Buffers, Key, Params

__all__ = ["Decoding", "DecodingModule", "Detector", "FrozenBatchNorm2d", "freeze_norms"]


class Detector(Derived):
    """A model of boxes; made by `holofunc.models.yolov2` and its kin.

    Beside `Model.init` and `Model.apply`, whose output is raw, it has `loss` and `decode`.

    Attributes:
        head: what the raw outputs mean.

    Example:
        >>> import torch
        >>> from holofunc import models, random
        >>> small = {"layout": [(8, 0), (16, 0), (16, 0), (32, 0), (32, 0)], "head_channels": 32}
        >>> model = models.yolov2(num_classes=3, **small)
        >>> params, buffers = model.init(random.key(0))
        >>> out, _ = model.apply(params, buffers, torch.zeros(2, 3, 64, 64))
        >>> boxes = torch.tensor([[[0.1, 0.1, 0.6, 0.8]], [[0.0, 0.0, 0.0, 0.0]]])
        >>> there = torch.tensor([[True], [False]])  # the second image is empty
        >>> targets = models.Targets(boxes, torch.tensor([[2], [0]]), there)
        >>> sorted(model.loss(out, targets))
        ['bbox_loss', 'clf_loss', 'noobj_loss', 'obj_loss']
        >>> found = model.decode(out, max_detections=10)
        >>> found.boxes.shape, found.scores.shape
        (torch.Size([2, 10, 4]), torch.Size([2, 10]))
    """

    def __init__(self, base: Model, head: Head, *, anchors: Any = None, body: str = "backbone.") -> None:
        """
        Args:
            base: the network.
            head: what its raw outputs mean.
            anchors: those that the head goes by, if it has any: what the network's buffers of this name must hold.
            body: how the names of the parameters begin that are the body's.
        """
        super().__init__(base)
        self.head, self.anchors, self.body = head, anchors, body

    def init(
        self, key: Key, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Params, Buffers]:
        params, buffers = super().init(key, device=device, dtype=dtype)
        self.check_anchors(buffers)
        return params, buffers

    def check_anchors(self, buffers: Buffers) -> None:
        """Refuse buffers whose anchors are not those that `loss` and `decode` go by. Reads values.

        Raises:
            ValueError: they differ from the constructor's.
        """
        found = [b for n, b in buffers.items() if n.split(".")[-1] == "anchors" and not b.is_meta]
        if not found or self.anchors is None:
            return
        own = torch.tensor(self.anchors, dtype=torch.float64)
        there = torch.cat([b.detach().cpu().double() for b in found]).reshape(own.shape)
        if (there - own).abs().max() > 0.01 * own.max():  # half precision is no other anchors
            raise ValueError(
                f"the anchors of these weights are not those that {self.name} was built with: pass "
                f"anchors={there.round(decimals=4).tolist()}"
            )

    def loss(self, out: Any, targets: Targets, *, reduction: str = "mean") -> dict[str, Tensor]:
        """The terms of the loss; their sum is what is minimized: ``train.supervised(model, model.loss)``.

        Args:
            out: what `apply` returns.
            targets: of the same images. Rows whose mask is False, and images without boxes, are fine. Values are not
                looked at here: `check_targets` does that where data enter.
            reduction: each term is first summed over the boxes and slots of an image, with its weight (the lambda of
                its name): ``"mean"`` and ``"sum"`` are over the images, ``"none"`` is one value for each.

        Returns:
            ``{"obj_loss", "noobj_loss", "bbox_loss", "clf_loss"}``, 0-d, or (N,) for ``"none"``.

        Raises:
            TypeError: targets that are no `Targets`, or of other dtypes.
            ValueError: an unknown reduction, or shapes that do not fit.
        """
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be one of 'mean', 'sum', 'none', got {reduction!r}")
        check_layout(targets, len(out if isinstance(out, Tensor) else out[0]))
        there = targets.mask  # padding may hold anything, and nothing here has a derivative
        boxes = torch.where(there[..., None], targets.boxes, 0).detach()
        terms = self.head.losses(out, Targets(boxes, torch.where(there, targets.labels, 0).long(), there))
        if reduction == "none":
            return terms
        return {name: term.mean() if reduction == "mean" else term.sum() for name, term in terms.items()}

    def check_targets(self, targets: Targets) -> None:
        """Raise what `holofunc.ops.targets.check_targets` has to say of these targets and this number of classes."""
        check_targets(targets, self.head.num_classes)

    def predictions(self, out: Any) -> Predictions:
        """All predicted boxes, before anything is left out; ``out`` is what `apply` returns."""
        return self.head.predictions(out)

    def decode(
        self,
        out: Any,
        *,
        score_threshold: float = 0.05,
        iou_threshold: float = 0.5,
        max_detections: int = 100,
        class_agnostic: bool = False,
        candidates: int = 512,
    ) -> Detections:
        """The best boxes of each image: one class for each, non-maximum suppression, cut off at the image's borders.

        A box scores its objectness times the probability of its likeliest class.

        Args:
            out: what `apply` returns.
            score_threshold: boxes must score above this, in [0, 1].
            iou_threshold: boxes whose IoU with a better one is above this are dropped, in [0, 1].
            max_detections: D, at least 1.
            class_agnostic: whether boxes of different classes suppress each other.
            candidates: as many boxes, the best ones, enter suppression, whose cost is their square.

        Returns:
            Detections, of D rows.

        Raises:
            ValueError: a threshold or number out of range.
        """
        check_counts(max_detections=max_detections, candidates=candidates)
        check_share("score_threshold", score_threshold)
        boxes, objectness, classes = self.head.predictions(out)
        likeliest, labels = classes.max(-1)
        scores = objectness * likeliest
        scores = torch.where((scores + boxes.sum(-1)).isnan(), 0, scores)  # `topk` takes NaN for the largest
        scores, best = scores.topk(min(candidates, scores.shape[-1]), -1)
        boxes, labels = _rows(boxes, best).clamp(0, 1), _rows(labels, best)
        kept, mask = nms(
            boxes,
            scores,
            iou_threshold,
            labels=None if class_agnostic else labels,
            max_detections=max_detections,
            score_threshold=score_threshold,
        )
        boxes, scores, labels = (_rows(x, kept) for x in (boxes, scores, labels))
        there = mask[..., None]
        return Detections(
            torch.where(there, boxes, 0), torch.where(mask, scores, 0), torch.where(mask, labels, 0), mask
        )

    def decoding(self, **options: Any) -> "Decoding":
        """The detector as a model whose output is `Detections`: for export and deployment, suppression included.

        Args:
            options: those of `decode`.
        """
        return Decoding(self, change=lambda module: DecodingModule(module, self, options))

    def with_body(self, weights: Any, constructor: str) -> "Detector":
        """The detector whose body starts from published weights of a classifier.

        Args:
            weights: what `holofunc.models.weights.resolve` takes.
            constructor: the name of the classifier's constructor.

        Raises:
            ValueError: the weights are not those of this body.
        """
        path = resolve(weights, constructor).path()
        self._load_body(path, *Model.init(self._base, _no_key(), device="meta"))
        base = Derived(self._base, convert=lambda params, buffers: self._load_body(path, params, buffers))
        return self.around(base)

    def around(self, base: Model) -> "Detector":
        return Detector(base, self.head, anchors=self.anchors, body=self.body)

    def _load_body(self, path: Path, params: Params, buffers: Buffers) -> tuple[Params, Buffers]:
        published = surgery.drop(surgery.rename(read(path), "features.", self.body), "classifier.", "head.")
        start = {**params, **buffers}
        named = {n for n in start if n.startswith(self.body)}
        values = {n: v for n, v in published.items() if n in named}  # a frozen norm does not count its batches
        strangers = [n for n in published if n not in named and not n.endswith("num_batches_tracked")]
        misshapen = [n for n, v in values.items() if v.shape != start[n].shape]
        if wrong := [*strangers, *(n for n in named if n not in values), *misshapen]:
            raise ValueError(f"{path.name} holds no weights of the body of {self.name}: {', '.join(sorted(wrong)[:3])}")
        values = {n: v.to(start[n].device, start[n].dtype) for n, v in values.items()}
        return {n: values.get(n, v) for n, v in params.items()}, {n: values.get(n, v) for n, v in buffers.items()}


def _rows(x: Tensor, indices: Tensor) -> Tensor:
    """``x[n, indices[n]]`` for each image n."""
    return x.gather(1, indices) if x.ndim == 2 else x.gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))


def _no_key() -> Key:
    return torch.zeros(2, dtype=torch.int64)


class Decoding(Derived):
    """A detector whose output is `Detections`; made by `Detector.decoding`."""

    def apply(self, *args: Any, **options: Any) -> tuple[Detections, Buffers]:
        out, buffers = super().apply(*args, **options)
        return Detections(*out), buffers

    def around(self, base: Model) -> "Decoding":
        return Decoding(base)


class DecodingModule(nn.Module):
    """A network and what becomes of its output, under the network's names, as a tuple that programs can have."""

    def __init__(self, network: nn.Module, detector: Detector, options: dict[str, Any]) -> None:
        super().__init__()
        self._modules, self._parameters, self._buffers = network._modules, network._parameters, network._buffers
        self._non_persistent_buffers_set = network._non_persistent_buffers_set
        self.network_forward, self.check_input = network.forward, network.check_input
        self.decode: Callable[[Any], Detections] = partial(detector.decode, **options)
        self.in_channels = network.in_channels

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.decode(self.network_forward(x)))


# --- normalization that stands still -----------------------------------------------------------------------------


class FrozenBatchNorm2d(nn.Module):
    """A BatchNorm whose statistics and scales are constants in both modes; all of its tensors are buffers.

    Its names are those of `torch.nn.BatchNorm2d` but ``num_batches_tracked``.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        return normalized(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)


def freeze_norms(module: nn.Module) -> nn.Module:
    """The module with each of its BatchNorms frozen in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm2d(child.num_features, child.eps))
        else:
            freeze_norms(child)
    return module
