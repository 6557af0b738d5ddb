"""Keys and draws: known answers, the same bits everywhere, and the distributions they promise."""

import math

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from holofunc import jit, random

DRAWS = {
    "split": lambda key: random.split(key, 3),
    "fold_in": lambda key: random.fold_in(key, torch.tensor(5)),
    "bits": lambda key: random.bits(key, 7),
    "uniform": lambda key: random.uniform(key, (5, 3)),
    "uniform64": lambda key: random.uniform(key, (5,), dtype=torch.float64),
    "uniform16": lambda key: random.uniform(key, (5,), dtype=torch.bfloat16),
    "normal": lambda key: random.normal(key, (7,), mean=1.0, std=2.0),
    "bernoulli": lambda key: random.bernoulli(key, (9,), 0.3),
    "randint": lambda key: random.randint(key, (9,), -3, 12),
    "permutation": lambda key: random.permutation(key, 9),
    "beta": lambda key: random.beta(key, (4,), 0.2, 0.7),
}


def test_philox_gives_the_words_of_the_reference_implementation():
    # Random123's known answer for counter 0 and key 0
    words = random.bits(torch.zeros(2, dtype=torch.int64), 4)
    assert [f"{w:08x}" for w in words.tolist()] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@pytest.mark.parametrize("seed", [0, 42, 2**63 + 5, 2**64 - 1])
def test_draws_are_those_of_torch(seed):
    native = pytest.importorskip("torch.func._random")
    try:
        native.randint(random.key(0).view(torch.uint64), (4,), low=0, high=10)
    except (AttributeError, NotImplementedError, RuntimeError):
        pytest.skip("this torch has no stateless generator for the CPU")
    key = random.key(seed)
    theirs = key.view(torch.uint64)
    assert torch.equal(random.uniform(key, (1001,)), native.uniform(theirs, 1001))
    assert torch.equal(random.uniform(key, (9,), dtype=torch.float64), native.uniform(theirs, 9, dtype=torch.float64))
    assert torch.equal(random.split(key, 5), native.split(theirs, 5).view(torch.int64))
    assert torch.equal(random.fold_in(key, 6), native.fold_in(theirs, 6).view(torch.int64))
    assert torch.equal(random.randint(key, (50,), 0, 10), native.randint(theirs, (50,), low=0, high=10).long())
    torch.testing.assert_close(random.normal(key, (1000,)), native.normal(theirs, 1000), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_has_the_same_bits_in_every_mode(name):
    draw, keys = DRAWS[name], random.split(random.key(3), 4)
    eager = [draw(key) for key in keys]
    assert torch.equal(eager[0], draw(keys[0]))
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(keys[1]), eager[1])
    assert torch.equal(torch.vmap(draw)(keys), torch.stack(eager))


def test_inductor_draws_the_same_bits():
    def draw(key):
        return random.uniform(key, (1000,)), random.normal(key, (1000,)), random.fold_in(key, key.new_tensor(3))

    key = random.key(11)
    for ours, compiled in zip(draw(key), torch.compile(draw, fullgraph=True)(key), strict=True):
        assert torch.equal(ours, compiled)


def test_the_global_generator_is_neither_read_nor_moved():
    before = torch.get_rng_state()
    first = [draw(random.key(1)) for draw in DRAWS.values()]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    second = [draw(random.key(1)) for draw in DRAWS.values()]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_keys_of_a_hundred_thousand_items_are_distinct():
    keys = torch.vmap(lambda i: random.fold_in(random.key(0), i))(torch.arange(100_000))
    assert len(torch.unique(keys, dim=0)) == 100_000


def test_moments_are_those_of_the_distributions():
    n, key = 400_000, random.key(7)

    def close(x, mean, std):
        assert abs(x.double().mean() - mean) < 5 * std / math.sqrt(n)
        assert abs(x.double().std() - std) < 0.01 * std

    close(random.uniform(key, (n,), low=-1, high=3), 1.0, 4 / math.sqrt(12))
    close(random.normal(key, (n,), mean=2.0, std=0.5), 2.0, 0.5)
    close(random.bernoulli(key, (n,), 0.3).float(), 0.3, math.sqrt(0.21))
    for a, b in ((0.2, 0.2), (1.0, 3.0), (5.0, 2.0)):
        variance = a * b / ((a + b) ** 2 * (a + b + 1))
        close(random.beta(key, (n,), a, b), a / (a + b), math.sqrt(variance))


def test_uniform_passes_a_kolmogorov_smirnov_test():
    x = random.uniform(random.key(5), (100_000,)).sort().values.double()
    distance = (x - (torch.arange(len(x)) + 0.5) / len(x)).abs().max()
    assert distance < 1.63 / math.sqrt(len(x))  # 1 % level


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: random.key(1.5), TypeError, r"seed must be an int, got 1.5"),
        (lambda: random.key(-1), ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
        (lambda: random.uniform(torch.zeros(2), (3,)), TypeError, r"key must be an int64 tensor of shape \(2,\)"),
        (lambda: random.uniform(42, (3,)), TypeError, r"key must be an int64 tensor .* got 42"),
        (lambda: random.fold_in(random.key(0), -1), ValueError, r"data must not be negative, got -1"),
        (lambda: random.fold_in(random.key(0), 1.0), TypeError, r"data must be an int or a 0-d integer tensor"),
        (lambda: random.split(random.key(0), 0), ValueError, r"num must be at least 1, got 0"),
        (lambda: random.uniform(random.key(0), (3,), dtype=torch.int64), TypeError, r"dtype must be a floating dtype"),
        (lambda: random.randint(random.key(0), (3,), 5, 5), ValueError, r"high - low must be in"),
        (lambda: random.bernoulli(random.key(0), (3,), 1.5), ValueError, r"p must be in \[0, 1\], got 1.5"),
        (lambda: random.beta(random.key(0), (3,), 0.0, 1.0), ValueError, r"a must be positive, got 0.0"),
        (lambda: random.permutation(random.key(0), -1), ValueError, r"n must not be negative, got -1"),
        (lambda: random.uniform(random.key(0), 3), TypeError, "shape must be a sequence of ints, got 3"),
        (lambda: random.normal(random.key(0), (2.5,)), TypeError, r"shape must be a sequence of ints, got \(2.5,\)"),
        (lambda: random.bernoulli(random.key(0), (-1, -2), 0.5), ValueError, r"negative sizes, got \(-1, -2\)"),
        (lambda: random.beta(random.key(0), (-2,), 1.0, 1.0), ValueError, r"negative sizes, got \(-2,\)"),
        (lambda: random.randint(random.key(0), (-2,), 0, 3), ValueError, r"negative sizes, got \(-2,\)"),
        (lambda: random.randint(random.key(0), (2,), 0.5, 3), TypeError, "low must be an int, got 0.5"),
        (lambda: random.randint(random.key(0), (2,), 0, True), TypeError, "high must be an int, got True"),
        (
            lambda: random.uniform(random.key(0), (2,), low=1.0, high=0.0),
            ValueError,
            "low must not be greater than high",
        ),
        (lambda: random.uniform(random.key(0), (2,), high=math.inf), ValueError, "high must be finite, got inf"),
        (lambda: random.uniform(random.key(0), (2,), low="a"), TypeError, "low must be a number, got 'a'"),
        (lambda: random.normal(random.key(0), (2,), std=-1.0), ValueError, "std must not be negative, got -1.0"),
        (lambda: random.normal(random.key(0), (2,), mean=math.nan), ValueError, "mean must be finite, got nan"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- draws in graphs ---------------------------------------------------------------------------------------------


def draws_of_all_kinds(key, step):
    first, second = random.split(random.fold_in(key, step))
    return (
        random.uniform(first, (300, 300)),
        random.bernoulli(second, (7,), 0.5),
        random.fold_in_each(first, [3, 0, 2**31]),
        torch.func.vmap(lambda item: random.uniform(random.fold_in(first, item), (3,)))(torch.arange(4)),
        torch.func.grad(lambda x: (x * random.uniform(second, (3,))).sum())(torch.ones(3)),
    )


def test_a_jitted_draw_is_one_operation_and_gives_the_same_bits():
    key, step = random.key(7), torch.tensor(5)
    for expected, found in zip(draws_of_all_kinds(key, step), jit(draws_of_all_kinds)(key, step), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    draws = make_fx(lambda key: [random.uniform(item, (n,)) for n, item in enumerate(random.split(key, 20))])(key)
    assert len(draws.graph.nodes) < 20 * 30  # the formula alone has hundreds of operations


KEY = random.key(0)


def test_bounds_may_be_tensors_in_a_graph():
    def fn(high):
        return random.uniform(KEY, (5,), high=high)

    torch.testing.assert_close(jit(fn)(torch.tensor(3.0)), fn(3.0), rtol=0, atol=0)
    torch.testing.assert_close(
        torch.func.grad(lambda h: fn(h).sum())(torch.tensor(3.0)), random.uniform(KEY, (5,)).sum()
    )


@pytest.mark.parametrize("num", [1, 3, 20_000, 70_000])
def test_draws_of_every_size_are_the_beginning_of_one_stream(num):
    key = random.key(3)
    assert torch.equal(random.bits(key, num), random.bits(key, 300_000)[:num])


def test_nothing_can_be_drawn_too():
    keys = random.split(random.key(0), 3)
    assert random.uniform(keys[0], (0, 2)).shape == (0, 2)
    assert torch.vmap(lambda key: random.uniform(key, (0, 2)))(keys).shape == (3, 0, 2)
    assert jit(lambda key: random.normal(key, (0,)))(keys[0]).shape == (0,)
