"""The value of a loss, the weight that it is a mean over, and its value per sample."""

import functools
import inspect
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holofunc import random, tree
from holofunc.ops.arithmetic import safe_divide
from holofunc.typing import Key, PyTree

__all__ = ["Criterion", "total_loss"]

OWN_KEY = zlib.crc32(b"the loss")
"""Folded into the key of a step for a random loss; differs from the hashes of module names."""


@dataclass(frozen=True)
class Criterion:
    """A loss, and the properties that are read once from its signature.

    Attributes:
        loss: ``loss(outputs, targets)``, a 0-d tensor or a dict of them.
        ignore_index: the ignored label; None if there is none.
        adds_up: whether ``reduction="parts"`` gives numerator and denominator of the mean, as in all of
            `holofunc.losses`, which are recognized by their keyword-only arguments ``weight`` and ``reduction``.
        draws: whether it takes a ``key``.
        batch_axis: of the outputs: 1 for sequences, whose first axis is frames (``ctc``, with ``input_lengths``).
    """

    loss: Callable[..., Any]
    ignore_index: int | None = None
    adds_up: bool = False
    draws: bool = False
    batch_axis: int = 0

    @classmethod
    def of(cls, loss: Callable[..., Any]) -> "Criterion":
        """Made of a function, a `functools.partial` or a loss module of torch; of others only the loss is known."""
        if isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss)):
            return cls(loss, loss.ignore_index)
        try:
            bound, own = (inspect.signature(f).parameters for f in (loss, _innermost(loss)))
        except (TypeError, ValueError):
            return cls(loss)
        by_keyword = {name for name, p in own.items() if p.kind is p.KEYWORD_ONLY}
        ignored = bound["ignore_index"].default if "ignore_index" in bound else None
        return cls(
            loss,
            ignored if isinstance(ignored, int) else None,
            adds_up={"weight", "reduction"} <= by_keyword and bound["reduction"].default == "mean",
            draws="key" in by_keyword and bound["key"].default is None,
            batch_axis=int("input_lengths" in own),
        )

    def __call__(
        self, outputs: PyTree, targets: PyTree, key: Key | None = None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """The loss, its parts if it is a dict, and the total weight that it is a mean over (None if unknown).

        Args:
            outputs: of the model.
            targets: of the same samples.
            key: for a random loss; None, as in evaluation, draws nothing.
        """
        own: dict[str, Any] = {} if key is None or not self.draws else {"key": random.fold_in(key, OWN_KEY)}
        if self.adds_up:
            parts = self.loss(outputs, targets, reduction="parts", **own)
            if not isinstance(parts, Tensor) or parts.shape != (2,):
                got = tuple(parts.shape) if isinstance(parts, Tensor) else type(parts).__name__
                raise ValueError(
                    "loss takes weight and reduction by keyword, as holofunc.losses do, so loss(outputs, targets, "
                    f"reduction='parts') must have shape (2,), the sum and what it is divided by, got {got}; "
                    "otherwise wrap it in a function of (outputs, targets)"
                )
            return safe_divide(parts[0], parts[1]), {}, parts[1].detach()
        loss, named = total_loss(functools.partial(self.loss, **own) if own else self.loss, outputs, targets)
        known = _of_torch(self.loss)
        return loss, named, None if known is None else _shares(known[1], targets).sum()

    def of_rows(self, outputs: PyTree, targets: PyTree) -> tuple[Tensor, Tensor]:
        """The loss of each sample and its weight in the mean, both (N,)."""
        axis, rows = self.batch_axis, {len(x) for x in tree.leaves(targets)}
        if {x.shape[axis] for x in tree.leaves(outputs)} != rows:
            raise ValueError(
                f"outputs must have one row for each of {sorted(rows)} targets along axis {axis}, got shapes "
                f"{[tuple(x.shape) for x in tree.leaves(outputs)]}. Sequences, (T, N, K), are known by a loss with "
                "input_lengths: pass losses.ctc itself, or a functools.partial of it"
            )

        if (known := _of_torch(self.loss)) is not None:  # some of their kernels have no vmap rule
            fn, options = known
            losses, mass = fn(outputs, targets, **options, reduction="none"), _shares(options, targets)
            losses, mass = (x.reshape(len(x), -1).sum(1) for x in (losses, mass))
            return safe_divide(losses, mass), mass

        def of_one(output: PyTree, target: PyTree) -> tuple[Tensor, Tensor]:
            row = tree.map(lambda x: x.unsqueeze(axis), output), tree.map(lambda x: x[None], target)
            loss, _, mass = self(*row)
            return loss, torch.ones_like(loss) if mass is None else mass

        return torch.vmap(of_one, in_dims=(axis, 0))(outputs, targets)


def total_loss(loss: Callable[..., Any], outputs: PyTree, targets: PyTree) -> tuple[Tensor, dict[str, Tensor]]:
    """The scalar to minimize and, if the loss is a dict, its values.

    Raises:
        TypeError: the loss is neither a 0-d floating-point tensor nor a dict of them.
    """
    value = loss(outputs, targets)
    parts = dict(value) if isinstance(value, Mapping) else {"": value}
    for name, part in parts.items():
        if not isinstance(part, Tensor) or part.ndim or not part.is_floating_point():
            got = f"{part.dtype} {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
            raise TypeError(
                f"loss must be a 0-d floating tensor, or a dict of them, got {got}{name and f' for {name!r}'}"
            )
    if not parts:
        raise TypeError("loss must be a 0-d floating tensor, or a dict of them, got an empty dict")
    return (torch.stack(list(parts.values())).sum(), parts) if isinstance(value, Mapping) else (value, {})


def _innermost(loss: Callable[..., Any]) -> Callable[..., Any]:
    return _innermost(loss.func) if isinstance(loss, functools.partial) else loss


def _of_torch(loss: Callable[..., Any]) -> tuple[Callable[..., Tensor], dict[str, Any]] | None:
    """Function and options of one of torch's cross entropies with mean reduction; None for other losses."""
    if isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss)):
        fn = F.cross_entropy if isinstance(loss, nn.CrossEntropyLoss) else F.nll_loss
        names = ("weight", "ignore_index", "reduction", *(["label_smoothing"] if fn is F.cross_entropy else []))
        given = {name: getattr(loss, name) for name in names}
    elif (fn := _innermost(loss)) in (F.cross_entropy, F.nll_loss):
        given = dict(loss.keywords) if isinstance(loss, functools.partial) else {}
    else:
        return None
    return (fn, given) if given.pop("reduction", "mean") == "mean" else None


def _shares(options: Mapping[str, Any], targets: Tensor) -> Tensor:
    """The weight of each target in such a mean: that of its class, or zero if it is ignored."""
    if targets.is_floating_point():
        return torch.ones_like(targets[:, 0])
    counts, weight = targets != options.get("ignore_index", -100), options.get("weight")
    if weight is None:
        return counts.float()
    return torch.where(counts, weight.to(targets.device)[torch.where(counts, targets, 0)], 0.0)
