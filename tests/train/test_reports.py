"""What users of other trainers report, asked of this one: losses of torch, odd batches, endless data, two directories."""

import functools
import io
import itertools
import json
import math
import os
import random as python_random
import threading
from contextlib import chdir, redirect_stderr

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from holofunc import checkpoint, data, lift, losses, metrics, optim, random, train, transforms, tree

MODEL, TX = lift(nn.Linear, 3, 2), optim.sgd(0.1)
X, Y = random.normal(random.key(5), (10, 3)), torch.arange(10) % 2
BATCHES = [(X[:5], Y[:5]), (X[5:], Y[5:])]
FLAT = lift(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 2)))
DROPPING = lift(lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(3, 2)))
IMAGES = X.view(10, 3, 1, 1)


def state(model=MODEL, tx=TX):
    return train.create_state(model, tx, random.key(0))


def step(model=MODEL, tx=TX, loss=losses.cross_entropy, **options):
    return train.make_train_step(train.supervised(model, loss, **options), tx)


def fit(batches=BATCHES, model=MODEL, tx=TX, loss=losses.cross_entropy, **options):
    options = {"epochs": 1, "compile": False, **options}
    return train.fit(step(model, tx, loss), state(model, tx), batches, **options)


def measure(model=MODEL, loss=losses.cross_entropy, **measured):
    return train.make_eval_step(model, measured or {"accuracy": metrics.accuracy()}, loss=loss)


def shuffled(size=5, **options):
    return data.Batches((IMAGES, Y), size, key=random.key(1), **options)


def assert_same(a, b, **tolerance):
    for (path, x), y in zip(tree.leaves_with_path(a), tree.leaves(b), strict=True):
        torch.testing.assert_close(x, y, msg=path, **(tolerance or {"rtol": 0, "atol": 0}))


def stop_at(number):
    return train.every([number], lambda event: train.Stop("cut"))


# --- losses of torch -------------------------------------------------------------------------------------------------

WEIGHT = torch.tensor([1.0, 10.0, 1.0, 1.0])
SOME, ALL = torch.tensor([0, -100, -100, 2, 1, 2, 3, 0]), torch.tensor([0, 0, 0, 2, 1, 1, 3, 1])
OF_TORCH = {
    "ignored": (nn.CrossEntropyLoss(), SOME),
    "another ignored": (nn.CrossEntropyLoss(ignore_index=1), ALL),
    "weighted": (nn.CrossEntropyLoss(weight=WEIGHT), ALL),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1, weight=WEIGHT), ALL),
    "nll": (nn.NLLLoss(weight=WEIGHT), ALL),
    "soft": (nn.CrossEntropyLoss(weight=WEIGHT), torch.softmax(X[:8] @ torch.ones(3, 4), 1)),
    "binary": (nn.BCEWithLogitsLoss(), (X[:8] @ torch.ones(3, 4)).sigmoid()),
    "partial": (functools.partial(F.cross_entropy, weight=WEIGHT, ignore_index=3), ALL),
}


@pytest.mark.parametrize("name", OF_TORCH)
def test_losses_of_torch_accumulate_to_the_large_batch_and_are_evaluated_as_one(name):
    loss, targets = OF_TORCH[name]
    model = lift(lambda: nn.Sequential(nn.Linear(3, 4), *[nn.LogSoftmax(1)] * (name == "nll")))
    parts = [(X[:3], targets[:3]), (X[3:8], targets[3:])]
    whole = fit([(X[:8], targets)], model, optim.sgd(1.0), loss)
    assert_same(
        fit(parts, model, optim.multi_steps(optim.sgd(1.0), every=2), loss).state.params, whole.state.params,
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    begin = state(model)
    found = train.evaluate(measure(model, loss), begin, parts)
    outputs, _ = model.apply(begin.params, begin.buffers, X[:8])
    assert found["loss"] == pytest.approx(float(loss(outputs, targets)), rel=1e-6)
    assert "nonfinite" not in found


def test_a_batch_that_torchs_loss_ignores_leaves_the_parameters_finite():
    result = fit([(X[:5], torch.full((5,), -100)), BATCHES[1]], loss=nn.CrossEntropyLoss())
    assert all(p.isfinite().all() for p in result.state.params.values())


# --- batches that do not fit -----------------------------------------------------------------------------------------

NORMED = lift(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
CONV = lift(lambda: nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit([(X[:3], torch.tensor([0, 1, 7]))], loss=nn.CrossEntropyLoss()), r"targets must be in \[0, 2\) .*got 7"),
        (lambda: fit([(X[:3], torch.tensor([0, 1, 7]))], loss=F.cross_entropy), r"targets must be in \[0, 2\) .*got 7"),
        (lambda: fit([(X[:5], Y[:5, None])]), "targets"),
        (lambda: fit([(X[:5], F.one_hot(Y[:5], 2))]), "targets"),
        (lambda: fit([(X[:5], Y[:5].float())]), "targets"),
        (lambda: fit([(X[:5].double(), Y[:5])]), "Linear has parameters of another dtype than what it is given"),
        (lambda: fit([((9 * X[:5]).byte(), Y[:5])]), "make the images float32, as data.Batches does"),
        (lambda: fit([(IMAGES.double(), Y)], CONV), "0, has parameters of another dtype"),
        (lambda: fit([(X[:1], Y[:1])], NORMED), "in 1, normalizes over a batch, and one image has no variance"),
        (lambda: fit(loss=lambda o, t: F.cross_entropy(o, t)[None]), "loss must be a 0-d floating tensor"),
        (lambda: fit(loss=nn.CrossEntropyLoss(reduction="none")), "loss must be a 0-d floating tensor"),
        (lambda: fit(data.map(lambda batch: None, BATCHES)), "batch must be a pair"),
        (lambda: fit(lambda: iter(BATCHES)), "data must be an iterable of batches, got function"),
        (lambda: train.create_state(nn.Linear(3, 2), TX, random.key(0)), "model must be a holofunc.Model"),
        (lambda: step(tx=torch.optim.SGD([nn.Parameter(X)], 0.1)), "tx must be"),
        (lambda: data.Batches([(X, None)] * 4, 2), "labels must be numbers or tensors, or collate must .* got None"),
        (lambda: data.Batches([(IMAGES[0], "cat")] * 4, 2), "labels must be numbers or tensors.* got 'cat'"),
        (lambda: data.Batches([(IMAGES[0], {})] * 4, 2, collate=data.collate_boxes), r"collate must return a pair .* got partial"),
        (lambda: data.Batches([{"image": X}] * 4, 2), r"must be a pair \(image, label\), got dict"),
        (lambda: data.Batches([(X, 1, 0)] * 4, 2), r"must be a pair \(image, label\)"),
        (lambda: transforms.random_erasing(scale=(0.5, 2.0)), "scale"),
        (lambda: train.evaluate(measure(DICTS), state(DICTS), BATCHES), "outputs must be a tensor, got dict"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


class Dicts(nn.Module):
    """As torchvision's networks for segmentation answer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return {"out": self.layer(x), "aux": self.layer(x)}


DICTS = lift(Dicts)


def test_outputs_may_be_dicts_where_the_loss_takes_them():
    def loss(outputs, targets):
        return F.cross_entropy(outputs["out"], targets) + 0.4 * F.cross_entropy(outputs["aux"], targets)

    result = fit(model=DICTS, loss=loss, eval=(train.make_eval_step(DICTS, {}, loss=loss), BATCHES))
    assert math.isfinite(result.history[-1]["val/loss"])


@pytest.mark.parametrize("metric", ["accuracy", "auroc", "confusion", "kappa", "mse", "precision", "psnr"])
def test_metrics_name_outputs_that_are_no_tensor(metric):
    made = metrics.get(metric, **({"num_classes": 2} if metric in ("confusion", "kappa") else {}))
    with pytest.raises(TypeError, match="outputs must be a tensor, got dict"):
        made.update(made.init(), {"out": X}, X)


def test_numbers_may_be_predicted():
    """Ages, angles, key points: in memory and of a dataset."""
    model = lift(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 1), nn.Flatten(0)))
    batches = data.Batches((IMAGES, X.sum(1)), 5, key=random.key(0))
    evaluated = measure(model, losses.huber, r2=metrics.r2()), batches
    result = fit(batches, model, loss=losses.huber, epochs=2, eval=evaluated)
    assert math.isfinite(result.history[-1]["val/r2"])
    for target in (0.5, np.float64(0.5), torch.rand(4, 2)):
        _, targets = next(iter(data.Batches([(IMAGES[0], target)] * 4, 2)))
        assert targets.dtype == torch.float32
        assert targets.shape == (2, *torch.as_tensor(target).shape)


# --- windows and averages --------------------------------------------------------------------------------------------


def test_a_window_longer_than_an_epoch_is_an_update_per_epoch():
    rate = optim.schedules.linear(1.0, 0.0, 10)
    result = fit(tx=optim.multi_steps(optim.sgd(rate), every=8), epochs=3)
    whole = fit([(X, Y)], tx=optim.sgd(rate), epochs=3)
    assert_same(result.state.params, whole.state.params, rtol=1e-5, atol=1e-6)


def test_averages_count_updates_not_batches():
    result = fit(tx=optim.multi_steps(optim.ema_params(optim.sgd(0.5), 0.5), every=2))
    whole = fit([(X, Y)], tx=optim.ema_params(optim.sgd(0.5), 0.5))
    averaged = [optim.eval_params(r.state.opt_state, r.state.params) for r in (result, whole)]
    assert_same(*averaged, rtol=1e-5, atol=1e-6)


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_run_saved_at_the_end_of_an_epoch_begins_the_next(tmp_path):
    begun = []
    fit(shuffled(), FLAT, epochs=3, hooks=[train.checkpoint(tmp_path), stop_at(2)])
    fit(shuffled(), FLAT, epochs=3, resume=tmp_path, hooks=[lambda e: begun.append((e.kind, e.epoch))])
    assert [epoch for kind, epoch in begun if kind == "epoch_start"] == [1, 2]


def test_a_finished_run_may_be_made_longer(tmp_path):
    fit(shuffled(), FLAT, epochs=2, hooks=[train.checkpoint(tmp_path)])
    longer = fit(shuffled(), FLAT, epochs=4, resume=tmp_path, hooks=[train.checkpoint(tmp_path)])
    assert_same(longer.state, fit(shuffled(), FLAT, epochs=4).state)


@pytest.mark.parametrize("options", [{"patience": 2, "min_delta": 9.0}, {"patience": 9, "target": 9.0}])
def test_a_run_that_stopped_early_stays_so(tmp_path, options):
    """A machine that starts the same command again and again adds nothing to a run that is over."""

    def go(**more):
        hooks = [train.early_stopping("val/loss", **options), train.checkpoint(tmp_path), train.log(tmp_path / "h.csv")]
        return fit(epochs=9, eval=(measure(), BATCHES), hooks=hooks, **more)

    first, written = go(), (tmp_path / "h.csv").read_bytes()
    again = go(resume=tmp_path)
    assert again.reason == first.reason != "finished"
    assert_same(again.state, first.state)
    assert (tmp_path / "h.csv").read_bytes() == written
    if "min_delta" in options:
        options["patience"] = 4
        assert int(go(resume=tmp_path).state.step) == int(first.state.step) + 4


def test_two_directories_have_their_own_cadences(tmp_path):
    """Every step in one, of which the run is not resumed, and every fourth in the other."""
    seldom, often = tmp_path / "seldom", tmp_path / "often"

    class Died(Exception):
        pass

    def die(event):
        if (event.kind, event.step) == ("step", 7):
            raise Died

    def go(*also, **more):
        hooks = [train.checkpoint(seldom, every=4), train.checkpoint(often, every=1, best="val/loss"), *also]
        return fit(epochs=6, eval=(measure(), BATCHES), eval_every=1, hooks=hooks, **more)

    with pytest.raises(Died):
        go(train.every(1, die, phase="save"))
    assert checkpoint.steps(often)[-1] == 7
    with pytest.raises(ValueError, match="dir must not hold later steps of another run"):
        go()
    assert_same(go(resume=seldom).state, fit(epochs=6).state)
    assert checkpoint.steps(often)[-1] == 12


def test_a_run_stays_where_it_began(tmp_path):
    with chdir(tmp_path):
        leave = train.every([1], lambda event: os.chdir("/"))
        fit(epochs=2, hooks=[leave, train.checkpoint("run", every=1), train.log("history.csv", every=1)])
    assert checkpoint.steps(tmp_path / "run")[-1] == 4
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 5


class Endless:
    def __iter__(self):
        return itertools.cycle(BATCHES)


def test_data_without_an_end(tmp_path):
    assert fit(Endless(), epochs=None, time=0.05, eval=(measure(), BATCHES)).reason == "finished"
    whole = fit(Endless(), epochs=None, steps=5)
    fit(Endless(), epochs=None, steps=5, hooks=[train.checkpoint(tmp_path, every=1), stop_at(3)])
    with pytest.warns(UserWarning, match="drawn again"):
        rest = fit(Endless(), epochs=None, steps=5, resume=tmp_path)
    assert_same(rest.state, whole.state)


def test_a_loader_that_shuffles_is_new_in_each_epoch():
    rows = torch.utils.data.TensorDataset(torch.arange(64.0)[:, None], torch.zeros(64, dtype=torch.long))
    loader = torch.utils.data.DataLoader(rows, 16, shuffle=True, generator=torch.Generator().manual_seed(0))
    seen = []
    fit(loader, lift(nn.Linear, 1, 2), epochs=2, hooks=[train.every(1, lambda e: seen.append(e.batch[0].tolist()))])
    assert seen[:4] != seen[4:]
    for epoch in (seen[:4], seen[4:]):
        assert sorted(row[0] for batch in epoch for row in batch) == list(range(64))


# --- best, and records -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("values", "best"), [((0.5, 0.5, 0.4, 0.4), 3), ((math.nan, 0.5, 0.6, 0.7), 2)])
def test_the_first_of_the_best_is_the_best(tmp_path, values, best):
    told = train.every(1, lambda e: train.Report({"m": values[e.step - 1]}), phase="transform")
    fit(epochs=2, hooks=[told, train.checkpoint(tmp_path, every=1, best="m", keep=1)])
    assert checkpoint.manifest(tmp_path, step="best")["step"] == best


def test_histories_and_logs_are_plain_data(tmp_path):
    odd = {'a,"b"\n': 1.0, "inf": math.inf, "nan": math.nan}
    told = train.every(1, lambda e: train.Report(odd), phase="transform")
    sinks = train.log(tmp_path / "h.csv", tmp_path / "h.jsonl", every=1)
    measured = {"confusion": metrics.confusion(2), "accuracy": metrics.accuracy()}
    result = fit(log_every=1, hooks=[told, sinks], eval=(measure(**measured), BATCHES))
    json.dumps(result.history)
    lines = (tmp_path / "h.jsonl").read_text().splitlines()
    assert json.loads(lines[-1], parse_constant=pytest.fail)["inf"] is None
    assert '"a,""b""\n"' in (tmp_path / "h.csv").read_text()


def test_a_sink_is_told_the_rate_at_its_own_cadence_too(tmp_path):
    tx = optim.sgd(optim.schedules.linear(1.0, 0.0, 4))
    fit(tx=tx, epochs=2, log_every=50, hooks=[train.log(tmp_path / "h.jsonl", every=1)])
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "h.jsonl").read_text().splitlines()]
    assert rates == [1.0, 0.75, 0.5, 0.25]


def test_a_sink_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "h.csv").mkdir()
    with pytest.warns(RuntimeWarning, match=r"Csv is left out, it failed: IsADirectoryError: .*h\.csv"):
        assert fit(hooks=[train.log(tmp_path / "h.csv")]).reason == "finished"


def test_hooks_may_be_used_again():
    watch = train.early_stopping("val/loss", 1, min_delta=9.0)
    runs = [fit(epochs=4, eval=(measure(), BATCHES), hooks=[watch]) for _ in range(2)]
    assert runs[0].reason == runs[1].reason
    assert_same(runs[0].state, runs[1].state)


def test_one_part_of_a_partition_is_lowered():
    rates = {"a": 0.1, "b": 0.01}
    parts = {name: optim.inject_hyperparams(optim.sgd)(learning_rate=rate) for name, rate in rates.items()}
    tx = optim.partition(parts, lambda params: {n: "a" if n == "weight" else "b" for n in params})
    watch = train.plateau("val/loss", 0, factor=0.5, min_delta=9.0, name="a/learning_rate")
    last = fit(tx=tx, epochs=3, eval=(measure(), BATCHES), hooks=[watch]).history[-1]
    assert [last[f"{name}/learning_rate"] for name in rates] == pytest.approx([0.025, 0.01])


def test_a_bar_without_a_terminal_and_a_trace_after_the_end(tmp_path):
    with redirect_stderr(io.StringIO()) as shown:
        fit(hooks=[train.log("bar"), train.profile(tmp_path / "t.json", start=50)], eval=(measure(), BATCHES))
    assert "val 2/2" in shown.getvalue()
    assert not (tmp_path / "t.json").exists()


# --- around ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_gradients_are_taken_whatever_is_around(around):
    whole = fit().state
    with around():
        inside = tree.map(torch.clone, fit().state)
    assert_same(tree.map(torch.clone, inside), whole)


def test_a_thread_trains_as_well():
    found = []
    thread = threading.Thread(target=lambda: found.append(fit()))
    thread.start()
    thread.join()
    assert_same(found[0].state, fit().state)


def test_with_double_precision_as_the_default():
    torch.set_default_dtype(torch.float64)
    try:
        batches = [(x.double(), y) for x, y in BATCHES]
        result = fit(batches, eval=(measure(), batches))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in result.state.params.values()} == {torch.float64}


def test_generators_stand_where_they_stood():
    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), python_random.getstate()  # noqa: NPY002

    class Noise(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            return torch.rand(3, 1, 1) + np.random.rand() + python_random.random(), i % 2  # noqa: NPY002

    before = states()
    fit(data.Batches(Noise(), 4, key=random.key(0)), DROPPING, epochs=2)
    assert states() == before


# --- data ------------------------------------------------------------------------------------------------------------


def test_a_dataset_that_is_shorter_than_it_says_names_the_sample():
    class Shrunk(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            if i >= 6:
                raise IndexError("gone")
            return IMAGES[i], 0

    with pytest.raises(IndexError, match="gone") as caught:
        list(data.Batches(Shrunk(), 4))
    assert caught.value.__notes__ == ["while loading sample 6"]


def test_a_batch_is_nobodys_view():
    images = torch.zeros(4, 1, 2, 2)
    batch, _ = next(iter(data.Batches((images, torch.arange(4)), 4, shuffle=False)))
    batch += 1
    assert not images.any()


def test_threads_and_iterators_end_with_their_loops():
    before = threading.active_count()
    for _ in data.prefetch(iter(range(100))):
        break
    batches = shuffled(2)
    first, second = batches.epoch(0), batches.epoch(1)
    taken = [next(each)[1].tolist() for each in (first, second, first)]
    assert taken[:2] == [next(batches.epoch(epoch))[1].tolist() for epoch in (0, 1)]
    assert threading.active_count() == before


def test_a_search_takes_what_training_takes():
    params, _ = NORMED.init(random.key(0))
    mask = optim.up_to(params, "1")
    adamw = optim.inject_hyperparams(optim.adamw)(learning_rate=0.1, weight_decay=0.1)
    tx = optim.freeze(mask, optim.chain(optim.clip_by_global_norm(1.0), adamw))
    objective = train.supervised(NORMED, losses.cross_entropy, frozen=mask, precision="bf16")
    assert len(train.find_lr(objective, tx, state(NORMED, tx), BATCHES, steps=12).lrs) > 2
