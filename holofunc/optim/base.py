"""Gradient transformations: pairs of pure functions ``(init, update)``, and chains of them.

``init(params) -> state`` and ``update(updates, state, params=None, **extra) -> (updates, state)``. What ``update``
returns is *added* to the parameters (`apply_updates`), so the sign of descent is part of it. All that changes lives in
the state, as tensors: a transformation has no memory of its own, and one can serve many states.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.capabilities import KeepsWeights, PointsAnywhere, accumulates, averaged, check_nesting, find
from holofunc.optim.checks import (
    builder_of,
    check_function,
    check_params,
    check_transformation,
    check_updates,
    checking_its_state,
    in_dtypes_of,
    of_another_state,
    of_other_shapes,
)
from holofunc.optim.signatures import taking_extra
from holofunc.typing import Params, PyTree

__all__ = [
    "EmptyState", "GradientTransformation", "InitFn", "MaybeParams", "PlainUpdateFn", "UpdateFn", "apply_updates",
    "as_transformation", "chain", "check_params", "check_transformation", "flush", "identity",
    "inside", "named_chain", "stateless", "stateless_with_tree_map", "with_extra_args_support",
]  # fmt: skip


MaybeParams: TypeAlias = Params | None
"""The parameters, where a rule may do without. A name, since Dynamo cannot evaluate ``|`` in a nested annotation."""


class InitFn(Protocol):
    """``init(params) -> state``: a pure function that makes a tree of tensors."""

    def __call__(self, params: Any, /) -> PyTree: ...


class UpdateFn(Protocol):
    """``update(updates, state, params=None, **extra) -> (updates, state)``: how every transformation is called."""

    def __call__(
        self, updates: PyTree, state: PyTree, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, PyTree]: ...


class PlainUpdateFn(Protocol):
    """Of what a `GradientTransformation` is made: ``update(updates, state)``, with whatever further arguments."""

    def __call__(self, updates: Any, state: Any, /, *args: Any, **extra: Any) -> tuple[PyTree, PyTree]: ...


class _Pair(NamedTuple):
    init: InitFn
    update: UpdateFn


class GradientTransformation(_Pair):
    """A pair of pure functions.

    ``init`` raises for what is no tree of real floating tensors, in the name of the function that made it. ``update``
    raises for gradients without the structure and the shapes of the parameters, or the structure that its
    state was made for, whatever it does with them; and for a state of another type than the NamedTuple with which its
    argument ``state`` is annotated. The state that it returns has the dtypes of the one before, in whatever precision
    gradients and hyperparameters come.

    Use `holofunc.tree.elementwise` where a rule allows it: inside functions compiled by `holofunc.jit` it runs on all
    tensors at once.

    Args:
        init: `InitFn`, ``init(params) -> state``, a tree of tensors.
        update: `PlainUpdateFn`; called as `UpdateFn`, ``update(updates, state, params=None, **extra)``. ``extra``
            carries what some transformations need beside gradients (``loss``, ``buffers``, ``weight``); the others
            ignore it. An ``update`` without ``**extra``, as those of optax, is given those that it names.

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

    __slots__ = ()

    def __new__(cls, init: InitFn, update: PlainUpdateFn) -> "GradientTransformation":
        check_function(init=init, update=update)
        if not isinstance(update, CheckedUpdate):
            update = _checked(update, _unless_ours(update))
        if isinstance(update, CheckedUpdate) and update.init is None:
            update = dataclasses.replace(update, init=init)
        return super().__new__(cls, _checked_init(init), update)


def _unless_ours(fn: Any) -> tuple[type, ...]:
    """What is known of a function that a user has written."""
    ours = torch.compiler.is_compiling() or getattr(fn, "__module__", "").startswith("holofunc.")
    return () if ours else (PointsAnywhere,)


@dataclasses.dataclass(frozen=True)
class CheckedInit:
    """An ``init`` that checks its parameters first, and names the transformation where they are wrong."""

    unchecked: InitFn
    name: str

    def __call__(self, params: Any, /) -> PyTree:
        check_params(params, self.name)
        return self.unchecked(params)


def _checked_init(init: InitFn, name: str = "") -> InitFn:
    if isinstance(init, CheckedInit) or torch.compiler.is_compiling():
        return init
    return CheckedInit(init, name or builder_of(init))


@dataclasses.dataclass(frozen=True)
class CheckedUpdate:
    """An ``update`` that checks its arguments first, and tells wrappers around it what it ``holds``.

    Attributes:
        unchecked: the function itself, for callers that have checked the gradients.
        holds: the classes of `holofunc.optim.capabilities` that it, or a transformation inside of it, has.
        init: what makes its states, to tell those of other parameters.
    """

    unchecked: UpdateFn
    holds: tuple[type, ...] = ()
    init: InitFn | None = None

    def __call__(
        self, updates: PyTree, state: PyTree, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        check_updates(updates, params)
        try:
            updates, new = self.unchecked(updates, state, params, **extra)
            return updates, in_dtypes_of(state, new, in_shapes=PointsAnywhere not in self.holds)
        except (tree.StructureError, RuntimeError) as error:
            problem = of_another_state(updates, error) if isinstance(error, tree.StructureError) else None
            if problem := problem or of_other_shapes(state, self.init, params):
                raise ValueError(problem) from error
            raise


def _checked(update: PlainUpdateFn, holds: tuple[type, ...]) -> UpdateFn:
    taking = taking_extra(update)
    if torch.compiler.is_compiling():  # built in a graph, by a transformation that checks its own arguments
        return taking
    return CheckedUpdate(checking_its_state(taking), holds)


def unchecked(tx: GradientTransformation) -> UpdateFn:
    """``tx.update``, for callers that have checked the gradients themselves."""
    return tx.update.unchecked if isinstance(tx.update, CheckedUpdate) else tx.update


def composed(
    init: InitFn, update: PlainUpdateFn, *txs: GradientTransformation, adds: tuple[type, ...] = ()
) -> GradientTransformation:
    """A transformation around ``txs``, which `holds` what they do and the capabilities that it ``adds``."""
    holds = (*adds, *(kind for tx in txs for kind in held_by(tx)))
    return GradientTransformation(init, _checked(update, holds))


def held_by(tx: GradientTransformation) -> tuple[type, ...]:
    """The capabilities that ``tx`` is known to hold: see `holofunc.optim.capabilities`."""
    return tx.update.holds if isinstance(tx.update, CheckedUpdate) else ()


class EmptyState(NamedTuple):
    """The state of a transformation that has none."""


def stateless(fn: Callable[..., PyTree], name: str = "") -> GradientTransformation:
    """The transformation without state that ``fn(updates, params) -> updates`` describes.

    Args:
        fn: a pure function of updates and parameters, which are None if ``update`` is called without.
        name: for messages; the function that made ``fn``, if there is one.

    Example:
        >>> import torch
        >>> from holofunc import optim, tree
        >>> tx = optim.stateless(lambda updates, params: tree.elementwise(torch.sign, updates))
        >>> tx.update({"w": torch.tensor([3.0, -2.0])}, tx.init({"w": torch.zeros(2)}))[0]
        {'w': tensor([ 1., -1.])}
    """
    check_function(fn=fn)

    def update(updates: PyTree, state: EmptyState, params: MaybeParams = None) -> tuple[PyTree, EmptyState]:
        return fn(updates, params), state

    return composed(_checked_init(lambda params: EmptyState(), name or builder_of(fn)), update, adds=_unless_ours(fn))


def stateless_with_tree_map(fn: Callable[[Tensor, Tensor | None], Tensor]) -> GradientTransformation:
    """The transformation without state that ``fn(update, param) -> update`` describes, tensor by tensor.

    Args:
        fn: a pure function of an update and its parameter, or None if ``update`` is called without parameters.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> optim.stateless_with_tree_map(lambda u, p: u - u.mean()).update({"w": torch.tensor([1.0, 3.0])}, ())[0]
        {'w': tensor([-1.,  1.])}
    """
    check_function(fn=fn)

    def of_all(updates: PyTree, params: MaybeParams) -> PyTree:
        return tree.map(lambda u: fn(u, None), updates) if params is None else tree.map(fn, updates, params)

    return composed(*stateless(of_all, builder_of(fn)), adds=_unless_ours(fn))


def with_extra_args_support(tx: tuple[InitFn, PlainUpdateFn]) -> GradientTransformation:
    """A pair of functions, optax's for instance, as a `GradientTransformation`.

    Its ``update`` gets of the extra arguments those that it names, and no others. Chains and wrappers do so by
    themselves.

    Args:
        tx: what has ``init`` and ``update``, for instance of ``update(updates, state, params=None)``.

    Example:
        >>> import collections
        >>> import torch
        >>> from holofunc import optim
        >>> def update(updates, state, params=None):
        ...     return updates, state
        >>> pair = collections.namedtuple("Pair", ("init", "update"))(lambda params: (), update)
        >>> tx = optim.with_extra_args_support(pair)
        >>> tx.update({"w": torch.ones(1)}, (), loss=torch.tensor(2.0))[0]
        {'w': tensor([1.])}
    """
    return as_transformation("tx", tx)


def identity() -> GradientTransformation:
    """The transformation that changes nothing."""
    return stateless(lambda updates, params: updates)


# --- chains ------------------------------------------------------------------------------------------------------


def chain(*txs: GradientTransformation) -> GradientTransformation:
    """Apply transformations one after the other; the state is the tuple of theirs.

    Raises:
        TypeError: something that is no transformation, by its position.

    Example:
        >>> from holofunc import optim
        >>> tx = optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(0.1))
    """
    txs = tuple(as_transformation(f"txs[{i}]", tx) for i, tx in enumerate(txs))

    def update(updates: PyTree, state: PyTree, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, PyTree]:
        got = len(state) if isinstance(state, (tuple, list)) else type(state).__name__
        if got != len(txs):
            raise ValueError(f"state must hold {len(txs)} states, one per transformation, got {got}")
        states = []
        for tx, inner in zip(txs, state, strict=True):
            updates, inner = unchecked(tx)(updates, inner, params, **extra)
            states.append(inner)
        return updates, tuple(states)

    return composed(lambda params: tuple(tx.init(params) for tx in txs), update, *txs)


def named_chain(**txs: GradientTransformation) -> GradientTransformation:
    """`chain` with a dict as its state: ``{"adam": AdamState(...), ...}``, so that saved states read by name.

    Raises:
        TypeError: something that is no transformation, by its name.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx = optim.named_chain(clip=optim.clip_by_global_norm(1.0), momentum=optim.trace(0.9))
        >>> list(tx.init({"w": torch.zeros(2)}))
        ['clip', 'momentum']
    """
    txs = {name: as_transformation(name, tx) for name, tx in txs.items()}

    def update(updates: PyTree, state: PyTree, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, PyTree]:
        got = list(state) if isinstance(state, Mapping) else None
        if got is None or set(got) != set(txs):
            raise ValueError(f"state must hold the states of {list(txs)}, got {got or type(state).__name__}")
        states = {}
        for name, tx in txs.items():
            updates, states[name] = unchecked(tx)(updates, state[name], params, **extra)
        return updates, {name: states[name] for name in state}

    return composed(lambda params: {name: tx.init(params) for name, tx in txs.items()}, update, *txs.values())


def apply_updates(params: Params, updates: PyTree) -> Params:
    """``params + updates``, in the dtype of the parameters.

    Raises:
        ValueError: updates of another structure or of other shapes.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> optim.apply_updates({"w": torch.ones(2)}, {"w": torch.full((2,), -0.5)})
        {'w': tensor([0.5000, 0.5000])}
    """
    check_updates(updates, params)
    return tree.elementwise(lambda p, u: (p + u).to(p.dtype), params, updates)


# --- accumulated gradients ---------------------------------------------------------------------------------------


def flush(tx: GradientTransformation, state: PyTree, params: Params, **extra: Any) -> tuple[PyTree, PyTree]:
    """Complete the accumulation of `multi_steps`: ``(updates, state)`` of the micro-batches since the last update.

    Nothing happens where there are none. It is one more call of ``tx.update``, with gradients of zero, ``flush=True``
    and ``extra``: transformations that count should stand inside of `multi_steps`, not around it.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.multi_steps(optim.sgd(1.0), every=4), {"w": torch.zeros(1)}
        >>> updates, state = tx.update({"w": torch.ones(1)}, tx.init(params), params)
        >>> updates
        {'w': tensor([0.])}
        >>> optim.flush(tx, state, params)[0]
        {'w': tensor([-1.])}
    """
    nothing = tree.elementwise(torch.zeros_like, params)
    if not accumulates(state):
        return nothing, state
    return tx.update(nothing, state, params, flush=True, **extra)


# --- checks ------------------------------------------------------------------------------------------------------


def as_transformation(name: str, tx: Any) -> GradientTransformation:
    """``tx``, made of a pair of functions if it is one from elsewhere; a TypeError if it is neither."""
    check_transformation(name, tx)
    return tx if isinstance(tx, GradientTransformation) else GradientTransformation(tx.init, tx.update)


def inside(outer: str, tx: Any) -> GradientTransformation:
    """``tx``, or a ValueError if it contains something that ``outer`` cannot wrap.

    Its ``init`` looks at its state too, which may come from a wrapper of the user's own.
    """
    tx = as_transformation("tx", tx)
    check_nesting(outer, lambda kind: any(issubclass(held, kind) for held in held_by(tx)))

    def init(params: Params) -> PyTree:
        state = tx.init(params)

        def has(kind: type) -> bool:
            if kind is KeepsWeights:  # which some do for a part of the parameters, perhaps for none
                return bool(averaged(state, dict(tree.leaves_with_path(params))))
            return bool(find(state, kind))

        check_nesting(outer, has)
        return state

    return tx._replace(init=init)
