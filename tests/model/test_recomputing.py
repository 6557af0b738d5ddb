"""Activations that are computed again: the same numbers, statistics renewed once, less memory."""

import functools
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from holofunc import jit, lift, losses, optim, random, train

X = random.normal(random.key(1), (4, 3, 6, 6))
Y = torch.arange(4) % 3


class Block(nn.Module):
    """Statistics, draws, a change of its input in place, several inputs and outputs, options."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.start, self.conv, self.drop = nn.ReLU(inplace=True), nn.Conv2d(5, 5, 3, padding=1), nn.Dropout(0.3)
        self.norm = norm(5)

    def forward(self, x, scale, *, shift=None):
        x = self.drop(self.norm(self.conv(self.start(x)))) * scale["by"]
        return x + shift, {"sum": x.sum((2, 3)), "none": None}


class Net(nn.Module):
    def __init__(self, checkpoints=False, norm=nn.BatchNorm2d):
        super().__init__()
        self.checkpoints = checkpoints
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.blocks = nn.ModuleList([Block(norm), Block(norm)])
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        x, sums = self.stem(x), []
        for block in self.blocks:
            if self.checkpoints:
                x, also = checkpoint(block, x, {"by": 2.0}, shift=x.mean(), use_reentrant=False)
            else:
                x, also = block(x, {"by": 2.0}, shift=x.mean())
            sums.append(also["sum"])
        sums = checkpoint(torch.cat, sums, 1, use_reentrant=False) if self.checkpoints else torch.cat(sums, 1)
        return self.head(sums)


def assert_close(a, b):
    for name in b:
        torch.testing.assert_close(a[name], b[name])


def stepped(model, compile=False, **options):
    tx = optim.sgd(0.1)
    state = train.create_state(model, tx, random.key(0))
    step = train.make_train_step(train.supervised(model, losses.cross_entropy, **options), tx)
    return (jit(step) if compile else step)(state, (X, Y))


@pytest.mark.parametrize(
    ("checkpoints", "options"),
    [
        (False, {"remat": "blocks.*"}),
        (False, {"remat": ["blocks.1", "stem", "head"]}),
        (False, {"remat": "blocks.*", "precision": "bf16"}),
        (False, {"remat": "blocks.0", "frozen": {"blocks.0.conv.weight": True, "blocks.0.norm.weight": True}}),
        (True, {}),
        (True, {"precision": "fp16"}),
    ],
)
def test_a_step_is_the_same(checkpoints, options):
    """Gradients, draws, and statistics, which are renewed once."""
    plain = {name: value for name, value in options.items() if name != "remat"}
    want, wanted = stepped(lift(Net), **plain)
    got, measured = stepped(lift(Net, checkpoints), **options)
    torch.testing.assert_close(measured, wanted)
    assert_close(got.params, want.params)
    assert_close(got.buffers, want.buffers)
    frozen = "frozen" in options
    assert got.buffers["blocks.0.norm.num_batches_tracked"] == (0 if frozen else 1)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [False, True])
def test_in_a_graph(checkpoints):
    want, _ = stepped(lift(Net))
    got, _ = stepped(lift(Net, checkpoints), compile=True, **({} if checkpoints else {"remat": "blocks.*"}))
    assert_close(got.params, want.params)
    assert_close(got.buffers, want.buffers)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # in torch's own forward mode
def test_all_transformations_go_through():
    model = lift(Net, norm=nn.Identity)
    params, buffers = model.init(random.key(0))
    tangent = {n: random.normal(random.key(i), p.shape) for i, (n, p) in enumerate(params.items())}

    def results(model):
        def loss(params, x, y):
            out, _ = model.apply(params, buffers, x[None], train=True, key=random.key(3))
            return losses.cross_entropy(out, y[None])

        def whole(params):
            out, _ = model.apply(params, buffers, X, train=True, key=random.key(3))
            return losses.cross_entropy(out, Y)

        return (
            torch.vmap(torch.func.grad(loss), (None, 0, 0))(params, X, Y),
            torch.func.jvp(torch.func.grad(whole), (params,), (tangent,))[1],
            torch.func.jvp(whole, (params,), (tangent,))[1],
            torch.func.grad(lambda p: sum((g**2).sum() for g in torch.func.grad(whole)(p).values()))(params),
        )

    torch.testing.assert_close(results(model.with_remat(["blocks.*"])), results(model), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")
@pytest.mark.parametrize("train", [False, True])
def test_statistics_have_no_tangents(train):
    """Torch refuses a tangent of BatchNorm's statistics in eval mode, be it zero."""
    plain = lift(Net)
    params, buffers = plain.init(random.key(0))

    def product(model):
        def loss(params):
            return model.apply(params, buffers, X, train=train, key=random.key(3))[0].square().sum()

        return torch.func.jvp(torch.func.grad(loss), (params,), (params,))[1]

    torch.testing.assert_close(product(plain.with_remat(["blocks.*"])), product(plain), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(product(lift(Net, True)), product(plain), rtol=1e-4, atol=1e-4)


def test_what_a_function_captures_keeps_its_derivative():
    """Only arguments can be kept for a second time; what refers to other tensors is computed once."""

    class Captures(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])

        def forward(self, x):
            first = self.layers[0](x).sin()
            second = checkpoint(lambda y: self.layers[1](y).sin() * first, x, use_reentrant=False)
            return checkpoint(lambda y: self.layers[2](y).sin(), second, use_reentrant=False)

    model = lift(Captures)
    params, buffers = model.init(random.key(0))
    x = X[:, :, 0, 0]
    grads = torch.func.grad(lambda p: model.apply(p, buffers, x)[0].sum())(params)
    module = model.to_module(params, buffers)
    module(x).sum().backward()
    assert_close(grads, {name: p.grad for name, p in module.named_parameters()})


def test_the_caller_is_told_which_modules_there_are():
    with pytest.raises(ValueError, match=r"modules must be among \['stem', 'blocks'.* got \['layer4'\]"):
        train.supervised(lift(Net), losses.cross_entropy, remat="layer4")


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint:UserWarning")
@pytest.mark.parametrize("how", ["reentrant", "default", "sequential", "partial", "attribute", "module", "nested"])
def test_however_it_is_called(how):
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.own = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4)), checkpoint
            self.bound = functools.partial(checkpoint, use_reentrant=False)

        def forward(self, x):
            calls = {
                "reentrant": lambda: checkpoint(self.body, x, use_reentrant=True),
                "default": lambda: checkpoint(self.body, x),
                "sequential": lambda: checkpoint_sequential(self.body, 2, x, use_reentrant=True),
                "partial": lambda: self.bound(self.body, x),
                "attribute": lambda: self.own(self.body, x, use_reentrant=False),
                "module": lambda: torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False),
                "nested": lambda: checkpoint(self.inside, x, use_reentrant=False),
            }
            return calls[how]()

        def inside(self, x):
            return checkpoint(self.body, x, use_reentrant=False)

    model = lift(Calls)
    params, buffers = model.init(random.key(0))
    x = X[:, :, 0, 0]
    grads = torch.func.grad(lambda p: model.apply(p, buffers, x, train=True)[0].sin().sum())(params)
    module = model.to_module(params, buffers)
    module.body(x).sin().sum().backward()
    assert_close(grads, {name: p.grad for name, p in module.named_parameters()})


def test_hooks_that_cannot_be_taken_care_of_are_called_that():
    class Hooked(nn.Linear):
        def forward(self, x):
            with torch.autograd.graph.save_on_cpu():
                return super().forward(x)

    model = lift(Hooked, 3, 2)
    params, buffers = model.init(random.key(0))
    with pytest.raises(ValueError, match=r"Hooked sets hooks on saved tensors, which torch.func does not allow"):
        torch.func.grad(lambda p: model.apply(p, buffers, torch.ones(1, 3))[0].sum())(params)


def test_a_first_pass_while_another_thread_is_in_one():
    """Whose calls of torch's function are seen to, and are that function again when both have ended."""
    inside, goes_on = threading.Event(), threading.Event()

    class Waits(Net):
        def forward(self, x):
            inside.set()
            goes_on.wait(60)
            return super().forward(x)

    def gradient(model, params, buffers):
        return torch.func.grad(lambda p: model.apply(p, buffers, X, train=True, key=random.key(0))[0].sum())(params)

    goes_on.set()
    first, second = lift(Waits, True), lift(Net, True)
    states = [model.init(random.key(0)) for model in (first, second)]
    gradient(first, *states[0])
    inside.clear(), goes_on.clear()
    thread = threading.Thread(target=gradient, args=(first, *states[0]))
    thread.start()
    inside.wait(60)
    found = gradient(second, *states[1])
    goes_on.set()
    thread.join()
    assert_close(found, gradient(second, *states[1]))
    assert checkpoint is torch.utils.checkpoint.checkpoint


def test_threads_do_not_meet():
    """Two networks, and a loop of torch's own, each with what it has asked for."""
    body, failed = nn.Linear(5, 5), []

    def of_torch():
        for _ in range(60):
            x = torch.ones(2, 5, requires_grad=True)
            checkpoint(body, x, use_reentrant=False, preserve_rng_state=False).sum().backward()
            assert x.grad is not None

    def lifted(model, params, buffers):
        for _ in range(6):
            torch.func.grad(lambda p: model.apply(p, buffers, X, train=True, key=random.key(0))[0].sum())(params)

    def told(work, *given):
        try:
            work(*given)
        except BaseException as error:
            failed.append(error)

    models = [lift(Net, True) for _ in range(2)]
    states = [model.init(random.key(0)) for model in models]
    for model, state in zip(models, states, strict=True):
        model.apply(*state, X, train=True, key=random.key(0))  # the first pass watches the global generators
    work = [(of_torch,), (of_torch,), *((lifted, model, *state) for model, state in zip(models, states, strict=True))]
    threads = [threading.Thread(target=told, args=each) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_names_of_torch_are_as_they_were():
    stepped(lift(Net, True))
    assert checkpoint is torch.utils.checkpoint.checkpoint
    x = torch.ones(2, requires_grad=True)
    checkpoint(torch.sin, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(x.grad, x.detach().cos())
