"""Every optimizer against recorded trajectories in float64: the authors' rule, and Holocron 0.3.0's."""

import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from holofunc import jit, optim

DATA = json.loads((Path(__file__).parents[1] / "data" / "optim_trajectories.json").read_text())
PROBLEM = types.ModuleType("problem")
exec(DATA["problem_code"], PROBLEM.__dict__)
NAMES = ["weight", "bias", "conv"]


def build(case, kind):
    options = dict(case["options"][kind])
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    if "bias_correction" in options:  # as the file calls it
        options["bias_corrected"] = options.pop("bias_correction")
    name, room = case["optimizer"].lower(), optim.holocron if kind == "holocron" else optim
    if "inner" in options:
        inner = dict(options.pop("inner"))
        return getattr(room, name)(getattr(optim, inner.pop("name"))(**inner), **options)
    return getattr(room, name)(**options)


def run(tx, kind, steps, compiled=False):
    """The parameters after each of ``steps`` updates."""
    params = {n: torch.tensor(p) for n, p in zip(NAMES, PROBLEM.init(kind), strict=True)}

    def update(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return optim.apply_updates(params, updates), state

    update = jit(update) if compiled else update
    state, trajectory = tx.init(params), []
    for t in range(1, steps + 1):
        grads = PROBLEM.grad([p.numpy() for p in params.values()], t, kind)
        params, state = update((params, state), {n: torch.tensor(g) for n, g in zip(NAMES, grads, strict=True)})
        trajectory.append(params)
    return trajectory


def worst(trajectory, expected):
    return max(
        np.abs(trajectory[int(step) - 1][name].numpy().ravel() - np.array(values)).max()
        for step, tensors in expected.items()
        for name, values in zip(NAMES, tensors, strict=True)
    )


CASES = [
    pytest.param(case, kind, id=f"{case['optimizer']}-{case['setting']}-{kind}")
    for case in DATA["cases"]
    for kind in case["trajectories"]
    if not (case["optimizer"] == "Scout" and case["setting"] == "sgd_k1")  # the defect that scout refuses
]


@pytest.mark.parametrize(("case", "kind"), CASES)
def test_trajectory(case, kind):
    trajectory = run(build(case, kind), case["problem"], 20)
    assert worst(trajectory, case["trajectories"][kind]) < 1e-12


@pytest.mark.parametrize(
    ("case", "kind"), [p for p in CASES if p.id.startswith(("LAMB-wd", "TAdam-ams", "AdamP-chan"))]
)
def test_compiled_trajectory(case, kind):
    trajectory = run(build(case, kind), case["problem"], 20, compiled=True)
    assert worst(trajectory, case["trajectories"][kind]) < 1e-12


def test_scout_refuses_the_period_that_never_trains():
    (case,) = [c for c in DATA["cases"] if c["optimizer"] == "Scout" and c["setting"] == "sgd_k1"]
    with pytest.raises(ValueError, match="sync_period must be an int of at least 3, got 1"):
        build(case, "holocron")
