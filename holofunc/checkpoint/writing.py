"""Writing checkpoints atomically."""

import errno
import hashlib
import json
import operator
import os
import secrets
import shutil
import socket
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import NoneType, TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from holofunc import tree as trees
from holofunc.checkpoint.layout import (
    FORMAT,
    MANIFEST,
    STATE,
    CheckpointError,
    committed,
    dtype_name,
    read_manifest,
    sealed,
)
from holofunc.ops.checks import check_counts
from holofunc.typing import PyTree

try:
    import fcntl
except ImportError:  # Windows has no flock: nothing keeps a second writer out there
    fcntl = None  # type: ignore[assignment]

__all__ = ["Writer", "save"]


def save(
    dir: str | Path,
    tree: PyTree,
    step: int,
    *,
    metadata: dict[str, Any] | None = None,
    keep: int | None = None,
    best: bool = False,
) -> Path:
    """Save a tree as one step of a checkpoint directory. When this returns, the step is on disk.

    Args:
        dir: the checkpoint directory; it is made if it does not exist.
        tree: tensors, numbers, strings and `None` in dicts, lists, tuples and NamedTuples.
        step: number of the step, at least 0. Saving a number again replaces that step.
        metadata: anything that JSON can hold.
        keep: how many of the newest steps to keep, at least 1; by default, all. The newest best step and the one just
            saved are kept in any case.
        best: whether this is the best step so far.

    Returns:
        The step's directory.

    Raises:
        CheckpointError: if the directory cannot be written to, is full, or another process is writing to it. Nothing of
            the new step remains then, and the steps before it are untouched.
        ValueError: if ``step`` or ``keep`` is out of range, or two leaves have the same path.
        TypeError: if a leaf or the metadata cannot be stored.

    Example:
        >>> import tempfile, torch
        >>> from holofunc import checkpoint
        >>> with tempfile.TemporaryDirectory() as dir:
        ...     path = checkpoint.save(dir, {"w": torch.ones(2)}, 100, metadata={"loss": 0.5})
        ...     path.name, checkpoint.restore(dir, {"w": torch.zeros(2)})
        ('step_00000100', {'w': tensor([1., 1.])})
    """
    with Writer(dir) as writer:
        return writer.save(tree, step, metadata=metadata, keep=keep, best=best)


class Writer:
    """The only writer of a checkpoint directory: holds its lock until closed, so that a second run fails at once.

    Opening makes the directory, takes the lock and removes what a killed writer left half done.

    Raises:
        CheckpointError: if the directory cannot be made or written to, or has a writer already.

    Example:
        >>> import tempfile, torch
        >>> from holofunc import checkpoint
        >>> with tempfile.TemporaryDirectory() as dir, checkpoint.Writer(dir) as writer:
        ...     future = writer.save_async({"w": torch.ones(2)}, 1)
        ...     path = writer.save({"w": torch.ones(2)}, 2, keep=1)
        ...     checkpoint.steps(dir)
        [2]
    """

    def __init__(self, dir: str | Path) -> None:
        self.dir = Path(dir)
        self._pool = ThreadPoolExecutor(1, "holofunc-checkpoint")  # its thread is joined when the interpreter exits
        self._pending: Future[Path] | None = None
        with _explained(self.dir):
            _make_directory(self.dir)
            self._unlock = weakref.finalize(self, _let_go, _locked(self.dir))  # also if nobody closes this
            for name in os.listdir(self.dir):
                if name.startswith((".tmp-", ".del-")):
                    shutil.rmtree(self.dir / name, ignore_errors=True)

    def save(
        self,
        tree: PyTree,
        step: int,
        *,
        metadata: dict[str, Any] | None = None,
        keep: int | None = None,
        best: bool = False,
    ) -> Path:
        """As `save`; waits for an asynchronous save that is under way, and raises what that one raised."""
        commit = self._prepared(tree, step, metadata, keep, best)
        self.wait()
        return commit()

    def save_async(
        self,
        tree: PyTree,
        step: int,
        *,
        metadata: dict[str, Any] | None = None,
        keep: int | None = None,
        best: bool = False,
        copy: bool = False,
    ) -> Future[Path]:
        """As `save`, in a background thread: the step is on the disk when the future is done.

        The next save waits for this one, and raises what it raised, and so do `wait` and `close`. As nothing writes
        into a state, the leaves need not be copied, unless the state will be donated (``jit(donate=True)``): then
        ``copy=True``.
        """
        commit = self._prepared(tree if not copy else trees.map(_copied, tree), step, metadata, keep, best)
        self.wait()
        self._pending = self._pool.submit(commit)
        return self._pending

    def wait(self) -> None:
        """Wait for an asynchronous save that is under way, and raise what it raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def discard(self, *, after: int) -> None:
        """Remove all steps after this one."""
        self.wait()
        for each in committed(self.dir):
            if each.step > after:
                self._remove(each.path)

    def close(self) -> None:
        """Wait, then release the lock."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._unlock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepared(
        self, tree: PyTree, step: int, metadata: dict[str, Any] | None, keep: int | None, best: bool
    ) -> Callable[[], Path]:
        """Check everything that can be checked before anything is written."""
        if not self._unlock.alive:
            raise CheckpointError(self.dir, "is no longer this writer's, which was closed", "open another Writer")
        check_counts(0, step=step)
        check_counts(keep=1 if keep is None else keep)
        if not isinstance(metadata, (dict, NoneType)):
            raise TypeError(f"metadata must be a dict, got {type(metadata).__name__}")
        tensors, values = _flattened(tree)
        about = {
            "format": FORMAT,
            "step": operator.index(step),
            "best": bool(best),
            "metadata": metadata or {},
            "torch": str(torch.__version__),
            "threads": torch.get_num_threads(),
            "device": sorted({tensor.device.type for tensor in tensors.values()}),
            "leaves": {path: [list(tensor.shape), dtype_name(tensor)] for path, tensor in tensors.items()},
            "values": values,
        }
        try:
            about = json.loads(json.dumps(about))  # as it will be read
        except TypeError as error:
            raise TypeError(f"metadata must be plain data, as JSON holds it: {error}") from error
        return lambda: self._commit(tensors, about, keep)

    def _commit(self, tensors: dict[str, Tensor], about: dict[str, Any], keep: int | None) -> Path:
        step = about["step"]
        temporary = self.dir / f".tmp-{step}-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            with _explained(self.dir, sum(tensor.nbytes for tensor in tensors.values())):
                os.mkdir(temporary)
                written = _write(temporary / STATE, lambda file: torch.save(_compact(tensors), file))
                text = sealed({**about, "files": {STATE: written}})
                _write(temporary / MANIFEST, lambda file: file.write(text))
                _sync(temporary)
                others = [other for other in committed(self.dir) if other.step == step]
                final = self.dir / (f"step_{step:08d}" + (f".{others[-1].attempt + 1}" if others else ""))
                os.rename(temporary, final)
                _sync(self.dir)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._prune(final, keep)
        return final

    def _prune(self, saved: Path, keep: int | None) -> None:
        found = committed(self.dir)
        newest = list({each.step: each for each in found}.values())  # of each step, the last attempt
        best = next((each.path for each in reversed(newest) if _is_best(each.path)), None)
        kept = {saved, best, *(each.path for each in newest[-(keep or len(newest)) :])}
        for each in found:
            if each.path not in kept and not each.path.is_symlink():
                self._remove(each.path)

    def _remove(self, path: Path) -> None:
        condemned = self.dir / f".del-{path.name}-{secrets.token_hex(8)}"
        try:
            os.rename(path, condemned)  # at once, so that nobody reads a step half removed
            shutil.rmtree(condemned)
        except OSError as error:
            warnings.warn(f"could not remove the old checkpoint {str(path)!r}: {error.strerror}", stacklevel=4)


def _is_best(path: Path) -> bool:
    try:
        return read_manifest(path)["best"]
    except CheckpointError:
        return False


def _flattened(tree: PyTree) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The leaves by path: tensors, and the Python values that JSON holds."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for path, leaf in trees.leaves_with_path(tree):
        if path in tensors or path in values:
            raise ValueError(f"two leaves have the path {path!r}: names must differ")
        if isinstance(leaf, Tensor) and leaf.device.type != "meta":
            tensors[path] = leaf.detach()
        elif isinstance(leaf, (bool, int, float, str)):
            values[path] = leaf
        else:
            got = "a tensor without data (device meta)" if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(f"leaf {path!r} must be a tensor, a number or a string, got {got}")
    return tensors, values


def _compact(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy the views of storages that hold more than the leaves, because torch.save writes whole storages."""
    used: Counter[int] = Counter()
    for tensor in tensors.values():
        used[tensor.untyped_storage().data_ptr()] += tensor.nbytes
    return {
        path: tensor.clone()
        if tensor.untyped_storage().nbytes() > used[tensor.untyped_storage().data_ptr()]
        else tensor
        for path, tensor in tensors.items()
    }


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


class _HashingFile:
    """A file that knows the size and the SHA-256 of what was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.size, self.sha256 = file, 0, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.size += memoryview(data).nbytes
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _write(path: Path, write: Callable[[Any], Any]) -> list[Any]:
    """Write a new file through to the disk; returns its size and SHA-256."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
        hashing = _HashingFile(file)
        write(hashing)
        file.flush()
        os.fsync(file.fileno())
    return [hashing.size, hashing.sha256.hexdigest()]


def _sync(dir: Path) -> None:
    if os.name == "nt":  # cannot open directories
        return
    descriptor = os.open(dir, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_directory(dir: Path) -> None:
    if not dir.is_dir():
        _make_directory(dir.parent)
        with suppress(FileExistsError):  # another process was faster
            os.mkdir(dir)
        _sync(dir.parent)


LOCKS: set[int] = set()
"""The descriptors of this process whose closing releases a lock."""


def _let_go(*locks: int) -> None:
    """Release locks, if they are still this process's."""
    for lock in LOCKS & set(locks):
        LOCKS.remove(lock)
        os.close(lock)


# a loader's worker would hold the lock of a run that was killed, as long as it lives
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _let_go(*LOCKS))


def _locked(dir: Path) -> int:
    """Take the lock of a directory; returns the descriptor whose closing releases it."""
    lock = os.open(dir / ".lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}".encode())
        LOCKS.add(lock)
        return lock
    except BaseException as error:
        owner = os.read(lock, 300).decode(errors="replace") or "another process"
        os.close(lock)
        if isinstance(error, BlockingIOError):
            what = f"is being written by {owner}"
            raise CheckpointError(dir, what, "wait for it, or use another directory") from None
        raise


@contextmanager
def _explained(dir: Path, size: int = 0) -> Iterator[None]:
    """Turn what the operating system, or torch on its behalf, says about a failed write into a `CheckpointError`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None and "inline_container" not in str(error):  # not of the disk: a worker's death, say
            raise
        reason = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            what = f"cannot be written: {reason} ({size} bytes needed, {shutil.disk_usage(dir).free} free)"
            raise CheckpointError(dir, what, "free some space, keep fewer steps, or use another directory") from error
        raise CheckpointError(dir, f"cannot be written: {reason}", "use a directory you can write to") from error
