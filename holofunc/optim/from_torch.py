"""States of ``torch.optim`` and of Holocron, brought over."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.adam import AdamaxState, AdamState, NadamState
from holofunc.optim.adam_variants import TadamState
from holofunc.optim.adan import AdanState
from holofunc.optim.ademamix import AdEMAMixState
from holofunc.optim.base import GradientTransformation
from holofunc.optim.factored import FactoredState
from holofunc.optim.layerwise import LarsState
from holofunc.optim.muon import MuonState
from holofunc.optim.numerics import ABSENT
from holofunc.optim.radam import BeliefState
from holofunc.optim.rmsprop import AdadeltaState, RmsState, RssState
from holofunc.optim.sgd import RpropState
from holofunc.optim.to_torch import STATE
from holofunc.optim.transforms import TraceState
from holofunc.tree.states import with_current_names
from holofunc.typing import Params, PyTree

__all__ = ["from_torch"]

ADAM = {"mu": "exp_avg", "nu": "exp_avg_sq", "nu_max": "max_exp_avg_sq"}
ENTRIES: dict[type, dict[str, str]] = {
    AdamState: ADAM,
    AdamaxState: {"mu": "exp_avg", "nu": "exp_inf"},
    BeliefState: {**ADAM, "nu": "exp_avg_var"},  # the authors' name: Holocron's state cannot be told from Adam's
    NadamState: {**ADAM, "mu_product": "mu_product"},
    TadamState: {**ADAM, "weight": "W_t"},
    AdEMAMixState: {**ADAM, "mu_slow": "exp_avg_slow"},
    AdanState: {  # Holocron's names: its exp_avg_sq holds the differences, its exp_avg_delta the squares
        "mu": "exp_avg",
        "delta": "exp_avg_sq",
        "nu": "exp_avg_delta",
        "previous": "prev_grad",
        "nu_max": "max_exp_avg_delta",
    },
    TraceState: {"trace": "momentum_buffer"},
    LarsState: {"trace": "momentum_buffer"},
    MuonState: {"mu": "momentum_buffer"},
    RmsState: {"nu": "square_avg", "mu": "grad_avg"},
    RssState: {"total": "sum"},
    AdadeltaState: {"nu": "square_avg", "delta": "acc_delta"},
    RpropState: {"steps": "step_size", "previous": "prev"},
    FactoredState: {"rows": "row_var", "columns": "col_var", "nu": "variance"},
}
"""What torch and Holocron call the fields of our states."""


def from_torch(
    state_dict: Mapping[str, Any], params: Params, tx: GradientTransformation, *, names: Sequence[str] | None = None
) -> PyTree:
    """The state of ``tx`` with moments and counters of a torch optimizer's ``state_dict()``.

    Learning rates and other hyperparameters are not brought over: they are arguments of ``tx``.

    Args:
        state_dict: of an optimizer of the Adam family, SGD, RMSprop, Adagrad, Adadelta, Rprop, Adafactor (of matrices
            and vectors), Muon, one of Holocron's; or of one of `to_torch`, whose whole state comes over. Holocron's
            AdaBelief calls ``exp_avg_sq`` what is no average of squares: rename it to ``exp_avg_var``.
        params: the parameters, by name.
        tx: the transformation that continues, e.g. ``adamw(1e-3)``; it may be chained, masked or partitioned.
        names: of the parameters in the order in which torch's optimizer got them, where the ``state_dict`` does not
            hold names itself; None is the order of ``params``.

    Raises:
        ValueError: numbers, names or shapes that do not fit, steps that differ, a state that ``tx`` needs and the
            ``state_dict`` does not have. What wrappers keep (slow weights, accumulated gradients) starts afresh.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> model = torch.nn.Linear(2, 1)
        >>> old = torch.optim.AdamW(model.parameters())
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> old.step()
        >>> params = {name: p.detach().clone() for name, p in model.named_parameters()}
        >>> optim.from_torch(old.state_dict(), params, optim.adamw(1e-3))["adam"].mu["weight"]
        tensor([[0.1000, 0.1000]])
    """
    if isinstance(own := state_dict.get("state", {}).get(STATE), Mapping):
        return _of_transformation(own, tx.init(params))
    entries = _entries(state_dict, dict(tree.leaves_with_path(params)), names)
    steps = {int(entry["step"]) for entry in entries.values() if "step" in entry}
    if len(steps) > 1:
        raise ValueError(f"state_dict must hold one number of steps for all parameters, got {sorted(steps)}")
    return _filled(tx.init(params), entries, steps.pop() if steps else None, tree.paths(params))


def _of_transformation(found: Mapping[str, Tensor], like: PyTree) -> PyTree:
    """The state of a `to_torch` optimizer, which holds it as it is, flat."""
    own = dict(tree.leaves_with_path(like))
    found = with_current_names(found, own)
    if error := tree.structure_error("state_dict", found, own, "the state of tx"):
        raise ValueError(error)
    return tree.rebuild(like, [found[path].to(x, copy=True) for path, x in own.items()])


def _entries(state_dict: Mapping[str, Any], flat: Mapping[str, Tensor], names: Sequence[str] | None) -> dict[str, Any]:
    """torch's state of each parameter, by name."""
    if lacking := {"state", "param_groups"} - set(state_dict):
        raise ValueError(f"state_dict must be that of a torch optimizer: missing {sorted(lacking)}")
    groups = state_dict["param_groups"]
    indices = [index for group in groups for index in group["params"]]
    if names is None:
        own = [name for group in groups for name in group.get("param_names", ())]
        names = own if len(own) == len(indices) else list(flat)
    if len(names) != len(indices):
        raise ValueError(
            f"state_dict must hold as many parameters as there are names, got {len(indices)} for {len(names)}"
        )
    if unknown := set(names) - set(flat):
        raise ValueError(f"state_dict holds parameters that params does not: {sorted(unknown)}")
    entries = {name: state_dict["state"][i] for name, i in zip(names, indices, strict=True) if i in state_dict["state"]}
    if not entries:
        raise ValueError("state_dict holds no state: the optimizer has not made a step")
    return entries


def _filled(node: PyTree, entries: Mapping[str, Any], steps: int | None, paths: Sequence[str]) -> PyTree:
    if node is None or not tree.is_node(node):
        return node
    fields = tree.children(node)
    keys = ENTRIES.get(type(node), {})
    moved = any(path in entries for field in keys if field in fields for path in tree.paths(fields[field]))
    new = []
    for field, value in fields.items():
        what = f"{type(node).__name__}.{field}"
        if field == "step" and hasattr(node, "_fields") and (steps is not None or moved):
            new.append(torch.full_like(value, 1 if steps is None else steps))  # SGD does not count: at least one
        elif field in keys and value != ABSENT:
            new.append(_field(what, value, keys[field], entries, paths))
        elif hasattr(node, "_fields") and "inner" not in fields and _is_memory(value):
            holds = sorted({key for entry in entries.values() for key in entry})
            raise ValueError(f"{what} has no counterpart in torch: tx needs it, the state_dict has {holds}")
        else:
            new.append(_filled(value, entries, steps, paths))
    return tree.with_children(node, new)


def _is_memory(value: PyTree) -> bool:
    """Whether the field of a rule remembers gradients or parameters: tensors with axes, unlike counters and keys."""
    if isinstance(value, Tensor):
        return value.ndim > 0 and value.is_floating_point()
    return tree.is_node(value) and not _holds_states(value) and any(x.ndim for x in tree.leaves(value))


def _holds_states(node: PyTree) -> bool:
    if node is None or not tree.is_node(node):
        return False
    return hasattr(node, "_fields") or any(map(_holds_states, tree.children(node).values()))


def _field(what: str, value: PyTree, key: str, entries: Mapping[str, Any], paths: Sequence[str]) -> PyTree:
    def of(name: str, old: Tensor) -> Tensor:
        if name not in paths:
            raise ValueError(f"{what} must be kept by parameter, got {name!r}: from_torch does not reach into flatten")
        entry = entries.get(name)
        if entry is None:  # torch keeps nothing for a parameter that never had a gradient
            return old
        if entry.get(key) is None:
            raise ValueError(f"{what} needs {key!r}, the state_dict has {sorted(entry)} for {name!r}")
        new = torch.as_tensor(entry[key]).detach().to(old, copy=True)
        in_a_row = old.ndim <= 1 and sum(n != 1 for n in new.shape) <= 1  # torch keeps means as rows and columns
        if new.numel() != old.numel() or (new.shape != old.shape and new.ndim > 1 and not in_a_row):
            raise ValueError(f"{what} must have shape {tuple(old.shape)} for {name!r}, got {tuple(new.shape)}")
        return new.view(old.shape)

    if not tree.is_node(value):  # one number for all parameters
        return of(next(iter(entries)), value)
    return tree.rebuild(value, [of(path, old) for path, old in tree.leaves_with_path(value)])
