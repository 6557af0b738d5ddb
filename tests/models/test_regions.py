"""Repeated blocks of a jitted training step: compiled once per kind, and nothing else about them changes."""

import pytest
import torch
from torch import nn

from holofunc import jit, lift, losses, optim, random, train
from holofunc.compile import blocks, programs
from holofunc.model import Drop
from holofunc.models import regions
from holofunc.models.branches import Branches


class Block(nn.Module):
    def __init__(self, slope=0.1, drop=0.0):
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.act, self.drop = nn.LeakyReLU(slope), Drop(drop)

    def forward(self, x):
        return x + self.drop(self.act(self.norm(self.conv(x))))


class Views(nn.Module):
    """Saves, and returns gradients that are, parts of one tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)

    def forward(self, x):
        filters = torch.cat([self.first.weight, self.second.weight])
        one, other = nn.functional.conv2d(x, filters).unflatten(1, (2, 6)).sigmoid().unbind(1)
        return x + one * other + (self.first.bias + self.second.bias)[:, None, None]


class Branched(nn.Module):
    """The gradients of its norms are parts of one tensor, or one sum, which the compiler computes once."""

    def __init__(self):
        super().__init__()
        self.branches = Branches(6, 6, [3, 3, 1, None], depthwise=True)

    def forward(self, x):
        return self.branches(x).relu()


class Excited(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.gate = regions.Gate(nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 6, 1), nn.Sigmoid())

    def forward(self, x):
        x = self.conv(x)
        return x * self.gate(x.mean((2, 3), keepdim=True))


class Projected(nn.Module):
    """Ends in a batch norm, whose gradient on channels_last lies otherwise than torch foresees."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(6, 8, 3, padding=1), regions.Gate(nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.tail = regions.Unfused(nn.ReLU6(), nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6))

    def forward(self, x):
        x = self.conv(x)
        return self.tail(x * self.gate(x.mean((2, 3), keepdim=True)))


class Net(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.stem, self.stage, self.head = nn.Conv2d(3, 6, 1), regions.Stage(*blocks), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.stage(self.stem(x)).mean((2, 3)))


@pytest.fixture(autouse=True)
def traced_only(monkeypatch):
    """All but the C++ compiler, which has no part in what is tested here; and no regions from before."""
    monkeypatch.setattr(programs, "compile_by_blocks", torch._dynamo.lookup_backend("aot_eager"))
    monkeypatch.setattr(regions, "_REGIONS", {})
    monkeypatch.setattr(regions, "REPEATS", 4)
    torch.manual_seed(0)  # the blocks' first weights: in half precision some lie too near to a kink
    torch.compiler.reset()


def steps(net, objective=losses.cross_entropy, precision="fp32", count=2):
    """The states after some steps, eager and compiled, in memory formats of their own."""
    model, tx = lift(Net, *net), optim.sgd(0.1)
    objective = train.supervised(model, objective, precision=precision) if precision else objective(model)
    step = train.make_train_step(objective, tx)
    x = random.normal(random.key(1), (4, 3, 8, 8)).contiguous(memory_format=torch.channels_last)
    found = []
    for run in (step, jit(step)):
        state = train.create_state(model, tx, random.key(0), memory_format=torch.channels_last)
        for _ in range(count):
            state, metrics = run(state, (x, torch.arange(4)))
        found.append({**state.params, **state.buffers, **metrics})
    return found


def assert_same(eager, compiled, **tolerance):
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_a_step_is_the_same_and_blocks_alike_are_one_program(drop):
    eager, compiled = steps([Block(drop=drop) for _ in range(5)])
    assert_same(eager, compiled, rtol=1e-5, atol=1e-6)
    assert len(regions._REGIONS) == 1


def test_values_that_share_memory_are_told_apart():
    eager, compiled = steps([Views() for _ in range(4)])
    assert_same(eager, compiled, rtol=1e-5, atol=1e-6)
    assert len(regions._REGIONS) == 1


def test_what_the_compiler_finds_equal_does_not_share_memory(monkeypatch):
    monkeypatch.setattr(programs, "compile_by_blocks", blocks.compile_by_blocks)
    eager, compiled = steps([Branched() for _ in range(4)])
    assert_same(eager, compiled, rtol=1e-5, atol=1e-6)


def test_half_precision_is_that_of_the_step():
    eager, compiled = steps([Block() for _ in range(4)], precision="bf16")
    assert_same(eager, compiled, rtol=0.05, atol=0.02)
    assert len(regions._REGIONS) == 1
    steps([Block() for _ in range(4)], count=1)
    assert len(regions._REGIONS) == 2


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.05)])
def test_gates_run_as_they_are(precision, tolerance):
    eager, compiled = steps([Excited(), Excited()], precision=precision)
    assert_same(eager, compiled, rtol=tolerance, atol=tolerance / 5)
    assert len(regions._REGIONS) == 1


@pytest.mark.parametrize(("precision", "tolerance", "count"), [("fp32", 1e-5, 2), ("bf16", 0.05, 1)])
def test_what_ends_in_a_norm_runs_as_it_is_in_single_precision(precision, tolerance, count):
    eager, compiled = steps([Projected(), Projected()], precision=precision)
    assert_same(eager, compiled, rtol=tolerance, atol=tolerance / 5)
    assert len(regions._REGIONS) == count  # the gates, and the tails


def test_blocks_of_other_options_are_other_programs_and_few_are_none():
    eager, compiled = steps([*(Block() for _ in range(4)), *(Block(slope=0.3) for _ in range(4)), Block(slope=0.2)])
    assert_same(eager, compiled, rtol=1e-5, atol=1e-6)
    assert len(regions._REGIONS) == 2


def test_objectives_that_differentiate_themselves_see_the_blocks_as_they_are():
    def penalized(model):
        def objective(params, buffers, batch, key):
            def loss(x):
                out, new = model.apply(params, buffers, x, train=True, key=key)
                return losses.cross_entropy(out, batch[1]), (new, out)

            slope, (new, out) = torch.func.grad(loss, has_aux=True)(batch[0])
            return slope.square().sum(), train.Aux(new, {}, out)

        return objective

    eager, compiled = steps([Block() for _ in range(4)], penalized, precision=None)
    assert_same(eager, compiled, rtol=1e-4, atol=1e-5)
    assert not regions._REGIONS


def test_a_block_that_is_differentiated_twice_says_what_to_do():
    """`torch.autograd` inside of the objective cannot be seen from a block, as `torch.func.grad` can."""

    def penalized(model):
        def objective(params, buffers, batch, key):
            out, new = model.apply(params, buffers, batch[0], train=True, key=key)
            loss = losses.cross_entropy(out, batch[1])
            (slope,) = torch.autograd.grad(loss, [params["stem.weight"]], create_graph=True)
            return loss + slope.square().sum(), train.Aux(new, {}, out)

        return objective

    with pytest.raises(RuntimeError, match=r"differentiated twice.*torch\.func\.grad"):
        steps([Block() for _ in range(4)], penalized, precision=None)


def test_outside_a_jitted_step_a_stage_is_a_sequence():
    stage = regions.Stage(*(Block() for _ in range(4)))
    x = random.normal(random.key(0), (2, 6, 5, 5))
    torch.testing.assert_close(stage(x), nn.Sequential(*stage)(x), rtol=1e-5, atol=1e-6)
    assert not regions._REGIONS
