"""The ranks of a run: who one is, and saying on every rank which one failed, and of what."""

import atexit
import functools
import hashlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from holofunc import tree
from holofunc.typing import PyTree

__all__ = ["RankError", "fingerprint", "is_rank_zero", "rank", "rank_zero", "world_size"]

P = ParamSpec("P")
R = TypeVar("R")
GRACE = 3.0
"""Seconds in which a rank that lives answers, once another one has failed."""
LOST = ""
"""What a rank says that only lost the connection to another one."""
ENDED = "ended without an error while others went on: did it see fewer batches?"
SILENT = "was killed, or hangs"


class RankError(RuntimeError):
    """The run cannot go on: which ranks are why, and what happened to each.

    Attributes:
        causes: what happened, by rank.
    """

    def __init__(self, causes: dict[int, str]) -> None:
        super().__init__(causes)
        self.causes = causes

    def __str__(self) -> str:
        return "; ".join(f"rank {rank}: {cause}" for rank, cause in sorted(self.causes.items()))


def rank(group: Any = None) -> int:
    """The number of this process among those of ``group`` (None: all), from 0; 0 in a run of one process.

    Example:
        >>> from holofunc import distributed
        >>> distributed.rank()
        0
    """
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def world_size(group: Any = None) -> int:
    """How many processes ``group`` (None: all) has; 1 where there is no group.

    Example:
        >>> from holofunc import distributed
        >>> distributed.world_size()
        1
    """
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def is_rank_zero() -> bool:
    """Whether this process is the one that prints, logs and saves."""
    return rank() == 0


def rank_zero(fn: Callable[P, R]) -> Callable[P, R | None]:
    """``fn`` on rank 0, nothing (and None) on the others: for printing, logging and saving what all ranks have.

    No collective belongs inside: the others would not take part.

    Example:
        >>> from holofunc import distributed
        >>> distributed.rank_zero(print)("said once")
        said once
    """

    @functools.wraps(fn)
    def only_there(*args: P.args, **kwargs: P.kwargs) -> R | None:
        return fn(*args, **kwargs) if is_rank_zero() else None

    return only_there


# --- who failed, and of what -------------------------------------------------------------------------------------


class _Reports:
    """How each rank ended, told to the others through a store that all can read."""

    def __init__(self, store: Any, mine: int, world: int) -> None:
        self.store, self.mine, self.world = store, mine, world
        self.reachable = True

    def tell(self, what: str) -> None:
        with suppress(RuntimeError):  # nobody is left to be told
            if self.reachable and not self.store.check([str(self.mine)]):
                self.store.set(str(self.mine), what)

    def causes(self, error: RuntimeError) -> dict[int, str]:
        """How the ranks ended that did not just lose the connection to another one."""
        answers: dict[int, str] = {}
        asking = threading.Thread(target=self._ask, args=[answers], daemon=True)  # a cut cable never answers
        asking.start()
        asking.join(2 * GRACE)
        self.reachable = self.mine in answers
        if not self.reachable:
            return {0: f"{SILENT} (its store cannot be reached)"}
        others = [r for r in range(self.world) if r != self.mine]
        found = {r: answers.get(r, SILENT) for r in others if answers.get(r, SILENT) != LOST}
        return found or {self.mine: f"{type(error).__name__}: {str(error).splitlines()[0]}"}

    def _ask(self, answers: dict[int, str]) -> None:
        self.tell(LOST)
        keys = [str(r) for r in range(self.world)]
        with suppress(RuntimeError):  # some do not answer in time
            self.store.wait(keys, timedelta(seconds=GRACE))
        with suppress(RuntimeError):
            answers |= {r: self.store.get(key).decode() for r, key in enumerate(keys) if self.store.check([key])}


_reports: _Reports | None = None


def report_to(store: Any, mine: int, world: int) -> None:
    """From now on, tell the others how this rank ends, and ask them when a collective fails."""
    global _reports
    before, _reports = sys.excepthook, _Reports(store, mine, world)

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        tell(described(error))
        before(kind, error, trace)

    sys.excepthook = hook
    atexit.register(tell, ENDED)


def tell(what: str) -> None:
    """Leave word for the other ranks of how this one ended; the first word counts."""
    if _reports is not None:
        _reports.tell(what)


@contextmanager
def explained() -> Iterator[None]:
    """Where a collective is run: what it raises names the ranks that are the cause."""
    try:
        yield
    except RuntimeError as error:
        if _reports is None or isinstance(error, RankError):
            raise
        raise RankError(_reports.causes(error)) from error


def described(error: BaseException) -> str:
    """An error as a line."""
    if isinstance(error, RankError):
        return LOST
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # its text is an error itself
        return type(error).__name__


def fingerprint(value: PyTree, *, values: bool = False) -> str:
    """A hash of a tree's paths, shapes, dtypes and of what is no tensor: raises where ranks do not have the same.

    Once at the start, of all that ranks must have in common: ``fingerprint({"state": state, "config": config})``. A
    collective of tensors that differ would hang, end the process, or return numbers that mean nothing.

    Args:
        value: a tree of tensors, numbers and strings.
        values: the values of the tensors count too.

    Returns:
        64 hexadecimal digits.

    Raises:
        RankError: on all ranks, naming the ranks that differ from rank 0, and the first difference of each.

    Example:
        >>> import torch
        >>> from holofunc import distributed
        >>> distributed.fingerprint({"w": torch.zeros(2)})[:8]
        '813d6c36'
    """
    lines = sorted(f"{path}: {_described_leaf(leaf, values)}" for path, leaf in tree.leaves_with_path(value))
    mine = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    if world_size() == 1:
        return mine
    all_lines = gathered(lines)
    causes = {r: _difference(lines, all_lines[0]) for r, lines in enumerate(all_lines) if lines != all_lines[0]}
    if causes:
        raise RankError(causes)
    return mine


def gathered(mine: Any) -> list[Any]:
    """What each rank has, on the host; all wait for one another."""
    everything = [mine] * world_size()
    if world_size() > 1:
        with explained():
            dist.all_gather_object(everything, mine)
    return everything


def _described_leaf(leaf: Any, values: bool) -> str:
    if not isinstance(leaf, torch.Tensor):
        return repr(leaf)
    content = leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if values else b""
    digest = f" {hashlib.sha256(content).hexdigest()[:16]}" if values else ""
    return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}{digest}"


def _difference(lines: list[str], reference: list[str]) -> str:
    extra = next((line for line in lines if line not in set(reference)), "nothing")
    missing = next((line for line in reference if line not in set(lines)), "nothing")
    return f"has {extra} where rank 0 has {missing}"
