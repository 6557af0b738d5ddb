"""How parameters start: the spread each rule promises, independence of the rest of the network, coverage."""

import math

import pytest
import torch

from holofunc import nn, random
from holofunc.nn import init


def net() -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Conv2d(8, 64, 3, groups=2),
        torch.nn.BatchNorm2d(64),
        torch.nn.ConvTranspose2d(64, 32, 2),
        torch.nn.GroupNorm(4, 32, affine=False),
        nn.Add2d(32, 16, 3),
        torch.nn.Flatten(),
        torch.nn.LayerNorm(100),
        torch.nn.Linear(100, 300),
        torch.nn.BatchNorm1d(300, affine=False),
    )


def test_spreads() -> None:
    values = init.kaiming(net(), random.key(0))
    for name, fan_out in (("0.weight", 64 * 9), ("2.weight", 64 * 4), ("4.weight", 16 * 9)):
        assert values[name].std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
        assert abs(values[name].mean().item()) < 0.1 * math.sqrt(2 / fan_out)
    linear = values["7.weight"]
    assert linear.abs().max().item() == pytest.approx(0.1, rel=1e-3)
    assert linear.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.02)


def test_normalizations_start_as_identities_and_biases_of_convolutions_at_zero() -> None:
    values = init.kaiming(net(), random.key(0))
    assert all((values[f"{i}.weight"] == 1).all() and (values[f"{i}.bias"] == 0).all() for i in (1, 6))
    assert all((values[f"{i}.bias"] == 0).all() for i in (0, 2, 4))


def test_every_parameter_of_such_layers_is_covered_with_its_shape() -> None:
    skeleton = net()
    values = init.kaiming(skeleton, random.key(0))
    assert {n: v.shape for n, v in values.items()} == {n: p.shape for n, p in skeleton.named_parameters()}


def test_no_value_depends_on_the_rest_of_the_network() -> None:
    whole, part = net(), net()[:3]
    a, b = init.kaiming(whole, random.key(3)), init.kaiming(part, random.key(3))
    assert all(torch.equal(a[n], b[n]) for n in b)
    assert not torch.equal(a["0.weight"], init.kaiming(whole, random.key(4))["0.weight"])
    assert a["0.weight"].std() > 0


@pytest.mark.parametrize(
    ("nonlinearity", "slope", "gain"),
    [("relu", None, math.sqrt(2)), ("leaky_relu", 0.1, math.sqrt(2 / 1.01)), ("linear", None, 1.0)],
)
def test_gain(nonlinearity: str, slope: float | None, gain: float) -> None:
    conv = torch.nn.Conv2d(3, 64, 3)
    relative = init.kaiming(conv, random.key(0), nonlinearity=nonlinearity, slope=slope)["weight"]
    unit = init.kaiming(conv, random.key(0), nonlinearity="linear")["weight"]
    torch.testing.assert_close(relative, gain * unit)
