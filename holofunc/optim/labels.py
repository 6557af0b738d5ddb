"""Labels and masks: which parameter is treated how, decided by its path.

A label tree has the structure of the parameters and a plain Python value at each leaf: a string for `partition`, a bool
for a mask, a number for `scale_leaves` or `unfreeze`. It is made once, outside of compiled code.
"""

import contextlib
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.ranges import check_fraction
from holofunc.typing import Params, PyTree

__all__ = [
    "Mask", "check_labels", "check_mask", "label_by_path", "layer_decay", "mask_values", "no_decay_mask", "resolve",
]  # fmt: skip

Mask: TypeAlias = Mapping[str, bool] | Callable[[Params], Mapping[str, bool]]
"""A bool for each parameter, or a function of the parameters that returns them."""

Pattern: TypeAlias = str | re.Pattern[str]
"""A glob over the whole path, the dotted prefix of a module, or a regular expression searched for in the path."""


def label_by_path(
    params: Params, rules: Mapping[Pattern, Any] | Sequence[tuple[Pattern, Any]], default: Any = None
) -> PyTree:
    """A label for each parameter: that of the first rule whose pattern covers its path.

    Args:
        params: any tree; only its paths are used.
        rules: ``(pattern, label)`` pairs. A pattern without wildcards names a parameter or everything below it:
            ``"layer1"`` covers ``layer1.0.weight`` and not ``layer10.0.weight``. ``"*.bias"`` is a glob,
            ``re.compile(r"\\.bn\\d")`` is searched for.
        default: the label of what no rule covers; without one, that is an error.

    Returns:
        Labels in the structure of ``params``.

    Raises:
        ValueError: a rule covers nothing, or a parameter is covered by no rule and there is no default; the message
            lists what exists.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"layer1.weight": torch.ones(2, 2), "layer1.bias": torch.ones(2), "layer10.weight": torch.ones(2)}
        >>> optim.label_by_path(params, [("*.bias", "bias"), ("layer1", "early")], default="late")
        {'layer1.weight': 'early', 'layer1.bias': 'bias', 'layer10.weight': 'late'}
    """
    pairs = list(rules.items() if isinstance(rules, Mapping) else rules)
    for pair in pairs:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], (str, re.Pattern))):
            raise TypeError(f"rules must be (pattern, label) pairs or a dict of them, got {pair!r}")
    paths = tree.paths(params)
    for pattern, _ in pairs:
        if not any(_covers(pattern, path) for path in paths):
            raise ValueError(f"rule {_shown(pattern)} matches none of the parameters {_listed(paths)}")
    uncovered = [path for path in paths if not any(_covers(pattern, path) for pattern, _ in pairs)]
    if default is None and uncovered:
        raise ValueError(
            f"no rule covers {_listed(uncovered)}: add a rule or a default to {[_shown(p) for p, _ in pairs]}"
        )
    return tree.rebuild(params, [next((label for p, label in pairs if _covers(p, path)), default) for path in paths])


def _covers(pattern: Pattern, path: str) -> bool:
    return pattern.search(path) is not None if isinstance(pattern, re.Pattern) else tree.matches(path, pattern)


def _shown(pattern: Pattern) -> str:
    return repr(pattern.pattern if isinstance(pattern, re.Pattern) else pattern)


def _listed(names: Iterable[str], limit: int = 12) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f", ... {len(names) - limit} more" if len(names) > limit else "")


def layer_decay(params: Params, groups: Sequence[Pattern | Sequence[Pattern]], decay: float) -> PyTree:
    """Learning-rate factors that fall by ``decay`` from each group of layers to the one before it, for `scale_leaves`.

    Args:
        params: any tree.
        groups: patterns, or lists of them, from the input of the network to its output: the last one gets factor 1.
            Together they cover everything.
        decay: in (0, 1].

    Raises:
        ValueError: as `label_by_path`, or a ``decay`` out of range.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"stem.w": torch.ones(1), "body.w": torch.ones(1), "head.w": torch.ones(1)}
        >>> optim.layer_decay(params, ["stem", "body", "head"], 0.5)
        {'stem.w': 0.25, 'body.w': 0.5, 'head.w': 1.0}
    """
    check_fraction(decay=decay)
    rules = [
        (pattern, decay ** (len(groups) - 1 - depth))
        for depth, group in enumerate(groups)
        for pattern in ([group] if isinstance(group, (str, re.Pattern)) else group)
    ]
    return label_by_path(params, rules)


NORM = re.compile(r"(.*_)?([a-z]*norms?(_pre|_post|_layer)?|bn|ln)[_\d]*")
"""What modules that normalize are called."""


def no_decay_mask(params: Params, *, embeddings: bool = True) -> PyTree:
    """The usual mask for weight decay: False for biases, norms and everything of fewer than two axes, True elsewhere.

    A norm is a module called so: ``bn1``, ``ln_2``, ``norm``, ``batch_norm``, ``layernorm3``, ``norm_pre``; not
    ``normal_head``.

    Args:
        params: any tree of tensors.
        embeddings: whether embedding tables (a name with ``embed`` in its path) are decayed.

    Returns:
        Bools in the structure of ``params``: True where weight decay applies.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params = {"fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2), "norm.scale": torch.ones(1, 2)}
        >>> optim.no_decay_mask(params)
        {'fc.weight': True, 'fc.bias': False, 'norm.scale': False}
    """

    def decays(path: str, ndim: int) -> bool:
        parts = path.replace("/", ".").lower().split(".")
        norm = any(NORM.fullmatch(part) for part in parts)
        return ndim > 1 and parts[-1] != "bias" and not norm and (embeddings or not any("embed" in p for p in parts))

    return tree.rebuild(params, map(decays, tree.paths(params), tree.leaves(tree.map_shapes(len, params))))


# --- how transformations take them ----------------------------------------------------------------------------------


_here = threading.local()
_in_graph: list[PyTree] = []


def _divided() -> list[PyTree]:
    """The trees whose parts are being computed now, outer ones first: in this thread; Dynamo knows no threads."""
    if torch.compiler.is_compiling():
        return _in_graph
    if not hasattr(_here, "trees"):
        _here.trees = []
    return _here.trees


@contextlib.contextmanager
def dividing(params: PyTree) -> Iterator[None]:
    """Let labels inside be resolved for all of ``params``: what transformations around some of the parameters open."""
    _divided().append(params)
    try:
        yield
    finally:
        _divided().pop()


def resolve(labels: Any, params: Params) -> PyTree:
    """Labels as a tree: themselves, or what they return for the parameters if they are a function.

    Where ``params`` is one of the parts that `partition` and its kin make, both are for all parameters: of these
    labels, those of the part are taken. A tree for the part alone is taken as it is.
    """
    whole = next((w for w in _divided() if _holds(w, params)), None)
    if callable(labels):
        labels = labels(params if whole is None else whole)
    if whole is None or not _holds(labels, params):
        return labels
    by_path = dict(tree.leaves_with_path(labels))
    return tree.rebuild(params, [by_path[path] for path in tree.paths(params)])


def _holds(whole: PyTree, part: PyTree) -> bool:
    return set(tree.paths(part)) <= set(tree.paths(whole))


def check_labels(name: str, labels: Any, params: Params, kinds: type | tuple[type, ...]) -> None:
    """Raise unless ``labels`` has the structure of ``params`` and a leaf of one of ``kinds`` everywhere.

    Raises:
        ValueError: naming what is missing or unexpected; parameters without names, as `flatten` makes them.
        TypeError: naming the path of a leaf of another kind.
    """
    flat = tree.leaves_with_path(params)
    if flat and all(path == dtype_name(x) and x.ndim == 1 for path, x in flat):
        raise ValueError(
            f"{name} must choose among named parameters, which flatten has put into one vector per dtype: put flatten "
            "inside, as in masked(flatten(tx), mask)"
        )
    labels = resolve(labels, params)
    if error := tree.structure_error(name, labels, params, "the parameters"):
        raise ValueError(f"{error}; a function of the parameters is possible too")
    for path, label in tree.leaves_with_path(labels):
        if not isinstance(label, kinds):
            names = " or ".join(k.__name__ for k in (kinds if isinstance(kinds, tuple) else (kinds,)))
            raise TypeError(f"{name} must hold {names}, got {label!r} at {path!r}")


def check_mask(mask: Mask | None, params: Params) -> None:
    """Raise unless ``mask`` is None, or fits ``params``."""
    if mask is not None:
        check_labels("mask", mask, params, bool)


def dtype_name(x: Tensor) -> str:
    """What `flatten` calls the vector of the parameters with the dtype of ``x``."""
    return str(x.dtype).removeprefix("torch.")


def mask_flags(mask: Mask | None, params: PyTree) -> PyTree:
    """A mask as a tree of bools: True everywhere for None."""
    return tree.map_shapes(lambda _: True, params) if mask is None else resolve(mask, params)


def mask_values(mask: Mask | None, params: PyTree) -> PyTree:
    """A mask as factors, 1 where it is True and 0 elsewhere, in the form that `tree.elementwise` takes."""
    return tree.leaf_values(mask_flags(mask, params), params)
