"""What users bring: their own transformations, masks, spikes in the gradients; and options that must do something."""

import collections
import functools
import math
from typing import Any

import optree
import pytest
import torch

from holofunc import jit, lift, losses, optim, random, train, tree

Pair = collections.namedtuple("Pair", ("init", "update"))
PARAMS = {"fc.weight": torch.ones(3, 3), "fc.bias": torch.ones(3), "norm.weight": torch.ones(3)}


def sign():
    """As optax writes it: no extra arguments."""

    def update(updates, state, params=None):
        return tree.map(torch.sign, updates), state

    return optim.GradientTransformation(lambda params: (), update)


# --- transformations as optax writes them ----------------------------------------------------------------------------

PLAIN = {
    "alone": lambda tx: optim.chain(tx, optim.scale(-0.1)),
    "named_chain": lambda tx: optim.named_chain(sign=tx, sgd=optim.sgd(0.1)),
    "masked": lambda tx: optim.masked(tx, lambda p: tree.map(lambda x: True, p)),
    "freeze": lambda tx: optim.freeze(lambda p: tree.map(lambda x: False, p), tx),
    "partition": lambda tx: optim.partition({"all": tx}, lambda p: tree.map(lambda x: "all", p)),
    "multi_steps": lambda tx: optim.multi_steps(tx, 2),
    "apply_if_finite": optim.apply_if_finite,
    "skip_large_updates": lambda tx: optim.skip_large_updates(tx, 1.0),
    "lookahead": optim.lookahead,
    "scout": optim.scout,
    "ema_params": lambda tx: optim.ema_params(tx, 0.9),
    "schedule_free": lambda tx: optim.schedule_free(tx, 0.1),
    "cautious": lambda tx: optim.cautious(tx, raw=True),
    "sam": optim.sam,
    "flatten": optim.flatten,
    "conditionally_transform": lambda tx: optim.conditionally_transform(tx, lambda count, **extra: count >= 0),
    "conditionally_mask": lambda tx: optim.conditionally_mask(tx, lambda count, **extra: count >= 0),
    "inject": lambda tx: optim.inject_hyperparams(lambda rate: optim.chain(sign(), optim.scale(rate)))(-0.1),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_updates_work_in_wrappers_and_steps(name):
    tx, model = PLAIN[name](sign()), lift(torch.nn.Linear, 3, 2)
    step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx)
    state, _ = step(train.create_state(model, tx, random.key(0)), (torch.ones(4, 3), torch.tensor([0, 1, 0, 1])))
    assert tree.all_finite(state.params)


class Foreign:
    """Neither a tuple nor ours."""

    def init(self, params):
        return ()

    def update(self, updates, state, params=None):
        return tree.map(torch.sign, updates), state


@pytest.mark.parametrize("name", [name for name in PLAIN if name != "inject"])
def test_pairs_from_elsewhere_are_transformations(name):
    foreign = Foreign()
    for pair in (foreign, Pair(foreign.init, foreign.update)):
        tx = PLAIN[name](pair)
        extra = {"loss": torch.ones(()), "weight": 1.0, "grad_fn": lambda params: params}
        updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, **extra)
        assert tree.all_finite(updates)


def test_plain_updates_get_what_they_name():
    def update(updates, state, params=None, *, loss):
        return tree.map(lambda u: u * loss, updates), state

    tx = optim.chain(optim.GradientTransformation(lambda params: (), update), sign())
    extra = {"loss": torch.tensor(-2.0), "weight": torch.ones(())}
    assert tx.update({"w": torch.ones(1)}, tx.init(PARAMS), **extra)[0]["w"] == -1
    with pytest.raises(TypeError, match="loss"):
        tx.update({"w": torch.ones(1)}, tx.init(PARAMS))


def twice(updates):
    return tree.map(lambda u: 2 * u, updates)


def updates_of_any_signature():
    """All double; those that can, by the loss."""

    class Rule:
        def update(self, updates, state, params=None):
            return twice(updates), state

        def __call__(self, updates, state):
            return twice(updates), state

    def plain(updates, state, params=None):
        return twice(updates), state

    @functools.wraps(plain)
    def decorated(*args, **kwargs):
        return plain(*args, **kwargs)

    def by_loss(updates, state, *, loss):
        return tree.map(lambda u: u * loss, updates), state

    def any_names(updates, state, **extra):
        return tree.map(lambda u, p: u * extra["loss"] + 0 * p, updates, extra["params"]), state

    def by_keyword(updates, state, *, params):
        return tree.map(lambda u, p: 2 * u + 0 * p, updates, params), state

    def other_names(u, s, p=None, loss=None):
        return tree.map(lambda x, y: x * loss + 0 * y, u, p), s

    def any_number(*args):
        return tree.map(lambda u, p: 2 * u + 0 * p, args[0], args[2]), args[1]

    found = {"method": Rule().update, "callable": Rule(), "partial": functools.partial(plain)}
    return found | {f.__name__: f for f in (decorated, by_loss, any_names, by_keyword, other_names, any_number)}


@pytest.mark.parametrize("name", updates_of_any_signature())
def test_updates_of_any_signature(name):
    tx = optim.chain(
        optim.GradientTransformation(lambda params: (), updates_of_any_signature()[name]), optim.scale(1.0)
    )
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, loss=torch.tensor(2.0), weight=1.0)
    assert torch.equal(updates["fc.bias"], 2 * PARAMS["fc.bias"])


def test_updates_of_any_signature_are_built_in_graphs():
    rules = {n: u for n, u in updates_of_any_signature().items() if n not in ("callable", "partial")}

    def all_of_them(grads):
        out = {}
        for name, update in rules.items():
            tx = optim.chain(optim.GradientTransformation(lambda params: (), update), optim.scale(1.0))
            out[name] = tx.update(grads, tx.init(PARAMS), PARAMS, loss=torch.tensor(2.0))[0]
        return out

    for updates in torch.compile(all_of_them, backend="eager", fullgraph=True)(PARAMS).values():
        assert torch.equal(updates["fc.bias"], 2 * PARAMS["fc.bias"])


def test_plain_updates_need_not_name_the_parameters():
    tx = optim.chain(optim.GradientTransformation(lambda params: (), lambda updates, state: (updates, state)))
    assert tx.update(PARAMS, tx.init(PARAMS), PARAMS, loss=1.0)[0] is PARAMS


def test_plain_updates_compile():
    own = optim.with_extra_args_support(Pair(lambda params: (), lambda updates, state, params=None: (updates, state)))
    tx = optim.inject_hyperparams(lambda rate: optim.chain(own, sign(), optim.sgd(rate)))(0.1)
    updates, _ = jit(lambda g, s: tx.update(g, s, loss=torch.ones(())))(PARAMS, tx.init(PARAMS))
    assert updates["fc.bias"].tolist() == pytest.approx([-0.1] * 3)


# --- masks and labels ------------------------------------------------------------------------------------------------


def no_norm(params):
    """A function that fails where a rule of its matches nothing: it has to see all parameters."""
    return optim.label_by_path(params, [("norm", False)], default=True)


AROUND = {
    "bare": lambda tx: tx,
    "partition": lambda tx: optim.partition(
        {"head": tx, "rest": tx}, lambda p: optim.label_by_path(p, [("fc", "head")], default="rest")
    ),
    "masked": lambda tx: optim.masked(tx, lambda p: tree.map(lambda x: x.ndim > 1, p)),
    "freeze": lambda tx: optim.freeze(lambda p: optim.label_by_path(p, [("norm", True)], default=False), tx),
    "nested": lambda tx: optim.masked(optim.freeze(lambda p: tree.map(lambda x: False, p), tx), no_norm),
}
MASKED = {
    "adamw": lambda mask: optim.adamw(0.1, weight_decay=0.1, mask=mask),
    "muon": lambda mask: optim.muon(0.1, weight_decay=0.1, mask=mask),
    "adafactor": lambda mask: optim.adafactor(0.1, weight_decay=0.1, mask=mask),
    "lars": lambda mask: optim.lars(0.1, weight_decay=0.1, mask=mask),
    "prodigy": lambda mask: optim.prodigy(weight_decay=0.1, mask=mask),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("name", MASKED)
def test_masks_are_trees_of_all_parameters_or_functions_everywhere(name, around):
    found = []
    for mask in (no_norm, no_norm(PARAMS)):
        tx = AROUND[around](MASKED[name](mask))
        updates, _ = tx.update(tree.map(torch.ones_like, PARAMS), tx.init(PARAMS), PARAMS)
        found.append(updates)
    for path in PARAMS:
        torch.testing.assert_close(found[0][path], found[1][path], rtol=0, atol=0)


def test_a_mask_of_another_structure_says_what_is_possible():
    for tx in (optim.adamw(0.1, mask={"w": True}), optim.masked(optim.adamw(0.1, mask={"w": True}), no_norm)):
        with pytest.raises(ValueError, match=r"unexpected \['w'\]; a function of the parameters is possible too$"):
            tx.init(PARAMS)


@pytest.mark.parametrize(
    ("name", "decays"),
    [
        *((n, True) for n in ("abnormality.fc", "normal_head", "enormous", "platform.norm_free.conv", "fc", "in")),
        *((n, False) for n in ("norm1", "bn2", "blocks.0.ln_1", "batch_norm", "layernorm3", "norm_pre", "q_norm")),
    ],
)
def test_norms_are_told_from_words_that_contain_one(name, decays):
    assert optim.no_decay_mask({f"{name}.weight": torch.ones(2, 2)}) == {f"{name}.weight": decays}


# --- cautious --------------------------------------------------------------------------------------------------------


def test_cautious_rules_descend_in_a_chain():
    grads = {"w": torch.tensor([1.0, -2.0])}
    for rule in (optim.scale_by_lion, optim.scale_by_adam, lambda: optim.chain(optim.scale_by_sign())):
        tx = optim.chain(optim.cautious(rule()), optim.scale_by_learning_rate(0.1))
        updates, _ = tx.update(grads, tx.init(grads), grads)
        assert (updates["w"] * grads["w"] < 0).all()


def test_cautious_optimizers_descend():
    grads = {"w": torch.tensor([1.0, -2.0])}
    for tx in (optim.lion(0.1), optim.madgrad(0.1), optim.prodigy(), optim.rprop(0.1), optim.adan(0.1)):
        for wrapped in (optim.cautious(tx), optim.cautious(optim.masked(tx, {"w": True}))):
            updates, _ = wrapped.update(grads, wrapped.init(grads), grads)
            assert (updates["w"] * grads["w"] < 0).all()
    with pytest.raises(ValueError, match=r"^raw must be False for a tx that holds a learning rate"):
        optim.cautious(optim.lion(0.1), raw=True)


def test_cautious_asks_about_what_it_does_not_know():
    down = optim.stateless(lambda updates, params: tree.map(torch.neg, updates))
    by_leaf = optim.stateless_with_tree_map(lambda u, p: -u)
    warm_up = optim.scale_by_schedule(lambda step: -0.1 * step)
    for tx in (sign(), down, by_leaf, warm_up, optim.scale(torch.tensor(-1.0, device="meta"))):
        cautious = optim.cautious(optim.chain(optim.scale_by_adam(), tx))
        with pytest.raises(
            ValueError, match=r"^cautious must know where a tx of your own functions, or of a factor of"
        ):
            cautious.init(PARAMS)


def test_cautious_knows_negative_factors():
    grads = {"w": torch.tensor([1.0, -2.0])}
    for end in (optim.scale(-0.1), optim.scale(torch.tensor(-0.1)), optim.scale_by_schedule(lambda step: -0.1)):
        tx = optim.cautious(optim.chain(optim.scale_by_adam(), end))
        assert (tx.update(grads, tx.init(grads), grads)[0]["w"] * grads["w"] < 0).all()


# --- guards ----------------------------------------------------------------------------------------------------------

RULES = [
    *("adam", "adamw", "nadam", "radam", "adamax", "rmsprop", "adagrad", "adadelta", "rprop", "lion", "adafactor"),
    *("lars", "lamb", "ralars", "tadam", "adabelief", "adamp", "adan", "ademamix", "muon", "soap", "adopt", "acprop"),
    *("madgrad", "mars", "simplified_ademamix", "sm3", "schedule_free_adamw"),
    *("came", "shampoo", "laprop", "stable_adamw", "normuon", "scion", "signum", "cautious_adamw", "dadapt_adamw"),
]
MAKE = {name: lambda name=name: getattr(optim, name)(0.1) for name in RULES} | {
    "galore": lambda: optim.galore(0.1, rank=1),
    "centered": lambda: optim.rmsprop(0.1, centered=True),
    "yogi": lambda: optim.chain(optim.scale_by_yogi(), optim.scale(-0.1)),
    "novograd": lambda: optim.chain(optim.scale_by_novograd(), optim.scale(-0.1)),
    "kron": lambda: optim.kron(0.1, key=random.key(0)),
    "kl-soap": lambda: optim.chain(optim.in_eigenbasis(optim.scale_by_adam(), kl=True), optim.scale(-0.1)),
    "mechanic": lambda: optim.mechanic(optim.adam(0.1)),
    "compact": lambda: optim.compact_state(optim.adam(0.1), min_size=0),
    "lookahead-pullback": lambda: optim.lookahead(optim.adam(0.1), sync_period=2, inner_state="pullback"),
}
SHAPED = {"w": torch.full((3, 2), 0.5), "b": torch.full((3,), 0.5), "conv": torch.full((2, 2, 2, 2), 0.5)}


def after(tx, sizes):
    params, state = SHAPED, tx.init(SHAPED)
    for size in sizes:
        grads = tree.map(lambda p, size=size: size * (1 + 0.1 * torch.arange(p.numel()).view(p.shape)), params)
        updates, state = tx.update(grads, state, params, loss=torch.ones(()))
        params = optim.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("spike", [1e20, 1e30])
def test_gradients_whose_squares_overflow(name, spike):
    params, _ = after(MAKE[name](), (1.0, spike, spike, 1.0, 1.0))
    assert tree.all_finite(params)


@pytest.mark.parametrize("name", ["adam", "adamw", "adadelta", "nadam", "adagrad", "adamax", "radam", "rmsprop"])
def test_spikes_as_in_torch(name):
    theirs = {"adamw": "AdamW", "rmsprop": "RMSprop", "radam": "RAdam", "nadam": "NAdam"}.get(name, name.capitalize())
    w = torch.nn.Parameter(torch.ones(2))
    optimizer, tx, params = getattr(torch.optim, theirs)([w], 0.1), getattr(optim, name)(0.1), {"w": torch.ones(2)}
    state = tx.init(params)
    for size in (1.0, 1e20, 1.0, 1.0):
        w.grad = torch.full((2,), size)
        optimizer.step()
        updates, state = tx.update({"w": w.grad}, state, params)
        params = optim.apply_updates(params, updates)
        torch.testing.assert_close(params["w"], w.detach(), rtol=1e-5, atol=1e-5)


CLIPPED = {  # and the size that is left of a gradient of (3, 4) * spike
    "clip_by_global_norm": (lambda: optim.clip_by_global_norm(2.0), 2.0),
    "clip_by_global_norm-tiny": (lambda: optim.clip_by_global_norm(1e-10), 1e-10),
    "clip_by_block_rms": (lambda: optim.clip_by_block_rms(1.0), 2**0.5),
    "adaptive_grad_clip": (lambda: optim.adaptive_grad_clip(0.5), 2.5),
    "normalize_by_update_norm": (lambda: optim.normalize_by_update_norm(), 1.0),
    "reduce_variance": (lambda: optim.reduce_variance(max_norm=3.0), 3.0),
}


@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize("spike", [1.0, 1e15, 1e20])
def test_clips_shorten_what_is_huge(name, spike):
    """Its direction stays, as in ``torch.nn.utils.clip_grad_norm_``."""
    (make, size), params = CLIPPED[name], {"w": torch.tensor([3.0, 4.0])}
    grads = {"w": torch.tensor([3.0, 4.0]) * spike}
    updates, _ = make().update(grads, make().init(params), params)
    torch.testing.assert_close(updates["w"] / size, torch.tensor([0.6, 0.8]), rtol=1e-5, atol=0)


INVARIANT = {  # updates that do not depend on the length of the gradients
    "scale_by_trust_ratio": lambda: optim.scale_by_trust_ratio(),
    "lars": lambda: optim.lars(0.1),
    "lars-outside": lambda: optim.holocron.lars(0.1, momentum=0.9, ratio_in_buffer=False),
    "ralars": lambda: optim.ralars(0.1),  # whose first update is the momentum alone
    "muon": lambda: optim.scale_by_muon(),
    "muon-bf16": lambda: optim.scale_by_muon(ns_dtype=torch.bfloat16),
    "scion": lambda: optim.scion(0.1),
    "normalize_rms": lambda: optim.normalize_rms(),
    "graft": lambda: optim.graft(optim.identity(), optim.scale_by_sign()),
    "graft-magnitude": lambda: optim.chain(optim.graft(optim.scale_by_sign(), optim.identity()), optim.normalize_rms()),
    "lbfgs": lambda: optim.lbfgs(0.1),
    "keep_norms": lambda: optim.keep_norms(),
    "brake_radial": lambda: optim.chain(optim.scale(-1.0), optim.brake_radial(0.0)),
    "project": lambda: optim.project(optim.projection_l2_ball),
}


@pytest.mark.parametrize("name", INVARIANT)
@pytest.mark.parametrize("spike", [1e20, 1e30])
def test_the_length_of_huge_gradients_does_not_matter(name, spike):
    params = {"w": torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.5, -0.5]])}
    grads = {"w": torch.tensor([[3.0, 4.0, -1.0], [0.5, -2.0, 1.0]])}
    updates, expected = (
        INVARIANT[name]().update({"w": size * grads["w"]}, INVARIANT[name]().init(params), params)[0]["w"]
        for size in (spike, 1e12)
    )
    torch.testing.assert_close(updates, expected, rtol=1e-3, atol=0.05 if "bf16" in name else 1e-4)
    assert expected.abs().max() > 0


def test_huge_gradients_decide_as_others():
    """AdamP's cosine, the floor of rows, the point at which SAM looks, and the length that is skipped."""
    params, along = {"w": torch.tensor([[3.0, 4.0]])}, {"w": torch.tensor([[3e20, 4e20]])}
    across, seen = {"w": torch.tensor([[4e20, -3e20]])}, []
    adamp = optim.scale_by_adamp(wd_ratio=0.0, weight_decay=1.0)
    assert adamp.update(along, adamp.init(params), params)[0]["w"].abs().min() > 3  # decays: nothing was projected
    assert adamp.update(across, adamp.init(params), params)[0]["w"].abs().max() < 2
    torch.testing.assert_close(optim.floor_rows(0.5).update(along, (), params)[0], along)
    sam = optim.sam(optim.sgd(0.1), rho=0.5)
    sam.update(along, sam.init(params), params, grad_fn=lambda at: seen.append(at["w"]) or along)
    torch.testing.assert_close(seen[0], torch.tensor([[3.3, 4.4]]))
    tx = optim.skip_large_updates(optim.scale_by_sign(), 1e21)
    assert optim.skipped(tx.update(along, tx.init(params), params)[1]).item() is False


@pytest.mark.parametrize("name", MAKE)
def test_guards_guard(name):
    """Also in the first update, and around decompositions."""
    for guard in (optim.apply_if_finite, lambda tx: optim.skip_large_updates(tx, 1e3)):
        for bad in (math.nan, math.inf, 1e20, 3e38):
            tx = guard(MAKE[name]())
            params, state = after(tx, (bad, 1.0, bad, 1.0))
            assert tree.all_finite((params, state.inner))
            if not math.isfinite(bad):
                assert state.total == 2
                expected, _ = after(MAKE[name](), (1.0, 1.0))
                torch.testing.assert_close(params, expected, rtol=0, atol=0)


def test_soap_without_eps():
    params = {"w": torch.ones(3, 2), "b": torch.ones(2)}
    tx = optim.soap(0.1, eps=0.0)
    state = tx.init(params)
    for seed in range(3):
        updates, state = tx.update(tree.map(lambda p: random.normal(random.key(seed), p.shape), params), state, params)  # noqa: B023
        assert tree.all_finite(updates)


# --- options do something --------------------------------------------------------------------------------------------


def test_growth_rate_of_prodigy():
    """The recurrence of the authors' code: away from d0 at once, then by a factor towards the largest estimate."""
    d0, growth = 1e-6, 1.02
    tx, params = optim.prodigy(growth_rate=growth), {"w": torch.zeros(2, dtype=torch.float64)}
    free = optim.prodigy()
    grads = {"w": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    state, other = tx.init(params), free.init(params)
    ds = [d0]
    for _ in range(4):
        updates, state = tx.update(grads, state, params)
        _, other = free.update(grads, other, params)
        params = optim.apply_updates(params, updates)
        ds.append(state["prodigy"].distance.item())
    assert ds[1] == d0  # nothing has moved yet
    assert ds[2] > d0 * growth
    assert ds[3] == pytest.approx(min(ds[2] * growth, state["prodigy"].largest.item()))


def test_first_optimistic_update():
    tx, grads = optim.scale_by_optimistic_gradient(alpha=2.0, beta=3.0), torch.tensor([5.0])
    first, state = tx.update(grads, tx.init(grads))
    assert first == 10
    assert tx.update(torch.tensor([7.0]), state)[0] == 2 * 7 + 3 * (7 - 5)


def test_plateau_of_negative_losses():
    def scales(loss, **options):
        tx, out = optim.reduce_on_plateau(0.1, patience=2, **options), []
        state = tx.init(PARAMS)
        for _ in range(8):
            updates, state = tx.update(PARAMS, state, loss=torch.tensor(loss))
            out.append(updates["fc.bias"][0].item())
        return out

    assert scales(-1.0) == scales(1.0) == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])
    assert scales(0.0, rtol=0.1) == scales(1.0)


@pytest.mark.parametrize("builder", ["sgd", "adam", "adamw", "lion", "lamb", "muon", "schedule_free_adamw"])
def test_injected_rates_are_found_by_name(builder):
    state = optim.inject_hyperparams(getattr(optim, builder))(learning_rate=0.1, weight_decay=0.2).init(PARAMS)
    if builder.startswith("schedule_free"):
        interpolated = optim.inject_hyperparams(getattr(optim, builder))(learning_rate=0.1, b1=0.8).init(PARAMS)
        assert tree.get(tree.set(interpolated, b1=0.7), "b1") == pytest.approx(0.7)
    assert tree.get(state, "learning_rate") == pytest.approx(0.1)
    assert tree.get(state, "weight_decay") == pytest.approx(0.2)
    state = tree.set(state, learning_rate=0.3)
    assert optim.get_hyperparams(state)["learning_rate"] == pytest.approx(0.3)


def test_static_names_arguments():
    with pytest.raises(ValueError, match=r"^static must name arguments of the builder, .*got \['lerning_rate'\]$"):
        optim.inject_hyperparams(optim.sgd, static=("lerning_rate",))


def test_shares_near_zero_in_single_precision():
    """``1 - b2`` of a Python number, and the share of Adafactor, are not rounded before they are subtracted."""
    grads = {"w": torch.full((2, 2), 3.0)}
    tx = optim.scale_by_adopt(b2=0.9999)
    _, state = tx.update(tree.map(torch.zeros_like, grads), tx.init(grads))
    assert tx.update(grads, state)[1].nu["w"][0, 0].item() == pytest.approx(9e-4, rel=1e-6)
    tx = optim.scale_by_factored_rms()
    state = tx.init(grads)._replace(step=torch.tensor(99_999))
    share = 100_000**-0.8
    assert tx.update(grads, state)[1].rows["w"][0].item() == pytest.approx(9 * share, rel=1e-5)


@optree.dataclasses.dataclass(namespace="holofunc")
class Layer:
    weight: Any
    bias: Any


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon", "adafactor", "lamb"])
def test_parameters_of_a_registered_class(name):
    tx, flat = getattr(optim, name)(0.1), {"weight": torch.eye(3) + 1, "bias": torch.ones(3)}
    params = Layer(**flat)
    updates, _ = tx.update(params, tx.init(params), params)
    expected, _ = tx.update(flat, tx.init(flat), flat)
    assert type(updates) is Layer
    assert torch.equal(updates.weight, expected["weight"])
    assert torch.equal(updates.bias, expected["bias"])
    with pytest.raises(ValueError, match=r"updates must have the shapes of params, got \(2,\) at 'bias' for \(3,\)"):
        tx.update(Layer(flat["weight"], torch.ones(2)), tx.init(params), params)
