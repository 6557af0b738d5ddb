"""The further rules against their papers' formulas in NumPy, and the small pieces by hand."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from holofunc import data, lift, losses, optim, random, train, tree

D = torch.float64
RATE = 0.1
GRADS = [np.array([[1.0, -2.0, 0.5], [0.3, 4.0, -1.0]]) * s + s**2 for s in (1.0, -0.6, 0.8, 0.1, -1.3)]


def run(tx, start=None, **extra):
    """The parameters after each of ``GRADS``."""
    params = {"w": torch.zeros(2, 3, dtype=D) if start is None else torch.from_numpy(start)}
    state, seen = tx.init(params), []
    for g in GRADS:
        updates, state = tx.update({"w": torch.from_numpy(g)}, state, params, **extra)
        params = optim.apply_updates(params, updates)
        seen.append(params["w"].numpy())
    return seen


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


# --- rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [True, False])
def test_adopt(clip):
    b1, b2, eps, decay = 0.8, 0.7, 0.9, 0.01
    x, m, v, expected = np.ones((2, 3)), 0.0, GRADS[0] ** 2, [(1 - RATE * decay) * np.ones((2, 3))]
    x = expected[0]
    for t, g in enumerate(GRADS[1:], 1):
        u = g / np.maximum(np.sqrt(v), eps)
        u = np.clip(u, -(t**0.25), t**0.25) if clip else u
        m = b1 * m + (1 - b1) * u
        v = b2 * v + (1 - b2) * g**2
        x = x - RATE * (m + decay * x)
        expected.append(x)
    tx = optim.adopt(RATE, b1=b1, b2=b2, eps=eps, use_clipping=clip, weight_decay=decay)
    assert_same(run(tx, np.ones((2, 3))), expected)


def test_acprop():
    b1, b2, eps = 0.8, 0.7, 1e-3
    x, m, v, expected = np.zeros((2, 3)), 0.0, 0.0, []
    for t, g in enumerate(GRADS):
        if t:
            x = x - RATE * g / (np.sqrt(v / (1 - b2**t)) + eps)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (g - m) ** 2
        expected.append(x)
    assert_same(run(optim.acprop(RATE, b1=b1, b2=b2, eps=eps)), expected)


def test_madgrad():
    momentum, eps, decay = 0.7, 1e-3, 0.1
    start = np.full((2, 3), 0.5)
    x, s, v, expected = start, 0.0, 0.0, []
    for k, g in enumerate(GRADS):
        rate = RATE * np.sqrt(k + 1)
        g = g + decay * x
        s, v = s + rate * g, v + rate * g**2
        x = momentum * x + (1 - momentum) * (start - s / (np.cbrt(v) + eps))
        expected.append(x)
    assert_same(run(optim.madgrad(RATE, momentum=momentum, eps=eps, weight_decay=decay), start), expected)


def test_mars():
    b1, b2, gamma, eps, decay = 0.9, 0.8, 0.3, 1e-3, 0.1
    x, m, v, before, expected = np.ones((2, 3)), 0.0, 0.0, GRADS[0], []
    for t, g in enumerate(GRADS, 1):
        c = g + gamma * b1 / (1 - b1) * (g - before)
        c = c / max(np.linalg.norm(c), 1.0)
        before, m, v = g, b1 * m + (1 - b1) * c, b2 * v + (1 - b2) * c**2
        x = x - RATE * (m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * x)
        expected.append(x)
    tx = optim.mars(RATE, b1=b1, b2=b2, gamma=gamma, eps=eps, weight_decay=decay)
    assert_same(run(tx, np.ones((2, 3))), expected)


def test_simplified_ademamix():
    b1, b2, alpha, eps = 0.9, 0.8, 0.5, 1e-3
    x, m, v, expected = np.zeros((2, 3)), 0.0, 0.0, []
    for t, g in enumerate(GRADS, 1):
        m, v = b1 * m + g, b2 * v + (1 - b2) * g**2
        x = x - RATE * (m + alpha * g) / (np.sqrt(v / (1 - b2**t)) + eps)
        expected.append(x)
    assert_same(run(optim.simplified_ademamix(RATE, b1=b1, b2=b2, alpha=alpha, eps=eps)), expected)


@pytest.mark.parametrize("decay", [None, 0.7])
def test_sm3(decay):
    momentum, eps = 0.8, 1e-3
    old, new = (1, 1) if decay is None else (decay, 1 - decay)
    x, m, rows, columns, expected = np.zeros((2, 3)), 0.0, np.zeros(2), np.zeros(3), []
    for g in GRADS:
        nu = old * np.minimum(rows[:, None], columns) + new * g**2
        rows, columns = nu.max(1), nu.max(0)
        m = momentum * m + (1 - momentum) * g / (np.sqrt(nu) + eps)
        x = x - RATE * m
        expected.append(x)
    assert_same(run(optim.sm3(RATE, momentum=momentum, decay=decay, eps=eps)), expected)


def test_sm3_of_vectors_is_adagrad_and_covers_every_axis():
    params = {"v": torch.zeros(3), "s": torch.zeros(()), "conv": torch.zeros(4, 3, 2, 2)}
    tx, adagrad = optim.sm3(RATE, momentum=0.0, eps=1e-10), optim.adagrad(RATE, eps=1e-10)
    state, full = tx.init(params), adagrad.init(params)
    assert {n: len(b) if b.ndim else 1 for n, b in state["sm3"].bounds.items()} == {
        "v/0": 3, "s/0": 1, "conv/0": 4, "conv/1": 3, "conv/2": 2, "conv/3": 2
    }  # fmt: skip
    for seed in range(3):
        grads = tree.map(lambda p, s=seed: random.normal(random.key(s), p.shape), params)
        got, state = tx.update(grads, state, params)
        expected, full = adagrad.update(grads, full, params)
        torch.testing.assert_close([got["v"], got["s"]], [expected["v"], expected["s"]])
        assert (got["conv"].abs() <= expected["conv"].abs() + 1e-7).all()  # its sums are at least Adagrad's


@pytest.mark.parametrize("turned", [False, True])
def test_galore(turned):
    """New projections at updates 1 and 4; the same for the transposed problem."""
    b1, b2, eps, scale = 0.9, 0.8, 1e-3, 0.5
    x, m, v, q, expected = np.zeros((2, 3)), 0.0, 0.0, np.eye(2, 1), []
    for t, g in enumerate(GRADS):
        if t % 3 == 0:
            new = np.linalg.svd(g)[0][:, :1]
            q = new * (-1 if (new * q).sum() < 0 else 1)
        r = q.T @ g
        m, v = b1 * m + (1 - b1) * r, b2 * v + (1 - b2) * r**2
        adam = m / (1 - b1 ** (t + 1)) / (np.sqrt(v / (1 - b2 ** (t + 1))) + eps)
        x = x - RATE * scale * q @ adam
        expected.append(x)
    tx = optim.galore(RATE, rank=1, b1=b1, b2=b2, eps=eps, scale=scale, every=3)
    if not turned:
        assert_same(run(tx), expected)
        return
    params = {"w": torch.zeros(3, 2, dtype=D)}
    state = tx.init(params)
    for g, x in zip(GRADS, expected, strict=True):
        updates, state = tx.update({"w": torch.from_numpy(g.T.copy())}, state, params)
        params = optim.apply_updates(params, updates)
        np.testing.assert_allclose(params["w"].numpy(), x.T, rtol=1e-8)


def test_galore_of_full_rank_is_adam_and_its_state_is_small():
    assert_same(run(optim.galore(RATE, rank=2)), run(optim.adam(RATE)))
    state = optim.galore(RATE, rank=4).init({"w": torch.zeros(100, 50), "conv": torch.zeros(8, 16, 3, 3)})["galore"]
    assert {path: tuple(x.shape) for path, x in state.mu.items()} == {"w": (4, 100), "conv": (4, 144)}
    assert {path: tuple(x.shape) for path, x in state.basis.items()} == {"w": (50, 4), "conv": (8, 4)}


def quadratic():
    """A Hessian with a known diagonal, and large elements beside it."""
    half = random.normal(random.key(3), (6, 6), dtype=D)
    hessian = half + half.T
    return hessian, lambda params: {"w": (hessian @ params["w"].flatten()).view_as(params["w"])}


def test_hutchinson_estimates_the_diagonal():
    hessian, grad_fn = quadratic()
    params = {"w": torch.ones(2, 3, dtype=D)}
    tx = optim.hutchinson_estimator(key=random.key(0))
    state, estimates = tx.init(params), []
    for _ in range(3000):
        estimate, state = tx.update(params, state, params, grad_fn=grad_fn)
        estimates.append(estimate["w"].flatten())
    spread = (hessian.square().sum(1) - hessian.diagonal().square()).sqrt() / 3000**0.5
    assert ((torch.stack(estimates).mean(0) - hessian.diagonal()).abs() < 4 * spread).all()


def test_sophia():
    """On a diagonal Hessian, where the estimate is exact; looked at in updates 1, 3 and 5."""
    b1, b2, eps, gamma, clip, decay = 0.9, 0.8, 1e-3, 0.5, 0.7, 0.1
    third = np.array([[1.0, -2.0, 3.0], [0.0, 4.0, 0.5]])
    x, m, h, expected = np.ones((2, 3)), 0.0, 0.0, []
    for t, g in enumerate(GRADS):
        if t % 2 == 0:
            h = b2 * h + (1 - b2) * third * 2 * x  # of sum(third * x**3 / 3)
        m = b1 * m + (1 - b1) * g
        x = x - RATE * (np.clip(m / np.maximum(gamma * h, eps), -clip, clip) + decay * x)
        expected.append(x)
    tx = optim.sophia(
        RATE,
        key=random.key(0),
        b1=b1,
        b2=b2,
        eps=eps,
        gamma=gamma,
        threshold=clip,
        every=2,
        weight_decay=decay,
    )
    grad_fn = torch.func.grad(lambda params: (torch.from_numpy(third) * params["w"] ** 3 / 3).sum())
    assert_same(run(tx, np.ones((2, 3)), grad_fn=grad_fn), expected)


# --- conditions and adapters ---------------------------------------------------------------------------------------


def test_conditions_choose_between_the_inner_update_and_none():
    grads, params = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    for wrap, otherwise in ((optim.conditionally_transform, 1.0), (optim.conditionally_mask, 0.0)):
        tx = wrap(optim.trace(1 - 1e-9), lambda count, **extra: count % 2 == 1)
        state, seen = tx.init(params), []
        for _ in range(4):
            updates, state = tx.update(grads, state, params)
            seen.append(updates["w"][0].item())
        assert seen == pytest.approx([otherwise, 1.0, otherwise, 2.0])  # the trace gathers when it is asked
        assert (state.step, state.inner.step) == (4, 2)


def test_conditions_see_the_extra_arguments_and_are_0d_bools():
    tx = optim.conditionally_mask(optim.sgd(1.0), lambda count, loss, **extra: loss < 1)
    state = tx.init(torch.ones(1))
    got = [tx.update(torch.ones(1), state, loss=torch.tensor(loss))[0].item() for loss in (0.5, 2.0)]
    assert got == [-1.0, 0.0]
    for condition in (lambda count: True, lambda count: count, lambda count: torch.ones(1) > 0):
        tx = optim.conditionally_transform(optim.sgd(1.0), condition)
        with pytest.raises(TypeError, match=r"^conditionally_transform: condition must return a 0-d bool tensor, got "):
            tx.update(torch.ones(1), state)
    with pytest.raises(TypeError, match=r"^condition must be a function, got 3$"):
        optim.conditionally_transform(optim.sgd(1.0), 3)


def test_with_extra_args_support_passes_what_is_named():
    def update(updates, state, params=None, *, loss):
        return tree.map(lambda u: u * loss, updates), state

    tx = optim.with_extra_args_support(optim.GradientTransformation(lambda params: (), update))
    assert tx.update(torch.ones(1), (), loss=torch.tensor(3.0), grad_fn=None)[0] == 3
    adam = optim.adam(0.1)
    assert optim.with_extra_args_support(adam) is adam


def test_stateless_with_tree_map_gives_none_for_missing_parameters():
    tx = optim.stateless_with_tree_map(lambda u, p: u if p is None else u + p)
    grads, params = {"w": torch.ones(2)}, {"w": torch.full((2,), 5.0)}
    assert tx.update(grads, tx.init(params))[0]["w"].tolist() == [1.0, 1.0]
    assert tx.update(grads, tx.init(params), params)[0]["w"].tolist() == [6.0, 6.0]


def test_nan_to_num():
    bad = torch.tensor([float("nan"), float("inf"), -float("inf"), 2.0])
    most = torch.finfo(torch.float32).max
    for tx, expected in [
        (optim.nan_to_num(), [0.0, most, -most, 2.0]),
        (optim.nan_to_num(1.0, 3.0, -4.0), [1.0, 3.0, -4.0, 2.0]),
    ]:
        assert tx.update(bad, tx.init(bad))[0].tolist() == expected


def test_sums_of_every_k_updates():
    """optax's ``apply_every(k)``, for the page on migration."""
    tx, params = optim.multi_steps(optim.scale(3.0), every=3), {"w": torch.zeros(1)}
    state, seen = tx.init(params), []
    for g in (1.0, 2.0, 4.0, 8.0):
        updates, state = tx.update({"w": torch.tensor([g])}, state, params)
        seen.append(updates["w"].item())
    assert seen == pytest.approx([0.0, 0.0, 7.0, 0.0])


# --- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_safe_increment_stays_at_the_end(dtype):
    most = torch.iinfo(dtype).max
    assert optim.safe_increment(torch.tensor(most - 1, dtype=dtype)) == most
    assert optim.safe_increment(torch.tensor(most, dtype=dtype)) == most
    assert optim.safe_increment(torch.tensor(0, dtype=dtype)).dtype == dtype


def test_safe_increment_of_no_numbers():
    assert optim.safe_increment(torch.tensor(1.5)) == 2.5
    for bad, kind in ((torch.tensor(True), "torch.bool"), (3, "3")):
        with pytest.raises(TypeError, match=rf"^count must be a tensor of integers or real numbers, got {kind}$"):
            optim.safe_increment(bad)


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("dim", [None, 0, (0, 2), -1])
@pytest.mark.parametrize("keepdim", [False, True])
def test_safe_norm_is_the_norm_and_its_gradient_is_finite(order, dim, keepdim):
    x = random.normal(random.key(0), (2, 3, 4), dtype=D)
    x[0] = 0.0
    axes = (0, 1, 2) if dim is None else dim
    plain = torch.linalg.vector_norm(x, order, axes, keepdim=keepdim)
    torch.testing.assert_close(optim.safe_norm(x, ord=order, dim=dim, keepdim=keepdim), plain)
    torch.testing.assert_close(optim.safe_norm(x, 1.5, ord=order, dim=dim, keepdim=keepdim), plain.clamp_min(1.5))
    slope = torch.func.grad(lambda x: optim.safe_norm(x, ord=order, dim=dim).sum())
    assert slope(x).isfinite().all()
    assert slope(torch.zeros_like(x)).abs().max() == 0
    assert optim.safe_norm(torch.zeros(0, 3)) == 0
    assert optim.safe_norm(torch.tensor([float("nan"), 1.0]), 1.0).isnan()


def test_safe_rms():
    x = torch.tensor([3.0, 4.0, 0.0], dtype=D)
    torch.testing.assert_close(optim.safe_rms(x), x.square().mean().sqrt())
    assert optim.safe_rms(x, 10.0) == 10
    torch.testing.assert_close(torch.func.grad(optim.safe_rms)(x), x / 3 / x.square().mean().sqrt())
    assert torch.func.grad(optim.safe_rms)(torch.zeros(3)).abs().max() == 0
    assert optim.safe_rms(torch.zeros(0)) == 0
    assert optim.safe_rms(torch.tensor([float("nan")]), 1.0).isnan()


def test_target_networks():
    new, old = {"w": torch.full((2,), 4.0)}, {"w": torch.zeros(2, dtype=torch.bfloat16)}
    got = optim.incremental_update(new, old, torch.tensor(0.25))["w"]
    assert (got.tolist(), got.dtype) == ([1.0, 1.0], torch.bfloat16)
    for count, expected in ((0, 4.0), (3, 0.0), (torch.tensor(4), 4.0), (torch.tensor(5), 0.0)):
        got = optim.periodic_update(new, old, count, every=2)["w"]
        assert (got[0].item(), got.dtype) == (expected, torch.bfloat16)
    with pytest.raises(ValueError, match=r"^step_size must be in \(0, 1\], got 1\.5$"):
        optim.incremental_update(new, old, 1.5)
    with pytest.raises(ValueError, match=r"^every must be at least 1, got 0$"):
        optim.periodic_update(new, old, 0, every=0)
    with pytest.raises(ValueError, match=r"must have the structure of"):
        optim.incremental_update(new, {"v": torch.zeros(2)}, 0.5)


def test_sophia_in_a_training_step():
    """With buffers and dropout: the step passes ``grad_fn`` by itself."""
    model = lift(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Dropout(0.1), nn.Linear(32, 10))
    )
    batches = data.Batches(data.digits("train"), 128, key=random.key(1), mean=0.305, std=0.376)
    tx = optim.sophia(3e-3, key=random.key(0), every=2)
    step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx)
    state = train.create_state(model, tx, random.key(0))
    result = train.fit(step, state, batches, steps=24, log_every=8, compile=False)
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]
    assert tree.get(result.state.opt_state, "hessian/1.weight").abs().max() > 0


def test_flattened_gradients_keep_their_precision():
    params = {"w": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(2)}
    grads = {"w": torch.tensor([1.001, 2.0, 3.0]), "b": torch.ones(2, dtype=torch.bfloat16)}
    whole, flat = optim.adam(0.1), optim.flatten(optim.adam(0.1))
    _, state = whole.update(grads, whole.init(params), params)
    _, vectors = flat.update(grads, flat.init(params), params)
    assert torch.equal(vectors.inner["adam"].mu["bfloat16"], state["adam"].mu["w"])


def test_projection_of_many_numbers_in_half_precision():
    values = {"w": random.uniform(random.key(0), (600,)).bfloat16()}
    assert optim.projection_simplex(values)["w"].float().sum() == pytest.approx(1, abs=0.05)


OPTAX_LIKE = """
from typing import Any, NamedTuple
from torch import Tensor
from holofunc import optim, tree
from holofunc.typing import Params

class CountState(NamedTuple):
    step: Tensor
    trace: Params

def init(params: Params) -> CountState: ...
def plain(updates: Params, state: CountState, params: Params | None = None) -> tuple[Params, CountState]: ...
def named(updates: Params, state: CountState, params: Params | None = None, *, loss: Tensor) -> tuple[Params, CountState]: ...
def extra(updates: Params, state: CountState, params: Params | None = None, **extra: Any) -> tuple[Params, CountState]: ...
def two(updates: Params, state: CountState) -> tuple[Params, CountState]: ...
def wrong(updates: Params) -> Params: ...

typed: optim.InitFn = init
for tx in (
    optim.GradientTransformation(init, plain),
    optim.GradientTransformation(init, named),
    optim.GradientTransformation(init, extra),
    optim.GradientTransformation(init, two),
    optim.with_extra_args_support((init, plain)),
):
    called: optim.UpdateFn = tx.update
    updates, state = tx.update({}, tx.init({}), {}, loss=1.0)
optim.GradientTransformation(init, wrong)
"""


@pytest.mark.slow
def test_types_of_transformations(tmp_path):
    """The type checker takes what optax would, and no function of another kind."""
    (tmp_path / "program.py").write_text(OPTAX_LIKE)
    command = [sys.executable, "-m", "mypy", "--config-file=", "--ignore-missing-imports", str(tmp_path / "program.py")]
    environment = {**os.environ, "MYPYPATH": str(Path(optim.__file__).parents[2])}
    said = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment).stdout
    errors = [
        line for line in said.splitlines() if "program.py" in line and ": error:" in line and "empty-body" not in line
    ]
    assert len(errors) == 1, said
    assert "wrong" in OPTAX_LIKE.splitlines()[int(errors[0].split(":")[1]) - 1]
