"""The quality table of optimizers: steps and seconds to a target, ``python docs/quality.py [FOLDER]``.

Every optimizer goes down three ill-conditioned problems and trains a small network on the digits, at the rate that its
family begins with and at the best of six. It writes ``quality.png`` and ``quality.md``; takes some minutes on a core.
"""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from holofunc import data, optim, random

FOLDER = Path(__file__).parent / "img"
STEPS, RATES = 200, torch.logspace(-3, 0, 5)
KEY = random.key(0)

BUILDERS: dict[str, Callable[[Any], optim.GradientTransformation]] = {
    **{
        name: getattr(optim, name)
        for name in (
            "adam",
            "adamw",
            "nadam",
            "radam",
            "adamax",
            "adabelief",
            "adan",
            "adamp",
            "adopt",
            "ademamix",
            "laprop",
            "lion",
            "signum",
            "stable_adamw",
            "cautious_adamw",
            "came",
            "lamb",
            "mars",
            "muon",
            "normuon",
            "soap",
            "shampoo",
            "schedule_free_adamw",
            "schedule_free_sgd",
            "rmsprop",
            "adagrad",
            "sm3",
            "madgrad",
            "sgd",
        )
    },
    "sgd, momentum": lambda rate: optim.sgd(rate, momentum=0.9),
    "lars": lambda rate: optim.lars(rate, trust_coefficient=0.1),
    "adafactor": lambda rate: optim.adafactor(rate, relative_step=False),
    "scion": lambda rate: optim.scion(rate, radius=1.0),
    "kron": lambda rate: optim.kron(rate, key=KEY),
    "galore": lambda rate: optim.galore(rate, rank=2),
    "sophia": lambda rate: optim.sophia(rate, key=KEY),
    "prodigy": optim.prodigy,
    "dadapt_adamw": optim.dadapt_adamw,
    "lookahead(adam)": lambda rate: optim.lookahead(optim.adam(rate)),
}
FIRST = {
    "prodigy": 1.0,
    "dadapt_adamw": 1.0,
    "muon": 2e-2,
    "normuon": 2e-2,
    "scion": 2e-2,
    "lion": 3e-4,
    "signum": 3e-4,
} | dict.fromkeys(("sgd", "sgd, momentum", "lars", "adagrad", "sm3", "schedule_free_sgd", "madgrad"), 1e-1)
"""The rate to begin with; of all others 1e-3."""


# --- the problems --------------------------------------------------------------------------------------------------


def turned(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(random.normal(random.key(seed), (n, n), dtype=torch.float64)).Q.float()


LEFT, RIGHT, GOAL = turned(8, 0), turned(6, 1), random.normal(random.key(2), (8, 6))
SCALES = torch.logspace(0, -3, 8)[:, None] * torch.logspace(0, -1, 6)
INPUTS = random.normal(random.key(3), (64, 8))
TARGETS = (INPUTS @ GOAL[:, :4]).argmax(1)
INPUTS = INPUTS * torch.logspace(0.5, -1.5, 8)  # of scales that differ by a factor of 100


def quadratic(params: Mapping[str, Tensor]) -> Tensor:
    """A matrix, stretched by up to 1e4 along turned rows and columns."""
    return (SCALES * (LEFT @ (params["w"] - GOAL) @ RIGHT).square()).sum()


def valley(params: Mapping[str, Tensor]) -> Tensor:
    """Rosenbrock's valley in 48 dimensions, bent from each number to the next."""
    x = params["w"].flatten()
    return ((1 - x[:-1]).square() + 10 * (x[1:] - x[:-1].square()).square()).mean()


def regression(params: Mapping[str, Tensor]) -> Tensor:
    """Logistic regression on inputs whose scales differ by a factor of 100."""
    return torch.nn.functional.cross_entropy(INPUTS @ params["w"][:, :4], TARGETS) + 1e-3 * params["w"].square().sum()


PROBLEMS: dict[str, tuple[Callable[[Mapping[str, Tensor]], Tensor], float]] = {
    "quadratic": (quadratic, 0.02),
    "valley": (valley, 0.1),
    "regression": (regression, 0.46),  # of the minimum 0.45
}


def digits(params: Mapping[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
    hidden = torch.relu(images.flatten(1) @ params["a.weight"].mT + params["a.bias"])
    return torch.nn.functional.cross_entropy(hidden @ params["b.weight"].mT + params["b.bias"], labels)


# --- the runs ------------------------------------------------------------------------------------------------------


def course(make: Callable[[Any], Any], rate: Any, start: Mapping[str, Tensor], loss: Callable[..., Tensor]) -> Tensor:
    """The loss before each of the steps; ``loss(params, t)``."""
    tx, params, losses = make(rate), dict(start), []
    state = tx.init(params)
    for t in range(STEPS):
        grads, value = torch.func.grad_and_value(loss)(params, t)
        losses.append(value.detach())
        grad_fn = torch.func.grad(lambda p, t=t: loss(p, t))
        updates, state = tx.update(grads, state, params, loss=value, grad_fn=grad_fn)
        params = optim.apply_updates(params, updates)
    return torch.stack(losses)


def steps_to(losses: Tensor, share: float) -> Tensor:
    """The first step at which the loss stays below a share of the first one; STEPS where it never does."""
    smooth = losses.nan_to_num(nan=torch.inf)
    reached = smooth <= share * losses[..., :1]
    return torch.where(reached.any(-1), reached.int().argmax(-1), STEPS)


def measured(name: str) -> dict[str, tuple[int, int, float]]:
    """For each problem, the steps at the first rate and at the best one, and the seconds of the latter."""
    make, first, found = BUILDERS[name], FIRST.get(name, 1e-3), {}
    rates = torch.cat([torch.tensor([first]), RATES])
    images, labels = data.digits("train")
    images = (images.float() - images.float().mean()) / images.float().std()
    network = {
        "a.weight": random.normal(random.key(7), (32, images[0].numel())) / 8,
        "a.bias": torch.zeros(32),
        "b.weight": random.normal(random.key(8), (10, 32)) / 6,
        "b.bias": torch.zeros(10),
    }

    def batch(t: int) -> tuple[Tensor, Tensor]:
        i = slice(128 * (t % 11), 128 * (t % 11 + 1))
        return images[i], labels[i]

    flat = {"w": torch.zeros(8, 6)}
    tasks = {n: (flat, lambda p, t, fn=fn: fn(p), share) for n, (fn, share) in PROBLEMS.items()}
    tasks["digits"] = (network, lambda p, t: digits(p, *batch(t)), 0.15)
    for task, (start, loss, share) in tasks.items():
        losses = torch.vmap(lambda rate, s=start, f=loss: course(make, rate, s, f))(rates)
        steps = steps_to(losses, share)
        began = time.perf_counter()
        tx = make(first)
        state = tx.init(start)
        for t in range(5):
            grads = torch.func.grad(loss)(start, t)
            _, state = tx.update(
                grads, state, start, loss=torch.ones(()), grad_fn=torch.func.grad(lambda p, f=loss: f(p, 0))
            )
        each = (time.perf_counter() - began) / 5
        found[task] = int(steps[0]), int(steps.min()), each * int(steps.min())
    return found


def main(folder: Path) -> None:
    draw({name: measured(name) for name in BUILDERS}, folder)


def draw(table: Mapping[str, dict[str, tuple[int, int, float]]], folder: Path) -> None:
    tasks = list(next(iter(table.values())))
    order = sorted(table, key=lambda name: sum(table[name][task][1] for task in tasks))
    lines = ["| optimizer | " + " | ".join(tasks) + " |", "| --- |" + " --- |" * len(tasks)]
    shown = [
        [
            f"{first if first < STEPS else '-'} / {best if best < STEPS else '-'}, {seconds:.2f} s"
            for first, best, seconds in (table[name][task] for task in tasks)
        ]
        for name in order
    ]
    lines += [f"| `{name}` | " + " | ".join(cells) + " |" for name, cells in zip(order, shown, strict=True)]
    (folder / "quality.md").write_text("\n".join(lines) + "\n")
    figure = Figure(figsize=(9, 0.24 * len(order) + 1), dpi=130, layout="constrained", facecolor="white")
    for axes, task in zip(figure.subplots(1, len(tasks), sharey=True), tasks, strict=True):
        rows = np.arange(len(order))[::-1]
        first, best = ([table[name][task][i] for name in order] for i in (0, 1))
        axes.hlines(rows, best, first, color="#bbbbbb", linewidth=1)
        axes.plot(first, rows, "o", color="#bbbbbb", markersize=4, label="first rate")
        axes.plot(best, rows, "o", color="#1f6feb", markersize=5, label="best rate")
        axes.set(title=f"{task}: steps", yticks=rows, yticklabels=order, xlim=(0, 1.05 * STEPS))
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, loc="lower left")
    figure.savefig(folder / "quality.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
