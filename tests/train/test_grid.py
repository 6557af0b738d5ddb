"""Exact resume, proven as a grid of real deaths: the state and history.csv of a run that died are those of one that lived.

python tests/train/test_grid.py            prints the table of docs/training.md; --help says how to print a part
"""

import argparse
import csv
import hashlib
import itertools
import os
import random as python_random
import signal
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from holofunc import checkpoint, data, lift, losses, metrics, optim, random, train, tree

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

MODEL = lift(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 10)))
ENDS = {
    "SIGKILL": [(7, "step", signal.SIGKILL)],
    "SIGKILL twice": [(7, "step", signal.SIGKILL), (12, "step", signal.SIGKILL)],
    "SIGKILL at an epoch's end": [(10, "epoch_end", signal.SIGKILL)],
    "SIGTERM": [(7, "step", signal.SIGTERM)],
    "Ctrl-C": [(8, "step", signal.SIGINT)],
}
FEATURES = ("EMA", "fp16 scale", "skipped updates", "early stopping", "plateau", "find_lr before")


class Digits(torch.utils.data.Dataset):
    """Drawn noise by all three generators; with a sample that is not finite where updates are to be skipped."""

    def __init__(self, spoiled):
        self.images, self.labels = data.digits("train")
        self.spoiled = spoiled

    def __len__(self):
        return 40

    def __getitem__(self, i):
        image = self.images[i].float() / 255 + 0.01 * torch.rand(1, 8, 8) + 0.01 * python_random.random()
        return image.log() - image.log() + torch.nan if self.spoiled and i == 11 else image, int(self.labels[i])


def batches(feature, workers):
    return data.Batches(Digits(feature == "skipped updates"), 8, key=random.key(4), num_workers=workers)


def held_out():
    images, labels = data.digits("test")
    return data.Batches((images[:32], labels[:32]), 16, mean=0.3, std=0.4)


def optimizer(feature, rate, accumulates):
    tx = optim.inject_hyperparams(optim.sgd)(learning_rate=rate, momentum=0.9)
    if feature == "EMA":
        tx = optim.ema_params(tx, 0.9)
    if accumulates:
        tx = optim.multi_steps(tx, every=3)
    if feature == "fp16 scale":
        return optim.dynamic_loss_scale(tx, growth_interval=3)
    return optim.apply_if_finite(tx) if feature == "skipped updates" else tx


def course(folder, feature, accumulates, compiled, workers, death=None, resume=False, also=()):
    """One process's part of a run of three epochs."""
    objective = train.supervised(MODEL, losses.cross_entropy, precision="fp16" if feature == "fp16 scale" else "fp32")
    rate = 0.1
    if feature == "find_lr before":
        tx = optimizer(feature, rate, False)
        state = train.create_state(MODEL, tx, random.key(0))
        rate = train.find_lr(objective, tx, state, batches(feature, 0), steps=8).lrs[5]
    tx = optimizer(feature, rate, accumulates)
    state = train.create_state(MODEL, tx, random.key(0))
    evaluate = train.make_eval_step(MODEL, {"accuracy": metrics.accuracy()}, loss=losses.cross_entropy)
    hooks = [
        train.log(folder / "history.csv", every=2),
        train.checkpoint(folder, every=2, best="val/accuracy", mode="max"),
    ]
    if feature == "early stopping":
        hooks.append(train.early_stopping("val/accuracy", 3, mode="max", min_delta=0.5))
    if feature == "plateau":
        hooks.append(train.plateau("val/accuracy", 0, factor=0.5, mode="max"))
    hooks += also
    if death is not None:
        step, kind, number = death
        hooks.append(lambda e: os.kill(os.getpid(), number) if (e.step, e.kind) == (step, kind) else None)
    return train.fit(
        train.make_train_step(objective, tx), state, batches(feature, workers), epochs=3, compile=compiled, log_every=2,
        eval=(evaluate, held_out()), eval_every=3, hooks=hooks, resume=folder if resume else None,
    )  # fmt: skip


def fork(work, *args, **options):
    """Run ``work`` in a process of its own; returns its exit code, negative for a signal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn that other threads do not survive a fork
        pid = os.fork()
    if pid == 0:
        try:
            warnings.simplefilter("ignore")
            work(*args, **options)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def digest(folder):
    """sha256 of the newest state, and of history.csv."""
    found = checkpoint.manifest(folder)
    whole = hashlib.sha256((folder / f"step_{found['step']:08d}" / "state.pt").read_bytes()).hexdigest()
    return found["step"], whole, hashlib.sha256((folder / "history.csv").read_bytes()).hexdigest()


def died_and_lived(folder, cell, deaths, workers=(0, 0)):
    """The digests of a run with these deaths, each in a process of its own."""
    for number, death in enumerate(deaths):
        code = fork(course, folder, *cell, workers[number % 2], death, resume=number > 0)
        assert code == (-signal.SIGKILL if death[2] == signal.SIGKILL else 0), f"exit code {code}"
    assert fork(course, folder, *cell, workers[len(deaths) % 2], resume=True) == 0
    return digest(folder)


def table(root, compiled, ends=ENDS, features=FEATURES, workers=((0, 0), (2, 1))):
    """For each feature and end, how many cells (window open or none, workers or none) are equal."""
    found = {}
    for feature, accumulates in itertools.product(features, (False, True)):
        cell = feature, accumulates, compiled
        whole = root / f"{feature} {accumulates} whole"
        assert fork(course, whole, *cell, 0) == 0
        for end, numbers in itertools.product(ends, workers):
            folder = root / f"{feature} {accumulates} {end} {numbers[0]}"
            equal = died_and_lived(folder, cell, ends[end], numbers) == digest(whole)
            found.setdefault(feature, {}).setdefault(end, []).append(equal)
    return found


def markdown(found):
    ends = list(next(iter(found.values())))
    rows = [f"| {feature} | " + " | ".join(f"{sum(c)} of {len(c)}" for c in cells.values()) + " |" for feature, cells in found.items()]  # fmt: skip
    return "\n".join(["| | " + " | ".join(ends) + " |", "| --- |" + " --- |" * len(ends), *rows])


@pytest.mark.parametrize(
    ("feature", "end"),
    [("plateau", "SIGKILL twice"), ("skipped updates", "SIGKILL at an epoch's end"), ("early stopping", "SIGTERM")],
)
def test_a_run_that_died_is_the_run_that_lived(tmp_path, feature, end):
    """Some cells of the grid; all of it with ``-m slow``."""
    cell = feature, feature == "plateau", False
    assert fork(course, tmp_path / "whole", *cell, 0) == 0
    assert died_and_lived(tmp_path / "parts", cell, ENDS[end]) == digest(tmp_path / "whole")


@pytest.mark.slow
def test_the_grid(tmp_path):
    found = table(tmp_path, compiled=False)
    print(markdown(found))
    assert all(all(cell) for row in found.values() for cell in row.values())


@pytest.mark.slow
def test_the_grid_compiled(tmp_path):
    found = table(tmp_path, compiled=True, ends={"SIGKILL twice": ENDS["SIGKILL twice"]})
    print(markdown(found))
    assert all(all(cell) for row in found.values() for cell in row.values())


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 5, 7, 15])
def test_any_position_will_do(tmp_path, step):
    """The first step, the last batch of an epoch, the middle of one, the last step."""
    cell = "EMA", True, False
    assert fork(course, tmp_path / "whole", *cell, 0) == 0
    assert fork(course, tmp_path / "parts", *cell, 0, (step, "step", signal.SIGTERM)) == 0
    assert fork(course, tmp_path / "parts", *cell, 0, resume=True) == 0
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")


def kill_until_it_ends(folder, rng):
    """A run that is killed at random instants, until it has come to its end. Returns how often."""
    cell, kills = ("plateau", True, False, 0), 0
    while True:
        pid = os.fork()
        if pid == 0:
            try:
                warnings.simplefilter("ignore")
                resume = bool(checkpoint.steps(folder))
                course(folder, *cell, resume=resume)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        if kills < 5:
            time.sleep(rng.uniform(0.05, 0.6))
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, -signal.SIGKILL)
        if code == 0:
            return kills
        kills += 1


@pytest.mark.slow
def test_kills_at_random_instants(tmp_path):
    assert fork(course, tmp_path / "whole", "plateau", True, False, 0) == 0
    for trial in range(20):
        kill_until_it_ends(tmp_path / str(trial), python_random.Random(trial))
        assert digest(tmp_path / str(trial)) == digest(tmp_path / "whole")
        with (tmp_path / str(trial) / "history.csv").open() as file:
            steps = [int(row["step"]) for row in csv.DictReader(file)]
        assert steps == sorted(set(steps))


def test_what_a_callback_draws_changes_nothing(tmp_path):
    import numpy as np

    def draws(event):
        torch.rand(3)
        np.random.rand(3)  # noqa: NPY002
        python_random.random()

    cell = "EMA", False, False, 0
    plain = course(tmp_path / "plain", *cell)
    drawn = course(tmp_path / "drawn", *cell, also=[draws])
    for (path, a), (_, b) in zip(tree.leaves_with_path(plain.state), tree.leaves_with_path(drawn.state), strict=True):
        assert torch.equal(a, b), path
    assert plain.history == drawn.history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the grid, or a part of it: cells whose digests are equal.")
    parser.add_argument("--features", nargs="+", default=FEATURES, choices=FEATURES)
    parser.add_argument("--ends", nargs="+", default=list(ENDS), choices=list(ENDS))
    parser.add_argument("--workers", nargs="+", default=["0,0", "2,1"], help="before and after a death, e.g. 0,0 2,1")
    parser.add_argument("--compiled", action="store_true")
    given = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where a shell runs this in the background, it is ignored
    workers, began = [tuple(map(int, pair.split(","))) for pair in given.workers], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = table(Path(folder), given.compiled, {end: ENDS[end] for end in given.ends}, given.features, workers)
    cells = [equal for row in found.values() for cell in row.values() for equal in cell]
    print(markdown(found))
    print(
        f"{len(cells)} cells, {cells.count(False)} differ, {time.monotonic() - began:.0f} s, torch {torch.__version__}"
    )
