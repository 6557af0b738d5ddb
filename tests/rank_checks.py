"""Checks that several ranks make together, in one launch."""

from collections.abc import Callable

import torch

from holofunc import distributed


class Checks(dict[str, Callable[..., None]]):
    """Functions that both ranks call, in this order; a check that fails does so on both."""

    def __call__(self, fn: Callable[..., None]) -> Callable[..., None]:
        self[fn.__name__.replace("_", " ")] = fn
        return fn


def me() -> int:
    return distributed.rank()


def same(found: object, expected: object, **bounds: float) -> None:
    torch.testing.assert_close(found, expected, **(bounds or {"rtol": 0, "atol": 0}))
