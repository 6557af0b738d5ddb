"""Models as they are deployed: branches and normalizations merged into convolutions."""

import itertools
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from holofunc.model import Model
from holofunc.models.base import Images, is_sequence
from holofunc.models.branches import below
from holofunc.models.derived import Derived
from holofunc.models.maps import Features
from holofunc.ops.reparam import fuse_conv_bn
from holofunc.typing import Buffers, Params

__all__ = ["reparametrize"]


def reparametrize(model: Model, params: Params, buffers: Buffers) -> tuple[Model, Params, Buffers]:
    """The same function in eval mode, of fewer parameters: all that is linear between two layers as one convolution.

    The blocks of RepVGG, MobileOne and RepViT become one layer each, and in any model (lifted ones too) a convolution
    whose output only a BatchNorm reads takes that over. What is merged are the running statistics; trained further,
    the new model has no branches and no normalization.

    Args:
        model: of any kind; one that has nothing to merge is returned as it is.
        params: of the model.
        buffers: of the model.

    Returns:
        ``(model, params, buffers)`` with the names that Holocron's deployed models have.

    Raises:
        ValueError: params or buffers do not fit the model, or it is one of `features`, whose maps may lie between what
            would be merged.

    Example:
        >>> from holofunc import models, random
        >>> model = models.repvgg_a0()
        >>> models.reparametrize(model, *model.init(random.key(0)))[0]
        Model(repvgg_a0, 22,244,650 parameters)
    """
    if isinstance(model, Features):
        raise ValueError("a model of maps cannot be merged: reparametrize the model, then take its features")
    model.check(params, buffers)
    blocks, pairs = _blocks(model.skeleton), _pairs(model.skeleton)
    if not blocks and not pairs:
        return model, params, buffers

    def change(module: nn.Module) -> nn.Module:
        for path in blocks:
            module.set_submodule(path, module.get_submodule(path).deployed())  # type: ignore[operator]
        for conv, norm in pairs.items():
            layer = module.get_submodule(conv)
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
            values.update(_named(conv, fuse_conv_bn(below(values, conv), below(values, norm), eps=eps)))  # type: ignore[arg-type]
        return {n: values[n] for n in new._param_shapes}, {n: values[n] for n in new._buffer_shapes}

    new = Derived(model, change=change, convert=merge)
    return new, *merge(params, buffers)


def _named(path: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{path}.{name}": value for name, value in values.items()}


def _blocks(skeleton: nn.Module) -> list[str]:
    """The outermost modules that know how to merge themselves."""
    found: list[str] = []
    for path, module in skeleton.named_modules():
        if hasattr(module, "merge") and not any(path.startswith(f"{outer}.") for outer in found):
            found.append(path)
    return found


def _pairs(skeleton: nn.Module) -> dict[str, str]:
    """Convolutions and the BatchNorm that alone reads each, in sequences and in what `torch.fx` can trace."""
    neighbours: dict[str, str] = {}
    for path, module in skeleton.named_modules():
        if is_sequence(module) and not hasattr(module, "merge"):
            names = [f"{path}.{name}" if path else name for name, _ in module.named_children()]
            neighbours.update(itertools.pairwise(names))
    if not isinstance(skeleton, Images):  # ours stand in sequences
        neighbours.update(_traced(skeleton))
    inside = [f"{path}." for path in _blocks(skeleton)]
    uses = Counter(id(m) for _, m in skeleton.named_modules(remove_duplicate=False))

    def fits(first: str, second: str) -> bool:
        conv, norm = skeleton.get_submodule(first), skeleton.get_submodule(second)
        return (
            isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
            and isinstance(norm, nn.modules.batchnorm._BatchNorm)
            and norm.track_running_stats
            and norm.num_features == conv.out_channels
            and uses[id(conv)] == uses[id(norm)] == 1
            and not first.startswith(tuple(inside))
        )

    return {first: second for first, second in neighbours.items() if fits(first, second)}


def _traced(skeleton: nn.Module) -> dict[str, str]:
    try:
        nodes = fx.Tracer().trace(skeleton).nodes
    except Exception:  # control flow that depends on values, or an output that is no tensor: merge what is in sequences
        return {}
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    return {
        str(node.target): str(user.target)
        for node in nodes
        if node.op == "call_module" and len(node.users) == 1
        for user in node.users
        if user.op == "call_module" and calls[node.target] == calls[user.target] == 1
    }
