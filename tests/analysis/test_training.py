"""Populations, and derivatives through training."""

import pytest
import torch
from torch import nn

import holofunc
from holofunc import analysis, checkpoint, data, lift, losses, metrics, models, optim, random, train, tree
from holofunc.analysis import populations


def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))


MODEL = lift(build)


@pytest.fixture(scope="module")
def digits():
    images, labels = data.digits("test")
    return images.double(), labels


def a_population(tx, count=3, model=MODEL, **hyperparams):
    return analysis.create_population(model, tx, random.split(random.key(0), count), **hyperparams)


def same(a, b, **tolerance):
    torch.testing.assert_close(tree.leaves(a), tree.leaves(b), **tolerance)


# --- populations ---------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda: optim.inject_hyperparams(optim.sgd)(learning_rate=0.1, momentum=0.9),
    "adamw": lambda: optim.inject_hyperparams(optim.adamw)(learning_rate=1e-3, weight_decay=1e-2),
    "chain": lambda: optim.chain(
        optim.clip_by_global_norm(0.5), optim.inject_hyperparams(optim.sgd)(learning_rate=0.1)
    ),
    "safe": lambda: optim.apply_if_finite(optim.inject_hyperparams(optim.sgd)(learning_rate=0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("batches", ["shared", "own"])
def test_population_equals_a_loop(name, batches):
    tx = OPTIMIZERS[name]()
    step = train.make_train_step(train.supervised(MODEL, losses.cross_entropy), tx)
    rates = [0.01, 0.1, 0.3]
    states = a_population(tx, learning_rate=rates)
    x, y = data.digits("test")
    parts = [(x[i : i + 16], y[i : i + 16]) for i in (0, 50, 100)]
    run = analysis.population(step, batches=batches)
    for _ in range(3):
        states, measured = run(states, analysis.stack(parts) if batches == "own" else parts[0])
    alone = []
    for i, key in enumerate(random.split(random.key(0), 3)):
        state = train.create_state(MODEL, tx, key)
        state = state._replace(opt_state=optim.set_hyperparams(state.opt_state, learning_rate=rates[i]))
        for _ in range(3):
            state, own = step(state, parts[i] if batches == "own" else parts[0])
        torch.testing.assert_close(measured["loss"][i], own["loss"])
        alone.append(state)
    same(states, analysis.stack(alone), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_population_of_networks_with_batch_norm_and_dropout(method):
    def network():
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(108, 10))

    model, tx = lift(network), optim.sgd(0.1)
    step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx)
    states = a_population(tx, model=model)
    x, y = data.digits("test")
    new, _ = analysis.population(step, method=method)(states, (x[:9], y[:9]))
    expected = [step(state, (x[:9], y[:9]))[0] for state in analysis.unstack(states)]
    same(new, analysis.stack(expected), rtol=1e-4, atol=1e-6)
    few, _ = analysis.population(step, chunk_size=2)(states, (x[:9], y[:9]))
    same(new, few, rtol=1e-4, atol=1e-6)


def test_members_drop_out_are_resampled_and_averaged():
    tx = optim.sgd(0.1)
    step = analysis.population(train.make_train_step(train.supervised(MODEL, losses.cross_entropy), tx))
    states = a_population(tx)
    x, y = data.digits("test")
    new, _ = step(states, (x, y), active=torch.tensor([True, False, True]))
    weights = states.params["1.weight"], new.params["1.weight"]
    assert [bool((a == b).all()) for a, b in zip(*weights, strict=True)] == [False, True, False]
    assert new.step.tolist() == [1, 0, 1]
    again = analysis.resample(new, torch.tensor([2, 2]))
    assert torch.equal(again.params["1.weight"][0], again.params["1.weight"][1])
    assert again.step.tolist() == [1, 1]
    mixed = analysis.soup(new, torch.tensor([1.0, 0.0, 3.0]))
    torch.testing.assert_close(mixed.params["1.bias"], 0.25 * new.params["1.bias"][0] + 0.75 * new.params["1.bias"][2])
    torch.testing.assert_close(analysis.soup(new).params["1.bias"], new.params["1.bias"].mean(0))


@pytest.mark.slow
def test_population_compiles():
    tx = optim.inject_hyperparams(optim.sgd)(learning_rate=0.1)
    step = analysis.population(train.make_train_step(train.supervised(MODEL, losses.cross_entropy), tx))
    states = a_population(tx, learning_rate=[0.1, 0.2, 0.3])
    x, y = data.digits("test")
    same(holofunc.jit(step)(states, (x, y))[0], step(states, (x, y))[0], rtol=1e-4, atol=1e-6)


def test_fit_runs_a_population_and_its_checkpoint_resumes(tmp_path):
    tx = optim.sgd(0.1)
    step = analysis.population(train.make_train_step(train.supervised(MODEL, losses.cross_entropy), tx))
    batches = data.Batches(data.digits("test"), 100, key=random.key(1))
    start = analysis.Population.of(a_population(tx))
    eval_step = analysis.population_eval(train.make_eval_step(MODEL, {"accuracy": metrics.accuracy()}), 3)
    whole = train.fit(step, start, batches, epochs=2, compile=False, log_every=4, eval=(eval_step, batches))
    last = whole.history[-1]
    assert {"loss", "loss/0", "loss/1", "loss/2"} <= set(whole.history[-1])
    alone = train.make_eval_step(MODEL, {"accuracy": metrics.accuracy()})
    each = [train.evaluate(alone, state, batches)["accuracy"] for state in analysis.unstack(whole.state.members)]
    assert [last[f"val/accuracy/{i}"] for i in range(3)] == pytest.approx(each)
    assert last["val/accuracy/mean"] == pytest.approx(sum(each) / 3)
    assert analysis.best_member(last, "val/accuracy", mode="max") == each.index(max(each))
    assert last["loss"] == pytest.approx(sum(last[f"loss/{i}"] for i in range(3)) / 3, rel=1e-5)
    part = train.fit(step, start, batches, steps=3, compile=False).state
    checkpoint.save(tmp_path, part, 3)
    resumed = train.fit(step, checkpoint.restore(tmp_path, part), batches, steps=5, compile=False).state
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(resumed), tree.leaves(whole.state), strict=True))


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_ensemble_tells_how_far_members_disagree(method):
    states = a_population(optim.sgd(0.1), 5)
    x = data.digits("test")[0][:7]
    told = analysis.ensemble(MODEL, states.params, states.buffers, x, method=method)
    outputs = torch.stack([MODEL.apply(s.params, {}, x)[0] for s in analysis.unstack(states)])
    torch.testing.assert_close(told.outputs, outputs)
    p = outputs.softmax(-1)
    torch.testing.assert_close(told.probabilities, p.mean(0))
    torch.testing.assert_close(told.disagreement, (p.argmax(-1) != p.mean(0).argmax(-1)).float().mean(0))
    entropy = lambda p: torch.distributions.Categorical(p).entropy()  # noqa: E731
    torch.testing.assert_close(told.mutual_information, entropy(p.mean(0)) - entropy(p).mean(0), atol=1e-5, rtol=1e-3)


def test_fastest_method_is_measured():
    tx = optim.sgd(0.1)
    step = train.make_train_step(train.supervised(MODEL, losses.cross_entropy), tx)
    x, y = data.digits("test")
    choice = analysis.fastest_method(step, a_population(tx, 32), (x[:32], y[:32]))
    assert choice.method == "vmap"
    assert choice.seconds["vmap"] < choice.seconds["loop"]


@pytest.mark.parametrize("faster", ["vmap", "loop"])
def test_a_population_measures_once_and_takes_the_faster_way(faster, monkeypatch):
    step = train.make_train_step(train.supervised(MODEL, losses.cross_entropy), optim.sgd(0.1))
    run, states = analysis.population(step), a_population(optim.sgd(0.1))
    x, y = data.digits("test")
    measured = []

    def measure(*args, **options):
        measured.append(options)
        return analysis.Choice(faster, {"vmap": 0.001 + (faster == "loop"), "loop": 0.1})

    monkeypatch.setattr(populations, "fastest_method", measure)
    assert run.choice is None
    for _ in range(2):
        states, _ = run(states, (x[:9], y[:9]))
    assert len(measured) == 1
    assert run.choice.method == faster
    assert str(run.choice).startswith(f"{faster} (a step by vmap 1")
    named = analysis.population(step, method=faster)
    same(states, named(named(a_population(optim.sgd(0.1)), (x[:9], y[:9]))[0], (x[:9], y[:9]))[0], rtol=0, atol=0)
    assert named.choice is None


def test_the_best_member_is_one_with_a_number():
    record = {"loss": 1.0, "loss/0": float("nan"), "loss/1": 2.0, "loss/2": 1.0, "step": 3}
    assert analysis.best_member(record) == 2
    assert analysis.best_member(record, mode="max") == 1
    with pytest.raises(ValueError, match=r"record must hold accuracy/0, accuracy/1, \.\.\., got loss, loss/0, loss/1"):
        analysis.best_member(record, "accuracy")
    with pytest.raises(ValueError, match="mode must be 'min' or 'max', got 'best'"):
        analysis.best_member(record, mode="best")


def test_what_no_population_can_be_made_of_is_told():
    tx = optim.inject_hyperparams(optim.sgd)(learning_rate=0.1)
    step = train.make_train_step(train.supervised(MODEL, losses.cross_entropy), tx)
    with pytest.raises(ValueError, match="keys must hold a key per member, at least one, got none"):
        analysis.create_population(MODEL, tx, [])
    with pytest.raises(ValueError, match="trees must hold at least one tree, got none"):
        analysis.stack([])
    with pytest.raises(ValueError, match=r"learning_rate must hold 3 values, one per member, got shape \(2,\)"):
        a_population(tx, learning_rate=[0.1, 0.2])
    one, other = (train.create_state(m, tx, random.key(0)) for m in (MODEL, lift(nn.Linear, 64, 10)))
    with pytest.raises(tree.StructureError, match=r"1\.weight"):
        analysis.stack([one, other])
    with pytest.raises(ValueError, match=r"states must be stacked along one leading axis of members, .* got leading"):
        analysis.population(step)(one, data.digits("test"))
    with pytest.raises(ValueError, match="method must be one of 'auto', 'vmap', 'loop', got 'pmap'"):
        analysis.population(step, method="pmap")
    for active in (torch.tensor([True]), torch.ones(3)):
        with pytest.raises(ValueError, match=r"active must be bool of shape \(3,\), one per member, got torch"):
            analysis.population(step)(a_population(tx), data.digits("test"), active)
    with pytest.raises(ValueError, match=r"members must be in \[0, 3\), got \[3\]"):
        analysis.resample(a_population(tx), torch.tensor([3]))


# --- metagradients -------------------------------------------------------------------------------------------------


def weighted_training(tx, digits, steps=7, size=12):
    """A step that reads weights of samples, a state, batches with indices, and a validation loss."""
    objective = train.supervised(MODEL, losses.cross_entropy)
    inner = train.make_train_step(analysis.weighted(objective), tx)

    def step(state, batch, weights):
        x, y, i = batch
        return inner(state, (x, y, weights[i]))

    params, buffers = MODEL.init(random.key(0), dtype=torch.float64)
    state = train.create_state(MODEL, tx, random.key(0), params=params, buffers=buffers)
    x, y = digits
    places = [torch.arange(i * 5, i * 5 + size) % 30 for i in range(steps)]
    batches = [(x[p], y[p], p) for p in places]

    def validation(state):
        return objective(state.params, state.buffers, (x[100:150], y[100:150]), random.key(0))[0]

    return step, state, batches, validation


METHODS = {
    "sgd": lambda: optim.inject_hyperparams(optim.sgd)(learning_rate=0.1, momentum=0.9),
    "adam": lambda: optim.inject_hyperparams(optim.adam)(learning_rate=1e-2, eps_root=1e-6),
}


@pytest.mark.parametrize("name", METHODS)
def test_metagradient_is_that_of_finite_differences(name, digits):
    tx = METHODS[name]()
    step, state, batches, validation = weighted_training(tx, digits)
    weights = torch.ones(30, dtype=torch.float64)
    result = analysis.metagradient(step, state, batches, validation, meta=weights)

    def trained(state, weights):
        for batch in batches:
            state = step(state, batch, weights)[0]
        return state

    same(result.final, trained(state, weights), rtol=0, atol=0)
    torch.testing.assert_close(result.loss, validation(result.final))
    epsilon = 1e-5
    for i in (0, 7, 29):
        moved = [validation(trained(state, weights.index_add(0, torch.tensor([i]), torch.tensor([s]).double())))
                 for s in (epsilon, -epsilon)]  # fmt: skip
        slope = (moved[0] - moved[1]) / (2 * epsilon)
        torch.testing.assert_close(result.meta[i], slope, rtol=1e-5, atol=1e-9)
    rate = optim.get_hyperparams(state.opt_state)["learning_rate"]
    moved = [
        validation(trained(state._replace(opt_state=optim.set_hyperparams(state.opt_state, learning_rate=rate + s)), weights))
        for s in (epsilon, -epsilon)
    ]  # fmt: skip
    slope = optim.get_hyperparams(result.state.opt_state)["learning_rate"]
    torch.testing.assert_close(slope, (moved[0] - moved[1]) / (2 * epsilon), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("segment", [1, 3, 7, 20])
def test_metagradient_is_the_same_for_every_segment(segment, digits):
    step, state, batches, validation = weighted_training(optim.sgd(0.1), digits)
    weights = torch.ones(30, dtype=torch.float64)
    default = analysis.metagradient(step, state, batches, validation, meta=weights)
    got = analysis.metagradient(step, state, batches, validation, meta=weights, segment=segment)
    same(got, default, rtol=0, atol=0)


def test_metagradient_keeps_a_root_of_the_states():
    """Of 100 steps, no more than 2 * 10 states are alive at a time."""
    import weakref

    alive, most = weakref.WeakSet(), 0

    class Counted:
        pass

    def step(state, batch):
        nonlocal most
        new = state * 0.99 + batch
        if not torch._C._functorch.is_functorch_wrapped_tensor(new):
            new.witness = Counted()
            alive.add(new.witness)
            most = max(most, len(alive))
        return new, {}

    result = analysis.metagradient(step, torch.ones(()), [torch.ones(())] * 100, lambda s: s)
    torch.testing.assert_close(result.state, torch.tensor(0.99**100))
    assert most <= 22


def test_weights_of_one_change_nothing(digits):
    x, y = digits
    for model in (MODEL, models.smallnet(in_channels=1, widths=(2, 3, 4))):
        objective = train.supervised(model, losses.cross_entropy)
        params, buffers = model.init(random.key(0), dtype=torch.float64)
        weights = torch.ones(9, dtype=torch.float64)
        loss, aux = objective(params, buffers, (x[:9], y[:9]), None)
        again, more = analysis.weighted(objective)(params, buffers, (x[:9], y[:9], weights), None)
        torch.testing.assert_close((again, more.buffers), (loss, aux.buffers))


def test_statistics_of_batch_norm_have_derivatives():
    """The loss is that in eval mode: what it owes to the weights goes through the running statistics as well."""
    model = lift(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)))
    tx = optim.inject_hyperparams(optim.sgd)(learning_rate=0.1, momentum=0.9)
    state = train.create_state(model, tx, random.key(0))
    state = tree.map(lambda x: x.double() if x.is_floating_point() else x, state)
    inner = train.make_train_step(analysis.weighted(train.supervised(model, losses.cross_entropy)), tx)
    x, y = random.normal(random.key(1), (8, 3), dtype=torch.float64), torch.arange(8) % 2

    def step(state, batch, weights):
        return inner(state, (*batch, weights))

    def validation(state):
        return losses.cross_entropy(model.apply(state.params, state.buffers, x)[0], y.flip(0))

    def trained(weights):
        end = state
        for _ in range(4):
            end, _ = step(end, (x, y), weights)
        return validation(end)

    ones = torch.ones(8, dtype=torch.float64)
    told = analysis.metagradient(step, state, [(x, y)] * 4, validation, meta=ones)
    moves = 1e-6 * torch.eye(8, dtype=torch.float64)
    slopes = torch.stack([(trained(ones + move) - trained(ones - move)) / 2e-6 for move in moves])
    torch.testing.assert_close(told.meta, slopes, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(told.loss, trained(ones))


def test_what_has_no_metagradient_is_told(digits):
    step, state, batches, validation = weighted_training(optim.sgd(0.1), digits)
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        analysis.metagradient(step, state, [], validation)
    with pytest.raises(ValueError, match=r"meta must hold floating tensors, what is at .* is none"):
        analysis.metagradient(step, state, batches, validation, meta={"w": torch.ones(3, dtype=torch.int64)})
    with pytest.raises(ValueError, match="segment must be at least 1, got 0"):
        analysis.metagradient(step, state, batches, validation, meta=torch.ones(30), segment=0)
    draws = iter(range(100))
    with pytest.raises(RuntimeError, match="step must be a deterministic function"):
        analysis.metagradient(lambda s, b: (s + next(draws), {}), torch.zeros(()), batches, lambda s: s)
    objective = analysis.weighted(train.supervised(MODEL, losses.cross_entropy))
    with pytest.raises(ValueError, match=r"a batch must end with a weight per sample, got shape \(\)"):
        objective(state.params, {}, (*batches[0][:2], torch.ones(())), None)


def test_datamodeling_score_is_a_rank_correlation():
    scores, subsets = torch.randn(20), torch.bernoulli(torch.full((50, 20), 0.5))
    outcomes = (subsets @ scores).exp()
    assert analysis.datamodeling_score(scores, subsets, outcomes) == pytest.approx(1)
    assert analysis.datamodeling_score(-scores, subsets, outcomes) == pytest.approx(-1)
    tied = analysis.datamodeling_score(torch.tensor([1.0, 1, 2, 3]), torch.eye(4), torch.tensor([1.0, 2, 2, 4]))
    assert tied == pytest.approx(5 / 6)  # of the ranks 1.5, 1.5, 3, 4 and 1, 2.5, 2.5, 4
    assert analysis.datamodeling_score(torch.zeros(3), torch.eye(3), torch.arange(3.0)).isnan()
    with pytest.raises(ValueError, match=r"outcomes must have shape \(50,\)"):
        analysis.datamodeling_score(scores, subsets, outcomes[:3])


# --- landscapes ----------------------------------------------------------------------------------------------------


def test_landscape_has_the_loss_in_its_middle(digits):
    objective = train.supervised(MODEL, losses.cross_entropy)
    params, buffers = MODEL.init(random.key(0), dtype=torch.float64)
    batch = digits[0][:20], digits[1][:20]
    plane = analysis.loss_landscape(objective, params, buffers, batch, key=random.key(1), points=5, extent=0.5)
    assert plane.losses.shape == (5, 5)
    torch.testing.assert_close(plane.losses[2, 2], objective(params, buffers, batch, None)[0])
    moved = tree.map(lambda p, a, b: p + plane.places[4] * a + plane.places[0] * b, params, *plane.directions)
    torch.testing.assert_close(plane.losses[4, 0], objective(moved, buffers, batch, None)[0])
    for direction in plane.directions:
        torch.testing.assert_close(direction["1.weight"].norm(dim=1), params["1.weight"].norm(dim=1))
        assert not direction["1.bias"].any()
    line = analysis.loss_landscape(objective, params, buffers, batch, key=random.key(1), dims=1, points=3)
    assert line.losses.shape == (3,)
    with pytest.raises(ValueError, match="dims must be 1 or 2, got 3"):
        analysis.loss_landscape(objective, params, buffers, batch, key=random.key(1), dims=3)


def test_interpolation_with_statistics_of_every_place():
    model = models.smallnet(in_channels=1, widths=(2, 3, 4))
    objective = analysis.in_eval_mode(train.supervised(model, losses.cross_entropy))
    (a, buffers), (b, _) = (model.init(random.key(seed)) for seed in (0, 1))
    x, y = data.digits("test")
    way = analysis.interpolation(objective, a, b, buffers, (x, y), points=3, recalibrate=model)
    middle = tree.map(lambda p, q: (p + q) / 2, a, b)
    calibrated = analysis.calibrate(model, middle, buffers, x)
    torch.testing.assert_close(way.losses[1], objective(middle, calibrated, (x, y))[0])
    torch.testing.assert_close(way.losses[2], objective(b, analysis.calibrate(model, b, buffers, x), (x, y))[0])


# --- attributions --------------------------------------------------------------------------------------------------


def test_integrated_gradients_sum_to_the_difference(digits):
    params, buffers = MODEL.init(random.key(0), dtype=torch.float64)
    x = digits[0][:3]
    labels = torch.tensor([1, 2, 3])
    shares = analysis.integrated_gradients(MODEL, params, buffers, x, labels=labels, baseline=0.1, steps=64)
    score = lambda x: MODEL.apply(params, buffers, x)[0][range(3), labels]  # noqa: E731
    torch.testing.assert_close(shares.sum((1, 2, 3)), score(x) - score(torch.full_like(x, 0.1)), rtol=1e-3, atol=1e-4)
    slopes = analysis.input_gradients(MODEL, params, buffers, x, labels=labels)
    moved = x.clone()
    moved[:, 0, 3, 3] += 1e-6
    torch.testing.assert_close(slopes[:, 0, 3, 3], (score(moved) - score(x)) / 1e-6, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"labels must be integers of shape \(3,\)"):
        analysis.input_gradients(MODEL, params, buffers, x, labels=labels[:2])


def test_grad_cam_of_a_global_average_is_the_class_activation_map():
    """With a global average and a linear head, the derivative of a map is the head's weight, divided by its places."""
    model = models.smallnet(in_channels=1, widths=(3, 4, 5))
    params, buffers = model.init(random.key(0))
    x = data.digits("test")[0][:4]
    labels = torch.tensor([0, 3, 5, 9])
    got = analysis.grad_cam(model, params, buffers, x, labels=labels, resize=False)
    maps = models.features(model, [-1]).apply(params, buffers, x)[0][-1]
    weights = params["head.weight"][labels] / maps[0, 0].numel()
    torch.testing.assert_close(got, torch.einsum("nc,nchw->nhw", weights, maps).relu(), rtol=1e-4, atol=1e-6)
    assert analysis.grad_cam(model, params, buffers, x).shape == (4, 8, 8)
    same_layer = analysis.grad_cam(model, params, buffers, x, layer="features", labels=labels, resize=False)
    torch.testing.assert_close(same_layer, got)
    with pytest.raises(ValueError, match=r"layer must be a stage or one of .*'head', got 'nowhere'"):
        analysis.grad_cam(model, params, buffers, x, layer="nowhere")
