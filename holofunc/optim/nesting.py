"""Which wrappers do not stand around which, and why: looked at when building, and again, by the state, in ``init``."""

from collections.abc import Callable

from holofunc import tree
from holofunc.optim.base import GradientTransformation, averaged, holds, traits_of
from holofunc.typing import Params, PyTree

__all__ = ["check_inside", "init_inside"]

REASONS = {
    ("cautious", "weights"): (
        "lookahead, scout, ema_params or schedule_free, whose weights would no longer match the updates: write "
        "lookahead(cautious(tx)), and so on"
    ),
    ("cautious", "window"): (
        "multi_steps, as it would compare with the last micro-batch alone: write multi_steps(cautious(tx), every)"
    ),
    ("schedule_free", "weights"): (
        "lookahead, scout, ema_params or schedule_free: they would take the points where gradients are taken for the "
        "iterates of tx"
    ),
    ("schedule_free", "window"): (
        "multi_steps, as it would average between updates: write multi_steps(schedule_free(tx, learning_rate), every)"
    ),
    ("lookahead", "tied"): (
        "schedule_free, whose average would no longer match the parameters that lookahead moves: choose one of the two"
    ),
    ("scout", "tied"): (
        "schedule_free, whose average would no longer match the parameters that scout moves: choose one of the two"
    ),
    ("multi_steps", "look along"): (
        "sophia or hutchinson_estimator, which would look at the last micro-batch alone: accumulate inside of the "
        "objective"
    ),
    ("multi_steps", "second look"): (
        "sam, whose second look would see the last micro-batch alone: write sam(multi_steps(tx, every))"
    ),
    ("multi_steps", "window"): "multi_steps: write one, with the product of both numbers",
    ("sam", "look along"): "sophia or hutchinson_estimator: there is one second gradient per update",
    ("sam", "second look"): "sam: there is one second gradient per update",
    ("flatten", "names"): (
        "partition, masked or freeze, which choose among named parameters: put it inside, as in "
        "masked(flatten(tx), mask)"
    ),
}
MARKS = {"tied": "tied", "window": "window", "second look": "looks_twice", "look along": "looks_along"}
"""By which attribute of a state a trait is known; weights by what `eval_params` would find."""


def check_inside(outer: str, tx: GradientTransformation) -> None:
    """Raise a ValueError if ``tx`` holds what ``outer`` cannot stand around."""
    _refuse(outer, lambda trait: trait in traits_of(tx))


def init_inside(outer: str, tx: GradientTransformation, params: Params) -> PyTree:
    """``tx.init(params)``, with another look, at a state that may come from a wrapper of the user's own."""
    state = tx.init(params)

    def has(trait: str) -> bool:
        if trait == "weights":
            return bool(averaged(state, dict(tree.leaves_with_path(params))))
        return trait in MARKS and holds(state, MARKS[trait])

    _refuse(outer, has)
    return state


def _refuse(outer: str, has: Callable[[str], bool]) -> None:
    for (name, trait), reason in REASONS.items():
        if name == outer and has(trait):
            raise ValueError(f"{outer} cannot stand around {reason}")
