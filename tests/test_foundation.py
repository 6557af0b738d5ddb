"""What the rooms stand on: private names of torch, where states lie, the law of devices, and who reads the device."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import holofunc
from holofunc import data, jit, lift, losses, metrics, ops, optim, random, train, tree
from holofunc.compile import torch_internals

SOURCES = sorted(Path(holofunc.__file__).parent.rglob("*.py"))


def test_private_names_of_torch_are_in_one_file():
    private = re.compile(r"\btorch\._[a-zA-Z]|\bfrom torch\.?[\w.]*\._|\bfrom torch\._")
    found = {str(path) for path in SOURCES if private.search(path.read_text())}
    assert {Path(path).name for path in found} <= {"torch_internals.py"}


def small_step():
    """Labels on a CPU are looked at before each step; elsewhere that would cost a wait, and is not done."""
    model = lift(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)))
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-2))
    step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx, check=lambda batch: None)
    images, labels = data.digits("train")
    return step, train.create_state(model, tx, random.key(0)), (images[:16].float(), labels[:16])


NAMES = ["get_interpreter_stack", "compile_fx", "compile_fx_inner", "AsyncCompile", "config", "TracingContext"]


@pytest.mark.parametrize("name", NAMES)
def test_without_private_names(name, monkeypatch):
    """A torch that has moved a name: slower, never wrong."""
    find = torch_internals._find
    monkeypatch.setattr(
        torch_internals, "_find", lambda module, wanted: None if wanted == name else find(module, wanted)
    )
    step, state, batch = small_step()
    expected = step(state, batch)
    found = jit(step, donate=True)(tree.map(torch.clone, state), batch)
    for a, b in zip(tree.leaves(found), tree.leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def places(tx):
    """Where the parameters of a donated state lie, in elements from the first one."""
    params = {"w": torch.ones(64, 64, 3, 3), "b": torch.ones(64), "head": torch.ones(10, 64)}

    def update(state, grads):
        updates, inner = tx.update(grads, state[1], state[0])
        return optim.apply_updates(state[0], updates), inner

    new, _ = jit(update, donate=True)((params, tx.init(params)), tree.map(torch.clone, params))
    return [(x.data_ptr() - new["w"].data_ptr()) // 4 for x in new.values()]


def test_how_a_state_lies_follows_from_the_state_alone():
    before = places(optim.sgd(0.1, momentum=0.9))
    places(optim.adamp(1e-3))
    parted = places(optim.freeze({"w": True, "b": False, "head": False}, optim.sgd(0.1, momentum=0.9)))
    assert places(optim.sgd(0.1, momentum=0.9)) == before == [0, 36864, 36864 + 256]
    assert parted[1] != before[1]  # what is trained has a vector of its own
    assert parted[2] - parted[1] == 256


# --- the law of devices: nothing is made on the CPU, and no value is read ------------------------------------------

META = torch.device("meta")


def test_a_whole_step_and_its_evaluation_on_meta():
    step, state, batch = small_step()
    model = lift(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10)))
    state, batch = (tree.map(lambda x: x.to(META), each) for each in (state, batch))
    new, measured = step.update(state, step.gradient(state, batch), batch)
    assert {x.device for x in tree.leaves((new, measured))} == {META}
    eval_step = train.make_eval_step(model, {"accuracy": metrics.accuracy()}, loss=losses.cross_entropy)
    assert {x.device for x in tree.leaves(eval_step(state, batch))} == {META}


LOSSES = {
    name: (getattr(losses, name), labels)
    for names, labels in [
        (["cross_entropy", "focal", "poly", "complement_cross_entropy"], torch.zeros(4, dtype=torch.int64)),
        (["multilabel_cross_entropy", "binary_cross_entropy", "dice"], torch.zeros(4, 3)),
    ]
    for name in names
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_on_meta(name):
    loss, labels = LOSSES[name]
    value = loss(torch.ones(4, 3, device=META), labels.to(META))
    assert (value.device, value.shape) == (META, ())


@pytest.mark.parametrize("name", ["box_iou", "box_giou", "box_diou", "box_ciou"])
def test_boxes_on_meta(name):
    boxes = torch.ones(5, 4, device=META)
    assert getattr(ops.boxes, name)(boxes, boxes).device == META


SCHEDULES = {
    "linear": (0.0, 1.0, 10),
    "cosine": (1.0, 10),
    "exponential": (1.0, 0.5),
    "warmup_cosine": (1.0, 10, 2),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_on_meta(name):
    schedule = getattr(optim.schedules, name)(*SCHEDULES[name])
    assert schedule(torch.zeros((), dtype=torch.int64, device=META)).device == META


# --- one read per log interval -------------------------------------------------------------------------------------


READING = {"item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy", "__index__"}


class Reads(torch.overrides.TorchFunctionMode):
    """Counts what would make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in READING
        return func(*args, **(kwargs or {}))


def test_fit_reads_once_per_log_interval():
    step, state, batch = small_step()
    counts = {}
    for steps in (40, 80):
        with Reads() as reads:
            train.fit(step, state, [batch] * steps, steps=steps, log_every=10, compile=False)
        counts[steps] = reads.count
    per_interval = (counts[80] - counts[40]) / 4
    assert per_interval <= 3  # the numbers of a record in one transfer, hyperparameters, whether a guard gave up
