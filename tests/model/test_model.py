"""Models as pure functions: laws over a table of lifted modules, and what lift promises."""

import functools

import pytest
import torch
from torch import nn

from holofunc import from_module, jit, lift, models, random


class Noisy(nn.Module):
    """Every stock layer that draws, and a constant that is in no state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Sequential(nn.Dropout(0.5), nn.Dropout2d(0.5))
        self.register_buffer("grid", torch.arange(8.0).view(1, 8, 1, 1), persistent=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.conv(x)) + self.grid).mean((2, 3)))


MODELS = {
    "linear": lambda: lift(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5))),
    "noisy": lambda: lift(Noisy),
    "resnet18": lambda: models.resnet18(num_classes=5),
    "resnet50d": lambda: models.resnet50d(num_classes=5, num_blocks=[1, 1, 1, 1]),
}


@functools.cache
def made(name):
    model = MODELS[name]()
    return model, *model.init(random.key(0))


def images(n=2, dtype=torch.float32):
    return random.normal(random.key(9), (n, 3, 8, 8), dtype=torch.float64).to(dtype)


def double(tree):
    return {n: x.double() if x.is_floating_point() else x for n, x in tree.items()}


def same(a, b):
    return list(a) == list(b) and all(torch.equal(x, b[n]) for n, x in a.items())


@pytest.mark.parametrize("name", MODELS)
def test_init_is_a_function_of_the_key_and_leaves_the_global_generator_alone(name):
    model, params, buffers = made(name)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    again = model.init(random.key(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(params, again[0])
    assert same(buffers, again[1])
    assert not same(params, model.init(random.key(1))[0])


@pytest.mark.parametrize("name", MODELS)
def test_apply_changes_nothing_and_repeats_itself(name):
    model, params, buffers = made(name)
    x, key = images(), random.key(5)
    before = [t.clone() for t in (*params.values(), *buffers.values(), x)]
    for train in (False, True):
        first, second = (model.apply(params, buffers, x, train=train, key=key) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert same(first[1], second[1])
    assert all(torch.equal(a, b) for a, b in zip(before, (*params.values(), *buffers.values(), x), strict=True))
    assert model.apply(params, buffers, x)[1] is buffers


@pytest.mark.parametrize("name", MODELS)
def test_compiled_equals_eager(name):
    model, params, buffers = made(name)
    params, buffers, x = double(params), double(buffers), images(dtype=torch.float64)

    def run(params, buffers, x, key):
        return model.apply(params, buffers, x, train=True, key=key)

    expected, stats = run(params, buffers, x, random.key(1))
    out, new = torch.compile(run, fullgraph=True, backend="aot_eager")(params, buffers, x, random.key(1))
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(new, stats, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_per_sample_gradients_equal_a_loop(name):
    model, params, buffers = made(name)
    params, buffers, x = double(params), double(buffers), images(3, torch.float64)

    def loss(params, x):
        return model.apply(params, buffers, x[None])[0].square().sum()

    grads = torch.vmap(torch.func.grad(loss), (None, 0))(params, x)
    for i in range(3):
        for n, g in torch.func.grad(loss)(params, x[i]).items():
            torch.testing.assert_close(grads[n][i], g, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_a_stack_of_models_equals_each_alone(name):
    model, _, _ = made(name)
    both = [model.init(random.key(seed)) for seed in (1, 2)]
    params = {n: torch.stack([p[n] for p, _ in both]) for n in both[0][0]}
    buffers = {n: torch.stack([b[n] for _, b in both]) for n in both[0][1]}
    out = torch.vmap(lambda p, b: model.apply(p, b, images())[0])(params, buffers)
    for i, (p, b) in enumerate(both):
        torch.testing.assert_close(out[i], model.apply(p, b, images())[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_the_round_trip_through_a_module_keeps_the_function(name):
    model, params, buffers = made(name)
    module = model.to_module(params, buffers)
    assert not module.training
    assert set(module.state_dict()) == {*params, *buffers}
    with torch.no_grad():
        torch.testing.assert_close(module(images()), model.apply(params, buffers, images())[0], rtol=0, atol=0)
        next(module.parameters()).zero_()
    assert bool(next(iter(params.values())).any())
    again, p, b = from_module(module)
    assert list(p) == list(params)
    assert list(b) == list(buffers)
    torch.testing.assert_close(again.apply(p, b, images())[0], module(images()), rtol=0, atol=0)


def test_init_says_what_to_do_where_its_key_has_no_value():
    model = lift(nn.Linear, 2, 2)
    with pytest.raises(
        ValueError, match=r"^key must have a value, as Linear's constructor .*: tree\.stack\(\[model\.init"
    ):
        torch.vmap(model.init)(random.split(random.key(0)))
    with pytest.raises(ValueError, match=r"^key must have a value"):
        jit(model.init)(random.key(0))


def test_a_model_has_no_storage_until_init():
    model = models.resnet18()
    assert all(t.is_meta for t in (*model.skeleton.parameters(), *model.skeleton.buffers()))
    params, buffers = model.init(random.key(0), device="meta")
    assert all(t.is_meta for t in (*params.values(), *buffers.values()))
    assert model.init(random.key(0), dtype=torch.bfloat16)[0]["head.weight"].dtype == torch.bfloat16


def test_kaiming_scales_are_those_of_the_paper():
    params, _ = models.resnet18().init(random.key(0))
    weight = params["features.7.1.conv.0.weight"]  # 512 -> 512, 3x3
    assert float(weight.std()) == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01)
    assert float(weight.mean()) == pytest.approx(0.0, abs=1e-4)
    assert float(params["head.weight"].abs().max()) <= 512**-0.5
    assert bool((params["features.1.weight"] == 1).all())


def test_zero_init_residual_starts_blocks_as_the_identity():
    params, _ = models.resnet18(zero_init_residual=True).init(random.key(0))
    zeros = [n for n, p in params.items() if not p.any() and n.endswith("weight")]
    assert len(zeros) == 8
    assert all(n.endswith("conv.4.weight") for n in zeros)


def test_dropout_follows_its_key_and_its_rate():
    model = lift(nn.Sequential, nn.Dropout(0.25))
    x = torch.ones(100, 1000)
    outs = [model.apply({}, {}, x, train=True, key=random.key(s))[0] for s in (0, 0, 1)]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert float((outs[0] == 0).float().mean()) == pytest.approx(0.25, abs=0.005)
    assert outs[0].unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(model.apply({}, {}, x)[0], x)


def test_two_dropouts_draw_differently_and_samples_can_have_their_own_keys():
    model = lift(nn.Sequential, nn.Dropout(0.5))
    keys = random.split(random.key(0), 3)
    out = torch.vmap(lambda x, key: model.apply({}, {}, x, train=True, key=key)[0])(torch.ones(3, 64), keys)
    assert len({tuple(row.tolist()) for row in out}) == 3


def test_torchvision_models_are_lifted_with_keyed_stochastic_depth():
    torchvision = pytest.importorskip("torchvision")
    model = lift(torchvision.models.convnext_tiny, num_classes=4, stochastic_depth_prob=0.5)
    params, buffers = model.init(random.key(0))
    x = random.normal(random.key(1), (2, 3, 32, 32))
    a, b = (model.apply(params, buffers, x, train=True, key=random.key(s))[0] for s in (0, 0))
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match="key must be given, got None"):
        model.apply(params, buffers, x, train=True)


def test_lift_starts_as_the_constructor_does():
    def build():
        module = nn.Linear(4, 4)
        nn.init.constant_(module.weight, 0.5)
        return module

    assert bool((lift(build).init(random.key(3))[0]["weight"] == 0.5).all())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, p, b: m.apply({n: v for n, v in p.items() if n != "head.bias"}, b, images()), ValueError, r"missing \['head.bias'\]"),
        (lambda m, p, b: m.apply({**p, "extra": p["head.bias"]}, b, images()), ValueError, r"params .* unexpected \['extra'\]"),
        (lambda m, p, b: m.apply({**p, "head.bias": torch.zeros(3)}, b, images()), ValueError, r"head.bias has shape \(3,\), expected \(5,\)"),
        (lambda m, p, b: m.apply(p, {}, images()), ValueError, r"buffers does not fit resnet18: missing"),
        (lambda m, p, b: m.apply(list(p.values()), b, images()), TypeError, r"params must be a dict of tensors by name, got list"),
        (lambda m, p, b: m.apply(p, b, images()[0]), ValueError, r"images must have shape \(N, 3, H, W\), got \(3, 8, 8\)"),
        (lambda m, p, b: m.apply(p, b, images()[:, :1]), ValueError, r"images must have shape \(N, 3, H, W\), got \(2, 1, 8, 8\)"),
        (lambda m, p, b: m.apply(p, b, images()[:0]), ValueError, r"images must hold at least one image"),
        (lambda m, p, b: m.apply(p, b, images().byte()), TypeError, r"images must be floating .* got torch.uint8"),
        (lambda m, p, b: m.apply(p, b, images().double()), TypeError, r"dtype of the parameters, torch.float32, got torch.float64"),
        (lambda m, p, b: models.resnet18(num_classes=0), ValueError, r"num_classes must be .* got 0"),
        (lambda m, p, b: models.resnet18(colour=1), TypeError, r"colour"),
        (lambda m, p, b: lift(nn.Linear(2, 2)), TypeError, r"build must be a constructor .* use from_module"),
        (lambda m, p, b: from_module("resnet"), TypeError, r"module must be a torch.nn.Module, got str"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(*made("resnet18"))


def test_modules_passed_to_lift_are_copied():
    linear = nn.Linear(3, 2)
    params, _ = lift(nn.Sequential, linear).init(random.key(0))
    assert not linear.weight.is_meta
    assert torch.equal(params["0.weight"], linear.weight)
