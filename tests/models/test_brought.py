"""Modules from outside: maps as they were, merging only what is proved, files of anything."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from holofunc import lift, models, random


def test_maps_are_as_they_were_before_the_next_layer_wrote_into_them():
    model = lift(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3)))
    params, buffers = model.init(random.key(0))
    x = random.normal(random.key(1), (2, 3, 16, 16))
    got = models.features(model, ["0", "2"]).apply(params, buffers, x)[0]["0"]
    torch.testing.assert_close(got, F.conv2d(x, params["0.weight"], params["0.bias"]))


class NormAct(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x))


class ReadsWeight(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + self[0].weight.sum()


@pytest.mark.parametrize(
    ("build", "merged"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), True),
        (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)), True),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4)), False),
        (lambda: ReadsWeight(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), False),
    ],
)
def test_only_what_is_proved_is_merged(build, merged):
    model = lift(build)
    params, buffers = model.init(random.key(0), dtype=torch.float64)
    buffers = {n: b + 0.5 if b.is_floating_point() else b for n, b in buffers.items()}
    x = random.normal(random.key(1), (2, 3, 9, 9), dtype=torch.float64)
    new = models.reparametrize(model, params, buffers)
    assert (new[0] is not model) == merged
    torch.testing.assert_close(new[0].apply(*new[1:], x)[0], model.apply(params, buffers, x)[0])


def test_files_need_no_convolution_and_zeros_equal_zeros(tmp_path):
    model = lift(nn.Linear, 4, 2)
    params, buffers = model.init(random.key(0))
    zeros = {n: torch.zeros_like(p) for n, p in params.items()}
    difference = models.export(model, zeros, buffers, tmp_path / "m.pt2", example=torch.ones(1, 4))
    assert (difference, difference.inputs) == (0.0, ("(N, 4)",))
