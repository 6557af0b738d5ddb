"""Gathering leaves that lie apart, cutting graphs into blocks of rows, and what runs alone."""

import ctypes
import itertools

import numpy as np
import pytest
import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from holofunc import arena, jit, nn, optim, random, tree
from holofunc.compile import Staged, alone, blocks, leafwise, passes
from holofunc.compile.gathering import Gathering, gather
from holofunc.compile.loops import Loop, Sources

SHAPES = {"conv": (9, 5, 3, 3), "bias": (9,), "wide": (17, 130), "number": (), "norm": (33,)}


def draw(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    flat = {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in SHAPES.items()}
    return {**flat, "conv": flat["conv"].contiguous(memory_format=torch.channels_last)}


@pytest.fixture
def cuts(monkeypatch):
    """Small blocks; how graphs were cut, in order."""
    found, of = [], blocks._Cut.of
    monkeypatch.setattr(blocks._Cut, "of", lambda *args: found.append(of(*args)) or found[-1])
    monkeypatch.setattr(arena.layouts, "BLOCK", 256)
    arena.layouts._interned.cache_clear()
    yield found
    arena.layouts._interned.cache_clear()


# --- gathering ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strided", [False, True])
def test_a_gathered_arena_holds_the_leaves(strided):
    layout = arena.layout_of([draw(0)])
    leaves = draw(1)
    if strided:  # another memory order than the layout's, and gaps
        leaves |= {"conv": leaves["conv"].contiguous(), "wide": torch.stack([leaves["wide"]] * 2, -1)[..., 0]}
    found = gather(list(leaves.values()), layout)
    for name, leaf in found.items():
        assert torch.equal(leaf, leaves[name]), name
    for mine, joined in zip(found.vectors, layout.join(leaves), strict=True):
        assert torch.equal(mine, joined)  # zeros between the leaves, too


def put_together(blocks, copies, size):
    """What a loop reads: blocks of ``size`` float32 numbers at their addresses, after the copies."""
    for to, source, number in copies.tolist():
        ctypes.memmove(to, source, number) if source else ctypes.memset(to, 0, number)
    return torch.tensor([list((ctypes.c_float * size).from_address(block)) for block in blocks.tolist()])


def node_of(leaves, starts, rows, width):
    """A node of a graph that gathers ``leaves``."""
    graph = fx.Graph()
    places = [graph.placeholder(f"leaf{i}") for i in range(len(leaves))]
    for place, leaf in zip(places, leaves, strict=True):
        place.meta["val"] = leaf
    axes = [d for leaf in leaves for d in range(leaf.ndim)]
    node = graph.call_function(torch.ops.holofunc.gather.default, (places, starts, axes, rows, width))
    node.meta["val"] = torch.empty(rows, width)
    return node


@pytest.mark.parametrize("count", [1, 3, 7, 21])
def test_blocks_follow_each_other(count):
    leaves = [torch.arange(100.0), torch.arange(3.0), torch.arange(2200.0).view(2, 1100).T.contiguous().T[:, ::2]]
    rows, width, starts = 21, 64, [0, 2, 3]
    whole = torch.zeros(rows * width)
    for start, leaf in zip(starts, leaves, strict=True):
        whole[start * width : start * width + leaf.numel()] = leaf.flatten()
    found = Sources.of(node_of(leaves, starts, rows, width), count).at(leaves)
    assert torch.equal(put_together(found.blocks, found.copies, rows // count * width).view(-1), whole)


def test_a_block_within_one_leaf_is_not_copied():
    leaf = torch.arange(640.0)
    found = Sources.of(node_of([leaf], [0], 10, 64), 5).at([leaf])
    assert (found.blocks - leaf.data_ptr()).tolist() == [4 * 128 * k for k in range(5)]
    assert len(found.copies) == 0


def test_a_whole_vector_is_no_leaf():
    """The caller may keep it, and the leaf is the user's."""
    leaf = torch.arange(640.0)
    whole = Gathering([leaf], [0], [0], 10, 64).whole([leaf])
    assert torch.equal(whole.view(-1), leaf)
    assert whole.data_ptr() != leaf.data_ptr()


# --- loops -------------------------------------------------------------------------------------------------------


def looped(fn, *shapes):
    with FakeTensorMode() as mode:
        inputs = [torch.empty(shape) for shape in shapes]
        graph = make_fx(fn)(*inputs)
    with tracing(TracingContext(mode)):
        return Loop.of(graph, inputs)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_loop_runs_all_kernels_on_each_block(threads):
    """Two kernels, with memory between that is each thread's own; a number for all blocks, one written into."""

    def shares(x, scale, into):
        part = x / x.exp().sum(0)
        into.copy_(part * scale)
        return [part.sum(1)]

    loop = looped(shares, (7, 33), (), (7, 33))
    x, scale, into, sums = torch.randn(9, 7, 33), torch.tensor(3.0), torch.zeros(9, 7, 33), torch.zeros(9, 7)
    addresses = [
        [block.data_ptr(), scale.data_ptr(), y.data_ptr(), z.data_ptr(), 0, 0]
        for block, y, z in zip(x, into, sums, strict=True)
    ]
    addresses[4][-2:], copies = (
        (1, 3),
        [[0, 0, 0], [x[4].data_ptr(), x[0].data_ptr(), 132], [x[4].data_ptr() + 132, 0, 132]],
    )
    before, x[4, 0], x[4, 1] = torch.get_num_threads(), x[0, 0], 0
    expected, x[4, :2] = x.clone(), 7
    torch.set_num_threads(threads)
    try:
        loop(np.array(addresses), np.array(copies))
    finally:
        torch.set_num_threads(before)
    part = expected / expected.exp().sum(1, keepdim=True)
    torch.testing.assert_close(into, 3 * part)
    torch.testing.assert_close(sums, part.sum(2))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: [x @ x + 1],
        lambda x: [torch.sort(x)[0].exp()],
        lambda x: [x, x + 1],
    ],
    ids=["product", "sort", "input"],
)
def test_what_needs_more_than_kernels_is_no_loop(fn):
    assert looped(fn, (4, 4)) is None


def test_large_leaves_begin_with_a_block():
    """Those whose size is a multiple of a block's come first, whatever their names; small ones straddle."""
    sizes = {"bias": 10, "a": arena.layouts.BLOCK, "odd": 2048 * 3, "b": 2 * arena.layouts.BLOCK}
    layout = arena.layout_of([{name: torch.empty(size, device="meta") for name, size in sizes.items()}])
    starts = {slot.name: slot.start * layout.width for slot in layout.slots}
    assert list(starts) == list(sizes)
    assert starts == {
        "b": 0,
        "a": 2 * arena.layouts.BLOCK,
        "odd": 3 * arena.layouts.BLOCK,
        "bias": 3 * arena.layouts.BLOCK + 2048 * 3,
    }


# --- cutting -----------------------------------------------------------------------------------------------------


def normalized(state, grads):
    """Two rounds: the norm of all gradients, and with it a norm of each leaf."""
    norm = tree.global_norm(grads)
    scaled = tree.elementwise(lambda g: g / norm, grads)
    ratio = tree.elementwise(lambda p, g: p / g, tree.leaf_norm(state["params"]), tree.leaf_norm(scaled))
    params = tree.elementwise(lambda p, g, r: p - 0.1 * r * g, state["params"], scaled, ratio)
    return {"params": params, "count": state["count"] + 1}, {"norm": norm}


def test_norms_of_norms_take_a_pass_each(cuts):
    state, fast = {"params": draw(0), "count": torch.zeros(())}, jit(normalized, donate=True)
    mine = tree.map(torch.clone, state)
    for i in range(1, 4):
        state, expected = normalized(state, draw(i))
        mine, found = fast(mine, draw(i))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(mine, state, rtol=1e-12, atol=1e-14)
    assert [len(passes) for passes in cuts[0].passes] == [1, 1, 1]
    assert len(cuts) == 1


def test_vectors_of_two_dtypes_are_cut_each(cuts):
    def mixed(seed):
        flat = draw(seed, torch.float32)
        return {n: x.bfloat16() if x.ndim > 1 else x for n, x in flat.items()}

    def descend(params, grads):
        return tree.elementwise(lambda p, g: (p.float() - 0.1 * g.float()).to(p.dtype), params, grads)

    params, mine = mixed(0), mixed(0)
    mine = jit(descend, donate=True)(mine, mixed(1))
    expected = {n: (p.float() - 0.1 * mixed(1)[n].float()).to(p.dtype) for n, p in params.items()}
    torch.testing.assert_close(mine, expected, rtol=1e-2, atol=1e-6)
    assert len(cuts[0].passes[0]) == 2


def test_what_mixes_rows_is_not_cut(cuts):
    def update(state, grads):
        vector = tree.pack(grads, grads).vectors[0] if isinstance(grads, tree.Arena) else None
        total = sum(g.sum() for g in grads.values()) if vector is None else vector.flatten().cumsum(0)[-1]
        return {"params": tree.elementwise(lambda p, g: p - g * total, state["params"], grads)}

    state = {"params": draw(0)}
    mine = tree.map(torch.clone, state)
    mine, state = jit(update, donate=True)(mine, draw(1)), update(state, draw(1))
    torch.testing.assert_close(mine, state, rtol=1e-10, atol=1e-12)
    assert cuts == [None]


def test_gathered_gradients_that_are_returned_belong_to_the_caller():
    @jit
    def pair(params, grads):
        return grads, tree.elementwise(lambda p, g: p + g, params, grads)

    first, _ = pair(draw(0), draw(1))
    kept = tree.map(torch.clone, first)
    pair(draw(0), draw(2))
    torch.testing.assert_close(first, kept, rtol=0, atol=0)


def test_gradients_are_left_as_they_are():
    grads = draw(1)
    before = tree.map(torch.clone, grads)
    jit(normalized, donate=True)({"params": draw(0), "count": torch.zeros(())}, grads)
    torch.testing.assert_close(grads, before, rtol=0, atol=0)


def test_a_view_of_an_arena_is_no_leaf_of_it():
    laid = tree.lay_out({"square": torch.arange(9.0).view(3, 3), "other": torch.zeros(2)})
    assert arena.parts(laid) is not None
    assert arena.parts({**laid, "square": laid["square"].T}) is None


# --- alone -------------------------------------------------------------------------------------------------------


def test_what_runs_alone_sees_plain_dicts_and_returns_arenas():
    seen = []

    def center(flat, factor):
        seen.append(type(flat))
        return {n: factor * (x - x.mean()) for n, x in flat.items()}, flat["bias"]

    def update(params, grads, factor):
        centered, bias = alone(center, grads, factor)
        assert isinstance(centered, type(grads))
        return tree.elementwise(lambda p, c: p - c, params, centered), bias

    params, grads, factor = draw(0), draw(1), torch.tensor(0.5, dtype=torch.float64)
    mine, bias = jit(update, donate=True)(tree.map(torch.clone, params), grads, factor)
    torch.testing.assert_close(mine, {n: p - 0.5 * (grads[n] - grads[n].mean()) for n, p in params.items()})
    assert torch.equal(bias, grads["bias"])
    assert bias.data_ptr() != grads["bias"].data_ptr()
    assert set(seen) == {dict}


def by_rows(grads, averages, params, rate):
    """Of each leaf its mean by row and its largest element, kept; and what is left of it, twice."""
    means = {n: averages["means"][n] + g.flatten(1).mean(1) for n, g in grads.items() if g.ndim > 1}
    largest = {f"{n}/top": averages["largest"][f"{n}/top"] + g.max() for n, g in grads.items()}
    rest = {n: g - g.mean() for n, g in grads.items()}
    return rest, {"means": means, "largest": largest}, {n: rate * r * params[n] for n, r in rest.items()}


@pytest.mark.parametrize(("before", "again"), [(False, False), (True, False), (False, True)])
def test_leaves_are_treated_a_few_at_a_time(cuts, monkeypatch, before, again):
    """Between loops over their rows: gradients as they lie, arenas of other leaves, what passes before found and what
    a later pass needs.
    """
    monkeypatch.setattr(passes, "GROUP", 128)
    seen = []

    def program(grads, *args):
        seen.append(list(grads))
        return by_rows(grads, *args)

    def update(state, grads):
        norm = tree.global_norm(grads) if before else 2.0
        scaled = tree.elementwise(lambda g, m: g / norm + 0.5 * m, grads, state["mu"])
        args = scaled, state["averages"], state["params"], torch.tensor(2.0, dtype=torch.float64)
        rest, averages, step = alone(program, *args, by_leaf=True)
        _, other, _ = alone(program, grads, state["averages"], state["params"], 1.0, by_leaf=True)
        factor = 1 / (1 + tree.global_norm(rest)) if again else 0.5
        params = tree.elementwise(lambda p, r, s: p - factor * r - 0.1 * s, state["params"], rest, step)
        return {"params": params, "mu": tree.elementwise(lambda r: r + 1, rest), "averages": averages}, other

    def start():
        flat = draw(0)
        means = {n: x.flatten(1).mean(1) for n, x in flat.items() if x.ndim > 1}
        averages = {"means": means, "largest": {f"{n}/top": x.max() for n, x in flat.items()}}
        return {"params": flat, "mu": draw(5), "averages": averages}

    state, mine, fast = start(), start(), jit(update, donate=True)
    for i in range(1, 4):
        state, expected = update(state, draw(i))
        mine, found = fast(mine, draw(i))
        torch.testing.assert_close(mine, state, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert len(cuts[0].programs) == 2
    assert {len(names) for names in seen[-4:]} == {1, 2}
    assert len(cuts[0].passes) == 1 + before + again


def test_leaves_lie_at_any_depth_of_what_is_given(cuts, monkeypatch):
    monkeypatch.setattr(passes, "GROUP", 128)

    def half(grads, rest):
        return {"step": {n: g + rest["mu"][n] for n, g in grads.items()}, "other": [rest["factor"] * 2]}

    def update(state, grads):
        found = alone(half, grads, {"mu": state["mu"], "factor": torch.ones(())}, by_leaf=True)
        params = tree.elementwise(lambda p, s: p - s, state["params"], found["step"])
        return {"params": params, "mu": state["mu"]}, found["other"]

    state = {"params": draw(0), "mu": draw(2)}
    mine = tree.map(torch.clone, state)
    mine, expected = jit(update, donate=True)(mine, draw(1)), update(state, draw(1))
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    assert len(cuts[0].programs) == 1


def test_what_belongs_to_leaves_is_replaced_where_it_lies(cuts, monkeypatch):
    """Results that succeed a part of the state need no memory of their own, and take nothing's place too early."""
    monkeypatch.setattr(passes, "GROUP", 128)
    memory, pairs = [], leafwise._pairs
    monkeypatch.setattr(leafwise, "_pairs", lambda *args: memory.append(found := list(pairs(*args))) or found)

    def program(grads, state):
        tops = {f"{n}/top": state["tops"][f"{n}/top"] + g.max() for n, g in grads.items()}
        before = {f"{n}/top": state["tops"][f"{n}/top"] for n in grads}
        return {n: g - g.mean() for n, g in grads.items()}, {
            "tops": tops,
            "before": before,
            "count": state["count"] + 1,
            "mu": {n: state["mu"][n] + g.mean() for n, g in grads.items()},
            "read": {n: state["read"][n] * g.mean() for n, g in grads.items()},
        }

    def update(state, grads):
        rest, own = alone(program, grads, state["own"], by_leaf=True)
        params = tree.elementwise(lambda p, r, x: p - r - x, state["params"], rest, state["own"]["read"])
        return {"params": params, "own": own}

    flat = draw(0)
    tops = {f"{n}/top": x.max() for n, x in flat.items()}
    own = {"tops": tops, "before": tree.zeros_like(tops), "count": torch.tensor(0), "mu": draw(7), "read": draw(8)}
    state = {"params": flat, "own": own}
    mine, fast = tree.lay_out(tree.map(torch.clone, state)), jit(update, donate=True)
    for i in range(1, 4):
        state, mine = update(state, draw(i)), fast(mine, draw(i))
        torch.testing.assert_close(mine, state, rtol=1e-12, atol=1e-14)
    places = {x.data_ptr() for _, x in itertools.chain.from_iterable(memory)}
    for name in ("tops", "mu"):
        assert {x.data_ptr() for x in mine["own"][name].values()} <= places  # at once
    assert mine["own"]["count"].data_ptr() not in places  # every group of leaves reads it
    assert places.isdisjoint(x.data_ptr() for x in mine["own"]["read"].values())  # as the parameters do


def test_parts_of_the_parameters_are_vectors_of_their_own(cuts):
    """Also where no state tells them apart: the graph that needs them is made for a state that is laid out anew."""
    rules = {"a": optim.sgd(0.1), "b": optim.sgd(0.2), "c": optim.adam(0.1)}
    parts = optim.partition(rules, lambda params: {n: "abc"[i % 3] for i, n in enumerate(params)})
    decay = optim.masked(optim.add_decayed_weights(0.1), lambda params: {n: p.ndim > 1 for n, p in params.items()})
    nested = optim.masked(decay, lambda params: {n: i % 2 == 0 for i, n in enumerate(params)})
    tx = optim.chain(parts, decay, nested, optim.scale(0.5))

    def update(state, grads):
        updates, inner = tx.update(grads, state["tx"], state["params"])
        return {"params": optim.apply_updates(state["params"], updates), "tx": inner}

    state = {"params": draw(0), "tx": tx.init(draw(0))}
    mine, again, fast = tree.map(torch.clone, state), state, jit(update, donate=True)
    for i in range(1, 4):
        state, mine, again = update(state, draw(i)), fast(mine, draw(i)), jit(update)(again, draw(i))
        torch.testing.assert_close(mine, state, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(again, state, rtol=1e-12, atol=1e-14)
    assert len(cuts) == 4  # one, and one for each function that does not donate
    with pytest.raises(KeyError, match="unknown"):
        jit(lambda s: {"params": tree.parted(s["params"], [["unknown"]])[0]}, donate=True)({"params": draw(0)})


ADAMP = {
    "as it is": {},
    "projecting": {"delta": 1e3, "weight_decay": 0.1, "mask": optim.no_decay_mask},
    "one view": {"views": ("layer",), "delta": 1e3, "weight_decay": 0.1},
    "some of each": {"delta": 0.2, "weight_decay": lambda count: 0.1 / (count + 1), "nesterov": True, "amsgrad": True},
    "signed": {"views": ("channel",), "absolute": False},
    "all vectors": {"min_ndim": 0, "delta": 1e3},
}


@pytest.mark.parametrize("name", ADAMP)
def test_channels_that_fill_rows_are_summed_by_rows(cuts, name):
    """AdamP needs no leaf by itself, then: the state is laid out in narrow rows for it."""
    shapes = {"conv": (6, 64, 3, 3), "odd": (4, 3, 5), "fc": (5, 128), "thin": (3, 64), "bias": (70,), "number": ()}
    shapes |= {"norm": (128,), "shift": (128,), "nothing": (0, 3)}
    tx = optim.adamp(0.1, **ADAMP[name])

    def draw(seed):
        key = random.key(seed)
        flat = {
            n: random.normal(random.fold_in(key, i), s, dtype=torch.float64) for i, (n, s) in enumerate(shapes.items())
        }
        return {**flat, "conv": flat["conv"].contiguous(memory_format=torch.channels_last)}

    def update(state, grads):
        updates, inner = tx.update(grads, state["tx"], state["params"])
        return {"params": optim.apply_updates(state["params"], updates), "tx": inner}

    state = {"params": draw(0), "tx": tx.init(draw(0))}
    mine, again = tree.lay_out(tree.map(torch.clone, state)), state
    fast, other = jit(update, donate=True), jit(update)
    for i in range(1, 4):
        state, mine, again = update(state, draw(i)), fast(mine, draw(i)), other(again, draw(i))
        torch.testing.assert_close(mine, state, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(again, state, rtol=1e-12, atol=1e-13)
    by_leaf = ("odd", "bias", "number") if name == "all vectors" else ("odd",)
    assert [program.layout.names for program in cuts[0].programs.values()] == [by_leaf]


def twice(x):
    return 2 * x


def test_a_function_that_is_defined_anew_does_not_take_the_place_of_the_old_one():
    program = jit(lambda x: alone(twice, x) + 1)
    assert program(torch.ones(3))[0] == 3

    def thrice(x):
        return 3 * x

    thrice.__qualname__ = "twice"  # as when a notebook's cell runs again
    assert jit(lambda x: alone(thrice, x) + 1)(torch.ones(3))[0] == 4
    assert program(torch.ones(3))[0] == 3


def test_what_does_not_belong_to_a_leaf_is_given_whole(cuts):
    def update(state, grads):
        rest, total = alone(lambda g: (g, {"all": sum(x.sum() for x in g.values())}), grads, by_leaf=True)
        return {"params": tree.elementwise(lambda p, r: p - r * total["all"], state["params"], rest)}

    state = {"params": draw(0)}
    mine = tree.map(torch.clone, state)
    mine, state = jit(update, donate=True)(mine, draw(1)), update(state, draw(1))
    torch.testing.assert_close(mine, state, rtol=1e-10, atol=1e-12)
    assert cuts == []


def test_what_is_drawn_in_a_gradient_runs_alone(monkeypatch):
    """One operation, the bits of eager code, and a name by which another process finds the graph on disk."""
    names, register = [], leafwise.register
    monkeypatch.setattr(leafwise, "register", lambda name, *args: names.append(name) or register(name, *args))

    def first(state, x):
        def loss(weight, key):
            return nn.functional.dropblock2d(x * weight, 0.2, 3, key=random.fold_in(key, 1)).square().mean()

        return torch.func.grad(loss)(*state)

    step = Staged(first, lambda state, gradient: (state, gradient))
    state, x = (torch.tensor(2.0), random.key(3)), torch.linspace(-1, 1, 2 * 3 * 9 * 9).view(2, 3, 9, 9)
    torch.testing.assert_close(jit(step)(state, x)[1], step(state, x)[1], rtol=1e-6, atol=0)
    jit(step)(state, x)
    assert len(names) >= 2
    assert len(set(names)) == 1
    jit(step)(state, x[:1])
    assert len(set(names)) == 2


@pytest.mark.parametrize("by_leaf", [False, True])
@pytest.mark.parametrize("donate", [False, True])
def test_what_runs_alone_knows_its_numbers(donate, by_leaf):
    """In a graph's first run, too, when torch looks on: what is not due is never computed."""
    taken = []

    def program(grads, due):
        def half():
            taken.append(next(iter(grads.values())).device.type)
            return due / 2

        factor = tree.either(due > 0, lambda: due, half)
        return {name: factor * g for name, g in grads.items()}

    def update(state, grads):
        return {"params": alone(program, grads, state["due"], by_leaf=by_leaf), "due": state["due"]}

    state = {"params": draw(0), "due": torch.ones((), dtype=torch.float64)}
    step = jit(update, donate=donate)
    for i in range(2):
        state = step(state, draw(i))
        torch.testing.assert_close(state["params"], draw(i))
    assert set(taken) == {"meta"}


def test_what_runs_alone_can_be_differentiated():
    def loss(params):
        return sum(x.sum() for x in alone(lambda flat: {n: x.square() for n, x in flat.items()}, params).values())

    for grad in (torch.func.grad(loss), jit(torch.func.grad(loss))):
        torch.testing.assert_close(grad(draw(0)), {n: 2 * x for n, x in draw(0).items()})


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("adafactor", {}),
        ("adamp", {"b1": 0.8, "eps": 1e-8, "delta": 0.2, "wd_ratio": 0.1, "weight_decay": 0.01}),
        ("muon", {"momentum": 0.9}),
        ("soap", {"b1": 0.9, "b2": 0.8, "eps": 1e-8, "shampoo_beta": 0.7}),
    ],
)
def test_hyperparameters_in_the_state_reach_what_runs_alone(name, numbers):
    tx = optim.inject_hyperparams(getattr(optim, name))(learning_rate=0.1, **numbers)
    shapes = {"w": (4, 3), "v": (5, 2), "b": (3,)}
    params = {n: torch.linspace(-1, 1, torch.Size(s).numel(), dtype=torch.float64).view(s) for n, s in shapes.items()}

    def update(carry, grads):
        updates, state = tx.update(grads, carry[1], carry[0])
        return optim.apply_updates(carry[0], updates), state

    carry = (params, tx.init(params))
    mine, fast = tree.map(torch.clone, carry), jit(update, donate=True)
    for i in range(3):
        grads = {n: torch.sin(p + i) for n, p in params.items()}
        carry, mine = update(carry, grads), fast(mine, grads)
    torch.testing.assert_close(mine[0], carry[0], rtol=1e-9, atol=1e-12)
