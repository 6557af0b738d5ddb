"""Saving and restoring trees of tensors, safe against crashes, full disks and corrupted files.

A checkpoint directory holds one directory per saved step:

    run/step_00001200/state.pt       {path: tensor}, readable by torch.load(weights_only=True)
    run/step_00001200/manifest.json  step, metadata, the paths with shapes and dtypes, and the SHA-256 of both files

- **A step is there as a whole or not at all.** It is written under a temporary name, synced to disk and renamed; what
  `save` has returned survives a crash. Old steps are removed after that, and never the last one saved or the best.
- **What is read was written.** Size and SHA-256 are checked first. "latest" is the newest step that passes; those that
  do not are named in a warning.
- **No code is executed.** Tensors are loaded with ``weights_only=True``, and everything else is JSON. NamedTuples are
  rebuilt from the tree that `restore` is given.
- **One writer.** A lock of the operating system, which ends with its process, keeps a second run out.

A step is best if it was saved with ``best=True``; ``step="best"`` is the newest of these. There is no pointer file that
could disagree with the directories.

SHA-256 guards against accidents: who can write to the directory can replace a step and its manifest.
"""

from holofunc.checkpoint.layout import CheckpointError
from holofunc.checkpoint.reading import manifest, restore, steps, verify
from holofunc.checkpoint.writing import Writer, save

__all__ = ["CheckpointError", "Writer", "manifest", "restore", "save", "steps", "verify"]
