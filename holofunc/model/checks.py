"""What cannot be lifted, and what a model cannot take: said by name, with a way out."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from holofunc.model.references import attributes, reached, state_buffers, tensors
from holofunc.typing import Key, PyTree

__all__ = ["check", "check_key", "check_names"]


def check(module: Any) -> None:
    """Raise unless values handed to a model reach all of a module.

    Raises:
        TypeError: no module, or one of TorchScript or of replicas. ValueError: a part without a name or a shape.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"build must return a torch.nn.Module, got {type(module).__name__}")
    paths = {id(part): path for path, part in module.named_modules()}
    for path, part in module.named_modules():
        _check_part(path, part)
        inside = [n for n, child in part.named_children() if f"{path}.".startswith(f"{paths[id(child)]}.".lstrip("."))]
        if inside:
            raise ValueError(f"{path or 'the module'} has itself, or what it is in, as its part {inside[0]!r}")
    _check_hidden(module)


def _check_part(path: str, part: nn.Module) -> None:
    name = path or "the module"
    if isinstance(part, torch.jit.ScriptModule):
        raise TypeError(f"{name} is TorchScript, which has no functional form: lift what it was made of")
    if isinstance(part, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(
            f"{name} is {type(part).__name__}, which copies what is inside of it: lift its .module, and use "
            "holofunc.distributed"
        )
    for leaf, x in (*part._parameters.items(), *part._buffers.items()):
        if x is not None and nn.parameter.is_lazy(x):
            raise ValueError(
                f"{name} is a lazy layer, whose {leaf} has no shape yet: give it its sizes, or run one batch through "
                "the module and use from_module"
            )
        if x is not None and (x._backward_hooks or getattr(x, "_post_accumulate_grad_hooks", None)):
            raise ValueError(
                f"{f'{path}.' if path else ''}{leaf} has a hook on its gradient, which derivatives of functions do not "
                "call: change gradients in the optimizer (optim.freeze, optim.scale_leaves), or leave it out"
            )
    if dotted := [n for n in (*part._parameters, *part._buffers, *part._modules) if "." in n]:
        raise ValueError(f"{name} has {dotted[0]!r} in it: a dot in a name stands for a part of a part")


def _check_hidden(module: nn.Module) -> None:
    names = {id(x): n for n, x in (*module.named_parameters(), *state_buffers(module).items())}
    for name, value in attributes(module):
        if hidden := [names[id(x)] for x in tensors(value) if id(x) in names and value is not x]:
            raise ValueError(
                f"{name} hides {hidden[0]} in a {type(value).__name__}, where values handed to apply do not reach it: "
                "refer to the module that has it, or use nn.ParameterList"
            )
    for name, value in reached(module):
        if isinstance(value, nn.Module) and any(p.is_meta and id(p) not in names for p in value.parameters()):
            raise ValueError(
                f"{name} hides a {type(value).__name__} that is no part of the module, so that its parameters have no "
                "names: use nn.ModuleList or nn.ModuleDict, or, if it shall not be trained, build it before and refer "
                "to it"
            )
        if isinstance(value, nn.Parameter) and value.is_meta and id(value) not in names:
            raise ValueError(
                f"{name} hides a parameter that has no name: register it, or use nn.ParameterList or nn.ParameterDict"
            )


# --- what is handed to a model ----------------------------------------------------------------------------------------


def check_key(key: Key | None) -> None:
    if key is not None and not (isinstance(key, Tensor) and key.dtype == torch.int64 and key.shape == (2,)):
        got = f"{key.dtype} of shape {tuple(key.shape)}" if isinstance(key, Tensor) else repr(key)
        raise ValueError(
            f"key must be one of holofunc.random, int64 of shape (2,), got {got}; an argument of the module's own that "
            "is called key goes by position"
        )


def check_names(argument: str, got: Mapping[str, PyTree], expected: Mapping[str, torch.Size], model: str) -> None:
    if not isinstance(got, Mapping):
        raise TypeError(f"{argument} must be a dict of tensors by name, got {type(got).__name__} ({model}.apply)")
    problems = []
    if missing := [n for n in expected if n not in got]:
        problems.append(f"missing {missing[:8]}")
    if extra := [n for n in got if n not in expected]:
        problems.append(f"unexpected {extra[:8]}")
    for n, shape in expected.items():
        if n in got and not isinstance(got[n], Tensor):
            raise TypeError(f"{argument} must be tensors, got {type(got[n]).__name__} for {n} ({model}.apply)")
        if n in got and got[n].shape != shape:
            problems.append(f"{n} has shape {tuple(got[n].shape)}, expected {tuple(shape)}")
    if problems:
        raise ValueError(f"{argument} does not fit {model}: {'; '.join(problems[:12])}")
