"""Draws of a forward pass: each call has a key of its own, in every mode and under every transformation."""

import random as python_random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from holofunc import jit, lift, random
from holofunc.model import Drop, site_key


class Calls(nn.Module):
    """A forward made of one function."""

    def __init__(self, function, modules=()):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)

    def forward(self, *inputs):
        return self.function(*inputs, *self.parts)


def model_of(function, *modules):
    return lift(Calls, function, list(modules))


def drawn(function, x, seed=0, *modules):
    model = model_of(function, *modules)
    params, buffers = model.init(random.key(3))
    return model.apply(params, buffers, x, train=True, key=random.key(seed))[0]


X = torch.linspace(-2, 2, 4000).view(2, 10, 10, 20)

DRAWS = {
    "F.dropout": lambda x: F.dropout(x, 0.3),
    "F.dropout in place": lambda x: F.dropout(x.clone(), 0.3, inplace=True),
    "torch.dropout": lambda x: torch.dropout(x, 0.3, True),
    "F.dropout1d": lambda x: F.dropout1d(x[0], 0.3),
    "F.dropout2d": lambda x: F.dropout2d(x, 0.3),
    "F.dropout3d": lambda x: F.dropout3d(x, 0.3),
    "F.alpha_dropout": lambda x: F.alpha_dropout(x, 0.3, True),
    "F.feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x, 0.3, True),
    "F.rrelu": lambda x: F.rrelu(x, training=True),
    "F.gumbel_softmax": lambda x: F.gumbel_softmax(x, hard=True),
    "F.fractional_max_pool2d": lambda x: F.fractional_max_pool2d(x, 2, output_size=5),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.3),
    "torch.rand": lambda x: x + torch.rand(10, 20),
    "torch.rand of a shape": lambda x: x + torch.rand(x.shape, dtype=x.dtype, device=x.device),
    "torch.randn": lambda x: x + torch.randn(size=(10, 20)),
    "torch.rand_like": lambda x: x + torch.rand_like(x),
    "torch.randn_like": lambda x: x + torch.randn_like(x),
    "torch.randint": lambda x: x + torch.randint(5, (20,)),
    "torch.randint by name": lambda x: x + torch.randint(low=2, high=9, size=(20,)),
    "torch.randint_like": lambda x: x + torch.randint_like(x, 7),
    "torch.randperm": lambda x: x[..., torch.randperm(20)],
    "torch.normal": lambda x: torch.normal(x, 2.0),
    "torch.normal of a size": lambda x: x + torch.normal(0.0, 1.0, (20,)),
    "torch.bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "bernoulli": lambda x: x.bernoulli(0.4),
    "torch.multinomial": lambda x: torch.multinomial(x[0, 0].exp(), 3),
    "torch.multinomial, replaced": lambda x: torch.multinomial(x[0, 0].exp(), 30, replacement=True),
    "bernoulli_": lambda x: x * torch.empty(2, 1, 1, 1).bernoulli_(0.5),
    "uniform_": lambda x: x + x.new_empty(20).uniform_(-1, to=1),
    "normal_": lambda x: x + x.new_empty(20).normal_(std=2.0),
    "random_": lambda x: x + x.new_empty(20).random_(0, 9),
    "exponential_": lambda x: x + torch.empty_like(x).exponential_(2.0),
    "cauchy_": lambda x: x + torch.empty_like(x).cauchy_(),
    "log_normal_": lambda x: x + torch.empty_like(x).log_normal_(),
    "geometric_": lambda x: x + torch.empty_like(x).geometric_(0.3),
    "nn.init": lambda x: x + nn.init.normal_(torch.empty(20)),
    "distributions": lambda x: torch.distributions.Normal(x, 1.0).rsample(),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWS)
def test_a_call_draws_from_its_key_and_from_nothing_else(name):
    before = torch.get_rng_state()
    once, again, other = (drawn(DRAWS[name], X, seed) for seed in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert torch.equal(before, torch.get_rng_state())
    assert once.isfinite().all()


NOISE = {  # mean and standard deviation of what a tensor is filled with
    "uniform_": (lambda x: x.uniform_(-1, 3), 1.0, 4 / 12**0.5),
    "normal_": (lambda x: x.normal_(2.0, 3.0), 2.0, 3.0),
    "bernoulli_": (lambda x: x.bernoulli_(0.3), 0.3, 0.21**0.5),
    "exponential_": (lambda x: x.exponential_(2.0), 0.5, 0.5),
    "log_normal_": (lambda x: x.log_normal_(0.0, 0.5), 1.1331, 0.6039),
    "geometric_": (lambda x: x.geometric_(0.25), 4.0, 12**0.5),
    "random_": (lambda x: x.random_(2, 12), 6.5, (99 / 12) ** 0.5),
    "randint": (lambda x: torch.randint(2, 12, x.shape).float(), 6.5, (99 / 12) ** 0.5),
    "randn": (lambda x: torch.randn(x.shape), 0.0, 1.0),
    "rand": (lambda x: torch.rand(x.shape), 0.5, 1 / 12**0.5),
    "normal": (lambda x: torch.normal(torch.full_like(x, 2.0), 3.0), 2.0, 3.0),
    "gumbel": (lambda x: F.gumbel_softmax(torch.tensor([0.75, 0.25]).log().expand(len(x), 2), hard=True)[:, 0], 0.75, 0.1875**0.5),
    "multinomial": (lambda x: torch.multinomial(torch.tensor([0.2, 0.0, 0.8]), len(x), True).float(), 1.6, 0.8),
    "alpha dropout": (lambda x: F.alpha_dropout(drawn(torch.randn_like, x, 9), 0.4, True), 0.0, 1.0),
    "rrelu": (lambda x: F.rrelu(-torch.ones_like(x), 0.1, 0.5, True), -0.3, 0.4 / 12**0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", NOISE)
def test_draws_are_distributed_as_torchs(name):
    function, mean, std = NOISE[name]
    values = drawn(function, torch.empty(40000), 5)
    assert float(values.mean()) == pytest.approx(mean, abs=4 * std / 200)
    assert float(values.std()) == pytest.approx(std, rel=0.03)


def test_multinomial_without_replacement_draws_each_once_and_never_what_has_no_weight():
    weights = torch.tensor([[1.0, 0.0, 2.0, 3.0]]).expand(500, 4)
    picks = drawn(lambda w: torch.multinomial(w, 3), weights)
    assert picks.sort(1).values.unique(dim=0).tolist() == [[0, 2, 3]]
    assert float((picks[:, 0] == 3).float().mean()) == pytest.approx(0.5, abs=0.08)


# --- sites -------------------------------------------------------------------------------------------------------


def test_a_layer_called_twice_draws_twice():
    twice = drawn(lambda x, d: d(d(x)), torch.ones(100_000), 1, nn.Dropout(0.5))
    assert float((twice > 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert twice.unique().tolist() == [0.0, 4.0]
    ours = drawn(lambda x, d: d(d(x)), torch.ones(100_000), 1, Drop(0.5))
    assert torch.equal(twice, ours)


def test_one_layer_at_two_places_draws_twice():
    shared = nn.Dropout(0.5)
    model = lift(lambda: nn.Sequential(nn.Identity(), shared, nn.Identity(), shared))
    out = model.apply({}, {}, torch.ones(100_000), train=True, key=random.key(0))[0]
    assert float((out > 0).float().mean()) == pytest.approx(0.25, abs=0.01)


def test_modules_and_functions_of_one_site_draw_alike():
    """Dropout in a forward, stock, ours, and torchvision's: the same elements are kept."""
    torchvision = pytest.importorskip("torchvision")
    x, key = torch.ones(64, 8), random.key(2)
    outs = [
        lift(build).apply({}, {}, x, train=True, key=key)[0]
        for build in (lambda: Drop(0.5, 1), lambda: torchvision.ops.StochasticDepth(0.5, "row"))
    ]
    assert torch.equal(*outs)
    outs = [
        lift(build).apply({}, {}, x, train=True, key=key)[0] for build in (lambda: Drop(0.5), lambda: nn.Dropout(0.5))
    ]
    assert torch.equal(*outs)


class Gated(nn.Dropout):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return x + 10 * F.dropout(x, self.p, self.training)


def test_a_subclass_of_dropout_keeps_its_forward():
    model = lift(Gated, 0.5)
    assert model.apply({}, {}, torch.ones(64), train=True, key=random.key(0))[0].unique().tolist() == [1.0, 21.0]
    assert model.apply({}, {}, torch.ones(3))[0].tolist() == [11.0] * 3


def test_draws_in_eval_mode_are_keyed_too():
    model = model_of(lambda x: F.dropout(x, 0.5))  # training=True is its default
    with pytest.raises(ValueError, match="Calls draws random numbers: key must be given, got None"):
        model.apply({}, {}, X)
    once, again = (model.apply({}, {}, X, key=random.key(0))[0] for _ in range(2))
    assert torch.equal(once, again)


def test_a_missing_key_names_the_part():
    model = lift(lambda: nn.Sequential(nn.Identity(), nn.Dropout(0.5)))
    with pytest.raises(ValueError, match="Sequential draws random numbers in 1: key must be given, got None"):
        model.apply({}, {}, X, train=True)


# --- attention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"attn_mask": torch.ones(5, 5).tril().bool()}, {"is_causal": True}, {"scale": 0.3}]
)
def test_attention_without_dropped_weights_is_torchs(options):
    q, k, v = random.normal(random.key(0), (3, 2, 4, 5, 8)).double().unbind()
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    rare = model_of(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=1e-9, **options))
    torch.testing.assert_close(rare.apply({}, {}, q, k, v, key=random.key(0))[0], expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True},
        {"bias": False, "kdim": 8, "vdim": 8},
        {"add_bias_kv": True, "add_zero_attn": True},
    ],
)
@pytest.mark.parametrize("batched", [True, False])
def test_multi_head_attention_without_dropped_weights_is_torchs(options, batched):
    rare, plain = (lift(nn.MultiheadAttention, 8, 2, dropout=p, **options) for p in (1e-9, 0.0))
    params, buffers = plain.init(random.key(0), dtype=torch.float64)
    x = random.normal(random.key(1), (3, 4, 8) if batched else (4, 8), dtype=torch.float64)
    for average in (True, False):
        got, want = (
            m.apply(params, buffers, x, x, x, train=True, key=random.key(2), average_attn_weights=average)[0]
            for m in (rare, plain)
        )
        torch.testing.assert_close(got, want)
    dropped = lift(nn.MultiheadAttention, 8, 2, dropout=0.5, **options)
    a, b, c = (dropped.apply(params, buffers, x, x, x, train=True, key=random.key(s))[0][0] for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


# --- recurrence --------------------------------------------------------------------------------------------------

RECURRENT = {
    "LSTM": lambda **options: nn.LSTM(4, 6, 2, **options),
    "LSTM, both ways": lambda **options: nn.LSTM(4, 6, 2, bidirectional=True, batch_first=True, **options),
    "LSTM, projected": lambda **options: nn.LSTM(4, 6, 2, proj_size=3, bias=False, **options),
    "GRU": lambda **options: nn.GRU(4, 6, 3, bidirectional=True, **options),
    "RNN": lambda **options: nn.RNN(4, 6, 2, batch_first=True, **options),
    "RNN, relu": lambda **options: nn.RNN(4, 6, 2, nonlinearity="relu", bias=False, **options),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_networks_without_dropped_elements_are_torchs(name):
    plain, rare, dropped = (lift(RECURRENT[name], dropout=p) for p in (0.0, 1e-9, 0.5))
    params, buffers = plain.init(random.key(0), dtype=torch.float64)
    x, key = random.normal(random.key(1), (3, 5, 4), dtype=torch.float64), random.key(2)
    wanted = plain.apply(params, buffers, x)[0]
    torch.testing.assert_close(rare.apply(params, buffers, x, train=True, key=key)[0], wanted)
    a, b, c = (dropped.apply(params, buffers, x, train=True, key=random.key(s))[0][0] for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # in torch's own forward mode
@pytest.mark.parametrize("name", ["LSTM, both ways", "GRU", "RNN"])
def test_recurrent_networks_have_all_derivatives(name):
    model = lift(RECURRENT[name])
    params, buffers = model.init(random.key(0), dtype=torch.float64)
    x = random.normal(random.key(1), (3, 5, 4), dtype=torch.float64)

    def loss(params, x):
        return model.apply(params, buffers, x)[0][0].square().sum()

    grad = torch.func.grad(loss)(params, x)
    slope = torch.func.jvp(lambda p: loss(p, x), (params,), (grad,))[1]
    torch.testing.assert_close(slope, sum(g.square().sum() for g in grad.values()))
    each = torch.vmap(lambda x: torch.func.grad(loss)(params, x[None]))(x)
    torch.testing.assert_close({n: g[1] for n, g in each.items()}, torch.func.grad(loss)(params, x[1:2]))


# --- transformations ---------------------------------------------------------------------------------------------

VARIED = {
    "torchvision's": lambda x: __import__("torchvision").ops.stochastic_depth(x, 0.5, "row"),
    "F.dropout": lambda x: F.dropout(F.dropout(x, 0.3), 0.3),
    "bernoulli_ of an unmapped tensor": lambda x: x * torch.empty(10, 1, 1).bernoulli_(0.5).div_(0.5),
    "randperm": lambda x: x[..., torch.randperm(20)],
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.3),
}


@pytest.mark.parametrize("name", VARIED)
def test_samples_under_vmap_have_their_own_draws(name):
    model, keys = model_of(VARIED[name]), random.split(random.key(0), 3)
    x = X[:1].expand(3, *X.shape[1:]).contiguous()

    def run(x, key):
        return model.apply({}, {}, x, train=True, key=key)[0]

    mapped = torch.vmap(run)(x, keys)
    for i in range(3):
        torch.testing.assert_close(mapped[i], run(x[i], keys[i]))
    assert not torch.equal(mapped[0], mapped[1])


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # in torch's own forward mode
def test_derivatives_go_through_draws():
    model, key = lift(lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.RReLU())), random.key(1)
    params, buffers = model.init(random.key(0), dtype=torch.float64)
    x = random.normal(random.key(2), (3, 4), dtype=torch.float64)

    def loss(params):
        return model.apply(params, buffers, x, train=True, key=key)[0].square().sum()

    grads = torch.func.grad(loss)(params)
    ones = {n: torch.ones_like(p) for n, p in params.items()}
    _, slope = torch.func.jvp(loss, (params,), (ones,))
    torch.testing.assert_close(slope, sum(g.sum() for g in grads.values()))


ATTENTION = {
    "function": lambda x, attention: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "layer": lambda x, attention: attention(x, x, x, need_weights=False)[0],
    "layer with weights": lambda x, attention: attention(x, x, x)[0],
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # in torch's own forward mode
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_has_forward_derivatives(name, train):
    """Torch's fused kernels have none, and are not taken where one is asked for."""
    model = model_of(ATTENTION[name], nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True))
    params, buffers = model.init(random.key(0), dtype=torch.float64)
    x = random.normal(random.key(1), (2, 5, 8), dtype=torch.float64)

    def loss(x):
        return model.apply(params, buffers, x, train=train, key=random.key(2))[0].square().sum()

    grad = torch.func.grad(loss)(x)
    torch.testing.assert_close(torch.func.jvp(loss, (x,), (grad,))[1], grad.square().sum())


def called(x, drop, attention):
    return x + torch.rand(4) + drop(drop(x)) + F.dropout(x, 0.3) + torch.randperm(4)


def attended(x, drop, attention):
    return attention(x, x, x)[0] + F.scaled_dot_product_attention(x, x, x, dropout_p=0.3)


@pytest.mark.parametrize("forward", [called, pytest.param(attended, marks=pytest.mark.slow)])
def test_jit_and_dynamo_draw_what_eager_code_draws(forward):
    model = model_of(forward, nn.Dropout(0.5), nn.MultiheadAttention(4, 2, dropout=0.2, batch_first=True))
    params, buffers = model.init(random.key(0))
    x = random.normal(random.key(1), (2, 3, 4))

    def run(params, x, key):
        return model.apply(params, buffers, x, train=True, key=key)[0]

    compiled = torch.compile(run, backend="eager", fullgraph=True)(params, x, random.key(5))
    jitted = jit(run)(params, x, random.key(5))
    expected = run(params, x, random.key(5))  # last: nothing has been proved before
    torch.testing.assert_close(jitted, expected)
    if torch.__version__ >= (2, 14):  # Dynamo of 2.11 does not hand torch.rand to function modes
        torch.testing.assert_close(compiled, expected)


# --- what is refused ---------------------------------------------------------------------------------------------


REFUSED = {
    "calls torch.poisson, for which there is no draw by a key": lambda x: torch.poisson(x.exp()),
    "draws from a generator of its own": lambda x: x + torch.rand(20, generator=torch.Generator()),
    "draws from torch's global generator, which no key reaches": lambda x: (
        x + torch.distributions.Gamma(x.exp(), 1.0).sample()
    ),
    "draws from Python's global generator": lambda x: x * python_random.random(),
    "draws from NumPy's global generator": lambda x: x * float(np.random.rand()),  # noqa: NPY002
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_no_key_reaches_is_refused_by_the_name_of_the_part(message):
    model = lift(lambda: nn.Sequential(nn.Identity(), Calls(REFUSED[message])))
    with pytest.raises(ValueError, match=f"Sequential cannot be a pure function: 1 {message}.* Workaround: "):
        model.apply({}, {}, X, train=True, key=random.key(0))


def test_dropout_of_packed_sequences_is_refused():
    model = model_of(
        lambda x, gru: gru(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 2]))), nn.GRU(4, 4, 2, dropout=0.1)
    )
    params, buffers = model.init(random.key(0))
    x = torch.zeros(3, 2, 4)
    assert model.apply(params, buffers, x)[0][0].data.shape == (5, 4)
    with pytest.raises(
        ValueError, match=r"Calls cannot be .* parts.0 draws dropout=0.1 between the layers of a recurrent network"
    ):
        model.apply(params, buffers, x, train=True, key=random.key(0))


def test_an_ordinary_module_draws_as_ordinary_modules_do():
    class Noise(nn.Module):
        def forward(self, x):
            return x + random.normal(site_key(), x.shape)

    module = lift(Noise).to_module({}, {}).train()
    torch.manual_seed(0)
    first = module(torch.zeros(5))
    torch.manual_seed(0)
    assert torch.equal(first, module(torch.zeros(5)))
    assert not torch.equal(first, module(torch.zeros(5)))
