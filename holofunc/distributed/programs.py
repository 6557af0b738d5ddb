"""`run_program`: a command on several ranks of this machine, as ``torchrun`` would run it."""

import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from holofunc.distributed.launch import REPORTS, environment_of
from holofunc.distributed.ranks import GRACE

__all__ = ["run_program"]


def run_program(command: Sequence[str], ranks: int, *, threads: int | None = None) -> int:
    """Run a program on so many ranks, as ``torchrun --nproc-per-node`` would: fresh processes that call `init`.

    Ctrl-C and SIGTERM are handed on to all of them. When a rank fails, the others have some seconds to notice and to
    say so; those that do not are killed.

    Args:
        command: the program with its arguments; its output is that of this process.
        ranks: how many, at least 1.
        threads: of each rank; None divides those of this process among them.

    Returns:
        The exit code of the rank that failed first, or 0; that of one that was killed is 128 plus the signal's number.

    Example:
        >>> import sys
        >>> from holofunc import distributed
        >>> distributed.run_program([sys.executable, "-c", "import os; exit(int(os.environ['RANK']))"], 2)
        1
    """
    if not isinstance(ranks, int) or ranks < 1:
        raise ValueError(f"ranks must be an integer of at least 1, got {ranks!r}")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    reports = dist.PrefixStore(REPORTS, store)
    each = str(threads or max(1, torch.get_num_threads() // ranks))
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            environment = {**environment_of(rank, ranks, store.port), "OMP_NUM_THREADS": each}
            workers.append(subprocess.Popen(command, env=environment, start_new_session=True))
        with _handed_on(workers):
            return _first_failure(workers, reports)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


@contextmanager
def _handed_on(workers: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Signals that this process gets are sent to all ranks, which are in sessions of their own."""

    def hand_on(number: int, frame: Any) -> None:
        for worker in workers:
            worker.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_failure(workers: Sequence[subprocess.Popen[bytes]], reports: Any) -> int:
    """Wait for all ranks, or, once one has failed, as long as the others may take to follow; its exit code."""
    failed: list[int] = []
    deadline = float("inf")
    while True:
        codes = [worker.poll() for worker in workers]
        for rank, code in enumerate(codes):
            if code and rank not in failed:
                failed.append(rank)
                deadline = min(deadline, time.monotonic() + 3 * GRACE)
                if code < 0 and not reports.check([str(rank)]):
                    reports.set(str(rank), f"was killed (exit code {code})")
        if None not in codes or time.monotonic() > deadline:
            first = codes[failed[0]] or 0 if failed else 0
            return first if first >= 0 else 128 - first
        time.sleep(0.05)
