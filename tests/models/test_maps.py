"""Features: the maps a model computes anyway, by name or stage, known before they are computed."""

import pytest
import torch
import torchvision

from holofunc import jit, lift, models, random

FAMILIES = {
    "resnet50": {0: (2, 64), 1: (4, 256), 2: (8, 512), 3: (16, 1024), 4: (32, 2048)},
    "pyconv_resnet50": {0: (2, 64), 1: (4, 256), 2: (8, 512), 3: (16, 1024), 4: (32, 2048)},
    "tridentnet50": {0: (2, 64), 1: (4, 768), 2: (8, 1536), 3: (16, 3072), 4: (32, 6144)},
    "rexnet1_0x": {0: (2, 16), 1: (4, 38), 2: (8, 61), 3: (16, 128), 4: (32, 1280)},
    "convnext_atto": {0: (4, 40), 1: (8, 80), 2: (16, 160), 3: (32, 320)},
    "darknet24": {0: (2, 64), 1: (4, 192), 2: (8, 512), 3: (16, 1024), 4: (32, 1024)},
    "cspdarknet53": {0: (2, 64), 1: (4, 128), 2: (8, 256), 3: (16, 512), 4: (32, 1024)},
    "repvgg_a0": {0: (2, 48), 1: (4, 48), 2: (8, 96), 3: (16, 192), 4: (32, 1280)},
    "mobileone_s1": {0: (2, 64), 1: (4, 96), 2: (8, 192), 3: (16, 512), 4: (32, 1280)},
    "repvit_m0_9": {0: (2, 24), 1: (4, 48), 2: (8, 96), 3: (16, 192), 4: (32, 384)},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_have_the_strides_and_channels_announced(name):
    model = models.create(name)
    pyramid = models.features(model)
    assert {i: (pyramid.strides[i], pyramid.channels[i]) for i in pyramid.strides} == FAMILIES[name]
    params, buffers = model.init(random.key(0))
    maps, same = pyramid.apply(params, buffers, torch.zeros(1, 3, 64, 96))
    assert same is buffers
    assert {i: tuple(m.shape) for i, m in maps.items()} == {
        i: (1, channels, 64 // stride, 96 // stride) for i, (stride, channels) in FAMILIES[name].items()
    }


def test_maps_are_those_the_model_computes():
    model = models.resnet18()
    params, buffers = model.init(random.key(0))
    x = random.normal(random.key(1), (2, 3, 64, 64))
    out, new = model.apply(params, buffers, x, train=True)
    tapped = models.features(model, ["features.7", "features.4", "features.4.0"])
    maps, renewed = tapped.apply(params, buffers, x, train=True)
    assert list(maps) == ["features.7", "features.4", "features.4.0"]
    assert torch.equal(maps["features.7"].mean((2, 3)) @ params["head.weight"].T + params["head.bias"], out)
    assert all(torch.equal(new[n], renewed[n]) for n in new)
    assert not torch.equal(maps["features.4"], maps["features.4.0"])


def test_scores_of_classes_are_no_stage():
    """Darknet-19 classifies every place, and averages then."""
    assert models.features(models.darknet19(num_classes=7), [-1]).channels == {-1: 1024}
    assert models.features(models.darknet19(num_classes=7), ["classifier"]).channels == {"classifier": 7}


def test_maps_are_found_in_inference_mode_too():
    with torch.inference_mode():
        assert models.features(models.resnet18(), [1]).channels == {1: 64}


def test_what_comes_after_the_last_map_is_not_run():
    model = models.resnet18()
    params, buffers = model.init(random.key(0))
    early = models.features(model, ["features.4"])
    params = {n: torch.full_like(p, torch.nan) if n >= "features.5" else p for n, p in params.items()}
    _, new = early.apply(params, buffers, torch.zeros(2, 3, 32, 32), train=True)
    moved = {n for n in new if not torch.equal(new[n], buffers[n])}
    assert moved
    assert all(n < "features.5" for n in moved)


def test_a_start_is_the_models_own():
    model = models.resnet18()
    params, _ = models.features(model, [1]).init(random.key(5))
    assert all(torch.equal(p, q) for p, q in zip(params.values(), model.init(random.key(5))[0].values(), strict=True))


def test_compiled_and_differentiated():
    model = models.features(models.resnet18(), [-1])
    params, buffers = model.init(random.key(0))

    def gradient(params, x):
        return torch.func.grad(lambda p: model.apply(p, buffers, x)[0][-1].square().mean())(params)

    x = random.normal(random.key(1), (1, 3, 32, 32))
    compiled = torch.compile(gradient, backend="eager", fullgraph=True)(params, x)
    expected = gradient(params, x)
    torch.testing.assert_close(compiled, expected)
    assert not expected["head.weight"].any()
    assert jit(lambda p: model.apply(p, buffers, x)[0][-1].shape)  # a model like any other


def test_lifted_models_are_followed():
    model = lift(torchvision.models.resnet18)
    pyramid = models.features(model, [1, -1, "layer2.0"])
    assert pyramid.strides == {1: 4, -1: 32, "layer2.0": 8}
    params, buffers = model.init(random.key(0))
    maps, _ = pyramid.apply(params, buffers, torch.zeros(1, 3, 64, 64))
    assert maps["layer2.0"].shape == (1, 128, 8, 8)


class OutOfOrder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = torch.nn.Conv2d(4, 5, 1), torch.nn.Conv2d(3, 4, 3, 2)
        self.in_channels = 3

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize(
    ("model", "name"), [(models.resnet18(), "layer1"), (models.resnet18(), 5), (models.resnet18(), "features.4.0.conv")]
)
def test_names_that_are_not_on_the_way_are_refused(model, name):
    with pytest.raises(ValueError, match=f"resnet18 has no feature map {name!r}; its 5 stages end with 'features.2"):
        models.features(model, [name])


def test_a_module_that_runs_its_parts_in_another_order_is_refused():
    with pytest.raises(ValueError, match="OutOfOrder has no feature map 'second'"):
        models.features(lift(OutOfOrder), ["second"])
