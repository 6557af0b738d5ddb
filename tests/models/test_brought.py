"""Modules from outside: maps as they were, merging only what is proved, files of anything."""

from types import SimpleNamespace

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


class Between(nn.Module):
    """Does something between a convolution and its norm."""

    def __init__(self, between):
        super().__init__()
        self.conv, self.norm, self.between = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), between

    def forward(self, x):
        y = self.conv(x)
        return self.between(self, y) or self.norm(y)


def through_itself():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    forward = model[0].forward
    model[0].forward = lambda x: 2 * forward(x)
    return model


@pytest.mark.parametrize(
    ("build", "merged"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), True),
        (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)), True),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4)), False),
        (lambda: ReadsWeight(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), False),
        (lambda: Between(lambda self, y: None), True),
        (lambda: Between(lambda self, y: y.__setitem__((slice(None), 0), 0.0)), False),
        (lambda: Between(lambda self, y: None if y.shape[-1] > 16 else (y.sin(),)), False),
        (lambda: Between(lambda self, y: SimpleNamespace(y=y, z=self.norm(y))), False),
        (through_itself, False),
    ],
)
def test_only_what_is_proved_is_merged(build, merged):
    model = lift(build)
    params, buffers = model.init(random.key(0), dtype=torch.float64)
    buffers = {n: b + 0.5 if b.is_floating_point() else b for n, b in buffers.items()}
    x = random.normal(random.key(1), (2, 3, 9, 9), dtype=torch.float64)
    new = models.reparametrize(model, params, buffers)
    assert (new[0] is not model) == merged
    got, wanted = (each.apply(*values, x)[0] for each, *values in (new, (model, params, buffers)))
    if isinstance(wanted, SimpleNamespace):
        got, wanted = vars(got), vars(wanted)
    torch.testing.assert_close(got, wanted)


def test_files_need_no_convolution_and_zeros_equal_zeros(tmp_path):
    model = lift(nn.Linear, 4, 2)
    params, buffers = model.init(random.key(0))
    zeros = {n: torch.zeros_like(p) for n, p in params.items()}
    difference = models.export(model, zeros, buffers, tmp_path / "m.pt2", example=torch.ones(1, 4))
    assert (difference, difference.inputs) == (0.0, ("(N, 4)",))


def test_what_cannot_be_written_as_a_program_is_named(tmp_path):
    class Reads(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    model = lift(Reads, 4, 2)
    with pytest.raises(ValueError, match=r"Reads cannot be written as a program of torch.export: "):
        models.export(model, *model.init(random.key(0)), tmp_path / "m.pt2", example=torch.ones(3, 4))


def test_shapes_alone_are_run_with_constants_of_any_kind():
    class Plain(nn.Linear):
        def __init__(self):
            super().__init__(4, 2)
            self.grids = [torch.arange(2.0)]

        def forward(self, x):
            return super().forward(x) * self.grids[0]

    model = lift(Plain)
    assert model.output_shape(torch.ones(3, 4)) == (3, 2)
    assert model.tabulate(torch.ones(1, 4)).rows[0].output == "(1, 2)"
