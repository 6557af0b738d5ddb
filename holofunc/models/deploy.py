"""Merging of branches and normalizations into convolutions, for deployment."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from holofunc import tree
from holofunc.model import Model
from holofunc.model.given import each
from holofunc.model.skeleton import copied, filled, tensors
from holofunc.models.base import Images, image_channels, is_sequence
from holofunc.models.branches import below
from holofunc.models.derived import Derived
from holofunc.models.maps import Features
from holofunc.ops.reparam import fuse_conv_bn
from holofunc.typing import Buffers, Params

__all__ = ["reparametrize"]

KINDS: dict[type, type] = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}
SIZES = (224, 64, 32, 8)
"""Sizes of test images if no example is given; runs at all sizes that the model accepts have to agree."""


def reparametrize(
    model: Model, params: Params, buffers: Buffers, *, example: Tensor | tuple[Any, ...] | None = None
) -> tuple[Model, Params, Buffers]:
    """Merge consecutive linear layers into one convolution. The function in eval mode stays the same.

    Each block of RepVGG, MobileOne and RepViT becomes one layer. In any model, also a lifted one, a BatchNorm is merged
    into the convolution before it, using its running statistics. The new model has no branches and normalizations, also
    if it is trained further.

    A pair is merged if a run on the meta device shows that only the BatchNorm reads the convolution's output, that
    nothing else reads their tensors, and that both are of torch's own types, called once and without hooks.
    Parametrizations (weight norm, spectral norm) are resolved. Everything else is unchanged.

    Args:
        model: any model; one with nothing to merge is returned unchanged.
        params: of the model.
        buffers: of the model.
        example: an input of the model, or a tuple of its inputs; only shapes matter. None is images.

    Returns:
        ``(model, params, buffers)`` with the names of Holocron's deployed models.

    Raises:
        ValueError: params or buffers do not fit the model, or it was made by `features`, whose maps may be between
            layers that would be merged.

    Example:
        >>> from holofunc import models, random
        >>> model = models.repvgg_a0()
        >>> models.reparametrize(model, *model.init(random.key(0)))[0]
        Model(repvgg_a0, 22,244,650 parameters)
    """
    if isinstance(model, Features):
        raise ValueError("a model of feature maps cannot be merged: reparametrize the model, then take its features")
    model.check(params, buffers)
    blocks = _blocks(model.skeleton)
    pairs = _pairs(model, blocks, example)
    if not blocks and not pairs:
        return model, params, buffers

    def change(module: nn.Module) -> nn.Module:
        for path in blocks:
            module.set_submodule(path, module.get_submodule(path).deployed())  # type: ignore[operator]
        for conv, norm in pairs.items():
            layer = _resolved(module.get_submodule(conv))
            module.set_submodule(conv, layer)
            if layer.bias is None:
                layer.register_parameter("bias", nn.Parameter(torch.zeros(layer.out_channels)))
            module.set_submodule(norm, nn.Identity())
        return module

    def merge(params: Params, buffers: Buffers) -> tuple[Params, Buffers]:
        values: dict[str, Tensor] = {**params, **buffers}
        for path in blocks:
            block = model.skeleton.get_submodule(path)
            values.update(_named(path, block.merge(below(values, path))))  # type: ignore[operator]
        for conv, norm in pairs.items():
            eps = model.skeleton.get_submodule(norm).eps
            layer = _values(model.skeleton.get_submodule(conv), below(values, conv))
            values.update(_named(conv, fuse_conv_bn(layer, below(values, norm), eps=eps)))  # type: ignore[arg-type]
        return {n: values[n] for n in new._param_shapes}, {n: values[n] for n in new._buffer_shapes}

    new = Derived(model, change=change, convert=merge)
    whole = model.around(new) if isinstance(model, Derived) else new
    return whole, *merge(params, buffers)


def _named(path: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{path}.{name}": value for name, value in values.items()}


def _blocks(skeleton: nn.Module) -> list[str]:
    """The outermost modules of holofunc that have a method ``merge``."""
    found: list[str] = []
    for path, module in skeleton.named_modules():
        ours = hasattr(module, "merge") and type(module).__module__.startswith("holofunc.")
        if ours and not any(path.startswith(f"{outer}.") for outer in found):
            found.append(path)
    return found


# --- parametrizations --------------------------------------------------------------------------------------------


def _resolved(layer: Any) -> Any:
    """A copy of ``layer`` with plain parameters; torch's own function would change the class of the original too."""
    if not parametrize.is_parametrized(layer):
        return layer
    plain: Any = copied(layer)
    values: dict[str, Any] = {name: nn.Parameter(getattr(plain, name).detach()) for name in plain.parametrizations}
    plain.__class__ = type(layer).__bases__[0]  # torch made a subclass with properties
    del plain._modules["parametrizations"]
    plain._parameters = values | plain._parameters
    return plain


def _values(layer: nn.Module, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Weight and bias of a convolution, computed if they are parametrized."""
    if not parametrize.is_parametrized(layer):
        return values
    return {n: p.detach() for n, p in _resolved(filled(copied(layer), values)).named_parameters()}


# --- pairs -------------------------------------------------------------------------------------------------------


class _Readers(TorchFunctionMode):
    """Counts, by identity, the calls that read a tensor to compute another one, or write into it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()
        self.kept: list[Any] = []  # keeps their ids from being reused

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if out is None or tensors(out):  # a function that writes into a tensor may return None
            self.counts.update(id(x) for x in tensors((args, kwargs or {})))
        self.kept.append(out)
        return out


def _pairs(model: Model, blocks: list[str], example: Any) -> dict[str, str]:
    """Each convolution whose output only a BatchNorm reads, with that BatchNorm."""
    body = copied(model.skeleton)
    inside = tuple(f"{path}." for path in blocks)
    places = Counter(id(m) for _, m in body.named_modules(remove_duplicate=False))
    paths = {m: n for n, m in body.named_modules() if not n.startswith(inside) and _is_plain(m) and places[id(m)] == 1}
    pairs = _in_sequences(body) if isinstance(body, Images) else _in_a_run(body, set(paths), example)
    return {paths[conv]: paths[norm] for conv, norm in pairs if conv in paths and norm in paths and _fit(conv, norm)}


def _fit(conv: Any, norm: Any) -> bool:
    expected: Any = KINDS.get(_kind(conv))
    return bool(expected == type(norm) and norm.num_features == conv.out_channels)  # noqa: E721 (exactly)


def _in_sequences(body: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Neighbours: in models of this library, only the BatchNorm reads the convolution before it."""
    for part in body.modules():
        if is_sequence(part):
            yield from itertools.pairwise(part.children())


def _in_a_run(body: nn.Module, plain: set[nn.Module], example: Any) -> list[tuple[nn.Module, nn.Module]]:
    """Pairs of ``plain`` modules where only the second reads the first's output, for all accepted inputs."""
    calls: dict[nn.Module, list[tuple[Any, Any]]] = {}
    for module in plain:
        module.register_forward_hook(lambda m, given, out: calls.setdefault(m, []).append((given, out)))
    found: list[list[tuple[nn.Module, nn.Module]]] = []
    for given in _inputs(body, example):
        calls.clear()
        readers = _Readers()
        try:
            with torch.no_grad(), readers:
                output = body(*given)
        except Exception:  # the size does not fit, or the forward pass reads values
            continue
        found.append(list(_exclusive(calls, readers, output)))
    return [pair for pair in found[0] if all(pair in pairs for pairs in found)] if found else []


def _exclusive(
    calls: Mapping[nn.Module, list[tuple[Any, Any]]], readers: _Readers, output: Any
) -> Iterator[tuple[nn.Module, nn.Module]]:
    once = {m: made[0] for m, made in calls.items() if len(made) == 1}
    readings = {id(given[0]): m for m, (given, _) in once.items()}
    outputs: set[int] = set()
    each(lambda x: outputs.add(id(x)) or x, output, {})  # type: ignore[func-returns-value]
    for conv, (given, out) in once.items():
        norm = readings.get(id(out))
        if norm is None or readers.counts[id(out)] != 1 or id(out) in outputs:
            continue
        if _alone(conv, given, readers) and _alone(norm, once[norm][0], readers):
            yield conv, norm


def _kind(module: nn.Module) -> type:
    return parametrize.type_before_parametrizations(module)


def _is_plain(module: nn.Module) -> bool:
    """Whether it is torch's own convolution, or a BatchNorm with statistics, without hooks."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks) or "forward" in vars(module):
        return False
    return _kind(module) in KINDS or (type(module) in KINDS.values() and module.running_mean is not None)


def _alone(module: nn.Module, given: tuple[Any, ...], readers: _Readers) -> bool:
    """Whether only the module itself has read its tensors, by the number of reads."""
    own = _Readers()
    with torch.no_grad(), own:
        module(*given)
    return all(readers.counts[id(x)] == own.counts[id(x)] for x in (*module.parameters(), *module.buffers()))


def _inputs(body: nn.Module, example: Any) -> list[tuple[Any, ...]]:
    """The example on the meta device, or images of several sizes."""
    if example is not None:
        given = example if isinstance(example, tuple) else (example,)
        return [tree.map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, given)]
    channels = image_channels(body, default=3)
    return [(torch.empty(2, channels, size, size, device="meta"),) for size in SIZES]
