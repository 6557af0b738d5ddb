"""Gradual unfreezing by durations as users write them."""

import re
from collections.abc import Mapping, Sized

from holofunc.optim.base import GradientTransformation
from holofunc.optim.labels import label_by_path
from holofunc.optim.masking import unfreeze as from_update
from holofunc.train.cadences import updates

__all__ = ["unfreeze"]


def unfreeze(
    starts: Mapping[str | re.Pattern[str], int | str],
    data: Sized | int,
    *,
    epochs: int | None = None,
    accumulate: int = 1,
) -> GradientTransformation:
    """No updates for parts of a network before their time: `holofunc.optim.unfreeze` with durations as text.

    Stands at the end of a chain, after weight decay and learning rate. BatchNorm statistics of these parts are renewed
    all the time.

    Args:
        starts: parts, by the patterns of `holofunc.optim.label_by_path`, and when each begins to learn: durations as
            in `updates`. What is not named learns from the first update on.
        data: the batches of an epoch, or their number.
        epochs: of the whole run, for shares of it as ``"10%"``.
        accumulate: micro-batches per update, as in ``multi_steps(chain(...), every=accumulate)``.

    Raises:
        ValueError: a duration that is none; when the state is made, a pattern that covers no parameter.

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
