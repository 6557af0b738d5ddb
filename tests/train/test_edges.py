"""Edges of the loop: data that lie about themselves, hooks that fail, monitors of nothing, batches of any form."""

import math
import os

import pytest
import torch
from torch import nn

from holofunc import checkpoint, lift, losses, metrics, optim, random, train
from holofunc import data as data_of

MODEL, TX = lift(nn.Linear, 3, 2), optim.sgd(0.1)
X, Y = random.normal(random.key(5), (10, 3)), torch.arange(10) % 2
BATCHES = [(X[:5], Y[:5]), (X[5:], Y[5:])]
STATE = train.create_state(MODEL, TX, random.key(0))


def eval_step(**options):
    return train.make_eval_step(MODEL, {"accuracy": metrics.accuracy()}, **{"loss": losses.cross_entropy, **options})


def step(**options):
    return train.make_train_step(train.supervised(MODEL, losses.cross_entropy), TX, **options)


def fit(data=BATCHES, of=None, **options):
    return train.fit(of or step(), STATE, data, compile=False, **{"epochs": 1, **options})


EVALUATED = {"eval": (eval_step(), BATCHES)}

# --- data ------------------------------------------------------------------------------------------------------------


class Lies:
    """Batches that are not as many as they say."""

    def __init__(self, says, gives):
        self.says, self.gives = says, gives

    def __len__(self):
        return self.says

    def __iter__(self):
        return iter(BATCHES * self.gives)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Lies(9, 2), r"data must hold as many batches as len\(data\), 9, got 4 in epoch 0"),
        (Lies(1, 2), r"data must hold as many batches as len\(data\), 1, got 2 or more in epoch 0"),
        ([], "data must hold at least one batch, got none in epoch 0"),
        (iter(BATCHES), "data must hold at least one batch, got none in epoch 1: an iterator is used up by one epoch"),
    ],
    ids=["shorter", "longer", "empty", "used up"],
)
def test_lengths_that_are_not_kept_are_named(data, message):
    with pytest.raises(ValueError, match=message):
        fit(data, epochs=2)


@pytest.mark.parametrize("through", [lambda data: data, lambda data: data_of.map(lambda batch: batch, data)])
def test_a_loader_that_does_not_know_its_length(through):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(X, Y, strict=True))

    loader = through(torch.utils.data.DataLoader(Stream(), batch_size=4))
    result = fit(loader, epochs=2, eval=(eval_step(), loader), device="cpu")
    assert [record["step"] for record in result.history] == [3, 6]
    known = fit([(X[:4], Y[:4]), (X[4:8], Y[4:8]), (X[8:], Y[8:])], epochs=2)
    assert torch.equal(result.state.params["weight"], known.state.params["weight"])


class ByEpoch:
    def __len__(self):
        return 2

    def epoch(self, epoch, start=0):
        return iter(BATCHES[start:])


class ByIndex:
    def __len__(self):
        return 2

    def __getitem__(self, index):
        return BATCHES[index]


@pytest.mark.parametrize("kind", [ByEpoch, ByIndex, lambda: iter(BATCHES), lambda: tuple(BATCHES)])
def test_data_need_no_iterator_of_their_own(kind):
    assert int(fit(kind()).state.step) == 2
    assert train.evaluate(eval_step(), STATE, kind()) == train.evaluate(eval_step(), STATE, BATCHES)


IMAGES = [torch.zeros(3, 4 + i, 5) for i in range(5)]
BOXES = [{"boxes": torch.zeros(i + 1, 4), "labels": torch.zeros(i + 1)} for i in range(5)]
OF_BOXES = torch.zeros(4, 2, 4), torch.zeros(4, 2), torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("batch", "number"),
    [
        ((IMAGES, BOXES), 5),
        ((tuple(IMAGES), tuple(BOXES)), 5),
        ([tuple(IMAGES), tuple(BOXES)], 5),
        ((tuple(IMAGES), torch.zeros(5)), 5),
        ((torch.zeros(4, 3, 2, 2), OF_BOXES), 4),
        (((torch.zeros(4, 3, 2, 2), torch.zeros(4, 3, 2, 2)), torch.zeros(4)), 4),
        (((torch.zeros(4, 3, 2, 2), torch.zeros(4, 3, 2, 2)), None), 4),
        ([torch.zeros(4, 3), [torch.zeros(4), torch.zeros(4)]], 4),  # as torch's loader has two targets
        ([[torch.zeros(4), torch.zeros(4)], torch.zeros(4, 3)], 4),
        ((["a", "b", "c"], torch.zeros(3)), 3),
    ],
)
def test_samples_are_counted_in_tuples_too(batch, number):
    assert train.num_samples(batch) == number


class Brightness(train.EvalStep):
    """Of images of different sizes."""

    metrics = {"mean": metrics.mean(), "each": metrics.collect()}  # noqa: RUF012

    def __call__(self, state, batch, weights=None):
        assert all(len(image) == 3 for image in batch["images"])
        values = torch.stack([image.mean() for image in batch["images"]]) + batch["labels"]
        return {name: m.update(m.init(), values, weights=weights) for name, m in self.metrics.items()}


class Errors(train.EvalStep):
    """Of two targets in a list, as torch's loader makes them of a tuple."""

    metrics = {"a": metrics.collect(), "b": metrics.collect()}  # noqa: RUF012

    def __call__(self, state, batch, weights=None):
        return {
            n: m.update(m.init(), x, weights=weights) for (n, m), x in zip(self.metrics.items(), batch[1], strict=True)
        }


def test_an_odd_last_batch_of_two_samples_with_two_targets():
    data = [[X[a:b], [X[a:b, 0], X[a:b, 1]]] for a, b in ((0, 4), (4, 8), (8, 10))]
    found = train.evaluate(Errors(), STATE, data)
    assert torch.equal(found["a"], X[:, 0])
    assert torch.equal(found["b"], X[:, 1])


@pytest.mark.parametrize("kind", [list, tuple])
def test_an_odd_last_batch_of_images_of_different_sizes(kind):
    """Of three images, which have three channels."""
    images = [torch.full((3, 4 + i, 5), float(i)) for i in range(8)]
    data = [{"images": kind(images[a:b]), "labels": torch.zeros(b - a)} for a, b in ((0, 5), (5, 8))]
    found = train.evaluate(Brightness(), STATE, data)
    assert found["mean"] == 3.5
    assert found["each"].tolist() == list(range(8))


# --- steps and their metrics -----------------------------------------------------------------------------------------


def test_metrics_may_be_python_numbers():
    def own(state, batch):
        return state._replace(step=state.step + 1), {"a": 2.0, "n": 3}

    assert fit(of=own).history[-1].items() >= {"a": 2.0, "n": 3.0}.items()
    assert fit(of=step(measure=lambda *trees: {"k": 2.0})).history[-1]["k"] == 2.0


def test_outputs_may_be_a_tree():
    def objective(params, buffers, batch, key):
        out, buffers = MODEL.apply(params, buffers, batch[0])
        return losses.cross_entropy(out, batch[1]), train.Aux(buffers, {}, {"logits": out, "both": (out, out)})

    seen = []
    of = train.make_train_step(objective, TX, outputs=True)
    fit(of=of, hooks=[lambda event: seen.append(event.outputs) if event.kind == "step" else None])
    assert seen[0]["both"][1].shape == (5, 2)


@pytest.mark.parametrize("of", [lambda s, b: s, lambda s, b: (s, torch.ones(())), lambda s, b: None])
def test_a_step_that_returns_something_else_is_named(of):
    with pytest.raises(TypeError, match=r"step must return \(state, metrics\), metrics in a dict by name, got "):
        fit(of=of)


def returning(second, loss=lambda out: out.sum()):
    def objective(params, buffers, batch, key):
        out, buffers = MODEL.apply(params, buffers, batch[0])
        return loss(out), second(buffers, out)

    return objective


AUX = lambda b, o: train.Aux(b, {}, ())  # noqa: E731


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda *given: None, r"objective must return \(loss, Aux\(buffers, metrics, outputs\)\), got NoneType"),
        (lambda *given: (1, 2, 3), "objective must return .* got tuple of 3"),
        (returning(lambda b, o: b), "objective must return .* got dict second"),
        (returning(AUX, lambda out: out.sum(1)), r"the loss 0-d and floating, got torch.float32 \(5,\)"),
        (returning(AUX, lambda out: 1.0), "the loss 0-d and floating, got float"),
        (returning(lambda b, o: train.Aux(b, [1], ())), "metrics must be a dict of 0-d tensors by name, got list"),
        (returning(lambda b, o: train.Aux(b, {"v": "x"}, ())), "metrics must be 0-d tensors, got 'x' for 'v'"),
        (returning(lambda b, o: train.Aux(b, {}, (), o)), r"Aux.weight must be a number or a 0-d tensor, got shape \(5, 2\)"),
        (returning(lambda b, o: train.Aux(b, {}, (), "x")), "Aux.weight must be a number or a 0-d tensor, got 'x'"),
        *(
            (train.supervised(MODEL, loss), f"loss must be a 0-d floating tensor, or a dict of them, got {got}")
            for loss, got in (
                (lambda o, t: None, "NoneType"),
                (lambda o, t: o.sum(1), r"torch.float32 \(5,\)"),
                (lambda o, t: {}, "an empty dict"),
                (lambda o, t: {"a": o.sum(), "b": 1.0}, "float for 'b'"),
            )
        ),
    ],
)  # fmt: skip
def test_what_an_objective_must_not_return_is_named(objective, message):
    with pytest.raises(TypeError, match=message):
        fit(of=train.make_train_step(objective, TX))


class Unmeasured(train.EvalStep):
    def __call__(self, state, batch, weights=None):
        return {}


class Forgetful(Unmeasured):
    metrics = {"a": metrics.mean()}  # noqa: RUF012


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Unmeasured, "eval_step must have metrics by name, as EvalStep.metrics says"),
        (Forgetful, r"eval_step must return the state of each of its metrics, \['a'\], got \[\]"),
    ],
)
def test_what_an_evaluation_lacks_is_named(kind, message):
    with pytest.raises(TypeError, match=message):
        fit(eval=(kind(), BATCHES))


@pytest.mark.parametrize("name", ["loss", "nonfinite", "grad_norm"])
def test_names_that_are_taken(name):
    own = {name: metrics.accuracy()}
    message = f"metrics must have names other than .*got .{name!r}."
    if name != "grad_norm":
        with pytest.raises(ValueError, match=message):
            train.make_eval_step(MODEL, own, loss=losses.cross_entropy)
    if name != "nonfinite":
        with pytest.raises(ValueError, match=message):
            fit(of=train.make_train_step(train.supervised(MODEL, losses.cross_entropy, metrics=own), TX))


# --- hooks -----------------------------------------------------------------------------------------------------------


class Boom(Exception):
    pass


def boom(kind, phase="observe"):
    def update(state, event):
        if kind in (event.kind, "always"):
            raise Boom(event.kind)
        return state, None

    return train.Hook(lambda: None, update, phase, "boom")


KINDS = ["always", "run_start", "epoch_start", "step", "eval_start", "eval", "epoch_end", "run_end"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_that_fails_keeps_neither_the_directory_nor_the_sinks(tmp_path, kind):
    closed = []

    class Sink:
        def write(self, step, metrics):
            pass

        def close(self):
            closed.append(kind)

    with pytest.raises(Boom) as caught:
        fit(hooks=[boom(kind, "transform"), train.log(Sink()), train.checkpoint(tmp_path)], **EVALUATED)
    checkpoint.Writer(tmp_path).close()
    assert closed
    notes = getattr(caught.value, "__notes__", [])
    assert notes == (["the hook boom failed at this, too: Boom('exception')"] if kind == "always" else [])


def test_a_state_that_cannot_be_saved_is_named(tmp_path):
    mine = train.Hook(lambda: torch.ones(1), lambda state, event: (state, None), "observe", "mine")
    with pytest.raises(TypeError, match=r"must be plain data, as JSON has it, to be saved: that of mine is tensor"):
        fit(hooks=[mine, train.checkpoint(tmp_path)])


def test_what_is_reported_may_be_a_tensor():
    def report(event):
        return train.Report({"t": torch.tensor(2.0)}) if event.kind == "step" else None

    assert fit(hooks=[report], log_every=1).history[-1]["t"] == 2.0


def test_the_progress_of_an_evaluation_shows_its_batches():
    seen = []
    hook = train.Hook(
        lambda: None, lambda s, e: (s, None), name="eye", follow=lambda e: seen.append((e.evaluating, e.batch))
    )
    fit(hooks=[hook], **EVALUATED)
    assert [where for where, _ in seen] == [("val", 1, 2), ("val", 2, 2)]
    assert seen[1][1][0] is BATCHES[1][0]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_run_that_begins_begins_its_files(tmp_path, suffix, shared):
    path = tmp_path / f"history{suffix}"
    hook = train.log(path, every=1)
    fit(hooks=[hook])
    once = path.read_text()
    fit(hooks=[hook if shared else train.log(path, every=1)])
    assert path.read_text() == once


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_kill_while_a_file_is_written_loses_no_record(tmp_path, suffix, monkeypatch):
    """In the middle of a line, and of the whole file, which is written anew where there is more to say of a step."""
    path, whole = tmp_path / f"history{suffix}", tmp_path / f"whole{suffix}"

    def go(steps, path, resume=None):
        hooks = [train.checkpoint(tmp_path / f"run {path.stem}"), train.log(path, every=1)]
        return fit(hooks=hooks, epochs=None, steps=steps, resume=resume)

    def killed(*paths):
        raise OSError("killed")

    go(1, whole)
    go(2, whole, tmp_path / "run whole")
    go(1, path)
    with path.open("a") as file:
        file.write("1" if suffix == ".csv" else '{"step": 1')
    monkeypatch.setattr(os, "replace", killed)
    with pytest.warns(RuntimeWarning, match="is left out, it failed: OSError: killed"):
        go(1, path, tmp_path / "run history")
    monkeypatch.undo()
    go(2, path, tmp_path / "run history")
    assert path.read_bytes() == whole.read_bytes()


# --- monitors --------------------------------------------------------------------------------------------------------

WATCHERS = {
    "early_stopping": lambda name, folder: train.early_stopping(name, 1),
    "plateau": lambda name, folder: train.plateau(name),
    "checkpoint": lambda name, folder: train.checkpoint(folder, best=name),
}


@pytest.mark.parametrize("name", ["val/acc", "accuracy", "validation/loss", "val", "val/loss/x"])
@pytest.mark.parametrize("watcher", WATCHERS)
def test_a_metric_that_nobody_measures_is_named(tmp_path, watcher, name):
    with pytest.raises(ValueError, match=rf"(monitor|best) must be one of .*'val/accuracy'.*, got {name!r}"):
        fit(hooks=[WATCHERS[watcher](name, tmp_path)], **EVALUATED)


@pytest.mark.parametrize("watcher", WATCHERS)
def test_so_is_one_where_nothing_is_evaluated_and_one_that_is_no_number(tmp_path, watcher):
    with pytest.raises(ValueError, match="val/loss"):
        fit(hooks=[WATCHERS[watcher]("val/loss", tmp_path / "a")])
    matrix = train.make_eval_step(MODEL, {"confusion": metrics.confusion(2)})
    with pytest.raises(ValueError, match=r"or a number among their parts, got 'val/confusion'"):
        fit(hooks=[WATCHERS[watcher]("val/confusion", tmp_path / "b")], eval=(matrix, BATCHES))


@pytest.mark.parametrize("watcher", WATCHERS)
def test_a_set_with_a_cadence_of_its_own_is_waited_for(tmp_path, watcher):
    sets = {"val": (eval_step(), BATCHES), "test": (eval_step(), BATCHES, "2ep")}
    tx = optim.inject_hyperparams(optim.sgd)(learning_rate=0.1)
    of = train.make_train_step(train.supervised(MODEL, losses.cross_entropy), tx)
    hooks = [WATCHERS[watcher]("test/loss", tmp_path)]
    result = train.fit(
        of, train.create_state(MODEL, tx, random.key(0)), BATCHES, epochs=4, eval=sets, hooks=hooks, compile=False
    )
    assert result.reason == "finished"


@pytest.mark.parametrize("keep", [0, -1, 1.5, True])
def test_how_many_steps_are_kept_is_checked_at_once(keep):
    with pytest.raises(ValueError, match="keep must be an integer of at least 1, got"):
        train.checkpoint("nowhere", keep=keep)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: train.updates("-1ep", 10), "length must be a number of updates, '1ep' or '10%', got '-1ep'"),
        (lambda: train.updates("nan%", 10, epochs=2), "length must be .*got 'nan%'"),
        (lambda: train.updates("1ep", 10, accumulate=0), "accumulate must be an integer of at least 1, got 0"),
        (lambda: train.updates("1ep", 0), "data must be an integer of at least 1, got 0"),
        (lambda: train.unfreeze({"w": "soon"}, 10), "length must be .*got 'soon'"),
        (lambda: train.unfreeze({"x": 1}, 10).init({"w": X}), "rule 'x' matches none of the parameters"),
        (lambda: train.smoothed([1.0], 1.0), r"beta must be in \[0, 1\), got 1.0"),
        (lambda: train.evaluate(eval_step(), STATE, BATCHES, max_batches=-1), "max_batches must be at least 1 or None"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


CE, ACCURACY = losses.cross_entropy, metrics.accuracy


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit(None), "data must be an iterable of batches, got NoneType"),
        (lambda: fit(hooks=print), r"hooks must be a list of hooks, got builtin_function_or_method: write hooks=\[...\]"),
        (lambda: fit(hooks=train.log("print")), "hooks must be a list of hooks, got Hook"),
        (lambda: fit(eval=eval_step()), r"eval must be a pair \(eval_step, batches\), or a dict of pairs, got SupervisedEval"),
        (lambda: fit(eval=(BATCHES, eval_step())), r"eval_step must be an EvalStep \(.*got list"),
        (lambda: fit(eval=(eval_step(), 3)), "eval.'val'.'s second must be an iterable of batches, got int"),
        (lambda: train.evaluate(eval_step(), STATE, None), "data must be an iterable of batches, got NoneType"),
        (lambda: fit([(X, Y.tolist())]), "targets must be a tensor, got list"),
        (lambda: fit([(X, None)]), "targets must be a tensor, got NoneType"),
        (lambda: train.every(1, 3), r"fn must be callable, fn\(event\), got 3"),
        (lambda: train.create_state(MODEL, TX, 0), "key must be one of holofunc.random.key, got 0"),
        (lambda: train.create_state(MODEL, torch.optim.SGD, random.key(0)), "tx must be a GradientTransformation.*got <class"),
        (lambda: train.create_state(nn.Linear(3, 2), TX, random.key(0)), "model must be a holofunc.Model, got Linear"),
        (lambda: train.make_train_step(train.supervised(MODEL, CE), torch.optim.SGD), "tx must be a GradientTransformation"),
        (lambda: train.supervised(nn.Linear(3, 2), CE), "model must be a holofunc.Model, got Linear: lift its constructor"),
        (lambda: train.supervised(MODEL, nn.CrossEntropyLoss), r"loss must be callable.*: call CrossEntropyLoss\(\) first"),
        (lambda: train.supervised(MODEL, CE, metrics={"a": ACCURACY}), r"metrics\['a'\] must be .*: call accuracy\(...\) first"),
        (lambda: train.make_eval_step(nn.Linear(3, 2), {}), "model must be a holofunc.Model, got Linear"),
        (lambda: train.make_eval_step(MODEL, [ACCURACY()]), "metrics must be a dict of metrics by name, got list"),
        (lambda: train.make_eval_step(MODEL, {"a": ACCURACY}), r"metrics\['a'\] must be a holofunc.metrics.Metric"),
    ],
)  # fmt: skip
def test_what_is_of_another_kind_is_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (train.early_stopping, {"patience": 1.5}, "patience must be an integer of at least 1, got 1.5"),
        (
            train.early_stopping,
            {"patience": 1, "min_delta": math.nan},
            "min_delta must be finite and at least 0, got nan",
        ),
        (train.early_stopping, {"patience": 1, "baseline": math.nan}, "baseline must be a number or None, got nan"),
        (train.plateau, {"patience": 1.5}, "patience must be an integer of at least 0, got 1.5"),
        (train.plateau, {"min_delta": -1.0}, "min_delta must be finite and at least 0, got -1.0"),
    ],
)
def test_monitors_check_their_options(make, options, message):
    with pytest.raises(ValueError, match=message):
        make("val/loss", **options)


@pytest.mark.parametrize(("finite", "reason"), [(True, "val/v is not finite: nan"), (False, "finished")])
def test_a_monitor_that_becomes_nan(finite, reason):
    seen = []

    class Spoiled(train.EvalStep):
        metrics = {"v": metrics.mean()}  # noqa: RUF012

        def __call__(self, state, batch, weights=None):
            seen.append(batch)
            values = torch.full((len(batch[0]),), math.nan if len(seen) > 4 else 1.0)
            return {"v": self.metrics["v"].update(self.metrics["v"].init(), values, weights=weights)}

    hooks = [train.early_stopping("val/v", 9, finite=finite)]
    assert fit(epochs=5, hooks=hooks, eval=(Spoiled(), BATCHES)).reason == reason
