"""Checkpoints of sharded states, which can be restored on any number of ranks.

A step is a directory of `torch.distributed.checkpoint` with a manifest, and as in `holofunc.checkpoint` it is there as
a whole or not at all: written under a temporary name, hashed, synced and renamed. Sizes and SHA-256 are checked before
anything is read, which matters more than elsewhere: the metadata of `torch.distributed.checkpoint` is a pickle. The
hashes guard against accidents; who can write to the directory can have code executed, so read only what is your own.
"""

import contextlib
import hashlib
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
from holofunc.typing import PyTree

__all__ = ["restore_sharded", "save_sharded"]


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
        CheckpointError: the step is there already, or cannot be written.
        TypeError: a leaf that is no tensor.

    Example:
        >>> import tempfile, torch
        >>> from holofunc import distributed
        >>> with tempfile.TemporaryDirectory() as dir:
        ...     path = distributed.save_sharded(dir, {"w": torch.ones(2)}, 3)
        ...     path.name, distributed.restore_sharded(dir, {"w": torch.zeros(2)})
        ('step_00000003', {'w': tensor([1., 1.])})
    """
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"step must be an integer of at least 0, got {step!r}")
    final, temporary = Path(dir) / f"step_{step:08d}", Path(dir) / f".tmp-{step:08d}"
    leaves = {path: _tensor(path, leaf) for path, leaf in tree.leaves_with_path(value)}
    about = gathered({path: [list(x.shape), dtype_name(x)] for path, x in leaves.items()})
    if gathered(final.exists())[0]:
        raise CheckpointError(final, "exists already", "save another step, or remove it")
    if rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    gathered("the directory is there")
    from torch.distributed import checkpoint as dcp  # seconds, for those who need it

    with explained(), _alone():
        dcp.save(leaves, checkpoint_id=temporary, no_dist=world_size() == 1)
    if rank() == 0:
        files = {path.name: _measured(path) for path in sorted(temporary.iterdir())}
        found = {"format": FORMAT, "step": step, "best": False, "metadata": metadata or {}, "ranks": world_size()}
        all_leaves = {name: kind for each in about for name, kind in each.items()}
        (temporary / MANIFEST).write_bytes(sealed({**found, "values": {}, "leaves": all_leaves, "files": files}))
        _sync(temporary / MANIFEST)
        os.rename(temporary, final)
        _sync(final.parent)
    gathered("the step is there")
    return final


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
        raise CheckpointError(dir, f"holds no step {step!r}", f"restore one of {[each.step for each in there]}")
    path, wanted = found[-1], dict(tree.leaves_with_path(like))
    about = read_manifest(path)
    for name, measured in about["files"].items():
        if not (path / name).is_file() or _measured(path / name) != measured:
            raise broken(path, f"has a damaged or missing {name}")
    problems = [problem for name, leaf in wanted.items() if (problem := _difference(name, leaf, about["leaves"]))]
    if problems:
        what = "\n  ".join(["does not fit the tree to be restored:", *problems])
        raise CheckpointError(path, what, "restore with the model and optimizer it was saved with")
    leaves = {name: torch.empty_like(leaf) for name, leaf in wanted.items()}
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


def _tensor(path: str, leaf: Any) -> Tensor:
    if not isinstance(leaf, Tensor):
        raise TypeError(f"leaf {path!r} must be a tensor, got {type(leaf).__name__}")
    return leaf.detach()


def _measured(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _sync(path: Path) -> None:
    if os.name != "nt":  # cannot open directories
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
