"""Gradient transformations: pairs of pure functions ``(init, update)``, and chains of them.

``init(params) -> state`` and ``update(updates, state, params=None, **extra) -> (updates, state)``. What ``update``
returns is *added* to the parameters (`apply_updates`), so the sign of descent is part of it. All that changes lives in
the state, as tensors: a transformation has no memory of its own, and one can serve many states.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.typing import Params, PyTree, Scalar

__all__ = [
    "EmptyState",
    "GradientTransformation",
    "apply_updates",
    "chain",
    "check_params",
    "identity",
    "named_chain",
    "value_at",
]

InitFn = Callable[[Params], PyTree]
UpdateFn = Callable[..., tuple[PyTree, PyTree]]


class GradientTransformation(NamedTuple):
    """A pair of pure functions.

    Args:
        init: ``init(params) -> state``, a tree of tensors.
        update: ``update(updates, state, params=None, **extra) -> (updates, state)``. ``extra`` carries what some
            transformations need beside gradients (``loss``, ``buffers``, ``weight``); the others ignore it.

    Inside functions compiled by `holofunc.jit`, flat dicts arrive as `holofunc.tree.Arena`, a kind of dict; use
    `holofunc.tree.elementwise` on them where a rule allows it, and it runs on all tensors at once.

    Example:
        >>> import torch
        >>> from holofunc import optim, tree
        >>> def sign() -> optim.GradientTransformation:
        ...     def update(updates, state, params=None, **extra):
        ...         return tree.elementwise(torch.sign, updates), state
        ...     return optim.GradientTransformation(lambda params: (), update)
        >>> tx = optim.chain(sign(), optim.scale(-0.1))
        >>> tx.update({"w": torch.tensor([3.0, -2.0])}, tx.init({"w": torch.zeros(2)}))[0]
        {'w': tensor([-0.1000,  0.1000])}
    """

    init: InitFn
    update: UpdateFn


class EmptyState(NamedTuple):
    """The state of a transformation that has none."""


def identity() -> GradientTransformation:
    """The transformation that changes nothing."""
    return GradientTransformation(
        lambda params: EmptyState(), lambda updates, state, params=None, **extra: (updates, state)
    )


def chain(*txs: GradientTransformation) -> GradientTransformation:
    """Apply transformations one after the other; the state is the tuple of theirs.

    Example:
        >>> from holofunc import optim
        >>> tx = optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(0.1))
    """
    for i, tx in enumerate(txs):
        _check_transformation(f"txs[{i}]", tx)

    def init(params: Params) -> PyTree:
        return tuple(tx.init(params) for tx in txs)

    def update(updates: PyTree, state: PyTree, params: Params | None = None, **extra: Any) -> tuple[PyTree, PyTree]:
        if len(state) != len(txs):
            raise ValueError(
                f"state must hold {len(txs)} states, one per transformation of the chain, got {len(state)}"
            )
        states = []
        for tx, inner in zip(txs, state, strict=True):
            updates, inner = tx.update(updates, inner, params, **extra)
            states.append(inner)
        return updates, tuple(states)

    return GradientTransformation(init, update)


def named_chain(**txs: GradientTransformation) -> GradientTransformation:
    """`chain` with a dict as its state: ``{"adam": AdamState(...), ...}``, so that saved states read by name.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx = optim.named_chain(clip=optim.clip_by_global_norm(1.0), momentum=optim.trace(0.9))
        >>> list(tx.init({"w": torch.zeros(2)}))
        ['clip', 'momentum']
    """
    for name, tx in txs.items():
        _check_transformation(name, tx)

    def init(params: Params) -> PyTree:
        return {name: tx.init(params) for name, tx in txs.items()}

    def update(updates: PyTree, state: PyTree, params: Params | None = None, **extra: Any) -> tuple[PyTree, PyTree]:
        if list(state) != list(txs):
            raise ValueError(f"state must hold the states of {list(txs)}, got {list(state)}")
        states = {}
        for name, tx in txs.items():
            updates, states[name] = tx.update(updates, state[name], params, **extra)
        return updates, states

    return GradientTransformation(init, update)


def _check_transformation(name: str, tx: Any) -> None:
    if not (isinstance(tx, tuple) and hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(f"{name} must be a GradientTransformation, got {tx!r}")


def apply_updates(params: Params, updates: PyTree) -> Params:
    """``params + updates``, in the dtype of the parameters.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> optim.apply_updates({"w": torch.ones(2)}, {"w": torch.full((2,), -0.5)})
        {'w': tensor([0.5000, 0.5000])}
    """
    return tree.elementwise(lambda p, u: (p + u).to(p.dtype), params, updates)


def check_params(params: PyTree, name: str) -> None:
    """Raise unless ``params`` is a tree of real floating tensors: what `init` of every transformation calls first.

    Raises:
        TypeError: naming the path of the first leaf that is something else.
    """
    for path, leaf in tree.leaves_with_path(params):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{name}: params must hold tensors, got {type(leaf).__name__} at {path!r}")
        if not leaf.is_floating_point():
            raise TypeError(f"{name}: params must hold real floating tensors, got {leaf.dtype} at {path!r}")


def value_at(value: Any, count: Tensor) -> Scalar:
    """A hyperparameter at update ``count`` (0-based): itself, or what it returns if it is a schedule.

    Raises:
        ValueError: a schedule that returns something else than a number or a 0-d tensor.
    """
    if not callable(value):
        return value
    now = value(count)
    if isinstance(now, Tensor) and now.ndim:
        raise ValueError(f"a schedule must return a number or a 0-d tensor, got shape {tuple(now.shape)}")
    return now


def zero_count(params: PyTree) -> Tensor:
    """A step counter at zero: int64, 0-d, beside the parameters."""
    return torch.zeros((), dtype=torch.int64, device=next((x.device for x in tree.leaves(params)), None))
