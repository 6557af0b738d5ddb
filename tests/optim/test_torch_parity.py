"""Against the optimizers of torch and of Holocron, stepped side by side in float64."""

import copy
import warnings
from typing import NamedTuple

import pytest
import torch

from holofunc import optim, random, tree

SHAPES = {"w": (6, 4), "b": (4,), "conv": (3, 2, 3, 3)}


def data(seed, dtype=torch.float64):
    keys = [random.fold_in(random.key(seed), i) for i in range(len(SHAPES))]
    return {n: random.normal(k, s, dtype=dtype) for k, (n, s) in zip(keys, SHAPES.items(), strict=True)}


def side_by_side(tx, make, steps=30, shapes=SHAPES):
    """The largest difference between our parameters and those of ``make(parameters)``, over all steps."""
    params = {n: p for n, p in data(0).items() if n in shapes}
    theirs = {n: torch.nn.Parameter(p.clone()) for n, p in params.items()}
    optimizer = make(list(theirs.values()))
    state, worst = tx.init(params), 0.0
    for t in range(steps):
        grads = {n: g for n, g in data(t + 1).items() if n in shapes}
        for n, p in theirs.items():
            p.grad = grads[n].clone()
        optimizer.step()
        updates, state = tx.update(grads, state, params)
        params = optim.apply_updates(params, updates)
        worst = max(worst, *((params[n] - p.detach()).abs().max().item() for n, p in theirs.items()))
    return worst


T = torch.optim
TORCH = {
    "sgd": (optim.sgd(0.1), lambda p: T.SGD(p, 0.1)),
    "sgd-all": (
        optim.sgd(0.1, momentum=0.9, dampening=0.3, weight_decay=0.01),
        lambda p: T.SGD(p, 0.1, momentum=0.9, dampening=0.3, weight_decay=0.01),
    ),
    "sgd-nesterov": (optim.sgd(0.1, momentum=0.9, nesterov=True), lambda p: T.SGD(p, 0.1, momentum=0.9, nesterov=True)),
    "adam": (optim.adam(0.1, weight_decay=0.1), lambda p: T.Adam(p, 0.1, weight_decay=0.1)),
    "adam-amsgrad": (optim.adam(0.1, amsgrad=True), lambda p: T.Adam(p, 0.1, amsgrad=True)),
    "adamw": (optim.adamw(0.1, b1=0.8, b2=0.9), lambda p: T.AdamW(p, 0.1, betas=(0.8, 0.9))),
    "nadam": (optim.nadam(0.1), lambda p: T.NAdam(p, 0.1)),
    "nadam-l2": (
        optim.nadam(0.1, weight_decay=0.1, decoupled=False, momentum_decay=0.1),
        lambda p: T.NAdam(p, 0.1, weight_decay=0.1, momentum_decay=0.1),
    ),
    "radam": (optim.radam(0.1, b2=0.9, eps_scaled=True), lambda p: T.RAdam(p, 0.1, betas=(0.9, 0.9))),
    "radam-decay": (
        optim.radam(0.1, eps_scaled=True, weight_decay=0.1),
        lambda p: T.RAdam(p, 0.1, weight_decay=0.1, decoupled_weight_decay=True),
    ),
    "adamax": (optim.adamax(0.1), lambda p: T.Adamax(p, 0.1)),
    "rmsprop": (optim.rmsprop(0.1, decay=0.99), lambda p: T.RMSprop(p, 0.1)),
    "rmsprop-all": (
        optim.rmsprop(0.1, decay=0.9, centered=True, momentum=0.9, weight_decay=0.1),
        lambda p: T.RMSprop(p, 0.1, alpha=0.9, centered=True, momentum=0.9, weight_decay=0.1),
    ),
    "adagrad": (
        optim.adagrad(0.1, initial_accumulator_value=0.1),
        lambda p: T.Adagrad(p, 0.1, initial_accumulator_value=0.1),
    ),
    "adadelta": (optim.adadelta(0.5, weight_decay=0.1), lambda p: T.Adadelta(p, 0.5, weight_decay=0.1)),
    "rprop": (optim.rprop(0.1), lambda p: T.Rprop(p, 0.1)),
}


@pytest.mark.parametrize("name", TORCH)
def test_equals_torch(name):
    tolerance = 1e-8 if name.startswith("nadam") else 1e-12  # torch keeps the product of NAdam's momenta in fp32
    assert side_by_side(*TORCH[name]) < tolerance


def test_adafactor_equals_torch():
    tx = optim.adafactor(0.01, eps=0.0)
    assert side_by_side(tx, lambda p: T.Adafactor(p, 0.01), shapes=("w", "b")) < 1e-12


@pytest.mark.parametrize("adjust", ["original", "match_rms"])
def test_muon_equals_torch_in_its_bfloat16(adjust):
    tx = optim.chain(
        optim.scale_by_muon(0.9, adjust=adjust, ns_dtype=torch.bfloat16),
        optim.add_decayed_weights(0.1),
        optim.scale_by_learning_rate(0.1),
    )
    theirs = "match_rms_adamw" if adjust == "match_rms" else adjust

    def make(params):
        return T.Muon(params, 0.1, momentum=0.9, weight_decay=0.1, adjust_lr_fn=theirs)

    assert side_by_side(tx, make, steps=1, shapes=("w",)) < 2e-3
    exact = optim.chain(optim.scale_by_muon(0.9, adjust=adjust), *[optim.scale_by_learning_rate(0.1)])
    assert side_by_side(exact, make, steps=1, shapes=("w",)) < 5e-2


def holocron():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import holocron.optim as holocron_optim
    return holocron_optim


HOLOCRON = {
    "lars": (
        lambda **o: optim.holocron.lars(0.1, weight_decay=0.1, **o),
        lambda h, p, **o: h.LARS(p, 0.1, weight_decay=0.1, **o),
        [{"momentum": 0.9, "nesterov": True}, {"momentum": 0.5, "dampening": 0.3}],
    ),
    "lamb": (
        lambda b1, b2, clip: optim.holocron.lamb(0.1, b1=b1, b2=b2, clip=clip, weight_decay=0.05),
        lambda h, p, b1, b2, clip: h.LAMB(p, 0.1, betas=(b1, b2), scale_clip=clip, weight_decay=0.05),
        [{"b1": 0.8, "b2": 0.9, "clip": (0.5, 2.0)}],
    ),
    "ralars": (
        lambda b2, force: optim.holocron.ralars(0.1, b2=b2, force_adaptive_momentum=force, weight_decay=0.05),
        lambda h, p, b2, force: h.RaLars(p, 0.1, betas=(0.9, b2), force_adaptive_momentum=force, weight_decay=0.05),
        [{"b2": 0.99, "force": False}, {"b2": 0.9, "force": True}],
    ),
    "tadam": (
        lambda **o: optim.holocron.tadam(0.1, b1=0.8, weight_decay=0.05, **o),
        lambda h, p, **o: h.TAdam(p, 0.1, betas=(0.8, 0.999), weight_decay=0.05, **o),
        [{"dof": 3.0}, {"amsgrad": True}],
    ),
    "adabelief": (
        lambda **o: optim.holocron.adabelief(0.1, weight_decay=0.05, **o),
        lambda h, p, **o: h.AdaBelief(p, 0.1, weight_decay=0.05, **o),
        [{"amsgrad": True}],
    ),
    "adamp": (
        lambda delta: optim.holocron.adamp(0.1, delta=delta, weight_decay=0.05),
        lambda h, p, delta: h.AdamP(p, 0.1, delta=delta, weight_decay=0.05),
        [{"delta": 0.1}, {"delta": 3.0}],
    ),
    "adan": (
        lambda **o: optim.holocron.adan(0.1, weight_decay=0.05, **o),
        lambda h, p, **o: h.Adan(p, 0.1, weight_decay=0.05, **o),
        [{}, {"amsgrad": True}],
    ),
    "ademamix": (
        lambda alpha: optim.holocron.ademamix(0.1, alpha=alpha, b3=0.99, weight_decay=0.05),
        lambda h, p, alpha: h.AdEMAMix(p, 0.1, betas=(0.9, 0.999, 0.99), alpha=alpha, weight_decay=0.05),
        [{"alpha": 2.0}],
    ),
    "lookahead": (
        lambda rate, period: optim.holocron.lookahead(optim.adam(0.1), rate, period),
        lambda h, p, rate, period: h.wrapper.Lookahead(T.Adam(p, 0.1), rate, period),
        [{"rate": 0.8, "period": 4}],
    ),
    "scout": (
        lambda rate, period: optim.holocron.scout(optim.adam(0.1), rate, period),
        lambda h, p, rate, period: h.wrapper.Scout(T.Adam(p, 0.1), rate, period),
        [{"rate": 0.5, "period": 6}, {"rate": 0.1, "period": 10}],
    ),
}
CASES = [pytest.param(*v[:2], options, id=f"{n}-{i}") for n, v in HOLOCRON.items() for i, options in enumerate(v[2])]


@pytest.mark.parametrize(("ours", "theirs", "options"), CASES)
def test_holocron_reproduces_holocron(ours, theirs, options):
    module = holocron()
    assert side_by_side(ours(**options), lambda p: theirs(module, p, **options)) < 1e-12


# --- states ------------------------------------------------------------------------------------------------------

MOVED = {
    "Adam": (lambda p: T.Adam(p, 0.1, weight_decay=0.1), optim.adam(0.1, weight_decay=0.1)),
    "AdamW": (lambda p: T.AdamW(p, 0.1, amsgrad=True), optim.adamw(0.1, amsgrad=True)),
    "NAdam": (lambda p: T.NAdam(p, 0.1), optim.nadam(0.1)),
    "RAdam": (lambda p: T.RAdam(p, 0.1), optim.radam(0.1, eps_scaled=True)),
    "Adamax": (lambda p: T.Adamax(p, 0.1), optim.adamax(0.1)),
    "SGD": (lambda p: T.SGD(p, 0.1, momentum=0.9), optim.sgd(0.1, momentum=0.9)),
    "SGD-dampened": (
        lambda p: T.SGD(p, 0.1, momentum=0.9, dampening=0.5),
        optim.sgd(0.1, momentum=0.9, dampening=0.5),
    ),
    "Rprop": (lambda p: T.Rprop(p, 0.1), optim.rprop(0.1)),
    "RMSprop": (lambda p: T.RMSprop(p, 0.1, centered=True), optim.rmsprop(0.1, decay=0.99, centered=True)),
    "Adagrad": (lambda p: T.Adagrad(p, 0.1), optim.adagrad(0.1)),
    "Adadelta": (lambda p: T.Adadelta(p, 0.1), optim.adadelta(0.1)),
    "TAdam": (lambda p: holocron().TAdam(p, 0.1), optim.tadam(0.1)),
    "Adan": (lambda p: holocron().Adan(p, 0.1), optim.holocron.adan(0.1)),
    "AdEMAMix": (lambda p: holocron().AdEMAMix(p, 0.1), optim.ademamix(0.1)),
    "LAMB": (lambda p: holocron().LAMB(p, 0.1), optim.holocron.lamb(0.1)),
}


def trained(make):
    theirs = {n: torch.nn.Parameter(p.clone()) for n, p in data(0).items()}
    optimizer = make(list(theirs.values()))
    step_them(optimizer, theirs, range(1, 6))
    return theirs, optimizer


def step_them(optimizer, theirs, seeds):
    for seed in seeds:
        for n, g in data(seed).items():
            theirs[n].grad = g.clone()
        optimizer.step()


@pytest.mark.parametrize("name", MOVED)
def test_a_run_begun_in_torch_continues(name):
    make, tx = MOVED[name]
    theirs, optimizer = trained(make)
    params = {n: p.detach().clone() for n, p in theirs.items()}
    state = optim.from_torch(copy.deepcopy(optimizer.state_dict()), params, tx)
    step_them(optimizer, theirs, range(6, 9))
    for seed in range(6, 9):
        updates, state = tx.update(data(seed), state, params)
        params = optim.apply_updates(params, updates)
    tolerance = 1e-8 if name == "NAdam" else 1e-12
    torch.testing.assert_close(params, {n: p.detach() for n, p in theirs.items()}, rtol=tolerance, atol=tolerance)


def test_moving_reads_names_and_reaches_into_parts():
    theirs, optimizer = trained(lambda p: T.Adam([("conv", p[2]), ("w", p[0]), ("b", p[1])]))
    params = {n: p.detach() for n, p in theirs.items()}
    tx = optim.masked(optim.adam(optim.schedules.cosine(0.1, 10)), optim.no_decay_mask)
    state = optim.from_torch(optimizer.state_dict(), params, tx)
    torch.testing.assert_close(state["adam"].mu["conv"], optimizer.state[theirs["conv"]]["exp_avg"])
    assert list(state["adam"].mu) == ["w", "conv"]
    assert state["learning_rate"].step == 5


def test_moving_into_wrappers():
    """Counters and moments arrive through any nesting; what torch has not (slow weights, windows) starts afresh."""
    theirs, optimizer = trained(lambda p: T.AdamW(p, 0.1))
    params = {n: p.detach() for n, p in theirs.items()}
    tx = optim.multi_steps(optim.lookahead(optim.inject_hyperparams(optim.adamw)(0.1)), every=2)
    state = optim.from_torch(optimizer.state_dict(), params, tx)
    adam = state.inner.inner.inner["adam"]
    torch.testing.assert_close(adam.nu["w"], optimizer.state[theirs["w"]]["exp_avg_sq"])
    torch.testing.assert_close(state.inner.slow, params)
    assert (int(adam.step), int(state.mini_step)) == (5, 0)


def test_moving_owns_its_memory():
    theirs, optimizer = trained(lambda p: T.Adam(p))
    state = optim.from_torch(optimizer.state_dict(), {n: p.detach() for n, p in theirs.items()}, optim.adam(0.1))
    before = tree.map(torch.clone, state)
    step_them(optimizer, theirs, [9])
    torch.testing.assert_close(state, before)


ADAM, OTHERS = r"\['exp_avg', 'exp_avg_sq', 'step'\]", r"\w+State\.\w+ has no counterpart in torch: tx needs it, the "
MISFITS = [
    *(("Adam", name, f"{OTHERS}state_dict has {ADAM}") for name in ("lion", "soap", "prodigy")),
    ("Adam", "adafactor", f"FactoredState.rows needs 'row_var', the state_dict has {ADAM} for 'w'"),
    ("Adam", "muon", f"MuonState.mu needs 'momentum_buffer', the state_dict has {ADAM} for 'w'"),
    ("Adam", "rprop", f"RpropState.steps needs 'step_size', the state_dict has {ADAM} for 'w'"),
    ("Adam", "adamax", f"AdamaxState.nu needs 'exp_inf', the state_dict has {ADAM} for 'w'"),
    ("Adam", "adabelief", f"BeliefState.nu needs 'exp_avg_var', the state_dict has {ADAM} for 'w'"),
    ("Adam", "tadam", f"TadamState.weight needs 'W_t', the state_dict has {ADAM} for 'w'"),
    ("Adamax", "adam", r"AdamState.nu needs 'exp_avg_sq', the state_dict has \['exp_avg', 'exp_inf', 'step'\] for 'w'"),
]


@pytest.mark.parametrize(("theirs", "ours", "message"), MISFITS, ids=[f"{a}-{b}" for a, b, _ in MISFITS])
def test_moving_what_does_not_fit(theirs, ours, message):
    """Said by the names of what torch holds and of what is needed, however deep."""
    parameters, optimizer = trained(lambda p: getattr(T, theirs)(p, 0.1))
    params = {n: p.detach() for n, p in parameters.items()}
    tx = getattr(optim, ours)(0.1)
    for wrapped in (tx, optim.lookahead(optim.apply_if_finite(tx))):
        with pytest.raises(ValueError, match=f"^{message}$"):
            optim.from_torch(optimizer.state_dict(), params, wrapped)


def test_moving_into_what_a_user_wrote():
    """States are found in any tuple or dict; a memory of the user's own is as unknown to torch as Lion's."""

    class Mine(NamedTuple):
        parts: object

    parameters, optimizer = trained(lambda p: T.Adam(p, 0.1))
    params = {n: p.detach() for n, p in parameters.items()}
    for inner in (optim.adam(0.1), optim.chain(optim.adam(0.1))):
        tx = optim.GradientTransformation(lambda p, inner=inner: Mine(inner.init(p)), inner.update)
        state = optim.from_torch(optimizer.state_dict(), params, tx)
        adam = (state.parts if isinstance(state.parts, dict) else state.parts[0])["adam"]
        torch.testing.assert_close(adam.mu["w"], optimizer.state[parameters["w"]]["exp_avg"])
    tx = optim.GradientTransformation(lambda p: Mine(tuple(p.values())), optim.sgd(0.1).update)
    with pytest.raises(ValueError, match=r"^Mine\.parts has no counterpart in torch: tx needs it, the state_dict has"):
        optim.from_torch(optimizer.state_dict(), params, tx)


def test_moving_into_one_vector():
    parameters, optimizer = trained(lambda p: T.Adam(p, 0.1))
    params = {n: p.detach() for n, p in parameters.items()}
    with pytest.raises(
        ValueError, match=r"^AdamState\.mu must be kept by parameter, got 'float64': from_torch does not reach"
    ):
        optim.from_torch(optimizer.state_dict(), params, optim.flatten(optim.adam(0.1)))


def test_moving_holocrons_adabelief():
    """Its state looks like Adam's: it has to be told that it is not."""
    theirs, optimizer = trained(lambda p: holocron().AdaBelief(p, 0.1))
    moved = copy.deepcopy(optimizer.state_dict())
    for entry in moved["state"].values():
        entry["exp_avg_var"] = entry.pop("exp_avg_sq")
    params = {n: p.detach().clone() for n, p in theirs.items()}
    tx = optim.adabelief(0.1, eps=1e-8, eps_root=0.0, decoupled=False)
    updates, _ = tx.update(data(6), optim.from_torch(moved, params, tx), params)
    step_them(optimizer, theirs, [6])
    torch.testing.assert_close(optim.apply_updates(params, updates), {n: p.detach() for n, p in theirs.items()})


def test_moving_errors():
    theirs, optimizer = trained(lambda p: T.SGD(p, 0.1, momentum=0.9))
    params = {n: p.detach() for n, p in theirs.items()}
    with pytest.raises(ValueError, match=r"AdamState.mu needs 'exp_avg', the state_dict has \['momentum_buffer'\]"):
        optim.from_torch(optimizer.state_dict(), params, optim.adam(0.1))
    with pytest.raises(ValueError, match=r"state_dict must be that of a torch optimizer: missing \['param_groups'\]"):
        optim.from_torch({"state": {}}, params, optim.adam(0.1))
    with pytest.raises(ValueError, match="state_dict holds no state"):
        optim.from_torch(T.Adam(list(theirs.values())).state_dict(), params, optim.adam(0.1))
    with pytest.raises(ValueError, match="as many parameters as there are names, got 3 for 2"):
        optim.from_torch(optimizer.state_dict(), params, optim.sgd(0.1, momentum=0.9), names=["w", "b"])
    with pytest.raises(ValueError, match=r"TraceState.trace must have shape \(6, 4\) for 'w', got \(3, 2, 3, 3\)"):
        optim.from_torch(optimizer.state_dict(), params, optim.sgd(0.1, momentum=0.9), names=["conv", "b", "w"])


def test_a_run_begun_with_torchs_adafactor_continues():
    """Its means of rows and columns are matrices of one column and of one row; of other axes than ours where there are
    more than two."""
    theirs = {n: torch.nn.Parameter(p.clone()) for n, p in data(0).items()}
    matrices = {n: theirs[n] for n in ("w", "b")}
    optimizer = T.Adafactor(list(matrices.values()), 0.01)
    for seed in range(1, 7):
        if seed == 4:
            params, tx = {n: p.detach().clone() for n, p in matrices.items()}, optim.adafactor(0.01, eps=0.0)
            state = optim.from_torch(copy.deepcopy(optimizer.state_dict()), params, tx)
        for n, p in matrices.items():
            p.grad = data(seed)[n].clone()
        optimizer.step()
        if seed >= 4:
            updates, state = tx.update({n: data(seed)[n] for n in params}, state, params)
            params = optim.apply_updates(params, updates)
    expected = {n: p.detach() for n, p in matrices.items()}
    torch.testing.assert_close(params, expected, rtol=1e-10, atol=1e-10)

    optimizer = T.Adafactor([theirs["conv"]], 0.01)
    theirs["conv"].grad = data(1)["conv"]
    optimizer.step()
    with pytest.raises(ValueError, match=r"FactoredState\.rows must have shape .* for 'conv', got "):
        optim.from_torch(optimizer.state_dict(), {"conv": theirs["conv"].detach()}, tx)


def test_memories_without_a_counterpart_are_named():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = T.LBFGS([weight])
    optimizer.step(lambda: weight.square().sum().backward() or weight.square().sum())
    with pytest.raises(ValueError, match=r"LbfgsState\.params has no counterpart in torch: tx needs it"):
        optim.from_torch(optimizer.state_dict(), {"w": weight.detach()}, optim.lbfgs(0.1))


def test_state_of_torchs_muon():
    """Matrices go on as there; what another optimizer had starts afresh."""
    weight = torch.nn.Parameter(data(0)["w"].float())
    optimizer = torch.optim.Muon([weight], lr=0.1, weight_decay=0.1)
    tx = optim.muon(0.1, weight_decay=0.1, ns_dtype=torch.bfloat16)
    for t in range(3):
        weight.grad = data(t + 1)["w"].float()
        if t == 2:
            params = {"w": weight.detach().clone(), "b": torch.ones(4)}
            state = optim.from_torch(optimizer.state_dict(), params, tx, names=["w"])
        optimizer.step()
    updates, state = tx.update({"w": weight.grad, "b": torch.ones(4)}, state, params)
    torch.testing.assert_close(state["muon"]["muon"].mu["w"], optimizer.state[weight]["momentum_buffer"])
    torch.testing.assert_close((params["w"] + updates["w"]), weight.detach(), rtol=1e-2, atol=1e-2)
    assert state["adam"]["adam"].step == 1
