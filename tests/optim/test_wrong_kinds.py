"""Functions, dtypes, strings and shapes where others belong; bounds of zero; measures of any number."""

import pytest
import torch

from holofunc import optim, random, tree

PARAMS = {"w": torch.ones(2, 2), "b": torch.ones(2)}
TX = optim.sgd(0.1)
NAN = float("nan")


def test_what_is_no_function():
    for make, message in [
        (lambda: optim.apply_if(TX, None), "condition must be a function, got None"),
        (lambda: optim.monitor(norm=3), "norm must be a function, got 3"),
        (lambda: optim.stateless(None), "fn must be a function, got None"),
        (lambda: optim.stateless_with_tree_map(None), "fn must be a function, got None"),
        (lambda: optim.project(0.5), r"projection must be a function, got 0\.5"),
        (lambda: optim.inject_hyperparams(TX), r"builder must be a function, got GradientTransformation\(.*"),
        (lambda: optim.GradientTransformation(None, abs), "init must be a function, got None"),
        (lambda: optim.GradientTransformation(abs, None), "update must be a function, got None"),
        (lambda: optim.corrected_decay(0.1, 0.1, 0.1), r"learning_rate must be a function, got 0\.1"),
        (lambda: optim.shampoo(0.1, grafting=3), "grafting must be a GradientTransformation, got 3"),
        (lambda: optim.ema_params(TX, buffers=[PARAMS["w"]]), "buffers must be a dict of tensors by name, got list"),
    ]:
        with pytest.raises(TypeError, match=f"^{message}$"):
            make()


@pytest.mark.parametrize("wrong", ["float32", torch.int8, torch.complex64, float, True])
def test_dtypes(wrong):
    for make, name in [
        (lambda: optim.adam(0.1, mu_dtype=wrong), "mu_dtype"),
        (lambda: optim.nadamw(0.1, mu_dtype=wrong), "mu_dtype"),
        (lambda: optim.muon(0.1, ns_dtype=wrong), "ns_dtype"),
        (lambda: optim.orthogonalize(torch.eye(2), dtype=wrong), "dtype"),
    ]:
        with pytest.raises(
            TypeError, match=rf"^{name} must be a floating dtype, such as torch.bfloat16, got {wrong!r}$"
        ):
            make()


def test_one_string_where_several_belong():
    matrices = {"fc1": torch.ones(8, 8), "head": torch.ones(8, 8)}
    assert optim.suits_muon(matrices, exclude="head*") == {"fc1": True, "head": False}
    assert optim.inject_hyperparams(optim.adamw, static="mask")(0.1, mask=optim.no_decay_mask)
    with pytest.raises(
        TypeError, match=r"^which must be numbers of layers, got 'w'; a mask by name is made by label_by"
    ):
        optim.frozen_layers(PARAMS, "w")
    for rules in ("w", [("w",)], ["w", "b"]):
        with pytest.raises(TypeError, match=r"^rules must be \(pattern, label\) pairs or a dict of them, got "):
            optim.label_by_path(PARAMS, rules)
    for decays in (0.9, ()):
        with pytest.raises(ValueError, match=r"^decays must be a tuple of numbers, got "):
            optim.mechanic(TX, decays=decays)
    with pytest.raises(
        ValueError, match=r"^outputs must have the structure of .*; a function of the parameters is poss"
    ):
        optim.scion(0.1, outputs={"w": True}).init(PARAMS)
    with pytest.raises(ValueError, match=r"^x must be matrices, of shape \(\.\.\., rows, columns\), got shape \(3,\)$"):
        optim.orthogonalize(torch.ones(3))


@pytest.mark.parametrize("wrong", [(1.0, 2.0), [], None, 3.0, ((1.0, 2.0),), [(1.0, 2.0, 3.0), 4.0]])
def test_coefficients(wrong):
    with pytest.raises(ValueError, match=r"^coefficients must be \(a, b, c\), a list of such or a name, got "):
        optim.scale_by_muon(ns_coefficients=wrong)


ZERO = {
    "clip_by_block_rms": lambda: optim.clip_by_block_rms(0.0),
    "clip_by_global_norm": lambda: optim.clip_by_global_norm(0.0),
    "adafactor": lambda: optim.adafactor(0.1, threshold=0.0),
    "came": lambda: optim.came(0.1, threshold=0.0),
    "kron": lambda: optim.kron(0.1, key=random.key(0), max_rms=0.0),
    "mars": lambda: optim.mars(0.1, max_norm=0.0),
}


@pytest.mark.parametrize("name", ZERO)
def test_bounds_of_zero(name):
    """They are allowed, and stop everything."""
    tx = ZERO[name]()
    for grads in (PARAMS, tree.zeros_like(PARAMS)):
        updates, state = tx.update(grads, tx.init(PARAMS), PARAMS)
        assert tree.all_finite(state)
        assert all(u.abs().max() == 0 for u in updates.values())


def test_losses_and_weights_are_one_number():
    for tx, extra in [
        (optim.reduce_on_plateau(), {"loss": torch.ones(1)}),
        (optim.scale_by_polyak(), {"loss": torch.ones(2)}),
        (optim.multi_steps(TX, 2), {"loss": torch.ones(1)}),
        (optim.multi_steps(TX, 2), {"weight": torch.ones(3)}),
    ]:
        ((name, value),) = extra.items()
        with pytest.raises(
            ValueError, match=rf"^{name} must be a number or a 0-d tensor, got shape \({len(value)},\)$"
        ):
            tx.update(PARAMS, tx.init(PARAMS), PARAMS, **extra)
    tx = optim.apply_if(TX, lambda updates, **extra: True)
    with pytest.raises(TypeError, match=r"^apply_if: condition must return a 0-d bool tensor, got True$"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_measures_of_any_number():
    tx = optim.monitor(fine=lambda u, p: tree.all_finite(u), three=lambda u, p: 3, decay=0.5)
    _, state = tx.update(PARAMS, tx.init(PARAMS))
    _, state = tx.update({n: p * NAN for n, p in PARAMS.items()}, state)
    assert state.values == {"fine": 0.5, "three": 3.0}
