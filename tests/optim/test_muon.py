"""Muon for vision: presets, convolutions, factors, what suits it; NorMuon. In fp64 against torch's and by hand."""

import math

import pytest
import torch

from holofunc import optim, random, tree

D = torch.float64


def normal(shape, seed=0):
    return random.normal(random.key(seed), shape, dtype=D)


@pytest.mark.parametrize(("adjust", "theirs"), [("original", "original"), ("match_rms_adamw", "match_rms_adamw")])
def test_matrices_as_torch(adjust, theirs, monkeypatch):
    """torch iterates in bfloat16: the directions agree to its precision, the sizes of steps exactly."""
    for shape in ((6, 4), (4, 9)):
        w, g = torch.nn.Parameter(normal(shape).float()), normal(shape, 1).float()
        tx = optim.muon(0.1, momentum=0.9, weight_decay=0.1, adjust=adjust, ns_dtype=torch.bfloat16)
        params = {"w": w.detach().clone()}
        state = tx.init(params)
        optimizer = torch.optim.Muon([w], lr=0.1, momentum=0.9, weight_decay=0.1, adjust_lr_fn=theirs)
        for _ in range(3):
            w.grad = g
            optimizer.step()
            updates, state = tx.update({"w": g}, state, params)
            params = optim.apply_updates(params, updates)
        torch.testing.assert_close(params["w"], w.detach(), rtol=0.03, atol=0.03)


@pytest.mark.parametrize(
    ("name", "steps", "low", "high"),
    [("classic", 5, 0.6, 1.3), ("quintic", 5, 0.85, 1.15), ("polar_express", 8, 0.95, 1.01)],
)
def test_presets_bring_singular_values_near_one(name, steps, low, high):
    values = torch.logspace(-2, 0, 40, dtype=D)
    x = torch.diag(values / values.norm())
    s = torch.linalg.svdvals(optim.orthogonalize(x, steps, coefficients=name))
    assert low < s.min()
    assert s.max() < high


def test_lists_of_coefficients_are_taken_step_by_step():
    x, (a, b, c) = normal((3, 5)), optim.NEWTON_SCHULZ["classic"][0]
    same = optim.orthogonalize(x, 5, coefficients=[(a, b, c)] * 5)
    torch.testing.assert_close(optim.orthogonalize(x), same, rtol=0, atol=0)
    torch.testing.assert_close(optim.orthogonalize(x, coefficients=(a, b, c)), same, rtol=0, atol=0)


def test_convolutions_flattened_or_batched():
    g = normal((8, 4, 3, 3))
    for conv in ("flatten", "batched"):
        rule = optim.scale_by_muon(0.9, nesterov=False, conv=conv, adjust="none")
        u = rule.update({"w": g}, rule.init({"w": g}))[0]["w"]
        if conv == "flatten":
            expected = optim.orthogonalize(g.view(8, 36)).view_as(g)
        else:
            expected = (
                torch.stack([optim.orthogonalize(g[:, :, i, j]) for i in range(3) for j in range(3)], -1).view_as(g) / 3
            )
        torch.testing.assert_close(u, expected)


def test_factors():
    g = normal((8, 2))
    factors = {"original": 2.0, "match_rms": 0.2 * 8**0.5, "rms_to_rms": 2.0, "none": 1.0}
    for shape, change in ((8, 2), {}), ((2, 8), {"original": 1.0, "rms_to_rms": 0.5}):
        for adjust, factor in (factors | change).items():
            rule = optim.scale_by_muon(adjust=adjust, nesterov=False)
            u = rule.update({"w": g.view(shape)}, rule.init({"w": g.view(shape)}))[0]["w"]
            torch.testing.assert_close(u, factor * optim.orthogonalize(g.view(shape)))


PARAMS = {
    "stem.conv.weight": torch.ones(16, 3, 3, 3),
    "stem.bn.weight": torch.ones(16),
    "block.dw.weight": torch.ones(16, 1, 3, 3),
    "block.pw.weight": torch.ones(32, 16, 1, 1),
    "block.mlp.fc1.weight": torch.ones(64, 32),
    "block.se.weight": torch.ones(2, 32),
    "long.weight": torch.ones(1024, 4),
    "pos_embed": torch.ones(1, 16, 32),
    "fc.weight": torch.ones(10, 32),
    "fc.bias": torch.ones(10),
}


def test_what_suits_muon(capsys):
    mask = optim.suits_muon(PARAMS, verbose=True)
    assert [n for n in PARAMS if mask[n]] == ["stem.conv.weight", "block.pw.weight", "block.mlp.fc1.weight"]
    printed = capsys.readouterr().out
    assert [line.split("  ")[-1].strip() for line in printed.splitlines()] == [
        "muon",
        "adam: fewer than two axes",
        "adam: depthwise",
        "muon",
        "muon",
        "adam: a side of 2",
        "adam: sides 1 : 256",
        "adam: by name",
        "adam: by name",
        "adam: fewer than two axes",
    ]
    tx = optim.muon(0.02, matrices=optim.suits_muon, weight_decay=0.1, mask=optim.no_decay_mask)
    state = tx.init(PARAMS)
    assert list(state["muon"]["muon"].mu) == [n for n in PARAMS if mask[n]]
    updates, _ = tx.update(PARAMS, state, PARAMS)
    assert tree.all_finite(updates)


def test_normuon_by_hand():
    g = [normal((4, 6), i) for i in range(3)]
    tx = optim.normuon(0.5, momentum=0.9, nesterov=False, norm_b2=0.8)
    params = {"w": torch.zeros(4, 6, dtype=D)}
    state, m, v = tx.init(params), torch.zeros(4, 6, dtype=D), torch.zeros(4, dtype=D)
    for x in g:
        updates, state = tx.update({"w": x}, state, params)
        m = 0.9 * m + 0.1 * x
        o = optim.orthogonalize(m)
        v = 0.8 * v + 0.2 * o.square().mean(1)
        o = o / (v.sqrt()[:, None] + 1e-8)
        torch.testing.assert_close(updates["w"], -0.5 * 0.2 * math.sqrt(24) * o / o.norm())


def test_normuon_keeps_the_norm():
    u = {"w": normal((4, 6)), "conv": normal((3, 2, 2, 2)), "zero": torch.zeros(2, 2, dtype=D)}
    tx = optim.scale_by_normuon(rms=None)
    out, _ = tx.update(u, tx.init(u))
    for name in u:
        torch.testing.assert_close(out[name].norm(), u[name].norm())
    rows = out["w"].norm(dim=1)
    torch.testing.assert_close(rows, rows.mean().expand(4))


def test_bad_input():
    for name, value in (("conv", "spatial"), ("adjust", "rms")):
        with pytest.raises(ValueError, match=rf"^{name} must be .*, got '{value}'$"):
            optim.muon(0.1, **{name: value})
    with pytest.raises(
        ValueError, match=r"^coefficients must be one of \['classic', 'quintic', 'polar_express'\], got 'x'$"
    ):
        optim.muon(0.1, ns_coefficients="x")
    with pytest.raises(ValueError, match=r"parameters must have at least two axes, got 'b' with 1$"):
        optim.scale_by_muon().init({"b": torch.ones(2)})
