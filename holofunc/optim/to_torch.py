"""Any transformation as a ``torch.optim.Optimizer``, for loops that are written for one."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from holofunc import tree
from holofunc.optim.base import GradientTransformation, as_transformation
from holofunc.optim.capabilities import eval_params
from holofunc.optim.hyperparams import HyperparamsState, get_hyperparams, set_hyperparams
from holofunc.tree.states import with_current_names
from holofunc.typing import Params, PyTree

__all__ = ["TransformationOptimizer", "to_torch"]

STATE = "transformation"
"""The key of the optimizer's ``state`` under which that of the transformation lies, flat: a tensor by path."""


class TransformationOptimizer(torch.optim.Optimizer):  # noqa: TID251 - what others' loops ask for
    """The base class of what `to_torch` returns: keeps parameters and the state of a transformation, and changes them.

    All groups are given to the transformation together, as one dict by name: it may clip by a global norm. Rates of
    their own for some parameters are a `partition`'s, or a mask's, business. A parameter without a gradient counts
    with a gradient of zero, and is not moved.

    Args:
        params: ``module.named_parameters()``, so that masks and labels know the names; or ``module.parameters()``,
            which are called ``"0"``, ``"1"`` and so on. Dicts of them for groups, as torch takes them.
        lr: what schedulers change. The learning rate of ``tx``, if `inject_hyperparams` keeps it (and its default);
            otherwise a factor of the updates, by default 1.
        hyperparams: values for what `inject_hyperparams` keeps, which stand in ``param_groups`` too.

    Raises:
        ValueError: groups of different options; an option that ``tx`` does not have; in ``add_param_group``, parameters
            that come later.
    """

    tx: GradientTransformation
    state: Any  # torch declares keys that are tensors, and keeps any other too

    def __init__(self, params: Iterable[Any], lr: float | Tensor | None = None, **hyperparams: Any) -> None:
        # torch looks at the groups, and calls add_param_group; options that are not known yet are filled in below
        super().__init__(params, {"lr": lr, **hyperparams})
        if doubles := [name for name, times in Counter(self._names()).items() if times > 1]:
            raise ValueError(
                f"params must have different names, got two of {doubles[:3]}: name the modules apart, as in "
                "nn.ModuleDict({'encoder': encoder, 'decoder': decoder}).named_parameters(), or give parameters()"
            )
        state = self.tx.init(self._by_name())
        self._like = tree.map(lambda _: 0, state)
        self._hyperparams = _settable(state)
        own = {name: _as_written(get_hyperparams(state)[name]) for name in self._hyperparams}
        own["lr"] = own.pop("learning_rate", 1.0)
        if unknown := sorted(set(hyperparams) - set(own)):
            raise ValueError(f"tx must have injected the options it is given, got {unknown}; there are {sorted(own)}")
        self.defaults = {**own, **{k: v for k, v in self.defaults.items() if v is not None}}
        for group in self.param_groups:
            given = {k: v for k, v in group.items() if v is not None}
            group.clear()
            group.update({**self.defaults, **given})
        self._options()
        self.state[cast(Any, STATE)] = _apart(state, self._params())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if STATE in self.state:
            raise ValueError(
                "parameters must be given when the optimizer is built, as its state is made for all of them: give all, "
                "with optim.unfreeze or optim.freeze for those that rest"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, **extra: Any) -> Any:
        """One update; the loss of ``closure``, if there is one.

        Args:
            closure: computes loss and gradients anew. With it, ``tx`` receives ``loss``, and the functions ``grad_fn``
                and ``value_and_grad_fn`` of other parameters, as `sam` and `lbfgs` need them.
            extra: further arguments for ``tx``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            of_closure = {
                "grad_fn": lambda at: self._at(closure, at)[1],
                "value_and_grad_fn": lambda at: self._at(closure, at),
            }
            known = {} if loss is None else {"loss": torch.as_tensor(loss).detach()}  # Lightning's may return None
            extra = {**known, **of_closure, **extra}
        params, options = self._by_name(), self._options()
        state = tree.rebuild(self._like, self.state[cast(Any, STATE)].values())
        if self._hyperparams:
            own = {name: options["lr" if name == "learning_rate" else name] for name in self._hyperparams}
            state = set_hyperparams(state, **own)
        grads = self._grads()
        updates, state = self.tx.update(grads, state, params, **extra)
        self.state[cast(Any, STATE)] = _apart(state, [*grads.values(), *params.values()])
        factor = 1.0 if "learning_rate" in self._hyperparams else options["lr"]
        for name, p in zip(self._names(), self._params(), strict=True):
            if p.grad is not None:
                p.add_(updates[name] * factor)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own, given = self.state[cast(Any, STATE)], state_dict.get("state", {}).get(STATE)
        if not isinstance(given, Mapping):
            raise ValueError(f"state_dict must be that of a to_torch optimizer, with a state called {STATE!r}")
        given = with_current_names(given, own)
        if error := tree.structure_error("state_dict", given, own, "this optimizer's state"):
            raise ValueError(error)
        for path, x in own.items():
            if given[path].shape != x.shape:
                raise ValueError(
                    f"state_dict must have the shapes of this optimizer's state, got "
                    f"{tuple(given[path].shape)} at {path!r} for {tuple(x.shape)}"
                )
        super().load_state_dict(state_dict)
        self.state[cast(Any, STATE)] = {path: given[path].to(x, copy=True) for path, x in own.items()}

    def __getstate__(self) -> dict[str, Any]:  # copies are made of it
        return {**super().__getstate__(), "_like": self._like, "_hyperparams": self._hyperparams}

    def transformation_state(self) -> PyTree:
        """The state of the transformation, for what reads one: `get_hyperparams`, `skipped`, `holofunc.tree.get`."""
        return tree.rebuild(self._like, self.state[cast(Any, STATE)].values())

    def eval_params(self) -> Params:
        """The parameters to evaluate with, by name: see `holofunc.optim.eval_params`."""
        return eval_params(self.transformation_state(), self._by_name())

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _names(self) -> list[str]:
        named = [name for group in self.param_groups for name in group.get("param_names", ())]
        return named or [str(i) for i in range(len(self._params()))]

    def _by_name(self) -> Params:
        return dict(zip(self._names(), [p.detach() for p in self._params()], strict=True))

    def _grads(self) -> Params:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in self._params()]
        dense = [g.to_dense() if g.layout is torch.sparse_coo else g for g in grads]
        return dict(zip(self._names(), dense, strict=True))

    def _options(self) -> dict[str, Any]:
        """The options, which are those of all groups."""
        first, *others = ({k: v for k, v in g.items() if k in self.defaults} for g in self.param_groups)
        for i, other in enumerate(others, 1):
            if differing := sorted(k for k in first if first[k] != other[k]):
                raise ValueError(
                    f"param_groups must have the same options, got {differing[0]}={first[differing[0]]!r} in group 0 "
                    f"and {other[differing[0]]!r} in group {i}: put what differs into tx, by optim.partition or a mask"
                )
        return first

    def _at(self, closure: Callable[[], Any], at: Params) -> tuple[Tensor, Params]:
        """Loss and gradients of ``closure`` at other parameters, which are put back afterwards."""
        params = self._params()
        before = [(p.clone(), None if p.grad is None else p.grad.clone()) for p in params]
        for name, p in zip(self._names(), params, strict=True):
            p.copy_(at[name])
        with torch.enable_grad():
            loss = torch.as_tensor(closure()).detach()
        grads = tree.map(torch.clone, self._grads())
        for p, (value, grad) in zip(params, before, strict=True):
            p.copy_(value)
            p.grad = grad
        return loss, grads


def to_torch(tx: GradientTransformation) -> type[TransformationOptimizer]:
    """A class of ``torch.optim.Optimizer``s that apply ``tx``: one line for loops that own a module.

    Closures, ``param_groups``, ``state_dict()`` and torch's schedulers work as with torch's own. See
    `TransformationOptimizer` for the arguments, and `from_torch` for the way back.

    Args:
        tx: any transformation whose updates descend. Made by `inject_hyperparams`, its learning rate is that of
            ``param_groups``, which schedulers change.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> module = torch.nn.Linear(2, 1)
        >>> tx = optim.inject_hyperparams(optim.lion)(learning_rate=1e-3)
        >>> optimizer = optim.to_torch(tx)(module.named_parameters())
        >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        >>> module(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> scheduler.step()
        >>> optimizer.param_groups[0]["lr"]
        0.0005
    """
    tx = as_transformation("tx", tx)
    return type("Transformation", (TransformationOptimizer,), {"tx": tx, "__module__": __name__})


def _apart(state: PyTree, others: Iterable[Tensor]) -> dict[str, Tensor]:
    """The leaves of ``state`` by path, copied where they lie in the memory of ``others``, which loops write to."""
    taken = {x.untyped_storage().data_ptr() for x in others}
    leaves = tree.leaves_with_path(state)
    return {path: x.clone() if x.untyped_storage().data_ptr() in taken else x for path, x in leaves}


def _as_written(value: Tensor) -> float:
    """The number of the fewest digits that this one is the rounding of: 0.1, where fp32 has 0.10000000149."""
    return float(f"{value.item():.7g}") if value.dtype == torch.float32 else value.item()


def _settable(state: PyTree) -> list[str]:
    """The injected hyperparameters that may be set, by the names of `get_hyperparams`."""
    fixed = {name for holder in _holders(state) for name in holder.scheduled}
    return [name for name in get_hyperparams(state) if name.rpartition("/")[2] not in fixed]


def _holders(state: PyTree) -> list[HyperparamsState]:
    if state is None or not tree.is_node(state):
        return []
    own = [state] if isinstance(state, HyperparamsState) else []
    return own + [holder for child in tree.children(state).values() for holder in _holders(child)]
