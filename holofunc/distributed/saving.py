"""Checkpoints of sharded states, which can be restored on any number of ranks.

A step is a directory of `torch.distributed.checkpoint` with a manifest, and as in `holofunc.checkpoint` it is there as
a whole or not at all: written under a temporary name, hashed, synced and renamed. Sizes and SHA-256 are checked before
anything is read, which matters more than elsewhere: the metadata of `torch.distributed.checkpoint` is a pickle. The
hashes guard against accidents; who can write to the directory can have code executed, so read only what is your own.
"""

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holofunc import tree
from holofunc.checkpoint.layout import (
    FORMAT,
    MANIFEST,
    CheckpointError,
    broken,
    committed,
    dtype_name,
    read_manifest,
    sealed,
)
from holofunc.distributed.ranks import explained, gathered, rank, world_size
from holofunc.ops.checks import check_counts
from holofunc.typing import PyTree

__all__ = ["restore_sharded", "save_sharded"]

METADATA = ".metadata"
"""The file of `torch.distributed.checkpoint` that says what all others hold."""


def save_sharded(dir: str | Path, value: PyTree, step: int, *, metadata: dict[str, Any] | None = None) -> Path:
    """Save a tree whose leaves are distributed over ranks; leaves with one path on several ranks are replicated.

    All ranks call it, with the same directory on a file system that they share. When it returns, the step is on the
    disk.

    Args:
        dir: the checkpoint directory; made if it does not exist.
        value: tensors in dicts, lists, tuples and NamedTuples, such as a state with `shard` in its optimizer.
        step: at least 0; one that is not there yet.
        metadata: anything that JSON can hold; that of rank 0 is written.

    Returns:
        The step's directory.

    Raises:
        CheckpointError: the step is there already, or cannot be written; on all ranks, whichever cannot.
        TypeError: a leaf that is no tensor, or metadata that JSON cannot hold.
        ValueError: a step below 0; leaves of one path that ranks have in different shapes or dtypes.

    Example:
        >>> import tempfile, torch
        >>> from holofunc import distributed
        >>> with tempfile.TemporaryDirectory() as dir:
        ...     path = distributed.save_sharded(dir, {"w": torch.ones(2)}, 3)
        ...     path.name, distributed.restore_sharded(dir, {"w": torch.zeros(2)})
        ('step_00000003', {'w': tensor([1., 1.])})
    """
    check_counts(0, step=step)
    json.dumps(metadata)
    final, temporary = Path(dir) / f"step_{step:08d}", Path(dir) / f".tmp-{step:08d}"
    mine = _flattened(value)
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    found = gathered(({path: [list(x.shape), dtype_name(x)] for path, x in mine.items()}, final.exists()))
    if found[0][1]:
        raise CheckpointError(final, "exists already", "save another step, or remove it")
    leaves: dict[str, Any] = {}
    for path, kind in (each for kinds, _ in found for each in kinds.items()):
        if leaves.setdefault(path, kind) != kind:
            both = f"{leaves[path]} and {kind}"
            raise ValueError(f"leaf {path!r} must be of one shape and dtype on all ranks that have it, got {both}")
    from torch.distributed import checkpoint as dcp  # seconds, for those who need it

    with _one_fate(final), explained(), _alone():
        dcp.save(mine, checkpoint_id=temporary, no_dist=world_size() == 1)
    with _one_fate(final):
        if rank() == 0:
            files = {path.name: _measured(path) for path in sorted(temporary.iterdir())}
            about = {"format": FORMAT, "step": int(step), "best": False, "metadata": metadata or {}}
            about |= {"ranks": world_size(), "leaves": leaves, "files": files}
            (temporary / MANIFEST).write_bytes(sealed(about))
            _sync(temporary / MANIFEST)
            os.rename(temporary, final)
            _sync(final.parent)
    return final


@contextlib.contextmanager
def _one_fate(path: Path) -> Iterator[None]:
    """What ranks do to the disk, the first one or all: they wait for one another, and fail together."""
    from torch.distributed.checkpoint import CheckpointException

    problem: BaseException | None = None
    try:
        yield
    except OSError as error:
        problem = error
    except CheckpointException as error:
        problem = error.failures[rank()][0] if rank() in error.failures else None
    if problems := [f"on rank {r}: {each}" for r, each in enumerate(gathered(problem and str(problem))) if each]:
        raise CheckpointError(path, f"cannot be written {problems[0]}", "use a directory that all ranks can write to")


def restore_sharded(dir: str | Path, like: PyTree, *, step: int | str = "latest") -> PyTree:
    """Restore this rank's leaves from a checkpoint that any number of ranks have saved.

    All ranks call it. A state for other shares (`shard` on more or fewer ranks) finds its leaves by their paths.

    Args:
        dir: what `save_sharded` wrote.
        like: a tree of the structure to be read; on each rank its own.
        step: ``"latest"`` or a number.

    Returns:
        A new tree of the structure of ``like``.

    Raises:
        CheckpointError: there is no such step, it is damaged, or its leaves have other shapes or dtypes than those of
            ``like``: all that do not fit are listed, and nothing is converted.
    """
    there = committed(Path(dir))
    found = [each.path for each in there if step in ("latest", each.step)]
    if not found:
        steps = [each.step for each in there]
        raise CheckpointError(dir, f"holds no step {step!r}", f"restore one of {steps}" if steps else "check the path")
    path, wanted = found[-1], dict(tree.leaves_with_path(like))
    about = read_manifest(path)
    if METADATA not in about["files"]:
        raise CheckpointError(path, "is a step of one process", "read it by holofunc.checkpoint.restore")
    for name, measured in about["files"].items():
        if not (path / name).is_file() or _measured(path / name) != measured:
            raise broken(path, f"has a damaged or missing {name}")
    problems = [problem for name, leaf in wanted.items() if (problem := _difference(name, leaf, about["leaves"]))]
    if problems:
        what = "\n  ".join(["does not fit the tree to be restored:", *problems])
        raise CheckpointError(path, what, "restore with the model and optimizer it was saved with")
    leaves = {name: torch.empty_like(leaf, device="cpu" if leaf.is_meta else None) for name, leaf in wanted.items()}
    from torch.distributed import checkpoint as dcp  # seconds, for those who need it

    with explained(), _alone():
        dcp.load(leaves, checkpoint_id=path, no_dist=world_size() == 1)
    return tree.rebuild(like, list(leaves.values()))


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One process saves for itself on purpose; torch would warn of that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _difference(name: str, leaf: Tensor, stored: dict[str, Any]) -> str | None:
    expected = [list(leaf.shape), dtype_name(leaf)]
    if name not in stored:
        return f"missing {name!r}"
    if stored[name] != expected:
        shapes = [f"{dtype} {tuple(shape)}" for shape, dtype in (stored[name], expected)]
        return f"mismatched {name!r}: {shapes[0]} is stored, {shapes[1]} expected"
    return None


def _flattened(value: PyTree) -> dict[str, Tensor]:
    leaves: dict[str, Tensor] = {}
    for path, leaf in tree.leaves_with_path(value):
        if path in leaves:
            raise ValueError(f"two leaves have the path {path!r}: names must differ")
        if not isinstance(leaf, Tensor) or leaf.is_meta:
            got = "one without data (device meta)" if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(f"leaf {path!r} must be a tensor, got {got}")
        leaves[path] = leaf.detach()
    return leaves


def _measured(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _sync(path: Path) -> None:
    if os.name != "nt":  # cannot open directories
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
