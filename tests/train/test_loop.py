"""The loop: order of events, lengths, cadences, what is recorded, and that a run that stops goes on in the same bits."""

import contextlib
import csv

import pytest
import torch
from helpers import assert_trees_close
from torch import nn

from holofunc import checkpoint, data, lift, losses, metrics, optim, random, train, tree

MODEL = lift(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))


def digits(n=40, size=8):
    images, labels = data.digits("train")
    return data.Batches((images[:n], labels[:n]), size, key=random.key(4), mean=0.3, std=0.4)


TXS = {
    "adam": lambda: optim.adam(optim.schedules.cosine(1e-2, 20)),
    "accumulation": lambda: optim.multi_steps(optim.sgd(0.1, momentum=0.9), every=3),
    "average": lambda: optim.ema_params(optim.sgd(0.1), 0.9),
    "refused": lambda: optim.apply_if_finite(optim.sgd(0.1)),
    "loss scale": lambda: optim.dynamic_loss_scale(optim.sgd(0.1), growth_interval=3),
    "plateau": lambda: optim.chain(optim.adam(1e-2), optim.reduce_on_plateau(patience=1, every=2)),
}


def setup(name="adam", precision="fp32"):
    tx = TXS[name]()
    objective = train.supervised(MODEL, losses.cross_entropy, precision=precision)
    return train.make_train_step(objective, tx), train.create_state(MODEL, tx, random.key(0))


def eval_step():
    return train.make_eval_step(MODEL, {"accuracy": metrics.accuracy()}, loss=losses.cross_entropy)


class Crash(Exception):
    """As if the process had been killed: no hook after this one sees the event."""


def crash_at(step, kind="step", phase="observe"):
    def hook(event):
        if event.kind == kind and event.step == step:
            raise Crash

    return train.Hook(lambda: None, lambda s, e: (s, hook(e)), phase, "crash")


def run(folder, step, state, *hooks, **options):
    return train.fit(
        step, state, digits(), epochs=3, compile=False, log_every=3, eval=(eval_step(), digits(16)),
        hooks=[
            train.checkpoint(folder, every=2, best="val/accuracy", mode="max"),
            train.early_stopping("val/loss", patience=9),
            train.log(folder / "history.csv", folder / "log.jsonl", every=2),
            *hooks,
        ],
        **options,
    )  # fmt: skip


def files(folder):
    return [(folder / name).read_bytes() for name in ("history.csv", "log.jsonl")]


# --- a run that stops goes on in the same bits -----------------------------------------------------------------------


@pytest.mark.parametrize("eval_every", ["1ep", 2, 3])
@pytest.mark.parametrize("name", TXS)
def test_a_run_that_stops_goes_on_in_the_same_bits(tmp_path, name, eval_every):
    """However it stops: by a hook, by a kill once or twice, in the middle of an epoch or at its end."""
    step, state = setup(name, "fp16" if name == "loss scale" else "fp32")
    whole = run(tmp_path / "whole", step, state, eval_every=eval_every)
    stops = {
        "hook": [train.every([7], lambda event: train.Stop("cut"))],
        "kill": [crash_at(7)],
        "kill before the epoch's end is saved": [crash_at(5, "epoch_end")],
        "kill in the last step of an epoch": [crash_at(5)],
        "kill at the end": [crash_at(15, "run_end")],
        "kill while evaluating": [crash_at(6, "eval")],
    }
    for why, hooks in stops.items():
        folder = tmp_path / why
        try:
            run(folder, step, state, *hooks, eval_every=eval_every)
        except Crash:
            with contextlib.suppress(Crash, checkpoint.CheckpointError):
                run(folder, step, state, crash_at(12), eval_every=eval_every, resume=folder)
        rest = run(folder, step, state, eval_every=eval_every, resume=folder)
        assert rest.reason == whole.reason == "finished"
        assert_trees_close(rest.state, whole.state)
        assert rest.history == whole.history, why
        assert files(folder) == files(tmp_path / "whole"), why
        hooks_of = [checkpoint.manifest(f)["metadata"]["hooks"] for f in (folder, tmp_path / "whole")]
        assert hooks_of[0]["early_stopping"] == hooks_of[1]["early_stopping"], why


def test_a_stop_leaves_an_open_window_open_and_does_not_evaluate():
    step, state = setup("accumulation")
    seen = []
    cut = train.fit(
        step, state, digits(), epochs=1, compile=False, eval=(eval_step(), digits(16)), log_every=2,
        hooks=[train.every([4], lambda e: train.Stop("cut")), lambda e: seen.append(e.kind)],
    )  # fmt: skip
    assert cut.state.opt_state.mini_step == 1
    assert "eval" not in seen
    assert [r["step"] for r in cut.history] == [2, 4]
    assert train.fit(step, state, digits(), steps=4, compile=False).state.opt_state.mini_step == 0


def test_data_without_a_length_are_skipped_with_a_warning(tmp_path):
    step, state = setup()
    batches = list(digits())

    class Stream:
        def __iter__(self):
            return iter(batches)

    whole = train.fit(step, state, Stream(), epochs=3, compile=False)
    hooks = [train.checkpoint(tmp_path, every=1), train.every([7], lambda e: train.Stop("cut"))]
    train.fit(step, state, Stream(), epochs=3, compile=False, hooks=hooks)
    with pytest.warns(UserWarning, match="data is not an EpochData, so the first 2 batches of epoch 1 are drawn again"):
        rest = train.fit(step, state, Stream(), epochs=3, compile=False, resume=tmp_path)
    assert_trees_close(rest.state, whole.state)


def test_resume_binds_to_the_data(tmp_path):
    step, state = setup()
    train.fit(step, state, digits(), steps=3, compile=False, hooks=[train.checkpoint(tmp_path)])
    with pytest.raises(
        ValueError, match=r"resume continues .*batches in an epoch was 5 and is 10; data: batch_size was 8"
    ):
        train.fit(step, state, digits(size=4), steps=5, compile=False, resume=tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(UserWarning, match=f"resume: threads was {threads}, and is {threads + 1}"):
            train.fit(step, state, digits(), steps=5, compile=False, resume=tmp_path)
    finally:
        torch.set_num_threads(threads)


def test_a_shorter_run_does_not_stand_behind_an_older_one(tmp_path):
    step, state = setup()
    train.fit(step, state, digits(), steps=6, compile=False, hooks=[train.checkpoint(tmp_path)])
    with pytest.raises(ValueError, match=r"dir must not hold later steps of another run.*holds step 6, and this run"):
        train.fit(step, state, digits(), steps=3, compile=False, hooks=[train.checkpoint(tmp_path)])
    train.fit(step, state, digits(), steps=3, compile=False, hooks=[train.checkpoint(tmp_path, overwrite=True)])
    assert checkpoint.steps(tmp_path) == [3]


def test_one_run_owns_its_directory(tmp_path):
    step, state = setup()

    def second(event):
        with pytest.raises(checkpoint.CheckpointError, match="is being written by process"):
            train.fit(step, state, digits(), steps=1, compile=False, hooks=[train.checkpoint(tmp_path)])

    hooks = [train.checkpoint(tmp_path, wait=False), train.every([2], second)]
    result = train.fit(step, state, digits(), steps=3, compile=False, hooks=hooks)
    assert_trees_close(checkpoint.restore(tmp_path, {"state": state})["state"], result.state)


# --- order, cadences, lengths ---------------------------------------------------------------------------------------


def test_an_event_transforms_evaluates_decides_observes_and_saves(tmp_path):
    order = []
    phases = ("save", "observe", "decide", "transform")
    hooks = [
        train.Hook(lambda: None, lambda s, e, p=p: (s, order.append((e.kind, p)) if e.kind in ("step", "eval") else None), p, p)
        for p in phases
    ]  # fmt: skip
    step, state = setup()
    train.fit(step, state, digits(), steps=1, compile=False, eval=(eval_step(), digits(16)), eval_every=1, hooks=hooks)
    assert order == [("step", "transform")] + [("eval", p) for p in ("transform", "decide", "observe", "save")] + [
        ("step", p) for p in ("decide", "observe", "save")
    ]


def test_a_step_that_is_evaluated_and_saved_can_be_best(tmp_path):
    step, state = setup()
    save = train.checkpoint(tmp_path, every=2, best="val/loss", keep=1)
    train.fit(step, state, digits(), steps=6, compile=False, eval=(eval_step(), digits(16)), eval_every=2, hooks=[save])
    best = checkpoint.manifest(tmp_path, step="best")
    values = {r["step"]: r["val/loss"] for r in best["metadata"]["history"] if "val/loss" in r}
    assert best["step"] == max(values)
    assert values[best["step"]] == min(values.values())


def test_every_evaluation_has_its_cadence_and_is_recorded():
    step, state = setup()
    found = train.fit(
        step, state, digits(), steps=8, compile=False, log_every=50, eval_batches=1,
        eval={"val": (eval_step(), digits(16)), "test": (eval_step(), digits(16), 3)},
    ).history  # fmt: skip
    assert {r["step"]: sorted(n for n in r if "/loss" in n) for r in found} == {
        3: ["test/loss"],
        5: ["val/loss"],
        6: ["test/loss"],
        8: ["test/loss", "val/loss"],
    }


@pytest.mark.parametrize("length", [{"epochs": 1}, {"steps": 4}, {"steps": 5}, {"epochs": 2}])
def test_the_last_evaluation_is_recorded_written_and_can_be_best(tmp_path, length):
    """Where the cadence does not divide the length, too: it belongs to the last step, or the end of its epoch."""
    step, state = setup()
    hooks = [train.log(tmp_path / "history.csv"), train.checkpoint(tmp_path, every=3, best="val/loss")]
    found = train.fit(
        step, state, digits(), compile=False, eval=(eval_step(), digits(16)), eval_every=3, hooks=hooks, **length
    )
    last = int(found.state.step)
    assert found.history[-1]["step"] == last
    assert found.history[-1]["epoch"] == (last - 1) // 5
    assert [r["step"] for r in found.history if "val/loss" in r] == [*range(3, last, 3), last]
    assert "val/loss" in checkpoint.manifest(tmp_path)["metadata"]["history"][-1]
    with (tmp_path / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["val/loss"]] == [*range(3, last, 3), last]


def test_a_rehearsal_leaves_no_trace():
    step, state = setup()
    calls = []

    class Counted(train.SupervisedEval):
        def check(self, batch):
            calls.append(1)

    own = eval_step()
    counted = Counted(own.model, own.own, own.loss, own.precision, own.which)
    options = {"steps": 2, "compile": False, "eval": (counted, digits(40)), "log_every": 1}
    found = train.fit(step, state, digits(), sanity_batches=2, **options)
    assert len(calls) == 2 + 5
    assert train.fit(step, state, digits(), **options).history == found.history


@pytest.mark.parametrize(
    ("length", "steps"),
    [({"epochs": "2"}, 10), ({"epochs": "2ep"}, 10), ({"steps": "3"}, 3), ({"steps": "4 steps"}, 4)],
)
def test_lengths_as_text(length, steps):
    step, state = setup()
    assert train.fit(step, state, digits(), compile=False, **length).state.step == steps


def test_a_length_in_time(tmp_path):
    step, state = setup("accumulation")
    result = train.fit(step, state, digits(), time=1e-9, compile=False, hooks=[train.checkpoint(tmp_path)])
    assert result.reason == "finished"
    assert result.state.step == 1
    assert result.state.opt_state.mini_step == 0
    assert checkpoint.restore(tmp_path, {"state": state})["state"].opt_state.mini_step == 0
    assert train.fit(step, state, digits(), time="2h", steps=2, compile=False).state.step == 2


@pytest.mark.parametrize(("given", "expected"), [("1ep", 4), ("0.5ep", 2), ("25%", 4), (7, 7), ("7", 7)])
def test_durations_in_updates(given, expected):
    assert train.updates(given, 7, epochs=4, accumulate=2) == expected


def test_records_hold_the_learning_rate_and_what_hooks_report():
    tx = optim.partition(
        {"body": optim.inject_hyperparams(optim.sgd)(learning_rate=0.5, momentum=0.9), "head": optim.sgd(optim.schedules.linear(1.0, 0.0, 4))},
        {"1.weight": "body", "1.bias": "head"},
    )  # fmt: skip
    step = train.make_train_step(train.supervised(MODEL, losses.cross_entropy), tx)
    state = train.create_state(MODEL, tx, random.key(0))
    decide = train.every(2, lambda e: train.Report({"twice": 2.0 * e.step}), phase="decide")
    found = train.fit(step, state, digits(), steps=4, log_every=2, compile=False, hooks=[decide]).history
    assert [r["body/learning_rate"] for r in found] == [0.5, 0.5]
    assert [r["head/learning_rate"] for r in found] == [0.75, 0.25]
    assert [r["twice"] for r in found] == [4.0, 8.0]
    assert found[0]["momentum"] == pytest.approx(0.9)
    _, state = setup()
    step, _ = setup()
    assert train.fit(step, state, digits(), steps=1, compile=False).history[0]["learning_rate"] == pytest.approx(1e-2)


def test_events_carry_batch_outputs_and_what_is_known_of_the_run():
    tx = TXS["accumulation"]()
    objective = train.supervised(MODEL, losses.cross_entropy)
    step, state = (
        train.make_train_step(objective, tx, outputs=True, settings={"clip": 1.0}),
        train.create_state(MODEL, tx, random.key(0)),
    )
    seen = []
    train.fit(step, state, digits(), steps=1, compile=False, hooks=[seen.append])
    info = seen[0].info
    assert (info.num_params, info.accumulates, info.settings) == (650, True, {"precision": "fp32", "clip": 1.0})
    assert (info.world_size, info.batch_size, info.batch_size_per_device) == (1, 8, 8)
    event = next(e for e in seen if e.kind == "step")
    assert event.batch[0].shape == (8, 1, 8, 8)
    assert event.outputs.shape == (8, 10)


def test_batches_are_moved_and_keep_their_position():
    step, state = setup()
    whole = train.fit(step, state, digits(), steps=7, compile=False)
    moved = train.fit(step, state, digits(), steps=7, compile=False, device="cpu")
    assert_trees_close(moved.state, whole.state)


def test_states_that_are_stacked_train_together():
    step, _ = setup()
    state = tree.stack([train.create_state(MODEL, TXS["adam"](), random.key(i)) for i in range(2)])
    many = torch.vmap(step, in_dims=(0, None))
    result = train.fit(lambda s, b: many(s, b), state, digits(), steps=3, log_every=3, compile=False)
    assert result.state.step.tolist() == [3, 3]
    record = result.history[0]
    assert record["loss"] == pytest.approx((record["loss/0"] + record["loss/1"]) / 2)


# --- early stopping, evaluation --------------------------------------------------------------------------------------


class Scripted(train.EvalStep):
    """An evaluation that says what it is told to."""

    def __init__(self, values):
        self.values, self.metrics = iter(values), {"loss": metrics.mean()}

    def __call__(self, state, batch, weights=None):
        m = self.metrics["loss"]
        return {"loss": m.update(m.init(), torch.tensor([next(self.values)]))}


@pytest.mark.parametrize(
    ("values", "options", "epochs", "reason"),
    [
        ([3, 2, 2.5, 2.4, 1], {"patience": 2}, 4, "val/loss did not improve for 2 evaluations"),
        ([3, 2, 1], {"patience": 2, "baseline": 0.5}, 2, "val/loss did not improve for 2 evaluations"),
        ([3, 4, 5, 6, 7], {"patience": 1, "start": "3ep"}, 4, "val/loss did not improve for 1 evaluations"),
        ([3, 4, 5, 6, 7], {"patience": 1, "start": 15}, 3, "val/loss did not improve for 1 evaluations"),
        ([3, float("nan"), 1], {"patience": 9}, 2, "val/loss is not finite: nan"),
        ([3, float("inf"), 1], {"patience": 9, "mode": "max"}, 2, "val/loss is not finite: inf"),
        ([3, float("nan"), 2.9, 3], {"patience": 2, "finite": False}, 4, "finished"),
        ([3, 2, 1.5], {"patience": 2, "target": 2.0}, 2, "val/loss reached 2"),
    ],
)  # fmt: skip
def test_early_stopping(values, options, epochs, reason):
    step, state = setup()
    stop = train.early_stopping("val/loss", **options)
    data_of_eval = digits(8)
    result = train.fit(step, state, digits(), epochs=len(values) if reason == "finished" else 9, compile=False,
                       eval=(Scripted(map(float, values)), data_of_eval), hooks=[stop])  # fmt: skip
    assert (result.reason, int(result.state.step)) == (reason, 5 * epochs)


@pytest.mark.parametrize(
    "options",
    [{"patience": 0}, {"patience": 1, "cooldown": 2}, {"patience": 0, "mode": "max", "min_delta": 0.3}, {"patience": 0, "min_value": 0.02}],
)  # fmt: skip
def test_a_plateau_lowers_the_rate_as_torchs_does(options):
    values = [3.0, 2.0, 2.5, 2.4, 2.2, 2.1, 1.0, 1.2, 1.4, 1.3]
    tx = optim.inject_hyperparams(optim.sgd)(learning_rate=0.5, momentum=0.9)
    step = train.make_train_step(train.supervised(MODEL, losses.cross_entropy), tx)
    state = train.create_state(MODEL, tx, random.key(0))
    hook = train.plateau("val/loss", factor=0.3, **options)
    found = train.fit(
        step, state, digits(8), epochs=10, compile=False, eval=(Scripted(values), digits(8)), hooks=[hook], log_every=1
    )
    sgd = torch.optim.SGD([torch.zeros(1)], 0.5)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        sgd, factor=0.3, threshold_mode="abs", threshold=options.get("min_delta", 0.0), patience=options["patience"],
        mode=options.get("mode", "min"), cooldown=options.get("cooldown", 0), min_lr=options.get("min_value", 0.0),
    )  # fmt: skip
    rates = []
    for value in values:
        theirs.step(value)
        rates.append(sgd.param_groups[0]["lr"])
    assert [r["learning_rate"] for r in found.history] == pytest.approx(rates)
    assert len(set(rates)) > 1


def test_a_plateau_goes_on_where_it_was(tmp_path):
    tx = optim.inject_hyperparams(optim.sgd)(learning_rate=0.5)
    step = train.make_train_step(train.supervised(MODEL, losses.cross_entropy), tx)
    state = train.create_state(MODEL, tx, random.key(0))

    def run(folder, *hooks, **options):
        save = train.checkpoint(tmp_path / folder, every=2)
        hooks = [save, train.plateau("val/accuracy", 1, mode="max"), *hooks]
        return train.fit(step, state, digits(), epochs=3, eval=(eval_step(), digits(16)), eval_every=1, compile=False,
                         hooks=hooks, **options)  # fmt: skip

    whole = run("whole")
    with pytest.raises(Crash):
        run("parts", crash_at(9))
    rest = run("parts", resume=tmp_path / "parts")
    assert_trees_close(rest.state, whole.state)
    assert rest.history == whole.history
    assert whole.history[-1]["learning_rate"] < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 1.0}, r"factor must be in \(0, 1\), got 1.0"),
        ({"patience": -1}, "patience must be an integer of at least 0, got -1"),
        ({"min_value": -1.0}, "min_value must be finite and at least 0, got -1.0"),
        ({"mode": "up"}, "mode must be 'min' or 'max', got 'up'"),
    ],
)
def test_plateau_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        train.plateau("val/loss", **options)


def test_samples_without_a_finite_loss_are_counted_and_left_out():
    _, state = setup()
    images, labels = next(iter(digits(16, 16)))
    spoiled = images.clone()
    spoiled[3] = float("nan")
    whole = train.evaluate(eval_step(), state, [(images[[0, 1, 2]], labels[:3]), (images[4:], labels[4:])])
    found = train.evaluate(eval_step(), state, [(spoiled, labels)])
    assert found["nonfinite"] == 1
    assert found["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert "nonfinite" not in whole
    with pytest.raises(ValueError, match="the loss must be finite for a sample at least, got none of 16"):
        train.evaluate(eval_step(), state, [(images * torch.nan, labels)])


def test_raw_and_averaged_weights_side_by_side():
    step, state = setup("average")
    for batch in digits():
        state, _ = step(state, batch)

    def loss(which):
        made = train.make_eval_step(MODEL, {}, loss=losses.cross_entropy, weights=which)
        return train.evaluate(made, state, digits())

    both = loss("both")
    assert both == {"loss": loss("eval")["loss"], "raw/loss": loss("raw")["loss"]}
    assert both["loss"] != both["raw/loss"]


# --- loss scale, learning rate search --------------------------------------------------------------------------------


def test_the_loss_scale_grows_and_shrinks_as_grad_scalers():
    tx = optim.dynamic_loss_scale(optim.sgd(0.1), init_scale=1024.0, growth_interval=2)
    params = {"w": torch.ones(2)}
    state, scales = tx.init(params), []
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    weight = torch.ones(2, requires_grad=True)
    sgd = torch.optim.SGD([weight], 0.1)
    for bad in (0, 0, 1, 0, 1, 1, 0, 0, 0, 0):
        grads = torch.full((2,), float("inf") if bad else 1.0)
        updates, state = tx.update({"w": grads}, state, params)
        params = optim.apply_updates(params, updates)
        scaler.scale(weight.sum())
        weight.grad = grads * scaler.get_scale()
        scaler.step(sgd)
        scaler.update()
        sgd.zero_grad()
        scales.append((float(state.scale), scaler.get_scale()))
        assert bool(optim.skipped(state)) is bool(bad)
    assert all(mine == theirs for mine, theirs in scales)
    torch.testing.assert_close(params["w"], weight.detach())


def test_the_step_scales_the_loss_and_hands_on_true_gradients():
    tx = optim.dynamic_loss_scale(optim.chain(optim.clip_by_global_norm(0.1), optim.sgd(0.1)))
    plain = optim.chain(optim.clip_by_global_norm(0.1), optim.sgd(0.1))
    objective = train.supervised(MODEL, losses.cross_entropy)
    batch = next(iter(digits()))
    found = []
    for each in (tx, plain):
        state = train.create_state(MODEL, each, random.key(0))
        state, measured = train.make_train_step(objective, each)(state, batch)
        found.append((state.params, measured))
    for name in found[0][0]:
        torch.testing.assert_close(found[0][0][name], found[1][0][name])
    assert float(found[0][1]["loss"]) == float(found[1][1]["loss"])


def test_fp16_finds_its_scale():
    tx = optim.dynamic_loss_scale(optim.sgd(0.1), init_scale=2.0**30, growth_interval=4)
    objective = train.supervised(MODEL, losses.cross_entropy, precision="fp16")
    step, state = train.make_train_step(objective, tx), train.create_state(MODEL, tx, random.key(0))
    result = train.fit(step, state, digits(), epochs=6, compile=False, log_every=5)
    assert result.state.opt_state.inner.total > 0
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert 2.0**8 < result.state.opt_state.scale < 2.0**30


def injected(builder=optim.sgd):
    return optim.inject_hyperparams(builder)(learning_rate=0.1)


def test_the_search_finds_a_rate_that_trains_and_leaves_the_state_alone():
    tx, objective = injected(), train.supervised(MODEL, losses.cross_entropy)
    state = train.create_state(MODEL, tx, random.key(0))
    before = tree.map(torch.clone, state)
    found = train.find_lr(objective, tx, state, digits(200), start=1e-4, end=1e3, steps=40)
    assert_trees_close(state, before)
    assert len(found.lrs) == len(found.losses) == len(found.smoothed) <= 40
    assert found.lrs[1] / found.lrs[0] == pytest.approx(found.lrs[2] / found.lrs[1])
    assert 1e-3 < found.suggestion < 30
    assert 1e-3 < found.valley < 30
    assert train.find_lr(objective, tx, state, digits(200), start=1e-4, end=1e3, steps=40) == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 1.0, "end": 0.1}, "start and end must be 0 < start < end, got 1.0 and 0.1"),
        ({"steps": 2}, "steps must be an integer of at least 3, got 2"),
        ({"beta": 1.0}, r"beta must be in \[0, 1\) and diverges more than 1"),
        ({"data": []}, "data must hold at least one batch, got none"),
        ({"tx": optim.sgd(0.1)}, "tx must have its learning rate injected"),
        ({"data": [(torch.full((8, 64), torch.nan), torch.arange(8))]}, "the first loss must be finite, got nan"),
    ],
)
def test_what_the_search_refuses(options, message):
    tx = options.get("tx", injected())
    state = train.create_state(MODEL, tx, random.key(0))
    given = {"data": digits(), **options, "tx": tx}
    with pytest.raises(ValueError, match=message):
        train.find_lr(train.supervised(MODEL, losses.cross_entropy), state=state, **given)


# --- sinks ------------------------------------------------------------------------------------------------------------


def test_a_sink_that_fails_does_not_end_the_run():
    step, state = setup()

    def broken(step, record):
        raise OSError("disk full")

    seen = []
    with pytest.warns(RuntimeWarning, match="is left out, it failed: OSError"):
        result = train.fit(step, state, digits(), steps=4, compile=False,
                           hooks=[train.log(broken, lambda n, m: seen.append(n), every=1)])  # fmt: skip
    assert result.reason == "finished"
    assert seen == [1, 2, 3, 4]


def test_a_summary_writer_is_a_sink():
    class Writer:
        def __init__(self):
            self.rows, self.closed = [], False

        def add_scalar(self, tag, value, step):
            self.rows.append((tag, step))

        def close(self):
            self.closed = True

    step, state = setup()
    writer = Writer()
    train.fit(step, state, digits(), steps=2, compile=False, hooks=[train.log(writer, every=2)])
    assert ("loss", 2) in writer.rows
    assert writer.closed


@pytest.mark.parametrize(
    ("state", "options", "error", "message"),
    [
        (None, {"epochs": 1}, TypeError, "state must be a TrainState, or have a tensor step, got NoneType"),
        ({"w": torch.ones(2)}, {"epochs": 1}, TypeError, "state must be a TrainState"),
        ("", {"epochs": True}, ValueError, "epochs must be a positive integer, got True"),
        ("", {"epochs": "soon"}, ValueError, "epochs must be a positive integer, got 'soon'"),
        ("", {"time": "soon"}, ValueError, "time must be a positive number of seconds or a text like '90s'"),
        ("", {"steps": 1, "eval_batches": 0}, ValueError, "eval_batches must be a positive integer, got 0"),
        ("", {"steps": 1, "eval": (1,)}, TypeError, r"eval must hold \(eval_step, batches\) or"),
    ],
)
def test_bad_arguments_are_named(state, options, error, message):
    step, good = setup()
    with pytest.raises(error, match=message):
        train.fit(step, good if state == "" else state, digits(), compile=False, **options)
