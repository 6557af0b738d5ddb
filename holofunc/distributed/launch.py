"""Several ranks of this machine: `launch` for a function, made for notebooks; `run_program` for a command."""

import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from holofunc.distributed.collectives import differentiable_in_graphs, tell
from holofunc.distributed.ranks import ENDED, GRACE, REPORTS, RankError, described, init

__all__ = ["launch", "run_program"]


def launch(fn: Callable[..., Any], ranks: int, *args: Any, timeout: float = 600.0, threads: int = 1) -> list[Any]:
    """Call ``fn(*args)`` on as many ranks, each a process of its own that has joined the run (`init`).

    Where processes can be forked (Linux, as long as this process has not used a GPU), ``fn`` may be any function, one
    defined in a notebook too; elsewhere, one that can be imported.

    Args:
        fn: what every rank calls; tensors in ``args`` and in what it returns are copied.
        ranks: how many, at least 1.
        timeout: seconds that a rank waits for the others in a collective.
        threads: of each rank.

    Returns:
        What the ranks return, in their order.

    Raises:
        RankError: naming the ranks that failed and of what. All of them have ended by then: those that do not follow
            by themselves are killed.
        ValueError: a number below 1, or a rank that launches ranks.

    Example:
        >>> import torch
        >>> from holofunc import distributed
        >>> def work(x):
        ...     return distributed.psum(x * (1 + distributed.rank())).item()
        >>> distributed.launch(work, 2, torch.tensor(10.0))
        [30.0, 30.0]
    """
    for name, value in (("ranks", ranks), ("threads", threads)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if dist.is_initialized():
        raise ValueError("launch must be called by a process that has joined no run, got one that has")
    forks = "fork" in multiprocessing.get_all_start_methods() and not torch.cuda.is_initialized()
    context: Any = multiprocessing.get_context("fork" if forks else "spawn")
    differentiable_in_graphs()  # here, once, for all forks
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, workers = [], []
    try:
        for rank in range(ranks):
            receiver, sender = context.Pipe(duplex=False)
            work = fn, args, timeout, threads, _environment(rank, ranks, store.port), sender
            workers.append(context.Process(target=_work, args=work, name=f"rank {rank}"))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of forking where threads wait
                workers[-1].start()
            sender.close()
            pipes.append(receiver)
        return _results(pipes, workers, dist.PrefixStore(REPORTS, store))
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What ``torchrun`` tells a process; the last line says that the store outlives every rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _work(
    fn: Callable[..., Any], args: Any, timeout: float, threads: int, environment: dict[str, str], pipe: Connection
) -> None:
    gc.freeze()  # what a fork has of its parent's objects must not be collected here, where their threads are not
    os.environ.update(environment)
    torch.set_num_threads(threads)
    try:
        init(timeout=timeout)
        content = pickle.dumps(("returned", fn(*args)))
        tell(ENDED)
    except BaseException as error:
        tell(described(error))
        if isinstance(error, RankError):
            content = pickle.dumps(("followed", error.causes))
        else:
            content = pickle.dumps(("failed", (described(error), traceback.format_exc())))
    pipe.send_bytes(content)
    pipe.close()
    os._exit(0)  # what the parent has registered to be done at its own exit is not to be done here


def _results(pipes: list[Connection], workers: list[Any], reports: Any) -> list[Any]:
    """What all ranks return; if one fails, the error of all, once every rank has had the time to follow."""
    returned: dict[int, Any] = {}
    failed: dict[int, str] = {}
    named: dict[int, str] = {}
    notes: list[str] = []
    left: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline: float | None = None
    while left and (ready := wait(list(left), deadline and max(0.0, deadline - time.monotonic()))):
        for pipe in ready:
            rank = left.pop(pipe)
            try:
                how, what = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                workers[rank].join(GRACE)
                how, what = "failed", (f"was killed (exit code {workers[rank].exitcode})", "")
                reports.set(str(rank), what[0])
            if how == "returned":
                returned[rank] = what
                continue
            deadline = deadline or time.monotonic() + GRACE
            if how == "followed":
                named.update(what)
            else:
                failed[rank] = what[0]
                notes += [f"on rank {rank}:\n{what[1]}"] if what[1] else []
    failed = failed or dict.fromkeys(left.values(), "hangs")
    if len(returned) == len(pipes):
        return [returned[rank] for rank in range(len(pipes))]
    error = RankError({**named, **failed})
    for note in notes:
        error.add_note(note)
    raise error


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
            environment = {**os.environ, "OMP_NUM_THREADS": each, **_environment(rank, ranks, store.port)}
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
