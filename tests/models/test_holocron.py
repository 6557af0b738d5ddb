"""Every constructor against Holocron: names, order, shapes, outputs, and the statistics a training pass leaves."""

import json
import lzma
import math
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
OTHER_NUMBERS = {"pyconv_resnet50", "pyconvhg_resnet50"}  # a stride that Holocron leaves out
NO_DROPOUT = {"cspdarknet53_mish": {"drop_block": 0.0}} | {n: {"dropout": 0.0} for n in NAMES if n.startswith("rexnet")}


def size(name: str) -> int:
    return sum(math.prod(shape) for _, shape in NAMES[name])


def compared() -> list:
    names = sorted(set(NAMES) - OTHER_NUMBERS)
    return [pytest.param(n, marks=pytest.mark.slow) if size(n) > 60e6 else n for n in names]


@pytest.mark.parametrize("name", NAMES)
def test_names_order_and_shapes(name):
    skeleton = getattr(models, name)(num_classes=10, **LAYOUT.get(name, {})).skeleton
    assert [[n, list(v.shape)] for n, v in skeleton.state_dict().items()] == NAMES[name]


@pytest.mark.parametrize("name", compared())
def test_outputs_and_statistics(name):
    theirs = getattr(holocron, name)(pretrained=False, num_classes=10).double()
    for module in theirs.modules():
        if type(module).__name__ in ("DropBlock2d", "Dropout"):
            module.p = 0.0
    values = randomized(theirs)
    theirs.load_state_dict(values)
    model = getattr(models, name)(**LAYOUT.get(name, {}), **NO_DROPOUT.get(name, {}))
    params = {n: values[n] for n, _ in theirs.named_parameters()}
    buffers = {n: values[n] for n, _ in theirs.named_buffers()}
    x = torch.randn(2, 3, 64, 72, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out, same = model.apply(params, buffers, x)
        assert_close(out, theirs.eval()(x))
        assert same is buffers
        out, new = model.apply(params, buffers, x, train=True)
        assert_close(out, theirs.train()(x))
    for n, expected in theirs.named_buffers():
        assert_close(new[n], expected)


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


def assert_close(actual, expected):
    scale = expected.abs().max().clamp_min(1) if expected.is_floating_point() else 1
    torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=1e-10)
