"""Feature maps of a model, as a model."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from holofunc.model import ChecksInput, Model
from holofunc.models import surgery
from holofunc.models.base import Images, image_channels, is_sequence
from holofunc.models.derived import Derived

__all__ = ["Features", "features"]


class Features(Derived):
    """The model of `features`, whose output is a dict of feature maps.

    Attributes:
        channels: of each map, by name.
        strides: of each map in pixels of the image, by name.
    """

    def __init__(self, base: Model, taps: "Taps") -> None:
        super().__init__(base, change=taps.attach, name=f"features of {base.name}")
        self.channels = taps.channels
        self.strides = taps.strides
        self._taps = taps

    def module(self) -> nn.Module:
        """A new module without the submodules that it does not run, for use in other networks."""
        module = self._build()
        _trim(module, self._taps.layers)
        return module


def features(model: Model, names: Sequence[str | int] | None = None) -> Features:
    """A model that returns intermediate feature maps of another model, and stops after the last one.

    It uses the parameters and buffers of ``model``, under the same names.

    Args:
        model: its module must run its children in the order of registration, up to the last map; maps inside nested
            sequences are available too.
        names: paths of layers, like ``"features.4"`` or ``"layer2.0"``, or indices of stages: 0 is the last map at the
            first resolution below the image's, 1 at the next, -1 at the lowest. None is all stages. A map of class
            scores (as at the end of `holofunc.models.darknet19`) is not a stage.

    Returns:
        A model with ``channels`` and ``strides``; its output is a dict of maps (N, C, H, W) by the names given.

    Raises:
        ValueError: there is no such map; the message lists all maps.

    Example:
        >>> import torch
        >>> from holofunc import models, random
        >>> model = models.resnet18()
        >>> params, buffers = model.init(random.key(0))
        >>> pyramid = models.features(model, [1, 2, 3, 4])
        >>> pyramid.channels, pyramid.strides
        ({1: 64, 2: 128, 3: 256, 4: 512}, {1: 4, 2: 8, 3: 16, 4: 32})
        >>> maps, buffers = pyramid.apply(params, buffers, torch.zeros(1, 3, 64, 64))
        >>> maps[4].shape
        torch.Size([1, 512, 2, 2])
    """
    return Features(model, Taps(model, names))


class Taps:
    """The layers to run in sequence and those whose outputs to return, found by a run on the meta device."""

    def __init__(self, model: Model, names: Sequence[str | int] | None) -> None:
        side = 256
        with torch.inference_mode(False):  # inference tensors have no version counter
            images = torch.empty(1, image_channels(model.skeleton), side, side, device="meta")
            way = [layer for layer in _way(model.skeleton, images) if layer.output.ndim == 4]
        maps = {layer.path: layer.output for layer in way}
        layers = [layer.path for layer in way if layer.single]
        ours = isinstance(model.skeleton, Images)
        heads = {name.rpartition(".")[0] for name in surgery.head_names(model)} if ours else set()
        stages = _stages([(path, maps[path].shape[2]) for path in layers if path not in heads], side)
        self.paths: dict[str | int, str] = {}
        for name in names if names is not None else range(len(stages)):
            known = isinstance(name, int) and -len(stages) <= name < len(stages)
            path = stages[name] if known else name  # type: ignore[index]
            if path not in maps:
                raise ValueError(
                    f"{model.name} has no feature map {name!r}; its {len(stages)} stages end with "
                    f"{', '.join(map(repr, stages))}, and its maps are {', '.join(map(repr, maps))}"
                )
            self.paths[name] = str(path)
        self.channels = {name: maps[path].shape[1] for name, path in self.paths.items()}
        self.strides = {name: side // maps[path].shape[2] for name, path in self.paths.items()}
        self.ends = {
            name: max(i for i, p in enumerate(layers) if _within(p, path)) for name, path in self.paths.items()
        }
        self.layers = layers[: max(self.ends.values(), default=-1) + 1]
        changed = {layer.path for layer in way if layer.changed}
        self.copied = {i for i in self.ends.values() if layers[i] in changed}

    def attach(self, body: nn.Module) -> nn.Module:
        return _Tapped(body, self.layers, self.ends, self.copied)


class _Tapped(ChecksInput):
    """The layers of a body under the same names. Maps that the next layer changes in place are copied."""

    def __init__(self, body: nn.Module, layers: list[str], ends: dict[Any, int], copied: set[int]) -> None:
        super().__init__()
        self._modules, self._parameters, self._buffers = body._modules, body._parameters, body._buffers
        self._non_persistent_buffers_set = body._non_persistent_buffers_set
        self._layers, self._ends, self._copied = layers, ends, copied
        self._check = body.check_input if isinstance(body, ChecksInput) else None

    def check_input(self, *inputs: Any) -> None:
        if self._check is not None:
            self._check(*inputs)

    def forward(self, x: Tensor) -> dict[Any, Tensor]:
        outputs = []
        for i, path in enumerate(self._layers):
            x = self.get_submodule(path)(x)
            outputs.append(x.clone() if i in self._copied else x)
        return {name: outputs[end] for name, end in self._ends.items()}


def _trim(module: nn.Module, layers: list[str], prefix: str = "") -> None:
    """Remove everything except the given layers and their parents."""
    module._parameters, module._buffers = {}, {}
    for name, child in list(module.named_children()):
        if not any(_within(layer, prefix + name) for layer in layers):
            del module._modules[name]
        elif prefix + name not in layers:
            _trim(child, layers, f"{prefix}{name}.")


class _Layer(NamedTuple):
    path: str
    output: Tensor
    single: bool
    """Whether it is a single layer, not a sequence of layers."""
    changed: bool
    """Whether a later layer writes into its output."""


def _way(body: nn.Module, x: Tensor) -> Iterator[_Layer]:
    """The layers that an image passes in sequence; a sequence of layers follows its parts.

    Found by following the tensor that each layer passes to the next in a run on the meta device.
    """
    body = copy.deepcopy(body)
    seen: dict[nn.Module, tuple[tuple[Any, ...], Any, Any]] = {}
    for module in body.modules():
        module.register_forward_hook(
            lambda m, inputs, output: seen.__setitem__(m, (inputs, output, getattr(output, "_version", None)))
        )
    with torch.no_grad():
        body(x)

    def follow(parent: nn.Module, prefix: str, x: Tensor) -> Iterator[_Layer]:
        for name, child in parent.named_children():
            inputs, output, version = seen.get(child, ((), None, None))
            if len(inputs) != 1 or inputs[0] is not x or not isinstance(output, Tensor):
                return
            sequence = is_sequence(child)
            if sequence:
                yield from follow(child, f"{prefix}{name}.", x)
            yield _Layer(prefix + name, output, single=not sequence, changed=output._version != version)
            x = output

    return follow(body, "", x)


def _stages(layers: list[tuple[str, int]], side: int) -> list[str]:
    """The last layer at each resolution below the image's; a single pixel is not a map."""
    last = {size: path for path, size in layers if 1 < size < side}
    return [last[size] for size in sorted(last, reverse=True)]


def _within(path: str, ancestor: str) -> bool:
    return f"{path}.".startswith(f"{ancestor}.")
