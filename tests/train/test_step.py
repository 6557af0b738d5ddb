"""The seams of a step: what is checked when, what an objective may return, how micro-batches weigh, capabilities."""

import functools
import inspect
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holofunc import jit, lift, losses, optim, random, train, tree

LINEAR = lift(nn.Linear, 3, 4)
X, Y = random.normal(random.key(1), (8, 3)), torch.tensor([0, 1, 2, 3, 1, 2, 3, 0])


def after(tx, objective, batches, model=LINEAR):
    """The parameters after one call of the step per batch."""
    state, step = train.create_state(model, tx, random.key(0)), train.make_train_step(objective, tx)
    for batch in batches:
        state, _ = step(state, batch)
    return state.params


def assert_one_batch_equals_two(objective, make, cut, model=LINEAR):
    """Two micro-batches, cut in uneven parts, move parameters as the whole batch does."""
    whole = after(optim.sgd(1.0), objective, [make(slice(0, 8))], model)
    parts = [make(slice(0, cut)), make(slice(cut, 8))]
    assert_close(after(optim.multi_steps(optim.sgd(1.0), every=2), objective, parts, model), whole)


def assert_close(a, b):
    for name in b:
        torch.testing.assert_close(a[name], b[name])


# --- weights of micro-batches ----------------------------------------------------------------------------------------

IGNORED = torch.where(torch.arange(8) % 3 == 0, -100, Y)
WEIGHT = torch.tensor([1.0, 10.0, 0.5, 2.0])
SOFT = torch.softmax(random.normal(random.key(2), (8, 4)), 1)
SOFT[1] = 0


@pytest.mark.parametrize("cut", [1, 5])
@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (losses.cross_entropy, IGNORED),
        (functools.partial(losses.cross_entropy, weight=WEIGHT), IGNORED),
        (functools.partial(losses.cross_entropy, weight=WEIGHT, mean_over="samples"), IGNORED),
        (functools.partial(losses.cross_entropy, weight=WEIGHT, label_smoothing=0.1), Y),
        (losses.cross_entropy, SOFT),
        (functools.partial(losses.cross_entropy, weight=WEIGHT), SOFT),
        (functools.partial(losses.focal, weight=WEIGHT, ignore_index=2), Y),
        (functools.partial(losses.poly, weight=WEIGHT), IGNORED),
        (functools.partial(F.cross_entropy, weight=WEIGHT, ignore_index=1), Y),
        (lambda outputs, targets: ((outputs - 1) ** 2).mean(), Y),
    ],
)
def test_micro_batches_weigh_what_their_losses_divide_by(loss, targets, cut):
    assert_one_batch_equals_two(train.supervised(LINEAR, loss), lambda part: (X[part], targets[part]), cut)


def test_an_objective_says_its_own_weight():
    def loss(outputs, targets):
        return (outputs.sum(1) * targets).sum() / targets.sum()

    objective = train.supervised(LINEAR, loss, weight=lambda outputs, targets: targets.sum())
    assert_one_batch_equals_two(objective, lambda part: (X[part], Y[part] + 1), 3)


class PooledList(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, images):
        return self.head(torch.stack([image.mean((1, 2)) for image in images]))


@pytest.mark.parametrize("cut", [1, 3])
@pytest.mark.parametrize("named", [False, True])
def test_samples_are_counted_in_lists_and_dicts(named, cut):
    model, images = lift(PooledList), [random.normal(random.key(i), (3, 4 + i, 5)) for i in range(8)]

    def objective(params, buffers, batch, key):
        images, targets = (batch["images"], batch["targets"]) if named else batch
        outputs, buffers = model.apply(params, buffers, images)
        return losses.cross_entropy(outputs, targets), train.Aux(buffers, {}, outputs)

    def make(part):
        if named:
            return {"scale": torch.ones(1), "images": images[part], "targets": Y[part]}
        return images[part], Y[part]

    assert_one_batch_equals_two(objective, make, cut, model)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (X, 8),
        ((X, Y), 8),
        ([X, Y], 8),
        ((X, [{"boxes": torch.zeros(2, 4)}] * 8), 8),
        ({"images": torch.zeros(2, 3, 4, 4), "boxes": torch.zeros(7, 4)}, 2),
        ({"meta": {"id": Y}, "images": torch.zeros(8, 3, 4, 4)}, 8),
        ((torch.zeros(()), X), 8),
        ((), 1),
    ],
)
def test_number_of_samples(batch, expected):
    assert train.num_samples(batch) == expected


# --- what an objective returns -----------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [None, "text", X])
@pytest.mark.parametrize("metrics", [{}, {"n": 2.0}, {"n": torch.tensor(2)}])
def test_outputs_may_be_anything_and_metrics_numbers(outputs, metrics):
    def objective(params, buffers, batch, key):
        return params["weight"].square().sum(), train.Aux(buffers, metrics, outputs)

    state = train.create_state(LINEAR, optim.sgd(0.1), random.key(0))
    _, found = train.make_train_step(objective, optim.sgd(0.1))(state, X)
    assert sorted(found) == sorted(["loss", "grad_norm", *metrics])
    assert all(float(found[name]) == 2 for name in metrics)


def test_what_is_no_aux_is_named():
    state = train.create_state(LINEAR, optim.sgd(0.1), random.key(0))
    step = train.make_train_step(lambda p, b, batch, key: (p["weight"].sum(), {"n": p["bias"].sum()}), optim.sgd(0.1))
    with pytest.raises(TypeError, match=r"objective must return \(loss, Aux\(buffers, metrics, outputs\)\), got dict"):
        step(state, X)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_measures_see_gradients_updates_and_parameters(compiled):
    def measure(grads, updates, params):
        return {f"norm/{name}": updates[name].norm() / params[name].norm() for name in params} | {
            "along": sum((grads[name] * updates[name]).sum() for name in grads)
        }

    tx = optim.sgd(0.1)
    step = train.make_train_step(train.supervised(LINEAR, losses.cross_entropy), tx, measure=measure)
    state = train.create_state(LINEAR, tx, random.key(0))
    before = tree.map(torch.clone, state.params)
    _, found = (jit(step) if compiled else step)(state, (X, Y))
    torch.testing.assert_close(found["along"], -0.1 * found["grad_norm"] ** 2)
    assert found["norm/weight"] > 0
    assert set(found) == {"loss", "grad_norm", "along", "norm/weight", "norm/bias"}
    assert torch.equal(state.params["weight"], before["weight"])


# --- checks -------------------------------------------------------------------------------------------------------


def test_a_batch_is_checked_once_and_signatures_are_read_when_built(monkeypatch):
    checked = []
    step = train.make_train_step(train.supervised(LINEAR, losses.cross_entropy), optim.sgd(0.1), check=checked.append)
    state = train.create_state(LINEAR, optim.sgd(0.1), random.key(0))
    plain = train.make_train_step(train.supervised(LINEAR, losses.cross_entropy), optim.sgd(0.1))
    eval_step = train.make_eval_step(LINEAR, {}, loss=losses.cross_entropy)

    def signature(*args, **kwargs):
        raise AssertionError("inspect.signature in the loop")

    monkeypatch.setattr(inspect, "signature", signature)
    train.fit(step, state, [(X, Y)] * 5, epochs=1, compile=False)
    assert len(checked) == 5
    train.fit(plain, state, [(X, Y)] * 2, epochs=1, eval=(eval_step, [(X, Y)]), compile=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: train.make_train_step(3, optim.sgd(0.1)), "objective must be callable, got 3"),
        (lambda: train.make_train_step(print, optim.sgd(0.1), measure=3), "measure must be callable, got 3"),
        (lambda: train.make_train_step(print, optim.sgd(0.1), check=3), "check must be callable, got 3"),
        (lambda: train.supervised(LINEAR, print, weight=3), r"weight must be callable, weight\(outputs, targets\), or"),
        (lambda: train.evaluate(print, None, []), r"eval_step must be an EvalStep \(make_eval_step makes one\)"),
    ],
)
def test_what_is_not_callable_is_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()


# --- steps inside of other functions ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_step_that_is_wrapped_is_compiled():
    calls = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x):
            calls.append(1)
            return self.layer(x)

    model, tx = lift(Net), optim.sgd(0.1)
    step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx)

    @functools.wraps(step)
    def timed(state, batch):
        return step(state, batch)

    train.fit(timed, train.create_state(model, tx, random.key(0)), [(X, Y)] * 30, epochs=1)
    assert len(calls) < 15


# --- states are known by their classes ----------------------------------------------------------------------------------


FIELDS = ("limit", "window", "skipped", "averaged", "memory", "progress", "tied", "looks_twice", "inner", "consecutive")


@pytest.mark.parametrize("field", FIELDS)
def test_a_state_may_call_its_fields_as_it_likes(field):
    kind = NamedTuple("OwnState", [(field, Tensor)])
    own = optim.GradientTransformation(lambda params: kind(torch.ones(())), lambda u, s, params=None, **extra: (u, s))
    params = {"weight": torch.ones(4, 3)}
    for tx in (
        optim.chain(own, optim.sgd(0.1)),
        optim.cautious(own, raw=True),
        optim.lookahead(own, inner_state="reset"),
    ):
        state = tx.init(params)
        assert optim.gave_up(state) is None
        assert optim.skipped(state) is None
        assert not optim.looks_twice(state)
        assert optim.flush(tx, state, params)[1] is state
        tx.update(params, state, params)
    assert optim.eval_params(own.init(params), params)["weight"] is params["weight"]
    step = train.make_train_step(train.supervised(LINEAR, losses.cross_entropy), optim.chain(own, optim.sgd(0.1)))
    state = train.create_state(LINEAR, optim.chain(own, optim.sgd(0.1)), random.key(0))
    train.fit(step, state, [(X, Y)], epochs=1, log_every=1, compile=False)


class _Gate(NamedTuple):
    skipped: Tensor
    is_open: Tensor
    shadow: dict


class GateState(_Gate, optim.CanSkip, optim.Accumulates, optim.KeepsWeights):
    """A state of one's own that can all of it."""

    __slots__ = ()

    @property
    def exhausted(self):
        return self.skipped

    def averaged(self, params):
        return {name: self.shadow[name] for name in params}


@pytest.mark.parametrize("is_open", [False, True])
def test_a_state_of_ones_own_says_what_it_can(is_open):
    params = {"weight": torch.ones(2)}
    inner = optim.apply_if_finite(optim.sgd(0.1)).init(params)
    state = (GateState(torch.tensor(True), torch.tensor(is_open), {"weight": torch.zeros(2)}), {"guard": inner})
    assert bool(optim.skipped(state)) is not is_open
    assert bool(optim.gave_up(state))
    assert torch.equal(optim.eval_params(state, params)["weight"], torch.zeros(2))
    assert [type(s).__name__ for s in optim.find(state, optim.CanSkip)] == ["GateState", "ApplyIfState"]


# --- what a loss is a mean over ---------------------------------------------------------------------------------------


class Maps(nn.Module):
    """Scores of four places, as one tensor, in a dict or in a tuple; or as frames of a sequence."""

    def __init__(self, kind=None):
        super().__init__()
        self.head, self.kind = nn.Linear(3, 16), kind

    def forward(self, x):
        out = self.head(x).unflatten(1, (4, 4))
        if self.kind == "frames":
            return out.movedim(2, 0)
        return {"out": out, "x": x} if self.kind == "dict" else (out, x) if self.kind == "tuple" else out


DENSE = torch.where(torch.arange(32).reshape(8, 4) % 5 < 2, -100, torch.arange(32).reshape(8, 4) % 4)
DENSE[3] = -100
TEXTS = torch.tensor([[1, 2], [3, -100], [-100, -100], [1, 1], [2, 3], [2, -100], [1, 3], [3, 3]])
LOSSES = {
    "cross entropy": (None, losses.cross_entropy, DENSE),
    "weights": (None, functools.partial(losses.cross_entropy, weight=WEIGHT), DENSE),
    "weights over samples": (None, functools.partial(losses.focal, weight=WEIGHT, mean_over="samples"), DENSE),
    "balanced": (None, losses.class_balanced(losses.cross_entropy, [1, 5, 9, 2]), DENSE),
    "binary": (None, functools.partial(losses.binary_cross_entropy, pos_weight=WEIGHT), (DENSE != 1)[:, None].repeat(1, 4, 1).float()),
    "dice": (None, losses.dice, DENSE),
    "torch": (None, functools.partial(F.cross_entropy, weight=WEIGHT), DENSE),
    "ctc": ("frames", losses.ctc, TEXTS),
    "dict": ("dict", lambda out, targets: F.mse_loss(out["out"][:, 0], (targets > 0).float()), DENSE),
    "tuple": ("tuple", lambda out, targets: losses.huber(out[0][:, 0], targets["a"]), {"a": (DENSE > 0).float()}),
}  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", LOSSES)
def test_evaluation_says_what_training_does(name, precision):
    """Whatever the outputs, the batches, and what is ignored or weighted; and so do micro-batches."""
    kind, loss, targets = LOSSES[name]
    model = lift(Maps, kind)
    objective = train.supervised(model, loss, precision=precision)
    step = train.make_train_step(objective, optim.sgd(1.0))
    state = train.create_state(model, optim.sgd(1.0), random.key(0))
    new, measured = step(state, (X, targets))
    assert all(p.isfinite().all() for p in new.params.values())
    eval_step = train.make_eval_step(model, {}, loss=loss, precision=precision)

    def rows(cut):
        return X[cut], tree.map(lambda x: x[cut], targets)

    for batches in ([rows(slice(0, 8))], [rows(slice(0, 5)), rows(slice(5, 8))]):
        found = train.evaluate(eval_step, state, batches)
        assert found["loss"] == pytest.approx(float(measured["loss"]), rel=1e-5)
    if precision == "fp32":
        assert_one_batch_equals_two(objective, rows, 3, model)


def test_half_precision_leaves_masked_logits_alone():
    class Masked(nn.Linear):
        def forward(self, x):
            return super().forward(x).masked_fill(torch.tensor([False, False, True, True]), -torch.inf)

    model = lift(Masked, 3, 4)
    batch = X, Y % 2
    plain = after(optim.sgd(0.1), train.supervised(model, losses.cross_entropy), [batch], model)
    for precision in ("bf16", "fp16"):
        half = after(optim.sgd(0.1), train.supervised(model, losses.cross_entropy, precision=precision), [batch], model)
        for name, value in plain.items():
            torch.testing.assert_close(half[name], value, rtol=1e-2, atol=1e-3)


def test_a_loss_that_draws_gets_a_key_of_its_own():
    seen = []

    def loss(outputs, targets, *, key=None):
        seen.append(key)
        return losses.cross_entropy(outputs, targets)

    objective = train.supervised(LINEAR, loss)
    params, buffers = LINEAR.init(random.key(0))
    for key in (random.key(1), random.key(1), random.key(2)):
        objective(params, buffers, (X, Y), key)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], random.key(1))
    state = train.create_state(LINEAR, optim.sgd(0.1), random.key(0))
    train.evaluate(train.make_eval_step(LINEAR, {}, loss=loss), state, [(X, Y)])
    assert seen[-1] is None
    maps = lift(Maps)
    objective = train.supervised(maps, losses.mutual_channel)
    values = {float(objective(*maps.init(random.key(0)), (X, Y % 2), random.key(i))[0]) for i in range(4)}
    assert len(values) > 1


def test_losses_that_only_look_like_the_librarys_are_told_so():
    def alike(outputs, targets, *, weight=None, reduction="mean"):
        return F.cross_entropy(outputs, targets)

    with pytest.raises(ValueError, match=r"reduction='parts'\) must have shape \(2,\).*wrap it in a function"):
        after(optim.sgd(0.1), train.supervised(LINEAR, alike), [(X, Y)])
    frames = lift(Maps, "frames")
    state = train.create_state(frames, optim.sgd(0.1), random.key(0))
    hidden = train.make_eval_step(frames, {}, loss=lambda out, targets: losses.ctc(out, targets))
    with pytest.raises(ValueError, match=r"outputs must have one row .* along axis 0.*losses\.ctc"):
        train.evaluate(hidden, state, [(X, TEXTS)])


def test_detectors_check_their_targets():
    class Boxes(type(LINEAR)):
        loss = staticmethod(F.mse_loss)

        def check_targets(self, targets):
            raise ValueError("boxes must lie in [0, 1]")

    model = Boxes(lambda: nn.Linear(3, 4))
    for check in (train.supervised(model, F.mse_loss).check, train.make_eval_step(model, {}, loss=F.mse_loss).check):
        with pytest.raises(ValueError, match="boxes must lie"):
            check((X, {"boxes": X}))
    train.supervised(model, lambda outputs, targets: outputs.sum()).check((X, {"boxes": X}))  # not those of its loss
