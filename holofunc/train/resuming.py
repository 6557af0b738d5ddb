"""The settings that a run depends on, compared when it is resumed."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from holofunc import checkpoint
from holofunc.typing import Fingerprinted, PyTree

__all__ = ["check_dependencies", "dependencies", "saved_run"]

WARNED = {
    "torch": "another version of torch may round otherwise",
    "threads": "sums over another number of threads may round otherwise",
}


def dependencies(data: Any, steps_per_epoch: int | None) -> dict[str, Any]:
    """The versions, and what the data say of themselves, as plain data."""
    found = {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "batches in an epoch": steps_per_epoch,
    }
    own = data.fingerprint() if isinstance(data, Fingerprinted) else {}
    return found | {f"data: {name}": value for name, value in own.items()}


def saved_run(directory: str | Path, state: PyTree, depends: Mapping[str, Any]) -> tuple[PyTree, dict[str, Any]]:
    """The state of the newest step, and what was saved beside it.

    Args:
        directory: of the `holofunc.train.checkpoint` hook.
        state: one of the same structure.
        depends: the `dependencies` of today.

    Raises:
        ValueError: the run had other data. CheckpointError: no step verifies, or the state has another structure.
    """
    about = checkpoint.manifest(directory)
    check_dependencies(about["metadata"]["depends"], depends)
    return checkpoint.restore(directory, {"state": state}, step=about["step"])["state"], about["metadata"]


def check_dependencies(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to resume with other data; warn of what may change the last bits.

    Raises:
        ValueError: naming all that differs.
    """
    changed = {name: (saved[name], value) for name, value in now.items() if name in saved and saved[name] != value}
    for name, reason in WARNED.items():
        if name in changed:
            was, now_is = changed.pop(name)
            warnings.warn(f"resume: {name} was {was}, and is {now_is}: {reason}", stacklevel=6)
    if changed:
        listed = "; ".join(f"{name} was {was!r} and is {now_is!r}" for name, (was, now_is) in changed.items())
        raise ValueError(f"resume continues a run on the data that it had: {listed}")
