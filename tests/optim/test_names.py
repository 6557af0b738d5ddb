"""One name per concept, in the signatures of all of `optim`; the old names, which work for one version."""

import inspect
import re
import types
import warnings
from pathlib import Path

import pytest
import torch

from holofunc import optim, random

PAGE = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text()
ROOMS = {"optim": optim, "holocron": optim.holocron}
SIGNATURES = {
    f"{room}.{name}": inspect.signature(fn).parameters
    for room, module in ROOMS.items()
    for name in module.__all__
    if isinstance(fn := getattr(module, name), types.FunctionType)
}
OTHER_NAMES = {  # what a concept is not called
    "every": {"update_every", "precondition_frequency", "frequency", "interval", "window", "period", "update_period"},
    "threshold": {"clip_threshold", "clipping_threshold", "clipping", "max_threshold"},
    "bias_corrected": {"bias_correction", "debiased", "use_bias_correction"},
    "learning_rate": {"lr", "rate", "step_length"},
    "weight_decay": {"wd", "decoupled_weight_decay", "l2"},
    "max_dim": {"max_precond_dim", "max_size", "max_preconditioner_dim"},
    "b1": {"beta1", "betas", "beta_1"},
    "b2": {"beta2", "beta_2"},
    "step": {"count", "counter", "iteration"},
    "tx": {"inner", "optimizer", "transform", "transformation", "base_optimizer"},
}
EXCEPTIONS = {("optim.safe_increment", "count")}  # any counter
FIRST = ["learning_rate", "tx", "params", "weight_decay", "state", "updates", "new", "x"]


@pytest.mark.parametrize("concept", OTHER_NAMES)
def test_a_concept_has_one_name(concept):
    found = {(fn, name) for fn, parameters in SIGNATURES.items() for name in parameters if name in OTHER_NAMES[concept]}
    assert found - EXCEPTIONS == set()
    told = re.findall(r"^\| ([^|]*) \|", PAGE.split("\n## Argument names\n")[1].split("\n## ")[0], flags=re.M)
    assert any(f"`{concept}`" in names for names in told)


def test_learning_rate_comes_first_and_options_by_keyword():
    for fn, parameters in SIGNATURES.items():
        names = list(parameters)
        if "learning_rate" in names and not fn.endswith(("schedule_free", "corrected_decay")):
            assert names[0] == "learning_rate", fn
            if not fn.startswith("optim.scale_by_"):
                assert all(
                    p.kind is p.KEYWORD_ONLY or p.kind is p.VAR_KEYWORD for p in list(parameters.values())[1:]
                ), fn


def test_options_are_spelled():
    def takes_any(parameters):
        return any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    by_names_of_the_user = {"optim.named_chain", "optim.monitor", "optim.set_hyperparams", "optim.flush"}
    assert {fn for fn, parameters in SIGNATURES.items() if takes_any(parameters)} == by_names_of_the_user


def test_holocrons_builders_are_the_authors_with_other_defaults():
    """Told by their signatures, as help and `inject_hyperparams` read them."""
    for name in ("lamb", "tadam", "adabelief", "ademamix"):
        ours, theirs = SIGNATURES[f"holocron.{name}"], SIGNATURES[f"optim.{name}"]
        assert list(ours) == list(theirs)
        changed = {n: p.default for n, p in ours.items() if p.default != theirs[n].default}
        assert changed
        params = {"w": torch.linspace(-1, 2, 6).view(3, 2), "b": torch.ones(3)}
        made = (
            getattr(optim.holocron, name)(0.1, weight_decay=0.1),
            getattr(optim, name)(0.1, weight_decay=0.1, **changed),
        )
        found = [tx.update(params, tx.init(params), params)[0] for tx in made]
        assert all(torch.equal(found[0][n], found[1][n]) for n in params)
    with pytest.raises(TypeError, match=r"^lamb\(\) got an unexpected keyword argument 'betas'$"):
        optim.holocron.lamb(0.1, betas=(0.9, 0.99))


def test_keys_are_given_by_keyword():
    with_keys = {fn: parameters["key"].kind for fn, parameters in SIGNATURES.items() if "key" in parameters}
    assert len(with_keys) >= 7
    assert {fn for fn, kind in with_keys.items() if kind is not inspect.Parameter.KEYWORD_ONLY} == set()


def test_decay_is_decoupled_by_default():
    defaults = {
        fn: parameters["decoupled"].default for fn, parameters in SIGNATURES.items() if "decoupled" in parameters
    }
    assert {fn for fn, default in defaults.items() if default is not fn.startswith("optim.")} == set()
    assert len(defaults) >= 10


def test_numbers_of_steps_are_called_step():
    states = [getattr(optim, name) for name in dir(optim) if name.endswith("State")]
    assert states
    assert [state.__name__ for state in states if "count" in getattr(state, "_fields", ())] == []


def test_clipping_is_by_max_norm_or_threshold():
    clips = {fn: [n for n in parameters if "clip" in n] for fn, parameters in SIGNATURES.items()}
    assert {name for names in clips.values() for name in names} <= {"use_clipping", "trust_clip", "clip"}
    of_norms = {fn for fn, names in clips.items() if "clip" in names}  # (low, high) of the norm of parameters
    assert of_norms == {"optim.lamb", "optim.ralars", "optim.scale_by_trust_ratio", "holocron.lamb", "holocron.ralars"}


# --- the old names -------------------------------------------------------------------------------------------------

KEY = random.key(0)
OLD = {  # what was written, and what is written now
    "soap": (lambda: optim.soap(0.1, precondition_frequency=3, max_precond_dim=4), lambda: optim.soap(0.1, every=3, max_dim=4)),
    "galore": (lambda: optim.galore(0.1, rank=1, update_every=3), lambda: optim.galore(0.1, rank=1, every=3)),
    "sophia": (
        lambda: optim.sophia(0.1, key=KEY, clip_threshold=0.5, update_every=3),
        lambda: optim.sophia(0.1, key=KEY, threshold=0.5, every=3),
    ),
    "scale_by_sophia": (lambda: optim.scale_by_sophia(KEY, 0.9), lambda: optim.scale_by_sophia(0.9, key=KEY)),
    "hutchinson_estimator": (lambda: optim.hutchinson_estimator(KEY), lambda: optim.hutchinson_estimator(key=KEY)),
    "scale_by_kron": (lambda: optim.scale_by_kron(KEY, b1=0.5), lambda: optim.scale_by_kron(0.5, key=KEY)),
    "add_noise": (lambda: optim.add_noise(KEY, 0.1, gamma=0.5), lambda: optim.add_noise(0.1, 0.5, key=KEY)),
    "adopt": (lambda: optim.adopt(0.1, clip=False), lambda: optim.adopt(0.1, use_clipping=False)),
    "adafactor": (
        lambda: optim.adafactor(0.1, clip_threshold=0.5, b1=0.5),
        lambda: optim.adafactor(0.1, threshold=0.5, momentum=0.5),
    ),
    "came": (lambda: optim.came(0.1, clip_threshold=0.5), lambda: optim.came(0.1, threshold=0.5)),
    "adaptive_grad_clip": (lambda: optim.adaptive_grad_clip(clipping=0.1), lambda: optim.adaptive_grad_clip(0.1)),
    "muon": (lambda: optim.muon(0.1, b1=0.5, b2=0.6, eps=1e-3), lambda: optim.muon(0.1, adam_b1=0.5, adam_b2=0.6, adam_eps=1e-3)),
    "normuon": (lambda: optim.normuon(0.1, b1=0.5), lambda: optim.normuon(0.1, adam_b1=0.5)),
    "adadelta": (lambda: optim.adadelta(0.1, decay=0.5), lambda: optim.adadelta(0.1, rho=0.5)),
    "adagrad": (lambda: optim.adagrad(0.1, initial=0.5), lambda: optim.adagrad(0.1, initial_accumulator_value=0.5)),
    "scale_by_rms": (lambda: optim.scale_by_rms(initial=0.5), lambda: optim.scale_by_rms(initial_scale=0.5)),
    "scale_by_yogi": (
        lambda: optim.scale_by_yogi(initial=0.5), lambda: optim.scale_by_yogi(initial_accumulator_value=0.5),
    ),
    "rprop": (lambda: optim.rprop(0.1, max_step=0.11), lambda: optim.rprop(0.1, max_step_size=0.11)),
    "schedule_free_sgd": (
        lambda: optim.schedule_free_sgd(0.1, weight_power=0.0), lambda: optim.schedule_free_sgd(0.1, weight_lr_power=0.0),
    ),
    "lamb": (lambda: optim.lamb(0.1, bias_correction=False), lambda: optim.lamb(0.1, bias_corrected=False)),
    "lars": (
        lambda: optim.lars(0.1, zero_rule="denominator"),
        lambda: optim.holocron.lars(
            0.1, momentum=0.9, trust_coefficient=1e-3, ratio_in_buffer=True, zero_rule="denominator"
        ),
    ),
    "adamp": (
        lambda: optim.adamp(0.1, views=("layer",), min_ndim=0),
        lambda: optim.holocron.adamp(0.1, views=("layer",), min_ndim=0, absolute=True, decoupled=True),
    ),
    "adan": (lambda: optim.adan(0.1, prev="zero"), lambda: optim.holocron.adan(0.1, l2_too=False)),
    "scout": (lambda: optim.scout(optim.sgd(0.1), compat=True), lambda: optim.holocron.scout(optim.sgd(0.1))),
}  # fmt: skip


@pytest.mark.parametrize("name", OLD)
def test_old_names_warn_and_do_the_same(name):
    old, new = OLD[name]
    with pytest.warns(DeprecationWarning, match=rf"^{name}: .* goes with the next version$") as caught:
        before = old()
    assert {warning.filename for warning in caught} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = new()
    params = {"w": torch.linspace(-1, 2, 12, dtype=torch.float64).view(4, 3), "b": torch.ones(3, dtype=torch.float64)}
    states = [tx.init(params) for tx in (before, after)]
    grad_fn = torch.func.grad(lambda p: sum(x.cos().sum() for x in p.values()))
    for _ in range(4):
        out = []
        for i, tx in enumerate((before, after)):
            updates, states[i] = tx.update(grad_fn(params), states[i], params, grad_fn=grad_fn)
            out.append(updates)
        assert all(torch.equal(out[0][n], out[1][n]) for n in params)
        params = optim.apply_updates(params, out[0])


def test_old_and_new_name_together():
    with pytest.raises(TypeError, match=r"^lamb: bias_correction= is the old name of bias_corrected=, got both$"):
        optim.lamb(0.1, bias_correction=True, bias_corrected=True)


def test_old_names_of_what_is_no_transformation():
    new, old = {"w": torch.ones(1)}, {"w": torch.zeros(1)}
    with pytest.warns(DeprecationWarning, match=r"^periodic_update: count= is called step= now"):
        assert optim.periodic_update(new, old, count=4, every=2) == new
    with pytest.warns(DeprecationWarning, match=r"^reduce_on_plateau: window= is called every= now"):
        optim.reduce_on_plateau(window=3)


def test_every_old_name_is_tried():
    decorated = r"@(?:renamed|moved_to_holocron)\([^\n]*\)\n(?:@[^\n]*\n)*def (\w+)"
    files = Path(optim.__file__).parent.glob("[!dh]*.py")
    found = {name for file in files for name in re.findall(decorated, file.read_text())}
    kin = {
        "scale_by_galore",
        "scale_by_soap",
        "scale_by_adopt",
        "scale_by_factored_rms",
        "scale_by_came",
        "scale_by_rprop",
    }
    kin |= {"scale_by_adadelta", "scale_by_rss", "schedule_free", "schedule_free_adamw", "periodic_update"}
    assert found - kin - {"reduce_on_plateau"} == set(OLD)
