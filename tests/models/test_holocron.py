"""Every constructor against Holocron: names, order, shapes, outputs, and the statistics a training pass leaves."""

import json
import lzma
import warnings
from pathlib import Path

import pytest
import torch

from holofunc import models

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it scripts a class while it is imported
    import holocron.models.classification as holocron

NAMES = json.loads(lzma.decompress((Path(__file__).parents[1] / "data/holocron_classification.json.xz").read_bytes()))

LAYOUT = {name: {"num_blocks": [3, 8, 86, 3]} for name in ("resnet152", "sknet152")}  # fixed here, asked for
NO_DROPOUT = {"cspdarknet53_mish": {"drop_block": 0.0}} | {n: {"dropout": 0.0} for n in NAMES if n.startswith("rexnet")}
ROUNDED_OTHERWISE = {"tridentnet50": 3}  # times the error in fp32: its thirds are summed in another order
OF_EACH_KIND = [
    *("resnet18", "resnet50d", "resnext50_32x4d", "res2net50_26w_4s", "tridentnet50", "pyconv_resnet50", "sknet50"),
    *("rexnet1_0x", "convnext_atto", "darknet24", "darknet19", "darknet53", "cspdarknet53", "cspdarknet53_mish"),
    *("repvgg_a0", "mobileone_s0", "mobileone_s1", "repvit_m0_9"),
]
COMPARED = [n if n in OF_EACH_KIND else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_names_order_and_shapes(name):
    skeleton = getattr(models, name)(num_classes=10, **LAYOUT.get(name, {})).skeleton
    assert [[n, list(v.shape)] for n, v in skeleton.state_dict().items()] == NAMES[name]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", COMPARED)
def test_outputs_and_statistics(name, dtype, error):
    theirs = getattr(holocron, name)(pretrained=False, num_classes=10).to(dtype)
    for module in theirs.modules():
        if type(module).__name__ in ("DropBlock2d", "Dropout"):
            module.p = 0.0
    values = randomized(theirs)
    theirs.load_state_dict(values)
    params, statistics = {n: values[n] for n, _ in theirs.named_parameters()}, dict(theirs.named_buffers())
    buffers = {n: values[n] for n in statistics}
    if name.startswith("pyconv"):
        halve_first_stage(theirs)
    model = getattr(models, name)(**LAYOUT.get(name, {}), **NO_DROPOUT.get(name, {}))
    error *= ROUNDED_OTHERWISE.get(name, 1)
    images = 2 if dtype == torch.float64 else 4  # few values per statistic multiply what rounding does
    x = torch.randn(images, 3, 64, 72, dtype=dtype, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out, same = model.apply(params, buffers, x)
        assert_close(out, theirs.eval()(x), error)
        assert same is buffers
        out, new = model.apply(params, buffers, x, train=True)
        assert_close(out, theirs.train()(x), error)
    for n, expected in statistics.items():
        assert_close(new[n], expected, error)


def halve_first_stage(pyconv: torch.nn.Module) -> None:
    """Give Holocron's PyConvResNet the stride, and the pooling in the shortcut, that it leaves out."""
    first = pyconv.features[3][0]
    for conv in first.conv[3]:
        conv.stride = (2, 2)
    first.downsample = torch.nn.Sequential(torch.nn.MaxPool2d(3, 2, 1), *first.downsample)


def randomized(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Values that no layer treats as the identity: scales and variances around one, offsets around zero."""
    generator = torch.Generator().manual_seed(0)
    values = {}
    for name, value in module.state_dict().items():
        if value.ndim != 1:
            values[name] = value.clone()
        elif name.endswith(("weight", "running_var")):
            values[name] = torch.rand(value.shape, generator=generator, dtype=value.dtype) + 0.5
        else:
            values[name] = torch.randn(value.shape, generator=generator, dtype=value.dtype) / 10
    return values


def assert_close(actual, expected, error):
    scale = expected.abs().max().clamp_min(1) if expected.is_floating_point() else 1
    torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=error)
