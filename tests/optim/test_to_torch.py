"""Transformations in loops that are written for ``torch.optim``: schedulers, closures, groups, checkpoints."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from holofunc import optim, tree

X, Y = torch.linspace(-1, 1, 12).view(6, 2), torch.linspace(0, 1, 6).view(6, 1)


def network():
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(torch.linspace(-0.5, 0.7, p.numel()).view(p.shape) * (1 + 0.1 * i))
    return module


def loss_of(module):
    return ((module(X) - Y) ** 2).mean()


def trained(optimizer, module, steps=5, scheduler=None):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(module).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return torch.cat([p.detach().flatten() for p in module.parameters()])


SAME = {
    "sgd": (lambda: optim.inject_hyperparams(optim.sgd)(0.1, momentum=0.9), lambda p: torch.optim.SGD(p, 0.1, 0.9)),
    "adamw": (lambda: optim.inject_hyperparams(optim.adamw)(0.1), lambda p: torch.optim.AdamW(p, 0.1)),
}
SCHEDULERS = {
    "none": lambda o: None,
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=8, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", SAME)
def test_as_torchs_own(name, scheduler):
    ours, theirs = SAME[name]
    found = []
    for make in (lambda p: optim.to_torch(ours())(p), theirs):
        module = network()
        optimizer = make(module.parameters())
        found.append(trained(optimizer, module, 6, SCHEDULERS[scheduler](optimizer)))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_without_injection_the_rate_is_a_factor():
    module, other = network(), network()
    optimizer = optim.to_torch(optim.sgd(0.2))(module.parameters())
    assert optimizer.param_groups[0]["lr"] == 1.0
    scheduler = lr_scheduler.StepLR(optimizer, 2, 0.5)
    torchs = torch.optim.SGD(other.parameters(), 0.2)
    found = trained(optimizer, module, 5, scheduler), trained(torchs, other, 5, lr_scheduler.StepLR(torchs, 2, 0.5))
    torch.testing.assert_close(*found)


def test_equals_the_pure_loop():
    module = network()
    params = {n: p.detach().clone() for n, p in module.named_parameters()}
    tx = optim.multi_steps(optim.chain(optim.clip_by_global_norm(0.1), optim.adamw(0.1, mask=optim.no_decay_mask)), 2)
    state = tx.init(params)
    for _ in range(5):
        grads = torch.func.grad(lambda p: ((torch.func.functional_call(module, p, X) - Y) ** 2).mean())(params)
        updates, state = tx.update(grads, state, params)
        params = optim.apply_updates(params, updates)
    optimizer = optim.to_torch(tx)(module.named_parameters())
    trained(optimizer, module)
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), params[name])
    assert tree.paths(optimizer.transformation_state()) == tree.paths(state)


def test_names_reach_masks_and_labels():
    module = network()
    labels = lambda p: optim.label_by_path(p, [("0", "body"), ("2", "head")])  # noqa: E731
    tx = optim.partition({"body": optim.set_to_zero(), "head": optim.sgd(0.1)}, labels)
    before = copy.deepcopy(module.state_dict())
    trained(optim.to_torch(tx)(module.named_parameters()), module)
    after = module.state_dict()
    assert [n for n in after if not torch.equal(after[n], before[n])] == ["2.weight", "2.bias"]


def test_a_lightning_shaped_loop():
    """The closure zeroes, computes and differentiates; schedulers and checkpoints are saved beside each other."""

    def fit(module, optimizer, scheduler, steps):
        losses = []
        for _ in range(steps):

            def closure():
                optimizer.zero_grad()
                loss = loss_of(module)
                loss.backward()
                return loss

            losses.append(optimizer.step(closure).item())
            scheduler.step()
        return losses

    def build(module):
        tx = optim.inject_hyperparams(optim.adan)(learning_rate=0.1)
        optimizer = optim.to_torch(tx)(module.named_parameters(), lr=0.05)
        return optimizer, lr_scheduler.CosineAnnealingLR(optimizer, 10)

    module = network()
    whole = fit(module, *build(module), 8)
    assert whole[-1] < whole[0]
    half = network()
    optimizer, scheduler = build(half)
    first = fit(half, optimizer, scheduler, 4)
    saved = [copy.deepcopy(x.state_dict()) for x in (half, optimizer, scheduler)]
    resumed = network()
    optimizer, scheduler = build(resumed)
    for target, state in zip((resumed, optimizer, scheduler), saved, strict=True):
        target.load_state_dict(state)
    assert first + fit(resumed, optimizer, scheduler, 4) == whole


def test_state_dicts_with_names_from_before():
    """Fields that were renamed are found, as in checkpoints: by `load_state_dict` and by `from_torch`."""
    module, tx = network(), optim.multi_steps(optim.adam(0.1), 2)
    optimizer = optim.to_torch(tx)(module.named_parameters())
    trained(optimizer, module)
    old = copy.deepcopy(optimizer.state_dict())
    renamed = {"step": "count", "mini_step": "window"}
    state = old["state"]["transformation"]
    for path in list(state):
        node, slash, last = path.rpartition("/")
        state[node + slash + renamed.get(last, last)] = state.pop(path)
    assert any(path.endswith("count") for path in state)
    other = optim.to_torch(tx)(network().named_parameters())
    other.load_state_dict(old)
    expected = optimizer.transformation_state()
    params = {name: p.detach() for name, p in module.named_parameters()}
    for found in (other.transformation_state(), optim.from_torch(old, params, tx)):
        assert tree.paths(found) == tree.paths(expected)
        assert all(map(torch.equal, tree.leaves(found), tree.leaves(expected)))


def test_state_dicts_survive_files(tmp_path):
    module = network()
    optimizer = optim.to_torch(optim.lookahead(optim.adam(0.1), sync_period=2))(module.parameters())
    trained(optimizer, module)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other = optim.to_torch(optim.lookahead(optim.adam(0.1), sync_period=2))(module.parameters())
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    mine = other.transformation_state()
    for x, y in zip(tree.leaves(mine), tree.leaves(optimizer.transformation_state()), strict=True):
        assert torch.equal(x, y)
        assert x.data_ptr() != y.data_ptr()


def test_the_way_back():
    module, tx = network(), optim.adamw(0.1)
    optimizer = optim.to_torch(tx)(module.named_parameters())
    trained(optimizer, module)
    params = {n: p.detach() for n, p in module.named_parameters()}
    state = optim.from_torch(optimizer.state_dict(), params, tx)
    assert state["adam"].step == 5
    torch.testing.assert_close(state["adam"].mu, optimizer.transformation_state()["adam"].mu)


def test_second_gradients_come_from_the_closure():
    module, other = network(), network()
    optimizer = optim.to_torch(optim.sam(optim.sgd(0.1), rho=0.1))(module.parameters())

    def closure():
        optimizer.zero_grad()
        loss = loss_of(module)
        loss.backward()
        return loss

    optimizer.step(closure)
    grads = torch.autograd.grad(loss_of(other), list(other.parameters()))
    norm = torch.cat([g.flatten() for g in grads]).norm()
    moved = network()
    with torch.no_grad():
        for p, g in zip(moved.parameters(), grads, strict=True):
            p.add_(0.1 * g / norm)
    second = torch.autograd.grad(loss_of(moved), list(moved.parameters()))
    for p, q, g in zip(module.parameters(), other.parameters(), second, strict=True):
        torch.testing.assert_close(p.detach(), q.detach() - 0.1 * g)


def test_weights_to_evaluate_with():
    module = network()
    optimizer = optim.to_torch(optim.ema_params(optim.sgd(0.1), 0.5))(module.named_parameters())
    trained(optimizer, module)
    averaged = optimizer.eval_params()
    assert not torch.equal(averaged["0.weight"], module[0].weight)
    module.load_state_dict(averaged)


def test_parameters_without_a_gradient_rest():
    module = network()
    before = module[0].weight.detach().clone()
    optimizer = optim.to_torch(optim.adamw(0.1, weight_decay=0.5))(module.parameters())
    module[2](torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(module[0].weight, before)


def test_gradient_scalers_and_half_precision():
    module = network().to(torch.bfloat16)
    optimizer = optim.to_torch(optim.adamw(0.1))(module.parameters())
    ((module(X.bfloat16()) - Y.bfloat16()) ** 2).mean().backward()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.step(optimizer)
    assert module[0].weight.dtype == torch.bfloat16
    assert optimizer.transformation_state()["adam"].mu["0"].dtype == torch.float32


def test_groups():
    module = network()
    groups = [{"params": module[0].parameters()}, {"params": module[2].parameters()}]
    optimizer = optim.to_torch(optim.inject_hyperparams(optim.sgd)(0.1))(groups)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1, 0.1])
    trained(optimizer, module)
    groups = [{"params": module[0].parameters(), "lr": 0.2}, {"params": module[2].parameters()}]
    with pytest.raises(
        ValueError, match=r"^param_groups must have the same options, got lr=0.2 in group 0 and .*partition"
    ):
        optim.to_torch(optim.inject_hyperparams(optim.sgd)(0.1))(groups)
    optimizer.param_groups[1]["lr"] = 0.5
    with pytest.raises(ValueError, match=r"^param_groups must have the same options"):
        optimizer.step()


REMEMBER_GRADIENTS = {
    "adan": lambda: optim.adan(0.1),
    "mars": lambda: optim.mars(0.1),
    "own": lambda: optim.GradientTransformation(
        tree.zeros_like, lambda g, s, params=None: (tree.map(lambda x, before: -0.1 * (x + before), g, s), g)
    ),
    "own-params": lambda: optim.GradientTransformation(
        tree.clone, lambda g, s, params=None: (tree.map(lambda x, p, q: 0.1 * (p - q - x), g, params, s), params)
    ),
}


@pytest.mark.parametrize("name", REMEMBER_GRADIENTS)
def test_loops_that_change_gradients_in_place(name):
    """What a state keeps of gradients and parameters is not in their memory."""
    found = []
    for set_to_none in (True, False):
        module = network()
        optimizer = optim.to_torch(REMEMBER_GRADIENTS[name]())(module.parameters())
        for _ in range(4):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss_of(module).backward()
            optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_copies_go_on():
    module = network()
    optimizer = optim.to_torch(optim.inject_hyperparams(optim.adamw)(0.1))(module.parameters())
    trained(optimizer, module, 2)
    other, copied = copy.deepcopy((module, optimizer))
    torch.testing.assert_close(trained(optimizer, module, 2), trained(copied, other, 2), rtol=0, atol=0)


def test_closures_without_a_loss():
    module = network()
    optimizer = optim.to_torch(optim.adam(0.1))(module.parameters())
    assert optimizer.step(lambda: loss_of(module).backward()) is None
    assert optimizer.transformation_state()["adam"].step == 1


@pytest.mark.parametrize(
    "around",
    [
        lambda tx: optim.freeze(lambda p: optim.label_by_path(p, [("0", True)], default=False), tx),
        lambda tx: optim.masked(tx, lambda p: tree.map(lambda x: True, p)),
        optim.flatten,
    ],
    ids=["freeze", "masked", "flatten"],
)
def test_line_searches_in_parts(around):
    """The loss is of all parameters, the search in some of them."""
    module = network()
    optimizer = optim.to_torch(around(optim.lbfgs()))(module.named_parameters())

    def closure():
        optimizer.zero_grad()
        loss = loss_of(module)
        loss.backward()
        return loss

    before = [optimizer.step(closure).item() for _ in range(4)]
    assert before[-1] < 0.5 * before[0]


def test_sparse_gradients_become_dense():
    table = nn.Embedding(4, 2, sparse=True)
    before = table.weight.detach().clone()
    optimizer = optim.to_torch(optim.sgd(0.1))(table.parameters())
    table(torch.tensor([1, 1, 3])).sum().backward()
    optimizer.step()
    torch.testing.assert_close((before - table.weight.detach())[:, 0], torch.tensor([0.0, 0.2, 0.0, 0.1]))


def test_bad_input():
    module = network()
    with pytest.raises(ValueError, match=r"^tx must have injected the options it is given, got \['momentum'\]; there"):
        optim.to_torch(optim.inject_hyperparams(optim.sgd)(0.1))(module.parameters(), momentum=0.9)
    with pytest.raises(TypeError, match=r"^tx must be a GradientTransformation"):
        optim.to_torch(optim.sgd)
    with pytest.raises(
        ValueError, match=r"^params must have different names, got two of \['0.weight', .*: name the mo"
    ):
        optim.to_torch(optim.sgd(0.1))([{"params": network().named_parameters()} for _ in range(2)])
    optimizer = optim.to_torch(optim.sgd(0.1))(module.parameters())
    with pytest.raises(ValueError, match=r"^parameters must be given when the optimizer is built"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    with pytest.raises(ValueError, match=r"^state_dict must be that of a to_torch optimizer"):
        optimizer.load_state_dict(torch.optim.SGD(module.parameters(), 0.1).state_dict())
    other = optim.to_torch(optim.adam(0.1))(module.parameters())
    with pytest.raises(ValueError, match=r"^state_dict must have the structure of this optimizer's state: missing"):
        other.load_state_dict(optimizer.state_dict())
