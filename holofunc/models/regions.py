"""Blocks that a network repeats, compiled once each instead of once per repetition.

The gradient graph of a deep network is mostly one block over and over. While `holofunc.jit` traces the gradient of a
training step, a `Stage` puts one operation per pass in the place of each block that occurs `REPEATS` times or more; the
two graphs behind the operations, forward and backward, are shared by all blocks of the same structure, shapes and
dtypes, and compiled when they first run. Everywhere else a `Stage` is a `torch.nn.Sequential`.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from holofunc.compile.graphs import args_of, inputs_of, output_of
from holofunc.compile.operations import Meta, operation, register, undisturbed
from holofunc.compile.programs import compile_graph
from holofunc.compile.tracing import gradient_being_traced

__all__ = ["REPEATS", "Divided", "Gate", "Stage", "Unfused"]

REPEATS = 6
"""From how many blocks alike on they are one region. ResNet-50 has none then: its step is 4 % faster than with regions
of three, and compiles as fast. SKNet-152 compiles in three quarters of the time that it takes as one graph."""


NORMS = (torch.ops.aten._native_batch_norm_legit_functional, torch.ops.aten.native_batch_norm_backward)
"""What runs in mixed precision as it is only in parts: whole, its dtypes are not those it is traced with."""


class Divided(nn.Sequential):
    """A sequence of which a jitted training step makes operations of its own (`in_step`); elsewhere a plain one."""

    def forward(self, x: Tensor) -> Tensor:
        in_step = gradient_being_traced() and not torch.compiler.is_dynamo_compiling()
        return self.in_step(x) if in_step else super().forward(x)

    def in_step(self, x: Tensor) -> Tensor:
        """What it computes, while the gradient of a training step is being traced."""
        return super().forward(x)


class Stage(Divided):
    """A sequence of blocks, each of one tensor to one tensor, which `holofunc.jit` compiles once per kind of block."""

    def in_step(self, x: Tensor) -> Tensor:
        kinds = [_structure(block) for block in self]
        count = Counter(kinds)
        for block, kind in zip(self, kinds, strict=True):
            x = _call(block, kind, x) if count[kind] >= REPEATS else block(x)
        return x


class Gate(Divided):
    """Layers on a single pixel, as in squeeze-and-excitation: in a jitted step an operation that runs as it is.

    Each of these layers would cost about a second of compilation, forward and backward, and there is nothing to win.
    """

    def in_step(self, x: Tensor) -> Tensor:
        return _call(self, _structure(self), x, compiled=False)


class Unfused(Divided):
    """Layers that from number ``start`` on run as they are in a jitted step in single precision on a CPU.

    For an end with a batch norm, torch's being faster there than a compiled one, that no repetition shares; it need not
    be compiled. Elsewhere it is worth fusing.
    """

    def __init__(self, *layers: nn.Module, start: int = 0) -> None:
        super().__init__(*layers)
        self.start = start

    def in_step(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            return super().in_step(x)
        for layer in list(self)[: self.start]:
            x = layer(x)
        end = nn.Sequential(*list(self)[self.start :])
        return _call(end, _structure(end), x, compiled=False)


def _structure(module: nn.Module) -> tuple[Any, ...]:
    """What two modules share if they compute the same function of their parameters, buffers and inputs."""
    options = sorted((n, repr(v)) for n, v in vars(module).items() if not n.startswith("_"))
    names = (*module._parameters, *module._buffers)
    return type(module), tuple(options), names, tuple((n, _structure(m)) for n, m in module.named_children())


def _call(block: nn.Module, kind: tuple[Any, ...], x: Tensor, compiled: bool = True) -> Tensor:
    """``block(x)`` as a region; the buffers are renewed in place, as the block does it."""
    params, buffers = dict(block.named_parameters(remove_duplicate=False)), dict(block.named_buffers())
    values, renewed = {**params, **buffers}, [n for n in buffers if n in block.state_dict(keep_vars=True)]
    inputs = [*values.values(), x]
    autocast = torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)
    signature = (kind, compiled, autocast, tuple(Meta.of(value) for value in inputs))
    if signature not in _REGIONS:

        def evaluate(*inputs: Tensor) -> tuple[Tensor, ...]:
            state = dict(zip(values, inputs, strict=False))
            state |= {n: state[n].clone() for n in renewed}
            with torch.autocast(x.device.type, dtype=autocast[1], enabled=autocast[0]):
                out = torch.func.functional_call(block, state, inputs[-1:])  # noqa: TID251 (a part of a model's call)
            return out, *(state[n] for n in renewed)

        _REGIONS[signature] = undisturbed(
            lambda: _Region.trace(signature, evaluate, {*range(len(params)), len(values)}, compiled)
        )
    out, *new = _Apply.apply(_REGIONS[signature], *inputs)[: 1 + len(renewed)]
    for name, value in zip(renewed, new, strict=True):
        values[name].copy_(value)
    return out


# --- the operation -----------------------------------------------------------------------------------------------

_REGIONS: dict[tuple[Any, ...], "_Region"] = {}


class _Apply(torch.autograd.Function):
    """A region and its derivative; of the outputs only the first is differentiable."""

    @staticmethod
    def forward(region: "_Region", *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(operation(region.forward, list(inputs)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.region, *tensors = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*[(output if computed else tensors)[i] for computed, i in ctx.region.saved])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        region = ctx.region
        if grad.stride() != region.output.stride:
            grad = region.output.empty().copy_(grad)
        grads = _Once.apply(region.backward, *ctx.saved_tensors, grad)
        return None, *(None if i is None else grads[i] for i in region.grads)


class _Once(torch.autograd.Function):
    """The derivative of a region, which has none of its own."""

    @staticmethod
    def forward(name: str, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(operation(name, list(inputs)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("a repeated block was differentiated twice in a jitted step: use torch.func.grad inside it")


# --- tracing -----------------------------------------------------------------------------------------------------


class _Region(NamedTuple):
    forward: str
    backward: str
    """Names of programs."""
    output: Meta
    """The forward program's first, and as which the gradient is handed to the backward program."""
    saved: tuple[tuple[bool, int], ...]
    """What the backward program takes besides the gradient: an output of the forward one (True) or an input."""
    grads: tuple[int | None, ...]
    """Which of the backward program's outputs belongs to each input."""

    @classmethod
    def trace(
        cls,
        signature: tuple[Any, ...],
        evaluate: Callable[..., tuple[Tensor, ...]],
        differentiable: set[int],
        compiled: bool,
    ) -> "_Region":
        from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
        from torch._decomp import get_decompositions
        from torch._subclasses import FakeTensorMode

        graphs: dict[str, fx.GraphModule] = {}
        _, _, (autocast, _), metas = signature
        mixed = autocast or len({meta.dtype for meta in metas if meta.dtype.is_floating_point}) > 1

        def keep(name: str) -> Callable[..., Any]:
            def compiler(graph: fx.GraphModule, _: Any) -> Any:
                graphs[name] = graph
                return make_boxed_func(graph.forward)

            return compiler

        with FakeTensorMode():
            inputs = [meta.empty().requires_grad_(i in differentiable) for i, meta in enumerate(metas)]
            leaves = [x for x in inputs if x.requires_grad]
            traced = aot_function(
                evaluate,
                keep("forward"),
                keep("backward"),
                partition_fn=min_cut_rematerialization_partition,
                decompositions=get_decompositions(NORMS) if mixed and not compiled else None,
            )
            out, *new = traced(*inputs)
            torch.autograd.grad(out, leaves, torch.empty_like(out), allow_unused=True)
            forward, backward = graphs["forward"], graphs["backward"]
            saved = _share_outputs(forward, 1 + len(new))
            grads = _drop_missing(backward)
            with torch.no_grad():
                computed = forward(*inputs)
                given = [(computed if own else inputs)[i] for own, i in saved]
                results = backward(*given, torch.empty_like(computed[0]))
        name = hashlib.sha256(repr(signature).encode()).hexdigest()[:16]
        for half, graph, outputs in (("forward", forward, computed), ("backward", backward, results)):
            foreseen = [Meta.of(x) for x in outputs]
            run = compile_graph(graph) if compiled else graph
            register(f"{name}.{half}", _as_foreseen(run, foreseen), foreseen)
        return cls(f"{name}.forward", f"{name}.backward", Meta.of(computed[0]), saved, grads)


def _as_foreseen(run: Callable[..., Sequence[Tensor]], metas: Sequence[Meta]) -> Callable[..., list[Tensor]]:
    """Results of the strides it was traced with, to which torch's batch norm and Inductor do not always keep."""

    def program(*inputs: Tensor) -> list[Tensor]:
        pairs = zip(run(*inputs), metas, strict=True)
        return [x if x.stride() == meta.stride else meta.empty().copy_(x) for x, meta in pairs]

    return program


def _share_outputs(graph: fx.GraphModule, results: int) -> tuple[tuple[bool, int], ...]:
    """Let a forward graph return nothing twice, and no input. Returns where the values are that it saves."""
    output, inputs = output_of(graph), {node: i for i, node in enumerate(inputs_of(graph))}
    values = list(args_of(output)[0])
    kept = {value: i for i, value in enumerate(values[:results])}
    saved = []
    for value in map(_source, values[results:]):
        if value not in inputs:
            kept.setdefault(value, len(kept))
        saved.append((value not in inputs, inputs[value] if value in inputs else kept[value]))
    output.args = (tuple(kept),)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return tuple(saved)


def _drop_missing(graph: fx.GraphModule) -> tuple[int | None, ...]:
    """Let a backward graph return tensors only, none twice. Returns which belongs to each input."""
    output = output_of(graph)
    values = list(args_of(output)[0])
    kept = {value: i for i, value in enumerate(dict.fromkeys(v for v in values if v is not None))}
    output.args = (tuple(kept),)
    graph.recompile()
    return tuple(None if value is None else kept[value] for value in values)


def _source(node: fx.Node) -> fx.Node:
    """The value that a node is another name of."""
    while node.target in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
        node = node.args[0]  # type: ignore[assignment]
    return node
