"""Trees: paths, selection, reductions, and the same answers inside compiled functions as outside."""

from collections import OrderedDict
from types import MappingProxyType
from typing import NamedTuple

import optree
import pytest
import torch

from holofunc import jit, optim, random, tree


class Point(NamedTuple):
    x: torch.Tensor
    y: dict


def nested():
    return {"b": torch.ones(2), "a": [Point(torch.zeros(()), {"k": torch.ones(3)}), None, (torch.full((1,), 2.0),)]}


def test_leaves_are_named_by_their_path_in_the_order_of_insertion():
    assert tree.paths(nested()) == ["b", "a/0/x", "a/0/y/k", "a/2/0"]
    assert [x.numel() for x in tree.leaves(nested())] == [2, 1, 3, 1]
    assert tree.size(nested()) == 7


def test_rebuild_inverts_leaves():
    again = tree.rebuild(nested(), tree.leaves(nested()))
    assert tree.paths(again) == tree.paths(nested())
    assert type(again["a"][0]) is Point
    assert again["a"][1] is None


def test_map_keeps_the_structure():
    doubled = tree.map(lambda a, b: a + b, nested(), nested())
    assert [x.tolist() for x in tree.leaves(doubled)] == [[2.0, 2.0], 0.0, [2.0, 2.0, 2.0], [4.0]]
    assert type(doubled["a"][0]) is Point


class Output(OrderedDict):
    """As transformers returns them: fields are keys, and attributes."""

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        setattr(self, name, value)


@optree.register_pytree_node_class(namespace="holofunc")
class Pair:
    def __init__(self, left, right):
        self.left, self.right = left, right

    def tree_flatten(self):
        return (self.left, self.right), None, ("left", "right")

    @classmethod
    def tree_unflatten(cls, metadata, children):
        return cls(*children)


def test_every_kind_of_dict_and_registered_classes_are_nodes():
    output = Output(loss=torch.ones(2))
    doubled = tree.map(lambda x: x * 2, output)
    assert type(doubled) is Output
    assert doubled.loss.tolist() == doubled["loss"].tolist() == [2, 2]
    assert output.loss.tolist() == [1, 1]
    pair = Pair({"w": torch.ones(1)}, [torch.zeros(1)])
    assert tree.paths(pair) == ["left/w", "right/0"]
    doubled = tree.map(lambda x: x + 1, pair)
    assert (type(doubled), doubled.left, doubled.right) == (Pair, {"w": 2}, [1])
    assert type(tree.rebuild(pair, [1, 2])) is Pair
    assert tree.map(lambda a, b: a + b, MappingProxyType({"a": 1}), {"a": 2}) == {"a": 3}
    with pytest.raises(tree.StructureError, match=r"missing \['right/0'\], unexpected \['right/1'\]"):
        tree.map(lambda a, b: a, pair, Pair({"w": 1}, {"1": 2}))


def test_stack_and_unstack_are_inverse():
    trees = [tree.map(lambda x, i=i: x + i, nested()) for i in range(3)]
    for a, b in zip(tree.unstack(tree.stack(trees)), trees, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(tree.leaves(a), tree.leaves(b), strict=True))
    with pytest.raises(ValueError, match="trees must hold at least one tree"):
        tree.stack([])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda one: tree.stack([one, {"w": torch.ones(3)}]), ValueError, r"got \(2,\) and \(3,\) at 'w'"),
        (lambda one: tree.stack([{"w": 1.0}]), TypeError, "trees must hold tensors, got float at 'w'"),
        (lambda one: tree.stack([one, {"v": torch.ones(2)}]), ValueError, r"missing \['w'\], unexpected \['v'\]"),
        (lambda one: tree.unstack({"w": torch.tensor(1.0)}), ValueError, "leading axes of equal length"),
        (lambda one: tree.unstack({"w": torch.ones(2), "v": torch.ones(3)}), ValueError, r"\{'w': 2, 'v': 3\}"),
        (lambda one: tree.unstack({}), ValueError, r"got \{\}"),
        (lambda one: tree.rebuild(one, []), ValueError, "got fewer than 1"),
        (lambda one: tree.rebuild(one, [1, 2]), ValueError, "got more than 1"),
        (lambda one: tree.cast(one, "bf16"), TypeError, "dtype must be a torch.dtype or None, got 'bf16'"),
        (lambda one: tree.where(True, one, one), TypeError, "condition must be a 0-d bool tensor, got True"),
        (lambda one: tree.where(torch.ones(2) > 0, one, one), TypeError, "condition must be a 0-d bool tensor"),
        (lambda one: tree.where(torch.tensor(True), one, {}), tree.StructureError, r"unexpected \['w'\]|missing"),
    ],
)
def test_what_does_not_fit_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call({"w": torch.ones(2)})


def test_a_prefix_is_a_module_not_a_beginning():
    names = {"layer1.w": 1, "layer1.b": 2, "layer10.w": 3, "head.w": 4}
    assert tree.select(names, "layer1") == {"layer1.w": 1, "layer1.b": 2}
    assert tree.select(names, ["*.b", "head"]) == {"layer1.b": 2, "head.w": 4}
    with pytest.raises(ValueError, match=r"pattern 'layer2' matches none of the names \['head.w', 'layer1.b'"):
        tree.select(names, "layer2")


def test_where_picks_by_name_whatever_the_order():
    a, b = {"x": torch.ones(1), "y": torch.ones(2)}, {"y": torch.zeros(2), "x": torch.zeros(1)}
    assert tree.where(torch.tensor(True), a, b)["y"].tolist() == [1.0, 1.0]
    assert tree.where(torch.tensor(False), a, b)["x"].tolist() == [0.0]


def test_cast_touches_floating_leaves_only():
    cast = tree.cast({"w": torch.ones(1), "n": torch.ones(1, dtype=torch.int64)}, torch.bfloat16)
    assert (cast["w"].dtype, cast["n"].dtype) == (torch.bfloat16, torch.int64)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_norms_are_safe_at_zero_and_honest_about_the_rest(value):
    flat = {"w": torch.full((3,), value)}
    norm = tree.global_norm(flat)
    assert torch.equal(norm.isnan(), torch.tensor(value != value))
    assert bool(tree.all_finite(flat)) == (value == 0.0)
    if value == 0.0:
        assert torch.func.grad(tree.global_norm)(flat)["w"].tolist() == [0.0] * 3


def test_a_tree_without_leaves_has_norm_zero():
    assert float(tree.global_norm({})) == 0.0
    assert bool(tree.all_finite({"a": None}))


# --- inside of compiled functions, where leaves lie in vectors ----------------------------------------------------


def some_leaves(channels_last):
    shapes = [(2, 3, 4, 5), (), (300,), (1, 1), (5, 2, 1, 1), (7,)]
    plain = {f"leaf{i}": random.normal(random.key(i), shape, dtype=torch.float64) for i, shape in enumerate(shapes)}
    if channels_last:
        plain = {n: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for n, x in plain.items()}
    return plain


@pytest.mark.parametrize("channels_last", [False, True])
def test_every_question_has_the_same_answer(channels_last):
    plain = some_leaves(channels_last)
    weights = {n: float(i) for i, n in enumerate(plain)}
    numbers = {n: torch.tensor(2.0 + i, dtype=torch.float64) for i, n in enumerate(plain)}

    def ask(state):
        a, b = state
        product = tree.elementwise(lambda x, w, y: x * w + y, a, tree.leaf_values(weights, a), b)
        broken = tree.elementwise(lambda x: torch.where(x == 0, x / x, 1.0), a)  # 0 / 0 where a row has no element
        by_number = tree.elementwise(lambda x, n: x * n, b, numbers)
        mixed = tree.elementwise(lambda s, n: s + n, tree.leaf_sum(a), numbers)
        part = tree.elementwise(lambda x: 2 * x, {n: product[n] for n in list(product)[::2]})
        asked = tree.leaf_sum(product), tree.leaf_norm(a), tree.global_norm(product), tree.total(a), tree.all_finite(b)
        filled = tree.where(tree.all_finite(a), tree.zeros_like(a), b)
        return (product, b), (asked, by_number, mixed, part, filled, tree.leaf_sum(broken), tree.map_shapes(len, a))

    expected = ask((plain, plain))
    for donate in (False, True):
        found = jit(ask, donate=donate)((tree.map(torch.clone, plain), tree.map(torch.clone, plain)))
        assert tree.paths(found) == tree.paths(expected)
        for (path, x), y in zip(tree.leaves_with_path(found), tree.leaves(expected), strict=True):
            if isinstance(y, torch.Tensor):
                torch.testing.assert_close(x, y, equal_nan=True, msg=lambda m, path=path: f"{path}: {m}")
        for name, x in found[0][0].items():
            assert x.stride() == plain[name].stride() or x.numel() < 2 or 1 in x.shape


def test_the_root_of_zero_has_no_slope_and_that_of_a_nan_is_one():
    zero = torch.tensor(0.0)
    assert torch.func.grad(tree.safe_sqrt)(zero) == 0.0
    assert torch.func.jvp(tree.safe_sqrt, (zero,), (torch.tensor(1.0),))[1] == 0.0
    assert tree.safe_sqrt(torch.tensor([0.0, 4.0])).tolist() == [0.0, 2.0]
    assert tree.safe_sqrt(torch.tensor(torch.nan)).isnan()
    assert tree.safe_sqrt(torch.tensor(torch.inf)).isinf()


def test_elementwise_says_where_structures_differ():
    with pytest.raises(ValueError, match=r"missing \['b'\]"):
        jit(lambda s: tree.elementwise(torch.add, s, {"w": s["w"]}))({"w": torch.ones(3), "b": torch.ones(2)})


# --- parts by name -------------------------------------------------------------------------------------------------


def trained_state():
    params = {"w": torch.ones(2), "head": torch.ones(3, 2)}
    tx = optim.ema_params(optim.chain(optim.trace(0.9), optim.adam(0.1)), decay=0.9)
    return params, tx.update(params, tx.init(params), params)[1]


def test_get_finds_fields_keys_types_and_ends_of_paths():
    _, state = trained_state()
    assert tree.get(state, "mu") is state.inner[1]["adam"].mu
    assert tree.get(state, "AdamState") is state.inner[1]["adam"]
    assert tree.get(state, "mu/head") is state.inner[1]["adam"].mu["head"]
    assert tree.get(state, "EmaParamsState") is state
    counts = ["step", "inner/0/step", "inner/1/adam/step", "inner/1/learning_rate/step"]
    assert [path for path, _ in tree.get_all_with_path(state, "step")] == counts
    assert tree.get(state, "nothing", default=None) is None
    assert tree.get_all_with_path(state, "u") == []  # no end of a name


def test_get_and_set_say_what_there_is():
    _, state = trained_state()
    with pytest.raises(
        ValueError, match=r"^nothing is called 'm'; there are \['0', .*'adam', .*'mu', .*, 'weight_decay'\]$"
    ):
        tree.get(state, "m")
    with pytest.raises(ValueError, match=r"^name must be that of one part, got 'nu/w' of \['a/nu/w', 'b/nu/w'\]$"):
        tree.set({n: {"nu": {"w": torch.ones(1)}} for n in "ab"}, **{"nu/w": 0.0})
    with pytest.raises(ValueError, match=r"^name must be .*, got 'step' of \['inner/0/step', "):
        tree.get(state, "step", default=None)


def test_set_is_pure_and_keeps_dtypes():
    _, state = trained_state()
    before = tree.map(torch.clone, state)
    mine = {"w": torch.full((2,), 7, dtype=torch.float64), "head": torch.zeros(3, 2)}
    new = tree.set(state, mu=mine, **{"adam/step": 3, "trace/w": torch.zeros(2)})
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(before), tree.leaves(state), strict=True))
    assert tree.get(new, "mu/w").tolist() == [7.0, 7.0]
    assert [(x.dtype, x.shape) for x in tree.leaves(new)] == [(x.dtype, x.shape) for x in tree.leaves(state)]
    assert tree.get(new, "adam/step") == 3
    assert tree.get(new, "nu") is tree.get(state, "nu")
    changed = {"inner/0/trace/w", "inner/1/adam/step", "inner/1/adam/mu/w", "inner/1/adam/mu/head"}
    pairs = zip(tree.leaves_with_path(new), tree.leaves(state), strict=True)
    assert {path for (path, a), b in pairs if not torch.equal(a, b)} == changed


def test_set_refuses_what_does_not_fit():
    _, state = trained_state()
    with pytest.raises(ValueError, match=r"^mu must have the structure of what it replaces: missing \['head'\], "):
        tree.set(state, mu={"w": torch.ones(2)})
    with pytest.raises(ValueError, match=r"^mu must have shape \(2,\), got \(3,\)$"):
        tree.set(state, mu={"w": torch.ones(3), "head": torch.ones(3, 2)})
    with pytest.raises(ValueError, match=r"^nu must have the structure of what it replaces: .*"):
        tree.set(state, nu=0.0)


def test_map_params_leaves_counts_alone():
    params, state = trained_state()
    halves = tree.map_params(lambda x, p: (x + p).half(), state, params)
    moments = {"average", "mu", "nu", "trace"}
    assert {path.split("/")[-2] for path, x in tree.leaves_with_path(halves) if x.dtype == torch.float16} == moments
    assert torch.equal(halves.average["w"], (state.average["w"] + 1).half())
    assert tree.leaves(tree.map_params(lambda x, p: 0, state, params, others=lambda x: 1)).count(1) == 5


def test_map_params_knows_parts_nested_parameters_and_other_shapes():
    params = {"a": [torch.ones(2, 2), torch.ones(3)], "count": torch.ones(())}
    labels = {"a": ["x", "y"], "count": "y"}
    tx = optim.partition({"x": optim.adafactor(), "y": optim.adam(0.1)}, labels)
    state = tx.init(params)
    mapped = tree.map_params(lambda x, p: None, state, params)
    left = [path for path, x in tree.leaves_with_path(state) if path not in tree.paths(mapped)]
    assert left == ["y/adam/mu/a/1", "y/adam/mu/count", "y/adam/nu/a/1", "y/adam/nu/count"]
    assert tree.paths(tree.map_params(lambda x, p: None, optim.adam(0.1).init(params), params)) == [
        "adam/step",
        "learning_rate/step",
        "learning_rate/rate",
    ]


def test_surgery_inside_compiled_code():
    params, state = trained_state()

    def halved(state):
        return tree.map_params(lambda x, p: 0.5 * x, tree.set(state, **{"adam/step": 0}), params)

    for expected, got in zip(tree.leaves(halved(state)), tree.leaves(jit(halved)(state)), strict=True):
        torch.testing.assert_close(got, expected)


def test_summary_counts_what_each_node_holds():
    held = {"a": {"x": torch.zeros(2, 3), "<y>": torch.zeros(4, dtype=torch.int64)}, "b": None}
    whole = tree.summary(held, depth=None)
    assert [tuple(row) for row in whole.rows] == [
        ("", "dict", 2, 10, 56), ("a", "dict", 2, 10, 56), ("a/x", "float32 (2, 3)", 1, 6, 24),
        ("a/<y>", "int64 (4,)", 1, 4, 32), ("b", "NoneType", 0, 0, 0),
    ]  # fmt: skip
    assert [row.path for row in tree.summary(held, depth=0).rows] == [""]
    assert "<td>a/&lt;y&gt;</td><td>int64 (4,)</td>" in whole._repr_html_()
    assert repr(whole).splitlines()[3] == "a/x    float32 (2, 3)        1        6     24"
    with pytest.raises(ValueError, match="depth must not be negative, got -1"):
        tree.summary(held, depth=-1)
