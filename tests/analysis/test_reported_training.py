"""What people report as faults of other libraries, of curvature and training: here the right value, or an error that says what to do."""

import pytest
import torch
import torch.nn.functional as F
from helpers import draw
from torch import nn

import holofunc
from holofunc import analysis, data, lift, losses, metrics, models, optim, random, train, tree


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


MLP, LABELS = lift(mlp), torch.arange(4) % 3


def same(a, b, rtol=1e-8, atol=1e-10):
    torch.testing.assert_close(tree.leaves(a), tree.leaves(b), rtol=rtol, atol=atol)


# --- curvature -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
def test_products_under_autocast(kind, precision):
    model, (images, labels) = models.smallnet(in_channels=1, widths=(4, 6, 8)), data.digits("test")
    params, buffers = model.init(random.key(0))
    half, full = (train.supervised(model, losses.cross_entropy, precision=p) for p in (precision, "fp32"))
    found, expected = (
        torch.cat([x.flatten() for x in analysis.hvp(o, params, buffers, (images[:8], labels[:8]), params, kind=kind).values()])
        for o in (half, full)
    )  # fmt: skip
    assert torch.cosine_similarity(found, expected, dim=0) > 0.98


def test_products_of_outputs_that_are_not_all_floating():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return {"a": self.a(x), "place": torch.arange(len(x)), "b": self.b(x)}

    model = lift(Named)
    params, buffers = model.init(random.key(0), dtype=torch.float64)
    objective = train.supervised(model, lambda out, y: losses.cross_entropy(out["a"], y) + out["b"].square().mean())
    state = objective, params, buffers, (draw(4, 4), LABELS), params
    same(analysis.hvp(*state, kind="ggn"), analysis.hvp(*state))


def quadratic(*eigenvalues):
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    turned = torch.linalg.qr(draw(len(values), len(values)))[0]
    loss = lambda params, buffers, batch, key: ((turned @ params["w"]).square() @ values / 2, None)  # noqa: E731
    return loss, {"w": torch.ones_like(values)}, {}, torch.zeros(1)


@pytest.mark.parametrize("values", [(3, -2, 0, 0, 0), (-5, -4, -1), (2, 2, 2, 1), (0, 0, 0), (7,)])
@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_eigenvalues_of_matrices_that_are_singular_negative_or_repeat_them(values, which):
    state = quadratic(*map(float, values))
    order = {"largest": lambda x: -x, "smallest": lambda x: x, "magnitude": lambda x: -abs(x)}[which]
    found = analysis.hessian_eigenvalues(*state, k=len(values), key=random.key(0), which=which)
    sizes = [abs(x) for x in values] if which == "magnitude" else values
    got = found.values.abs() if which == "magnitude" else found.values
    same(got, torch.tensor(sorted(sizes, key=order), dtype=torch.float64), atol=1e-9)
    assert found.converged.all()
    trace = analysis.hessian_trace(*state, key=random.key(0), probes=3 * len(values) + 3, method="hutch++")
    same(trace, torch.tensor(float(sum(values)), dtype=torch.float64), atol=1e-9)


def test_eigenvalues_of_what_is_no_number_have_not_converged():
    root = lambda params, buffers, batch, key: (params["w"].sum().sqrt(), None)  # noqa: E731
    found = analysis.hessian_eigenvalues(root, {"w": -torch.ones(3)}, {}, torch.zeros(1), k=1, key=random.key(0))
    assert found.values.isnan().all()
    assert not found.converged.any()


# --- transformations around questions ------------------------------------------------------------------------------

QUESTIONS = {
    "clipped": lambda *s: analysis.clipped_grads(*s, max_norm=0.1),
    "landscape": lambda *s: analysis.loss_landscape(*s, key=random.key(0), points=3).losses,
    "interpolation": lambda o, p, b, x: analysis.interpolation(o, p, tree.map(torch.neg, p), b, x, points=3).losses,
    "eigenvalues": lambda *s: analysis.hessian_eigenvalues(*s, k=2, key=random.key(0)).values,
    "ggn": lambda *s: analysis.hvp(*s, s[1], kind="ggn"),
    "norms": lambda *s: analysis.per_sample_grad_norms(*s),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_answers_have_derivatives_and_are_mapped(name):
    objective, batch = train.supervised(MLP, losses.cross_entropy), (draw(4, 4), LABELS)
    params, buffers = MLP.init(random.key(0), dtype=torch.float64)
    along = tree.map(lambda p: draw(*p.shape, seed=3), params)

    def ask(params):
        return sum(x.sum() for x in tree.leaves(QUESTIONS[name](objective, params, buffers, batch)))

    def moved(step):
        return tree.map(lambda p, v: p + step * v, params, along)

    slope = (ask(moved(1e-5)) - ask(moved(-1e-5))) / 2e-5
    grads = torch.func.grad(ask)(params)
    torch.testing.assert_close(sum((grads[n] * along[n]).sum() for n in grads), slope, rtol=1e-3, atol=1e-6)
    both = torch.vmap(ask)(analysis.stack([params, along]))
    same(both, torch.stack([ask(params), ask(along)]), rtol=1e-6)


def weighing(tx):
    step = train.make_train_step(analysis.weighted(train.supervised(MLP, losses.cross_entropy)), tx)
    x = draw(4, 4).float()
    start = train.create_state(MLP, tx, random.key(0))
    return (
        lambda state, batch, weights: step(state, (*batch, weights)),
        start,
        [(x, LABELS)] * 3,
        lambda state: losses.cross_entropy(MLP.apply(state.params, state.buffers, x)[0], LABELS),
    )


def test_metagradients_are_mapped():
    parts = weighing(optim.sgd(0.1))
    ask = lambda weights: analysis.metagradient(*parts, meta=weights).meta  # noqa: E731
    weights = draw(2, 4).float().abs()
    same(torch.vmap(ask)(weights), torch.stack([ask(w) for w in weights]), rtol=1e-4, atol=1e-6)


def test_metagradients_are_traced():
    def ask(state, weight):
        step = lambda state, target, weight: (state - weight * (state - target), {})  # noqa: E731
        return analysis.metagradient(step, state, [torch.tensor(1.0)] * 3, lambda state: state, meta=weight).meta

    traced = torch.compile(ask, backend="aot_eager", fullgraph=True)
    same(traced(torch.tensor(0.0), torch.tensor(0.5)), torch.tensor(0.75), rtol=1e-6)  # of 1 - (1 - weight)**3


@pytest.mark.parametrize("donate", [False, True])
def test_the_step_of_a_metagradient_may_be_jitted(donate):
    step, *rest = weighing(optim.sgd(0.1))
    expected = analysis.metagradient(step, *rest, meta=torch.ones(4))
    same(analysis.metagradient(holofunc.jit(step, donate=donate), *rest, meta=torch.ones(4)), expected, rtol=0, atol=0)


# --- populations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_a_member_that_is_lost_takes_none_along(method):
    tx, batch = optim.adamw(0.01), (draw(4, 4).float(), LABELS)
    step = train.make_train_step(train.supervised(MLP, losses.cross_entropy), tx)
    states = analysis.create_population(MLP, tx, random.split(random.key(0), 3))
    keep = torch.tensor([1.0, torch.nan, 1.0])
    states = states._replace(params=tree.map(lambda p: p * keep.view(-1, *[1] * (p.ndim - 1)), states.params))
    run = analysis.population(step, method=method)
    new, measured = run(states, batch)
    assert measured["loss"].isnan().tolist() == [False, True, False]
    alone = step(tree.unstack(states)[2], batch)[0]
    same(tree.unstack(new)[2].params, alone.params, rtol=1e-4, atol=1e-6)
    _, named = run(analysis.Population.of(states), batch)
    assert analysis.best_member({n: float(x) for n, x in named.items()}) in (0, 2)
    rest = analysis.resample(new, torch.tensor([0, 2, 2]))
    assert analysis.ensemble(MLP, rest.params, rest.buffers, batch[0]).probabilities.isfinite().all()


def test_batches_and_evaluations_of_another_population_are_told():
    tx = optim.sgd(0.1)
    states = analysis.create_population(MLP, tx, random.split(random.key(0), 3))
    step = train.make_train_step(train.supervised(MLP, losses.cross_entropy), tx)
    two = draw(2, 4, 4).float(), LABELS.expand(2, 4)
    with pytest.raises(ValueError, match=r"batch must hold a batch for each of the 3 members, .* got \[2\]"):
        analysis.population(step, batches="own")(states, two)
    evaluated = analysis.population_eval(train.make_eval_step(MLP, {"accuracy": metrics.accuracy()}), 2)
    with pytest.raises(ValueError, match="members must be those of the population, 3, got 2"):
        train.evaluate(evaluated, analysis.Population.of(states), [(two[0][0], LABELS)])


def test_ensembles_of_maps_and_of_nothing_else():
    model, images = lift(nn.Conv2d, 3, 4, 1), draw(2, 3, 5, 6).float()
    members = analysis.stack([model.init(random.key(seed)) for seed in range(3)])
    told = analysis.ensemble(model, *members, images)
    same(told.probabilities, told.outputs.softmax(2).mean(0), rtol=1e-5, atol=1e-6)
    assert told.prediction.shape == told.disagreement.shape == told.entropy.shape == (2, 5, 6)
    with pytest.raises(ValueError, match="method must be 'vmap' or 'loop', got 'auto'"):
        analysis.ensemble(model, *members, images, method="auto")
    flat = lift(lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)))
    members = analysis.stack([flat.init(random.key(seed)) for seed in range(3)])
    with pytest.raises(ValueError, match=r"must be a classifier with outputs \(N, classes, ...\), got \(4,\)"):
        analysis.ensemble(flat, *members, draw(4, 4).float())


# --- attributions --------------------------------------------------------------------------------------------------


def test_integrated_gradients_of_any_baseline():
    params, buffers = MLP.init(random.key(0))
    x = draw(4, 4).float()
    assert not analysis.integrated_gradients(MLP, params, buffers, x, baseline=x).any()
    score = lambda x: MLP.apply(params, buffers, x)[0].gather(1, LABELS[:, None])[:, 0]  # noqa: E731
    for baseline in (0, x.mean(0), torch.zeros(4, dtype=torch.float64)):
        shares = analysis.integrated_gradients(MLP, params, buffers, x, labels=LABELS, baseline=baseline, steps=100)
        start = torch.as_tensor(baseline, dtype=x.dtype).expand_as(x)
        torch.testing.assert_close(shares.sum(1), score(x) - score(start), rtol=1e-3, atol=1e-4)


def test_grad_cam_of_a_module_called_twice_is_that_of_its_last_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 4, 2), nn.Conv2d(4, 5, 2), nn.Linear(5, 3)
            self.act = nn.ReLU(inplace=True)
            self.unused = nn.Identity()

        def forward(self, x):
            return self.head(self.act(self.b(self.act(self.a(x)))).mean((2, 3)))

    model = lift(Twice)
    params, buffers = model.init(random.key(0), dtype=torch.float64)
    x, labels = draw(2, 3, 5, 5), torch.tensor([0, 2])
    p = params
    maps = F.conv2d(F.conv2d(x, p["a.weight"], p["a.bias"]).relu(), p["b.weight"], p["b.bias"])
    for layer, shown in (("act", maps.relu()), ("b", maps)):
        slopes = (p["head.weight"][labels][:, :, None, None] * ((maps > 0) | (layer == "act")) / 9).mean((2, 3))
        expected = torch.einsum("nc,nchw->nhw", slopes, shown).relu()
        same(analysis.grad_cam(model, params, buffers, x, layer=layer, labels=labels, resize=False), expected)
    with pytest.raises(ValueError, match=r"layer must have maps \(N, C, H, W\) as its output, 'head' in Twice gives"):
        analysis.grad_cam(model, params, buffers, x, layer="head")
    with pytest.raises(ValueError, match=r"'unused' in Twice gives none"):
        analysis.grad_cam(model, params, buffers, x, layer="unused")


def test_attributions_of_what_is_no_classifier_are_told():
    model, x = lift(nn.Conv2d, 3, 4, 1), draw(2, 3, 5, 5).float()
    state = model.init(random.key(0))
    for labels in (None, torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"Conv2d must be a classifier with outputs \(N, classes\), got \(2, 4, 5"):
            analysis.input_gradients(model, *state, x, labels=labels)
    with pytest.raises(ValueError, match=r"labels must be integers of shape \(4,\), got list"):
        analysis.input_gradients(MLP, *MLP.init(random.key(0)), draw(4, 4).float(), labels=[0, 1, 2, 0])
