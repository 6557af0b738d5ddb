"""Joining and starting a run: `launch` calls a function on several ranks, `run_program` runs a command."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from holofunc.distributed.collectives import differentiable_in_graphs
from holofunc.distributed.ranks import ENDED, GRACE, RankError, described, report_to, tell
from holofunc.ops.checks import check_counts

__all__ = ["init", "launch", "run_program"]

REPORTS, FIRST = "reports", "0"
"""Where in the store ranks tell each other how they ended, and the number that torchrun gives to ranks at first."""
LAUNCHED = "HOLOFUNC_LAUNCHED"
"""The environment variable of ranks that were started here."""
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""What is handed on to ranks; Windows knows no terminal that hangs up."""


def init(*, backend: str | None = None, timeout: float = 600.0) -> torch.device:
    """Join the run for which ``torchrun`` (or `launch`) started this process; a single process needs nothing.

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
    _check_timeout(timeout)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if dist.is_initialized():  # by someone else, or before
        differentiable_in_graphs()
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return device
    if on_gpu:
        torch.cuda.set_device(device)
    store, mine, world = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=timeout))))
    # one of torchrun's agent outlives ranks that are started again, with the addresses of those before
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", FIRST), store)
    dist.init_process_group(
        backend or ("cpu:gloo,cuda:nccl" if on_gpu else "gloo"),
        store=dist.PrefixStore("collectives", store),
        rank=mine,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )
    differentiable_in_graphs()
    report_to(dist.PrefixStore(REPORTS, store), mine, world, timeout)
    if LAUNCHED in os.environ:
        threading.Thread(target=_end_with_parent, args=[os.getppid()], daemon=True).start()
    return device


def _end_with_parent(pid: int) -> None:
    """Ranks started here live no longer than what started them; the parent of those of `launch` is a server."""
    launcher = multiprocessing.parent_process()
    while os.getppid() == pid if launcher is None else launcher.is_alive():
        time.sleep(0.5)
    os._exit(1)


def _check_timeout(timeout: float) -> None:
    if not timeout > 0:
        raise ValueError(f"timeout must be positive seconds, got {timeout}")


def launch(fn: Callable[..., Any], ranks: int, *args: Any, timeout: float = 600.0, threads: int = 1) -> list[Any]:
    """Call ``fn(*args)`` on several ranks, each a new process that has joined the run (`init`).

    ``fn`` may be any function, one defined in a notebook too: what ranks cannot import is sent to them by
    cloudpickle, with the globals that it names. They share nothing with this process, whatever threads, graphs or GPUs
    it has used. The first call starts a server that imports torch once (seconds); ranks are forked from it where
    processes can be, and live no longer than this process.

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
        ValueError: a number out of range, or a rank that launches ranks.

    Example:
        >>> import torch
        >>> from holofunc import distributed
        >>> def work(x):
        ...     return distributed.psum(x * (1 + distributed.rank())).item()
        >>> distributed.launch(work, 2, torch.tensor(10.0))
        [30.0, 30.0]
    """
    check_counts(ranks=ranks, threads=threads)
    _check_timeout(timeout)
    if dist.is_initialized():
        raise ValueError("launch must be called by a process that has joined no run, got one that has")
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(["holofunc.distributed.warm"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "work").write_bytes(_pickled((fn, args)))

        def start(environment: dict[str, str]) -> Any:
            worker = context.Process(target=_work, args=(folder, timeout, threads, environment))
            # ranks do not run this process's script again: what they need of it comes with the function
            main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
            try:
                worker.start()
            finally:
                sys.modules["__main__"] = main
            return worker

        codes = _run(ranks, start, lambda worker: worker.exitcode)
        ends = {r: pickle.loads((folder / str(r)).read_bytes()) for r in codes if (folder / str(r)).exists()}
    errors = {r: error for r, (_, error) in sorted(ends.items()) if error is not None}
    if len(ends) == ranks and not errors:
        return [ends[r][0] for r in range(ranks)]
    named: dict[int, str] = {}
    failed = {r: _without_a_word(code) for r, code in codes.items() if r not in ends}
    for r, error in errors.items():
        (failed if r in error.causes else named).update(error.causes)
    whole = RankError({**named, **(failed or dict.fromkeys(set(range(ranks)) - set(codes), "hangs"))})
    for note in (note for error in errors.values() for note in getattr(error, "__notes__", ())):
        whole.add_note(note)
    raise whole


def run_program(command: Sequence[str], ranks: int, *, threads: int | None = None) -> int:
    """Run a program on several ranks, like ``torchrun --nproc-per-node``: new processes that call `init`.

    Ctrl-C, SIGTERM and SIGHUP are handed on to all of them. When a rank fails, the others have some seconds to notice
    and to say so; those that do not are killed. Nothing is printed beside what they print.

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
    check_counts(ranks=ranks)
    each = {"OMP_NUM_THREADS": str(threads or max(1, torch.get_num_threads() // ranks))}
    workers: list[subprocess.Popen[bytes]] = []

    def start(environment: dict[str, str]) -> subprocess.Popen[bytes]:
        workers.append(subprocess.Popen(command, env=environment | each, start_new_session=True))
        return workers[-1]

    def hand_on(number: int, frame: Any) -> None:
        for worker in workers:  # which are in sessions of their own
            worker.send_signal(number)

    of_main = threading.current_thread() is threading.main_thread()  # others cannot, and get no signals
    before = {number: signal.signal(number, hand_on) for number in SIGNALS if of_main}
    try:
        codes = _run(ranks, start, lambda worker: worker.poll())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    first = next((code for code in codes.values() if code), 0)
    return first if first >= 0 else 128 - first


def _run(ranks: int, start: Callable[[dict[str, str]], Any], code_of: Callable[[Any], int | None]) -> dict[int, int]:
    """Start ranks, and wait for all; or, once one has failed, as long as the others may take to follow.

    Returns:
        Their exit codes, in the order that they ended in. Those that are missing had to be killed.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    reports = dist.PrefixStore(REPORTS, dist.PrefixStore(FIRST, store))
    workers: list[Any] = []
    codes: dict[int, int] = {}
    deadline = float("inf")
    try:
        for rank in range(ranks):
            workers.append(start(_environment(rank, ranks, store.port)))
        while len(codes) < ranks and time.monotonic() < deadline:
            time.sleep(0.02)
            for rank, worker in enumerate(workers):
                if rank in codes or (code := code_of(worker)) is None:
                    continue
                codes[rank] = code
                if code:
                    deadline = min(deadline, time.monotonic() + 2 * GRACE)
                    if not reports.check([str(rank)]):
                        reports.set(str(rank), _without_a_word(code))
    finally:
        for worker in workers:
            worker.kill()
        while any(code_of(worker) is None for worker in workers):
            time.sleep(0.02)
    return codes


def _without_a_word(code: int) -> str:
    return f"{'was killed' if code < 0 else 'ended'} (exit code {code})"


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What ``torchrun`` tells a process; also that the store outlives every rank."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    told = {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": FIRST}
    return {**os.environ, **told, LAUNCHED: "", **{name: str(number) for name, number in numbers.items()}}


# --- a function on a rank ----------------------------------------------------------------------------------------


def _pickled(value: Any) -> bytes:
    try:
        import cloudpickle
    except ImportError as error:
        raise ImportError("launch sends functions by cloudpickle: pip install 'holofunc[launch]'") from error
    try:
        return cloudpickle.dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError, ValueError) as error:
        raise TypeError(f"what another process is to have must be picklable: {error}") from error


def _work(folder: Path, timeout: float, threads: int, environment: dict[str, str]) -> None:
    """On a rank: leave what the function returns, or the error that it ends with."""
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    rank = int(environment["RANK"])
    failed: RankError | None = None
    try:
        init(timeout=timeout)
        fn, args = pickle.loads((folder / "work").read_bytes())
        end = _pickled((fn(*args), None))
        tell(ENDED)
    except BaseException as error:
        tell(described(error))
        failed = error if isinstance(error, RankError) else RankError({rank: described(error)})
        if failed is not error:
            failed.add_note(f"on rank {rank}:\n{traceback.format_exc()}")
        end = pickle.dumps((None, failed))
    (folder / f".{rank}").write_bytes(end)
    os.rename(folder / f".{rank}", folder / str(rank))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(failed is not None)  # without waiting for others that may hang
