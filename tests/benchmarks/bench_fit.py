"""What `fit` costs beside the compiled step: seconds per step in a bare loop and in `fit`, by turns, ratios of medians.

python tests/benchmarks/bench_fit.py [--rounds 7] [--steps 60]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from holofunc import data, jit, lift, losses, optim, random, train, tree


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def convolutions() -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 64, 10))


def ways(build: Callable[[], nn.Module], steps: int, folder: Path) -> dict[str, Callable[[], Any]]:
    """The same epoch in a bare loop, in `fit`, and in `fit` with a log and checkpoints."""
    model, tx = lift(build), optim.adamw(1e-3)
    step = jit(train.make_train_step(train.supervised(model, losses.cross_entropy), tx), donate=True)
    images, labels = random.normal(random.key(1), (64 * steps, 1, 8, 8)), torch.arange(64 * steps) % 10
    batches = data.Batches((images, labels), 64, key=random.key(3))
    state = train.create_state(model, tx, random.key(0))

    def bare() -> None:
        now = tree.map(torch.clone, state)
        for batch in batches.epoch(0):
            now, _ = step(now, batch)

    def hooked() -> None:
        hooks = [train.log(folder / "history.csv"), train.checkpoint(folder, every="60s", overwrite=True)]
        train.fit(step, state, batches, epochs=1, hooks=hooks)

    return {"bare": bare, "fit": lambda: train.fit(step, state, batches, epochs=1), "hooks": hooked}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    print("| network | bare, ms a step | fit | fit, log and checkpoint | fit / bare | with hooks / bare |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for build in (linear, convolutions):
        with tempfile.TemporaryDirectory() as folder:
            runs = ways(build, arguments.steps, Path(folder))
            times: dict[str, list[float]] = {name: [] for name in runs}
            for turn in range(arguments.rounds + 1):
                for name, run in runs.items():
                    began = time.perf_counter()
                    run()
                    if turn:  # the first one compiles
                        times[name].append(1e3 * (time.perf_counter() - began) / arguments.steps)
        found = {name: statistics.median(each) for name, each in times.items()}
        shown = " | ".join(f"{x:.3f}" for x in found.values())
        print(
            f"| {build.__name__} | {shown} | {found['fit'] / found['bare']:.3f} | {found['hooks'] / found['bare']:.3f} |"
        )


if __name__ == "__main__":
    main()
