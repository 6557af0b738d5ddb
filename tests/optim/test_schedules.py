"""Schedules: torch's own curves, one law for all, and what they refuse."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holofunc import optim, random
from holofunc.optim import schedules

SCHEDULES = {
    "constant": schedules.constant(0.3),
    "linear": schedules.linear(0.0, 1.0, 10, begin=2),
    "polynomial": schedules.polynomial(1.0, 0.1, 10, power=2.0),
    "exponential": schedules.exponential(1.0, 0.9, end_value=0.5),
    "cosine": schedules.cosine(1.0, 20, end_value=0.1),
    "warmup_cosine": schedules.warmup_cosine(1.0, 20, 5),
    "one_cycle": schedules.one_cycle(1.0, 20),
    "piecewise": schedules.piecewise(1.0, {5: 0.5, 10: 0.1}),
    "step": schedules.step(1.0, 5),
    "cosine_restarts": schedules.cosine_restarts(1.0, 5, growth=2, decay=0.5),
    "wsd": schedules.wsd(1.0, 20, 5, 5, shape="sqrt"),
    "power_cool": schedules.power_cool(1.0, 20, 5, cooldown_steps=10, init_value=0.1, end_value=0.05),
    "linear_to_zero": schedules.linear_to_zero(1.0, 20, 5),
    "tanh": schedules.tanh(1.0, 20, end_value=0.1),
    "noisy": schedules.noisy(schedules.linear(0.5, 0.1, 20), random.key(3), 0.5),
    "cosine-k": schedules.cosine(1.0, 20, k=1.5),
    "cosine_restarts-limit": schedules.cosine_restarts(1.0, 5, growth=2, limit=2, end_value=0.1),
    "warmup_cosine-cooldown": schedules.warmup_cosine(1.0, 20, 5, init_value=0.1, end_value=0.05, cooldown_steps=4),
    "half_life": schedules.half_life(0.9, 0.999, 20),
    "join": schedules.join([schedules.linear(0.0, 1.0, 5), schedules.cosine(1.0, 10)], [5]),
}
every_schedule = pytest.mark.parametrize("name", SCHEDULES)
S, L = torch.optim.lr_scheduler, 31


def torch_curve(make, base=1.0, **kwargs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base)
    scheduler = make(optimizer, **kwargs)
    values = []
    for _ in range(L):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return torch.tensor(values, dtype=torch.float64)


PAIRS = {
    "constant": (lambda: schedules.constant(1.0), S.ConstantLR, {"factor": 1.0}),
    "linear": (lambda: schedules.linear(0.25, 1.0, 10), S.LinearLR, {"start_factor": 0.25, "total_iters": 10}),
    "polynomial": (
        lambda: schedules.polynomial(1.0, 0.0, 20, power=3.0),
        S.PolynomialLR,
        {"total_iters": 20, "power": 3.0},
    ),
    "exponential": (lambda: schedules.exponential(1.0, 0.9), S.ExponentialLR, {"gamma": 0.9}),
    "cosine": (lambda: schedules.cosine(1.0, 31, end_value=0.1), S.CosineAnnealingLR, {"T_max": 31, "eta_min": 0.1}),
    "step": (lambda: schedules.step(1.0, 7, factor=0.5), S.StepLR, {"step_size": 7, "gamma": 0.5}),
    "piecewise": (
        lambda: schedules.piecewise(1.0, {4: 0.3, 9: 0.3}),
        S.MultiStepLR,
        {"milestones": [4, 9], "gamma": 0.3},
    ),
    "restarts": (
        lambda: schedules.cosine_restarts(1.0, 4, growth=2, end_value=0.1),
        S.CosineAnnealingWarmRestarts,
        {"T_0": 4, "T_mult": 2, "eta_min": 0.1},
    ),
    "restarts-3": (
        lambda: schedules.cosine_restarts(1.0, 2, growth=3),
        S.CosineAnnealingWarmRestarts,
        {"T_0": 2, "T_mult": 3},
    ),
    "one_cycle": (lambda: schedules.one_cycle(1.0, L + 1), S.OneCycleLR, {"max_lr": 1.0, "total_steps": L + 1}),
    "one_cycle-three": (
        lambda: schedules.one_cycle(1.0, L + 1, three_phase=True, anneal="linear", warmup_fraction=0.25),
        S.OneCycleLR,
        {"max_lr": 1.0, "total_steps": L + 1, "three_phase": True, "anneal_strategy": "linear", "pct_start": 0.25},
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_equals_torch(name):
    schedule, scheduler, options = PAIRS[name]
    got = torch.stack([schedule()(torch.tensor(t)) for t in range(L)])
    torch.testing.assert_close(got, torch_curve(scheduler, **options), rtol=1e-12, atol=1e-12)


def clip(x, low, high):
    return min(max(x, low), high)


def polynomial_by_hand(t, init, end, power, steps, begin=0):
    return (init - end) * (1 - clip(t - begin, 0, steps) / steps) ** power + end


def exponential_by_hand(t, init, steps, rate, begin=0, staircase=False, end=None):
    if t <= begin:
        return init
    exponent = (t - begin) // steps if staircase else (t - begin) / steps
    value = init * rate**exponent
    return value if end is None else (max if rate < 1 else min)(value, end)


def cosine_by_hand(t, init, steps, alpha):
    """optax bounds the curve by a fraction alpha of its beginning, we by its end."""
    return init * ((1 - alpha) * 0.5 * (1 + math.cos(math.pi * min(t, steps) / steps)) + alpha)


def warmup_by_hand(t, init, peak, warmup, steps, end):
    if t < warmup:
        return polynomial_by_hand(t, init, peak, 1, warmup)
    return cosine_by_hand(t - warmup, peak, steps - warmup, end / peak)


def piecewise_by_hand(t, init, scales):
    return init * math.prod(scale for begin, scale in scales.items() if t >= begin)


def restarts_by_hand(t, init, lengths, decay, end):
    """optax's sgdr_schedule without warm-ups: cosines joined, each from its own peak to the same end."""
    n = 0
    while t >= lengths[n]:
        t, n = t - lengths[n], n + 1
    peak = init * decay**n
    return cosine_by_hand(t, peak, lengths[n], end / peak)


def wsd_by_hand(t, peak, steps, warmup, decay, init, end, fall):
    """warmup_constant_schedule, joined with a fall over the last steps."""
    if t < steps - decay:
        return init + (peak - init) * min(t / warmup, 1)
    return end + (peak - end) * fall(min((t - (steps - decay)) / decay, 1))


PUBLISHED = {  # ours, and the closed form that optax documents
    "constant": (schedules.constant(0.3), lambda t: 0.3),
    "linear": (schedules.linear(0.2, 1.5, 7, begin=3), lambda t: polynomial_by_hand(t, 0.2, 1.5, 1, 7, 3)),
    "polynomial": (
        schedules.polynomial(1.5, 0.1, 9, power=2.5, begin=4),
        lambda t: polynomial_by_hand(t, 1.5, 0.1, 2.5, 9, 4),
    ),
    "exponential": (
        schedules.exponential(2.0, 0.7, every=3, begin=5),
        lambda t: exponential_by_hand(t, 2.0, 3, 0.7, 5),
    ),
    "exponential-staircase": (
        schedules.exponential(2.0, 0.7, every=3, begin=5, staircase=True, end_value=0.4),
        lambda t: exponential_by_hand(t, 2.0, 3, 0.7, 5, True, 0.4),
    ),
    "exponential-growing": (
        schedules.exponential(0.1, 1.3, end_value=2.0),
        lambda t: exponential_by_hand(t, 0.1, 1, 1.3, end=2.0),
    ),
    "cosine": (schedules.cosine(0.8, 17, end_value=0.2), lambda t: cosine_by_hand(t, 0.8, 17, 0.25)),
    "warmup_cosine": (
        schedules.warmup_cosine(0.8, 25, 6, init_value=0.1, end_value=0.04),
        lambda t: warmup_by_hand(t, 0.1, 0.8, 6, 25, 0.04),
    ),
    "piecewise": (
        schedules.piecewise(0.9, {4: 0.3, 11: 2.0, 12: 0.5}),
        lambda t: piecewise_by_hand(t, 0.9, {4: 0.3, 11: 2.0, 12: 0.5}),
    ),
    "step": (
        schedules.step(0.9, 6, factor=0.4),
        lambda t: piecewise_by_hand(t, 0.9, dict.fromkeys((6, 12, 18, 24, 30), 0.4)),
    ),
    "cosine_restarts": (
        schedules.cosine_restarts(0.9, 4, growth=2, decay=0.5, end_value=0.05),
        lambda t: restarts_by_hand(t, 0.9, (4, 8, 16, 32), 0.5, 0.05),
    ),
    "cosine_restarts-equal": (
        schedules.cosine_restarts(0.9, 5, decay=0.8),
        lambda t: restarts_by_hand(t, 0.9, (5,) * 7, 0.8, 0.0),
    ),
    **{
        f"wsd-{shape}": (
            schedules.wsd(0.9, 25, 6, 8, init_value=0.1, end_value=0.05, shape=shape),
            lambda t, fall=fall: wsd_by_hand(t, 0.9, 25, 6, 8, 0.1, 0.05, fall),
        )
        for shape, fall in {
            "linear": lambda x: 1 - x,
            "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
            "sqrt": lambda x: 1 - math.sqrt(x),
        }.items()
    },
    "power_cool": (
        schedules.power_cool(0.9, 25, 6, power=1.5, cooldown_steps=8, init_value=0.1, end_value=0.05),
        lambda t: wsd_by_hand(t, 0.9, 25, 6, 8, 0.1, 0.05, lambda x: (1 - x) ** 1.5),
    ),
    "power_cool-all": (schedules.power_cool(0.9, 25), lambda t: 0.9 * max(1 - t / 25, 0.0) ** 1.2),
    "linear_to_zero": (
        schedules.linear_to_zero(0.9, 25, 5),
        lambda t: 0.9 * t / 5 if t < 5 else 0.9 * max(25 - t, 0) / 20,
    ),
    "join": (
        schedules.join(
            [schedules.linear(0.0, 1.0, 5), schedules.constant(0.7), schedules.exponential(1.0, 0.5)], [5, 9]
        ),
        lambda t: t / 5 if t < 5 else 0.7 if t < 9 else 0.5 ** (t - 9),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_equals_the_published_formula(name):
    schedule, by_hand = PUBLISHED[name]
    expected = torch.tensor([by_hand(t) for t in range(L)], dtype=torch.float64)
    got = torch.stack([schedule(torch.tensor(t)) for t in range(L)])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_one_cycle_meets_its_three_points():
    """torch's: the last step of the cycle is the last value; optax's cycle has one step more, and a whole one at the peak."""
    for anneal in ("cosine", "linear"):
        schedule = schedules.one_cycle(
            0.6, 50, warmup_fraction=0.2, div_factor=10.0, final_div_factor=100.0, anneal=anneal
        )
        assert [schedule(t) for t in (0, 9, 49, 500)] == pytest.approx([0.06, 0.6, 0.0006, 0.0006], rel=1e-12)
        assert schedule(4.5) == pytest.approx(0.33, rel=1e-12)
        assert schedule(29) == pytest.approx(0.3003, rel=1e-12)


def test_every_schedule_has_its_formula():
    tables = {name.split("-")[0] for name in (*PUBLISHED, *PAIRS)} | {"half_life", "tanh", "noisy"}
    assert tables >= set(schedules.__all__)
    assert {name.split("-")[0] for name in SCHEDULES} >= set(schedules.__all__)


def test_curves_of_timm():
    """Its formulas, step by step."""
    tanh = schedules.tanh(0.9, 20, end_value=0.1, low=-6.0, high=4.0)
    k_decay = schedules.cosine(0.9, 20, end_value=0.1, k=1.5)
    limited = schedules.cosine_restarts(0.9, 5, decay=0.5, end_value=0.1, limit=2)
    cooled = schedules.warmup_cosine(0.9, 20, 5, init_value=0.05, end_value=0.1, cooldown_steps=3)
    for t in range(20):
        x = t / 20
        assert tanh(t) == pytest.approx(0.1 + 0.8 * 0.5 * (1 - math.tanh(-6 * (1 - x) + 4 * x)), rel=1e-12)
        assert k_decay(t) == pytest.approx(0.1 + 0.8 * 0.5 * (1 + math.cos(math.pi * t**1.5 / 20**1.5)), rel=1e-12)
        peak = 0.9 * 0.5 ** (t // 5)
        restarted = 0.1 + (peak - 0.1) * 0.5 * (1 + math.cos(math.pi * (t % 5) / 5))
        assert limited(t) == pytest.approx(restarted if t < 10 else 0.1, rel=1e-12)
        down = 0.1 + 0.8 * 0.5 * (1 + math.cos(math.pi * min(t - 5, 12) / 12))
        assert cooled(t) == pytest.approx(0.05 + 0.85 * t / 5 if t < 5 else down, rel=1e-12)


def test_noise_is_bounded_and_belongs_to_the_step():
    rate = schedules.noisy(schedules.constant(2.0), random.key(0), 0.25)
    values = torch.stack([rate(torch.tensor(t)) for t in range(300)])
    assert values.min() >= 1.5
    assert values.max() <= 2.5
    assert values.std() == pytest.approx(0.5 / 3**0.5, rel=0.1)
    assert torch.equal(values, torch.vmap(rate)(torch.arange(300)))
    with pytest.raises(ValueError, match=r"cooldown_steps must leave steps for the cosine, got 15 of 20"):
        schedules.warmup_cosine(1.0, 20, 5, cooldown_steps=15)
    with pytest.raises(TypeError, match=r"^base must be a function, got 0\.1$"):
        schedules.noisy(0.1, random.key(0), 0.1)


@every_schedule
def test_schedules_may_be_functions_of_tensors_in_a_population(name):
    """vmap over a step counter and over the rate that a schedule scales, inside a compiled function."""
    steps = torch.arange(6)
    schedule = SCHEDULES[name]

    def scaled(rate, step):
        return rate * schedule(step)

    torch._dynamo.reset()
    rates = torch.linspace(0.1, 0.6, 6, dtype=torch.float64)
    got = torch.compile(torch.vmap(scaled), backend="eager", fullgraph=True)(rates, steps)
    torch.testing.assert_close(got, rates * torch.stack([schedule(t) for t in steps]), rtol=1e-14, atol=1e-14)
    slope = torch.func.grad(lambda r: scaled(r, steps[3]))(rates[0])
    torch.testing.assert_close(slope, schedule(steps[3]))


@every_schedule
def test_number_tensor_vmap_and_graph_agree(name):
    schedule = SCHEDULES[name]
    steps = torch.arange(30)
    numbers = [schedule(int(t)) for t in steps]
    assert all(isinstance(x, float) for x in numbers)
    expected = torch.tensor(numbers, dtype=torch.float64)
    torch.testing.assert_close(torch.stack([schedule(t) for t in steps]), expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.vmap(schedule)(steps), expected, rtol=1e-14, atol=1e-14)
    torch._dynamo.reset()
    compiled = torch.compile(schedule, backend="eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(torch.stack([compiled(t) for t in steps]), expected, rtol=1e-14, atol=1e-14)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@every_schedule
def test_before_the_first_step(name):
    if name == "noisy":
        pytest.skip("draws for each step")
    schedule = SCHEDULES[name]
    assert schedule(-3) == schedule(0) == schedule(torch.tensor(-7)).item()


def test_no_warm_up_before_the_first_step():
    assert schedules.wsd(0.1, 10, 0, 3)(-5) == 0.1


@every_schedule
@given(step=st.one_of(st.integers(0, 10_000), st.floats(0, 10_000)))
def test_finite_everywhere(name, step):
    assert 0 <= SCHEDULES[name](step) <= 1


@pytest.mark.parametrize("name", ["linear", "polynomial", "cosine", "warmup_cosine", "one_cycle", "wsd", "half_life"])
def test_continuous(name):
    """Warm-up included: no jump between neighbouring steps that a line over 3 steps would not make."""
    values = torch.stack([SCHEDULES[name](torch.tensor(t / 10)) for t in range(300)])
    assert values.diff().abs().max() < (0.15 if name == "wsd" else 0.05)


@pytest.mark.parametrize("name", ["wsd", "warmup_cosine"])
def test_warm_up_reaches_the_peak_and_the_end(name):
    schedule = SCHEDULES[name]
    assert (schedule(0), schedule(5), schedule(20), schedule(1000)) == (0.0, 1.0, 0.0, 0.0)


def test_ademamix_warm_up_by_hand():
    """f(b) = log 0.5 / log b - 1 grows linearly: halfway between b=0.5 (f=0) and b=sqrt(0.5) (f=1) it is 0.5."""
    schedule = schedules.half_life(0.5, 0.5**0.5, 2)
    assert schedule(1) == pytest.approx(0.5 ** (1 / 1.5), abs=1e-7)
    assert schedule(2) == 0.5**0.5


def test_arguments_may_be_tensors_under_vmap():
    rates = torch.tensor([0.1, 0.2])
    got = torch.vmap(lambda rate: schedules.warmup_cosine(rate, 10, 5)(torch.tensor(5)))(rates)
    torch.testing.assert_close(got, rates.double())


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "b1"])
def test_usable_for_any_hyperparameter(name):
    """A schedule gives the trajectory of the numbers that it returns."""
    schedule = schedules.linear(0.1, 0.5, 4)
    options = {"learning_rate": 0.1, name: schedule}
    tx = optim.inject_hyperparams(optim.adamw)(**options)
    params = {"w": torch.ones(2, dtype=torch.float64)}
    state = tx.init(params)
    by_hand = optim.inject_hyperparams(optim.adamw)(**{**options, name: 0.0})
    hand_state = by_hand.init(params)
    for t in range(4):
        grads = {"w": torch.tensor([1.0, -2.0], dtype=torch.float64) * (t + 1)}
        updates, state = tx.update(grads, state, params)
        hand_state = optim.set_hyperparams(hand_state, **{name: schedule(t)})
        expected, hand_state = by_hand.update(grads, hand_state, params)
        torch.testing.assert_close(updates, expected, rtol=1e-12, atol=1e-12)


BAD = [
    (lambda: schedules.cosine(1.0, 0), ValueError, "steps must be at least 1, got 0"),
    (lambda: schedules.linear(1.0, 0.0, 2.5), TypeError, "steps must be an int, got 2.5"),
    (lambda: schedules.warmup_cosine(1.0, 10, 10), ValueError, r"warmup_steps must be in \[0, steps\), got 10 of 10"),
    (lambda: schedules.one_cycle(1.0, 10, anneal="cos"), ValueError, "anneal must be 'cosine' or 'linear', got 'cos'"),
    (
        lambda: schedules.one_cycle(1.0, 10, warmup_fraction=2.0),
        ValueError,
        r"warmup_fraction must be in \[0, 1\], got 2.0",
    ),
    (lambda: schedules.power_cool(1.0, 10, 4, cooldown_steps=7), ValueError, "must fit into steps, got 4 and 7 of 10"),
    (lambda: schedules.linear_to_zero(1.0, 10, 10), ValueError, "warmup_steps must be in \\[0, steps\\), got 10 of 10"),
    (lambda: schedules.wsd(1.0, 10, 6, 6), ValueError, "fit into steps, got 6 and 6 of 10"),
    (lambda: schedules.wsd(1.0, 10, 1, 1, shape="x"), ValueError, "shape must be one of .*got 'x'"),
    (lambda: schedules.join([schedules.constant(1.0)], [3]), ValueError, "boundaries must be one fewer than parts"),
    (lambda: schedules.join([schedules.constant(1.0)] * 3, [5, 3]), ValueError, "boundaries must be increasing"),
    (lambda: schedules.constant(float("nan")), ValueError, "value must be finite, got nan"),
    (lambda: schedules.exponential(1.0, 0.5, every=0), ValueError, "every must be at least 1, got 0"),
]


@pytest.mark.parametrize(("make", "error", "match"), BAD)
def test_bad_arguments(make, error, match):
    with pytest.raises(error, match=match):
        make()
