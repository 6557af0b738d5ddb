"""Collectives: values, derivatives against one process, transformations, compiled graphs, and what is refused."""

import warnings

import pytest
import torch

from holofunc import distributed, jit

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script")  # inside of torch, at the first jvp

WORLD = 2
X = torch.arange(WORLD * 8.0).reshape(WORLD, 4, 2).sin()
V = torch.arange(WORLD * 8.0).reshape(WORLD, 4, 2).cos()

OPS = {
    "psum": (distributed.psum, lambda xs: [sum(xs)] * WORLD),
    "pmean": (distributed.pmean, lambda xs: [sum(xs) / WORLD] * WORLD),
    "all_gather": (distributed.all_gather, lambda xs: [torch.cat(list(xs))] * WORLD),
    "reduce_scatter": (distributed.reduce_scatter, lambda xs: list(sum(xs).chunk(WORLD))),
}


def measured(y, r):
    """The loss of a rank: another one on each, so that a cotangent from the wrong rank shows."""
    return ((1 + r) * y**3).sum() + y.sum()


def here(name, transformation, x, v):
    """A transformation of this rank's loss."""
    op, r = OPS[name][0], distributed.rank()

    def loss(x):
        return measured(op(x), r)

    return {
        "value": lambda: op(x),
        "grad": lambda: torch.func.grad(loss)(x),
        "jvp": lambda: torch.func.jvp(op, (x,), (v,))[1],
        "forward over reverse": lambda: torch.func.jvp(torch.func.grad(loss), (x,), (v,))[1],
        "reverse over reverse": lambda: torch.func.vjp(torch.func.grad(loss), x)[1](v)[0],
        "vmap": lambda: torch.vmap(op)(torch.stack([x, v])),
        "vmap along the last axis": lambda: torch.vmap(op, in_dims=2)(torch.stack([x, v], 2)),
        "vmap of grad": lambda: torch.vmap(torch.func.grad(loss))(torch.stack([x, v])),
        "grad of vmap": lambda: torch.func.grad(lambda x: torch.vmap(loss)(torch.stack([x, v])).sum())(x),
        "backward": lambda: torch.autograd.grad(loss(leaf := x.clone().requires_grad_()), leaf)[0],
    }[transformation]()


def in_one_process(name, transformation):
    """The same of the sum of all ranks' losses, each rank's part."""
    op = OPS[name][1]

    def loss(xs):
        return sum(measured(y, r) for r, y in enumerate(op(xs)))

    grad = torch.func.grad(loss)
    hvp = torch.func.jvp(grad, (X,), (V,))[1]
    return {
        "value": lambda: op(X),
        "grad": lambda: grad(X),
        "jvp": lambda: op(V),
        "forward over reverse": lambda: hvp,
        "reverse over reverse": lambda: hvp,
        "vmap": lambda: [torch.stack(pair) for pair in zip(op(X), op(V), strict=True)],
        "vmap along the last axis": lambda: [torch.stack(pair) for pair in zip(op(X), op(V), strict=True)],
        "vmap of grad": lambda: torch.stack([grad(X), grad(V)], 1),
        "grad of vmap": lambda: grad(X),
        "backward": lambda: grad(X),
    }[transformation]()


TRANSFORMATIONS = [
    "value", "grad", "jvp", "forward over reverse", "reverse over reverse", "vmap", "vmap along the last axis",
    "vmap of grad", "grad of vmap", "backward",
]  # fmt: skip
CASES = [(name, transformation) for name in OPS for transformation in TRANSFORMATIONS]


@pytest.fixture(scope="module")
def ranks():
    def work():
        mine = X[distributed.rank()], V[distributed.rank()]
        warnings.filterwarnings("ignore", ".torch.jit.script")  # inside of torch
        return {case: here(*case, *mine).detach() for case in CASES}

    return distributed.launch(work, WORLD)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}, {case[1]}")
def test_is_what_it_is_in_one_process(ranks, case):
    for rank, expected in zip(ranks, in_one_process(*case), strict=True):
        torch.testing.assert_close(rank[case], expected)


@pytest.mark.slow
def test_in_graphs():
    def work():
        warnings.filterwarnings("ignore")
        mine = X[distributed.rank()], V[distributed.rank()]
        some = ["grad", "forward over reverse", "vmap of grad"]

        def together(x, v):
            return {f"{name}, {how}": here(name, how, x, v) for name in OPS for how in some}

        compiled, eager = jit(together)(*mine), together(*mine)
        return max(float((compiled[case] - eager[case]).abs().max()) for case in eager)

    assert max(distributed.launch(work, WORLD)) < 1e-4


def test_several_groups_and_ragged_rows():
    def work():
        pair = torch.distributed.new_group([0, 1])
        alone = [torch.distributed.new_group([r]) for r in range(3)][distributed.rank()]
        one, rank = torch.tensor(1.0 + distributed.rank()), distributed.rank()
        rows = torch.full((2 * rank, 2), float(rank))
        in_pair = distributed.psum(one, pair).item() if rank < 2 else None
        return (
            in_pair,
            distributed.psum(one, alone).item(),
            distributed.psum(one).item(),
            distributed.all_gather(rows, ragged=True).tolist(),
            distributed.world_size(alone),
        )

    rows = [[1.0, 1.0]] * 2 + [[2.0, 2.0]] * 4
    expected = [(3.0, 1.0, 6.0, rows, 1), (3.0, 2.0, 6.0, rows, 1), (None, 3.0, 6.0, rows, 1)]
    assert distributed.launch(work, 3) == expected


def test_in_one_process_all_is_the_identity():
    x = torch.ones(2, 3)
    for op, _ in OPS.values():
        assert op(x) is x
    assert distributed.all_gather(x, ragged=True) is x
    assert (distributed.rank(), distributed.world_size(), distributed.is_rank_zero()) == (0, 1, True)


def test_bad_input():
    for op in (distributed.all_gather, distributed.reduce_scatter):
        with pytest.raises(ValueError, match="x must have a first axis along which ranks share it, got a 0-d tensor"):
            op(torch.tensor(1.0))
    for name in ("ranks", "threads"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
            distributed.launch(print, **{"ranks": 1, name: 0})
    with pytest.raises(ValueError, match="timeout must be positive seconds, got 0"):
        distributed.init(timeout=0)

    def odd():
        with pytest.raises(ValueError, match=r"x must have a multiple of 2 rows, one share per rank, got \(3,\)"):
            distributed.reduce_scatter(torch.ones(3))
        with pytest.raises(ValueError, match="launch must be called by a process that has joined no run"):
            distributed.launch(print, 2)

    distributed.launch(odd, WORLD)
