"""jit of random programs: random functions of random states, and their derivatives, equal the eager ones.

Each seed is a program of its own, so that a failure can be run again: ``pytest "tests/test_compile_programs.py" -k
"[17]"``. A few run always, a hundred of each kind behind the marker ``slow``.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from helpers import assert_trees_close
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vjp, vmap

from holofunc import compile, jit, tree
from holofunc import random as draws

Leaves = dict[str, Tensor]
Step = Callable[[Leaves, Leaves, Tensor], Leaves]
"""A dict, another one of its names and shapes, and a vector, to a dict of these names and shapes."""


class Pair(NamedTuple):
    limit: Tensor
    window: Tensor


SHAPES = [(), (1,), (3,), (256,), (257,), (5, 7), (7, 7), (16, 16), (2, 3, 3, 3), (300, 2), (1, 1), (4, 1, 5)]
DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16]

SMOOTH = [
    lambda x: x,
    lambda x: x * 2 + 1,
    lambda x: x * 1,
    lambda x: x + torch.zeros_like(x),
    lambda x: x.tanh(),
    lambda x: x.sin() * x,
    lambda x: x.clone(),
    lambda x: (x * x + 1).sqrt(),
]
MIXED = [
    lambda x, y: y,
    lambda x, y: x * 0.9 + y * 0.1,
    lambda x, y: x.lerp(y, 0.1),
    lambda x, y: torch.where(x > y, x, y),
    lambda x, y: x.addcmul(y, y),
]
BY_LEAF = [  # what reads other elements than the one that it makes
    lambda x: x.flip(0) if x.ndim else x,
    lambda x: x.roll(1),
    lambda x: x.t() if x.ndim == 2 and x.shape[0] == x.shape[1] else x,
    lambda x: x @ x if x.ndim == 2 and x.shape[0] == x.shape[1] else x,
    lambda x: x.cumsum(0) / (1 + len(x)) if x.ndim else x,
    lambda x: x.reshape(-1).softmax(0).reshape(x.shape),
    lambda x: torch.cat([x[1:], x[:1]]) if x.ndim else x,
    lambda x: x.sum() * torch.ones_like(x) / x.numel(),
    lambda x: torch.stack([x])[0],
]
STATEFUL = [  # what is no smooth function of its argument
    lambda x: x.detach(),
    lambda x: x.sign(),
    lambda x: torch.full_like(x, 3),
    lambda x: x.clone().mul_(2),
    lambda x: x.clone().zero_(),
    lambda x: x[...],
    lambda x: x.expand_as(x),
]


def a_step(rng: random.Random, *, smooth: bool) -> Step:
    one, mix, move = rng.choice(SMOOTH), rng.choice(MIXED), rng.choice(BY_LEAF)
    key, at = draws.key(rng.randrange(100)), rng.random()

    def where_positive(leaves: Leaves, other: Leaves, x: Tensor) -> Leaves:
        return tree.where(x.sum() > 0, leaves, {name: v.to(leaves[name].dtype) for name, v in other.items()})

    def at_one_leaf(leaves: Leaves, other: Leaves, x: Tensor) -> Leaves:
        name = list(leaves)[int(at * len(leaves))]
        return {**leaves, name: move(leaves[name])}

    def by_leaf_norm(leaves: Leaves, other: Leaves, x: Tensor) -> Leaves:
        return tree.elementwise(lambda x, norm: x / (1 + norm), leaves, tree.leaf_norm(leaves))

    def by_global_norm(leaves: Leaves, other: Leaves, x: Tensor) -> Leaves:
        norm = tree.global_norm(leaves)
        return tree.elementwise(lambda x: x / (1 + norm.to(x.dtype)), leaves)

    def weighted(leaves: Leaves, other: Leaves, x: Tensor) -> Leaves:
        values = tree.leaf_values({name: i + 0.5 for i, name in enumerate(leaves)}, leaves)
        return tree.elementwise(lambda x, value: x * value, leaves, values)

    def noisy(leaves: Leaves, other: Leaves, x: Tensor) -> Leaves:
        return {
            name: leaf + draws.normal(draws.fold_in(key, i), leaf.shape).to(leaf.dtype)
            for i, (name, leaf) in enumerate(leaves.items())
        }

    steps: list[Step] = [
        lambda leaves, other, x: tree.map(one, leaves),
        lambda leaves, other, x: tree.elementwise(one, leaves),
        lambda leaves, other, x: tree.map(mix, leaves, other),
        lambda leaves, other, x: tree.elementwise(mix, leaves, other),
        lambda leaves, other, x: tree.map(move, leaves),
        *(where_positive, at_one_leaf, by_leaf_norm, by_global_norm, weighted, noisy),
    ]
    if not smooth:
        hard = rng.choice(STATEFUL)
        steps += [
            lambda leaves, other, x: tree.map(hard, leaves),
            lambda leaves, other, x: dict(reversed(leaves.items())),
            lambda leaves, other, x: tree.map(lambda leaf: compile.opaque(lambda y: y * 2 + 1, leaf), leaves),
            lambda leaves, other, x: grad(lambda p: tree.total(tree.map(lambda y: (y * y).double(), p)))(leaves),
            lambda leaves, other, x: tree.map(lambda y: vmap(lambda z: z * 2 - 1)(y) if y.ndim else y, leaves),
        ]
    return rng.choice(steps)


def some_leaves(rng: random.Random, dtypes: list[torch.dtype], most: int = 4) -> Leaves:
    return {
        name: (torch.rand(rng.choice(SHAPES), generator=seeded(rng), dtype=torch.float64) * 4 - 2).to(
            rng.choice(dtypes)
        )
        for name in rng.sample(["w", "b", "a.x", "scale", "z", "0", "1"], rng.randint(1, most))
    }


def seeded(rng: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(rng.randrange(2**31))


def alike(rng: random.Random, leaves: Leaves) -> Leaves:
    return {n: torch.rand(x.shape, generator=seeded(rng), dtype=torch.float64).to(x.dtype) for n, x in leaves.items()}


# --- states --------------------------------------------------------------------------------------------------------


def a_state(rng: random.Random) -> dict:
    params = some_leaves(rng, DTYPES if rng.random() < 0.3 else [rng.choice(DTYPES)])
    state = {"params": params, "step": torch.tensor(rng.randint(0, 5)), "nothing": None}
    for name in ("moments", "more")[: rng.randint(0, 2)]:
        state[name] = alike(rng, params)
    if rng.random() < 0.4:
        state["part"] = alike(rng, dict(rng.sample(sorted(params.items()), rng.randint(1, len(params)))))
    if rng.random() < 0.4:
        state["others"] = some_leaves(rng, DTYPES)
    if rng.random() < 0.3:
        state["pair"] = Pair(torch.tensor(3), torch.ones(rng.choice(SHAPES)))
    return state


def a_program(rng: random.Random, state: dict) -> Callable[[dict, Tensor], tuple]:
    """A function of a state and a batch to a new state and some of what was computed on the way."""
    dicts = [name for name, node in state.items() if type(node) is dict]
    kinds = {name: tree.map(lambda x: tuple(x.shape), state[name]) for name in dicts}
    places = [rng.choice(dicts) for _ in range(rng.randint(1, 7))]
    plan = [
        (name, rng.choice([n for n in dicts if kinds[n] == kinds[name]]), a_step(rng, smooth=False), rng.random() < 0.2)
        for name in places
    ]
    exchange, aux = rng.random() < 0.2, rng.random() < 0.2

    def program(state: dict, batch: Tensor) -> tuple:
        new, results = dict(state), [batch.mean()]
        for name, other, step, returned in plan:
            new[name] = step(new[name], new[other], batch)
            results += [new[name]] if returned else []
        if exchange and "moments" in new:
            new["params"], new["moments"] = new["moments"], new["params"]
        results += [state["params"]] if aux else []
        for name in dicts:  # a state keeps its order of names and its dtypes
            new[name] = {n: new[name][n].to(x.dtype) for n, x in state[name].items()}
        return {**new, "step": new["step"] + 1}, *results

    return program


def check_state(seed: int) -> None:
    rng = random.Random(seed)
    state = a_state(rng)
    program, batch = a_program(rng, state), torch.rand(8, generator=seeded(rng)) - 0.5
    donate = rng.random() < 0.7
    fast, mine = jit(program, donate=donate), tree.clone(state)
    half = any(x.dtype == torch.bfloat16 for x in tree.leaves(state))
    tolerance = {"rtol": 6e-2, "atol": 6e-2} if half else {"rtol": 1e-4, "atol": 1e-4}
    for _ in range(2):
        expected, before = program(state, batch), tree.map(torch.clone, mine)
        found = fast(mine, batch)
        assert_trees_close(found, expected, equal_nan=True, **tolerance)
        if not donate:
            assert_trees_close(mine, before)
        state, mine = expected[0], found[0]
    kept = tree.map(torch.clone, found[1:])
    fast(mine, batch)
    assert_trees_close(found[1:], kept)  # results own their memory


@pytest.mark.parametrize("seed", range(4))
def test_a_random_state_program(seed):
    check_state(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 104))
def test_many_random_state_programs(seed):
    check_state(seed)


# --- transformations -----------------------------------------------------------------------------------------------


def a_loss(rng: random.Random) -> Callable[[Leaves, Leaves, Tensor], Tensor]:
    steps = [a_step(rng, smooth=True) for _ in range(rng.randint(1, 5))]

    def loss(params: Leaves, other: Leaves, x: Tensor) -> Tensor:
        total = x.sum() * 0
        for step in steps:
            params = step(params, other, x)
            total = total + 0.1 * tree.total(params)
        return total + sum((v * v).sum() for v in params.values()) + (x * x).sum() * next(iter(params.values())).sum()

    return loss


def descended(loss, rate, params, other, x) -> Leaves:
    gradients = grad(loss)(params, other, x)
    return tree.elementwise(lambda p, g: p - rate * g, params, gradients)


TRANSFORMED: dict[str, Callable] = {
    "value": lambda f, p, q, xs: grad_and_value(f)(p, q, xs[0]),
    "vmap of grad": lambda f, p, q, xs: vmap(grad(f), (None, None, 0))(p, q, xs),
    "grad of vmap": lambda f, p, q, xs: grad(lambda p: vmap(f, (None, None, 0))(p, q, xs).mean())(p),
    "jvp": lambda f, p, q, xs: jvp(lambda p: f(p, q, xs[0]), (p,), (q,)),
    "jvp of grad": lambda f, p, q, xs: jvp(lambda p: grad(f)(p, q, xs[0]), (p,), (q,)),
    "vjp of grad": lambda f, p, q, xs: vjp(lambda p: grad(f)(p, q, xs[0]), p)[1](q)[0],
    "population": lambda f, p, q, xs: vmap(lambda p: grad(f)(p, q, xs[0]))(
        tree.map(lambda x: torch.stack([x, 2 * x]), p)
    ),
    "step": lambda f, p, q, xs: (descended(f, 0.1, p, q, xs[0]), tree.leaf_norm(p)),
    "metagradient": lambda f, p, q, xs: grad(lambda rate: f(descended(f, rate, p, q, xs[0]), q, xs[1]))(xs[0, 0]),
    "maml": lambda f, p, q, xs: grad(lambda p: vmap(lambda x: f(descended(f, 0.1, p, q, x), q, x))(xs).mean())(p),
}


def check_transformed(name: str, seed: int) -> None:
    rng = random.Random(f"{name} {seed}")
    dtype = torch.float64 if seed % 2 or "jvp" in name else torch.float32  # torch's tangents of numbers promote
    params = some_leaves(rng, [dtype])
    other, xs = alike(rng, params), (torch.rand(4, 3, generator=seeded(rng)) - 0.5).to(dtype)
    loss, transformed = a_loss(rng), TRANSFORMED[name]
    expected = transformed(loss, params, other, xs)
    fast = jit(lambda p, q, xs: transformed(loss, p, q, xs))
    tolerance = 1e-8 if dtype == torch.float64 else 2e-3
    for _ in range(2):
        assert_trees_close(fast(params, other, xs), expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", ["vmap of grad", "metagradient"])
def test_a_random_transformed_program(name):
    check_transformed(name, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize("name", TRANSFORMED)
def test_many_random_transformed_programs(name, seed):
    check_transformed(name, seed)


# --- what random programs found ------------------------------------------------------------------------------------

ROWS, SCALES = torch.ones(4, 60), torch.arange(1.0, 5.0)[:, None]

CUT = {
    "a part": lambda x, n: (x / n).reshape(-1)[:97] * 2,
    "parts": lambda x, n: torch.cat([part.flip(0) for part in (x / n).reshape(-1).split([100, 140])]),
    "a part of what follows": lambda x, n: ((x / n).reshape(-1) * 2 + 1)[3:100].exp(),
    "rows of rows": lambda x, n: (x.view(2, 2, 60) / n.view(2, 2, 1)).reshape(2, 120)[:, :97] * 2,
    "a column": lambda x, n: (x / n)[..., None].reshape(240, 1)[:97] * 2,
    "by numbers": lambda x, n: (x / n).reshape(-1)[torch.arange(97)] * 2,
    "repeated": lambda x, n: n.flatten().repeat_interleave(60)[:97] * 2,
    "two results": lambda x, n: torch.where(x[0, :1] > 0, (x / n).reshape(-1)[:97], n.expand(4, 60).reshape(-1)[5:102]),
    "a derivative": lambda x, n: torch.func.grad(lambda n: ((x / n).reshape(-1)[:97].square()).sum())(n),
}


@pytest.mark.parametrize("name", CUT)
def test_what_is_flattened_and_cut_is_computed_to_its_end(name):
    """Inductor leaves elements out there: ``torch.compile`` of these returns memory that nobody wrote."""
    used = [torch.full((240,), 7e9) for _ in range(60)]
    del used
    assert_trees_close(jit(CUT[name])(ROWS, SCALES), CUT[name](ROWS, SCALES), rtol=1e-6, atol=1e-6)
