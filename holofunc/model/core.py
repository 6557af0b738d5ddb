"""`Model`: an architecture as two pure functions, made of any module."""

import copy
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from holofunc import random, tree
from holofunc.model.checks import check, check_key, check_names
from holofunc.model.explained import explained
from holofunc.model.modes import set_mode
from holofunc.model.passes import Skeleton
from holofunc.model.references import Pure, named, state_buffers
from holofunc.model.skeleton import ChecksInput, built, copied, cumulative, filled, on_meta, seeded
from holofunc.model.table import Table, tabulate
from holofunc.typing import Buffers, Key, Params

__all__ = ["Model", "from_module", "lift"]


class Model(Pure):
    """An architecture as two pure functions, `init` and `apply`.

    Made by `lift`, `from_module`, or a constructor of `holofunc.models`. It holds no parameters.

    Example:
        >>> import torch
        >>> from holofunc import lift, random
        >>> model = lift(torch.nn.Linear, 3, 2)
        >>> params, buffers = model.init(random.key(0))
        >>> {name: tuple(p.shape) for name, p in params.items()}
        {'weight': (2, 3), 'bias': (2,)}
        >>> out, buffers = model.apply(params, buffers, torch.ones(4, 3))
        >>> out.shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        *,
        initialize: Callable[[nn.Module, Key], Params] | None = None,
        name: str | None = None,
    ) -> None:
        """
        Args:
            build: makes the module; called on the meta device, and for real by `init`.
            initialize: ``initialize(skeleton, key) -> values`` for some parameters; the others are initialized by the
                module's own constructor.
            name: used in messages; by default the class of the module.
        """
        body, self._constants, self._shared, self._placed = built(build)
        self._build = (lambda: copied(build())) if self._shared else build
        self._initialize = initialize
        self.name = name or type(body).__name__
        self._body = set_mode(body, False, self.name)
        self._param_shapes = {n: p.shape for n, p in body.named_parameters()}
        self._buffer_shapes = {n: b.shape for n, b in state_buffers(body).items()}
        self.aliases = _aliases(body)
        self._train_body = set_mode(copied(body), True, self.name)
        self._remat: tuple[str, ...] = ()
        self._evaluated = {
            False: Skeleton(set_mode(copied(body), False, self.name), self.name, self._buffer_shapes),
            True: Skeleton(cumulative(set_mode(copied(body), True, self.name)), self.name, self._buffer_shapes),
        }
        self._output_shapes: dict[tuple[torch.Size, torch.dtype], torch.Size | None] = {}

    def __repr__(self) -> str:
        count = sum(shape.numel() for shape in self._param_shapes.values())
        return f"Model({self.name}, {count:,} parameters)"

    def __deepcopy__(self, memo: Any) -> "Model":
        return self  # immutable

    @property
    def skeleton(self) -> nn.Module:
        """The module in eval mode on the meta device, for reading its structure. Do not call it."""
        return self._body

    @property
    def frozen(self) -> dict[str, bool]:
        """A mask for `holofunc.optim.freeze`: whether each parameter has ``requires_grad=False`` in the module.

        Example:
            >>> import torch
            >>> from holofunc import lift
            >>> lift(lambda: torch.nn.Linear(3, 2).requires_grad_(False)).frozen
            {'weight': True, 'bias': True}
        """
        return {n: not p.requires_grad for n, p in self._body.named_parameters()}

    def init(
        self, key: Key, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Params, Buffers]:
        """Parameters and buffers by state-dict name, as a function of ``key``.

        Args:
            key: of `holofunc.random`. The same key gives the same values on every device.
            device: of the values; None is the device of ``key``.
            dtype: of floating-point parameters and buffers; None is that of the module.

        Returns:
            ``(params, buffers)``, two flat dicts in the order of registration.
        """
        if not tree.is_known(random.check_key(key)):
            raise ValueError(
                f"key must have a value, as {self.name}'s constructor is Python, neither mapped nor compiled; "
                "for many models: tree.stack([model.init(key) for key in keys])"
            )
        seed = int(random.bits(key, 2)[0])
        device = torch.device(device) if device is not None else key.device
        if device.type == "meta":
            real = self._body
        else:
            real = seeded(self._build, seed)
        started = {n: x.detach() for n, x in named(real)}
        if device.type != "meta":
            started.update({n: x.clone() for n, x in {**{n: started[n] for n in self._placed}, **self._shared}.items()})
        params, buffers = ({n: started[n] for n in shapes} for shapes in (self._param_shapes, self._buffer_shapes))
        if self._initialize is not None and device.type != "meta":
            params.update(self._initialize(real, key.cpu()))
        place = _placer(device, dtype, self.name)
        return {n: place(n, p) for n, p in params.items()}, {n: place(n, b) for n, b in buffers.items()}

    def apply(
        self,
        params: Params,
        buffers: Buffers,
        /,
        *inputs: Any,
        train: bool = False,
        key: Key | None = None,
        **options: Any,
    ) -> tuple[Any, Buffers]:
        """Evaluate the model.

        Args:
            params: made by `init`, or any tensors of the same names and shapes.
            buffers: likewise. Not changed.
            inputs: of the module's ``forward``, usually images of shape (N, C, H, W). Not changed.
            train: evaluate in train mode: batch statistics, dropout.
            key: for random draws, in both modes. Each draw has its own key: this one, folded with the path of the
                submodule and the index of the call in it.
            options: keyword arguments of the module's ``forward``, except arguments named ``train`` or ``key``, which
                must be positional.

        Returns:
            ``(output, buffers)``; the buffers are those passed in if the module does not update them, as in eval mode.

        Raises:
            ValueError: a name or shape is wrong; a key is needed; the module draws in a way that cannot be keyed;
                batch statistics are needed of single samples under `vmap`.
            TypeError: images of the wrong dtype.
        """
        params, buffers = self.named_once(params), self.named_once(buffers)
        self.check(params, buffers)
        self.check_inputs(*inputs, params=params)
        if isinstance(train, Tensor):
            raise TypeError(f"train must be True or False, got {train!r}")
        check_key(key)
        skeleton = self._evaluated[bool(train)]
        try:
            return skeleton(params, buffers, self._on_device(params), inputs, options, key)
        except Exception as error:
            if torch.compiler.is_compiling():
                raise
            part = skeleton.part_of(error)
            if (said := explained(error, f"{self.name}{part and f', in {part},'}")) is not None:
                raise said from error
            if part and self.name not in str(error):
                error.add_note(f"(in {part} of {self.name})")
            raise

    def named_once(self, values: Mapping[str, Tensor], *, agree: bool = False) -> Any:
        """Rename tensors with several names (tied weights, shared modules) to their first names.

        Args:
            values: by name; if a tensor has several values, that of its first name counts.
            agree: whether to compare several values of a tensor.

        Raises:
            ValueError: they differ.
        """
        further = [n for n in values if n in self.aliases] if self.aliases and isinstance(values, Mapping) else []
        if not further:
            return values
        for name in further if agree else ():
            other = values.get(self.aliases[name], values[name])
            if other is not values[name] and not torch.equal(other, values[name]):
                raise ValueError(f"{name} and {self.aliases[name]} are one tensor of {self.name}, got two")
        firsts = {n: x for n, x in values.items() if n not in self.aliases}
        return {self.aliases[n]: values[n] for n in further} | firsts

    def with_frozen(self, modules: Collection[str]) -> "Model":
        """The same model with some modules always in eval mode: fixed statistics, and no dropout.

        Args:
            modules: names of modules, including their submodules.

        Raises:
            ValueError: there is no such module.
        """
        body = copied(self._train_body)
        parts = dict(body.named_modules())
        if unknown := sorted(set(modules) - parts.keys()):
            raise ValueError(f"modules must be among {sorted(parts)}, got {unknown}")
        for name in modules:
            parts[name].eval()
        return self._training_by(body)

    def with_remat(self, modules: Collection[str]) -> "Model":
        """The same model with activation checkpointing: the gradient recomputes the activations of some modules.

        Args:
            modules: names of modules, or patterns of names such as ``"layer?.*"``.

        Raises:
            ValueError: there is no such module.
        """
        names = [name for name, _ in self._train_body.named_modules() if name]
        chosen = [name for name in names if any(fnmatchcase(name, module) for module in modules)]
        if unknown := [module for module in modules if not any(fnmatchcase(name, module) for name in names)]:
            raise ValueError(f"modules must be among {names}, or patterns of these, got {unknown}")
        other = copy.copy(self)
        other._remat = tuple(n for n in chosen if not any(n.startswith(f"{outer}.") for outer in chosen))
        return other._training_by(self._train_body)

    def with_layers(self, replace: Callable[[str, nn.Module], nn.Module | None]) -> "Model":
        """The same model with other layers in train mode, whose parameters and buffers keep the names of the old ones.

        Args:
            replace: ``replace(path, layer)`` returns a new layer, or None to keep it.
        """
        body = copied(self._train_body)
        for path, layer in list(body.named_modules()):
            other = replace(path, layer)
            if other is not None and path:
                body.set_submodule(path, other.to("meta").train(layer.training))
            elif other is not None:
                body = other.to("meta").train(layer.training)
        return self._training_by(body)

    def _training_by(self, body: nn.Module) -> "Model":
        other = copy.copy(self)
        other._train_body = body
        skeleton = Skeleton(cumulative(copied(body)), self.name, self._buffer_shapes, self._remat)
        other._evaluated = {**self._evaluated, True: skeleton}
        return other

    def check(self, params: Params, buffers: Buffers) -> None:
        """Check the names and shapes of parameters and buffers.

        Raises:
            ValueError: some are missing, unexpected or misshapen; the message lists them.
        """
        check_names("params", params, self._param_shapes, self.name)
        check_names("buffers", buffers, self._buffer_shapes, self.name)

    def check_inputs(self, *inputs: Any, params: Params | None = None) -> None:
        """Check inputs, if the architecture has a check.

        Raises:
            TypeError: wrong dtype, or outside autocast a dtype other than that of ``params``.
            ValueError: wrong shape.
        """
        if not isinstance(self._body, ChecksInput):
            return
        self._body.check_input(*inputs)
        dtype = next((p.dtype for p in (params or {}).values()), inputs[0].dtype)
        if inputs[0].dtype != dtype and not torch.is_autocast_enabled(inputs[0].device.type):
            raise TypeError(f"images must have the dtype of the parameters, {dtype}, got {inputs[0].dtype}")

    def output_shape(self, x: Tensor) -> torch.Size | None:
        """The shape of the output in eval mode, without computing it; None if the output is not one tensor."""
        kind = x.shape, x.dtype
        if kind not in self._output_shapes:
            state = {n: c.to("meta") for n, c in self._constants.items()}
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                out = torch.func.functional_call(on_meta(self._body), state, (x.detach().to("meta"),))
            self._output_shapes[kind] = out.shape if isinstance(out, Tensor) else None
        return self._output_shapes[kind]

    def _on_device(self, params: Params) -> dict[str, Tensor]:
        if not self._constants:
            return {}
        like = next(iter(params.values()), None)
        device = None if like is None else like.device
        dtype = None if like is None else like.dtype
        return {n: c.to(device, dtype if c.is_floating_point() else None) for n, c in self._constants.items()}

    def to_module(self, params: Params, buffers: Buffers) -> nn.Module:
        """An ordinary `torch.nn.Module` in eval mode with copies of these values, for export and deployment."""
        params, buffers = (self.named_once(values, agree=True) for values in (params, buffers))
        self.check(params, buffers)
        return filled(copied(self._body), {**params, **buffers, **self._on_device(params)}).eval()

    def tabulate(self, *inputs: Tensor, depth: int | None = None) -> Table:
        """A table of submodules with output shapes, parameters and multiply-adds, without computing anything.

        Args:
            inputs: of `apply`; only shapes and dtypes matter. Use a batch of one image to get the costs per image.
            depth: number of levels to list; None is all.

        Returns:
            A table that prints as text, and as HTML in notebooks.

        Raises:
            ValueError: the forward pass reads values, so it cannot run on the meta device.

        Example:
            >>> import torch
            >>> from holofunc import lift
            >>> model = lift(lambda: torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)))
            >>> model.tabulate(torch.zeros(1, 4))
            path  type        output shape  parameters  MACs
                  Sequential  (1, 2)                23    18
            0     Linear      (1, 3)                15    12
            1     ReLU        (1, 3)                 0     0
            2     Linear      (1, 2)                 8     6
        """
        return tabulate(self._body, self.name, inputs, self._constants, depth)


def lift(build: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> Model:
    """Make a model of any module constructor: ``lift(torchvision.models.resnet18, num_classes=10)``.

    Parameters are initialized by the constructor's own code, with generators seeded from the key; torch's global
    generator is restored afterwards.

    Example:
        >>> import torch
        >>> from holofunc import lift
        >>> lift(torch.nn.Conv2d, 3, 8, kernel_size=3)
        Model(Conv2d, 224 parameters)
    """
    if not callable(build) or isinstance(build, nn.Module):
        raise TypeError(f"build must be a constructor of modules, got {build!r}; for a module use from_module")
    try:
        frozen = copy.deepcopy((args, kwargs))  # modules among the arguments are copied
    except Exception as error:
        raise TypeError(
            f"arguments of build must be such that they can be copied, as it is called more than once, got {args}, "
            f"{kwargs} ({error}); hand over a function that makes them: lift(lambda: build(...))"
        ) from error

    def build_anew() -> nn.Module:
        own_args, own_kwargs = copy.deepcopy(frozen)
        return build(*own_args, **own_kwargs)

    return Model(build_anew)


def from_module(module: nn.Module) -> tuple[Model, Params, Buffers]:
    """Make ``(model, params, buffers)`` of an existing module, which is not changed.

    Example:
        >>> import torch
        >>> from holofunc import from_module
        >>> model, params, buffers = from_module(torch.nn.Linear(3, 2))
        >>> sorted(params)
        ['bias', 'weight']
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if lacking := [n for n, x in named(module) if x.is_meta]:
        raise ValueError(f"{lacking[0]} of {type(module).__name__} is on the meta device, and has no value: lift it")
    check(module)  # a copy would lose what stands in the way
    kept = copied(module)
    model = Model(lambda: copied(kept))
    params = {n: p.detach().clone() for n, p in module.named_parameters()}
    buffers = {n: b.detach().clone() for n, b in module.named_buffers() if n in model._buffer_shapes}
    return model, params, buffers


def _aliases(body: nn.Module) -> dict[str, str]:
    """The first name of each tensor with several names (shared modules, tied weights), by its other names."""
    first: dict[int, str] = {}
    for name, x in (*body.named_parameters(remove_duplicate=False), *body.named_buffers(remove_duplicate=False)):
        first.setdefault(id(x), name)
    every = (*body.named_parameters(remove_duplicate=False), *body.named_buffers(remove_duplicate=False))
    return {name: first[id(x)] for name, x in every if name != first[id(x)]}


def _placer(device: torch.device, dtype: torch.dtype | None, model: str) -> Callable[[str, Tensor], Tensor]:
    def place(name: str, x: Tensor) -> Tensor:
        if x.is_meta and device.type != "meta":
            raise ValueError(f"{name} of {model} has no values: its constructor puts it on the meta device")
        return x.to(device, dtype if x.is_floating_point() else None)

    return place
