"""The ranks of a run, and errors that say which rank failed and why."""

import atexit
import functools
import hashlib
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
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
LOST, ASKS = "", "?"
"""What a rank says that ends only as it lost the connection to another one, and that may yet catch this error."""
ENDED = "ended without an error while others went on: did it see fewer batches?"
SILENT = "was killed, or hangs"


class RankError(RuntimeError):
    """The run cannot continue: which ranks failed, and why.

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
    """The number of processes of ``group`` (None: all); 1 without a group.

    Example:
        >>> from holofunc import distributed
        >>> distributed.world_size()
        1
    """
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def is_rank_zero() -> bool:
    """Whether this process prints, logs and saves."""
    return rank() == 0


def rank_zero(fn: Callable[P, R]) -> Callable[P, R | None]:
    """Run ``fn`` on rank 0 only, and return None on the others: for printing, logging and saving.

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
    """What ranks tell each other through a store that all can read: how each one ended, and what it is about to do."""

    def __init__(self, store: Any, mine: int, world: int, timeout: float) -> None:
        self.store, self.mine, self.world, self.timeout = store, mine, world, timeout
        self.reachable = True
        self.said: dict[tuple[int, ...], set[str]] = {}

    def tell(self, what: str) -> None:
        key = str(self.mine)
        with suppress(RuntimeError):  # nobody is left to be told
            if self.reachable and (not self.store.check([key]) or self.store.get(key).decode() == ASKS):
                self.store.set(key, what)

    def causes(self, error: RuntimeError, ranks: Sequence[int]) -> dict[int, str]:
        """The errors of ranks; if none has told of one, which of those that took part ended or are silent."""
        answers: dict[int, str] = {}
        asking = threading.Thread(target=self._ask, args=[answers], daemon=True)  # a cut cable never answers
        asking.start()
        asking.join(2 * GRACE)
        self.reachable = self.mine in answers
        if not self.reachable:
            return {0: f"{SILENT} (its store cannot be reached)"}
        told = {r: answer for r, answer in answers.items() if answer not in (LOST, ASKS, ENDED)}
        others = {r: answers.get(r, SILENT) for r in ranks if r != self.mine and answers.get(r) not in (LOST, ASKS)}
        return told or others or {self.mine: f"{type(error).__name__}: {str(error).splitlines()[0]}"}

    def _ask(self, answers: dict[int, str]) -> None:
        self.tell(ASKS)
        keys, deadline = [str(r) for r in range(self.world)], time.monotonic() + GRACE
        with suppress(RuntimeError):
            while not self.store.check(keys) and time.monotonic() < deadline:
                time.sleep(0.01)
            answers |= {r: self.store.get(key).decode() for r, key in enumerate(keys) if self.store.check([key])}

    def agree(self, what: str, ranks: tuple[int, ...]) -> None:
        """Raise unless all of ``ranks`` say the same; what they have agreed on once is not asked again."""
        said = self.said.setdefault(ranks, set())
        if what in said:
            return
        said.add(what)
        keys = {r: f"{ranks} {len(said)} {r}" for r in ranks}
        self.store.set(keys[self.mine], what)
        deadline, ended = time.monotonic() + self.timeout, False
        while not self.store.check(list(keys.values())):
            if ended or time.monotonic() > deadline:
                raise RuntimeError(f"not all of ranks {list(ranks)} came to a {what}")
            time.sleep(0.002)  # a rank that has ended since may have come before
            ended = any(self.store.check([str(r)]) and self.store.get(str(r)).decode() != ASKS for r in ranks)
        check_equal({r: [self.store.get(key).decode()] for r, key in keys.items()})


_reports: _Reports | None = None


def report_to(store: Any, mine: int, world: int, timeout: float) -> None:
    """From now on, tell the others how this rank ends, and ask them when a collective fails."""
    global _reports
    before, _reports = sys.excepthook, _Reports(store, mine, world, timeout)

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
def explained(what: str = "", group: Any = None) -> Iterator[None]:
    """Where a collective is run, if all ranks are about to do ``what``: it raises the ranks that are why it fails."""
    ranks = tuple(dist.get_process_group_ranks(group)) if _reports is not None else ()
    try:
        if what and _reports is not None:
            _reports.agree(what, ranks)
        yield
    except RuntimeError as error:
        if _reports is None or isinstance(error, RankError):
            raise
        raise RankError(_reports.causes(error, ranks)) from error


def described(error: BaseException) -> str:
    """An error as a line."""
    if isinstance(error, RankError):
        return LOST
    try:
        return f"{type(error).__name__}: {error}".removesuffix(": ")
    except Exception:  # its text is an error itself
        return type(error).__name__


def fingerprint(value: PyTree, *, values: bool = False) -> str:
    """A hash of the paths, shapes, dtypes and non-tensors of a tree. Raises if it differs between ranks.

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
    check_equal(dict(enumerate(gathered(lines))))
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
        return re.sub(" at 0x[0-9a-f]+", "", repr(leaf))  # of a function or an object
    content = (
        leaf.detach().cpu().resolve_conj().contiguous().flatten().view(torch.uint8).numpy().tobytes() if values else b""
    )
    digest = f" {hashlib.sha256(content).hexdigest()[:16]}" if values else ""
    return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}{digest}"


def check_equal(said: dict[int, list[str]]) -> None:
    """Raise if what some ranks have said is not what the first of them has, with a difference of each."""
    first, *others = said
    causes: dict[int, str] = {}
    for r in others:
        if said[r] != said[first]:
            extra = next((line for line in said[r] if line not in set(said[first])), "nothing")
            missing = next((line for line in said[first] if line not in set(said[r])), "nothing")
            causes[r] = f"has {extra} where rank {first} has {missing}"
    if causes:
        raise RankError(causes)
