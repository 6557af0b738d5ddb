"""What a graph selects by a condition known beforehand is the only thing computed."""

import pytest
import torch

from holofunc import jit, optim, tree
from holofunc.compile import alone, blocks, branches

SHAPES = {"conv": (9, 5, 3, 3), "bias": (9,), "wide": (17, 130), "norm": (33,)}


def draw(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


@pytest.fixture
def conditions(monkeypatch):
    """Conditions are worth a second graph for any size; what was found, in order."""
    found, of = [], blocks.condition_of
    monkeypatch.setattr(branches, "ENOUGH", 1)
    monkeypatch.setattr(blocks, "condition_of", lambda graph: found.append(of(graph)) or found[-1])
    return found


WRAPPERS = {
    "lookahead": lambda: optim.lookahead(optim.adam(1e-2), sync_period=3),
    "lookahead, reset": lambda: optim.lookahead(optim.adam(1e-2), sync_period=3, inner_state="reset"),
    "lookahead, pullback": lambda: optim.lookahead(optim.adam(1e-2), sync_period=3, inner_state="pullback"),
    "scout": lambda: optim.scout(optim.adam(1e-2), sync_period=4),
    "multi_steps": lambda: optim.multi_steps(optim.adam(1e-2), 3),
    "multi_steps, by a schedule": lambda: optim.multi_steps(optim.adam(1e-2), lambda count: 1 + count),
    "multi_steps of lookahead": lambda: optim.multi_steps(optim.lookahead(optim.adam(1e-2), sync_period=2), 2),
    "lookahead of multi_steps": lambda: optim.lookahead(optim.multi_steps(optim.adam(1e-2), 2), sync_period=4),
    "multi_steps of soap": lambda: optim.multi_steps(optim.soap(1e-2), 2),
}


def updates_of(tx):
    def update(state, grads):
        params, inner = state
        updates, inner = tx.update(grads, inner, params)
        return optim.apply_updates(params, updates), inner

    return update


@pytest.mark.parametrize(("name", "mode"), [*((name, None) for name in WRAPPERS), ("multi_steps", "default")])
def test_both_graphs_compute_what_the_one_would(conditions, name, mode):
    tx = WRAPPERS[name]()
    update, expected = updates_of(tx), (draw(0), tx.init(draw(0)))
    step, state = jit(update, donate=True, mode=mode), (draw(0), tx.init(draw(0)))
    for seed in range(1, 11):
        state, expected = step(state, draw(seed)), update(expected, draw(seed))
        found = dict(tree.leaves_with_path(state))
        for path, x in tree.leaves_with_path(expected):
            torch.testing.assert_close(found[path], x, rtol=1e-4, atol=1e-5, msg=path)
    assert len(conditions) == 1
    assert conditions[0] is not None


def test_what_is_not_selected_is_not_computed(conditions):
    calls = []

    def counted(grads):
        calls.append(next(iter(grads.values())).device.type)
        return tree.map(torch.clone, grads)

    tx = optim.stateless(lambda updates, params: alone(counted, updates, by_leaf=True))
    step, state = jit(updates_of(optim.multi_steps(tx, 3)), donate=True), None
    for seed in range(7):
        state = state or (draw(0), optim.multi_steps(tx, 3).init(draw(0)))
        state = step(state, draw(seed))
        assert calls.count("cpu") == (seed + 1) // 3, seed


def test_what_stays_as_it_is_is_not_written(conditions):
    graphs, select = [], blocks.selected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "selected", lambda *args: graphs.append(select(*args)) or graphs[-1])
        tx = optim.lookahead(optim.sgd(1e-2))
        jit(updates_of(tx), donate=True)((draw(0), tx.init(draw(0))), draw(1))
    vectors = [
        [node.args[0] for node in graph.graph.nodes if node.target is torch.ops.aten.copy_.default] for graph in graphs
    ]
    wide = [sum(to.meta["val"].ndim == 2 for to in found) for found in vectors]
    assert wide == [1, 2]  # the parameters; and the slow weights


A, B = draw(5), draw(6)


def swapped(state, number):
    now = state["count"] % 2 == 1
    return (
        {"count": state["count"] + 1, "a": tree.elementwise(lambda a: torch.where(now, a + number, a), state["a"])},
        tree.elementwise(lambda a: torch.where(now, a, a * number), state["a"]),
        tree.elementwise(lambda a, b: torch.where(now, a, b), A, B),
    )


def test_a_result_that_is_selected_is_no_part_of_the_state(conditions):
    step = jit(lambda state, grads: (*swapped(state, 2.0), tree.elementwise(torch.neg, grads)), donate=True)
    state, expected = ({"count": torch.zeros((), dtype=torch.int64), "a": draw(0)} for _ in range(2))
    kept = []
    for i in range(4):
        state, *rest = step(state, draw(i))
        expected, *others = swapped(expected, 2.0)
        kept.append((rest[:2], others))
    for mine, reference in kept:  # not changed by what was written later
        for (path, x), (_, y) in zip(tree.leaves_with_path(mine), tree.leaves_with_path(reference), strict=True):
            torch.testing.assert_close(x, y, msg=path)


def test_a_condition_that_depends_on_gradients_is_none(conditions):
    tx = optim.apply_if_finite(optim.adam(1e-2))
    jit(updates_of(tx), donate=True)((draw(0), tx.init(draw(0))), draw(1))
    assert conditions == [None]


def test_small_states_are_not_worth_a_second_graph(monkeypatch):
    found, of = [], blocks.condition_of
    monkeypatch.setattr(blocks, "condition_of", lambda graph: found.append(of(graph)) or found[-1])
    tx = optim.lookahead(optim.adam(1e-2))
    jit(updates_of(tx), donate=True)((draw(0), tx.init(draw(0))), draw(1))
    assert found == [None]
