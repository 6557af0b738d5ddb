"""U-Nets: equal to Holocron's by name and number, on any encoder, at any size; the laws of models; what they refuse."""

import json
import lzma
import warnings
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

from holofunc import lift, losses, models, random

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it scripts a class while it is imported
    import holocron.models.segmentation as holocron

FILE = Path(__file__).parents[1] / "data/holocron_unets_and_recognizers.json.xz"
NAMES = {n: v for n, v in json.loads(lzma.decompress(FILE.read_bytes())).items() if n.startswith("unet")}

SMALL = {
    "unet": {"layout": [4, 8, 16]},
    "unetp": {"layout": [4, 8, 16]},
    "unetpp": {"layout": [4, 8, 16]},
    "unet3p": {"layout": [4, 8, 16]},
    "unet2": {"layout": [4, 8]},
}
VARIANTS = {
    "unet": ("unet", {}),
    "unet, transposed": ("unet", {"bilinear_upsampling": False}),
    "unet, paper": ("unet", {"bilinear_upsampling": False, "same_padding": False}),
    "unet, cropped": ("unet", {"same_padding": False}),
    "unet, layers": ("unet", {"norm_layer": nn.BatchNorm2d, "drop_layer": nn.Dropout, "act_layer": nn.SiLU}),
    "unetp": ("unetp", {}),
    "unetpp": ("unetpp", {}),
    "unet3p": ("unet3p", {}),
}
CLASSES = {"unet": holocron.UNet, "unetp": holocron.UNetp, "unetpp": holocron.UNetpp, "unet3p": holocron.UNet3p}


def small(name, **options):
    return models.create(name, **{**SMALL[name], "num_classes": 3, **options})


def randomized(module):
    """Values that no layer treats as the identity."""
    generator = torch.Generator().manual_seed(0)
    for name, value in module.state_dict().items():
        if value.ndim == 1 and value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator, dtype=value.dtype) / 2 + ("bias" not in name) / 2)
    return module


def check_equal(model, theirs, x, error):
    """In eval mode, and in train mode with the statistics it leaves."""
    values = {n: v.clone() for n, v in randomized(theirs).state_dict().items()}
    params, buffers = models.surgery.load(model, values)
    for train in (False, True):
        out, new = model.apply(params, buffers, x, train=train, key=random.key(0))
        with torch.no_grad():
            expected = theirs.train(train)(x)
        torch.testing.assert_close(out, expected, rtol=0, atol=error * float(expected.abs().max()))
    for name, expected in theirs.named_buffers():
        torch.testing.assert_close(new[name], expected, rtol=1e-5, atol=error)


# --- Holocron ----------------------------------------------------------------------------------------------------


def test_all_of_holocrons_constructors_are_there():
    assert models.list_models(task="segmentation") == sorted(NAMES)
    (row,) = models.table("unet", task="segmentation")
    assert (row.params, row.input_size) == (18_107_082, 256)


@pytest.mark.parametrize("name", NAMES)
def test_names_order_and_shapes(name):
    skeleton = models.create(name, num_classes=10).skeleton
    assert [[n, list(v.shape)] for n, v in skeleton.state_dict().items()] == NAMES[name]


@pytest.mark.parametrize("name", [n if "rexnet" in n else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_outputs_and_statistics(name):
    backbone = {} if name in CLASSES or name == "unet2" else {"pretrained_backbone": False}
    theirs = getattr(holocron, name)(num_classes=4, **backbone)
    x = torch.randn(2, 3, 67, 93, generator=torch.Generator().manual_seed(1))
    check_equal(models.create(name, num_classes=4), theirs, x, 1e-5)


@pytest.mark.parametrize("size", [(64, 72), (67, 61), (46, 79)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_with_every_option_and_at_odd_sizes(variant, size):
    name, options = VARIANTS[variant]
    theirs = {n: f() if n == "act_layer" else f for n, f in options.items()} | {"layout": SMALL[name]["layout"]}
    if "drop_layer" in options:
        theirs["drop_layer"] = lambda inplace: nn.Dropout(0.0)
        options = options | {"drop_layer": lambda: nn.Dropout(0.0)}
    if not options.get("same_padding", True):
        size = [side + 64 for side in size]
    x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    check_equal(small(name, **options), CLASSES[name](num_classes=3, **theirs).double(), x, 1e-12)


@pytest.mark.parametrize(
    "options", [{}, {"same_padding": False}, {"final_upsampling": True}, {"norm_layer": nn.BatchNorm2d}]
)
def test_dynamic_decoders_with_every_option(options):
    from torchvision.models._utils import IntermediateLayerGetter

    def stages():
        layers = [
            nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(6, 9, 3, 2, 1), nn.ReLU()),
        ]
        return nn.Sequential(*layers, nn.Conv2d(9, 5, 1))

    getter = IntermediateLayerGetter(stages(), {"0": "0", "1": "1"})
    theirs = holocron.DynamicUNet(getter, num_classes=3, input_shape=(3, 64, 64), **options)
    model = models.dynamic_unet(lift(stages), num_classes=3, names=["0", "1"], **{"final_upsampling": False, **options})
    check_equal(model, theirs.double(), torch.randn(2, 3, 67, 61, dtype=torch.float64), 1e-12)


# --- heads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("unetp", 3), ("unetpp", 3), ("unet3p", 3)])
def test_deep_supervision_returns_all_heads_and_the_model_last(name, count):
    plain, deep = small(name), small(name, deep_supervision=True)
    params, buffers = deep.init(random.key(0))
    x = random.normal(random.key(1), (2, 3, 35, 42))
    heads, _ = deep.apply(params, buffers, x)
    assert [tuple(head.shape) for head in heads] == [(2, 3, 35, 42)] * count
    own = {n: p for n, p in params.items() if not n.startswith("auxiliary")}
    torch.testing.assert_close(heads[-1], plain.apply(own, buffers, x)[0], rtol=0, atol=0)
    for i in range(count):
        grads = torch.func.grad(lambda p, i=i: deep.apply(p, buffers, x)[0][i].square().sum())(params)
        head = f"auxiliary.{i}.weight" if i < count - 1 else "classifier.weight"
        assert {
            n for n, g in grads.items() if g.any() and n in (head, *(f"auxiliary.{j}.weight" for j in range(9)))
        } == {head}


def test_a_head_of_unetpp_can_be_cut_out():
    """Its first cells are a U-Net++ of fewer stages: what the paper calls pruning."""
    model = small("unetpp", deep_supervision=True)
    params, buffers = model.init(random.key(0))
    x = random.normal(random.key(1), (1, 3, 32, 32))
    heads, _ = model.apply(params, buffers, x)
    deepest = {
        n: torch.full_like(p, torch.nan) if n.startswith(("bridge", "decoder.0")) else p for n, p in params.items()
    }
    cut, _ = model.apply(deepest, buffers, x)
    assert torch.equal(cut[0], heads[0])
    assert torch.equal(cut[1], heads[1])
    assert cut[2].isnan().all()


def test_the_papers_unet3p_normalizes_every_map():
    model = small("unet3p", paper=True)
    names = [n for n, _ in model.skeleton.named_parameters() if n.startswith("decoder.1")]
    assert names[:3] == [
        "decoder.1.downsamples.0.1.weight",
        "decoder.1.downsamples.0.2.weight",
        "decoder.1.downsamples.0.2.bias",
    ]
    assert model.output_shape(torch.empty(2, 3, 33, 47, device="meta")) == (2, 3, 33, 47)


# --- encoders ----------------------------------------------------------------------------------------------------

ZOO = [*models.list_models(task="classification")]
OF_EACH_KIND = [
    "resnet18",
    "rexnet1_0x",
    "convnext_atto",
    "darknet24",
    "cspdarknet53",
    "repvgg_a0",
    "mobileone_s0",
    "repvit_m0_9",
]


@pytest.mark.parametrize(
    "name", [n if n in OF_EACH_KIND else pytest.param(n, marks=pytest.mark.slow) for n in ZOO if n != "smallnet"]
)
def test_every_model_of_the_zoo_is_an_encoder(name):
    encoder = models.create(name)
    model = models.dynamic_unet(encoder, num_classes=3)
    assert model.output_shape(torch.empty(2, 3, 83, 93, device="meta")) == (2, 3, 83, 93)
    own = {n.removeprefix("encoder.") for n in model.skeleton.state_dict() if n.startswith("encoder.")}
    assert own < set(encoder.skeleton.state_dict())


def test_the_encoder_starts_as_it_does_alone():
    encoder = models.rexnet1_0x(in_channels=1)
    model = models.dynamic_unet(encoder, num_classes=2, names=[0, 1, 2])
    alone, statistics = encoder.init(random.key(3))
    params, buffers = model.init(random.key(3))
    shared = [n for n in params if n.startswith("encoder.")]
    assert shared
    assert all(torch.equal(params[n], alone[n.removeprefix("encoder.")]) for n in shared)
    assert {n.removeprefix("encoder.") for n in buffers if n.startswith("encoder.")} < set(statistics)
    assert model.init(random.key(3), dtype=torch.float64)[0][shared[0]].dtype == torch.float64


@pytest.mark.parametrize(
    "encoder",
    [lambda: lift(torchvision.models.resnet18), lambda: lift(timm.create_model, "resnet18"),
     lambda: lift(timm.create_model, "convnext_atto"), lambda: lift(torchvision.models.mobilenet_v3_small)],
    ids=["torchvision resnet18", "timm resnet18", "timm convnext", "torchvision mobilenet"],
)  # fmt: skip
def test_models_of_others_are_encoders(encoder):
    model = models.dynamic_unet(encoder(), num_classes=3)
    params, buffers = model.init(random.key(0))
    out, new = model.apply(params, buffers, random.normal(random.key(1), (2, 3, 64, 64)), train=True, key=random.key(2))
    assert out.shape == (2, 3, 64, 64)
    assert list(new) == list(buffers)
    assert not [n for n in params if ".fc." in n or ".head." in n or ".classifier." in n]


@pytest.mark.parametrize("channels", [3, 1])
def test_torchvisions_weights_are_loaded_when_the_model_starts_and_not_before(channels, monkeypatch):
    weights = torchvision.models.ResNet34_Weights
    published = {
        n: torch.full(v.shape, 0.5) for n, v in lift(torchvision.models.resnet34).skeleton.state_dict().items()
    }
    calls = []
    monkeypatch.setattr(weights, "get_state_dict", lambda self, **_: calls.append(self) or published)
    model = models.unet_tvresnet34(num_classes=2, in_channels=channels, encoder_weights="DEFAULT")
    assert not calls
    params, _ = model.init(random.key(0))
    assert calls == [weights.DEFAULT]
    assert params["encoder.conv1.weight"].shape[1] == channels
    assert (params["encoder.conv1.weight"] == (0.5 if channels == 3 else 1.5)).all()  # a grey image counts three times
    assert (params["encoder.layer4.2.conv2.weight"] == 0.5).all()
    assert not (params["classifier.weight"] == 0.5).any()


def test_rexnets_weights_are_its_zoos(tmp_path):
    body, statistics = models.rexnet1_3x(num_classes=5).init(random.key(1))
    torch.save({**body, **statistics}, tmp_path / "rexnet.pth")
    params, _ = models.unet_rexnet13(num_classes=2, encoder_weights=tmp_path / "rexnet.pth").init(random.key(0))
    assert torch.equal(params["encoder.18.conv.0.weight"], body["features.18.conv.0.weight"])


def test_whole_files_are_loaded_with_or_without_their_head(tmp_path):
    params, buffers = small("unet").init(random.key(1))
    torch.save({**params, **buffers}, tmp_path / "unet.pth")
    loaded, _ = small("unet", weights=tmp_path / "unet.pth").init(random.key(0))
    assert all(torch.equal(loaded[n], params[n]) for n in params)
    other, _ = small("unet", num_classes=7, weights=tmp_path / "unet.pth", new_head=True).init(random.key(0))
    assert [n for n in params if not torch.equal(other[n], params[n])] == ["classifier.weight", "classifier.bias"]


# --- laws --------------------------------------------------------------------------------------------------------


def start(name, dtype=torch.float64, size=(24, 29), **options):
    model = small(name, **options)
    params, buffers = model.init(random.key(0), dtype=dtype)
    buffers = {n: b + 0.2 if b.is_floating_point() else b for n, b in buffers.items()}
    return model, params, buffers, random.normal(random.key(2), (3, 3, *size), dtype=dtype)


def loss_of(model, buffers, x, **options):
    return lambda params: model.apply(params, buffers, x, **options)[0].square().mean()


@pytest.mark.parametrize("name", models.list_models(task="segmentation"))
def test_building_allocates_nothing_and_any_size_goes_in(name):
    model = models.create(name, in_channels=1, num_classes=3)
    assert all(t.is_meta for t in model.skeleton.state_dict().values())
    for height, width in ((64, 64), (83, 93)):
        assert model.output_shape(torch.empty(2, 1, height, width, device="meta")) == (2, 3, height, width)


@pytest.mark.parametrize("name", SMALL)
def test_a_start_is_a_function_of_the_key(name):
    first, again, other = (small(name).init(random.key(seed))[0] for seed in (0, 0, 1))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n, p in first.items() if p.ndim > 1)


@pytest.mark.parametrize("name", SMALL)
def test_one_image_gives_what_it_gives_among_many(name):
    model, params, buffers, x = start(name)
    together, _ = model.apply(params, buffers, x)
    alone = torch.cat([model.apply(params, buffers, image[None])[0] for image in x])
    torch.testing.assert_close(alone, together)


@pytest.mark.parametrize("options", [{}, {"bilinear_upsampling": False}])
@pytest.mark.parametrize("name", SMALL)
def test_per_sample_gradients_and_tangents_reach_every_parameter(name, options):
    if options and name in ("unet3p", "unet2"):
        pytest.skip("has one way up")
    model, params, buffers, x = start(name, **options)

    def loss(params, image):
        return loss_of(model, buffers, image[None])(params)

    by_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
    first = torch.func.grad(loss)(params, x[0])
    for n in params:
        torch.testing.assert_close(by_sample[n][0], first[n], rtol=1e-7, atol=1e-10)
        assert by_sample[n].any(), n
    tangent = {n: random.normal(random.key(3), p.shape, dtype=p.dtype) for n, p in params.items()}
    _, slope = torch.func.jvp(lambda p: loss(p, x[0]), (params,), (tangent,))
    torch.testing.assert_close(slope, sum((first[n] * tangent[n]).sum() for n in params), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", SMALL)
def test_a_training_gradient_is_one_graph(name):
    torch.compiler.reset()
    model, params, buffers, x = start(name)

    def gradient(params, x):
        return torch.func.grad(loss_of(model, buffers, x, train=True))(params)

    expected = gradient(params, x)
    compiled = torch.compile(gradient, fullgraph=True, backend="eager")(params, x)
    torch.testing.assert_close(compiled, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", SMALL)
def test_a_gradient_on_meta(name):
    """Nothing is made on the CPU, and no value is read."""
    model = small(name)
    params, buffers = model.init(random.key(0), device="meta")
    x, masks = torch.empty(2, 3, 24, 29, device="meta"), torch.empty(2, 24, 29, dtype=torch.int64, device="meta")

    def loss(params):
        scores, new = model.apply(params, buffers, x, train=True)
        return losses.cross_entropy(scores, masks) + losses.dice(scores, masks), new

    gradient, new = torch.func.grad(loss, has_aux=True)(params)
    assert all(t.is_meta for t in (*gradient.values(), *new.values()))


@pytest.mark.parametrize("name", SMALL)
def test_ordinary_modules_and_exported_programs_compute_the_same(name):
    model, params, buffers, x = start(name, torch.float32)
    expected, _ = model.apply(params, buffers, x)
    module = model.to_module(params, buffers)
    torch.testing.assert_close(module(x), expected)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.testing.assert_close(program.module()(x[:2]), expected[:2], rtol=1e-4, atol=1e-4)


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "side"),
    [("unet", {}, 8), ("unet", {"same_padding": False}, 92), ("unetpp", {}, 8), ("unet3p", {}, 4), ("unet2", {}, 2)],
)
def test_images_smaller_than_the_encoder_needs(name, options, side):
    model = small(name, **options)
    params, buffers = model.init(random.key(0))
    out, _ = model.apply(params, buffers, torch.zeros(1, 3, side, side))
    assert min(out.shape[2:]) > 0
    with pytest.raises(
        ValueError, match=rf"images must be at least {side} pixels high and wide, got shape \(1, 3, {side - 1}, 96\)"
    ):
        model.apply(params, buffers, torch.zeros(1, 3, side - 1, 96))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: models.unet(layers=3), TypeError, "models.unet has no option 'layers'"),
        (lambda: models.unet3p(same_padding=False), TypeError, "models.unet3p has no option 'same_padding'"),
        (lambda: models.unet(num_classes=0), ValueError, "num_classes must be an integer of at least 1, got 0"),
        (lambda: models.unet2(depth=1), TypeError, "models.unet2 has no option 'depth'"),
        (lambda: models.unet(layout=[]), ValueError, r"layout must hold widths of at least 1, got \[\]"),
        (lambda: models.dynamic_unet(models.resnet18(), names=[-1]), ValueError, r"names must be of two maps or more.*\[32\]"),
        (lambda: models.dynamic_unet(models.resnet18(), names=[2, 1]), ValueError, r"the largest first, got maps of strides \[8, 4\]"),
        (lambda: models.dynamic_unet(models.resnet18(), names=["layer1", 1]), ValueError, "has no feature map 'layer1'"),
        (lambda: models.unet_tvresnet34(encoder_weights="BEST"), ValueError, "encoder_weights must be a member of ResNet34_Weights, IMAGENET1K_V1"),
        (lambda: models.unet_rexnet13(encoder_weights="BEST"), ValueError, "rexnet1_3x has no such checkpoint"),
    ],
)  # fmt: skip
def test_bad_arguments(build, error, message):
    with pytest.raises(error, match=message):
        build()
