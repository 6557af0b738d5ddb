"""Muon, SOAP, Prodigy, schedule-free, AdEMAMix's warm-ups, Adan and Adafactor by hand."""

import math

import pytest
import torch

from holofunc import optim, tree

D = torch.float64


def tensor(x):
    return torch.tensor(x, dtype=D)


def descend(tx, params, gradient, steps):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(gradient(params), state, params, loss=torch.zeros(()))
        params = optim.apply_updates(params, updates)
    return params, state


# --- by hand -----------------------------------------------------------------------------------------------------


def test_muon_on_a_diagonal_matrix():
    """Newton-Schulz acts on each singular value as its quintic."""
    a, b, c = 3.4445, -4.7750, 2.0315
    values = [3.0, 4.0]
    expected = [x / 5.0 for x in values]
    for _ in range(5):
        expected = [a * x + b * x**3 + c * x**5 for x in expected]
    params = {"w": torch.zeros(2, 2, dtype=D)}
    tx = optim.muon(0.5, momentum=0.9)
    got = tx.update({"w": torch.diag(tensor(values))}, tx.init(params), params)[0]["w"]
    torch.testing.assert_close(got, -0.5 * torch.diag(tensor(expected)))


def test_muon_sees_a_convolution_as_filters_and_scales_tall_matrices():
    g = torch.linspace(-1, 1, 48, dtype=D).view(8, 2, 3, 1)
    rule = optim.scale_by_muon(nesterov=False)
    got = rule.update({"w": g}, rule.init({"w": g}))[0]["w"]
    torch.testing.assert_close(got, optim.orthogonalize(g.view(8, 6)).view_as(g) * math.sqrt(8 / 6))


def test_muon_leaves_vectors_and_chosen_matrices_to_adam():
    params = {"hidden": torch.eye(2), "head": torch.eye(2), "bias": torch.ones(2)}
    chosen = optim.label_by_path(params, [("hidden", True)], default=False)
    tx = optim.muon(0.1, adam_learning_rate=0.01, matrices=chosen, weight_decay=0.1, mask=optim.no_decay_mask)
    updates = tx.update(params, tx.init(params), params)[0]
    assert updates["head"].diagonal().tolist() == pytest.approx([-0.01 * (1 + 0.1)] * 2)
    assert updates["bias"].tolist() == pytest.approx([-0.01] * 2)
    with_dict = optim.muon(0.1, matrices=chosen, weight_decay=0.1, mask=optim.no_decay_mask(params))
    with_dict.update(params, with_dict.init(params), params)


def test_soap_on_a_diagonal_gradient_is_adam_from_the_second_step():
    """Gradients c * E with one nonzero entry per row and column keep the basis: SOAP is Adam without the first gradient."""
    shape, grads = tensor([[2.0, 0.0], [0.0, 1.0]]), [1.0, -0.5, 2.0, 1.5]
    soap, adam = optim.soap(0.1, b1=0.9, b2=0.8, every=2), optim.adam(0.1, b1=0.9, b2=0.8)
    params = {"w": torch.zeros(2, 2, dtype=D)}
    soap_state, adam_state = soap.init(params), adam.init(params)
    first, soap_state = soap.update({"w": 3.0 * shape}, soap_state, params)
    assert first["w"].abs().max() == 0
    for c in grads:
        got, soap_state = soap.update({"w": c * shape}, soap_state, params)
        expected, adam_state = adam.update({"w": c * shape}, adam_state, params)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("decay", [0.5, torch.tensor(0.5), optim.schedules.linear(0.0, 1.0, 2)], ids=type)
def test_soap_decays_from_the_second_step_on(decay):
    """The authors leave the first step out whole. A schedule counts it."""
    tx, plain, params = optim.soap(0.1, weight_decay=decay), optim.soap(0.1), {"w": torch.full((2, 2), 4.0, dtype=D)}
    state, plain_state = tx.init(params), plain.init(params)
    for expected in (0.0, -0.1 * 0.5 * 4.0):
        grads = {"w": tensor([[2.0, 1.0], [0.0, 1.0]])}
        got, state = tx.update(grads, state, params)
        without, plain_state = plain.update(grads, plain_state, params)
        torch.testing.assert_close(got["w"] - without["w"], torch.full_like(params["w"], expected))


def test_soap_does_not_care_about_rotations():
    """Rotating the problem rotates the updates: that is what the eigenbasis is for. Adam fails this."""
    turn = torch.linalg.qr(tensor([[1.0, 2.0, 0.5], [0.3, -1.0, 1.0], [0.2, 0.1, 1.0]])).Q
    generator = [tensor([[1.0, 2.0, 0.3], [0.1, -1.0, 2.0], [1.5, 0.2, 0.7]]) * s + s**2 for s in (1.0, -0.7, 0.4, 1.3)]
    tx = optim.soap(0.1, every=1)
    params = {"w": torch.zeros(3, 3, dtype=D)}
    plain, rotated = tx.init(params), tx.init(params)
    for g in generator:
        a, plain = tx.update({"w": g}, plain, params)
        b, rotated = tx.update({"w": turn @ g}, rotated, params)
        torch.testing.assert_close(b["w"], turn @ a["w"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [(12, 3), (3, 12), (4, 2, 3, 3), (5, 5)], ids=str)
def test_soap_begins_with_the_eigenvectors_of_the_first_gradient(shape):
    """Also along axes that are longer than all others together, where most eigenvalues are zero."""
    g = torch.linspace(-3, 3, math.prod(shape), dtype=D).sin().view(shape)
    tx, params = optim.soap(0.1), {"w": torch.zeros(shape, dtype=D)}
    _, state = tx.update({"w": g}, tx.init(params), params)
    for key, q in state["soap"].basis.items():
        outer = state["soap"].outer[key]
        values = (q.mT @ outer @ q).diagonal()
        torch.testing.assert_close(q.mT @ q, torch.eye(len(q), dtype=D))
        torch.testing.assert_close(q @ values.diag() @ q.mT, outer)
        torch.testing.assert_close(values, torch.linalg.eigvalsh(outer).flip(0))


def test_prodigy_first_steps_by_hand():
    """One parameter from 0, gradient 2 at first and 1 after: the numbers of algorithm 4 written out."""
    b1, b2, d0 = 0.5, 0.25, 0.1
    b3 = math.sqrt(b2)
    x, d, m, v, r, s = 0.0, d0, 0.0, 0.0, 0.0, 0.0
    tx = optim.prodigy(1.0, b1=b1, b2=b2, d0=d0, eps=1e-8)
    params = {"w": torch.zeros(1, dtype=D)}
    state = tx.init(params)
    for g in (2.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        updates, state = tx.update({"w": tensor([g])}, state, params)
        params = optim.apply_updates(params, updates)
        r = b3 * r + (1 - b3) * d * d * g * (0.0 - x)
        m, v, s = b1 * m + (1 - b1) * d * g, b2 * v + (1 - b2) * d * d * g * g, b3 * s + (1 - b3) * d * d * g
        x -= d * m / (math.sqrt(v) + d * 1e-8)
        d = max(d, r / abs(s))
        assert params["w"].item() == pytest.approx(x, rel=1e-12)
        assert state["prodigy"].distance.item() == pytest.approx(d, rel=1e-12)
    assert d > d0


def test_prodigy_finds_the_distance():
    """From 0 to a minimum at 3, starting with a distance of 1e-6."""
    params, state = descend(
        optim.prodigy(), {"w": torch.zeros(1, dtype=D)}, lambda p: {"w": torch.sign(p["w"] - 3.0)}, 400
    )
    assert 1.0 < state["prodigy"].distance < 6.0
    assert (params["w"] - 3.0).abs() < 0.5


def test_schedule_free_sgd_is_averaging():
    """z is plain descent, x the average of z (equal rates weigh equally), y between them."""
    lr, b1 = 0.3, 0.8
    tx = optim.schedule_free_sgd(lr, b1=b1)
    params = {"w": tensor([1.0])}
    state, z, x = tx.init(params), 1.0, 1.0
    for t in range(1, 8):
        y = params["w"].item()
        assert y == pytest.approx((1 - b1) * z + b1 * x, rel=1e-12)
        updates, state = tx.update({"w": tensor([2 * y + 0.1])}, state, params)
        params = optim.apply_updates(params, updates)
        z -= lr * (2 * y + 0.1)
        x += (z - x) / t
        assert optim.eval_params(state, params)["w"].item() == pytest.approx(x, rel=1e-12)


def test_schedule_free_weighs_by_the_square_of_a_warming_rate():
    tx = optim.schedule_free_sgd(optim.schedules.linear(0.1, 0.3, 2), b1=0.9)
    params = {"w": tensor([0.0])}
    state, z, weighted, weights = tx.init(params), 0.0, 0.0, 0.0
    for rate in (0.1, 0.2, 0.3, 0.3):
        updates, state = tx.update({"w": tensor([1.0])}, state, params)
        params = optim.apply_updates(params, updates)
        z -= rate
        weighted, weights = weighted + rate**2 * z, weights + rate**2
        assert optim.eval_params(state, params)["w"].item() == pytest.approx(weighted / weights, rel=1e-12)


def test_schedule_free_adamw_first_step():
    """nu_hat is g**2 at first: the step is the rate, and decay acts at y."""
    params = {"w": tensor([2.0])}
    tx = optim.schedule_free_adamw(0.1, weight_decay=0.5, eps=0.0)
    updates = tx.update({"w": tensor([3.0])}, tx.init(params), params)[0]
    assert updates["w"].item() == pytest.approx(-0.1 * (1 + 0.5 * 2.0))


def test_ademamix_warm_ups_by_hand():
    """alpha grows by 1/T from the first step on; beta3's half-life grows linearly from beta1's."""
    b1, b2, b3, alpha, steps = 0.5, 0.9, 0.9, 4.0, 4

    def f(b):
        return math.log(0.5) / math.log(b + 1e-8) - 1

    tx = optim.ademamix(0.1, b1=b1, b2=b2, b3=b3, alpha=alpha, alpha_warmup=steps, b3_warmup=steps, eps=0.0)
    params = {"w": tensor([0.0])}
    state, m1, m2, nu, x = tx.init(params), 0.0, 0.0, 0.0, 0.0
    for t, g in enumerate([1.0, -2.0, 0.5, 3.0, 1.0, -1.0], 1):
        updates, state = tx.update({"w": tensor([g])}, state, params)
        params = optim.apply_updates(params, updates)
        part = t / steps
        b3_now = 0.5 ** (1 / ((1 - part) * f(b1) + part * f(b3) + 1)) if t < steps else b3
        m1, m2, nu = b1 * m1 + (1 - b1) * g, b3_now * m2 + (1 - b3_now) * g, b2 * nu + (1 - b2) * g * g
        x -= 0.1 * (m1 / (1 - b1**t) + min(part, 1) * alpha * m2) / math.sqrt(nu / (1 - b2**t))
        assert params["w"].item() == pytest.approx(x, rel=1e-12)


def test_ademamix_without_fast_momentum_keeps_no_buffer():
    tx = optim.ademamix(0.1, b1=0.0)
    params = {"w": tensor([1.0, 2.0])}
    assert tree.size(tx.init(params)["ademamix"].mu) == 0
    assert tree.size(tx.init(params)) == 2 * 2 + 3  # two counts and the latest rate


def test_adan_uses_the_previous_gradient():
    b1, b2, b3 = 0.9, 0.8, 0.7
    tx = optim.adan(0.1, b1=b1, b2=b2, b3=b3, eps=0.0)
    params, m, v, n, x, before = {"w": tensor([0.0])}, 0.0, 0.0, 0.0, 0.0, None
    state = tx.init(params)
    for t, g in enumerate([1.0, -2.0, 0.5], 1):
        updates, state = tx.update({"w": tensor([g])}, state, params)
        params = optim.apply_updates(params, updates)
        d = 0.0 if before is None else g - before
        before = g
        m, v, n = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * d, b3 * n + (1 - b3) * (g + b2 * d) ** 2
        x -= 0.1 * (m / (1 - b1**t) + b2 * v / (1 - b2**t)) / math.sqrt(n / (1 - b3**t))
        assert params["w"].item() == pytest.approx(x, rel=1e-12)


@pytest.mark.parametrize("name", ["adamp", "adabelief", "tadam"])
def test_a_single_number_can_grow(name):
    """Holocron's AdamP deletes all growth of a one-element parameter: 0.5 would stay 0.5."""
    tx = getattr(optim, name)(0.05)
    params, _ = descend(tx, {"w": tensor([0.5])}, lambda p: {"w": p["w"] - 1.0}, 300)
    assert params["w"].item() == pytest.approx(1.0, abs=0.05)


def test_lars_does_not_shrink_what_has_no_gradient():
    params = {"w": tensor([3.0, 4.0])}
    zero = {"w": torch.zeros(2, dtype=D)}
    paper, raw = (m.lars(0.1, weight_decay=1e-4, trust_coefficient=1.0) for m in (optim, optim.holocron))
    assert paper.update(zero, paper.init(params), params)[0]["w"].abs().max() < 1e-4
    assert raw.update(zero, raw.init(params), params)[0]["w"].tolist() == pytest.approx([-0.3, -0.4])


def test_lars_options():
    params, grads = {"w": tensor([3.0, 4.0])}, {"w": tensor([0.0, 10.0])}

    def one(**o):
        return (t := optim.lars(**o)).update(grads, t.init(params), params)[0]["w"][1].item()

    assert one(learning_rate=0.1, trust_coefficient=1.0) == pytest.approx(-0.1 * 0.5 * 10)
    assert one(learning_rate=0.1, trust_coefficient=1.0, trust_clip=1.0) == pytest.approx(-0.1 * 1.0 * 10)
    assert one(learning_rate=0.1, trust_coefficient=0.02, trust_clip=1.0) == pytest.approx(-0.01 * 10)
    assert one(learning_rate=0.1, mask={"w": False}, weight_decay=0.5) == pytest.approx(-1.0)
    assert one(learning_rate=0.1, trust_coefficient=1.0, nesterov=True) == pytest.approx(-0.5 * 1.9)


def test_lars_learning_rate_in_the_buffer():
    """The paper's momentum remembers old rates, torch's does not."""
    schedule = optim.schedules.piecewise(1.0, {1: 0.5})
    params = {"w": tensor([3.0, 4.0])}

    def second_update(inside):
        tx = optim.lars(schedule, trust_coefficient=1.0, lr_in_buffer=inside)
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update({"w": tensor([0.0, 5.0])}, state, params)
        return updates["w"][1].item()

    assert second_update(False) == pytest.approx(-0.5 * (0.9 * 5 + 5))
    assert second_update(True) == pytest.approx(-(0.9 * 5 + 0.5 * 5))


def test_adafactor_state_is_small():
    params = {"w": torch.zeros(100, 50), "conv": torch.zeros(16, 8, 3, 3), "b": torch.zeros(10)}
    assert tree.size(optim.adafactor().init(params)["factored"]) == 100 + 50 + 16 + 72 + 10 + 1


def test_adafactor_is_exact_for_a_rank_one_second_moment():
    g = tensor([[1.0, 2.0], [3.0, 6.0]])
    rule = optim.scale_by_factored_rms(eps=0.0)
    torch.testing.assert_close(rule.update({"w": g}, rule.init({"w": g}))[0]["w"], torch.ones(2, 2, dtype=D))


def test_rectified_adabelief_by_hand():
    """Momentum until rho reaches 5, the rectified rule afterwards."""
    b1, b2, lr = 0.9, 0.9, 0.1
    tx = optim.adabelief(lr, b1=b1, b2=b2, eps=1e-3, eps_root=1e-4, rectify=True)
    params, m, s, x = {"w": tensor([0.0])}, 0.0, 0.0, 0.0
    state, limit, phases = tx.init(params), 2 / (1 - b2) - 1, []
    for t, g in enumerate([1.0, -0.5, 2.0, 1.0, 0.3, -1.0, 0.7, 1.1], 1):
        updates, state = tx.update({"w": tensor([g])}, state, params)
        params = optim.apply_updates(params, updates)
        m = b1 * m + (1 - b1) * g
        s = b2 * s + (1 - b2) * (g - m) ** 2 + 1e-4
        rho = limit - 2 * t * b2**t / (1 - b2**t)
        phases.append(rho >= 5)
        if rho >= 5:
            r = math.sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho))
            x -= lr * r * math.sqrt(1 - b2**t) / (1 - b1**t) * m / (math.sqrt(s) + 1e-3)
        else:
            x -= lr * m / (1 - b1**t)
        assert params["w"].item() == pytest.approx(x, rel=1e-10)
    assert any(phases)
    assert not all(phases)
