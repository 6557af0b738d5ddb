"""Joining a run, and starting one from a notebook: `launch` runs a function as ``torchrun`` would run a script."""

import multiprocessing
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from holofunc.distributed.collectives import differentiable_in_graphs
from holofunc.distributed.pickling import dumps
from holofunc.distributed.ranks import ENDED, GRACE, RankError, described, report_to, tell

__all__ = ["init", "launch"]

REPORTS = "reports"


def init(*, backend: str | None = None, timeout: float = 600.0) -> torch.device:
    """Join the run that ``torchrun`` (or `launch`) started this process for; in a process started alone, nothing.

    From then on a rank that ends with an exception tells the others, and a collective that fails raises a `RankError`
    on every rank that takes part, which names the ranks that were the cause.

    Args:
        backend: of `torch.distributed`; None is NCCL for tensors on GPUs and gloo for others.
        timeout: seconds that a rank waits for the others in a collective. It has to cover what one rank may do while
            the others wait, such as compiling.

    Returns:
        The device of this rank: its own GPU, or the CPU.

    Raises:
        ValueError: a timeout that is not positive. RuntimeError: not all ranks came within it.

    Example:
        >>> from holofunc import distributed
        >>> distributed.init()
        device(type='cpu')
    """
    if timeout <= 0:
        raise ValueError(f"timeout must be positive seconds, got {timeout}")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return device
    if on_gpu:
        torch.cuda.set_device(device)
    store, mine, world = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=timeout))))
    dist.init_process_group(
        backend or ("cpu:gloo,cuda:nccl" if on_gpu else "gloo"),
        store=dist.PrefixStore("collectives", store),
        rank=mine,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )
    differentiable_in_graphs()
    report_to(dist.PrefixStore(REPORTS, store), mine, world)
    return device


def launch(fn: Callable[..., Any], ranks: int, *args: Any, timeout: float = 600.0, threads: int = 1) -> list[Any]:
    """Call ``fn(*args)`` on as many ranks, each a fresh process that has joined the run (`init`).

    ``fn`` may be any function, one defined in a notebook too: what ranks cannot import is sent to them, with the
    globals that it names. They share nothing with this process, whatever threads, graphs or GPUs it has used. The first
    call starts a server that imports torch once (seconds); ranks are forked from it where processes can be, and live
    no longer than this process.

    Args:
        fn: what every rank calls; it, ``args`` and what it returns are copied.
        ranks: how many, at least 1.
        timeout: seconds that a rank waits for the others in a collective.
        threads: of each rank.

    Returns:
        What the ranks return, in their order.

    Raises:
        RankError: naming the ranks that failed and of what. All of them have ended by then: those that do not follow
            by themselves are killed.
        TypeError: something that cannot be copied, such as an open file.
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
    work = dumps((fn, args))
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(["holofunc.distributed.warm"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, workers = [], []
    try:
        for rank in range(ranks):
            receiver, sender = context.Pipe(duplex=False)
            given = work, timeout, threads, environment_of(rank, ranks, store.port), sender
            workers.append(context.Process(target=_work, args=given, name=f"rank {rank}"))
            with _main_hidden():
                workers[-1].start()
            sender.close()
            pipes.append(receiver)
        return _results(pipes, workers, dist.PrefixStore(REPORTS, store))
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.kill()
                worker.join()


@contextmanager
def _main_hidden() -> Iterator[None]:
    """Ranks do not run this process's script again: what they need of it comes with the function."""
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def environment_of(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What ``torchrun`` tells a process; the last line says that the store outlives every rank."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _work(work: bytes, timeout: float, threads: int, environment: dict[str, str], pipe: Connection) -> None:
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        init(timeout=timeout)
        fn, args = pickle.loads(work)
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
    os._exit(0)  # without waiting for others that may hang


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])  # type: ignore[union-attr]
    os._exit(1)


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
