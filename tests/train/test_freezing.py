"""Frozen parts, statistics for averaged weights, sinks of other tools, data made of data, folders with broken images."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from holofunc import data, lift, losses, optim, random, train

X, Y = random.normal(random.key(1), (8, 3)), torch.arange(8) % 2


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


MODEL = lift(Net)


def test_frozen_modules_keep_their_statistics_and_drop_nothing():
    params, buffers = MODEL.init(random.key(0))
    mask = optim.up_to(params, "body")
    tx = optim.freeze(mask, optim.sgd(0.1))
    objective = train.supervised(MODEL, losses.cross_entropy, frozen=mask)
    state = train.create_state(MODEL, tx, random.key(0), params=params, buffers=buffers)
    new, _ = train.make_train_step(objective, tx)(state, (X, Y))
    for name in buffers:
        same = torch.equal(new.buffers[name], buffers[name])
        assert same is name.startswith("body"), name
    for name in params:
        assert torch.equal(new.params[name], params[name]) is name.startswith("body"), name
    one, two = (objective(params, buffers, (X, Y), random.key(i))[0] for i in (1, 2))
    assert torch.equal(one, two)
    trained = train.supervised(MODEL, losses.cross_entropy)
    one, two = (trained(params, buffers, (X, Y), random.key(i))[0] for i in (1, 2))
    assert not torch.equal(one, two)


def test_statistics_stand_still_while_scale_and_shift_learn():
    """A mask for the objective alone, as Towhee's freeze_bn."""
    tx = optim.sgd(0.1)
    mask = {name: name.startswith(("body.1", "norm")) for name in MODEL.init(random.key(0))[0]}
    step = train.make_train_step(train.supervised(MODEL, losses.cross_entropy, frozen=mask), tx)
    state = train.create_state(MODEL, tx, random.key(0))
    after, _ = step(state, (X, Y))
    assert all(torch.equal(after.buffers[name], b) for name, b in state.buffers.items())
    assert not torch.equal(after.params["norm.weight"], state.params["norm.weight"])


@pytest.mark.parametrize(
    ("mask", "frozen"),
    [
        (lambda p: optim.up_to(p, "body"), {"body"}),
        (lambda p: optim.up_to(p, "body.0"), {"body.0"}),
        (lambda p: optim.frozen_layers(p, 0), {"body"}),
        (lambda p: optim.frozen_layers(p, -1), {"head"}),
        (lambda p: optim.frozen_layers(p, slice(0, 2)), {"body", "norm"}),
        (lambda p: optim.frozen_layers(p, [0, 2]), {"body", "head"}),
        (lambda p: optim.frozen_layers(p, 1, depth=2), {"body.1"}),
    ],
)
def test_masks(mask, frozen):
    params = MODEL.init(random.key(0))[0]
    found = mask(params)
    assert {n for n, f in found.items() if f} == {n for n in params if any(n.startswith(f"{p}.") for p in frozen)}
    optim.freeze(found, optim.sgd(0.1)).init(params)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: optim.up_to(p, "neck"), r"last must be a layer, such as \['body', 'norm', 'head'\], got 'neck'"),
        (lambda p: optim.frozen_layers(p, 3), r"which must be among the 3 layers \['body', 'norm', 'head'\], got 3"),
        (lambda p: optim.layers(p, 0), "depth must be at least 1, got 0"),
        (lambda p: MODEL.with_frozen(["neck"]), r"modules must be among .* got \['neck'\]"),
    ],
)
def test_layers_that_are_not_there_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(MODEL.init(random.key(0))[0])


def test_what_learns_is_shown():
    params = {"stem.a.weight": torch.ones(3, 4), "stem.b.bias": torch.ones(3), "head.weight": torch.ones(2, 3)}
    table = train.trainable(params, lambda p: {name: "stem" in name for name in p}, depth=2)
    assert [tuple(row) for row in table.rows] == [("stem.a", 12, 0), ("stem.b", 3, 0), ("head", 6, 6)]
    assert table.learning == 6
    assert str(table).splitlines()[-1].split() == ["all", "21", "6"]
    with pytest.raises(ValueError, match=r"frozen must have the structure of the parameters: missing .*'stem.b.bias'"):
        train.trainable(params, {"stem.a.weight": True, "head.weight": False})


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_of_averaged_weights_are_those_of_the_data(momentum):
    model = lift(lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, momentum=momentum)))
    params, buffers = model.init(random.key(0))
    found = train.update_bn(model, params, buffers, [(X[:4], None), (X[4:], None)])
    hidden = X @ params["0.weight"].T + params["0.bias"]
    torch.testing.assert_close(found["1.running_mean"], hidden.mean(0))
    halves = torch.stack([hidden[:4].var(0), hidden[4:].var(0)]).mean(0)
    torch.testing.assert_close(found["1.running_var"], halves)
    assert buffers["1.running_mean"].abs().sum() == 0
    with pytest.raises(ValueError, match="data must hold at least one batch"):
        train.update_bn(model, params, buffers, [])


# --- other tools -----------------------------------------------------------------------------------------------------


def test_a_trace_of_some_steps(tmp_path):
    tx = optim.sgd(0.1)
    step = train.make_train_step(train.supervised(MODEL, losses.cross_entropy), tx)
    state = train.create_state(MODEL, tx, random.key(0))
    hook = train.profile(tmp_path / "traces/first.json", start=2, steps=2)
    train.fit(step, state, [(X, Y)] * 6, epochs=1, compile=False, hooks=[hook])
    assert json.loads((tmp_path / "traces/first.json").read_text())["traceEvents"]


def test_adapters_of_trackers():
    seen = []
    train.wandb(lambda metrics, step: seen.append((metrics, step)))(2, {"loss": 1.0})
    train.mlflow(lambda metrics, step: seen.append((metrics, step)))(3, {"loss": 1.0, "name": "x"})
    assert seen == [({"loss": 1.0}, 2), ({"loss": 1.0}, 3)]


def test_tensorboard_forgets_what_a_run_that_goes_on_wrote_after_its_checkpoint(tmp_path, monkeypatch):
    opened = []

    class SummaryWriter:
        def __init__(self, dir, purge_step):
            opened.append((dir, purge_step, []))

        def add_scalar(self, tag, value, step):
            opened[-1][2].append((tag, step))

        def close(self):
            opened[-1][2].append("closed")

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.chdir(tmp_path)
    tx = optim.sgd(0.1)
    step = train.make_train_step(train.supervised(MODEL, losses.cross_entropy), tx)
    state = train.create_state(MODEL, tx, random.key(0))

    def go(steps, *hooks, resume=None):
        hooks = [train.checkpoint("run", every=2), train.log(train.tensorboard("run/tb"), every=1), *hooks]
        return train.fit(step, state, [(X, Y)] * 9, steps=steps, compile=False, hooks=hooks, resume=resume)

    with pytest.raises(ZeroDivisionError):
        go(5, train.every([3], lambda event: 1 / 0))
    go(5, resume="run")
    assert [(each[0], each[1]) for each in opened] == [(str(tmp_path / "run/tb"), 1), (str(tmp_path / "run/tb"), 3)]
    assert [step for tag, step in opened[0][2][:-1] if tag == "loss"] == [1, 2, 3]
    assert [step for tag, step in opened[1][2][:-1] if tag == "loss"] == [3, 4, 5]
    assert opened[0][2][-1] == opened[1][2][-1] == "closed"
    train.tensorboard("elsewhere")
    assert len(opened) == 2  # nothing is written where nothing runs


# --- data ------------------------------------------------------------------------------------------------------------


def test_data_made_of_data_keep_length_and_position():
    images, labels = data.digits("train")
    batches = data.Batches((images[:40], labels[:40]), 8, key=random.key(0))
    doubled = data.map(lambda batch: (2 * batch[0], batch[1]), batches)
    moved = data.on_device(doubled, "cpu")
    for made in (doubled, moved):
        assert isinstance(made, train.EpochData)
        assert len(made) == 5
        for (x, _), (y, _) in zip(batches.epoch(3, 2), made.epoch(3, 2), strict=True):
            assert torch.equal(2 * x, y)
        assert made.fingerprint() == batches.fingerprint()
    assert not isinstance(data.map(lambda b: b, iter([1])), train.EpochData)
    assert len(data.map(lambda b: b + 1, [1, 2])) == 2
    assert list(data.map(lambda b: b + 1, iter([1, 2]))) == [2, 3]
    nested = next(iter(data.on_device([({"images": [X, X]}, [{"boxes": Y}], "name")], "cpu")))
    assert torch.equal(nested[0]["images"][1], X)
    assert nested[2] == "name"


def photos(folder):
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for i in range(10):
            pixels = np.full((12, 12, 3), 20 * i, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "cats" / "._1.png").write_bytes(b"resource fork")
    (folder / "dogs" / "notes.txt").write_text("no image")


def test_what_is_hidden_is_no_class_and_no_image(tmp_path):
    photos(tmp_path)
    source = data.open_dataset(f"folder:{tmp_path}", image_size=8)
    assert source.classes == ("cats", "dogs")
    assert len(source.batches(1)) == 16
    assert data.check_folder(tmp_path) == data.check(source) == []


def test_every_broken_image_is_listed_at_once(tmp_path):
    photos(tmp_path)
    for name in ("cats/2.png", "dogs/3.png"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    found = data.check_folder(tmp_path)
    assert [each.path for each in found] == [str(tmp_path / "cats/2.png"), str(tmp_path / "dogs/3.png")]
    assert "cannot read image" in str(found[0])
    with pytest.warns(UserWarning, match="left out 2 images that cannot be read"):
        source = data.open_dataset(f"folder:{tmp_path}", image_size=8, bad_images="skip")
    assert sum(len(labels) for _, labels in source.batches(4)) == len(source.batches(1))
    with pytest.raises(ValueError, match="bad_images must be 'stop' or 'skip', got 'hide'"):
        data.open_dataset(f"folder:{tmp_path}", bad_images="hide")
