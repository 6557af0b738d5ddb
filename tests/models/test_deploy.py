"""Reparametrized models: the same function of fewer parameters, under Holocron's deployed names."""

import warnings

import pytest
import torch
import torchvision
from torch import nn

from holofunc import lift, models, random

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import holocron.models.classification as holocron

BRANCHED = ["repvgg_a0", "mobileone_s0", "repvit_m0_9"]
PLAIN = ["resnet18", "rexnet1_0x", "darknet19", "sknet50", "res2net50_26w_4s"]


def lived(model, dtype, spread, momentum):
    """Scales and biases spread out from where they start, and the statistics of a batch under them."""
    params, buffers = model.init(random.key(0), dtype=dtype)
    keys = random.split(random.key(1), len(params))
    params = {
        n: p + random.uniform(k, p.shape, high=spread, dtype=dtype) if p.ndim == 1 else p
        for k, (n, p) in zip(keys, params.items(), strict=True)
    }
    images = random.normal(random.key(2), (4, 3, 64, 64), dtype=dtype)
    _, new = model.apply(params, buffers, images, train=True, key=random.key(3))
    moved = momentum / 0.1
    return params, {n: torch.lerp(b, new[n], moved) if b.is_floating_point() else new[n] for n, b in buffers.items()}


@pytest.mark.parametrize(
    ("name", "dtype", "rtol", "spread", "momentum"),
    [(n, torch.float64, 1e-12, 0.5, 1.0) for n in BRANCHED + PLAIN]
    + [(n, torch.float32, 1e-5, 0.1, 0.1) for n in BRANCHED],
)
def test_output_is_the_same_of_fewer_parameters(name, dtype, rtol, spread, momentum):
    model = models.create(name)
    params, buffers = lived(model, dtype, spread, momentum)
    x = random.normal(random.key(2), (2, 3, 64, 64), dtype=dtype)
    merged, new_params, new_buffers = models.reparametrize(model, params, buffers)
    expected, _ = model.apply(params, buffers, x)
    actual, _ = merged.apply(new_params, new_buffers, x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=rtol * float(expected.abs().max()))
    assert sum(map(torch.numel, new_params.values())) < sum(map(torch.numel, params.values()))
    assert not any(n.endswith("running_var") for n in new_buffers)
    assert models.reparametrize(merged, new_params, new_buffers)[0] is merged


@pytest.mark.parametrize("name", BRANCHED)
def test_names_are_holocrons(name):
    theirs = getattr(holocron, name)(pretrained=False).eval()
    theirs.reparametrize()
    model = models.create(name)
    merged, params, _ = models.reparametrize(model, *model.init(random.key(0)))
    expected = {n: v.shape for n, v in theirs.state_dict().items()}
    assert {n: v.shape for n, v in params.items()} == expected
    assert {n: v.shape for n, v in merged.skeleton.state_dict().items()} == expected


REPVGG = {"a0": 8.30, "a1": 12.78, "a2": 25.49, "b0": 14.33, "b1": 51.82, "b2": 80.31, "b3": 110.96}
MOBILEONE = {"s0": 2.08, "s1": 4.76, "s2": 7.8, "s3": 10.1}
IN_PAPERS = [(f"repvgg_{n}", m) for n, m in REPVGG.items()] + [(f"mobileone_{n}", m) for n, m in MOBILEONE.items()]


@pytest.mark.parametrize(("name", "millions"), IN_PAPERS)
def test_the_papers_counts_of_deployed_parameters(name, millions):
    model = models.create(name, num_classes=1000, paper=True)
    merged = models.reparametrize(model, *model.init(random.key(0), device="meta"))[0]
    count = sum(p.numel() for p in merged.skeleton.parameters())
    assert count == pytest.approx(millions * 1e6, rel=0.004)


def test_lifted_models_merge_what_can_be_traced():
    model = lift(torchvision.models.resnet18, num_classes=5)
    params, buffers = lived(model, torch.float64, 0.5, 1.0)
    x = random.normal(random.key(2), (2, 3, 64, 64), dtype=torch.float64)
    merged, new_params, new_buffers = models.reparametrize(model, params, buffers)
    assert not new_buffers
    torch.testing.assert_close(
        merged.apply(new_params, {}, x)[0], model.apply(params, buffers, x)[0], rtol=1e-11, atol=1e-11
    )


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.conv(x)
        return self.norm(x) + x


def test_a_convolution_that_is_read_twice_stays():
    model = lift(ReadTwice)
    assert models.reparametrize(model, *model.init(random.key(0)))[0] is model


def test_a_start_of_the_merged_model_is_the_merged_start():
    model = models.repvit_m0_9(num_classes=3)
    params, buffers = model.init(random.key(3))
    merged, expected, _ = models.reparametrize(model, params, buffers)
    actual, _ = merged.init(random.key(3))
    assert all(torch.equal(actual[n], expected[n]) for n in expected)


def test_values_of_another_model_are_refused():
    params, buffers = models.repvgg_a0().init(random.key(0))
    with pytest.raises(ValueError, match=r"params does not fit repvgg_b0: missing \['features.1.3"):
        models.reparametrize(models.repvgg_b0(), params, buffers)


def test_maps_are_taken_after_merging():
    model = models.repvgg_a0()
    with pytest.raises(ValueError, match="reparametrize the model, then take its features"):
        models.reparametrize(models.features(model, [1]), *model.init(random.key(0), device="meta"))
    merged = models.reparametrize(model, *model.init(random.key(0), device="meta"))[0]
    assert models.features(merged).strides == models.features(model).strides
