"""Wrappers around wrappers, in every order, against their definitions in NumPy; the orders that make no sense say why."""

import functools
import itertools

import numpy as np
import pytest
import torch

from holofunc import jit, optim, tree

D = torch.float64
START = {"w": np.array([[0.5, -1.0], [0.25, 2.0]]), "b": np.array([0.3, -0.7])}
RATE, MOMENTUM = 0.1, 0.5


def gradient(params, t):
    """Of a quadratic that turns with ``t``, in NumPy or torch."""
    return {n: (1 + 0.5 * i) * (p - (-1) ** t * 0.4) + 0.2 * t for i, (n, p) in enumerate(params.items())}


# --- the definitions, on dicts of arrays -------------------------------------------------------------------------------


class Sgd:
    """With momentum, so that there is a state to keep, to gather or to spoil."""

    def __init__(self, start):
        self.m = {n: np.zeros_like(p) for n, p in start.items()}

    def update(self, g, p, grad_fn, flush=False):
        self.m = {n: MOMENTUM * self.m[n] + g[n] for n in g}
        return {n: -RATE * m for n, m in self.m.items()}

    def evaluated(self, p):
        return p


class Wrapper:
    def __init__(self, start, inner):
        self.inner, self.count = inner(start), 0
        self.setup(start)

    def setup(self, start):
        pass

    def evaluated(self, p):
        return self.inner.evaluated(p)

    def update(self, g, p, grad_fn, flush=False):
        self.count += 1
        return self.change(self.inner.update(g, p, grad_fn, flush), p)


class Lookahead(Wrapper):
    period = 2

    def setup(self, start):
        self.slow = dict(start)

    def change(self, u, p):
        if self.count % self.period == 0:
            self.slow = {n: s + 0.5 * (p[n] + u[n] - s) for n, s in self.slow.items()}
            return {n: self.slow[n] - p[n] for n in u}
        return u

    def evaluated(self, p):
        return self.slow


class Scout(Lookahead):
    """At three updates between syncs the statistic is above 0.5 always, and this is Lookahead."""

    period = 3


class EmaParams(Wrapper):
    def setup(self, start):
        self.average = dict(start)

    def change(self, u, p):
        self.average = {n: 0.75 * a + 0.25 * (p[n] + u[n]) for n, a in self.average.items()}
        return u

    def evaluated(self, p):
        return self.average


class ScheduleFree(Wrapper):
    def setup(self, start):
        self.z, self.x = dict(start), dict(start)

    def change(self, u, p):
        self.z = {n: z + u[n] for n, z in self.z.items()}
        self.x = {n: x + (self.z[n] - x) / self.count for n, x in self.x.items()}
        return {n: 0.2 * self.z[n] + 0.8 * self.x[n] - p[n] for n in u}

    def evaluated(self, p):
        return self.x


class MultiSteps(Wrapper):
    def setup(self, start):
        self.window = []

    def update(self, g, p, grad_fn, flush=False):
        self.window += [] if flush else [g]
        if not self.window or (len(self.window) < 2 and not flush):
            return {n: np.zeros_like(x) for n, x in g.items()}
        mean = {n: sum(x[n] for x in self.window) / len(self.window) for n in g}
        self.window = []
        return self.inner.update(mean, p, grad_fn)


class ApplyIfFinite(Wrapper):
    def update(self, g, p, grad_fn, flush=False):
        import copy

        before = copy.deepcopy(self.inner)
        u = self.inner.update(g, p, grad_fn, flush)
        if all(np.isfinite(x).all() for x in (*g.values(), *u.values())):
            return u
        self.inner = before
        return {n: np.zeros_like(x) for n, x in g.items()}


class Sam(Wrapper):
    def update(self, g, p, grad_fn, flush=False):
        if flush:
            return self.inner.update(g, p, None, flush)
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        factor = 0.3 / norm if norm > 0 else 0.0  # a NaN is not above 0
        return self.inner.update(grad_fn({n: p[n] + factor * g[n] for n in p}), p, None, flush)


class Cautious(Wrapper):
    def update(self, g, p, grad_fn, flush=False):
        u = self.inner.update(g, p, grad_fn, flush)
        kept = {n: (u[n] * g[n] < 0).astype(float) for n in u}
        return {n: u[n] * k / max(k.mean(), 1e-3) for n, k in kept.items()}


class Flatten(Wrapper):
    def __init__(self, start, inner):
        self.shapes = {n: x.shape for n, x in start.items()}
        super().__init__(self.vector(start), inner)

    def vector(self, values):
        return {"all": np.concatenate([values[n].ravel() for n in sorted(self.shapes)])}

    def leaves(self, vector):
        cut = np.cumsum([int(np.prod(self.shapes[n])) for n in sorted(self.shapes)])[:-1]
        pieces = dict(zip(sorted(self.shapes), np.split(vector["all"], cut), strict=True))
        return {n: pieces[n].reshape(shape) for n, shape in self.shapes.items()}

    def update(self, g, p, grad_fn, flush=False):
        inner_fn = None if grad_fn is None else lambda v: self.vector(grad_fn(self.leaves(v)))
        return self.leaves(self.inner.update(self.vector(g), self.vector(p), inner_fn, flush))

    def evaluated(self, p):
        return self.leaves(self.inner.evaluated(self.vector(p)))


class Masked(Wrapper):
    """The matrix goes to the inner one, the gradient of the vector passes through (negated: it is descent, too)."""

    def __init__(self, start, inner):
        super().__init__({"w": start["w"]}, inner)

    def update(self, g, p, grad_fn, flush=False):
        inner_fn = None if grad_fn is None else lambda part: {"w": grad_fn({**p, **part})["w"]}
        return {**g, **self.inner.update({"w": g["w"]}, {"w": p["w"]}, inner_fn, flush)}

    def evaluated(self, p):
        return {**p, **self.inner.evaluated({"w": p["w"]})}


class Transparent(Wrapper):
    def change(self, u, p):
        return u


WRAPPERS = {
    "lookahead": (lambda tx: optim.lookahead(tx, 0.5, 2), Lookahead),
    "scout": (lambda tx: optim.scout(tx, 0.5, 3), Scout),
    "ema_params": (lambda tx: optim.ema_params(tx, 0.75), EmaParams),
    "schedule_free": (lambda tx: optim.schedule_free(tx, RATE, b1=0.8), ScheduleFree),
    "multi_steps": (lambda tx: optim.multi_steps(tx, 2), MultiSteps),
    "apply_if_finite": (lambda tx: optim.apply_if_finite(tx), ApplyIfFinite),
    "sam": (lambda tx: optim.sam(tx, 0.3), Sam),
    "cautious": (lambda tx: optim.cautious(tx), Cautious),
    "flatten": (lambda tx: optim.flatten(tx), Flatten),
}
AROUND = {  # they hold wrappers, and change nothing themselves
    "chain": (lambda tx: optim.chain(optim.identity(), tx), Transparent),
    "named_chain": (lambda tx: optim.named_chain(first=optim.identity(), then=tx), Transparent),
    "inject_hyperparams": (lambda tx: optim.inject_hyperparams(lambda rate: tx)(rate=0.5), Transparent),
    "partition": (lambda tx: optim.partition({"all": tx}, {"w": "all", "b": "all"}), Transparent),
    "freeze": (lambda tx: optim.freeze({"w": False, "b": False}, tx), Transparent),
    "masked": (lambda tx: optim.masked(tx, lambda params: {n: n == "w" for n in params}), Masked),
}
AVERAGING = ("lookahead", "scout", "ema_params", "schedule_free")
REFUSED = {  # (outer, inner), nothing between them that ends the conflict: why
    **{("cautious", name): "cautious cannot wrap lookahead, scout, ema_params or sch" for name in AVERAGING},
    ("cautious", "multi_steps"): "cautious cannot wrap multi_steps",
    **{("schedule_free", name): "schedule_free cannot wrap lookahead, scout, ema_p" for name in AVERAGING},
    ("schedule_free", "multi_steps"): "schedule_free cannot wrap multi_steps",
    ("lookahead", "schedule_free"): "lookahead cannot wrap schedule_free",
    ("scout", "schedule_free"): "scout cannot wrap schedule_free",
    ("multi_steps", "sam"): r"multi_steps cannot wrap sam, .*: write sam\(multi_steps\(tx, every\)\)",
    ("multi_steps", "multi_steps"): "multi_steps cannot wrap multi_steps: write one",
    ("sam", "sam"): "sam cannot wrap sam",
    **{
        ("flatten", name): "flatten cannot wrap partition, masked or freeze"
        for name in ("partition", "freeze", "masked")
    },
}


def build(names):
    """``names[0]`` around ``names[1]`` around ... around gradient descent: ours, and the definition."""
    table = WRAPPERS | AROUND
    tx, definition = optim.sgd(RATE, momentum=MOMENTUM), Sgd
    for name in reversed(names):
        tx = table[name][0](tx)
        definition = (lambda outer, inner: lambda start: outer(start, inner))(table[name][1], definition)
    return tx, definition


def refusal(names):
    """Why ``names`` are refused: the conflict that is met first when building from the inside."""
    found = [(i, j) for i, j in itertools.combinations(range(len(names)), 2) if (names[i], names[j]) in REFUSED]
    if not found:
        return None
    outer = max(i for i, _ in found)
    return "|".join(REFUSED[names[i], names[j]] for i, j in found if i == outer)


def tensors(arrays):
    return {n: torch.tensor(x, dtype=D) for n, x in arrays.items()}


def follow(names, steps, spoiled=()):
    """Both side by side; at the steps in ``spoiled`` the gradient is NaN, and is NaN wherever it is looked at."""
    tx, define = build(names)
    definition = define(START)
    params, expected, state = tensors(START), dict(START), tx.init(tensors(START))
    for t in range(steps):
        nan = np.nan if t in spoiled else 0.0

        def grad_fn(p, t=t, nan=nan):
            return {n: g + nan for n, g in gradient(p, t).items()}

        with np.errstate(invalid="ignore"):
            u = definition.update(grad_fn(expected), expected, grad_fn)
        expected = {n: p + u[n] for n, p in expected.items()}
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        params = optim.apply_updates(params, updates)
        torch.testing.assert_close(params, tensors(expected), rtol=1e-12, atol=1e-12)
        evaluated = optim.eval_params(state, params)
        torch.testing.assert_close(evaluated, tensors(definition.evaluated(expected)), rtol=1e-12, atol=1e-12)
    return tx, definition, params, state


def check(names, steps=4):
    if why := refusal(names):
        with pytest.raises(ValueError, match=why):
            build(names)
        return
    follow(names, steps)
    if "apply_if_finite" in names and names[0] != "masked":  # which lets the NaN of the others pass
        state = follow(names, steps, spoiled=(1,))[-1]
        assert tree.all_finite(state)


PAIRS = list(itertools.product(WRAPPERS, repeat=2))


@pytest.mark.parametrize("names", [(n,) for n in WRAPPERS] + PAIRS, ids="-".join)
def test_every_wrapper_in_every_wrapper(names):
    check(names)


@pytest.mark.parametrize("outer", AROUND)
def test_what_holds_wrappers_lets_them_be_found(outer):
    for name in WRAPPERS:
        check((outer, name))
        check((name, outer))
    check(("ema_params", outer, "schedule_free"))
    check(("lookahead", outer, "cautious"))
    check(("sam", outer, "multi_steps"))


def test_conflicts_are_found_at_any_depth():
    """Through one more wrapper or chain, whichever it is."""
    for (outer, inner), between in itertools.product(REFUSED, (*WRAPPERS, *AROUND)):
        with pytest.raises(ValueError, match=refusal((outer, between, inner))):
            build((outer, between, inner))


@pytest.mark.parametrize("names", [pair for pair in REFUSED if pair[0] != "flatten"], ids="-".join)
def test_conflicts_with_what_a_user_wraps_are_found_in_the_state(names):
    """A function that only knows ``init`` and ``update`` hides what it holds, until there is a state."""
    outer, inner = names
    held = build((inner,))[0]

    def update(updates, state, params=None, **extra):
        return held.update(updates, state, params, **extra)

    tx = WRAPPERS[outer][0](optim.chain(optim.GradientTransformation(held.init, update)))
    with pytest.raises(ValueError, match=REFUSED[names]):
        tx.init(tensors(START))


@pytest.mark.parametrize("outer", ["primal_averaging", "nesterov_updates", "mechanic", "in_eigenbasis"])
@pytest.mark.parametrize("inner", [*AVERAGING, "multi_steps", "lawa", "average_tail"])
def test_what_changes_updates_stands_inside(outer, inner):
    makes = {n: make for n, (make, _) in WRAPPERS.items()} | {
        "lawa": optim.lawa,
        "average_tail": lambda tx: optim.average_tail(tx, 1),
    }
    held = makes[inner](optim.sgd(RATE))
    hidden = optim.GradientTransformation(held.init, lambda u, s, params=None: held.update(u, s, params))
    for build_it in (
        lambda: getattr(optim, outer)(optim.chain(held)),
        lambda: getattr(optim, outer)(hidden).init(tensors(START)),
    ):
        with pytest.raises(ValueError, match=rf"^{outer} cannot wrap (multi_steps|lookahead)"):
            build_it()


def test_mechanic_is_guarded_from_outside():
    with pytest.raises(ValueError, match=r"^mechanic cannot wrap .*: write apply_if_finite\(mechanic\(tx\)\)$"):
        optim.mechanic(optim.apply_if_finite(optim.sgd(RATE)))


def test_masks_inside_of_flatten_are_found_in_init():
    for tx in (
        optim.adamw(RATE, mask=optim.no_decay_mask),
        optim.chain(optim.scale_leaves(lambda p: dict.fromkeys(p, 1.0))),
    ):
        with pytest.raises(
            ValueError, match=r"^(mask|factors) must choose among named parameters, which flatten has put"
        ):
            optim.flatten(tx).init(tensors(START))
    with pytest.raises(ValueError, match=r"^flatten cannot wrap partition, masked or freeze"):
        optim.flatten(optim.muon(RATE))


def test_three_deep():
    """A third of all triples that make sense, with every wrapper in every place."""
    triples = [t for t in itertools.permutations(WRAPPERS, 3) if not refusal(t)][::3]
    assert all({t[i] for t in triples} == set(WRAPPERS) for i in (0, 2))
    for names in triples:
        check(names, steps=3)


@pytest.mark.parametrize("outer", [n for n in WRAPPERS if ("multi_steps" in n or (n, "multi_steps") not in REFUSED)])
def test_an_open_window_is_closed_through_any_wrapper(outer):
    names = ("multi_steps",) if outer == "multi_steps" else (outer, "multi_steps")
    tx, definition, params, state = follow(names, 3)  # every second call closes one
    expected = {n: p.numpy() for n, p in params.items()}
    zero = {n: np.zeros_like(p) for n, p in expected.items()}
    u = definition.update(zero, expected, None, flush=True)
    updates, state = optim.flush(tx, state, params)
    torch.testing.assert_close(updates, tensors(u), rtol=1e-12, atol=1e-12)
    assert any(x.abs().max() > 0 for x in updates.values())
    params = optim.apply_updates(params, updates)
    evaluated = definition.evaluated({n: p + u[n] for n, p in expected.items()})
    torch.testing.assert_close(optim.eval_params(state, params), tensors(evaluated), rtol=1e-12, atol=1e-12)


def test_what_needs_more_than_gradients_is_flushed():
    params, buffers = tensors(START), {"mean": torch.zeros(2, dtype=D)}
    tx = optim.ema_params(optim.multi_steps(optim.sgd(1.0), 3), 0.5, buffers=buffers)
    _, state = tx.update(params, tx.init(params), params, buffers=buffers)
    updates, state = optim.flush(tx, state, params, buffers={"mean": torch.ones(2, dtype=D)})
    assert torch.equal(updates["w"], -params["w"])
    assert optim.eval_buffers(state, buffers)["mean"].tolist() == [0.5, 0.5]
    tx = optim.chain(optim.multi_steps(optim.sgd(1.0), 3), optim.reduce_on_plateau(0.5, patience=0))
    state = tx.init(params)
    for _ in range(2):  # the second loss is no progress
        _, state = tx.update(params, state, params, loss=torch.tensor(1.0))
    updates, after = optim.flush(tx, state, params)
    assert torch.equal(updates["w"], -0.5 * params["w"])
    assert after[1] is state[1] or tree.leaves(after[1]) == tree.leaves(state[1])


@pytest.mark.parametrize("name", WRAPPERS)
def test_refusals_are_reported_through_any_wrapper(name):
    tx = WRAPPERS[name][0](optim.apply_if_finite(optim.sgd(RATE), max_consecutive=1))
    params = tensors(START)
    nan = {n: p * torch.nan for n, p in params.items()}
    state = tx.init(params)
    for _ in range(2 if name == "multi_steps" else 1):
        _, state = tx.update(nan, state, params, grad_fn=lambda p: nan)
    assert optim.skipped(state)
    assert optim.gave_up(state) == (name != "apply_if_finite")  # the outer one keeps the count, of five


def test_outermost_average_wins_and_siblings_keep_to_their_part():
    params = tensors(START)
    tx = optim.partition(
        {"slow": WRAPPERS["lookahead"][0](optim.sgd(RATE)), "plain": optim.sgd(RATE)}, {"w": "slow", "b": "plain"}
    )
    _, state = tx.update(params, tx.init(params), params)
    moved = tree.map(lambda p: p + 1, params)
    evaluated = optim.eval_params(state, moved)
    torch.testing.assert_close(evaluated, {"w": params["w"], "b": moved["b"]})


def test_parameters_that_the_state_does_not_know():
    params = tensors(START)
    for name in ("lookahead", "schedule_free", "flatten"):
        tx = WRAPPERS[name][0](optim.ema_params(optim.sgd(RATE)) if name == "flatten" else optim.sgd(RATE))
        with pytest.raises(
            ValueError, match=r"^params must hold all parameters that state was made for: missing \['b'\]$"
        ):
            optim.eval_params(tx.init(params), {"w": params["w"]})


# --- what is not in the definitions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner_state", ["keep", "reset", "pullback"])
def test_syncs_leave_schedules_and_hyperparameters_alone(inner_state):
    """What a sync resets or pulls back is momentum, not how far training has come."""
    schedule = optim.schedules.linear(0.5, 0.0, 5)

    def build(learning_rate, rho):
        parts = optim.adam(learning_rate), optim.unfreeze({"w": 0, "b": 3}), optim.scale(rho)
        return optim.apply_if_finite(optim.chain(*parts, optim.adan(schedule), optim.lars(schedule)))

    tx = optim.lookahead(
        optim.inject_hyperparams(build)(learning_rate=schedule, rho=1.0), sync_period=2, inner_state=inner_state
    )
    params = tensors(START)
    state = optim.set_hyperparams(tx.init(params), rho=0.25)
    for t in range(4):
        _, state = tx.update(params, state, params)
        assert optim.get_hyperparams(state)["learning_rate"] == schedule(t)
        assert optim.get_hyperparams(state)["rho"] == 0.25
        chain = state.inner.inner.inner
        counts = chain[0]["learning_rate"].step, chain[1].step, chain[3]["descent"].step, chain[4]["lars"].step
        assert [int(c) for c in counts] == [t + 1] * 4
        adam = chain[0]["adam"]
        assert int(adam.step) == ((t + 1) % 2 if inner_state == "reset" else t + 1)
        assert (adam.mu["w"].abs().max() == 0) == (inner_state == "reset" and t % 2 == 1)


def test_the_averaged_iterate_follows_a_changing_interpolation():
    """x is exact while ``b1`` is set or scheduled: y is read with the ``b1`` that it was made with."""
    tx = optim.inject_hyperparams(optim.schedule_free_sgd)(RATE, b1=optim.schedules.linear(0.5, 0.9, 4))
    params, z, x = tensors(START), dict(START), dict(START)
    state = tx.init(params)
    for t in range(5):
        g = gradient(params, t)
        updates, state = tx.update(g, state, params)
        params = optim.apply_updates(params, updates)
        z = {n: v - RATE * g[n].numpy() for n, v in z.items()}
        x = {n: v + (z[n] - v) / (t + 1) for n, v in x.items()}
        torch.testing.assert_close(optim.eval_params(state, params), tensors(x), rtol=1e-12, atol=1e-12)


COMPILED = [
    ("masked", "sam"),
    ("flatten", "sam", "multi_steps", "ema_params"),
    ("partition", "schedule_free", "cautious"),
    ("ema_params", "scout", "apply_if_finite", "inject_hyperparams"),
]


@pytest.mark.parametrize("names", COMPILED, ids="-".join)
def test_one_graph_through_any_nesting(names):
    tx, params = build(names)[0], tensors(START)
    carry = compiled = params, tx.init(params)

    def step(carry, t):
        params, state = carry

        def grad_fn(p):
            return {n: (p[n] - 0.3) * t for n in p}

        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optim.apply_updates(params, updates), state

    torch._dynamo.reset()
    fast = torch.compile(step, backend="eager", fullgraph=True)
    for t in (1.0, -0.5, 2.0):
        carry, compiled = step(carry, torch.tensor(t, dtype=D)), fast(compiled, torch.tensor(t, dtype=D))
    torch.testing.assert_close(compiled, carry, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(optim.eval_params(compiled[1], compiled[0]), optim.eval_params(carry[1], carry[0]))


def test_functions_around_an_update_are_called():
    """A user's ``functools.wraps`` copies attributes; a chain must not take the copy for the update inside."""
    sgd = optim.sgd(1.0)

    @functools.wraps(sgd.update)
    def doubled(updates, state, params=None, **extra):
        updates, state = sgd.update(updates, state, params, **extra)
        return tree.map(lambda u: 2 * u, updates), state

    tx, params = optim.chain(optim.GradientTransformation(sgd.init, doubled)), {"w": torch.ones(1)}
    assert tx.update(params, tx.init(params))[0]["w"] == -2
    again = optim.GradientTransformation(*tx)
    assert again.update is tx.update


@pytest.mark.parametrize("make", [optim.tadam, lambda rate: optim.scale_by_novograd()], ids=["tadam", "novograd"])
def test_jitted_states_keep_the_order_of_their_dicts(make):
    """Also where one number per leaf is kept."""
    params = {n: torch.ones(s) for n, s in zip("zamsk", [(3,), (40, 40), (), (2, 2), (7,)], strict=True)}
    tx = make(0.1)
    state = tx.init(params)
    _, after = jit(tx.update)(params, state, params)
    assert tree.paths(after) == tree.paths(state)


def test_buffers_are_averaged_where_asked_for():
    """Statistics of normalization follow their average as the parameters do; counters are copied."""
    params, D = {"w": torch.ones(2)}, torch.float64
    buffers = {"norm.mean": torch.zeros(2, dtype=D), "norm.num_batches_tracked": torch.tensor(0)}
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.ema_params(optim.sgd(0.1), 0.5, buffers=buffers))
    state, average = tx.init(params), buffers["norm.mean"]
    assert optim.eval_buffers(optim.adam(0.1).init(params), buffers) == buffers
    for t in range(1, 4):
        latest = {"norm.mean": torch.full((2,), float(t), dtype=D), "norm.num_batches_tracked": torch.tensor(t)}
        _, state = tx.update(params, state, params, buffers=latest)
        average = 0.5 * average + 0.5 * t
        kept = optim.eval_buffers(state, latest)
        assert torch.equal(kept["norm.mean"], average)
        assert kept["norm.num_batches_tracked"] == t
    assert buffers["norm.mean"].sum() == 0
    with pytest.raises(
        TypeError, match=r"^ema_params that averages buffers needs the new ones: call update\(\.\.\., buffers"
    ):
        tx.update(params, state, params)
