"""Runs under faults that come from outside: signals at any time, workers that die, batches nobody should have made."""

import contextlib
import os
import random as python_random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from holofunc import checkpoint, data, lift, losses, metrics, optim, random, train, tree

pytestmark = pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")

MODEL = lift(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))

# --- signals ---------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys
import torch
from torch import nn
from holofunc import data, lift, losses, optim, random, train

class Slow(torch.utils.data.Dataset):
    def __init__(self): self.images, self.labels = data.digits("train")
    def __len__(self): return 40
    def __getitem__(self, i):
        torch.ones(200, 200).matmul(torch.ones(200, 200))
        return self.images[i], int(self.labels[i])

folder, workers, compile = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "compile"
model, tx = lift(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))), optim.adam(1e-2)
step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx)
batches = data.Batches(Slow(), 8, key=random.key(4), num_workers=workers)
result = train.fit(
    step, train.create_state(model, tx, random.key(0)), batches, time="60s", compile=compile,
    hooks=[train.checkpoint(folder, every=1), lambda event: print(event.kind, flush=True)],
)
sys.exit({"interrupt": 130, "terminated": 143}.get(result.reason, 0))
"""


def children(pid):
    """The processes below one, but for Python's own keeper of shared memory."""
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((each / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"resource_tracker" not in (each / "cmdline").read_bytes():
                found.append(int(each.name))
    return found


def signalled(folder, number, code, *, workers, compile, after, delay):
    """Start a run, send it a signal some time after an event, and look at what it leaves."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        PROGRAM,
        str(folder),
        str(workers),
        "compile" if compile else "eager",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.strip() == after:
            break
    time.sleep(delay)
    below = children(process.pid)
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == code, error
    assert not any(os.path.exists(f"/proc/{pid}") for pid in below)
    if checkpoint.steps(folder):
        assert all(problem is None for problem in checkpoint.verify(folder).values())
        assert checkpoint.manifest(folder)["metadata"]["position"] < 6


def test_a_signal_while_workers_load_leaves_a_checkpoint_and_nobody_behind(tmp_path):
    signalled(tmp_path, signal.SIGTERM, 143, workers=1, compile=False, after="step", delay=0.1)
    assert checkpoint.steps(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(20))
def test_signals_at_random_instants(tmp_path, trial):
    """While the step compiles, while workers load, while a step is saved."""
    rng, compiled = python_random.Random(trial), trial % 4 == 0
    number, code = ((signal.SIGTERM, 143), (signal.SIGINT, 130))[trial % 2]
    signalled(
        tmp_path, number, code, workers=trial % 3, compile=compiled, after="epoch_start" if compiled else "step",
        delay=rng.uniform(0, 3 if compiled else 0.5),
    )  # fmt: skip


# --- workers ---------------------------------------------------------------------------------------------------------


class Dying(torch.utils.data.Dataset):
    """A process that loads sample 36 is killed, as by the system when memory ends."""

    def __init__(self):
        self.images, self.labels = data.digits("train")

    def __len__(self):
        return 40

    def __getitem__(self, i):
        if i == 36 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.images[i], int(self.labels[i])


def run_with_a_worker_that_is_killed(folder):
    tx = optim.sgd(0.1)
    step = train.make_train_step(train.supervised(MODEL, losses.cross_entropy), tx)
    state = train.create_state(MODEL, tx, random.key(0))
    batches = data.Batches(Dying(), 8, num_workers=1)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"DataLoader worker.* (exited unexpectedly|is killed by signal)"):
        train.fit(step, state, batches, epochs=1, compile=False, hooks=[train.checkpoint(folder, every=1)])
    assert time.monotonic() - began < 30
    assert checkpoint.steps(folder)
    assert not children(os.getpid())
    alone = data.Batches(Dying(), 8)
    rest = train.fit(step, state, alone, epochs=1, compile=False, resume=folder)
    whole = train.fit(step, state, alone, epochs=1, compile=False)
    for (path, a), (_, b) in zip(tree.leaves_with_path(rest.state), tree.leaves_with_path(whole.state), strict=True):
        assert torch.equal(a, b), path
    print("all held", flush=True)
    os._exit(0)  # torch raises what a dead worker is to it wherever the process happens to be


def test_a_worker_that_is_killed_ends_the_run_soon_and_leaves_its_checkpoint(tmp_path):
    program = f"import runpy; runpy.run_path({__file__!r})['run_with_a_worker_that_is_killed']({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "all held\n", done.stderr


# --- batches ---------------------------------------------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize("labels", [[-100] * 4, [3], [3, -100, -100]], ids=["all ignored", "one", "one counts"])
def test_odd_batches_leave_no_nan(labels):
    """All labels ignored, a batch of one image (with BatchNorm over its pixels), a batch of one that counts."""
    model, tx = lift(Normed), optim.adam(1e-2)
    state = train.create_state(model, tx, random.key(0))
    step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx)
    images = random.normal(random.key(1), (len(labels), 1, 8, 8))
    state, measured = step(state, (images, torch.tensor(labels)))
    assert measured["loss"].isfinite()
    for path, leaf in tree.leaves_with_path(state):
        assert not leaf.is_floating_point() or leaf.isfinite().all(), path
    evaluate = train.make_eval_step(model, {"accuracy": metrics.accuracy()}, loss=losses.cross_entropy)
    found = train.evaluate(evaluate, state, [(images, torch.tensor(labels)), (images, torch.full((len(labels),), 3))])
    assert all(0 <= value < 100 for value in found.values())


def test_data_smaller_than_a_batch():
    images, labels = data.digits("train")
    batches = data.Batches((images[:3], labels[:3]), 8)
    assert [len(x) for x, _ in batches] == [3]
    tx = optim.sgd(0.1)
    step = train.make_train_step(train.supervised(MODEL, losses.cross_entropy), tx)
    result = train.fit(step, train.create_state(MODEL, tx, random.key(0)), batches, epochs=2, compile=False)
    assert result.state.step == 2
    with pytest.raises(ValueError, match="data must hold at least one batch, got 3 samples for drop_last=True"):
        data.Batches((images[:3], labels[:3]), 8, drop_last=True)
    with pytest.raises(ValueError, match="data must hold at least one batch, got 0 samples"):
        data.Batches((images[:0], labels[:0]), 8)
