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
