"""Edits of parameter dicts: new heads, new input channels, new names. Nothing is changed in place.

``values`` is a state dict (parameters and buffers by name), ``params`` only has the parameters.
"""

import warnings
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from holofunc.model import Model
from holofunc.model.references import state_buffers
from holofunc.typing import Buffers, Key, Params

__all__ = ["drop", "head_names", "load", "new_head", "new_input", "rename"]


def load(
    model: Model, values: Mapping[str, Tensor], *, strict: bool = True, key: Key | None = None
) -> tuple[Params, Buffers]:
    """A state dict as the model's ``(params, buffers)``, each in the model's order.

    Args:
        model: determines the expected names and shapes.
        values: parameters and buffers by name; tied weights by any of their names.
        strict: require exactly the expected names and shapes. Otherwise values that are missing or have the wrong shape
            come from ``model.init(key)``, unexpected ones are ignored, and one warning lists both.
        key: required for ``strict=False``.

    Raises:
        ValueError: values are missing, unexpected or misshapen (the message lists all of them), or there is no key.
        TypeError: a value is not a tensor.

    Example:
        >>> from holofunc import models, random
        >>> model = models.resnet18()
        >>> params, buffers = model.init(random.key(0))
        >>> wrapped = {f"module.{n}": v for n, v in {**params, **buffers}.items()}
        >>> loaded, _ = models.surgery.load(model, models.surgery.rename(wrapped, "module."))
        >>> loaded.keys() == params.keys()
        True
    """
    if strangers := [n for n, v in values.items() if not isinstance(v, Tensor)]:
        raise TypeError(
            f"values must be tensors by name, got {type(values[strangers[0]]).__name__} at {strangers[0]!r}"
        )
    skeleton = model.skeleton
    values = model.named_once(values, agree=True)
    expected = dict(skeleton.named_parameters()) | state_buffers(skeleton)
    problems = _problems(expected, values)
    if problems and strict:
        raise ValueError(f"values do not fit {model.name}: {'; '.join(problems)}")
    start: dict[str, Tensor] = {}
    if problems:
        if key is None:
            raise ValueError("strict=False needs a key, with which missing values are initialized")
        warnings.warn(f"values do not fit {model.name} everywhere: {'; '.join(problems)}", stacklevel=2)
        params, buffers = model.init(key)
        start = params | buffers
    fits = {n: n in values and values[n].shape == v.shape for n, v in expected.items()}
    chosen = {n: (values if fits[n] else start)[n] for n in expected}
    params = {n: chosen[n] for n, _ in skeleton.named_parameters()}
    return params, {n: chosen[n] for n, _ in skeleton.named_buffers() if n in chosen}


def _problems(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> list[str]:
    missing = [n for n in expected if n not in got]
    unexpected = [n for n in got if n not in expected]
    misshapen = [
        f"{n} has shape {tuple(got[n].shape)}, expected {tuple(v.shape)}"
        for n, v in expected.items()
        if n in got and got[n].shape != v.shape
    ]
    lists = (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
    return [f"{kind}: {', '.join(names)}" for kind, names in lists if names]


def head_names(model: Model) -> list[str]:
    """The names of the parameters of the last layer, whose outputs are the classes. A detector may have three of them.

    Example:
        >>> from holofunc import models
        >>> models.surgery.head_names(models.convnext_atto())
        ['head.1.weight', 'head.1.bias']
    """
    last = [n for n, _ in model.skeleton.named_parameters()][-1].rpartition(".")[0]
    return [
        f"{head}.{n}" if head else n
        for head in getattr(model.skeleton, "heads", ()) or (last,)
        for n, _ in model.skeleton.get_submodule(head).named_parameters()
    ]


def new_head(model: Model, params: Mapping[str, Tensor], key: Key) -> Params:
    """Adapt parameters to a model with another number of classes: initialize a new last layer.

    Args:
        model: with the new number of classes.
        params: of the same architecture, with a head of any size or without one.
        key: for the new head.

    Raises:
        ValueError: ``params`` is empty.

    Example:
        >>> from holofunc import models, random
        >>> params, buffers = models.resnet18(num_classes=10).init(random.key(0))
        >>> model = models.resnet18(num_classes=37)
        >>> params = models.surgery.new_head(model, params, random.key(1))
        >>> params["head.weight"].shape
        torch.Size([37, 512])
    """
    if not params:
        raise ValueError("params must hold at least one parameter, got none")
    start, names = model.init(key)[0], head_names(model)
    like = next(iter(params.values()))
    head = {n: start[n].to(like.device, like.dtype) for n in names}
    return {**{n: v for n, v in params.items() if n not in names}, **head}


def new_input(model: Model, params: Mapping[str, Tensor]) -> Params:
    """Adapt parameters to a model with another number of input channels: change the first convolution.

    For one channel the filters are summed, so that a grey image gives the output of three equal channels; for several,
    they are repeated and scaled to preserve the magnitude of the output.

    Args:
        model: with the new number of input channels.
        params: of the same architecture.

    Raises:
        ValueError: the first layer is not an ordinary convolution (as in MobileOne, whose stem is depthwise).

    Example:
        >>> from holofunc import models, random
        >>> params, buffers = models.resnet18().init(random.key(0))
        >>> grey = models.resnet18(in_channels=1)
        >>> models.surgery.new_input(grey, params)["features.0.weight"].shape
        torch.Size([64, 1, 7, 7])
    """
    convs = [(path, m) for path, m in model.skeleton.named_modules() if isinstance(m, nn.Conv2d)]
    channels = convs[0][1].in_channels
    adapted = dict(params)
    for path, conv in convs:
        name = f"{path}.weight"
        old = params[name]
        if conv.in_channels != channels or old.shape == conv.weight.shape:
            continue
        if conv.groups != 1 or len(old) != conv.out_channels:
            raise ValueError(f"{model.name} does not start with an ordinary convolution: {name} cannot be adapted")
        if channels == 1:
            adapted[name] = old.sum(1, keepdim=True)
        else:
            turns = torch.arange(channels, device=old.device) % old.shape[1]
            adapted[name] = old[:, turns] * (old.shape[1] / channels)
    return adapted


def rename(values: Mapping[str, Tensor], old: str, new: str = "") -> dict[str, Tensor]:
    """Replace the prefix ``old`` of names by ``new``; other names do not change.

    Raises:
        ValueError: two values would get the same name.

    Example:
        >>> import torch
        >>> from holofunc import models
        >>> list(models.surgery.rename({"module.head.bias": torch.zeros(2)}, "module."))
        ['head.bias']
    """
    names = [new + n[len(old) :] if n.startswith(old) else n for n in values]
    if twice := [n for n, count in Counter(names).items() if count > 1]:
        raise ValueError(f"renaming {old!r} to {new!r} gives two values the name {', '.join(twice)}")
    return dict(zip(names, values.values(), strict=True))


def drop(values: Mapping[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """Remove the values whose names start with one of ``prefixes``.

    Example:
        >>> import torch
        >>> from holofunc import models
        >>> models.surgery.drop({"head.bias": torch.zeros(2)}, "head.")
        {}
    """
    return {n: v for n, v in values.items() if not n.startswith(prefixes)}
