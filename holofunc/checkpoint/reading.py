"""Reading checkpoints, with errors that say what is wrong."""

import hashlib
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from holofunc import tree as trees
from holofunc.checkpoint.layout import (
    MANIFEST,
    STATE,
    CheckpointError,
    broken,
    committed,
    dtype_name,
    read_manifest,
)
from holofunc.tree.states import with_current_names
from holofunc.typing import PyTree

__all__ = ["manifest", "restore", "steps", "verify"]


def restore(
    dir_or_file: str | Path,
    like: PyTree,
    *,
    step: int | str = "latest",
    strict: bool = True,
    prefix: str = "",
    cast: bool = False,
) -> PyTree:
    """Read a tree from a checkpoint directory, a single step's directory, or a file of tensors.

    Args:
        dir_or_file: what `save` wrote, or a file that `torch.save` made of a dict of tensors.
        like: a tree of the structure to be read: it names the leaves and gives shapes, dtypes and devices (`meta`
            counts as `cpu`; such a tree costs no memory). Fields of states that were called otherwise when the step was
            saved are read under their old names.
        step: ``"latest"``, ``"best"`` or a number.
        strict: whether the stored leaves must be those of ``like``. Otherwise stored leaves that ``like`` has not are
            left out, and leaves that are not stored stay as in ``like``; those in both must still agree in shape.
        prefix: path of the subtree to read: ``restore(dir, params, prefix="params")`` of a stored training state.
        cast: whether leaves may be stored in another dtype than that of ``like``, and are converted.

    Returns:
        A new tree of the structure of ``like``.

    Raises:
        CheckpointError: if there is no such step, it does not verify, or its leaves do not fit ``like``; all leaves
            that do not are listed.

    Example:
        >>> import tempfile, torch
        >>> from holofunc import checkpoint
        >>> with tempfile.TemporaryDirectory() as dir:
        ...     path = checkpoint.save(dir, {"params": {"w": torch.ones(2)}, "step": torch.tensor(3)}, 3)
        ...     checkpoint.restore(dir, {"w": torch.zeros(2)}, prefix="params")
        {'w': tensor([1., 1.])}
    """
    path, about, file = _opened(Path(dir_or_file), step)
    with file:
        stored = {**_loaded(path, file), **about["values"]}
    if prefix:
        start = prefix + "/"
        stored = {name.removeprefix(start): leaf for name, leaf in stored.items() if name.startswith(start)}
    wanted = trees.leaves_with_path(like)
    stored = with_current_names(stored, dict(wanted))
    problems = _differences(stored, dict(wanted), strict, cast)
    if problems:
        what = "\n  ".join([f"does not fit the tree to be restored{f' at {prefix!r}' if prefix else ''}:", *problems])
        helps = strict and not _differences(stored, dict(wanted), False, cast)
        raise CheckpointError(
            path, what, f"restore with the model and optimizer it was saved with{', or strict=False' if helps else ''}"
        )
    return trees.rebuild(like, [_placed(stored[name], leaf) if name in stored else leaf for name, leaf in wanted])


def manifest(dir: str | Path, *, step: int | str = "latest") -> dict[str, Any]:
    """The manifest of the step that `restore` would read: ``step``, ``best``, ``metadata``, ``leaves`` and more.

    Raises:
        CheckpointError: if there is no such step, or it does not verify.
    """
    _, about, file = _opened(Path(dir), step)
    file.close()
    return about


def steps(dir: str | Path) -> list[int]:
    """The steps in a checkpoint directory, ascending; empty if there is no such directory.

    Example:
        >>> from holofunc import checkpoint
        >>> checkpoint.steps("no/such/directory")
        []
    """
    return sorted({each.step for each in committed(Path(dir))})


def verify(dir: str | Path) -> dict[int, CheckpointError | None]:
    """Check size and SHA-256 of every step: the problem of each, or None.

    Example:
        >>> import tempfile, torch
        >>> from holofunc import checkpoint
        >>> with tempfile.TemporaryDirectory() as dir:
        ...     path = checkpoint.save(dir, {"w": torch.ones(2)}, 7)
        ...     checkpoint.verify(dir)
        {7: None}
    """
    found: dict[int, CheckpointError | None] = {}
    for each in committed(Path(dir)):
        try:
            _verified(each.path, read_manifest(each.path)).close()
            found[each.step] = None
        except CheckpointError as error:
            found[each.step] = error
    return found


def _opened(path: Path, step: int | str) -> tuple[Path, dict[str, Any], BinaryIO]:
    """The path, the manifest and the verified, open state of the step asked for."""
    if not (type(step) is int or step in ("latest", "best")):
        raise ValueError(f"step must be 'latest', 'best' or a number, got {step!r}")
    if path.name == STATE and (path.parent / MANIFEST).exists():
        path = path.parent
    if path.is_file():
        return path, {"values": {}}, _archive(path)
    if (path / MANIFEST).exists():
        about = read_manifest(path)
        return path, about, _verified(path, about)
    failed: dict[Path, CheckpointError] = {}
    for _ in range(100):  # a writer may remove steps while we look at them: look again
        found = [each for each in committed(path) if step in ("latest", "best", each.step) and each.path not in failed]
        for each in reversed(found):
            try:
                about = read_manifest(each.path)
                if step == "best" and not about["best"]:
                    continue
                file = _verified(each.path, about)
            except CheckpointError as error:
                if not each.path.is_dir():
                    break
                failed[each.path] = error
            else:
                for problem in failed.values():
                    warnings.warn(f"skipped a broken checkpoint: {problem}", stacklevel=3)
                return each.path, about, file
        else:
            break
    raise _nothing(path, step, list(failed.values()))


def _nothing(path: Path, step: int | str, failed: list[CheckpointError]) -> CheckpointError:
    if failed:
        what = "holds no step that verifies: " + ", ".join(f"{error.path.name} {error.what}" for error in failed)
        return CheckpointError(path, what, "restore another one, or start again")
    if not path.exists():
        return CheckpointError(path, "does not exist", "check the path")
    found = steps(path)
    if not found:
        return CheckpointError(path, "holds no checkpoint", "check the path, or save one first")
    if step == "best":
        return CheckpointError(path, "holds no step saved with best=True", f"restore one of {found}")
    return CheckpointError(path, f"holds no step {step}", f"restore one of {found}")


def _verified(path: Path, about: dict[str, Any]) -> BinaryIO:
    """The state of a step as an open file whose content is what the manifest says."""
    try:
        size, digest = about["files"][STATE]
        file = (path / STATE).open("rb")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise broken(path, f"has no readable {STATE}") from error
    try:
        found = os.fstat(file.fileno()).st_size
        if found != size:
            raise broken(path, f"has a {STATE} of {found} bytes instead of {size}")
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
            raise broken(path, f"has a damaged {STATE} (its SHA-256 is wrong)")
        file.seek(0)
    except OSError as error:
        file.close()
        raise broken(path, f"cannot be read ({error.strerror})") from error
    except CheckpointError:
        file.close()
        raise
    return file


def _archive(path: Path) -> BinaryIO:
    """A file of tensors without a manifest, checked by the checksums that a zip archive has."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError, ValueError, EOFError) as error:
        raise broken(path, f"is no readable file of tensors ({error})") from error
    if damaged is not None:
        raise broken(path, f"is damaged at {damaged!r}")
    return path.open("rb")


def _loaded(path: Path, file: BinaryIO) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch says, it ends in the advice to load without its safeguard
        what = "holds something else than tensors" if "Weights only load" in str(error) else "cannot be loaded"
        raise broken(path, f"{what}, and is not loaded because that could execute code") from None
    leaves = trees.leaves_with_path(content)
    if not all(isinstance(leaf, Tensor) for _, leaf in leaves):
        raise broken(path, "holds something else than tensors")
    return dict(leaves)


def _differences(stored: dict[str, Any], wanted: dict[str, Any], strict: bool, cast: bool) -> list[str]:
    """All that keeps the stored leaves from taking the place of the wanted ones, a line each."""
    both = [name for name in wanted if name in stored]
    problems = []
    if strict or not both:
        problems += [f"missing {name!r}" for name in wanted if name not in stored]
        problems += [f"unexpected {name!r}" for name in stored if name not in wanted]
    for name in both:
        saved, expected = _kind(stored[name]), _kind(wanted[name])
        castable = cast and isinstance(stored[name], Tensor) and isinstance(wanted[name], Tensor)
        if saved[1] != expected[1] or (saved[0] != expected[0] and not castable):
            problems.append(f"mismatched {name!r}: {' '.join(saved)} is stored, {' '.join(expected)} expected")
    return problems


def _kind(leaf: Any) -> tuple[str, str]:
    return (dtype_name(leaf), str(tuple(leaf.shape))) if isinstance(leaf, Tensor) else (type(leaf).__name__, "")


def _placed(leaf: Any, like: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.to(device="cpu" if like.device.type == "meta" else like.device, dtype=like.dtype)
