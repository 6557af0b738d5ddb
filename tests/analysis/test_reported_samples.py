"""What people report as faults of other libraries, of single samples: here the right value, or an error that says what to do."""

import functools

import pytest
import torch
import torch.nn.functional as F
from helpers import draw
from torch import nn

from holofunc import analysis, lift, losses, random, train, tree
from holofunc.train import Aux


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


MLP, LABELS = lift(mlp), torch.arange(4) % 3


def in_eval(model):
    def objective(params, buffers, batch, key):
        out, buffers = model.apply(params, buffers, batch[0])
        return losses.cross_entropy(out, batch[1]), Aux(buffers, {}, out)

    return objective


def same(a, b, rtol=1e-8, atol=1e-10):
    torch.testing.assert_close(tree.leaves(a), tree.leaves(b), rtol=rtol, atol=atol)


# --- norms of gradients --------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A head on what ``forward`` makes of its images."""

    def __init__(self, parts, forward, features=4):
        super().__init__()
        self.parts = nn.ModuleDict({name: build() for name, build in parts.items()})
        self.head, self.run = nn.Linear(features, 3), forward

    def forward(self, x):
        return self.head(self.run(self.parts, x))


def tied():
    net = Net(
        {"table": lambda: nn.Embedding(9, 4), "back": lambda: nn.Linear(4, 9, bias=False)},
        lambda parts, x: parts["back"](parts["table"]((x.flatten(1)[:, :6].abs() * 4).long() % 9).mean(1).tanh()),
        9,
    )
    net.parts["back"].weight = net.parts["table"].weight
    return net


NETS = {
    "tied weights": tied,
    "a weight and its transpose": lambda: Net(
        {"a": lambda: nn.Linear(5, 4, bias=False)},
        lambda parts, x: parts["a"](F.linear(parts["a"](x[:, 0, 0]).tanh(), parts["a"].weight.T)),
    ),
    "a convolution twice": lambda: Net(
        {"a": lambda: nn.Conv2d(3, 3, 3, padding=1)}, lambda parts, x: parts["a"](parts["a"](x).tanh()).mean((2, 3)), 3
    ),
    "without an axis of samples": lambda: Net(
        {"a": lambda: nn.Conv2d(3, 4, 3), "b": lambda: nn.ConvTranspose2d(4, 4, 2, stride=2)},
        lambda parts, x: parts["b"](parts["a"](x[0]).tanh())[None].tanh().mean((2, 3)),
    ),
    "a map over samples within": lambda: Net(
        {"a": lambda: nn.Linear(5, 4)}, lambda parts, x: torch.vmap(lambda row: parts["a"](row).tanh().sum((0, 1)))(x)
    ),
    "frames folded into samples": lambda: Net(
        {"a": lambda: nn.Conv2d(1, 4, 3)},
        lambda parts, x: parts["a"](x.flatten(0, 1)[:, None]).tanh().mean((2, 3)).view(len(x), 3, 4).sum(1),
    ),
    "wide convolutions": lambda: Net(
        {"a": lambda: nn.Conv2d(3, 32, 1), "b": lambda: nn.Conv2d(32, 40, (3, 2), dilation=(1, 2), padding=(2, 1), groups=2)},
        lambda parts, x: parts["b"](F.interpolate(parts["a"](x).tanh(), scale_factor=4)).tanh().mean((2, 3)),
        40,
    ),
    "wide convolutions backwards": lambda: Net(
        {"a": lambda: nn.Conv2d(3, 16, 1), "b": lambda: nn.ConvTranspose2d(16, 20, 3, padding=1)},
        lambda parts, x: parts["b"](F.interpolate(parts["a"](x).tanh(), scale_factor=3)).tanh().mean((2, 3)),
        20,
    ),
    "wide convolutions of folded samples": lambda: Net(
        {"a": lambda: nn.Conv1d(3, 16, 1), "b": lambda: nn.Conv1d(16, 20, 3, padding="same")},
        lambda parts, x: parts["b"](parts["a"](x.transpose(1, 2).flatten(0, 1).repeat(1, 1, 8)).tanh()).tanh().mean(2)
        .view(len(x), 5, 20).sum(1),
        20,
    ),
    "Fourier transforms": lambda: Net(
        {"a": lambda: nn.Linear(5, 6)}, lambda parts, x: torch.fft.rfft(parts["a"](x[:, 0, 0])).abs()
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_norms_are_those_of_a_loop(name):
    model = lift(NETS[name])
    params, buffers = model.init(random.key(0), dtype=torch.float64)
    objective, x = in_eval(model), draw(4, 3, 5, 5)
    gradient = torch.func.grad(lambda p, i: objective(p, buffers, (x[[i]], LABELS[[i]]), None)[0])
    expected = torch.stack([tree.global_norm(gradient(params, i)) for i in range(4)])
    for images in (x, x.to(memory_format=torch.channels_last), torch.cat([x, x], 3)[..., :5]):
        same(analysis.per_sample_grad_norms(objective, params, buffers, (images, LABELS)), expected)


def test_parameters_of_several_types():
    params, buffers = MLP.init(random.key(0))
    params = {n: p.bfloat16() if n.startswith("0") else p for n, p in params.items()}
    batch, state = (draw(4, 4).float(), LABELS), random.key(1)

    def objective(params, buffers, batch, key):
        return in_eval(MLP)({n: p.float() for n, p in params.items()}, buffers, batch, key)

    exact = analysis.influence(objective, params, buffers, batch, batch)
    projected = analysis.influence(objective, params, buffers, batch, batch, projection=4096, key=state)
    torch.testing.assert_close(projected, exact.float(), rtol=0.2, atol=0.2 * float(exact.abs().max()))
    assert analysis.hessian_trace(objective, params, buffers, batch, key=state).isfinite()


def test_parameters_that_are_not_real_are_told():
    params, batch = {"w": torch.ones(3, dtype=torch.complex64)}, torch.ones(2, 3)
    loss = lambda params, buffers, batch, key: ((batch * params["w"]).abs().mean(), None)  # noqa: E731
    for ask in (
        lambda: analysis.per_sample_grads(loss, params, {}, batch),
        lambda: analysis.hvp(loss, params, {}, batch, params),
        lambda: analysis.hessian_eigenvalues(loss, params, {}, batch, k=1, key=random.key(0)),
        lambda: analysis.sharpness(loss, params, {}, batch),
    ):
        with pytest.raises(TypeError, match=r"params must hold real floating tensors, got torch.complex64 at 'w'"):
            ask()


@pytest.mark.filterwarnings("ignore:.*performance drop")
@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Net({"a": lambda: nn.GRUCell(5, 4)}, lambda p, x: p["a"](x[:, 0, 0])), "as torch's cells do without"),
        (
            lambda: Net(
                {"a": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1)},
                lambda p, x: p["a"](x[:, 0, :, :4], src_key_padding_mask=torch.arange(5).expand(len(x), -1) > 3).mean(
                    1
                ),
            ),
            "build it with enable_nested_tensor=False",
        ),
    ],
)
def test_what_torch_cannot_map_is_told(build, said):
    model = lift(build)
    state = model.init(random.key(0), dtype=torch.float64)
    with pytest.raises(ValueError, match=said):
        analysis.per_sample_grad_norms(in_eval(model), *state, (draw(4, 3, 5, 5), LABELS))


# --- losses --------------------------------------------------------------------------------------------------------


def test_ignored_labels_have_no_scores_and_are_not_suspicious():
    params, buffers = MLP.init(random.key(0))
    images, labels = draw(4, 4).float(), torch.tensor([0, -100, 2, 1])
    objective = train.supervised(MLP, losses.cross_entropy)
    stats = analysis.per_sample_losses(objective, params, buffers, (images, labels))
    assert stats["loss"][1] == 0
    for name in ("probability", "margin", "el2n"):
        assert stats[name].isnan().tolist() == [False, True, False, False]
        assert analysis.top_losses(stats, 4, by=name)["index"][-1] == 1
        assert analysis.top_losses(stats, 4, by=name, largest=False)["index"][-1] == 1
    assert stats["entropy"].isfinite().all()
    norms = analysis.per_sample_grad_norms(analysis.in_eval_mode(objective), params, buffers, (images, labels))
    assert (norms == 0).tolist() == [False, True, False, False]
    broken = {"loss": torch.tensor([1.0, torch.nan, 2.0])}
    assert analysis.top_losses(broken, 3)["index"].tolist() == [1, 2, 0]


def test_images_without_a_counted_pixel_have_no_scores():
    model = lift(nn.Conv2d, 3, 3, 1)
    labels = torch.arange(25).view(1, 5, 5).repeat(2, 1, 1) % 3
    labels[1] = -100
    batch = draw(2, 3, 5, 5).float(), labels
    objective = train.supervised(model, losses.cross_entropy)
    stats = analysis.per_sample_losses(objective, *model.init(random.key(0)), batch)
    assert all(stats[name].isnan().tolist() == [False, True] for name in ("iou", "probability", "margin"))


def test_numbers_that_are_no_probabilities_have_no_scores():
    model = lift(nn.Linear, 4, 1)
    objective = train.supervised(model, lambda out, target: (out - target).square().mean())
    batch = draw(3, 4).float(), torch.tensor([[0.0], [7.0], [1.0]])
    stats = analysis.per_sample_losses(objective, *model.init(random.key(0)), batch)
    assert stats["el2n"].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("labels", [[0, 1, 2, 1], [0, -100, 2, 1]])
def test_weights_of_one_are_the_objective_with_classes_that_count_more(labels):
    weight = torch.tensor([1.0, 5.0, 0.1], dtype=torch.float64)
    objective = train.supervised(MLP, functools.partial(losses.cross_entropy, weight=weight))
    params, buffers = MLP.init(random.key(0), dtype=torch.float64)
    batch, ones = (draw(4, 4), torch.tensor(labels)), torch.ones(4, dtype=torch.float64)
    expected, aux = objective(params, buffers, batch, None)
    loss, more = analysis.weighted(objective)(params, buffers, (*batch, ones), None)
    same((loss, more.weight), (expected, aux.weight))
    without = batch[0][[0, 2, 3]], batch[1][[0, 2, 3]]
    rest = objective(params, buffers, without, None)
    left = analysis.weighted(objective)(params, buffers, (*batch, torch.tensor([1.0, 0, 1, 1]).double()), None)[0]
    same(left * aux.weight, rest[0] * rest[1].weight)


def test_a_loss_that_draws_draws_in_every_question():
    def loss(out, target, *, key=None):
        scale = 1.0 if key is None else 1 + random.uniform(key, (), dtype=torch.float64)
        return scale * losses.cross_entropy(out, target)

    model = lift(nn.Linear, 4, 3)
    params, buffers = model.init(random.key(0), dtype=torch.float64)
    objective, key, batch = train.supervised(model, loss), random.key(5), (draw(4, 4), LABELS)
    product = analysis.hvp(objective, params, buffers, batch, params, key=key)
    same(analysis.hvp(objective, params, buffers, batch, params, key=key, kind="ggn"), product)  # of a linear model
    plain = analysis.hvp(objective, params, buffers, batch, params, kind="ggn")
    assert not torch.allclose(plain["weight"], product["weight"])


def test_estimates_of_a_model_that_draws():
    model = lift(lambda: nn.Sequential(nn.Linear(4, 20), nn.Dropout(0.5), nn.Linear(20, 3)))
    params, buffers = model.init(random.key(0), dtype=torch.float64)
    objective, key, batch = train.supervised(model, losses.cross_entropy), random.key(5), (draw(4, 4), LABELS)
    state = objective, params, buffers, batch
    fixed = lambda p, b, x, _: objective(p, b, x, key)  # noqa: E731
    same(analysis.hessian_trace(*state, key=key), analysis.hessian_trace(fixed, *state[1:], key=key))
    found = analysis.hessian_eigenvalues(*state, k=1, key=key).values
    same(found, analysis.hessian_eigenvalues(fixed, *state[1:], k=1, key=key).values)
    landscape = analysis.loss_landscape(*state, key=key, points=3)
    same(landscape.losses[1, 1], objective(params, buffers, batch, key)[0])
    norms = analysis.per_sample_grad_norms(*state, key=key)
    same(analysis.self_influence(*state, key=key), norms.square())
    assert analysis.influence(*state, batch, projection=8, key=key).shape == (4, 4)


def test_batches_that_are_dicts():
    params, buffers = MLP.init(random.key(0), dtype=torch.float64)
    batch = {"image": draw(4, 4), "label": LABELS}

    def objective(params, buffers, batch, key):
        return losses.cross_entropy(MLP.apply(params, buffers, batch["image"])[0], batch["label"]), None

    stats = analysis.score_dataset(objective, params, buffers, [(batch, torch.tensor([3, 1, 0, 2]))])
    each = analysis.per_sample_losses(objective, params, buffers, batch)["loss"]
    same(stats["loss"], each[[2, 1, 3, 0]])
    weights = torch.tensor([1.0, 0, 2, 0], dtype=torch.float64)
    same(analysis.weighted(objective)(params, buffers, (batch, weights), None)[0], (weights * each).mean())
