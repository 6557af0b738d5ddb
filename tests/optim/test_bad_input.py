"""What a user can get wrong is refused at build or `init`, by the argument's name and the parameter's path."""

import inspect
import re
import typing

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from holofunc import jit, optim, random, tree
from holofunc.optim import schedules
from holofunc.typing import Schedule

PARAMS = {"w": torch.ones(2, 2), "b": torch.ones(2)}

RATED = [  # every optimizer with a learning rate
    *("sgd", "adam", "adamw", "nadam", "radam", "adamax", "rmsprop", "adagrad", "adadelta", "rprop", "adafactor"),
    *("lion", "lars", "lamb", "ralars", "tadam", "adabelief", "adamp", "adan", "ademamix", "muon", "soap", "prodigy"),
    *("schedule_free_sgd", "schedule_free_adamw"),
    *("adopt", "acprop", "madgrad", "mars", "simplified_ademamix", "sm3", "galore"),  # and sophia, which needs a key
]
B1_B2 = ["adam", "adamw", "nadam", "radam", "adamax", "lion", "lamb", "ralars", "adabelief", "adamp", "soap"]
B1_B2 += ["tadam", "adan", "ademamix", "prodigy", "schedule_free_adamw"]
B1_B2 += ["adopt", "acprop", "mars", "simplified_ademamix", "galore"]
BETAS = [(name, beta) for name in B1_B2 for beta in ("b1", "b2")] + [
    *(("sgd", "momentum"), ("sgd", "dampening"), ("lars", "momentum"), ("rmsprop", "decay"), ("adadelta", "rho")),
    *(("adan", "b3"), ("ademamix", "b3"), ("prodigy", "b3"), ("schedule_free_sgd", "b1"), ("muon", "momentum")),
    *(("muon", "adam_b1"), ("muon", "adam_b2")),
    *(("madgrad", "momentum"), ("sm3", "momentum"), ("sm3", "decay")),
]
DECAYED = [name for name in RATED if name not in ("rprop",)]


@pytest.mark.parametrize("name", RATED)
def test_negative_rates(name):
    with pytest.raises(ValueError, match=r"^learning_rate must be at least 0, got -0\.1$"):
        getattr(optim, name)(-0.1)


@pytest.mark.parametrize("name", RATED)
def test_rates_that_are_no_numbers(name):
    kinds = "a number or a 0-d tensor" if name == "rprop" else "a number, a 0-d tensor or a schedule"
    with pytest.raises(TypeError, match=rf"^learning_rate must be {kinds}, got 'fast'$"):
        getattr(optim, name)("fast")
    with pytest.raises(ValueError, match=rf"^learning_rate must be {kinds}, got shape \(2,\)$"):
        getattr(optim, name)(torch.ones(2))


@pytest.mark.parametrize("name", [n for n in RATED if n != "rprop"])
def test_schedules_of_a_wrong_shape(name):
    with pytest.raises(ValueError, match=r"^learning_rate: a schedule must return .* 0-d tensor, got shape \(3,\)$"):
        getattr(optim, name)(lambda count: torch.ones(3))
    with pytest.raises(TypeError, match=r"^learning_rate: a schedule must return .* 0-d tensor, got None$"):
        getattr(optim, name)(lambda count: None)


@pytest.mark.parametrize(("name", "beta"), BETAS)
@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_betas_out_of_range(name, beta, value):
    with pytest.raises(ValueError, match=rf"^{beta} must be in .*1\), got {value}$"):
        getattr(optim, name)(0.1, **{beta: value})


@pytest.mark.parametrize("name", DECAYED)
def test_negative_decay(name):
    with pytest.raises(ValueError, match=r"^weight_decay must be at least 0, got -1\.0$"):
        getattr(optim, name)(0.1, weight_decay=-1.0)


@pytest.mark.parametrize("name", DECAYED)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_masks_of_another_structure(name, decay):
    tx = getattr(optim, name)(0.1, weight_decay=decay, mask={"w": True, "c": False})
    with pytest.raises(
        ValueError, match=r"^mask must have the structure of .*: missing \['b'\], unexpected \['c'\]; a function of"
    ):
        tx.init(PARAMS)


NEEDS = {
    "adamw": lambda: optim.adamw(0.1),
    "lars": lambda: optim.lars(0.1),
    "lamb": lambda: optim.lamb(0.1),
    "ralars": lambda: optim.ralars(0.1),
    "adamp": lambda: optim.adamp(0.1),
    "adan": lambda: optim.adan(0.1),
    "adafactor": lambda: optim.adafactor(),
    "prodigy": lambda: optim.prodigy(),
    "schedule_free_sgd": lambda: optim.schedule_free_sgd(0.1),
    "lookahead": lambda: optim.lookahead(optim.sgd(0.1)),
    "scout": lambda: optim.scout(optim.sgd(0.1)),
    "ema_params": lambda: optim.ema_params(optim.sgd(0.1)),
    "sam": lambda: optim.sam(optim.sgd(0.1)),
    "adaptive_grad_clip": lambda: optim.adaptive_grad_clip(),
    "add_decayed_weights": lambda: optim.add_decayed_weights(0.1),
    "scale_by_trust_ratio": lambda: optim.scale_by_trust_ratio(),
    "madgrad": lambda: optim.madgrad(0.1),
    "sophia": lambda: optim.sophia(0.1, key=random.key(0)),
    "hutchinson_estimator": lambda: optim.hutchinson_estimator(key=random.key(0)),
    "keep_params_nonnegative": lambda: optim.keep_params_nonnegative(),
}


@pytest.mark.parametrize("name", NEEDS)
def test_rules_that_need_the_parameters(name):
    tx = NEEDS[name]()
    with pytest.raises(ValueError, match=r"^\w+ needs the parameters: call update\(updates, state, params\)$"):
        tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize("name", RATED)
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_leaves_that_are_no_real_floats(name, dtype):
    params = {"w": torch.ones(2, 2), "head": {"steps": torch.ones(2, 2).to(dtype)}}
    with pytest.raises(TypeError, match=rf"params must hold real floating tensors, got {dtype} at 'head/steps'$"):
        getattr(optim, name)(0.1).init(params)


def test_masks_of_a_part():
    tx = optim.muon(0.1, matrices={"w": True})
    with pytest.raises(
        ValueError, match=r"^matrices must have the structure of .*: missing \['b'\], unexpected \[\]; a "
    ):
        tx.init(PARAMS)


def test_leaves_that_are_no_tensors():
    with pytest.raises(TypeError, match=r"params must hold tensors, got float at 'a/0'$"):
        optim.adam(0.1).init({"a": [1.0]})


def wrappers():
    return {
        "lookahead": lambda tx: optim.lookahead(tx),
        "scout": lambda tx: optim.scout(tx),
        "ema_params": lambda tx: optim.ema_params(tx, 0.9),
        "multi_steps": lambda tx: optim.multi_steps(tx, 2),
        "apply_if_finite": lambda tx: optim.apply_if_finite(tx),
        "sam": lambda tx: optim.sam(tx, 0.1),
        "cautious": lambda tx: optim.cautious(tx),
        "flatten": lambda tx: optim.flatten(tx),
        "schedule_free": lambda tx: optim.schedule_free(tx, 0.1),
        "masked": lambda tx: optim.masked(tx, optim.no_decay_mask),
        "conditionally_transform": lambda tx: optim.conditionally_transform(tx, lambda count, **extra: count > 0),
        "conditionally_mask": lambda tx: optim.conditionally_mask(tx, lambda count, **extra: count > 0),
        "with_extra_args_support": lambda tx: optim.with_extra_args_support(tx),
    }


@pytest.mark.parametrize("name", wrappers())
def test_wrappers_refuse_what_is_no_transformation(name):
    with pytest.raises(TypeError, match=r"^tx must be a GradientTransformation, got 0\.1$"):
        wrappers()[name](0.1)


@pytest.mark.parametrize("name", wrappers())
def test_wrappers_refuse_leaves_that_are_no_real_floats(name):
    with pytest.raises(TypeError, match=r"params must hold real floating tensors, got torch.int64 at 'w'$"):
        wrappers()[name](optim.sgd(0.1)).init({"w": torch.ones(2, 2, dtype=torch.int64)})


# --- numbers that are none ---------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
TX = optim.sgd(0.1)
GIVEN = {  # what a builder cannot do without
    "learning_rate": 0.1, "tx": TX, "key": random.key(0), "eta": 0.1, "every": 2, "steps": 10, "warmup_steps": 3,
    "factor": 0.5, "weight_decay": 0.1, "max_norm": 1.0, "max_value": 1.0, "decay": 0.5, "threshold": 1.0, "rate": 0.5,
    "value": 0.1, "init_value": 0.1, "end_value": 0.2, "peak_value": 0.3, "period": 5, "decay_steps": 3, "rho": 0.1,
    "schedule": 0.1, "mask": None, "labels": {}, "transforms": {}, "starts": {}, "factors": {3: 0.5}, "parts": [abs],
    "boundaries": [], "fn": abs, "init": abs, "update": abs, "condition": abs, "rank": 4,
    "base": lambda count: 0.5, "scale": 0.5, "start": 3, "ratio": 0.5, "transform": TX, "projection": abs, "magnitude": TX, "direction": TX, "size": 2, "names": [], "adam_learning_rate": 0.1, "b": 0.5,
}  # fmt: skip
BOUNDS = {  # infinity is no bound; and what TAdam's means
    *("max_norm", "max_value", "trust_clip", "growth_rate", "max_learning_rate", "max_step_size"),
    *("threshold", "dof", "k_dof", "max_rms"),
}
NO_BOUNDS = {("radam", "threshold"), ("ralars", "threshold"), ("scale_by_radam", "threshold")}


def builders():
    made = [optim.GradientTransformation]
    for name in optim.__all__:
        if inspect.isfunction(fn := getattr(optim, name)) and fn.__annotations__.get("return") in made:
            yield name, fn
    for name in schedules.__all__:
        yield f"schedules.{name}", getattr(schedules, name)


def arguments_of(fn):
    """What ``fn`` has to be given, and which of its arguments are numbers."""
    parameters = inspect.signature(fn).parameters.items()
    needed = [n for n, p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return {n: GIVEN[n] for n in needed}, [
        n for n, p in parameters if float in kinds_of(p) and tuple not in kinds_of(p)
    ]


def kinds_of(parameter):
    kinds = typing.get_args(parameter.annotation)
    return [parameter.annotation, *kinds, *map(typing.get_origin, (parameter.annotation, *kinds))]


NUMBERS = [(name, fn, number) for name, fn in builders() for number in arguments_of(fn)[1]]


@pytest.mark.parametrize(("name", "fn", "number"), NUMBERS, ids=[f"{name}-{number}" for name, _, number in NUMBERS])
def test_numbers_that_are_not_finite(name, fn, number):
    """Every number of every builder: NaN and infinities are refused when building, by the argument's name."""
    given, _ = arguments_of(fn)
    fn(**given)
    for value in (NAN, INF, -INF):
        if value == INF and number in BOUNDS and (name, number) not in NO_BOUNDS:
            fn(**{**given, number: value})
            continue
        with pytest.raises(ValueError, match=rf"^{number} must be .*, got {value}$"):
            fn(**{**given, number: value})
    for wrong in ("0.1", True, 1j):
        with pytest.raises(TypeError, match=rf"^{number} must be a number.*, got {wrong!r}$".replace("(", r"\(")):
            fn(**{**given, number: wrong})


FLAGS = [
    (name, fn, flag)
    for name, fn in builders()
    for flag, parameter in inspect.signature(fn).parameters.items()
    if parameter.annotation is bool
]


@pytest.mark.parametrize(("name", "fn", "flag"), FLAGS, ids=[f"{name}-{flag}" for name, _, flag in FLAGS])
def test_flags(name, fn, flag):
    given, _ = arguments_of(fn)
    for wrong in ("nonsense", 3.5, 1, None):
        with pytest.raises(TypeError, match=rf"^{flag} must be a bool, got {wrong!r}$"):
            fn(**{**given, flag: wrong})


def test_the_flags_are_all_looked_at():
    assert len(FLAGS) > 40


SIGNED = {  # what turns updates around, and a loss
    *("scale-factor", "scale_by_schedule-schedule", "scale_by_polyak-f_min"),
    *("scale_by_optimistic_gradient-alpha", "scale_by_optimistic_gradient-beta"),
    *("nan_to_num-nan", "nan_to_num-posinf", "nan_to_num-neginf"),
}
UNSIGNED = [n for n in NUMBERS if not n[0].startswith("schedules.") and f"{n[0]}-{n[2]}" not in SIGNED]


@pytest.mark.parametrize(("name", "fn", "number"), UNSIGNED, ids=[f"{name}-{number}" for name, _, number in UNSIGNED])
def test_negative_numbers(name, fn, number):
    given, _ = arguments_of(fn)
    with pytest.raises(ValueError, match=rf"^{number} must be .*, got -1\.0$"):
        fn(**{**given, number: -1.0})


@pytest.mark.parametrize(("name", "fn", "number"), NUMBERS, ids=[f"{name}-{number}" for name, _, number in NUMBERS])
def test_numbers_in_tensors_and_schedules(name, fn, number):
    """What is refused as a number is refused as a 0-d tensor that can be read, and as the first value of a schedule."""
    given, _ = arguments_of(fn)
    takes = kinds_of(inspect.signature(fn).parameters[number])
    for value in (NAN, -1.0, 1.0):
        try:
            fn(**{**given, number: value})
        except ValueError as error:
            message = f"^{re.escape(str(error))}$"
        else:
            continue
        if torch.Tensor in takes:
            with pytest.raises(ValueError, match=message):
                fn(**{**given, number: torch.tensor(value)})
        if typing.get_origin(Schedule) in takes:
            for schedule in (lambda count, value=value: value, lambda count, value=value: torch.tensor(value)):
                with pytest.raises(ValueError, match=message):
                    fn(**{**given, number: schedule})


def test_tensors_that_are_not_read():
    """What would cost a wait, or stands for many numbers or for none."""
    bad = torch.tensor(-0.1)
    for rate in (bad.to("meta"), FakeTensorMode().from_tensor(bad)):
        optim.adam(rate)
    with TorchDispatchMode():
        optim.adam(bad)
    updates = {"w": torch.ones(2, 2), "b": torch.ones(2)}

    def update(rate):
        tx = optim.sgd(rate)
        return tx.update(updates, tx.init(PARAMS))[0]["w"].sum()

    assert torch.vmap(update)(torch.stack([bad, -bad])).tolist() == pytest.approx([0.4, -0.4])
    assert torch.func.grad(update)(bad).item() == -4
    assert jit(update)(bad).item() == pytest.approx(0.4)


def test_injected_numbers_out_of_range():
    with pytest.raises(ValueError, match=r"^learning_rate must be at least 0, got -0\.5$"):
        optim.inject_hyperparams(optim.adam)(learning_rate=schedules.constant(-0.5))
    with pytest.raises(ValueError, match=r"^b1 must be in \[0, 1\), got 1\.5$"):
        optim.inject_hyperparams(optim.adam)(0.1, b1=schedules.constant(1.5))
    tx = optim.inject_hyperparams(optim.adam)(0.1)
    with pytest.raises(ValueError, match=r"^learning_rate must be at least 0, got -1\.0$"):
        tx.update(PARAMS, set_rate(-1.0), PARAMS)


VMAPPED = [n for n in NUMBERS if torch.Tensor in kinds_of(inspect.signature(n[1]).parameters[n[2]])]
VMAPPED = [n for n in VMAPPED if not n[0].startswith("schedules.")]


@pytest.mark.parametrize(("name", "fn", "number"), VMAPPED, ids=[f"{name}-{number}" for name, _, number in VMAPPED])
def test_vmap_over_any_number(name, fn, number):
    """Two values side by side, as with each alone."""
    given, _ = arguments_of(fn)
    usual = {**given, "learning_rate": 0.1}.get(number) or inspect.signature(fn).parameters[number].default
    values = torch.tensor([0.9, 0.95], dtype=torch.float64) * (usual if isinstance(usual, float) and usual else 0.5)
    params = {"w": torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64), "b": torch.ones(1, 2).double()}

    def after(value):
        tx, p = fn(**{**given, number: value}), params
        state = tx.init(p)
        for t in range(3):
            grads = {n: x - 0.3 * t for n, x in p.items()}
            extra = {"loss": torch.ones(()) / (t + 1), "grad_fn": lambda p: {n: x - 0.3 for n, x in p.items()}}
            updates, state = tx.update(grads, state, p, **extra)
            p = optim.apply_updates(p, updates)
        return p

    torch.testing.assert_close(torch.vmap(after)(values), tree.stack([after(v) for v in values]), rtol=1e-9, atol=1e-9)


def test_the_numbers_are_all_looked_at():
    assert len(NUMBERS) > 190
    assert {name for name, *_ in NUMBERS} >= {
        *RATED,
        *(f"schedules.{s}" for s in schedules.__all__ if s not in ("piecewise", "join")),
    }


@pytest.mark.parametrize(("name", "fn", "number"), NUMBERS, ids=[f"{name}-{number}" for name, _, number in NUMBERS])
def test_schedules_where_numbers_belong(name, fn, number):
    """A schedule is used or refused: by a first value out of range, or as a function in the place of a number."""
    given, _ = arguments_of(fn)
    takes = typing.get_origin(Schedule) in kinds_of(inspect.signature(fn).parameters[number])
    if takes:
        fn(**{**given, number: lambda count: 0.5})
        with pytest.raises(ValueError, match=rf"^{number} must be .*, got nan$"):
            fn(**{**given, number: lambda count: NAN})
    else:
        with pytest.raises(TypeError, match=rf"^{number} must be a number.*, got a (function|schedule)"):
            fn(**{**given, number: lambda count: 0.5})


def set_rate(rate):
    return optim.set_hyperparams(optim.inject_hyperparams(optim.adam)(0.1).init(PARAMS), learning_rate=rate)


def test_numbers_in_tuples_and_tables():
    for make, message in [
        (
            lambda: optim.lamb(0.1, clip=(0.0, NAN)),
            r"clip must be \(low, high\) with 0 <= low <= high, got \(0\.0, nan\)",
        ),
        (lambda: optim.ralars(0.1, clip=2.0), r"clip must be \(low, high\) with 0 <= low <= high, got 2\.0"),
        (lambda: optim.scale_by_muon(ns_coefficients=(1.0, INF, 1.0)), r"ns_coefficients\[1\] must be finite, got inf"),
        (lambda: schedules.piecewise(1.0, {3: NAN}), r"factors\[3\] must be finite, got nan"),
        (lambda: optim.inject_hyperparams(optim.adam)(0.1, b1=lambda count: NAN), r"b1 must be in \[0, 1\), got nan"),
        (lambda: optim.inject_hyperparams(optim.adam)(INF), "learning_rate must be finite, got inf"),
        (lambda: optim.layer_decay(PARAMS, ["w", "b"], NAN), r"decay must be in \(0, 1\], got nan"),
        (lambda: optim.ademamix(0.1, alpha=NAN, alpha_warmup=5), "alpha must be finite, got nan"),
        (lambda: optim.ademamix(0.1, b3=INF, b3_warmup=5), r"b3 must be in \[0, 1\), got inf"),
        (lambda: optim.ademamix(0.1, b3_warmup=0), "b3_warmup must be at least 1, got 0"),
        (lambda: optim.scale_leaves({"w": NAN, "b": 1.0}).init(PARAMS), r"factors\['w'\] must be finite, got nan"),
        (lambda: optim.multi_steps(TX, lambda count: torch.ones(2)), r"every: a schedule must .*, got shape \(2,\)"),
        (lambda: optim.multi_steps(TX, lambda count: 0), "every must be at least 1, got 0"),
        (lambda: optim.schedule_free(TX, 0.1, b1=torch.tensor(0.0)), r"b1 must be in \(0, 1\), got 0\.0"),
        (lambda: optim.tadam(0.1, b1=torch.tensor(0.25)), r"b1 must be in \[0\.5, 1\), got 0\.25"),
        (lambda: optim.tadam(0.1, dof=torch.tensor(0.0)), r"dof must be above 0, got 0\.0"),
        (lambda: set_rate(NAN), "learning_rate must be finite, got nan"),
        (lambda: set_rate(torch.tensor(NAN)), "learning_rate must be finite, got nan"),
        (lambda: set_rate(torch.ones(3)), r"learning_rate must have shape \(\), got \(3,\)"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}$"):
            make()


@pytest.mark.parametrize("name", RATED)
def test_leaves_are_not_blamed_on_a_piece(name):
    """The message names what the user called, or no transformation at all."""
    with pytest.raises(
        TypeError, match=rf"^({name}: |schedule_free: )?params must hold real floating tensors, got torch.int64 at 'w'$"
    ):
        getattr(optim, name)(0.1).init({"w": torch.ones(2, 2, dtype=torch.int64)})


def test_options_of_wrappers():
    tx = optim.sgd(0.1)
    for make, message in [
        (lambda: optim.lookahead(tx, sync_rate=0.0), r"sync_rate must be in \(0, 1\], got 0\.0"),
        (lambda: optim.lookahead(tx, sync_period=0), "sync_period must be an int of at least 1, got 0"),
        (
            lambda: optim.lookahead(tx, inner_state="drop"),
            "inner_state must be 'keep', 'reset' or 'pullback', got 'drop'",
        ),
        (lambda: optim.scout(tx, sync_period=2), "sync_period must be an int of at least 3, got 2"),
        (lambda: optim.ema_params(tx, 1.0), r"decay must be in \[0, 1\), got 1\.0"),
        (lambda: optim.multi_steps(tx, 0), "every must be an int of at least 1 or a schedule, got 0"),
        (lambda: optim.apply_if_finite(tx, 0), "max_consecutive must be at least 1, got 0"),
        (lambda: optim.sam(tx, -0.1), r"rho must be at least 0, got -0\.1"),
        (lambda: optim.schedule_free(tx, 0.1, b1=0.0), r"b1 must be in \(0, 1\), got 0\.0"),
        (lambda: optim.chain(tx, None), r"txs\[1\] must be a GradientTransformation, got None"),
        (lambda: optim.named_chain(a=tx, b=3), "b must be a GradientTransformation, got 3"),
        (lambda: optim.clip_by_global_norm(-1.0), r"max_norm must be at least 0, got -1\.0"),
        (lambda: optim.muon(0.1, ns_steps=0), "ns_steps must be an int of at least 1, got 0"),
        (lambda: optim.rprop(0.1, eta_plus=0.9), "eta_minus must be below 1 and eta_plus above, got 0.5 and 0.9"),
        (lambda: optim.scale_by_adan(prev="both"), "prev must be 'grad' or 'zero', got 'both'"),
        (lambda: optim.scale_by_adamp(views=("row",)), r"views must be some of 'channel' and 'layer', got \('row',\)"),
        (lambda: optim.tadam(0.1, b1=0.3), r"b1 must be in \[0\.5, 1\), got 0\.3"),
        (lambda: optim.galore(0.1, rank=0), "rank must be at least 1, got 0"),
        (lambda: optim.sophia(0.1, key=random.key(0), every=0), "every must be at least 1, got 0"),
        (lambda: optim.sophia(0.1, key=random.key(0), eps=0.0), r"eps must be above 0, got 0\.0"),
        (
            lambda: optim.scale_by_lars(0.1, zero_rule="never"),
            "zero_rule must be 'gradient' or 'denominator', got 'never'",
        ),
    ]:
        with pytest.raises((ValueError, TypeError), match=f"^{message}$"):
            make()


def test_compiled_updates_use_the_same_words():
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(0.1))
    state, update = tx.init(PARAMS), jit(tx.update)
    of_names = r"updates must have the structure of params: missing \['b'\], unexpected \['c'\]"
    with pytest.raises(ValueError, match=of_names):
        update({"w": PARAMS["w"], "c": PARAMS["b"]}, state, PARAMS)
    with pytest.raises(ValueError, match=r"updates must have the shapes of params, got \(2,\) at 'w' for \(2, 2\)"):
        update({"w": PARAMS["b"], "b": PARAMS["b"]}, state, PARAMS)


WITH_STATES = {
    name: make(TX) for name, make in wrappers().items() if name not in ("cautious", "masked", "with_extra_args_support")
} | {
    "inject_hyperparams": optim.inject_hyperparams(optim.adam)(0.1),
    "monitor": optim.monitor(norm=lambda updates, params: tree.global_norm(updates)),
    **{name: getattr(optim, name)() for name in ("scale_by_adam", "scale_by_lion", "scale_by_soap", "scale_by_tadam")},
}


@pytest.mark.parametrize("name", WITH_STATES)
def test_a_state_of_another_transformation(name):
    tx = WITH_STATES[name]
    kind = type(tx.init(PARAMS)).__name__
    for state in (TX.init(PARAMS), None, ()):
        message = rf"^state must be {kind}, as init makes it, got {type(state).__name__}$"
        for outer, inner in ((tx, state), (optim.chain(tx), (state,))):
            with pytest.raises(ValueError, match=message):
                outer.update(PARAMS, inner, PARAMS, grad_fn=lambda p: p)


@pytest.mark.parametrize("name", [n for n in RATED if n not in ("sgd", "rprop", "adafactor", "galore")])
def test_a_state_of_other_shapes(name):
    """As it is left where a head is exchanged: named by its path, not by torch's words for sizes that do not match."""
    tx = optim.chain(optim.clip_by_global_norm(1.0), getattr(optim, name)(0.1))
    params = {"body": torch.ones(3, 3), "head": torch.ones(7, 3)}
    for rows in (4, 1):  # one would be broadcast
        state = tx.init({"body": torch.ones(3, 3), "head": torch.ones(rows, 3)})
        message = rf"^state must be that of parameters .*head.* has \({rows},.*\) in place of \(7,.*\)$"
        with pytest.raises(ValueError, match=message):
            tx.update(params, state, params)


def test_errors_of_a_users_own_are_left_alone():
    def update(updates, state, params=None):
        raise RuntimeError("on purpose")

    tx = optim.chain(optim.GradientTransformation(lambda params: (params["w"].sum().item(),), update), TX)
    with pytest.raises(RuntimeError, match=r"^on purpose$"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)

    def longer(updates, state):  # a history may grow
        return updates, torch.cat([state, torch.ones(1)])

    tx = optim.chain(optim.GradientTransformation(lambda params: torch.zeros(0), longer), TX)
    state = tx.init(PARAMS)
    for _ in range(3):
        _, state = tx.update(PARAMS, state, PARAMS)
    assert len(state[0]) == 3


def test_keys_that_are_none():
    for key in (7, torch.zeros(2), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(TypeError, match=r"^key must be an int64 tensor of shape \(2,\) made by random\.key"):
            optim.add_noise(0.1, key=key)
        with pytest.raises(TypeError, match=r"^key must be an int64 tensor of shape \(2,\) made by random\.key"):
            optim.sophia(0.1, key=key)


def test_measures_of_another_shape():
    tx = optim.monitor(means=lambda updates, params: updates["w"].mean(0))
    with pytest.raises(ValueError, match=r"^means: a measure must return a 0-d tensor, got shape \(2,\)$"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_sam_without_a_gradient_function():
    tx = optim.sam(optim.sgd(0.1))
    with pytest.raises(TypeError, match=r"sam needs a second gradient: call update\(.*, grad_fn=\.\.\.\)"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    "tx", [optim.scale_by_sophia(key=random.key(0)), optim.hutchinson_estimator(key=random.key(0))]
)
def test_curvature_without_a_gradient_function(tx):
    with pytest.raises(TypeError, match=r"^\w+ needs the gradient's derivative: call update\(.*, grad_fn=\.\.\.\)$"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    message = r"^the gradients of grad_fn must have the structure of params: missing \['b'\], unexpected \[\]$"
    with pytest.raises(ValueError, match=message):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, grad_fn=lambda p: {"w": p["w"]})


@pytest.mark.parametrize("wrap", [lambda tx: optim.multi_steps(tx, 2), optim.sam])
def test_curvature_stands_inside_of_nothing_that_looks_elsewhere(wrap):
    with pytest.raises(ValueError, match=r"^(multi_steps|sam) cannot wrap sophia or hutchinson_estimator"):
        wrap(optim.sophia(0.1, key=random.key(0)))


def test_second_gradients_of_another_structure():
    """However deep the one who looks twice."""
    everywhere = {"w": True, "b": True}
    message = r"^the gradients of grad_fn must have the structure of params: missing \['b'\], unexpected \[\]$"
    for wrap in (optim.chain, optim.flatten, lambda tx: optim.masked(tx, everywhere)):
        tx = wrap(optim.sam(TX))
        with pytest.raises(ValueError, match=message):
            tx.update(PARAMS, tx.init(PARAMS), PARAMS, grad_fn=lambda p: {"w": p["w"]})


@pytest.mark.parametrize("name", ["scale_by_polyak", "reduce_on_plateau"])
def test_rules_that_need_the_loss(name):
    tx = getattr(optim, name)()
    with pytest.raises(
        TypeError, match=rf"^{name} needs the loss: call update\(updates, state, params, loss=\.\.\.\)$"
    ):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    by_number, by_tensor = (tx.update(PARAMS, tx.init(PARAMS), loss=loss) for loss in (2.0, torch.tensor(2.0)))
    torch.testing.assert_close(by_number, by_tensor)


def test_transforms_in_a_list():
    with pytest.raises(TypeError, match=r"^transforms must be a dict of transformations by label, got list$"):
        optim.partition([TX], {"w": "a", "b": "a"})


def test_a_state_of_another_chain():
    tx = optim.named_chain(clip=optim.clip_by_global_norm(1.0), sgd=optim.sgd(0.1))
    turned = dict(reversed(tx.init(PARAMS).items()))
    assert list(tx.update(PARAMS, turned)[1]) == ["sgd", "clip"]
    with pytest.raises(ValueError, match=r"state must hold the states of \['clip', 'sgd'\], got \['sgd'\]"):
        tx.update(PARAMS, {"sgd": optim.sgd(0.1).init(PARAMS)})
    with pytest.raises(ValueError, match=r"state must hold the states of \['clip', 'sgd'\], got NoneType"):
        tx.update(PARAMS, None)
    with pytest.raises(ValueError, match="state must hold 2 states, one per transformation, got NoneType"):
        optim.chain(optim.sgd(0.1), optim.scale(1.0)).update(PARAMS, None)
    with pytest.raises(ValueError, match="state must hold 2 states, one per transformation, got 1"):
        optim.chain(optim.sgd(0.1), optim.scale(1.0)).update(PARAMS, (optim.sgd(0.1).init(PARAMS),))
