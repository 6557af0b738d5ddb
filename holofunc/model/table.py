"""The table of a model's submodules."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from holofunc.model.skeleton import on_meta
from holofunc.tree.summaries import Printed

__all__ = ["Row", "Table", "tabulate"]


class Row(NamedTuple):
    """One submodule."""

    path: str
    type: str
    output: str
    """The shape of the output, or of each of several outputs."""
    params: int
    macs: int
    """Multiply-adds, including submodules."""


class Table(Printed):
    """The table of `holofunc.Model.tabulate`: text when printed, HTML in notebooks."""

    head = ("path", "type", "output shape", "parameters", "MACs")
    words = 3

    def __init__(self, name: str, rows: list[Row]) -> None:
        self.name, self.rows = name, rows

    def cells(self) -> list[tuple[str, ...]]:
        return [(row.path, row.type, row.output, f"{row.params:,}", f"{row.macs:,}") for row in self.rows]


def tabulate(
    body: nn.Module, name: str, inputs: Sequence[Tensor], constants: Mapping[str, Tensor], depth: int | None
) -> Table:
    """As `holofunc.Model.tabulate`."""
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    if depth is not None and depth < 0:
        raise ValueError(f"depth must not be negative, got {depth}")
    body = on_meta(body)
    outputs: dict[str, str] = {}
    macs: dict[str, int] = {}
    before: dict[str, list[int]] = {}
    counter = FlopCounterMode(display=False)
    parts = [(p, m) for p, m in body.named_modules() if depth is None or (p.count(".") + 1 if p else 0) <= depth]
    for path, part in parts:

        def start(module: nn.Module, given: Any, path: str = path) -> None:
            before.setdefault(path, []).append(counter.get_total_flops())

        def stop(module: nn.Module, given: Any, output: Any, path: str = path) -> None:
            outputs[path] = _shapes(output)
            macs[path] = macs.get(path, 0) + (counter.get_total_flops() - before[path].pop()) // 2

        part.register_forward_pre_hook(start)
        part.register_forward_hook(stop)
    state = {n: c.to("meta") for n, c in constants.items()}
    given = tuple(x.detach().to("meta") if isinstance(x, Tensor) else x for x in inputs)
    try:
        with torch.no_grad(), counter:
            torch.func.functional_call(body, state, given)
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{name} cannot be run on shapes alone: {reason}") from error
    rows = [
        Row(p, type(m).__name__, outputs.get(p, "not called"), sum(x.numel() for x in m.parameters()), macs.get(p, 0))
        for p, m in parts
    ]
    return Table(name, rows)


def _shapes(output: Any) -> str:
    if isinstance(output, Tensor):
        return str(tuple(output.shape))
    if isinstance(output, Mapping):
        return ", ".join(f"{n}: {_shapes(x)}" for n, x in output.items())
    if isinstance(output, (list, tuple)):
        return ", ".join(map(_shapes, output))
    return type(output).__name__
