"""Transformations of public reports (optax, torch, timm, Lightning): odd trees, numbers and loops."""

import collections
import copy
import inspect
import io
import math
import pathlib
import runpy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils

from holofunc import optim, random, tree

LAWS = runpy.run_path(str(pathlib.Path(__file__).with_name("test_laws.py")))
MEMBERS = {name: make for name, make in LAWS["MEMBERS"].items() if name != "partition"}  # whose labels name all kinds
NUMBERS = {"loss": torch.ones(()), "weight": torch.ones(())}


def course(tx, params, grads, steps=3):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(grads, state, params, **NUMBERS, grad_fn=lambda p: grads)
        params = optim.apply_updates(params, updates)
    return params, state


def single():
    return tree.map(torch.Tensor.float, LAWS["make_params"]())


def with_eps():
    """All that divides by something plus ``eps``."""
    for name in optim.__all__:
        fn = getattr(optim, name)
        names = inspect.signature(fn).parameters if inspect.isfunction(fn) else {}
        needed = {"key": random.key(0), "rank": 1, "learning_rate": 0.1}
        given = {n: needed[n] for n in names if n in needed}
        if "tx" in names:  # a wrapper, which divides nothing by it
            continue
        for eps in {"eps", "adam_eps"} & set(names):
            if name not in ("orthogonalize", "scale_by_optimistic_gradient", "sophia", "scale_by_sophia"):  # above 0
                yield pytest.param(fn, {**given, eps: 0.0}, id=f"{name}-{eps}")


@pytest.mark.parametrize(("fn", "options"), list(with_eps()))
def test_without_eps_what_has_had_no_gradient_rests(fn, options):
    """Zero over zero is not NaN."""
    grads = {"w": torch.tensor([[0.0, 0.0], [0.0, 1.0], [2.0, 0.0]]), "b": torch.zeros(3)}
    assert tree.all_finite(course(fn(**options), {"w": torch.ones(3, 2), "b": torch.ones(3)}, grads))


ODD = {  # parameters and gradients
    "nothing": lambda: ({}, {}),
    "no elements": lambda: (
        [{"e": torch.ones(0, 3), "f": torch.ones(2, 0), "w": torch.ones(2, 2), "v": torch.ones(0)}] * 2
    ),
    "zeros": lambda: (tree.zeros_like(single()), tree.map(torch.ones_like, single())),
    "no gradient": lambda: (single(), tree.zeros_like(single())),
    "subnormal gradient": lambda: (single(), tree.map(lambda p: torch.full_like(p, 1e-42), single())),
    "mixed": lambda: (
        {"w": torch.ones(3, 2, dtype=torch.bfloat16), "b": torch.ones(3)},
        {"w": torch.full((3, 2), 0.5), "b": torch.full((3,), 0.5, dtype=torch.float16)},
    ),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", MEMBERS)
def test_odd_trees(name, kind):
    params, grads = ODD[kind]()
    new, _ = course(MEMBERS[name](0.1), params, grads)
    assert tree.all_finite(new)
    assert [(path, x.dtype) for path, x in tree.leaves_with_path(new)] == [
        (path, x.dtype) for path, x in tree.leaves_with_path(params)
    ]


@pytest.mark.parametrize("name", LAWS["OPTIMIZERS"])
def test_strides_do_not_matter(name):
    params = {
        "w": torch.arange(12.0).view(4, 3).t() / 10,
        "c": torch.ones(2, 3, 2, 2).to(memory_format=torch.channels_last),
    }
    grads = {"w": torch.ones(()).expand(3, 4), "c": 0.3 * params["c"]}
    got, _ = course(MEMBERS[name](0.1), params, grads, 2)
    plain, _ = course(MEMBERS[name](0.1), *(tree.map(torch.Tensor.contiguous, x) for x in (params, grads)), 2)
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-5)


def test_trees_of_any_kind():
    ones = torch.ones(2)
    tx = optim.adamw(0.1)
    assert tx.update({"a": ones, "n": None}, tx.init({"a": ones, "n": None}), {"a": ones, "n": None})[0]["n"] is None
    params = [ones, (torch.ones(1),)]
    assert isinstance(optim.soap(0.1).update(params, optim.soap(0.1).init(params), params)[0], list)
    params, grads = collections.OrderedDict(b=ones, a=ones), collections.OrderedDict(a=ones, b=0 * ones)
    updates, _ = optim.lamb(0.1).update(grads, optim.lamb(0.1).init(params), params)
    assert not updates["b"].any()
    assert updates["a"].all()
    with torch.inference_mode():
        state = tx.init({"w": ones})
    assert tx.update({"w": ones}, state, {"w": torch.ones(2)})[0]["w"].isfinite().all()


def test_shapes_that_muon_takes():
    for shape in ((1, 1), (1, 5), (5, 1), (2, 3, 1, 1), (4, 1, 3, 3), (2, 2, 2, 2, 2)):
        for conv in ("flatten", "batched"):
            for grads in (torch.zeros(shape), torch.ones(shape)):
                assert tree.all_finite(course(optim.scale_by_muon(conv=conv), {"w": grads}, {"w": grads}))


def test_nans_stay_where_they_are_stopped():
    grads, other = {"w": torch.tensor([math.nan, 1.0])}, {"w": torch.ones(2)}
    for tx, expected in (
        (optim.chain(optim.zero_nans(), optim.multi_steps(optim.sgd(1.0), 2)), [-0.5, -1.0]),
        (optim.multi_steps(optim.chain(optim.zero_nans(), optim.sgd(1.0)), 2), [0.0, -1.0]),
    ):
        _, state = tx.update(grads, tx.init(other), other)
        assert tx.update(other, state, other)[0]["w"].tolist() == expected
    inner = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(0.1))
    tx, params = optim.freeze({"a": True, "b": False}, inner), {"a": torch.ones(2), "b": torch.ones(2)}
    updates, _ = tx.update({"a": torch.full((2,), math.nan), "b": torch.ones(2)}, tx.init(params), params)
    assert not updates["a"].any()
    assert updates["b"].isfinite().all()


def test_slow_averages_of_half_precision():
    """Steps too short for bfloat16 arrive in the average."""
    tx, params = optim.ema_params(optim.sgd(1.0), 0.999), {"w": torch.ones(1, dtype=torch.bfloat16)}
    params, state = course(tx, params, {"w": torch.full((1,), 1e-2)}, 200)
    assert state.average["w"].dtype == torch.float32
    assert state.average["w"].item() < 0.98


def test_rates_are_tensors_of_autograd():
    rate = torch.tensor(0.1, requires_grad=True)
    updates, _ = optim.sgd(rate).update({"w": torch.ones(2)}, optim.sgd(rate).init({"w": torch.ones(2)}))
    updates["w"].sum().backward()
    assert rate.grad == -2


# --- loops of torch's own ----------------------------------------------------------------------------------------------


def stepped(module, optimizer, x=1.0):
    optimizer.zero_grad()
    module(torch.full((1, 2), x)).sum().backward()
    optimizer.step()


SCHEDULERS = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=10),
    "warm-up": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 5)], [2]
    ),
    "swa": lambda o: swa_utils.SWALR(o, swa_lr=0.05),
}


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_torch(name):
    module = nn.Linear(2, 1)
    optimizer = optim.to_torch(optim.inject_hyperparams(optim.sgd)(0.1, momentum=0.9))(module.parameters())
    scheduler = SCHEDULERS[name](optimizer)
    rates = set()
    for _ in range(4):
        stepped(module, optimizer)
        scheduler.step()
        rates.add(optimizer.param_groups[0]["lr"])
    assert len(rates) > 1


def test_scaled_losses():
    """A gradient that overflows is skipped, and the others arrive unscaled."""
    module, scaler = nn.Linear(2, 1), torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = optim.to_torch(optim.sgd(0.1))(module.parameters())
    before = module.weight.detach().clone()
    for x in (math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(module(torch.full((1, 2), x)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(before - module.weight.detach(), torch.full((1, 2), 0.1))


def test_parts_without_gradient_rest():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = optim.to_torch(optim.adamw(0.1, weight_decay=0.5))(module.named_parameters())
    before = module[1].weight.detach().clone()
    module[0](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(before, module[1].weight.detach())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    stepped(module, copy.deepcopy(optimizer))
