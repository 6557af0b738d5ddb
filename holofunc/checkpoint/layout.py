"""The layout of a checkpoint directory, and manifests that detect damage."""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

__all__ = [
    "FORMAT",
    "MANIFEST",
    "STATE",
    "CheckpointError",
    "Step",
    "broken",
    "committed",
    "dtype_name",
    "read_manifest",
    "sealed",
    "step_at",
]

FORMAT = 1
STATE, MANIFEST = "state.pt", "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read: which one, why, and what to do."""

    def __init__(self, path: str | Path, what: str, what_to_do: str) -> None:
        super().__init__(path, what, what_to_do)
        self.path, self.what, self.what_to_do = Path(path), what, what_to_do

    def __str__(self) -> str:
        return f"checkpoint {str(self.path)!r} {self.what}; {self.what_to_do}"


class Step(NamedTuple):
    """A step's directory. A step saved again is a new attempt, so that no moment has neither the old nor the new."""

    step: int
    attempt: int
    path: Path


def step_at(path: Path) -> Step | None:
    """The step whose directory has this name."""
    match = re.fullmatch(r"step_(\d{8,})(?:\.(\d+))?", path.name)
    return Step(int(match[1]), int(match[2] or 0), path) if match else None


def committed(dir: Path) -> list[Step]:
    """The directories of steps, in ascending order of step and attempt."""
    try:
        names = os.listdir(dir)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(each for each in (step_at(dir / name) for name in names) if each and each.path.is_dir())


def sealed(about: dict[str, Any]) -> bytes:
    """The manifest with its own SHA-256 as one more entry."""
    return json.dumps({**about, "sha256": _seal(about)}, indent=1).encode()


def _seal(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest in a step's directory, checked against its own hash and the step in the directory's name."""
    try:
        about = json.loads((path / MANIFEST).read_bytes())
        intact = about.pop("sha256") == _seal(about)
        version, step = about["format"], about["step"]
    except OSError as error:
        raise broken(path, f"has no readable manifest ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise broken(path, "has a damaged manifest") from error
    if not intact:
        raise broken(path, "has a damaged manifest (its SHA-256 is wrong)")
    if version != FORMAT:
        what = f"has format {version}, and this holofunc reads {FORMAT}"
        raise CheckpointError(path, what, "use the holofunc that wrote it, or a newer one")
    named = step_at(path)
    if named and named.step != step:
        raise broken(path, f"holds step {step}, which is not what its name says")
    return about


def broken(path: Path, what: str) -> CheckpointError:
    """The error of a step that cannot be used."""
    return CheckpointError(path, what, "restore another step, or save it again")


def dtype_name(tensor: Tensor) -> str:
    """`float32` for torch.float32."""
    return str(tensor.dtype).removeprefix("torch.")
