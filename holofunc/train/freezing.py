"""Frozen and trainable parameters: a table of them, and gradual unfreezing."""

import re
from collections.abc import Callable, Mapping, Sized
from typing import NamedTuple

from holofunc import tree
from holofunc.optim.base import GradientTransformation
from holofunc.optim.labels import label_by_path, resolve
from holofunc.optim.masking import layers
from holofunc.optim.masking import unfreeze as from_update
from holofunc.train.cadences import updates
from holofunc.tree.summaries import Printed
from holofunc.typing import Params

__all__ = ["Trainable", "TrainableRow", "trainable", "unfreeze"]


class TrainableRow(NamedTuple):
    """A layer: the number of its parameters, and how many of them are trained."""

    layer: str
    numbers: int
    learning: int


class Trainable(Printed):
    """The table of `trainable`."""

    head = ("layer", "numbers", "learning")
    words = 1

    def __init__(self, rows: list[TrainableRow]) -> None:
        self.name, self.rows = "what learns", rows

    @property
    def learning(self) -> int:
        """The number of trained parameters of all layers."""
        return sum(row.learning for row in self.rows)

    def cells(self) -> list[tuple[str, ...]]:
        total = TrainableRow("all", sum(row.numbers for row in self.rows), self.learning)
        return [(layer, f"{numbers:,}", f"{learning:,}") for layer, numbers, learning in (*self.rows, total)]


def trainable(
    params: Params, frozen: Mapping[str, bool] | Callable[[Params], Mapping[str, bool]], *, depth: int = 1
) -> Trainable:
    """A table of frozen and trained parameters, layer by layer.

    Args:
        params: the parameters.
        frozen: the mask of `holofunc.optim.freeze`.
        depth: as for `holofunc.optim.layers`.

    Example:
        >>> import torch
        >>> from holofunc import optim, train
        >>> params = {"stem.weight": torch.ones(3, 4), "stem.bias": torch.ones(3), "head.weight": torch.ones(2, 3)}
        >>> train.trainable(params, optim.up_to(params, "stem"))
        layer  numbers  learning
        stem        15         0
        head         6         6
        all         21         6
    """
    mask = resolve(frozen, params)
    if error := tree.structure_error("frozen", mask, params, "the parameters"):
        raise ValueError(error)
    rows = []
    for layer in layers(params, depth):
        own = {path: x.numel() for path, x in params.items() if tree.matches(path, layer)}
        rows.append(TrainableRow(layer, sum(own.values()), sum(n for path, n in own.items() if not mask[path])))
    return Trainable(rows)


def unfreeze(
    starts: Mapping[str | re.Pattern[str], int | str],
    data: Sized | int,
    *,
    epochs: int | None = None,
    accumulate: int = 1,
) -> GradientTransformation:
    """Start to train parts of a network at given times: `holofunc.optim.unfreeze` with durations as text.

    Put it at the end of a chain, after weight decay and learning rate. BatchNorm statistics of these parts are always
    updated.

    Args:
        starts: when each part starts to train, by the patterns of `holofunc.optim.label_by_path`, as durations of
            `updates`. Parts that are not named train from the first update on.
        data: the batches of an epoch, or their number.
        epochs: of the whole run, for fractions such as ``"10%"``.
        accumulate: micro-batches per update, as in ``multi_steps(chain(...), every=accumulate)``.

    Raises:
        ValueError: a duration is invalid; in ``init``, a pattern matches no parameter.

    Example:
        >>> import torch
        >>> from holofunc import optim, train
        >>> tx = optim.chain(optim.sgd(1.0), train.unfreeze({"body": "1ep"}, range(2)))
        >>> params = {"body.w": torch.ones(1), "head.w": torch.ones(1)}
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     updates, state = tx.update(params, state)
        ...     print({name: update.item() for name, update in updates.items()})
        {'body.w': 0.0, 'head.w': -1.0}
        {'body.w': 0.0, 'head.w': -1.0}
        {'body.w': -1.0, 'head.w': -1.0}
    """
    rules = {part: updates(length, data, epochs=epochs, accumulate=accumulate) for part, length in starts.items()}
    return from_update(lambda params: label_by_path(params, rules, default=0))
