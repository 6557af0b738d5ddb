"""What goes into a jitted function and what comes out: numbers, control flow, methods, nodes of the users' own."""

import math
import subprocess
import sys
import threading
from collections import OrderedDict, defaultdict
from typing import Any

import numpy as np
import optree
import pytest
import torch
from helpers import assert_trees_close
from torch.utils.flop_counter import FlopCounterMode

from holofunc import compile, jit, tree


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


def test_sparse_tensors_are_refused_by_name():
    with pytest.raises(TypeError, match=r"takes dense tensors, got one of torch.sparse_coo: see Tensor.to_dense"):
        jit(lambda x: x * 2)(torch.eye(2).to_sparse())


# --- donated states ----------------------------------------------------------------------------------------------


def decayed(state, x):
    mu = {name: 0.5 * m + x * state["params"][name] for name, m in state["mu"].items()}
    return {"params": {name: p - 0.1 * mu[name] for name, p in state["params"].items()}, "mu": mu}


def make_state(start=1.0):
    params = {"w": torch.full((2, 3), start), "b": torch.full((3,), start)}
    return {"params": params, "mu": tree.zeros_like(params)}


def test_a_donated_state_in_inference_mode():
    step, expected = jit(decayed, donate=True), decayed(decayed(make_state(), 1.0), 1.0)
    with torch.inference_mode():
        assert_trees_close(step(step(make_state(), 1.0), 1.0), expected)
    state = step(make_state(), 1.0)
    with torch.inference_mode():  # where the views of a vector do not say so
        state = step(state, 1.0)
    assert_trees_close(state, expected)


def test_a_new_state_may_have_its_names_in_another_order():
    """As in every pytree of dicts."""
    step = jit(decayed, donate=True)
    state = step(make_state(), 1.0)
    turned = {"mu": state["mu"], "params": dict(reversed(state["params"].items()))}
    new, expected = step(turned, 1.0), decayed(decayed(make_state(), 1.0), 1.0)
    assert_trees_close({node: {n: new[node][n] for n in expected[node]} for node in expected}, expected)


def test_threads_compile_one_after_the_other():
    step, results = jit(decayed), {}

    def run(start):
        results[start] = step(make_state(start), 1.0)

    threads = [threading.Thread(target=run, args=(float(start),)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for start, result in results.items():
        assert_trees_close(result, decayed(make_state(start), 1.0))
    assert (len(results), step.num_graphs) == (4, 1)


double = jit(lambda x: x * 2)


def test_a_jitted_function_inside_of_an_opaque_one():
    f = jit(lambda x: compile.opaque(lambda y: double(y) + 1, x + 1))
    assert f(torch.tensor(1.0)) == 5


@pytest.mark.parametrize("names", ["ba", "ca", "cb", "cba", "eda", "de"])
def test_a_part_of_the_parameters_may_have_its_leaves_in_another_order(names):
    """Moments of what is not frozen, by a label function that goes through the names in its own way."""
    shapes = {"a": (3, 5), "b": (7,), "c": (), "d": (0,), "e": (0, 4)}
    params = {name: 0.1 + torch.arange(math.prod(shape)).view(shape) for name, shape in shapes.items()}
    start = {"params": params, "part": {name: params[name] + 1 for name in names}}
    fast, state, expected = jit(lambda s: tree.map(lambda x: 2 * x + 1, s), donate=True), start, start
    for _ in range(3):
        state, expected = fast(state), tree.map(lambda x: 2 * x + 1, expected)
        assert_trees_close(state, expected, rtol=1e-6, atol=0)
    assert fast.num_graphs == 1


def test_a_donated_state_may_come_from_a_long_chain_of_operations():
    def step(state):
        x = state["a"]
        for _ in range(1500):
            x = x.cos()
        return {"a": x, "b": state["b"]}, x + x.cos()

    start = {"a": torch.zeros(3), "b": torch.ones(2)}
    assert_trees_close(jit(step, donate=True)(tree.map(torch.clone, start)), step(start), rtol=1e-6, atol=0)


class Scaled(torch.Tensor):
    """A class that says what addition does."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result * 100 if func is torch.add else result


def test_a_class_of_tensors_says_what_operations_do():
    fast = jit(lambda x: torch.add(x, 1))
    for _ in range(2):
        assert fast(torch.ones(2)).tolist() == [2.0, 2.0]
        assert fast(torch.ones(2).as_subclass(Scaled)).tolist() == [200.0, 200.0]


def test_the_compiler_is_imported_by_the_first_call_only():
    program = "import sys; from holofunc import jit; jit(lambda x: x); print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"


def test_many_functions_with_breaks_are_all_compiled():
    def scaled(factor):
        def fn(x):
            return x * factor * (2 if torch.compiler.is_compiling() else 0)

        return jit(fn, fullgraph=False)

    assert [scaled(n)(torch.ones(())).item() for n in range(12)] == [2 * n for n in range(12)]


def test_under_a_mode_that_sees_operations_it_is_the_function_itself():
    fast, x = jit(lambda x: x @ x), torch.ones(3, 3)
    fast(x)
    with FlopCounterMode(display=False) as counter:
        fast(x)
    assert counter.get_total_flops() == 2 * 3**3
