"""The step and the loop: laws of purity and compilation, exact accumulation and resume, hooks, bad input."""

import csv
import os
import signal

import pytest
import torch
from helpers import assert_trees_close
from torch import nn
from torch._dynamo.utils import counters

from holofunc import data, jit, lift, losses, metrics, models, optim, random, train, tree


def net():
    return lift(
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Flatten(),
            nn.Linear(72, 10),
        )
    )


OPTIMIZERS = {
    "adamw": lambda: optim.adamw(optim.schedules.warmup_cosine(1e-2, steps=60, warmup_steps=3)),
    "sgd": lambda: optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(0.1, momentum=0.9)),
    "lookahead": lambda: optim.lookahead(optim.adam(1e-2), sync_period=3),
    "guarded": lambda: optim.apply_if_finite(optim.multi_steps(optim.adam(1e-2), every=2)),
    "sam": lambda: optim.sam(optim.sgd(0.1, momentum=0.9)),
    "injected": lambda: optim.inject_hyperparams(optim.adamw)(learning_rate=1e-2, weight_decay=1e-2),
}


def setup(name="adamw", dtype=None, **options):
    model, tx = net(), OPTIMIZERS[name]()
    objective = train.supervised(model, losses.cross_entropy, metrics={"accuracy": metrics.accuracy()}, **options)
    state = train.create_state(model, tx, random.key(0))
    if dtype is not None:
        state = train.create_state(model, tx, random.key(0), params=tree.cast(state.params, dtype))
    return model, train.make_train_step(objective, tx), state


def batch(n=16, seed=0):
    images, labels = data.digits("train")
    start = seed * n
    return images[start : start + n], labels[start : start + n]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_pure(name):
    _, step, state = setup(name)
    before, images, generator = tree.map(torch.clone, state), batch(), torch.get_rng_state()
    first, second = step(state, images), step(state, images)
    assert_trees_close(first, second)
    assert_trees_close(state, before)
    assert_trees_close(batch(), images)
    assert torch.equal(torch.get_rng_state(), generator)
    assert int(first[0].step) == 1
    assert sorted(first[1]) == ["accuracy", "grad_norm", "loss"]


DEAR = ("lookahead", "injected")  # to compile, and as one graph they are looked at below


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in DEAR)) for n in OPTIMIZERS])
def test_compiled_equals_eager(name):
    _, step, state = setup(name)
    fast, mine = jit(step, donate=name != "sgd"), tree.map(torch.clone, state)
    for seed in range(4):
        state, expected = step(state, batch(seed=seed))
        mine, found = fast(mine, batch(seed=seed))
        assert_trees_close(found, expected, rtol=1e-3, atol=1e-4)
    assert_trees_close(mine, state, rtol=2e-3, atol=2e-4)


def test_compiled_twice_gives_the_same_bits():
    _, step, state = setup()
    fast = jit(step)
    assert_trees_close(fast(state, batch()), fast(state, batch()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dynamo_follows_the_whole_step_as_one_graph(name):
    _, step, state = setup(name)
    counters.clear()
    compiled, mine = torch.compile(step, fullgraph=True, backend="eager"), state
    for seed in range(3):
        state, expected = step(state, batch(seed=seed))
        mine, found = compiled(mine, batch(seed=seed))
        assert_trees_close((mine, found), (state, expected))
    assert counters["stats"]["unique_graphs"] == 1


def test_nothing_recompiles_as_steps_schedules_epochs_and_evaluations_go_on():
    model, step, state = setup()
    eval_step = jit(train.make_eval_step(model, {"accuracy": metrics.accuracy()}, loss=losses.cross_entropy))
    images, labels = data.digits("train")
    batches = data.Batches((images[:104], labels[:104]), 16, key=random.key(1))  # 6 whole batches, one of 8
    fast = jit(step, donate=True)
    result = train.fit(fast, state, batches, epochs=2, eval=(eval_step, batches))
    graphs = fast.num_graphs, eval_step.num_graphs
    result = train.fit(fast, result.state, batches, steps=50, eval=(eval_step, batches), eval_every=10)
    assert (fast.num_graphs, eval_step.num_graphs) == graphs
    assert int(result.state.step) == 64


def test_a_short_batch_costs_one_more_graph():
    _, step, state = setup()
    fast = jit(step)
    for n in (16, 16, 7, 16, 7):
        fast(state, batch(n))
    assert fast.num_graphs == 2


def test_states_stack():
    model, step, _ = setup("sgd")
    tx = OPTIMIZERS["sgd"]()
    states = [train.create_state(model, tx, random.key(s)) for s in (0, 1)]
    stacked, _ = torch.vmap(step, (0, None))(tree.stack(states), batch())
    for i, state in enumerate(states):
        alone, _ = step(state, batch())
        assert_trees_close(tree.unstack(stacked)[i], alone, rtol=1e-3, atol=1e-4)


def test_a_step_without_a_loop_is_gradient_descent():
    model = lift(nn.Linear, 3, 2)
    tx = optim.sgd(0.5)
    state = train.create_state(model, tx, random.key(0))
    x, y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0])
    module = model.to_module(state.params, {})
    nn.functional.cross_entropy(module(x), y).backward()
    new, found = train.make_train_step(train.supervised(model, losses.cross_entropy), tx)(state, (x, y))
    torch.testing.assert_close(new.params["weight"], state.params["weight"] - 0.5 * module.weight.grad)
    norm = torch.cat([p.grad.flatten() for p in module.parameters()]).norm()
    torch.testing.assert_close(found["grad_norm"], norm)


def test_a_state_of_shapes_alone():
    model, tx = net(), optim.adam(0.1)
    state, shapes = (train.create_state(model, tx, random.key(0), device=device) for device in (None, "meta"))
    assert all(x.is_meta for x in tree.leaves(shapes))
    assert [(x.shape, x.dtype) for x in tree.leaves(shapes)] == [(x.shape, x.dtype) for x in tree.leaves(state)]


def test_states_and_results_print_as_tables_and_not_as_numbers():
    _, step, state = setup("sgd")
    assert repr(state).splitlines()[1].split()[0] == "TrainState"
    assert "<td>params</td>" in state._repr_html_()
    result = train.fit(step, state, [batch()], epochs=2, compile=False)
    assert repr(result) == "FitResult(reason='finished', step=2, records=2)"


def test_a_second_look_is_at_the_same_batch_with_the_same_key():
    model, rho, images_and_labels = net(), 0.3, batch()
    tx, objective = optim.sam(optim.sgd(0.5), rho), train.supervised(model, losses.cross_entropy)
    state = train.create_state(model, tx, random.key(0))
    new, _ = train.make_train_step(objective, tx)(state, images_and_labels)
    key = random.split(random.fold_in(state.key, state.step))[0]
    grads = torch.func.grad(lambda p: objective(p, state.buffers, images_and_labels, key)[0])
    first = grads(state.params)
    norm = tree.global_norm(first)
    second = grads({n: p + rho * first[n] / norm for n, p in state.params.items()})
    assert_trees_close(new.params, {n: p - 0.5 * second[n] for n, p in state.params.items()}, rtol=1e-5, atol=1e-6)


def test_every_step_has_its_own_dropout_and_resumes_it():
    _, step, state = setup()
    _, first = step(state, batch())
    _, second = step(state._replace(step=state.step + 1), batch())
    assert float(first["loss"]) != float(second["loss"])
    assert float(step(state, batch())[1]["loss"]) == float(first["loss"])


def test_augmentation_draws_by_the_step_and_runs_inside():
    model, tx = net(), optim.sgd(0.1)

    def shift(images_and_labels, key):
        images, labels = images_and_labels
        return images + random.normal(key, images.shape), labels

    step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx, augment=shift)
    state = train.create_state(model, tx, random.key(0))
    assert_trees_close(step(state, batch()), step(state, batch()))
    assert float(step(state, batch())[1]["loss"]) != float(
        step(state._replace(step=state.step + 1), batch())[1]["loss"]
    )


def test_losses_by_name_are_summed_and_reported():
    model, tx = lift(nn.Linear, 3, 2), optim.sgd(0.0)
    parts = {"a": lambda o, t: o.square().mean(), "b": lambda o, t: o.abs().mean()}
    step = train.make_train_step(train.supervised(model, lambda o, t: {n: f(o, t) for n, f in parts.items()}), tx)
    state = train.create_state(model, tx, random.key(0))
    _, found = step(state, (torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)))
    torch.testing.assert_close(found["loss"], found["a"] + found["b"])


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("fp16", 0.02)])
def test_half_precision_stays_close_and_keeps_fp32_state(precision, tolerance):
    _, step, state = setup("sgd")
    _, half_step, _ = setup("sgd", precision=precision)
    _, found = step(state, batch(64))
    half, half_found = half_step(state, batch(64))
    assert all(p.dtype == torch.float32 for p in half.params.values())
    assert float(half_found["loss"]) == pytest.approx(float(found["loss"]), rel=tolerance)
    assert float(half_found["grad_norm"]) == pytest.approx(float(found["grad_norm"]), rel=3 * tolerance)


def test_a_refused_update_changes_nothing_but_the_count():
    model, tx = net(), optim.apply_if_finite(optim.sgd(0.1), max_consecutive=3)
    step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx)
    state = train.create_state(model, tx, random.key(0))
    images, labels = batch()
    for fn in (step, jit(step)):
        new, _ = fn(state, (torch.full_like(images, torch.nan), labels))
        assert_trees_close((new.params, new.buffers), (state.params, state.buffers))
        assert int(new.step) == 1
        assert not torch.equal(fn(state, (images, labels))[0].params["0.weight"], state.params["0.weight"])


def test_accumulation_equals_the_large_batch_and_the_tail_is_flushed():
    model = lift(nn.Linear, 64, 10)
    images, labels = batch(40)
    flat = images.flatten(1)
    small = [(flat[i : i + 8], labels[i : i + 8]) for i in (0, 8, 16)]
    objective = train.supervised(model, losses.cross_entropy)

    def run(tx, batches):
        state = train.create_state(model, tx, random.key(0))
        return train.fit(train.make_train_step(objective, tx), state, batches, epochs=1, compile=False).state

    one = run(optim.sgd(0.1), [(flat[:16], labels[:16]), (flat[16:24], labels[16:24])])
    many = run(optim.multi_steps(optim.sgd(0.1), every=2), small)
    assert_trees_close(many.params, one.params, rtol=1e-5, atol=1e-6)


# --- evaluation --------------------------------------------------------------------------------------------------


def test_evaluation_is_exact_for_any_batch_size_and_changes_nothing():
    model, _, state = setup()
    before = tree.map(torch.clone, state)
    images, labels = data.digits("test")
    eval_step = train.make_eval_step(model, {"accuracy": metrics.accuracy()}, loss=losses.cross_entropy)
    results = [
        train.evaluate(step, state, data.Batches((images, labels), size))
        for size, step in ((355, eval_step), (100, eval_step), (64, jit(eval_step)))
    ]
    outputs, _ = model.apply(state.params, state.buffers, images)
    assert results[0]["accuracy"] == pytest.approx(float((outputs.argmax(1) == labels).double().mean()), abs=1e-12)
    assert results[0]["loss"] == pytest.approx(float(nn.functional.cross_entropy(outputs, labels)), rel=1e-6)
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-5)
    assert_trees_close(state, before)


def test_evaluation_reads_averaged_weights():
    model = lift(nn.Linear, 64, 10)
    tx = optim.ema_params(optim.sgd(1.0), decay=0.9)
    state = train.create_state(model, tx, random.key(0))
    step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx)
    images, labels = batch(32)
    for _ in range(3):
        state, _ = step(state, (images.flatten(1), labels))
    averaged = optim.eval_params(state.opt_state, state.params)
    assert not torch.equal(averaged["weight"], state.params["weight"])
    eval_step = train.make_eval_step(model, {}, loss=losses.cross_entropy)
    found = train.evaluate(eval_step, state, [(images.flatten(1), labels)])
    outputs, _ = model.apply(averaged, {}, images.flatten(1))
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(outputs, labels)), rel=1e-6)


# --- the loop ----------------------------------------------------------------------------------------------------


def digits(n=96, size=16):
    images, labels = data.digits("train")
    return data.Batches((images[:n], labels[:n]), size, key=random.key(4))


def test_fit_leaves_its_argument_alone_and_goes_on_from_its_result():
    _, step, state = setup()
    before = tree.map(torch.clone, state)
    whole = train.fit(step, state, digits(), epochs=3, compile=False)
    assert_trees_close(state, before)
    half = train.fit(step, state, digits(), steps=8, compile=False)  # ends inside the second epoch
    rest = train.fit(step, half.state, digits(), steps=10, compile=False)
    assert_trees_close(rest.state, whole.state)
    assert [r.reason for r in (whole, half, rest)] == ["finished"] * 3


@pytest.mark.parametrize("interrupted_at", [2, 6, 8])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, interrupted_at):
    _, step, state = setup()
    whole = train.fit(step, state, digits(), epochs=3, compile=False, log_every=2)
    stop = train.every([interrupted_at], lambda event: train.Stop("cut"))
    save = train.checkpoint(tmp_path, every=4)
    cut = train.fit(step, state, digits(), epochs=3, compile=False, log_every=2, hooks=[stop, save])
    assert cut.reason == "cut"
    assert int(cut.state.step) == interrupted_at
    rest = train.fit(step, state, digits(), epochs=3, compile=False, log_every=2, hooks=[save], resume=tmp_path)
    assert_trees_close(rest.state, whole.state)
    assert rest.history == whole.history


def test_hooks_run_by_phase_and_their_states_are_kept(tmp_path):
    order = []
    named = {
        phase: train.every(1, lambda e, p=phase: order.append(p), phase=phase)
        for phase in ("save", "observe", "decide")
    }
    _, step, state = setup("sgd")
    train.fit(step, state, digits(16), steps=1, compile=False, hooks=list(named.values()))
    assert order == ["decide", "observe", "save"]


@pytest.mark.parametrize(
    ("when", "steps"),
    [(4, [4, 8, 12]), ("2ep", [12]), ("1ep", [6, 12]), ("25%", [4, 7, 10, 13]), ([3, 5], [3, 5])],
)
def test_cadences(when, steps):
    seen = []
    _, step, state = setup("sgd")
    train.fit(step, state, digits(), steps=13, compile=False, hooks=[train.every(when, lambda e: seen.append(e.step))])
    assert seen == steps


REFUSING = {
    "alone": lambda tx: optim.apply_if_finite(tx, max_consecutive=3),
    "in multi_steps": lambda tx: optim.multi_steps(optim.apply_if_finite(tx, max_consecutive=3), every=2),
    "around multi_steps": lambda tx: optim.apply_if_finite(optim.multi_steps(tx, every=2), max_consecutive=3),
}


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", REFUSING)
def test_a_run_that_gave_up_ends_where_it_is_logged(name, compile):
    """With the parameters of the last good update; two bad ones in a row, and one good, are no reason."""
    model, tx = lift(nn.Linear, 64, 10), REFUSING[name](optim.sgd(0.1))
    step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx)
    state = train.create_state(model, tx, random.key(0))
    images, labels = batch(8)
    updates = "gbbgbbbbbbbbbb" if name != "in multi_steps" else "ggbbbbggbbbbbbbbbbbb"
    batches = [(images.flatten(1) + (0.0 if kind == "g" else torch.nan), labels) for kind in updates]
    good = updates.rindex("g") + 1
    last_good = train.fit(step, state, batches[:good], epochs=1, compile=False)
    result = train.fit(step, state, batches, epochs=9, log_every=2, compile=compile)
    assert result.reason == "gave up: max_consecutive updates in a row were refused"
    assert result.state.step == good + {"alone": 4, "in multi_steps": 6, "around multi_steps": 4}[name]
    assert last_good.reason == "finished"
    assert_trees_close(result.state.params, last_good.state.params, rtol=1e-6, atol=1e-7)


def test_early_stopping_and_the_best_checkpoint(tmp_path):
    from holofunc import checkpoint

    values = iter([3.0, 2.0, 2.5, 2.4, 1.0])

    class Scripted(train.EvalStep):
        def __init__(self):
            self.metrics = {"loss": metrics.mean(lambda o, t: torch.tensor(next(values)))}

        def check(self, batch):
            pass

        def __call__(self, state, batch, weights=None):
            m = self.metrics["loss"]
            return {"loss": m.update(m.init(), torch.ones(1), torch.ones(1))}

    _, step, state = setup("sgd")
    hooks = [train.checkpoint(tmp_path, best="val/loss", keep=1), train.early_stopping("val/loss", patience=2)]
    result = train.fit(step, state, digits(16), epochs=9, compile=False, eval=(Scripted(), digits(16)), hooks=hooks)
    assert result.reason == "val/loss did not improve for 2 evaluations"
    assert int(result.state.step) == 4
    assert checkpoint.manifest(tmp_path, step="best")["step"] == 2
    assert checkpoint.steps(tmp_path) == [2, 4]


def test_logs_go_to_every_sink(tmp_path, capsys):
    seen = []
    model, step, state = setup("sgd")
    eval_step = train.make_eval_step(model, {"accuracy": metrics.accuracy()})
    sinks = [tmp_path / "h.csv", tmp_path / "h.jsonl", "print", lambda n, m: seen.append((n, m["loss"]))]
    result = train.fit(
        step, state, digits(), epochs=2, compile=False, eval=(eval_step, digits()), log_every=4,
        hooks=[train.log(*sinks, every=4)],
    )  # fmt: skip
    with (tmp_path / "h.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert (
        [int(r["step"]) for r in rows] == [4, 6, 8, 12] == [n for n, _ in seen] == [r["step"] for r in result.history]
    )
    assert float(rows[1]["val/accuracy"]) == result.history[1]["val/accuracy"]
    assert [float(r["loss"]) for r in rows] == [loss for _, loss in seen] == [r["loss"] for r in result.history]
    assert len((tmp_path / "h.jsonl").read_text().splitlines()) == 4
    assert capsys.readouterr().out.count("step") == 4


def test_history_holds_sample_weighted_means():
    model, tx = lift(nn.Linear, 1, 1), optim.sgd(0.0)
    step = train.make_train_step(train.supervised(model, lambda o, t: t.mean()), tx)
    state = train.create_state(model, tx, random.key(0))
    batches = [(torch.ones(3, 1), torch.full((3,), 1.0)), (torch.ones(1, 1), torch.full((1,), 5.0))]
    assert train.fit(step, state, batches, epochs=1, compile=False).history[0]["loss"] == pytest.approx(2.0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_is_ignored_stays_so(number):
    _, step, state = setup("sgd")
    old = signal.signal(number, signal.SIG_IGN)
    try:
        hook = train.every([3], lambda event: os.kill(os.getpid(), number))
        result = train.fit(step, state, digits(), epochs=1, compile=False, hooks=[hook])
        assert result.reason == "finished"
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, old)


SIGNALS = [(signal.SIGINT, "interrupt"), (signal.SIGTERM, "terminated"), (signal.SIGHUP, "hangup")]


@pytest.mark.parametrize(("number", "reason"), SIGNALS)
def test_a_signal_ends_the_run_after_the_step(number, reason):
    _, step, state = setup("sgd")
    old = signal.getsignal(number)
    hook = train.every([3], lambda event: os.kill(os.getpid(), number))
    result = train.fit(step, state, digits(), epochs=5, compile=False, hooks=[hook])
    assert result.reason == reason
    assert int(result.state.step) == 3
    assert signal.getsignal(number) is old


def test_an_exception_reaches_the_caller_and_the_hooks():
    kinds = []
    _, step, state = setup("sgd")
    with pytest.raises(RuntimeError, match="boom"):
        train.fit(
            step, state, digits(), epochs=1, compile=False,
            hooks=[train.every([2], lambda e: (_ for _ in ()).throw(RuntimeError("boom"))), lambda e: kinds.append(e.kind)],
        )  # fmt: skip
    assert kinds[-1] == "exception"


def test_any_iterable_of_batches_will_do():
    _, step, state = setup("sgd")
    batches = list(digits())
    assert int(train.fit(step, state, batches, epochs=2, compile=False).state.step) == 12
    assert int(train.fit(step, state, iter(batches), steps=3, compile=False).state.step) == 3
    with pytest.raises(ValueError, match="data must hold at least one batch, got none in epoch 1"):
        train.fit(step, state, iter(batches), epochs=2, compile=False)


# --- bad input, the same eager and compiled ----------------------------------------------------------------------

BAD_BATCHES = [
    ("rank", lambda x, y: (x[0], y), ValueError, r"of one length|must have shape"),
    (
        "empty",
        lambda x, y: (x[:0], y[:0]),
        ValueError,
        r"images must hold at least one image, got shape \(0, 1, 8, 8\)",
    ),
    ("lengths", lambda x, y: (x, y[:3]), ValueError, r"images and targets must be of one length, got 16 and \(3,\)"),
    (
        "one sample",
        lambda x, y: (x[0], y[0]),
        ValueError,
        r"got 1 and \(\): one sample is no batch, see .*data.Batches",
    ),
    ("label above", lambda x, y: (x, y + 9), ValueError, r"targets must be in \[0, 10\) .* got 1[0-9]"),
    ("label below", lambda x, y: (x, y - 5), ValueError, r"targets must be in \[0, 10\) .* got -[1-5]"),
    ("label dtype", lambda x, y: (x, y.float()), TypeError, r"targets .* integer dtype .* got torch.float32"),
    ("no pair", lambda x, y: (x,), TypeError, r"batch must be a pair \(images, targets\), got tuple of 1"),
    ("no tensor", lambda x, y: (x.numpy(), y), TypeError, r"images must be a tensor, got ndarray"),
]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("spoil", "error", "message"), [b[1:] for b in BAD_BATCHES], ids=[b[0] for b in BAD_BATCHES])
def test_bad_batches_are_named(spoil, error, message, compiled):
    _, step, state = setup("sgd")
    with pytest.raises(error, match=message):
        (jit(step) if compiled else step)(state, spoil(*batch()))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda x: x[:, 0], ValueError, r"images must have shape \(N, 1, H, W\), got \(16, 8, 8\)"),
        (lambda x: x.expand(-1, 3, -1, -1), ValueError, r"images must have shape \(N, 1, H, W\), got \(16, 3, 8, 8\)"),
        (lambda x: x.to(torch.uint8), TypeError, r"images must be floating .* got torch.uint8"),
        (lambda x: x.double(), TypeError, r"dtype of the parameters, torch.float32, got torch.float64"),
    ],
    ids=["rank", "channels", "integers", "dtype"],
)
def test_images_that_a_network_cannot_take_are_named(spoil, error, message, compiled):
    model, tx = models.smallnet(in_channels=1), optim.sgd(0.1)
    step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx)
    eval_step = train.make_eval_step(model, {"accuracy": metrics.accuracy()}, loss=losses.cross_entropy)
    state, (images, labels) = train.create_state(model, tx, random.key(0)), batch()
    wrap = jit if compiled else lambda fn: fn
    with pytest.raises(error, match=message):
        wrap(step)(state, (spoil(images), labels))
    with pytest.raises(error, match=message):
        train.evaluate(wrap(eval_step), state, [(spoil(images), labels)])


def test_a_stochastic_model_needs_its_key():
    model, _, state = setup()
    with pytest.raises(ValueError, match="key must be given, got None"):
        model.apply(state.params, state.buffers, batch()[0], train=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 1, "steps": 1}, ValueError, "exactly one of epochs and steps must be given, got epochs=1, steps=1"),
        ({}, ValueError, "exactly one of epochs and steps"),
        ({"epochs": 0}, ValueError, "epochs must be a positive integer, got 0"),
        ({"steps": 2.5}, ValueError, "steps must be a positive integer, got 2.5"),
        ({"steps": 1, "log_every": 0}, ValueError, "log_every must be a positive integer, got 0"),
        ({"steps": 1, "eval_every": "2 epochs"}, ValueError, "eval_every must be a positive number of steps"),
        ({"steps": 1, "hooks": [3]}, TypeError, "hooks must be Hook values or callables"),
    ],
)
def test_bad_options_of_fit_are_named(options, error, message):
    _, step, state = setup("sgd")
    with pytest.raises(error, match=message):
        train.fit(step, state, digits(), compile=False, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: train.supervised(m, losses.cross_entropy, precision="fp8"), ValueError, "precision must be one of 'fp32', 'bf16', 'fp16', got 'fp8'"),
        (lambda m: train.supervised(m, "ce"), TypeError, "loss must be callable"),
        (lambda m: train.every(0, print), ValueError, "when must be a positive number of steps, .* got 0"),
        (lambda m: train.every("soon", print), ValueError, "when must be .* got 'soon'"),
        (lambda m: train.every(1, print, phase="late"), ValueError, "phase must be one of transform, decide, observe, save, got 'late'"),
        (lambda m: train.log("history.xlsx"), ValueError, "sinks must be 'bar', 'print', or end in .csv or .jsonl"),
        (lambda m: train.early_stopping("val/loss", 0), ValueError, "patience must be an integer of at least 1, got 0"),
        (lambda m: train.checkpoint("x", mode="low"), ValueError, "mode must be 'min' or 'max', got 'low'"),
        (lambda m: train.create_state(m, optim.sgd(0.1), random.key(0), params={}), ValueError, "params does not fit"),
    ],
)  # fmt: skip
def test_bad_build_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(net())
