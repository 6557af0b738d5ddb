"""Checkpoints under faults, ours beside `torch.save` and Lightning: kills while saving, flipped bits, runs that go on.

python tests/benchmarks/bench_checkpoint.py --kills 200 --flips 400        rows of docs/training.md

Lightning is left out where it is not installed (``pip install lightning``).
"""

import argparse
import hashlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import random as python_random
import signal
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import nn

from holofunc import checkpoint

SIZE = 2**18
HAS_LIGHTNING = importlib.util.find_spec("lightning") is not None


def tensors(step):
    """Two tensors that must always be of one step."""
    return {"a": torch.full((SIZE,), float(step)), "b": torch.full((SIZE,), float(step))}


def fork(work, *args):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            warnings.simplefilter("ignore")
            work(*args)
            code = 0
        finally:
            os._exit(code)
    return pid


# --- writers: save step after step, and say so on a pipe -------------------------------------------------------------


def ours(folder, acknowledge, steps):
    with checkpoint.Writer(folder) as writer:
        for step in range(1, steps + 1):
            writer.save(tensors(step), step, keep=1)
            os.write(acknowledge, step.to_bytes(4, "little"))


def torch_save(folder, acknowledge, steps):
    for step in range(1, steps + 1):
        torch.save(tensors(step), folder / "last.pt")
        os.write(acknowledge, step.to_bytes(4, "little"))


def torch_save_and_rename(folder, acknowledge, steps):
    for step in range(1, steps + 1):
        torch.save(tensors(step), folder / "new")
        (folder / "new").replace(folder / "last.pt")
        os.write(acknowledge, step.to_bytes(4, "little"))


def lightning(folder, acknowledge, steps):
    """`ModelCheckpoint` as it comes, after every step."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.a, self.b = nn.Parameter(torch.zeros(SIZE)), nn.Parameter(torch.zeros(SIZE))
            self.done = nn.Parameter(torch.zeros(1))

        def on_train_batch_start(self, batch, number):
            if number:
                os.write(acknowledge, number.to_bytes(4, "little"))  # that of the batch before was saved

        def training_step(self, batch, number):
            with torch.no_grad():
                self.a.fill_(number + 1.0), self.b.fill_(number + 1.0)
            self.optimizers().step()

        def configure_optimizers(self):
            return torch.optim.SGD([self.done], 0.0)

    saves = pl.callbacks.ModelCheckpoint(folder, every_n_train_steps=1)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[saves], **QUIET)
    trainer.fit(Module(), torch.utils.data.DataLoader(range(steps)))


QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
WRITERS = {"holofunc": ours, "torch.save": torch_save, "torch.save, renamed": torch_save_and_rename}
if HAS_LIGHTNING:
    WRITERS["Lightning"] = lightning


def files(folder):
    """What a reader may try, the newest first."""
    return sorted(
        (p for p in folder.glob("*.*") if p.suffix in (".pt", ".ckpt")), key=lambda p: p.stat().st_mtime, reverse=True
    )


def read(name, path):
    """The step that a checkpoint is of; an error if it cannot be read, or is of two."""
    if name == "holofunc":
        found = checkpoint.restore(path, tensors(0))
    else:
        found = torch.load(path, weights_only=True)
        found = found.get("state_dict", found)
    values = set(found["a"].tolist()) | set(found["b"].tolist())
    if len(values) != 1:
        raise ValueError(f"of several steps: {sorted(values)[:3]}")
    return int(values.pop())


def killed(name, folder, trial):
    """``"kept"``, or what was lost, after a kill at a random instant."""
    rng = python_random.Random(trial)
    reader, writer = os.pipe()
    pid = fork(WRITERS[name], folder, writer, 10_000)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        acknowledged = pipe.read(4 * rng.randrange(1, 4))
        time.sleep(rng.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        acknowledged += pipe.read()
    last, newest = int.from_bytes(acknowledged[-4:], "little"), True
    for path in [folder] if name == "holofunc" else files(folder):
        try:
            found = read(name, path)
        except Exception:
            newest = False
            continue
        return "an acknowledged step lost" if found < last else "kept" if newest else "newest unreadable"
    return "nothing readable"


def kills(name, trials):
    found = {}
    for trial in range(trials):
        with tempfile.TemporaryDirectory() as folder:
            outcome = killed(name, Path(folder), trial)
            found[outcome] = found.get(outcome, 0) + 1
    return f"{found.pop('kept', 0)} of {trials}" + "".join(f", {n} times {what}" for what, n in found.items())


def flips(name, trials):
    """How many files with one flipped bit are read as if nothing were, with another content."""
    silent = 0
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder)
        with open(os.devnull, "wb") as nobody:
            os.waitpid(fork(WRITERS[name], written, nobody.fileno(), 1), 0)
        kept = checkpoint.steps(written) if name == "holofunc" else files(written)
        path = written / f"step_{kept[-1]:08d}/state.pt" if name == "holofunc" else kept[-1]
        content, rng = path.read_bytes(), python_random.Random(0)
        truth = read(name, written if name == "holofunc" else path)
        for _ in range(trials):
            damaged = bytearray(content)
            damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = raw(name, written if name == "holofunc" else path)
                silent += any(value != truth for x in found for value in set(x.tolist()))
            except Exception:
                continue
    return f"{silent} of {trials}"


def raw(name, path):
    if name == "holofunc":
        return checkpoint.restore(path, tensors(0)).values()
    found = torch.load(path, weights_only=True)
    found = found.get("state_dict", found)
    return found["a"], found["b"]


# --- runs that are killed, and go on ---------------------------------------------------------------------------------


def course(folder, death, resume, drawn):
    """Three epochs of five batches with Lightning, saved after every second step."""
    import lightning.pytorch as pl

    from holofunc import data

    pl.seed_everything(0, workers=True, verbose=False)
    images, labels = data.digits("train")
    rows = torch.utils.data.TensorDataset(images[:40], labels[:40])
    loader = torch.utils.data.DataLoader(rows, 8, shuffle=drawn)

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            drop = nn.Dropout(0.2 if drawn else 0.0)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), drop, nn.ReLU(), nn.Linear(16, 10))

        def training_step(self, batch, number):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    class Die(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if death is not None and trainer.global_step == death:
                os.kill(os.getpid(), signal.SIGKILL)

    saves = pl.callbacks.ModelCheckpoint(folder, every_n_train_steps=2, save_last=True)
    trainer = pl.Trainer(max_epochs=3, accelerator="cpu", callbacks=[saves, Die()], **QUIET)
    module = Module()
    trainer.fit(module, loader, ckpt_path="last" if resume else None)
    state = [*module.state_dict().values(), *(s["momentum_buffer"] for s in trainer.optimizers[0].state.values())]
    (folder / "digest").write_text(hashlib.sha256(b"".join(x.detach().numpy().tobytes() for x in state)).hexdigest())


def goes_on(death, drawn):
    with tempfile.TemporaryDirectory() as root:
        whole, parts = Path(root, "whole"), Path(root, "parts")
        for folder, steps in ((whole, [(None, False)]), (parts, [(death, False), (None, True)])):
            folder.mkdir()
            for step, resume in steps:
                os.waitpid(fork(course, folder, step, resume, drawn), 0)
        return (parts / "digest").exists() and (parts / "digest").read_text() == (whole / "digest").read_text()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--flips", type=int, default=400)
    parser.add_argument("--writers", nargs="+", default=list(WRITERS), choices=list(WRITERS))
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    if "Lightning" in given.writers:
        importlib.import_module("lightning.pytorch")  # before the forks
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| | kept after SIGKILL while saving | one flipped bit, read as if nothing were |\n| --- | --- | --- |")
    for name in given.writers:
        print(f"| {name} | {kills(name, given.kills)} | {flips(name, given.flips)} |", flush=True)
    if "Lightning" in given.writers:
        for drawn in (False, True):
            equal = {step: goes_on(step, drawn) for step in (7, 10, 12)}
            print(f"Lightning, killed at step {equal}, {'shuffled, dropout' if drawn else 'nothing drawn'}", flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "lightning")[: 1 + HAS_LIGHTNING]}
    print(f"{versions}, Python {platform.python_version()}, {SIZE * 8 / 2**20:.0f} MiB in each file")


if __name__ == "__main__":
    main()
