"""Gradient transformations: pairs of pure functions ``(init, update)``, and chains of them.

``init(params) -> state`` and ``update(updates, state, params=None, **extra) -> (updates, state)``. What ``update``
returns is *added* to the parameters (`apply_updates`), so the sign of descent is part of it. All that changes lives in
the state, as tensors: a transformation has no memory of its own, and one can serve many states.
"""

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from holofunc import tree
from holofunc.arena import Arena
from holofunc.optim.checks import check_params, check_updates, need_params, of_another_state
from holofunc.typing import Params, PyTree

__all__ = [
    "EmptyState",
    "GradientTransformation",
    "MaybeParams",
    "apply_updates",
    "chain",
    "check_params",
    "check_transformation",
    "eval_params",
    "flush",
    "gave_up",
    "identity",
    "looks_twice",
    "named_chain",
    "need_params",
    "skipped",
    "stateless",
]

MaybeParams: TypeAlias = Params | None
"""The parameters, where a rule may do without. A name, since Dynamo cannot evaluate ``|`` in a nested annotation."""

InitFn = Callable[[PyTree], PyTree]
UpdateFn = Callable[..., tuple[PyTree, PyTree]]


class _Pair(NamedTuple):
    init: InitFn
    update: UpdateFn


class GradientTransformation(_Pair):
    """A pair of pure functions.

    ``update`` refuses gradients that do not have the structure and the shapes of the parameters, or the structure that
    its state was made for, whatever it does with them; and a state of another type than the NamedTuple with which its
    argument ``state`` is annotated. The state that it returns has the dtypes of the one before, in whatever precision
    gradients and hyperparameters come.

    Args:
        init: ``init(params) -> state``, a tree of tensors.
        update: ``update(updates, state, params=None, **extra) -> (updates, state)``. ``extra`` carries what some
            transformations need beside gradients (``loss``, ``buffers``, ``weight``); the others ignore it. An
            ``update`` without ``**extra``, as those of optax, is given those that it names.

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

    __slots__ = ()

    def __new__(cls, init: InitFn, update: UpdateFn) -> "GradientTransformation":
        return super().__new__(cls, init, _checked(update))


def _checked(update: UpdateFn) -> UpdateFn:
    if _unchecked(update) is not update:
        return update

    of_state = _checking_its_state(_taking_extra(update))

    @functools.wraps(update)
    def checked(updates: PyTree, state: PyTree, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, PyTree]:
        check_updates(updates, params)
        try:
            updates, new = of_state(updates, state, params, **extra)
        except tree.StructureError as error:
            if problem := of_another_state(updates, error):
                raise ValueError(problem) from error
            raise
        return updates, _in_dtypes_of(state, new)

    checked.checks = (checked, of_state)  # type: ignore[attr-defined]
    return checked


def _taking_extra(update: UpdateFn) -> UpdateFn:
    """``update`` itself, if it takes any extra arguments; otherwise one that passes it those that it names."""
    code = getattr(update, "__code__", None)  # read here, and not by `inspect`: also transformations built in graphs
    if code is not None and code.co_flags & inspect.CO_VARKEYWORDS:
        return update
    if torch.compiler.is_compiling() and code is not None:
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    else:
        parameters = inspect.signature(update).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return update
        names = tuple(parameters)

    @functools.wraps(update)
    def taking(updates: PyTree, state: PyTree, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, PyTree]:
        own = {name: value for name, value in extra.items() if name in names}
        return update(updates, state, params, **own) if len(names) > 2 else update(updates, state, **own)

    return taking


def _checking_its_state(update: UpdateFn) -> UpdateFn:
    """``update``, which refuses a state of another type than the NamedTuple that it is annotated with."""
    kind: Any = getattr(update, "__annotations__", {}).get("state")
    if not getattr(kind, "_fields", ()):
        return update

    def of_state(updates: PyTree, state: PyTree, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, PyTree]:
        if not isinstance(state, kind):
            raise ValueError(f"state must be {kind.__name__}, as init makes it, got {type(state).__name__}")
        return update(updates, state, params, **extra)

    return of_state


def _in_dtypes_of(old: PyTree, new: PyTree) -> PyTree:
    """``new`` itself, unless something of it has another dtype than in ``old``."""
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return new.to(old.dtype)
    if isinstance(old, Arena) and isinstance(new, Arena):
        vectors = [y.to(x.dtype) for x, y in zip(old.vectors, new.vectors, strict=True)]
        same = all(map(operator.is_, vectors, new.vectors))
        return new if same else Arena(vectors, new.layout, new.per_leaf)
    if isinstance(new, Arena) or old is None or new is None or not (tree.is_node(old) and tree.is_node(new)):
        return new
    olds, news = tree.children(old), tree.children(new)
    if list(olds) != list(news):
        return new
    done = [_in_dtypes_of(x, y) for x, y in zip(olds.values(), news.values(), strict=True)]
    return new if all(map(operator.is_, done, news.values())) else tree.with_children(new, done)


def _unchecked(update: UpdateFn) -> UpdateFn:
    """The function that `_checked` was given; a function that wraps its result, and has its attributes, is another."""
    checks: Any = getattr(update, "checks", (None, None))
    outer, inner = checks
    return inner if outer is update else update


def unchecked(tx: GradientTransformation) -> UpdateFn:
    """``tx.update``, for callers that have checked the gradients themselves."""
    return _unchecked(tx.update)


def composed(
    init: InitFn, update: UpdateFn, *txs: GradientTransformation, adds: tuple[str, ...] = ()
) -> GradientTransformation:
    """A transformation around ``txs``, with their traits and those that it ``adds``."""
    tx = GradientTransformation(init, update)
    if not torch.compiler.is_compiling():  # where it was checked before
        tx.update.traits = frozenset(adds).union(*map(traits_of, txs))  # type: ignore[attr-defined]
    return tx


def traits_of(tx: GradientTransformation) -> frozenset[str]:
    """What wrappers around ``tx`` may have to know of it: see `holofunc.optim.nesting`."""
    own = tx.update.__module__.startswith("holofunc.") if hasattr(tx.update, "__module__") else False
    return getattr(tx.update, "traits", frozenset() if own else frozenset({"foreign"}))


class EmptyState(NamedTuple):
    """The state of a transformation that has none."""


def stateless(fn: Callable[..., PyTree], name: str = "stateless") -> GradientTransformation:
    """The transformation without state that ``fn(updates, params) -> updates`` describes.

    Example:
        >>> import torch
        >>> from holofunc import optim, tree
        >>> tx = optim.stateless(lambda updates, params: tree.elementwise(torch.sign, updates))
        >>> tx.update({"w": torch.tensor([3.0, -2.0])}, tx.init({"w": torch.zeros(2)}))[0]
        {'w': tensor([ 1., -1.])}
    """

    def init(params: Params) -> EmptyState:
        check_params(params, name)
        return EmptyState()

    def update(
        updates: PyTree, state: EmptyState, params: MaybeParams = None, **extra: Any
    ) -> tuple[PyTree, EmptyState]:
        return fn(updates, params), state

    return GradientTransformation(init, update)


def identity() -> GradientTransformation:
    """The transformation that changes nothing."""
    return stateless(lambda updates, params: updates, "identity")


# --- chains ------------------------------------------------------------------------------------------------------


def chain(*txs: GradientTransformation) -> GradientTransformation:
    """Apply transformations one after the other; the state is the tuple of theirs.

    Raises:
        TypeError: something that is no transformation, by its position.

    Example:
        >>> from holofunc import optim
        >>> tx = optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(0.1))
    """
    for i, tx in enumerate(txs):
        check_transformation(f"txs[{i}]", tx)

    def init(params: Params) -> PyTree:
        check_params(params)
        return tuple(tx.init(params) for tx in txs)

    def update(updates: PyTree, state: PyTree, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, PyTree]:
        got = len(state) if isinstance(state, (tuple, list)) else type(state).__name__
        if got != len(txs):
            raise ValueError(f"state must hold {len(txs)} states, one per transformation, got {got}")
        states = []
        for tx, inner in zip(txs, state, strict=True):
            updates, inner = unchecked(tx)(updates, inner, params, **extra)
            states.append(inner)
        return updates, tuple(states)

    return composed(init, update, *txs)


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
    for name, tx in txs.items():
        check_transformation(name, tx)

    def init(params: Params) -> PyTree:
        check_params(params)
        return {name: tx.init(params) for name, tx in txs.items()}

    def update(updates: PyTree, state: PyTree, params: MaybeParams = None, **extra: Any) -> tuple[PyTree, PyTree]:
        got = list(state) if isinstance(state, Mapping) else None
        if got is None or set(got) != set(txs):
            raise ValueError(f"state must hold the states of {list(txs)}, got {got or type(state).__name__}")
        states = {}
        for name, tx in txs.items():
            updates, states[name] = unchecked(tx)(updates, state[name], params, **extra)
        return updates, {name: states[name] for name in state}

    return composed(init, update, *txs.values())


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


# --- what is asked of a state, however deep the answer lies in it ---------------------------------------------------


def eval_params(state: PyTree, params: Params) -> Params:
    """The parameters to evaluate with: slow weights, average or averaged iterate, if ``state`` holds one.

    A state says so by a method ``averaged(params) -> {path: tensor}``; it is found through any nesting. Of several, one
    inside the other, the outermost counts. Parameters that no state speaks for are returned as they are.

    Raises:
        ValueError: ``params`` without some of those that ``state`` was made for.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"w": torch.ones(1)}
        >>> tx = optim.chain(optim.clip_by_global_norm(1.0), optim.ema_params(optim.sgd(1.0), decay=0.5))
        >>> updates, state = tx.update({"w": torch.ones(1)}, tx.init(params), params)
        >>> optim.eval_params(state, optim.apply_updates(params, updates))
        {'w': tensor([0.5000])}
    """
    flat = dict(tree.leaves_with_path(params))
    try:
        found = averaged(state, flat)
        missing = sorted(found.keys() - flat.keys())
    except KeyError as error:
        missing = [error.args[0]]
    if missing:
        raise ValueError(f"params must hold all parameters that state was made for: missing {missing}")
    return tree.rebuild(params, [found[path].to(p.dtype) if path in found else p for path, p in flat.items()])


def parts(state: PyTree) -> list[PyTree]:
    """The states inside ``state``, but for those that ``memory`` names: copies of what another one was."""
    if isinstance(state, Arena):  # holds tensors, and need not be cut to find that out
        return []
    return [child for name, child in tree.children(state).items() if name not in getattr(state, "memory", ())]


def averaged(state: PyTree, flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the states inside ``state`` offer for evaluation in place of the parameters ``flat``, both by path."""
    if state is None or not tree.is_node(state):
        return {}
    if hasattr(state, "averaged"):
        return state.averaged(flat)
    return {path: x for child in parts(state) for path, x in averaged(child, flat).items()}


def skipped(state: PyTree) -> Tensor | None:
    """Whether the last update was refused: a 0-d bool tensor, or None if no part of ``state`` can refuse one.

    Reads the fields named ``skipped``. Inside an open window of `multi_steps` nothing has been refused yet.
    """
    if state is None or not tree.is_node(state):
        return None
    found = [state.skipped] if hasattr(state, "skipped") else []
    refused = _any(found + [skipped(child) for child in parts(state)])
    return refused & (state.window == 0) if refused is not None and hasattr(state, "window") else refused


def gave_up(state: PyTree) -> Tensor | None:
    """Whether as many updates in a row were refused as `apply_if_finite` tolerates; 0-d bool, or None as `skipped`."""
    if state is None or not tree.is_node(state):
        return None
    found = [state.consecutive >= state.limit] if hasattr(state, "limit") else []
    return _any(found + [gave_up(child) for child in parts(state)])


def looks_twice(state: PyTree) -> bool:
    """Whether updates need the extra argument ``grad_fn``, the gradient at other parameters, as those of `sam` do."""
    return holds(state, "looks_twice")


def holds(state: PyTree, mark: str) -> bool:
    """Whether a state inside ``state`` has the attribute ``mark``: how wrappers learn what they are wrapped around."""
    if state is None or not tree.is_node(state):
        return False
    return hasattr(state, mark) or any(holds(child, mark) for child in parts(state))


def _any(answers: list[Tensor | None]) -> Tensor | None:
    """Whether one of the 0-d ``answers`` is true; None if nobody answered."""
    given = [answer for answer in answers if answer is not None]
    return torch.stack(given).any() if given else None


def flush(tx: GradientTransformation, state: PyTree, params: Params) -> tuple[PyTree, PyTree]:
    """Close the open window of `multi_steps`: ``(updates, state)`` of the micro-batches gathered so far.

    Nothing happens where no window is open. It is one more call of ``tx.update``, with gradients and weight zero and
    ``flush=True``: transformations that count should stand inside of `multi_steps`, not around it.

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
    if not holds(state, "window"):
        return nothing, state
    return tx.update(nothing, state, params, flush=True)


# --- checks ------------------------------------------------------------------------------------------------------


def check_transformation(name: str, tx: Any) -> None:
    """Raise a TypeError unless ``tx`` is a transformation."""
    if not (isinstance(tx, tuple) and hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(f"{name} must be a GradientTransformation, got {tx!r}")
