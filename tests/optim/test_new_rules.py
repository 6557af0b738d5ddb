"""Rules of 2020 to 2026 against the published formulas, written out with plain tensors in fp64."""

import math

import pytest
import torch

from holofunc import lift, optim, random, train, tree

D = torch.float64
SHAPES = {"w": (4, 3), "b": (5,), "conv": (2, 3, 2, 2)}


def normal(shape, seed):
    return random.normal(random.key(seed), shape, dtype=D)


START = {name: normal(shape, i) for i, (name, shape) in enumerate(SHAPES.items())}
GRADS = [{name: normal(shape, 10 * t + i) for i, (name, shape) in enumerate(SHAPES.items(), 100)} for t in range(8)]


def course(tx, start=START, grads=GRADS, **extra):
    """The parameters after each update."""
    params, state, out = start, tx.init(start), []
    for g in grads:
        updates, state = tx.update(g, state, params, **extra)
        params = optim.apply_updates(params, updates)
        out.append(params)
    return out


def by_hand(rule, start=START, grads=GRADS):
    """The same by ``rule(p, g, memory, t) -> p``, one tensor at a time."""
    params, memory, out = dict(start), {name: {} for name in start}, []
    for t, g in enumerate(grads, 1):
        params = {name: rule(params[name], g[name], memory[name], t) for name in params}
        out.append(params)
    return out


def same(tx, rule, start=START, grads=GRADS, tolerance=1e-11):
    for got, expected in zip(course(tx, start, grads), by_hand(rule, start, grads), strict=True):
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=tolerance, atol=tolerance)


def average(memory, name, x, decay):
    memory[name] = decay * memory.get(name, torch.zeros_like(x)) + (1 - decay) * x
    return memory[name]


# --- signs and norms -------------------------------------------------------------------------------------------------


def test_sign_sgd_and_signum():
    same(optim.sign_sgd(0.1, weight_decay=0.2), lambda p, g, m, t: p - 0.1 * (g.sign() + 0.2 * p))
    same(
        optim.signum(0.1, momentum=0.8, weight_decay=0.2),
        lambda p, g, m, t: p - 0.1 * (average(m, "mu", g, 0.8).sign() + 0.2 * p),
    )


@pytest.mark.parametrize("constrained", [False, True])
def test_scion(constrained):
    def rule(p, g, m, t):
        d = average(m, "mu", g, 0.9)
        if d.ndim == 1:
            step = 2 * d / d.square().mean().sqrt()
        elif d.ndim == 2:
            step = 2 * math.sqrt(4 / 3) * optim.orthogonalize(d)
        else:
            step = 3 / 12 * d.sign()
        return (1 - 0.1 * constrained) * p - 0.1 * step

    outputs = {"w": False, "b": False, "conv": True}
    same(optim.scion(0.1, radius=2, sign_radius=3, constrained=constrained, outputs=outputs), rule)


# --- decay ---------------------------------------------------------------------------------------------------------


def test_cautious_decay():
    def rule(p, g, m, t):
        mu, nu = average(m, "mu", g, 0.9) / (1 - 0.9**t), average(m, "nu", g * g, 0.999) / (1 - 0.999**t)
        u = mu / (nu.sqrt() + 1e-8)
        return p - 0.1 * (u + 0.2 * torch.where(u * p >= 0, p, 0.0))

    same(optim.cautious_adamw(0.1, weight_decay=0.2, cautious_decay=True), rule)


def test_cautious_updates():
    def rule(p, g, m, t):
        mu, nu = average(m, "mu", g, 0.9) / (1 - 0.9**t), average(m, "nu", g * g, 0.999) / (1 - 0.999**t)
        mask = (mu * g > 0).double()
        return p - 0.1 * (mu / (nu.sqrt() + 1e-8) * mask / mask.mean().clamp_min(1e-3) + 0.2 * p)

    same(optim.cautious_adamw(0.1, weight_decay=0.2), rule)


def test_independent_and_corrected_decay():
    same(optim.chain(optim.sgd(0.1), optim.decay_independently(0.2)), lambda p, g, m, t: p - 0.1 * g - 0.2 * p)
    rate = optim.schedules.linear(0.1, 0.0, 10)
    decay = optim.corrected_decay(0.5, rate, 0.1)
    tx = optim.chain(optim.add_decayed_weights(decay), optim.scale_by_learning_rate(rate))

    def rule(p, g, m, t):
        now = 0.1 * (1 - (t - 1) / 10)
        return p - now * (g + 0.5 * now / 0.1 * p)

    same(tx, rule)


# --- norms of weights --------------------------------------------------------------------------------------------------


def test_hyperball():
    tx = optim.chain(optim.scale_by_trust_ratio(), optim.scale_by_learning_rate(0.3), optim.keep_norms())

    def rule(p, g, m, t):
        m.setdefault("norm", p.norm())
        moved = p - 0.3 * p.norm() * g / g.norm()
        return m["norm"] * moved / moved.norm()

    same(tx, rule)


def test_radial_brake():
    def rule(p, g, m, t):
        moved, along = p - 0.5 * g, -0.5 * (p * g).sum() / p.norm()
        return moved * (p.norm() + 0.5 * along) / moved.norm() if along > 0 else moved

    same(optim.chain(optim.sgd(0.5), optim.brake_radial(0.5)), rule)


def test_row_floor():
    def rule(p, g, m, t):
        if p.ndim < 2:
            return p - 0.1 * g
        least, own = 0.9 * p.flatten(1).norm(dim=1), g.flatten(1).norm(dim=1)
        return p - 0.1 * g * (least / own).clamp_min(1).view(-1, *[1] * (p.ndim - 1))

    same(optim.chain(optim.floor_rows(0.9), optim.scale_by_learning_rate(0.1)), rule)


def test_projections():
    x = {"w": normal((3, 4), 0), "b": normal((5,), 1)}
    for fn in (
        optim.projection_simplex,
        optim.projection_l1_ball,
        optim.projection_l2_ball,
        optim.projection_nonnegative,
    ):
        y = fn(x)
        again = fn(y)
        for name in x:
            torch.testing.assert_close(again[name], y[name])
    assert [y.sum().item() for y in optim.projection_simplex(x, 2.0).values()] == pytest.approx([2.0, 2.0])
    near = optim.projection_simplex({"w": torch.tensor([0.5, 0.6, 0.1], dtype=D)})["w"]
    torch.testing.assert_close(near, torch.tensor([0.5, 0.6, 0.1], dtype=D) - 0.2 / 3)
    assert all(y.abs().sum() <= 1 + 1e-12 for y in optim.projection_l1_ball(x).values())
    inside = {"w": torch.tensor([0.2, -0.3], dtype=D)}
    assert torch.equal(optim.projection_l1_ball(inside)["w"], inside["w"])
    assert optim.projection_box(inside, -0.1, 0.1)["w"].tolist() == [0.1, -0.1]


# --- Adam with one thing changed ---------------------------------------------------------------------------------------


def test_laprop():
    def rule(p, g, m, t):
        nu = average(m, "nu", g * g, 0.99) / (1 - 0.99**t)
        mu = average(m, "mu", g / (nu.sqrt() + 1e-15), 0.8)
        return p - 0.1 * (mu / (1 - 0.8**t) + 0.2 * p)

    same(optim.laprop(0.1, b1=0.8, b2=0.99, weight_decay=0.2), rule)


def test_stable_adamw():
    def rule(p, g, m, t):
        mu, nu = average(m, "mu", g, 0.9) / (1 - 0.9**t), average(m, "nu", g * g, 0.99) / (1 - 0.99**t)
        rms = (g * g / nu.clamp_min(1e-12)).mean().sqrt()
        return p - 0.1 * (mu / (nu.sqrt() + 1e-6) / rms.clamp_min(1) + 0.2 * p)

    same(optim.stable_adamw(0.1, weight_decay=0.2), rule)


def test_nadamw_is_adamw_one_step_ahead():
    for x, y in zip(course(optim.nadamw(0.1)), course(optim.adamw(0.1, nesterov=True)), strict=True):
        assert all(torch.equal(x[name], y[name]) for name in x)


def test_came():
    def factored(memory, name, square, decay):
        rows = average(memory, f"{name}r", square.mean(1), decay)
        columns = average(memory, f"{name}c", square.mean(0), decay)
        return torch.outer(rows, columns) / rows.mean()

    def rule(p, g, m, t):
        if g.ndim == 1:
            u = g / average(m, "nu", g * g + 1e-30, 0.9).sqrt()
        else:
            g = g.flatten(1)
            u = g / factored(m, "s", g * g + 1e-30, 0.9).sqrt()
        u = u / u.square().mean().sqrt().clamp_min(1)
        mu = average(m, "mu", u, 0.8)
        step = mu if g.ndim == 1 else mu / factored(m, "u", (u - mu) ** 2 + 1e-16, 0.99).sqrt()
        return p - 0.01 * step.view_as(p)

    same(optim.came(0.01, b1=0.8, b2=0.9, b3=0.99), rule)


# --- preconditioners -----------------------------------------------------------------------------------------------


def inverse_root(x, power, eps):
    values, vectors = torch.linalg.eigh(x)
    return vectors @ torch.diag((values.clamp_min(0) + eps * values.max()) ** -power) @ vectors.T


def test_shampoo():
    def rule(p, g, m, t):
        if g.ndim < 2:
            return p - 0.1 * g
        for axis in range(g.ndim):
            rows = g.movedim(axis, 0).flatten(1)
            average(m, axis, rows @ rows.T, 0.9)
        u = g
        for axis in range(g.ndim):
            root = inverse_root(m[axis], 0.5 / g.ndim, 0.01)
            u = torch.tensordot(root, u, dims=([1], [axis])).movedim(0, axis)
        return p - 0.1 * u

    same(optim.chain(optim.scale_by_shampoo(0.9, 0.01), optim.scale(-0.1)), rule, tolerance=1e-9)


def test_one_sided_shampoo():
    def rule(p, g, m, t):
        if g.ndim < 2:
            return p - 0.1 * g
        x = g.flatten(1)
        if len(x) > x.shape[1]:
            u = x @ inverse_root(average(m, "r", x.T @ x, 0.9), 0.5, 0.01)
        else:
            u = inverse_root(average(m, "l", x @ x.T, 0.9), 0.5, 0.01) @ x
        return p - 0.1 * u.view_as(g)

    same(optim.chain(optim.scale_by_shampoo(0.9, 0.01, one_sided=True), optim.scale(-0.1)), rule, tolerance=1e-9)


def test_grafting():
    tx = optim.graft(optim.scale_by_sign(), optim.scale(3.0))
    updates, _ = tx.update(START, tx.init(START))
    for name, g in START.items():
        torch.testing.assert_close(updates[name], 3 * g.norm() * g.sign() / g.sign().norm())


def test_eigenbasis_with_adam_is_soap():
    """With the momentum outside, as SOAP has it in the original space, and without."""
    options = {"every": 2, "beta": 0.9}
    apart = optim.in_eigenbasis(optim.scale_by_adam(b1=0.0, b2=0.9), **options)
    soap = optim.scale_by_soap(b1=0.0, b2=0.9, every=2)
    for x, y in zip(*[course(optim.chain(tx, optim.scale(-0.1))) for tx in (apart, soap)], strict=True):
        for name in x:
            torch.testing.assert_close(x[name], y[name], rtol=1e-9, atol=1e-9)


def test_soap_in_front_of_muon():
    tx = optim.chain(
        optim.in_eigenbasis(optim.scale_by_adam(b1=0.0), every=2), optim.scale_by_muon(), optim.scale(-0.1)
    )
    matrices = {name: p for name, p in START.items() if p.ndim > 1}
    out = course(tx, matrices, [{name: g[name] for name in matrices} for g in GRADS])
    assert tree.all_finite(out[-1])
    assert not torch.equal(out[-1]["w"], START["w"])


def test_kl_products():
    """The first outer products are plain, later ones measured by the other side."""
    tx = optim.in_eigenbasis(optim.identity(), beta=0.5, every=1, kl=True, eps=0.1)
    start = {"w": START["w"]}
    state = tx.init(start)
    left, right = torch.zeros(4, 4, dtype=D), torch.zeros(3, 3, dtype=D)
    for t in range(4):
        g = GRADS[t]["w"]
        ql, qr = state.basis["w/0"], state.basis["w/1"]
        _, state = tx.update({"w": g}, state, start)
        if t == 0:
            new = g @ g.T / 3, g.T @ g / 4
        else:
            inverse_right = qr @ torch.diag(1 / ((qr.T @ right @ qr).diagonal() + 0.1)) @ qr.T
            inverse_left = ql @ torch.diag(1 / ((ql.T @ left @ ql).diagonal() + 0.1)) @ ql.T
            new = g @ inverse_right @ g.T / 3, g.T @ inverse_left @ g / 4
        left, right = 0.5 * left + 0.5 * new[0], 0.5 * right + 0.5 * new[1]
        torch.testing.assert_close(state.outer["w/0"], left)
        torch.testing.assert_close(state.outer["w/1"], right)


def test_kl_products_of_deficient_rank():
    """In single precision what rounding leaves in a null space is divided by no tiny eigenvalue: an ulp stays one."""
    params = {"w": START["w"].float()}
    outer = []
    for ulps in (0, 1):
        tx = optim.in_eigenbasis(optim.identity(), kl=True, every=1)
        state = tx.init(params)
        for t in range(4):
            g = (torch.outer(params["w"][:, 0], params["w"][0]) * (t + 1)) * (1 + ulps * 2.0**-22)
            _, state = tx.update({"w": g}, state, params)
        outer.append(state.outer["w/0"])
    torch.testing.assert_close(outer[0], outer[1], rtol=1e-3, atol=1e-3)


def test_kron_whitens():
    """Gradients of a fixed covariance: what comes out has nearly equal singular values in the mean."""
    left, right = (
        torch.diag(torch.tensor([5.0, 1.0, 0.2, 2.0], dtype=D)),
        torch.diag(torch.tensor([3.0, 0.5, 1.0], dtype=D)),
    )
    tx = optim.scale_by_kron(key=random.key(0), b1=0.0, max_rms=math.inf)
    start, products = {"w": torch.zeros(4, 3, dtype=D)}, torch.zeros(4, 4, dtype=D)
    state = tx.init(start)
    for t in range(600):
        updates, state = tx.update({"w": left @ normal((4, 3), t) @ right}, state, start)
        if t >= 300:
            products += updates["w"] @ updates["w"].T / 300
    values = torch.linalg.eigvalsh(products)
    assert values[-1] / values[0] < 3  # (5 / 0.2)**2 = 625 before


def test_kron_by_hand():
    """One update of the factors of a matrix, and what it makes of the gradient."""
    g = GRADS[0]["w"]
    tx = optim.scale_by_kron(key=random.key(3), b1=0.9, precond_learning_rate=0.1, max_rms=math.inf)
    updates, state = tx.update({"w": g}, tx.init({"w": g}))
    v = random.normal(random.fold_in(random.key(3), torch.tensor(0)), (12,), dtype=D).view(4, 3)
    for side, (a, b) in enumerate([(g, v), (g.T, v.T)]):
        seen, probed = a @ a.T, b @ b.T
        q = torch.eye(len(a), dtype=D)
        change = torch.triu(seen - probed) @ q
        moved = q - state.factors[f"w/{side}"]
        torch.testing.assert_close(moved / moved.norm(), 0.1 * change / change.norm() * 10)
        size = change.norm() / moved.norm() * 0.1
        exact = torch.linalg.matrix_norm(seen + probed, 2)
        assert 0.7 * exact < size <= exact * (1 + 1e-9)
    ql, qr = state.factors["w/0"], state.factors["w/1"]
    torch.testing.assert_close(updates["w"], ql.T @ ql @ g @ qr.T @ qr)


# --- learning rates that are found ---------------------------------------------------------------------------------


def test_dadapt_adam():
    b1, b2, d, numerator, d0 = 0.9, 0.99, 0.1, 0.0, 0.1
    b3 = math.sqrt(b2)
    tx = optim.dadapt_adamw(1.0, b1=b1, b2=b2, d0=d0, weight_decay=0.1)
    p = {name: x.clone() for name, x in START.items()}
    m, v, s = ({name: torch.zeros_like(x) for name, x in p.items()} for _ in range(3))
    for g, got in zip(GRADS, course(tx), strict=True):
        rate = d
        numerator_step = sum((rate * g[n] * s[n] / (v[n].sqrt() + 1e-8)).sum() for n in p)
        for n in p:
            m[n] = b1 * m[n] + (1 - b1) * rate * g[n]
            v[n] = b2 * v[n] + (1 - b2) * g[n] ** 2
            s[n] = b3 * s[n] + (1 - b3) * rate * g[n]
        numerator = b3 * numerator + (1 - b3) * numerator_step
        estimate = numerator / ((1 - b3) * sum(x.abs().sum() for x in s.values()))
        d = max(d, float(estimate))
        for n in p:
            p[n] = p[n] - m[n] / (v[n].sqrt() + 1e-8) - rate * 0.1 * p[n]
            torch.testing.assert_close(got[n], p[n])


def test_dadapt_finds_the_distance():
    params = {"w": torch.zeros(3, dtype=D)}
    tx = optim.dadapt_adamw()
    state = tx.init(params)
    for _ in range(400):
        updates, state = tx.update({"w": (params["w"] - 3.0).sign()}, state, params)
        params = optim.apply_updates(params, updates)
    assert 0.3 < state["dadapt"].distance < 30
    assert (params["w"] - 3).abs().max() < 1.5


def test_mechanic():
    decays, s_init = (0.9, 0.99), 1e-2
    tx = optim.mechanic(optim.sgd(0.1), decays=decays, s_init=s_init, weight_decay=0.1)
    start = {name: x.clone() for name, x in START.items()}
    p, total = dict(start), {name: torch.zeros_like(x) for name, x in start.items()}
    r, most, v, s = ([0.0, 0.0] for _ in range(4))
    for g, got in zip(GRADS, course(tx), strict=True):
        norm_p, norm_g = (math.sqrt(sum(x.square().sum() for x in y.values())) for y in (p, g))
        h = -float(sum(((g[n] + 0.1 * sum(s) * norm_g / norm_p * p[n]) * total[n]).sum() for n in p))
        for i, b in enumerate(decays):
            most[i], v[i] = max(b * most[i], abs(h)), b * b * v[i] + h * h
            r[i] = max(0.0, b * r[i] + s[i] * h)
            s[i] = (s_init / 2 * most[i] + r[i]) / (math.sqrt(v[i]) + 1e-8) if v[i] else 0.0
        for n in p:
            total[n] = total[n] - 0.1 * g[n]
            p[n] = start[n] + sum(s) * total[n]
            torch.testing.assert_close(got[n], p[n], rtol=1e-9, atol=1e-9)


# --- averages ------------------------------------------------------------------------------------------------------


def test_lawa_and_tail_averages():
    tx = optim.sgd(0.1)
    way = course(tx)
    for wrapped, expected in [
        (optim.lawa(tx, size=2, every=3), (way[2]["w"] + way[5]["w"]) / 2),
        (optim.average_tail(tx, start=3), sum(p["w"] for p in way[3:]) / 5),
    ]:
        params, state = START, wrapped.init(START)
        for g, p in zip(GRADS, way, strict=True):
            updates, state = wrapped.update(g, state, params)
            params = optim.apply_updates(params, updates)
            torch.testing.assert_close(params, p)
        torch.testing.assert_close(optim.eval_params(state, params)["w"], expected)


def test_primal_averaging():
    z = x = y = START["w"]
    tx = optim.primal_averaging(optim.sgd(0.1), b1=0.8, decay=0.9)
    params, state = {"w": y}, tx.init({"w": y})
    for g in GRADS:
        updates, state = tx.update({"w": g["w"]}, state, params)
        params = optim.apply_updates(params, updates)
        z = z - 0.1 * g["w"]
        x = 0.9 * x + 0.1 * z
        y = 0.2 * z + 0.8 * x
        torch.testing.assert_close(params["w"], y)
        torch.testing.assert_close(optim.eval_params(state, params)["w"], x)


def test_nesterov_updates():
    def rule(p, g, m, t):
        u = -0.1 * g
        return p + 0.6 * average(m, "m", u, 0.6) + 0.4 * u

    same(optim.nesterov_updates(optim.sgd(0.1), 0.6), rule)


def test_momentum_as_a_schedule():
    rule = optim.inject_hyperparams(optim.scale_by_muon)(momentum=optim.schedules.linear(0.5, 0.9, 4))
    state = rule.init({"w": START["w"]})
    seen = []
    for g in GRADS[:5]:
        _, state = rule.update({"w": g["w"]}, state)
        seen.append(optim.get_hyperparams(state)["momentum"].item())
    assert seen == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])


# --- L-BFGS ----------------------------------------------------------------------------------------------------------


def test_lbfgs_direction_is_that_of_the_dense_matrix():
    a = normal((6, 6), 0)
    hessian = a @ a.T + torch.eye(6, dtype=D)
    tx, x = optim.scale_by_lbfgs(memory_size=3), normal((6,), 1)
    state, moves = tx.init({"w": x}), []
    previous = None
    for _ in range(6):
        g = hessian @ x
        if previous is not None:
            moves.append((x - previous[0], g - previous[1]))
        out, state = tx.update({"w": g}, state, {"w": x})
        if moves:
            s, y = moves[-1]
            h = torch.eye(6, dtype=D) * (s @ y) / (y @ y)
            for s, y in moves[-3:]:
                v = torch.eye(6, dtype=D) - torch.outer(y, s) / (s @ y)
                h = v.T @ h @ v + torch.outer(s, s) / (s @ y)
            torch.testing.assert_close(out["w"], h @ g)
        previous = x, g
        x = x - 0.1 * out["w"]


def rosenbrock(params):
    x, y = params["w"].unbind()
    return (1 - x) ** 2 + 100 * (y - x * x) ** 2


@pytest.mark.parametrize("start", [[-0.5, 1.0], [-1.2, 1.0], [3.0, -4.0], [0.0, 0.0]])
def test_lbfgs_with_its_search(start):
    """Each step fulfils the strong Wolfe conditions, and the minimum is found."""
    tx, params = optim.lbfgs(), {"w": torch.tensor(start, dtype=D)}
    state = tx.init(params)
    for _ in range(60):
        before, g = rosenbrock(params), torch.func.grad(rosenbrock)(params)
        updates, state = tx.update(g, state, params, value_fn=rosenbrock)
        t = state["linesearch"].step
        slope = (g["w"] * updates["w"]).sum() / t if t > 0 else torch.zeros(())
        params = optim.apply_updates(params, updates)
        if before < 1e-16:
            break
        after = torch.func.grad(rosenbrock)(params)
        assert rosenbrock(params) <= before + 1e-4 * t * slope + 1e-14
        assert ((after["w"] * updates["w"]).sum() / t).abs() <= 0.9 * slope.abs() + 1e-10
    torch.testing.assert_close(params["w"], torch.ones(2, dtype=D), rtol=1e-6, atol=1e-6)


def test_lbfgs_in_a_torch_loop():
    w = torch.nn.Parameter(torch.tensor([-0.5, 1.0], dtype=D))
    optimizer = optim.to_torch(optim.lbfgs())([w])

    def closure():
        optimizer.zero_grad()
        loss = rosenbrock({"w": w})
        loss.backward()
        return loss

    for _ in range(40):
        optimizer.step(closure)
    torch.testing.assert_close(w.detach(), torch.ones(2, dtype=D), rtol=1e-5, atol=1e-5)


def test_lbfgs_in_a_train_step():
    """The step knows the loss of its batch at other parameters."""
    model = lift(torch.nn.Linear, 3, 1)
    x = normal((8, 3), 0).float()
    step = train.make_train_step(train.supervised(model, lambda out, y: (out - y).square().mean()), optim.lbfgs())
    state = train.create_state(model, optim.lbfgs(), random.key(0))
    for _ in range(20):
        state, metrics = step(state, (x, x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 3.0))
    assert metrics["loss"] < 1e-6


def test_lbfgs_takes_gradients_in_any_order():
    found = []
    for order in (dict, lambda grads: dict(reversed(grads.items()))):
        tx, params = optim.lbfgs(0.3, memory_size=3), START
        state = tx.init(params)
        for _ in range(4):
            updates, state = tx.update(order({n: (p - 0.3) * (p.ndim + 1) for n, p in params.items()}), state, params)
            params = optim.apply_updates(params, updates)
        found.append(params)
    for name in START:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=0)


def test_lbfgs_goes_on_where_its_steps_vanish():
    """Products of tiny moves underflow, and have no inverse."""
    tx, params = optim.lbfgs(1.0), {"w": torch.tensor([1.0, -3.0])}
    state = tx.init(params)
    for _ in range(60):
        updates, state = tx.update({"w": 2 * params["w"]}, state, params)
        params = optim.apply_updates(params, updates)
        assert tree.all_finite((params, state))
    state = state["lbfgs"]._replace(params=torch.zeros(2), grads=torch.zeros(2))
    tiny = {"w": torch.full((2,), 1e-21)}
    assert tree.all_finite(optim.scale_by_lbfgs().update(tiny, state, tiny))


def test_lbfgs_vmapped():
    tx = optim.lbfgs(value_fn=rosenbrock, max_linesearch_steps=4)

    def run(start):
        params = {"w": start}
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(torch.func.grad(rosenbrock)(params), state, params)
            params = optim.apply_updates(params, updates)
        return params["w"]

    starts = torch.tensor([[-0.5, 1.0], [0.3, 0.2]], dtype=D)
    torch.testing.assert_close(torch.vmap(run)(starts), torch.stack([run(x) for x in starts]))


def test_bad_input():
    tx = optim.lbfgs()
    with pytest.raises(
        TypeError, match=r"needs the loss as a function: build it with value_fn=, .*, or give lbfgs a learning_rate$"
    ):
        tx.update(START, tx.init(START), START)
    with pytest.raises(ValueError, match=r"^value_fn must be None where there is a learning_rate"):
        optim.lbfgs(0.1, value_fn=rosenbrock)
    with pytest.raises(ValueError, match=r"^decrease and curvature must be 0 < decrease < curvature < 1"):
        optim.scale_by_zoom_linesearch(decrease=0.5, curvature=0.1)
    with pytest.raises(ValueError, match=r"^factor must be in \[0, 1\], got 2$"):
        optim.brake_radial(2)
    with pytest.raises(ValueError, match=r"^growth_rate must be above 1, got 1$"):
        optim.dadapt_adamw(growth_rate=1)
    with pytest.raises(ValueError, match=r"^decays must be a tuple of numbers, got \(\)$"):
        optim.mechanic(optim.sgd(0.1), decays=())
    with pytest.raises(ValueError, match=r"^max_learning_rate must be above 0"):
        optim.corrected_decay(0.1, lambda count: 1.0, 0.0)
    with pytest.raises(ValueError, match=r"^lower must be at most upper, got 1 and 0$"):
        optim.projection_box(START, 1, 0)
