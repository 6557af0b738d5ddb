"""What goes into a jitted function and what comes out: numbers, control flow, methods, nodes of the users' own."""

from collections import OrderedDict, defaultdict
from typing import Any

import numpy as np
import optree
import pytest
import torch
from helpers import assert_trees_close

from holofunc import jit


def test_numbers_that_look_equal_are_not_one():
    sign = jit(lambda x, a: torch.copysign(x, torch.tensor(a)))
    assert [sign(torch.ones(()), a) for a in (0.0, -0.0, 0.0)] == [1, -1, 1]
    f = jit(lambda x, a: x + a)
    assert [f(torch.ones(()), float("nan")).isnan().item() for _ in range(3)] == [True] * 3
    assert f.num_graphs == 1  # each nan is another object, and none equals itself
    kind = jit(lambda x, a: x + [bool, int, float].index(type(a)))
    assert [kind(torch.zeros(()), a) for a in (True, 1, 1.0)] == [0, 1, 2]


def test_control_flow_of_torch_is_part_of_the_graph():
    """Branches and bodies are submodules of the graph, which are no constants."""
    shift = torch.tensor(3.0)
    f = jit(lambda x: torch.cond(x.sum() > 0, lambda x: x + shift, lambda x: x - shift, (x,)))
    assert [f(torch.tensor([a])).item() for a in (1.0, -1.0)] == [4, -4]


def test_a_jitted_method_and_one_inside_of_torch_compile():
    class Scaled:
        factor = 2

        @jit
        def of(self, x):
            return x * self.factor

    assert Scaled().of(torch.tensor(3.0)) == 6
    assert Scaled.of(Scaled(), torch.tensor(3.0)) == 6
    double = jit(lambda x: x * 2)
    assert torch.compile(lambda x: double(x) + 1, fullgraph=True, backend="eager")(torch.tensor(3.0)) == 7


class Batch(OrderedDict):
    @property
    def images(self):
        return self["images"]


@optree.dataclasses.dataclass(namespace="holofunc")
class Running:
    mean: Any
    decay: float = optree.dataclasses.field(pytree_node=False, default=0.5)


def test_nodes_of_the_users_own_kinds_go_in_and_out():
    batch = Batch(images=torch.ones(2), labels=torch.zeros(2))
    out = jit(lambda b: Batch(labels=b["labels"] + 1, images=b.images * 2))(batch)
    assert (type(out), list(out)) == (Batch, ["labels", "images"])
    assert_trees_close(dict(out), {"labels": torch.ones(2), "images": torch.full((2,), 2.0)})
    counts = jit(lambda d: defaultdict(int, {k: v + 1 for k, v in d.items()}))(defaultdict(list, a=torch.ones(1)))
    assert (type(counts), counts["a"]) == (defaultdict, 2)

    step = jit(lambda s, x: Running(s.mean * s.decay + x, s.decay), donate=True)
    state = Running(torch.tensor(2.0))
    new = step(state, torch.tensor(1.0))
    assert (type(new), new.mean, new.decay) == (Running, 2, 0.5)
    assert step(Running(torch.tensor(2.0), 0.25), torch.tensor(1.0)).mean == 1.5


def test_an_argument_that_cannot_be_a_constant_is_named():
    message = r"trees of tensors and hashable values, got a ndarray at 'options/scale': make a tensor of it"
    with pytest.raises(TypeError, match=message):
        jit(lambda x, options: x)(torch.ones(1), options={"scale": np.ones(2)})
