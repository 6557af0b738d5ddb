"""Different rules for different parameters; hyperparameters in the state; states by name."""

import inspect
import math
import re
import typing

import pytest
import torch

from holofunc import jit, optim, random, tree

NAMES = ["stem.weight", "layer1.0.weight", "layer1.0.bn1.weight", "layer10.0.weight", "head.weight", "head.bias"]


def params_like(value=1.0):
    return {n: torch.full((2, 2) if n.endswith("weight") and "bn" not in n else (2,), value) for n in NAMES}


# --- labels ------------------------------------------------------------------------------------------------------


def test_a_prefix_is_a_module_and_not_a_string():
    labels = optim.label_by_path(params_like(), [("layer1", "first")], default="other")
    assert [n for n, label in labels.items() if label == "first"] == ["layer1.0.weight", "layer1.0.bn1.weight"]


def test_first_rule_wins_and_globs_and_regexes_mix():
    rules = [(re.compile(r"\.bn\d"), "norm"), ("*.bias", "bias"), ("layer*", "body")]
    labels = optim.label_by_path(params_like(), rules, default="rest")
    assert list(labels.values()) == ["rest", "body", "norm", "body", "rest", "bias"]


def test_rules_may_be_a_dict_and_parameters_a_tree():
    nested = {"enc": [{"w": torch.ones(1)}, {"w": torch.ones(1)}], "head": torch.ones(1)}
    assert optim.label_by_path(nested, {"enc/0": "a", "enc": "b", "head": "c"}) == {
        "enc": [{"w": "a"}, {"w": "b"}],
        "head": "c",
    }
    assert optim.label_by_path(nested, {"enc/0/*": "a", "head": "b"}, default="c") == {
        "enc": [{"w": "a"}, {"w": "c"}],
        "head": "b",
    }


def test_a_rule_without_match_lists_what_exists():
    with pytest.raises(ValueError, match=r"rule 'layer2' matches none of the parameters stem.weight, layer1.0.weight"):
        optim.label_by_path(params_like(), [("layer2", "x")], default="y")


def test_an_uncovered_parameter_without_default_is_listed():
    with pytest.raises(ValueError, match=r"no rule covers stem.weight, head.weight, head.bias: .*'layer\*'"):
        optim.label_by_path(params_like(), [("layer*", "x")])


def test_long_lists_are_cut():
    many = {f"p{i}": torch.ones(1) for i in range(30)}
    with pytest.raises(ValueError, match=r"p11, \.\.\. 18 more"):
        optim.label_by_path(many, [("q", 1)])


def test_layer_decay():
    groups = ["stem", ["layer1", "layer10"], "head"]
    factors = optim.layer_decay(params_like(), groups, 0.5)
    assert list(factors.values()) == [0.25, 0.5, 0.5, 0.5, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"decay must be in \(0, 1\], got 1.5"):
        optim.layer_decay(params_like(), groups, 1.5)


def test_no_decay_mask():
    params = params_like() | {
        "norm.weight": torch.ones(2, 2),
        "embed.weight": torch.ones(2, 2),
        "pos.bias": torch.ones(1, 2),
    }
    decayed = [n for n, use in optim.no_decay_mask(params).items() if use]
    assert decayed == ["stem.weight", "layer1.0.weight", "layer10.0.weight", "head.weight", "embed.weight"]
    assert not optim.no_decay_mask(params, embeddings=False)["embed.weight"]


# --- parts -------------------------------------------------------------------------------------------------------


def test_partition_gives_each_its_own_and_keeps_state_for_it_alone():
    params = params_like()
    labels = optim.label_by_path(params, [("head", "fast")], default="slow")
    tx = optim.partition({"fast": optim.adam(0.1), "slow": optim.sgd(0.5, momentum=0.9)}, labels)
    state = tx.init(params)
    assert list(state["fast"]["adam"].mu) == ["head.weight", "head.bias"]
    updates, _ = tx.update(params, state, params)
    assert list(updates) == NAMES
    assert updates["head.bias"].tolist() == pytest.approx([-0.1, -0.1])
    assert updates["stem.weight"].flatten().tolist() == [-0.5] * 4


@pytest.mark.parametrize("labels", [dict.fromkeys(NAMES, "a"), {n: "c" if "head" in n else "a" for n in NAMES}])
def test_partition_refuses_labels_that_do_not_fit(labels):
    tx = optim.partition({"a": optim.sgd(0.1), "b": optim.sgd(0.1)}, labels)
    with pytest.raises(ValueError, match=r"labels must name the transformations \['a', 'b'\], got \['a'"):
        tx.init(params_like())


def test_masks_must_fit():
    short = dict.fromkeys(NAMES[1:], True)
    for tx in (
        optim.masked(optim.sgd(0.1), short),
        optim.freeze(short),
        optim.adamw(0.1, mask=short),
        optim.lars(0.1, mask=short),
        optim.adamp(0.1, mask=short),
        optim.prodigy(mask=short),
        optim.adan(0.1, mask=lambda params: short),
    ):
        with pytest.raises(
            ValueError, match=r"mask must have the structure of the parameters: missing \['stem.weight'\]"
        ):
            tx.init(params_like())
    for name, tx in {
        "labels": optim.partition({"a": optim.sgd(0.1)}, dict.fromkeys(NAMES[1:], "a")),
        "factors": optim.scale_leaves(dict.fromkeys(NAMES[1:], 0.5)),
        "starts": optim.unfreeze(dict.fromkeys(NAMES[1:], 3)),
        "matrices": optim.muon(0.1, matrices=short),
    }.items():
        with pytest.raises(ValueError, match=rf"^{name} must have the structure of .*: missing \['stem.weight'\]"):
            tx.init(params_like())
    with pytest.raises(TypeError, match=r"mask must hold bool, got 'yes' at 'stem.weight'"):
        optim.masked(optim.sgd(0.1), dict.fromkeys(NAMES, "yes")).init(params_like())


def test_freezing_a_prefix_stops_it_and_keeps_no_state():
    params = params_like()
    mask = optim.label_by_path(params, [("layer1", True), ("stem", True)], default=False)
    for tx in (optim.freeze(mask, optim.adamw(0.1)), optim.chain(optim.adamw(0.1), optim.freeze(mask))):
        updates, _state = tx.update(params, tx.init(params), params)
        moved = [n for n, u in updates.items() if u.abs().sum() > 0]
        assert moved == ["layer10.0.weight", "head.weight", "head.bias"]
    frozen = optim.freeze(mask, optim.adamw(0.1)).init(params)
    assert list(frozen["adam"].mu) == ["layer10.0.weight", "head.weight", "head.bias"]
    assert optim.freeze(mask).init(params) == ()
    nan = {n: torch.full_like(p, torch.nan) for n, p in params.items()}
    assert optim.freeze(mask).update(nan, ())[0]["stem.weight"].abs().sum() == 0


def test_gradual_unfreezing_in_one_graph():
    params = params_like()
    starts = optim.label_by_path(params, [("head", 0), ("layer10", 2), ("layer1", 3)], default=4)
    tx = optim.chain(optim.adamw(0.1), optim.unfreeze(starts))
    update = jit(lambda state: tx.update(params, state, params))
    state, began = tx.init(params), {}
    for t in range(6):
        updates, state = update(state)
        for n, u in updates.items():
            if u.abs().sum() > 0:
                began.setdefault(n, t)
    assert began == starts


def test_layerwise_learning_rates():
    params = params_like()
    factors = optim.layer_decay(params, ["stem", ["layer1", "layer10"], "head"], 0.5)
    tx = optim.chain(optim.sgd(1.0), optim.scale_leaves(factors))
    updates, _ = tx.update(params, tx.init(params), params)
    assert [u.flatten()[0].item() for u in updates.values()] == [-0.25, -0.5, -0.5, -0.5, -1.0, -1.0]


def test_parts_inside_jit_equal_eager():
    params = params_like()
    labels = optim.label_by_path(params, [("head", "fast"), ("stem", "none")], default="slow")
    tx = optim.chain(
        optim.clip_by_global_norm(1.0),
        optim.partition({"fast": optim.adam(0.1), "slow": optim.lamb(0.5), "none": optim.set_to_zero()}, labels),
        optim.scale_leaves(dict.fromkeys(NAMES, 0.5)),
    )

    def step(state, grads):
        return tx.update(grads, state, params)

    eager = packed = tx.init(params)
    compiled = jit(step)
    for _ in range(3):
        a, eager = step(eager, params)
        b, packed = compiled(packed, params)
        torch.testing.assert_close(dict(b), a)
    assert tree.paths(packed) == tree.paths(eager)


# --- hyperparameters -----------------------------------------------------------------------------------------------


def test_hyperparameters_are_readable_and_settable():
    tx = optim.inject_hyperparams(optim.adamw)(
        0.1, weight_decay=0.2, b2=torch.tensor(0.9), amsgrad=True, mask=optim.no_decay_mask
    )
    state = tx.init(params_like())
    assert {n: round(v.item(), 6) for n, v in optim.get_hyperparams(state).items()} == {
        "learning_rate": 0.1,
        "weight_decay": 0.2,
        "b2": 0.9,
    }
    new = optim.set_hyperparams(state, learning_rate=0.5, weight_decay=torch.tensor(0.0))
    assert optim.get_hyperparams(state)["learning_rate"] == pytest.approx(0.1)
    assert optim.get_hyperparams(new)["b2"]
    updates, _ = tx.update(params_like(), new, params_like())
    assert updates["stem.weight"].flatten()[0].item() == pytest.approx(-0.5)


@pytest.mark.parametrize(("dtype", "kept"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_hyperparameters_are_never_kept_below_fp32(dtype, kept):
    tx = optim.inject_hyperparams(optim.adam)(learning_rate=0.1, b2=0.9999)
    state = tx.init({"w": torch.ones(2, dtype=dtype)})
    assert {v.dtype for v in optim.get_hyperparams(state).values()} == {kept}
    assert optim.get_hyperparams(state)["b2"] < 1


INJECTED = [
    *("sgd", "adam", "adamw", "nadam", "radam", "adamax", "rmsprop", "adagrad", "adadelta", "rprop", "adafactor"),
    *("lion", "lars", "lamb", "ralars", "tadam", "adabelief", "adamp", "adan", "ademamix", "muon", "soap", "prodigy"),
    *("schedule_free_sgd", "schedule_free_adamw"),
]
NOT_NONE = {  # where the default is None or leaves something out
    "dof": 3.0, "trust_clip": 2.0, "growth_rate": 1.5, "b3": 0.9, "shampoo_beta": 0.9, "adam_learning_rate": 0.05,
    "weight_decay": 0.3, "momentum": 0.3, "dampening": 0.3, "b1": 0.6, "eps_root": 1e-3, "learning_rate": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("name", INJECTED)
def test_every_number_may_be_a_tensor(name):
    """All numbers of an optimizer at once: in the state, and as a population of two, against constants."""
    builder = getattr(optim, name)
    numbers = {
        n: float(NOT_NONE.get(n, p.default))
        for n, p in inspect.signature(builder).parameters.items()
        if p.annotation is float or float in typing.get_args(p.annotation)
    }
    data = [tree.map(torch.Tensor.double, torch_data(seed)) for seed in range(4)]

    def run(tx):
        params = data[0]
        state = tx.init(params)
        for grads in data[1:]:
            updates, state = tx.update(grads, state, params)
            params = optim.apply_updates(params, updates)
        return optim.eval_params(state, params)

    members = [numbers, {n: 0.9 * x for n, x in numbers.items()}]
    expected = [run(builder(**member)) for member in members]
    assert not torch.equal(expected[0]["w"], expected[1]["w"])
    torch.testing.assert_close(run(optim.inject_hyperparams(builder)(**numbers)), expected[0], rtol=1e-12, atol=1e-12)
    stacked = tree.stack([{n: torch.tensor(x, dtype=torch.float64) for n, x in m.items()} for m in members])
    got = torch.vmap(lambda values: run(builder(**values)))(stacked)
    torch.testing.assert_close(got, tree.stack(expected), rtol=1e-10, atol=1e-12)


def torch_data(seed):
    key = random.fold_in(random.key(0), seed)
    return {"w": random.normal(key, (3, 2)), "b": random.normal(random.fold_in(key, 1), (2,))}


def test_infinite_degrees_of_freedom_may_be_a_tensor():
    params = torch_data(0)
    updates = [
        (tx := build(0.1, dof=math.inf)).update(params, tx.init(params))[0]
        for build in (optim.tadam, optim.inject_hyperparams(optim.tadam))
    ]
    torch.testing.assert_close(updates[0], updates[1])
    torch.testing.assert_close(updates[0], optim.adam(0.1).update(params, optim.adam(0.1).init(params))[0])


def test_schedules_are_readable_and_not_settable():
    tx = optim.inject_hyperparams(optim.sgd)(learning_rate=optim.schedules.linear(1.0, 0.0, 4), momentum=0.5)
    params = {"w": torch.ones(1)}
    state = tx.init(params)
    for expected in (1.0, 0.75, 0.5):
        _, state = tx.update(params, state, params)
        assert optim.get_hyperparams(state)["learning_rate"] == expected
    with pytest.raises(
        ValueError,
        match=r"hyperparameter 'learning_rate' follows a schedule; there are \['learning_rate', 'momentum'\]",
    ):
        optim.set_hyperparams(state, learning_rate=0.1)
    with pytest.raises(ValueError, match="hyperparameter 'lr' is not in the state"):
        optim.set_hyperparams(state, lr=0.1)


def test_hyperparameters_of_several_parts():
    """A plain name sets all of that name, a path one of them."""
    params = params_like()
    inject = optim.inject_hyperparams(optim.sgd)
    labels = optim.label_by_path(params, [("head", "head")], default="body")
    tx = optim.chain(optim.partition({"head": inject(learning_rate=1.0), "body": inject(learning_rate=2.0)}, labels))
    state = tx.init(params)
    assert list(optim.get_hyperparams(state)) == ["0/head/learning_rate", "0/body/learning_rate"]
    one = optim.set_hyperparams(state, **{"0/head/learning_rate": 5.0})
    assert [v.item() for v in optim.get_hyperparams(one).values()] == [5.0, 2.0]
    both = optim.set_hyperparams(state, learning_rate=3.0)
    assert [v.item() for v in optim.get_hyperparams(both).values()] == [3.0, 3.0]


def labelled(params):
    return {n: "matrix" if p.ndim > 1 else "rest" for n, p in params.items()}


def no_matrix(params):
    return {n: p.ndim < 2 for n, p in params.items()}


INJECTED = {  # a builder, functions among its arguments that are no schedules, its numbers
    "muon": (optim.muon, {"matrices": lambda params: tree.map(lambda flag: not flag, no_matrix(params))}),
    "adamw": (optim.adamw, {"mask": no_matrix}),
    "add_noise": (optim.add_noise, {"key": random.key(0), "eta": 0.1}),
    "multi_steps": (optim.multi_steps, {"tx": optim.sgd(0.1), "every": optim.schedules.constant(2)}),
    "monitor": (optim.monitor, {"decay": 0.5, "norm": lambda updates, params: tree.global_norm(updates)}),
    "partition": (
        optim.partition, {"transforms": {"matrix": optim.sgd(0.1), "rest": optim.adam(0.1)}, "labels": labelled},
    ),
    "freeze": (optim.freeze, {"mask": no_matrix, "tx": optim.sgd(0.1)}),
    "scale_leaves": (optim.scale_leaves, {"factors": lambda params: dict.fromkeys(params, 0.5)}),
    "unfreeze": (optim.unfreeze, {"starts": lambda params: dict.fromkeys(params, 1)}),
    "apply_if": (optim.apply_if, {"tx": optim.sgd(0.1), "condition": lambda updates, **extra: torch.tensor(True)}),
}  # fmt: skip


@pytest.mark.parametrize("name", INJECTED)
def test_injected_builders_take_functions_that_are_no_schedules(name):
    builder, arguments = INJECTED[name]
    if "learning_rate" in inspect.signature(builder).parameters:
        arguments = {"learning_rate": 0.1, **arguments}
    params = {"w": torch.ones(2, 2), "b": torch.ones(2)}
    tx, plain = optim.inject_hyperparams(builder)(**arguments), builder(**arguments)
    state = tx.init(params)
    got, expected = tx.update(params, state, params)[0], plain.update(params, plain.init(params), params)[0]
    torch.testing.assert_close(got, expected)
    assert list(optim.get_hyperparams(state)) == [n for n, v in arguments.items() if isinstance(v, float)]


def test_injected_builders_refuse_at_once():
    with pytest.raises(ValueError, match=r"learning_rate must be at least 0, got -1.0"):
        optim.inject_hyperparams(optim.sgd)(learning_rate=-1.0)
    with pytest.raises(TypeError, match="unexpected keyword"):
        optim.inject_hyperparams(optim.sgd)(lr=1.0)


def test_populations_have_hyperparameters_of_their_own():
    """vmap over stacked states: one update for many learning rates."""
    tx = optim.inject_hyperparams(optim.adam)(learning_rate=0.1)
    params = {"w": torch.ones(3)}
    states = tree.stack([optim.set_hyperparams(tx.init(params), learning_rate=r) for r in (0.1, 0.2)])
    updates, _ = torch.vmap(lambda s: tx.update(params, s, params))(states)
    torch.testing.assert_close(updates["w"], torch.tensor([[-0.1] * 3, [-0.2] * 3]))


@pytest.mark.parametrize("compiled", [False, True])
def test_each_part_looks_twice_for_itself(compiled):
    """The gradient at a part's other parameters leaves the rest where it is, whichever part comes after which."""
    params = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0]), "c": torch.tensor([0.5])}
    grad_fn = torch.func.grad(lambda p: (p["a"].sum() * p["b"].sum() * p["c"].sum()) ** 2)
    rules = {"first": optim.sam(optim.sgd(0.1), 0.5), "second": optim.sam(optim.sgd(0.2), 0.7), "third": optim.sgd(0.3)}
    tx = optim.partition(rules, {"a": "first", "b": "second", "c": "third"})

    def update(params):
        return tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)[0]

    grads = grad_fn(params)
    expected = {"c": -0.3 * grads["c"]}
    for name, rate, rho in (("a", 0.1, 0.5), ("b", 0.2, 0.7)):
        moved = params[name] + rho * grads[name] / grads[name].norm()
        expected[name] = -rate * grad_fn({**params, name: moved})[name]
    got = jit(update)(params) if compiled else update(params)
    torch.testing.assert_close(got, expected)


# --- states by name ------------------------------------------------------------------------------------------------


def test_state_reads_by_name():
    tx = optim.named_chain(clip=optim.clip_by_global_norm(1.0), opt=optim.adamw(optim.schedules.cosine(0.1, 10)))
    paths = tree.paths(tx.init({"layer1.0.conv.0.weight": torch.ones(1)}))
    assert paths == [
        "opt/adam/step",
        "opt/adam/mu/layer1.0.conv.0.weight",
        "opt/adam/nu/layer1.0.conv.0.weight",
        "opt/learning_rate/step",
        "opt/learning_rate/rate",
    ]


def test_a_checkpoint_survives_a_new_transformation_in_the_chain(tmp_path):
    from holofunc import checkpoint

    params = {"w": torch.ones(2), "b": torch.ones(1)}
    old = optim.named_chain(adam=optim.scale_by_adam(), learning_rate=optim.scale_by_learning_rate(0.1))
    _, state = old.update(params, old.init(params), params)
    checkpoint.save(tmp_path, state, 1)
    new = optim.named_chain(
        clip=optim.clip_by_global_norm(1.0),
        adam=optim.scale_by_adam(),
        averaged=optim.ema(0.9),
        learning_rate=optim.scale_by_learning_rate(0.1),
    )
    fresh = new.init(params)
    with pytest.raises(checkpoint.CheckpointError, match="averaged"):
        checkpoint.restore(tmp_path, fresh)
    restored = checkpoint.restore(tmp_path, fresh, strict=False)
    torch.testing.assert_close(restored["adam"], state["adam"])
    assert restored["averaged"].step == 0
    new.update(params, restored, params)
