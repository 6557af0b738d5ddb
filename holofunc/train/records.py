"""Metrics between two records: means that accumulate on the device."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from holofunc.optim.capabilities import ReportsHyperparams, find, parts
from holofunc.typing import PyTree

__all__ = ["LazyMetrics", "Means", "hyperparameters", "read"]


def read(values: Mapping[str, Tensor]) -> dict[str, Any]:
    """0-d tensors as Python numbers, in one transfer from the device; others as tensors on the CPU."""
    scalars = {name: v for name, v in values.items() if v.ndim == 0}
    numbers = torch.stack([v.detach().double() for v in scalars.values()]).tolist() if scalars else []
    found: dict[str, Any] = dict(zip(scalars, numbers, strict=True))
    return {name: found[name] if name in found else v.detach().cpu() for name, v in values.items()}


class Means:
    """Sample-weighted means of metrics, accumulated on the device, which is synchronized only to read them."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.last: dict[str, float] = {}

    def add(self, metrics: Mapping[str, Tensor], count: int) -> None:
        for name, value in metrics.items():
            if isinstance(value, Tensor) and value.ndim == 0:
                weighted = value.detach() * count
                self.sums[name] = weighted if name not in self.sums else self.sums[name] + weighted
        self.count += count

    def now(self, others: Mapping[str, Tensor]) -> dict[str, float]:
        """The means and, in the same transfer, other tensors. Without a step since the last record, that record."""
        return (
            read({**{n: total / self.count for n, total in self.sums.items()}, **others}) if self.count else self.last
        )

    def take(self, others: Mapping[str, Tensor]) -> dict[str, float]:
        """The same, and reset the means if there was a step."""
        means, self.sums, self.count = (self.now(others) if self.count else {}), {}, 0
        return means

    def saved(self) -> dict[str, Any]:
        """Plain data from which `restored` recovers the same bits."""
        kinds = {name: str(total.dtype).removeprefix("torch.") for name, total in self.sums.items()}
        return {"sums": read(self.sums), "dtypes": kinds, "count": self.count, "last": self.last}

    @classmethod
    def restored(cls, saved: Mapping[str, Any], device: torch.device) -> "Means":
        means = cls()
        means.count, means.last = saved["count"], dict(saved["last"])
        for name, total in saved["sums"].items():
            means.sums[name] = torch.tensor(total, dtype=getattr(torch, saved["dtypes"][name]), device=device)
        return means


class LazyMetrics(Mapping[str, Any]):
    """The metrics of an event, transferred from the device on first access."""

    def __init__(self, means: Means, opt_state: PyTree, results: Mapping[str, Any]) -> None:
        self._means, self._opt_state, self._results = means, opt_state, results
        self._found: dict[str, Any] | None = None

    def _values(self) -> dict[str, Any]:
        if self._found is None:
            self._found = {**self._means.now(hyperparameters(self._opt_state)), **self._results}
        return self._found

    def __getitem__(self, name: str) -> Any:
        return self._values()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values())

    def __len__(self) -> int:
        return len(self._values())


def hyperparameters(opt_state: PyTree) -> dict[str, Tensor]:
    """The learning rate of the latest update, and all injected hyperparameters, 0-d.

    If several parts of an optimizer have one of the same name, it is prefixed with the name of the part.
    """
    holders = [(path, state.hyperparameters) for path, state in _reporting(opt_state, "")]
    shared = [name for _, values in holders for name in values]
    named = {
        f"{path}{name}" if shared.count(name) > 1 else name: value
        for path, values in holders
        for name, value in values.items()
    }
    return {name: value for name, value in named.items() if value.ndim == 0}


def _reporting(state: PyTree, part: str) -> Iterator[tuple[str, ReportsHyperparams]]:
    """The outermost states that report hyperparameters, with the names of their parts of the optimizer."""
    if isinstance(state, ReportsHyperparams):
        yield part, state
    elif isinstance(state, dict):
        several = sum(bool(find(child, ReportsHyperparams)) for child in state.values()) > 1
        for name, child in state.items():
            yield from _reporting(child, f"{part}{name}/" if several else part)
    elif isinstance(state, (tuple, list)):
        for child in parts(state):
            yield from _reporting(child, part)
