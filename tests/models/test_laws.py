"""Laws that every model keeps: all constructors where it costs nothing, one small model per kind of block elsewhere."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from holofunc import models, random

ALL = models.list_models(task="classification")

DARK = {"layout": ((16, 1), (32, 1), (64, 2))}
TWO = {"num_blocks": [1, 2], "planes": [64, 128]}
PYRAMIDS = [{"groups": [1, 4, 8]}, {"groups": [1, 4]}]
SMALL = {
    "resnet18": TWO,
    "resnet50d": TWO,
    "resnext50_32x4d": TWO,
    "res2net50_26w_4s": TWO,
    "tridentnet50": TWO,
    "pyconv_resnet50": TWO | {"stage_options": PYRAMIDS},
    "pyconvhg_resnet50": TWO | {"stage_options": PYRAMIDS},
    "sknet50": TWO,
    "rexnet1_0x": {"depth_mult": 0.2},
    "convnext_atto": {"num_blocks": [1, 2], "planes": [40, 80], "layer_scale": 0.1, "drop_path": 0.2},
    "darknet24": {"layout": ((16,), (16, 32, 16, 32))},
    "darknet19": {"layout": ((16, 0), (32, 1))},
    "darknet53": DARK,
    "cspdarknet53": DARK,
    "cspdarknet53_mish": {"layout": ((16, 1), (32, 1))},
    "repvgg_a0": {"num_blocks": [1, 1, 1, 2, 1], "final_width_mult": 0.5},
    "mobileone_s0": {"num_blocks": [1, 1, 1, 1], "overparam": 2},
    "repvit_m0_9": {"num_blocks": [2, 3], "planes": [48, 96]},
}
IN_ONE_GRAPH = [  # one of each kind of forward pass
    *("resnet18", "res2net50_26w_4s", "tridentnet50", "pyconv_resnet50", "sknet50", "rexnet1_0x", "convnext_atto"),
    *("darknet19", "cspdarknet53_mish", "mobileone_s0", "repvit_m0_9"),
]


def small(name, **options):
    return models.create(name, **SMALL[name], **options)


def start(name, dtype=torch.float64):
    """A model, values that no layer treats as the identity, and images."""
    model = small(name)
    params, buffers = model.init(random.key(0), dtype=dtype)
    key = random.key(1)
    params = {
        n: p + random.uniform(key, p.shape, high=0.3, dtype=dtype) if p.ndim == 1 else p for n, p in params.items()
    }
    buffers = {n: b + 0.2 if b.is_floating_point() else b for n, b in buffers.items()}
    return model, params, buffers, random.normal(random.key(2), (3, 3, 48, 48), dtype=dtype)


def loss_of(model, buffers, x, **options):
    return lambda params: model.apply(params, buffers, x, **options)[0].square().mean()


class NothingReal(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert not isinstance(out, torch.Tensor) or out.is_meta or out.numel() < 1000, f"{func} allocates {out.shape}"
        return out


@pytest.mark.parametrize("name", ALL)
def test_building_allocates_nothing_and_any_size_goes_in(name):
    with NothingReal():
        model = models.create(name, in_channels=1, num_classes=3)
    for height, width in ((64, 64), (83, 93)):
        assert model.output_shape(torch.empty(2, 1, height, width, device="meta")) == (2, 3)


@pytest.mark.parametrize("name", SMALL)
def test_a_start_is_a_function_of_the_key(name):
    first, again, other = (small(name).init(random.key(seed)) for seed in (0, 0, 1))
    torch.manual_seed(3)  # the global generator has no part in it
    assert all(torch.equal(first[0][n], again[0][n]) for n in first[0])
    drawn = [n for n, p in first[0].items() if p.ndim > 1]
    assert not any(torch.equal(first[0][n], other[0][n]) for n in drawn)


@pytest.mark.parametrize("name", SMALL)
def test_a_start_is_distributed_as_documented(name):
    model = small(name)
    params, buffers = model.init(random.key(0))
    for path, module in model.skeleton.named_modules():
        if isinstance(module, nn.Conv2d):
            weight = params[f"{path}.weight"]
            fan_out = weight.shape[0] * math.prod(weight.shape[2:])
            error = 6 / math.sqrt(2 * weight.numel())
            assert weight.std(unbiased=False) * math.sqrt(fan_out / 2) == pytest.approx(1, abs=error), path
            assert module.bias is None or not params[f"{path}.bias"].any()
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            assert 0.9 * bound < params[f"{path}.weight"].abs().max() <= bound
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)):
            assert (params[f"{path}.weight"] == 1).all()
            assert not params[f"{path}.bias"].any()
    assert all(b.eq(1 if n.endswith("var") else 0).all() for n, b in buffers.items())


@pytest.mark.parametrize("name", SMALL)
def test_one_image_gives_what_it_gives_among_many(name):
    model, params, buffers, x = start(name)
    together, _ = model.apply(params, buffers, x)
    alone = torch.cat([model.apply(params, buffers, image[None])[0] for image in x])
    torch.testing.assert_close(alone, together)


@pytest.mark.parametrize("name", SMALL)
def test_per_sample_gradients_and_tangents_reach_every_parameter(name):
    model, params, buffers, x = start(name)

    def loss(params, image):
        return loss_of(model, buffers, image[None])(params)

    by_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
    first = torch.func.grad(loss)(params, x[0])
    for n in params:
        torch.testing.assert_close(
            by_sample[n][0], first[n], rtol=1e-7, atol=1e-9 * float(first[n].abs().max()) + 1e-14
        )
        assert by_sample[n].any(), n
    tangent = {n: random.normal(random.key(3), p.shape, dtype=p.dtype) for n, p in params.items()}
    _, slope = torch.func.jvp(lambda p: loss(p, x[0]), (params,), (tangent,))
    torch.testing.assert_close(slope, sum((first[n] * tangent[n]).sum() for n in params), rtol=1e-7, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_at_full_size(name):
    model = models.create(name, in_channels=1, num_classes=3)
    params, buffers = model.init(random.key(0))
    again, _ = model.init(random.key(0))
    assert all(torch.equal(params[n], again[n]) for n in params)
    x = random.normal(random.key(1), (2, 1, 64, 64))
    together, _ = model.apply(params, buffers, x)
    scale = float(together.abs().max())
    last = x.contiguous(memory_format=torch.channels_last)
    for same in (
        torch.cat([model.apply(params, buffers, image[None])[0] for image in x]),
        model.apply(params, buffers, last)[0],
    ):
        torch.testing.assert_close(same, together, rtol=0, atol=1e-4 * scale)
    half = (
        {n: v.bfloat16() if v.is_floating_point() else v for n, v in values.items()} for values in (params, buffers)
    )
    out, _ = model.apply(*half, x.bfloat16())
    assert (out - together).norm() < 0.1 * together.norm()
    by_sample = torch.func.vmap(
        torch.func.grad(lambda params, image: loss_of(model, buffers, image[None])(params)), (None, 0)
    )(params, x)
    assert [n for n, g in by_sample.items() if not g.any()] == []


@pytest.mark.parametrize("name", IN_ONE_GRAPH)
def test_a_training_gradient_is_one_graph(name):
    check_training_gradient(*start(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_tangents_and_one_graph_at_full_size(name):
    model = models.create(name, num_classes=3)
    params, buffers = model.init(random.key(0), dtype=torch.float64)
    x = random.normal(random.key(1), (2, 3, 64, 64), dtype=torch.float64)
    tangent = {n: random.normal(random.fold_in(random.key(2), i), p.shape, dtype=p.dtype) * p.abs().mean()
               for i, (n, p) in enumerate(params.items())}  # fmt: skip
    loss = loss_of(model, buffers, x)
    _, slope = torch.func.jvp(loss, (params,), (tangent,))
    gradient = torch.func.grad(loss)(params)
    torch.testing.assert_close(slope, sum((gradient[n] * tangent[n]).sum() for n in params), rtol=1e-7, atol=1e-12)
    del tangent, gradient
    check_training_gradient(model, params, buffers, x)


def check_training_gradient(model, params, buffers, x):
    """In one graph, equal to eager code's, and the buffers passed in stay what they were."""
    torch.compiler.reset()

    def gradient(params, buffers, x, key):
        def loss(params):
            out, new = model.apply(params, buffers, x, train=True, key=key)
            return out.square().mean(), new

        return torch.func.grad(loss, has_aux=True)(params)

    before = {n: b.clone() for n, b in buffers.items()}
    expected = gradient(params, buffers, x, random.key(4))
    compiled = torch.compile(gradient, fullgraph=True, backend="eager")(params, buffers, x, random.key(4))
    for actual, wanted in zip(compiled, expected, strict=True):
        for n in wanted:
            torch.testing.assert_close(actual[n], wanted[n], rtol=1e-8, atol=1e-12)
    assert all(torch.equal(buffers[n], before[n]) for n in buffers)


@pytest.mark.parametrize("name", SMALL)
def test_memory_format_and_precision_are_the_callers(name):
    model, params, buffers, x = start(name)
    expected, _ = model.apply(params, buffers, x)
    last = torch.channels_last
    moved = {n: p.contiguous(memory_format=last) if p.ndim == 4 else p for n, p in params.items()}
    torch.testing.assert_close(model.apply(moved, buffers, x.contiguous(memory_format=last))[0], expected)
    half = {n: p.bfloat16() for n, p in params.items()}
    statistics = {n: b.bfloat16() if b.is_floating_point() else b for n, b in buffers.items()}
    out, _ = model.apply(half, statistics, x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert (out - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("name", SMALL)
def test_ordinary_modules_and_exported_programs_compute_the_same(name):
    model, params, buffers, x = start(name, torch.float32)
    expected, _ = model.apply(params, buffers, x)
    module = model.to_module(params, buffers)
    torch.testing.assert_close(module(x), expected)
    assert {n: v.shape for n, v in module.state_dict().items()} == {n: v.shape for n, v in (params | buffers).items()}
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.testing.assert_close(program.module()(x[:2]), expected[:2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "sknet50"])
def test_residual_blocks_can_start_without_their_branch(name):
    model = small(name, zero_init_residual=True)
    params, buffers = model.init(random.key(0))
    blocks = [path for path, m in model.skeleton.named_modules() if hasattr(m, "downsample") and hasattr(m, "conv")]
    zero = [n for n, p in params.items() if n.endswith("weight") and not p.any()]
    assert [n.partition(".conv.")[0] for n in zero] == blocks
    maps, _ = models.features(model, ["features.5.0", "features.5.1"]).apply(params, buffers, torch.ones(1, 3, 64, 64))
    assert torch.equal(maps["features.5.0"], maps["features.5.1"])


@pytest.mark.parametrize("name", ["rexnet1_0x", "convnext_atto", "cspdarknet53_mish"])
def test_models_that_draw_need_a_key_and_repeat_with_it(name):
    model, params, buffers, x = start(name)
    with pytest.raises(ValueError, match=r"draws random numbers in [\w.]+: key must be given"):
        model.apply(params, buffers, x, train=True)
    first, again, other = (model.apply(params, buffers, x, train=True, key=random.key(k))[0] for k in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 1, 32, 32), ValueError, r"images must have shape \(N, 3, H, W\), got \(2, 1, 32, 32\)"),
        (torch.zeros(3, 32, 32), ValueError, r"images must have shape \(N, 3, H, W\), got \(3, 32, 32\)"),
        (torch.zeros(0, 3, 32, 32), ValueError, "images must hold at least one image"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), TypeError, "images must be floating.*got torch.uint8"),
        ([1], TypeError, "images must be a tensor of shape .* got list"),
    ],
)
def test_images_that_are_none(images, error, message):
    model = small("resnet18")
    with pytest.raises(error, match=message):
        model.apply(*model.init(random.key(0)), images)
