"""States in few bits: what they cost, how far they stray, what they refuse; Kahan sums."""

import pytest
import torch

from holofunc import jit, optim, random, tree

SIZE = 64


def trained(tx, steps=60, dtype=torch.float32):
    scales = torch.logspace(-2, 1, SIZE)[:, None]
    start = params = {"w": random.normal(random.key(0), (SIZE, SIZE)).to(dtype), "b": torch.ones(3, dtype=dtype)}
    state = tx.init(params)
    for t in range(steps):
        noise = 0.1 * random.normal(random.key(t + 1), (SIZE, SIZE))
        grads = {"w": (scales * params["w"].float() + noise).to(dtype), "b": params["b"]}
        updates, state = tx.update(grads, state, params)
        params = optim.apply_updates(params, updates)
    return params["w"].float() - start["w"].float(), params, state


@pytest.mark.parametrize(("kind", "most_bytes", "error"), [("bf16", 4.1, 0.01), ("int8", 2.1, 0.03)])
@pytest.mark.parametrize("builder", [optim.adamw, optim.lion, optim.adabelief], ids=lambda b: b.__name__)
def test_cost_and_error(builder, kind, most_bytes, error):
    exact, _, _ = trained(builder(1e-2))
    way, _, state = trained(optim.compact_state(builder(1e-2), kind))
    held = sum(x.numel() * x.element_size() for x in tree.leaves(state)) / SIZE**2
    assert held < most_bytes
    assert (way - exact).norm() / exact.norm() < (0.2 if builder is optim.lion else error)  # signs turn at once


def test_rounding_is_right_in_the_mean():
    """A hundred roundings of the same numbers: their mean is nearer than one of them by about ten."""
    x = random.normal(random.key(1), (64, 64)).abs() ** 4
    for kind, step in (("bf16", 2**-8), ("int8", 0.2)):
        identity = optim.GradientTransformation(lambda p: {"mu": p}, lambda u, s, params=None: (u, {"mu": u}))
        got = []
        for seed in range(100):
            tx = optim.compact_state(identity, kind, key=random.key(seed))
            _, state = tx.update({"w": x}, tx.init({"w": x}), {"w": x})
            leaf = state.inner["mu"]["w"]
            if kind == "bf16":
                got.append(leaf.values.float())
            else:
                got.append((leaf.codes.float() / 127) ** 4 * leaf.scales.repeat_interleave(256).view(64, 64))
        typical = (got[0] - x).norm() / x.norm()
        assert typical < step
        assert (torch.stack(got).mean(0) - x).norm() / x.norm() < typical / 5


def test_small_tensors_and_other_parts_stay():
    tx = optim.compact_state(optim.chain(optim.adamw(1e-2), optim.scale_by_soap()))
    params = {"w": torch.ones(64, 64), "b": torch.ones(3)}
    state = tx.init(params).inner
    assert isinstance(state[0]["adam"].mu["w"], optim.BlockInt8)
    assert state[0]["adam"].mu["b"].dtype == torch.float32
    assert state[1].basis["w/0"].dtype == torch.float32


def test_same_key_same_numbers_and_one_graph():
    tx = optim.compact_state(optim.adamw(1e-2), "int8", key=random.key(5))
    params = {"w": random.normal(random.key(0), (64, 64))}
    state = tx.init(params)
    first, second = tx.update(params, state, params), tx.update(params, state, params)
    assert all(map(torch.equal, tree.leaves(first), tree.leaves(second)))
    compiled, _ = jit(tx.update)(params, state, params)
    torch.testing.assert_close(compiled["w"], first[0]["w"])


def test_guards_see_what_has_overflowed():
    tx = optim.apply_if_finite(optim.compact_state(optim.adamw(1e-2), min_size=0))
    params = {"w": torch.ones(8, 8)}
    state = tx.init(params)
    for bad in (float("nan"), float("inf"), 1e30):
        updates, state = tx.update({"w": torch.full((8, 8), bad)}, state, params)
        assert tree.all_finite(updates)
        assert optim.skipped(state)


def test_moments_of_very_different_sizes_make_no_long_steps():
    """A second moment that rounds to zero beside a first one that does not would make a step of any length."""
    sizes, longest = torch.logspace(-7, 0, 512), {}
    for name, tx in {"plain": optim.adam(1.0), "int8": optim.compact_state(optim.adam(1.0), min_size=0)}.items():
        params, longest[name] = {"w": torch.ones(512)}, 0.0
        state = tx.init(params)
        for t in range(40):
            grads = sizes * (1 + 0.1 * random.normal(random.key(t), (512,)))
            grads[::3] *= t % 2
            updates, state = tx.update({"w": grads}, state, params)
            longest[name] = max(longest[name], updates["w"].abs().max().item())
    assert longest["int8"] < 10 * longest["plain"]


def test_one_number_that_overflows_spoils_no_other():
    params, grads = {"w": torch.ones(600)}, {"w": torch.ones(600)}
    spike = {"w": torch.ones(600).index_fill(0, torch.tensor([7]), 1e25)}
    tx = optim.compact_state(optim.adam(0.1), min_size=0)
    state = tx.init(params)
    for g in (grads, spike, grads, grads):
        updates, state = tx.update(g, state, params)
        params = optim.apply_updates(params, updates)
    assert state.inner["adam"].nu["w"].largest.isinf()
    assert tree.all_finite(params)
    torch.testing.assert_close(params["w"][256:], torch.full((344,), 0.6), rtol=0, atol=1e-3)


REFUSED = {
    "lookahead": lambda: optim.lookahead(optim.sgd(0.1)),
    "ema_params": lambda: optim.chain(optim.ema_params(optim.sgd(0.1), 0.9)),
    "schedule_free": lambda: optim.schedule_free_adamw(0.1),
    "multi_steps": lambda: optim.multi_steps(optim.sgd(0.1), 2),
    "prodigy": optim.prodigy,
    "madgrad": lambda: optim.madgrad(0.1),
    "dog": lambda: optim.scale_by_distance_over_gradients(),
    "mechanic": lambda: optim.mechanic(optim.sgd(0.1)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_when_built(name):
    with pytest.raises(ValueError, match=r"^compact_state cannot wrap "):
        optim.compact_state(REFUSED[name]())


def test_bad_input():
    with pytest.raises(ValueError, match=r"^kind must be 'bf16' or 'int8', got 'fp8'$"):
        optim.compact_state(optim.adam(0.1), "fp8")
    counting = optim.GradientTransformation(lambda p: {"count": 0}, lambda u, s: (u, {"count": s["count"] + 1}))
    for wrap, name in ((optim.compact_state, "compact_state"), (optim.apply_if_finite, "apply_if_finite")):
        with pytest.raises(TypeError, match=rf"^{name}: the state of tx must hold tensors, got int at 'count': write"):
            wrap(counting).init({"w": torch.ones(2)})
    tx = optim.compact_state(optim.adam(0.1))
    params = {"w": torch.ones(2)}
    with pytest.raises(ValueError, match=r"^compact_state needs the parameters"):
        tx.update(params, tx.init(params))


def test_kahan_sums_follow_single_precision():
    exact, _, _ = trained(optim.sgd(1e-3), 300)
    plain, _, _ = trained(optim.sgd(1e-3), 300, torch.bfloat16)
    kahan, _, state = trained(optim.kahan_sum(optim.sgd(1e-3)), 300, torch.bfloat16)
    assert state.lost["w"].dtype == torch.bfloat16
    assert (kahan - exact).norm() < 0.15 * (plain - exact).norm()
