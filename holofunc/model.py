"""Models as pairs of pure functions ``(init, apply)`` over flat dicts of tensors.

An architecture is an ordinary `torch.nn.Module`, built on the meta device: a skeleton without storage. `Model.apply`
evaluates it on the caller's parameters and buffers with `torch.func.functional_call`, and returns the new buffers
instead of writing them anywhere. Train and eval mode are two skeletons, so nobody calls ``.train()``.

A module that draws random numbers has a non-persistent int64 buffer named ``key``; `Model.apply` fills it with the
caller's key folded with a hash of the module's path. The stock dropout layers of torch, torchvision and timm are
replaced by such a module when they are lifted.
"""

import copy
import zlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from holofunc import random
from holofunc.typing import Buffers, Key, Params, PyTree, Scalar

__all__ = ["Drop", "Model", "drop", "from_module", "lift", "stochastic_key"]


class Model:
    """An architecture as two pure functions, `init` and `apply`.

    Made by `lift`, by `from_module`, or by a constructor of `holofunc.models`; building one allocates no parameters.

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
            build: makes the module; called on the meta device, and wherever ordinary modules are wanted.
            initialize: ``initialize(skeleton, key) -> values`` of the parameters it covers; the rest, and all of them
                by default, start as the module's own constructor would have them.
            name: shown in messages; by default the class of the module.
        """
        self._build = build
        self._initialize = initialize
        self._eval = _keyed(_on_meta(build)).eval()
        self._train = _keyed(_on_meta(build)).train()
        self.name = name or type(self._eval).__name__
        self._keys = {
            path: zlib.crc32(path.encode())
            for path, module in self._train.named_modules()
            if "key" in module._non_persistent_buffers_set and module.training
        }
        self._deaf = [path for path, module in self._train.named_modules() if _draws_unseen(module)]
        persistent = set(self._eval.state_dict(keep_vars=True))
        self._param_shapes = {n: p.shape for n, p in self._eval.named_parameters()}
        self._buffer_shapes = {n: b.shape for n, b in self._eval.named_buffers() if n in persistent}
        self._constants = self._read_constants(persistent)
        self._output_shapes: dict[tuple[torch.Size, torch.dtype], torch.Size | None] = {}

    def _read_constants(self, persistent: set[str]) -> dict[str, Tensor]:
        """The buffers that are part of the architecture (filters, grids): in no state dict, the same for all states."""
        names = [n for n, _ in self._eval.named_buffers() if n not in persistent and n.split(".")[-1] != "key"]
        if not names:
            return {}
        real = dict(_seeded(self._build, 0).named_buffers())
        return {n: real[n].clone() for n in names}

    def __repr__(self) -> str:
        count = sum(shape.numel() for shape in self._param_shapes.values())
        return f"Model({self.name}, {count:,} parameters)"

    @property
    def skeleton(self) -> nn.Module:
        """The module in eval mode on the meta device: for reading its structure, not for calling."""
        return self._eval

    def init(
        self, key: Key, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Params, Buffers]:
        """Parameters and buffers, by state-dict name: a function of ``key`` alone.

        Args:
            key: of `holofunc.random`. The same key gives the same values on every device.
            device: where to put them; None is the device of ``key``.
            dtype: of the floating parameters and buffers; None is the module's own.

        Returns:
            ``(params, buffers)``, two flat dicts in the order of the module's registration.
        """
        seed = int(random.bits(key, 2)[0])
        device = torch.device(device) if device is not None else key.device
        if device.type == "meta":
            real: nn.Module = self._eval
        else:
            real = _seeded(self._build, seed)
        params = {n: p.detach() for n, p in real.named_parameters()}
        buffers = {n: b.detach() for n, b in real.named_buffers() if n in self._buffer_shapes}
        if self._initialize is not None and device.type != "meta":
            params.update(self._initialize(real, key.cpu()))
        place = _placer(device, dtype)
        return {n: place(p) for n, p in params.items()}, {n: place(b) for n, b in buffers.items()}

    def apply(
        self, params: Params, buffers: Buffers, *inputs: Any, train: bool = False, key: Key | None = None
    ) -> tuple[Any, Buffers]:
        """Evaluate the model.

        Args:
            params: as `init` returns them, or any tensors of the same names and shapes.
            buffers: likewise. Never changed.
            inputs: what the module's ``forward`` takes, usually images of shape (N, C, H, W).
            train: evaluate in train mode: batch statistics, dropout.
            key: for the layers that draw; needed when ``train=True`` and there are any.

        Returns:
            ``(output, buffers)``; in eval mode the buffers are the ones passed in.

        Raises:
            ValueError: names missing, unexpected or of another shape; no key where one is needed; batch statistics
                of samples that are mapped one by one.
            TypeError: images of the wrong dtype.
        """
        self.check(params, buffers)
        skeleton = self._train if train else self._eval
        state: dict[str, Tensor] = {**params, **self._on_device(params)}
        if train:
            buffers = {n: b.clone() for n, b in buffers.items()}
            state.update(self._site_keys(key))
        state.update(buffers)
        self.check_inputs(*inputs, params=params)
        try:
            return torch.func.functional_call(skeleton, state, inputs), buffers
        except RuntimeError as error:
            if "Batch norm got a batched tensor" not in str(error):
                raise
            raise ValueError(
                f"{self.name} normalizes over the batch, and one sample under vmap has none: use train=False (with "
                "buffers that a pass over the batch in train mode has renewed), or a model with GroupNorm"
            ) from error

    def with_frozen(self, modules: Collection[str]) -> "Model":
        """The same model, with some modules always in eval mode: their statistics stand still, and nothing is dropped.

        Args:
            modules: names of modules; what is inside of them stays in eval mode too.

        Raises:
            ValueError: there is no such module.
        """
        known = dict(self._train.named_modules())
        if unknown := sorted(set(modules) - known.keys()):
            raise ValueError(f"modules must be among {sorted(known)}, got {unknown}")
        frozen = copy.copy(self)
        frozen._train = copy.deepcopy(self._train)
        parts = dict(frozen._train.named_modules())
        for name in modules:
            parts[name].eval()
        frozen._keys = {path: salt for path, salt in self._keys.items() if parts[path].training}
        return frozen

    def check(self, params: Params, buffers: Buffers) -> None:
        """Raise unless these are the model's names and shapes.

        Raises:
            ValueError: one message that lists what is missing, unexpected or misshapen.
        """
        _check_names("params", params, self._param_shapes, self.name)
        _check_names("buffers", buffers, self._buffer_shapes, self.name)

    def check_inputs(self, *inputs: Any, params: Params | None = None) -> None:
        """Raise what the architecture has to say of inputs that it cannot take.

        Raises:
            TypeError: another dtype, or another than that of ``params`` outside of autocast.
            ValueError: another shape.
        """
        check = getattr(self._eval, "check_input", None)
        if check is None:
            return
        check(*inputs)
        dtype = next((p.dtype for p in (params or {}).values()), inputs[0].dtype)
        if inputs[0].dtype != dtype and not torch.is_autocast_enabled(inputs[0].device.type):
            raise TypeError(f"images must have the dtype of the parameters, {dtype}, got {inputs[0].dtype}")

    def output_shape(self, x: Tensor) -> torch.Size | None:
        """The shape of the output in eval mode, without computing it; None if the output is not one tensor."""
        kind = x.shape, x.dtype
        if kind not in self._output_shapes:
            state = {n: c.to("meta") for n, c in self._constants.items()}
            with torch.no_grad():
                out = torch.func.functional_call(self._eval, state, (x.detach().to("meta"),))
            self._output_shapes[kind] = out.shape if isinstance(out, Tensor) else None
        return self._output_shapes[kind]

    def _site_keys(self, key: Key | None) -> dict[str, Tensor]:
        if self._deaf:
            raise ValueError(
                f"{self.name} cannot run with train=True: {', '.join(self._deaf)} would draw dropout from torch's "
                "global generator. Build it with dropout=0 there, or use layers of holofunc.nn"
            )
        if not self._keys:
            return {}
        if key is None:
            raise ValueError(f"{self.name} draws random numbers when train=True: key must be given, got None")
        keys = random.fold_in_each(key, list(self._keys.values())).unbind()
        return {f"{path}.key" if path else "key": site for path, site in zip(self._keys, keys, strict=True)}

    def _on_device(self, params: Params) -> dict[str, Tensor]:
        if not self._constants:
            return {}
        like = next(iter(params.values()), None)
        device = None if like is None else like.device
        dtype = None if like is None else like.dtype
        return {n: c.to(device, dtype if c.is_floating_point() else None) for n, c in self._constants.items()}

    def to_module(self, params: Params, buffers: Buffers) -> nn.Module:
        """An ordinary `torch.nn.Module` in eval mode with copies of these values: for export and deployment."""
        self.check(params, buffers)
        module = _on_meta(self._build)
        for n, constant in self._on_device(params).items():
            path, _, leaf = n.rpartition(".")
            setattr(module.get_submodule(path), leaf, constant.clone())
        for path in [n for n, m in module.named_modules() if "key" in m._non_persistent_buffers_set]:
            site = module.get_submodule(path)
            site.key = torch.zeros(2, dtype=torch.int64, device=next((p.device for p in params.values()), None))
        values = {**params, **buffers}
        module.load_state_dict({n: v.detach().clone() for n, v in values.items()}, strict=False, assign=True)
        return module.eval()


def lift(build: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> Model:
    """The model of any module constructor: ``lift(torchvision.models.resnet18, num_classes=10)``.

    Parameters start as the constructor's own code initializes them, from a generator seeded by the key; torch's
    global generator is as before afterwards.

    Example:
        >>> import torch
        >>> from holofunc import lift
        >>> lift(torch.nn.Conv2d, 3, 8, kernel_size=3)
        Model(Conv2d, 224 parameters)
    """
    if not callable(build) or isinstance(build, nn.Module):
        raise TypeError(f"build must be a constructor of modules, got {build!r}; for a module use from_module")
    frozen = copy.deepcopy((args, kwargs))  # modules among the arguments are copied, never touched

    def build_anew() -> nn.Module:
        own_args, own_kwargs = copy.deepcopy(frozen)
        return build(*own_args, **own_kwargs)

    return Model(build_anew)


def from_module(module: nn.Module) -> tuple[Model, Params, Buffers]:
    """A module that exists, as ``(model, params, buffers)``; the module itself is left alone.

    Example:
        >>> import torch
        >>> from holofunc import from_module
        >>> model, params, buffers = from_module(torch.nn.Linear(3, 2))
        >>> sorted(params)
        ['bias', 'weight']
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    frozen = copy.deepcopy(module)
    model = Model(lambda: copy.deepcopy(frozen))
    params = {n: p.detach().clone() for n, p in module.named_parameters()}
    buffers = {n: b.detach().clone() for n, b in module.named_buffers() if n in model._buffer_shapes}
    return model, params, buffers


def stochastic_key(module: nn.Module) -> None:
    """Declare, in a module's constructor, that its train-mode forward draws from ``self.key`` (int64 of shape (2,))."""
    module.register_buffer("key", torch.zeros(2, dtype=torch.int64), persistent=False)


def drop(x: Tensor, p: Scalar, *, key: Key, shared: int | None = None) -> Tensor:
    """Zero elements, channels or samples with probability ``p`` and scale the rest by ``1 / (1 - p)``.

    Args:
        p: in [0, 1]; a 0-d tensor where it follows a schedule.
        key: of `holofunc.random`.
        shared: the first axis over which a draw is shared: ``None`` draws per element (dropout), 2 per channel
            (spatial dropout), 1 per sample (stochastic depth), 0 once for the batch.
    """
    shape = [n if shared is None or d < shared else 1 for d, n in enumerate(x.shape)]
    kept = random.uniform(key, shape) >= p
    rate = 1.0 - p
    least = 2.0**-24  # below it no draw is kept, and no scale is needed
    rate = rate.clamp_min(least).to(x.dtype) if isinstance(rate, Tensor) else max(rate, least)
    return torch.where(kept, x / rate, 0.0)


class Drop(nn.Module):
    """`drop` in train mode, by the buffer ``key``; the identity in eval mode."""

    key: Tensor

    def __init__(self, p: float, shared: int | None = None) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"p must be in [0, 1], got {p}")
        self.p, self.shared = p, shared
        if p > 0:
            stochastic_key(self)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return drop(x, self.p, key=self.key, shared=self.shared)

    def extra_repr(self) -> str:
        return f"p={self.p}, shared={self.shared}"


# --- skeletons ---------------------------------------------------------------------------------------------------


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """The module without storage. Constructors that read tensor values run on the CPU first."""
    try:
        with torch.device("meta"):
            module = build()
    except (RuntimeError, NotImplementedError):
        module = _seeded(build, 0)
    if not isinstance(module, nn.Module):
        raise TypeError(f"build must return a torch.nn.Module, got {type(module).__name__}")
    return module.to("meta")


def _seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The module with the values its constructor draws from ``seed``; the global generator is put back."""
    generator = torch.default_generator
    before = generator.get_state()
    try:
        generator.manual_seed(seed)
        with torch.device("cpu"):
            return build()
    finally:
        generator.set_state(before)


def _keyed(module: nn.Module) -> nn.Module:
    """``module`` with every stock dropout layer in it replaced by `Drop`."""
    replacement = _drop_for(module)
    if replacement is not None:
        return replacement
    for name, child in list(module.named_children()):
        new = _keyed(child)
        if new is not child:
            setattr(module, name, new)
    return module


def _drop_for(module: nn.Module) -> Drop | None:
    kind = type(module).__name__
    if isinstance(module, nn.Dropout):
        return Drop(module.p).to("meta")
    if isinstance(module, (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)):
        return Drop(module.p, shared=2).to("meta")
    if kind == "StochasticDepth":  # torchvision
        return Drop(module.p, shared=1 if module.mode == "row" else 0).to("meta")  # type: ignore[arg-type]
    if kind == "DropPath" and not module._non_persistent_buffers_set:  # timm
        return Drop(getattr(module, "drop_prob", 0.0) or 0.0, shared=1).to("meta")
    return None


def _draws_unseen(module: nn.Module) -> bool:
    """Whether a module of torch draws inside a fused call, where no key can reach."""
    if isinstance(module, (nn.AlphaDropout, nn.FeatureAlphaDropout)):
        return module.p > 0
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return float(module.dropout) > 0
    return isinstance(module, nn.RReLU)


def _placer(device: torch.device, dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(device, dtype if x.is_floating_point() else None)


def _check_names(argument: str, got: Mapping[str, PyTree], expected: Mapping[str, torch.Size], model: str) -> None:
    if not isinstance(got, Mapping):
        raise TypeError(f"{argument} must be a dict of tensors by name, got {type(got).__name__} ({model}.apply)")
    problems = []
    if missing := [n for n in expected if n not in got]:
        problems.append(f"missing {missing[:8]}")
    if extra := [n for n in got if n not in expected]:
        problems.append(f"unexpected {extra[:8]}")
    for n, shape in expected.items():
        if n in got and got[n].shape != shape:
            problems.append(f"{n} has shape {tuple(got[n].shape)}, expected {tuple(shape)}")
    if problems:
        raise ValueError(f"{argument} does not fit {model}: {'; '.join(problems[:12])}")
