"""Which wrappers do not stand around which, and why: looked at when building, and again, by the state, in ``init``."""

from collections.abc import Callable

from holofunc import tree
from holofunc.optim.base import GradientTransformation, held_by
from holofunc.optim.capabilities import (
    Accumulates,
    ChoosesByName,
    KeepsWeights,
    TakesHessianProduct,
    TakesSecondGradient,
    TiesWeights,
    averaged,
    find,
)
from holofunc.typing import Params, PyTree

__all__ = ["check_inside", "init_inside"]

REASONS: dict[tuple[str, type], str] = {
    ("cautious", KeepsWeights): (
        "lookahead, scout, ema_params or schedule_free, whose weights would no longer match the updates: write "
        "lookahead(cautious(tx)), and so on"
    ),
    ("cautious", Accumulates): (
        "multi_steps, as it would compare with the last micro-batch alone: write multi_steps(cautious(tx), every)"
    ),
    ("schedule_free", KeepsWeights): (
        "lookahead, scout, ema_params or schedule_free: they would take the points where gradients are taken for the "
        "iterates of tx"
    ),
    ("schedule_free", Accumulates): (
        "multi_steps, as it would average between updates: write multi_steps(schedule_free(tx, learning_rate), every)"
    ),
    ("lookahead", TiesWeights): (
        "schedule_free, whose average would no longer match the parameters that lookahead moves: choose one of the two"
    ),
    ("scout", TiesWeights): (
        "schedule_free, whose average would no longer match the parameters that scout moves: choose one of the two"
    ),
    ("multi_steps", TakesHessianProduct): (
        "sophia or hutchinson_estimator, which would look at the last micro-batch alone: accumulate inside of the "
        "objective"
    ),
    ("multi_steps", TakesSecondGradient): (
        "sam, whose second look would see the last micro-batch alone: write sam(multi_steps(tx, every))"
    ),
    ("multi_steps", Accumulates): "multi_steps: write one, with the product of both numbers",
    ("sam", TakesHessianProduct): "sophia or hutchinson_estimator: there is one second gradient per update",
    ("sam", TakesSecondGradient): "sam: there is one second gradient per update",
    ("flatten", ChoosesByName): (
        "partition, masked or freeze, which choose among named parameters: put it inside, as in "
        "masked(flatten(tx), mask)"
    ),
}


def check_inside(outer: str, tx: GradientTransformation) -> None:
    """Raise a ValueError if ``tx`` holds what ``outer`` cannot stand around."""
    _refuse(outer, lambda kind: any(issubclass(held, kind) for held in held_by(tx)))


def init_inside(outer: str, tx: GradientTransformation, params: Params) -> PyTree:
    """``tx.init(params)``, with another look, at a state that may come from a wrapper of the user's own."""
    state = tx.init(params)

    def has(kind: type) -> bool:
        if kind is KeepsWeights:  # which some do for a part of the parameters, perhaps for none
            return bool(averaged(state, dict(tree.leaves_with_path(params))))
        return bool(find(state, kind))

    _refuse(outer, has)
    return state


def _refuse(outer: str, has: Callable[[type], bool]) -> None:
    for (name, kind), reason in REASONS.items():
        if name == outer and has(kind):
            raise ValueError(f"{outer} cannot stand around {reason}")
