"""Edits of parameter dicts, as the laws they keep."""

import pytest
import torch
import torchvision
from torch import nn

from holofunc import lift, models, random
from holofunc.models import surgery

MODEL = models.resnet18()
PARAMS, BUFFERS = MODEL.init(random.key(0))
VALUES = {**PARAMS, **BUFFERS}


def test_a_state_dict_becomes_params_and_buffers_in_order():
    backwards = dict(reversed(VALUES.items()))
    params, buffers = surgery.load(MODEL, backwards)
    assert list(params) == list(PARAMS)
    assert list(buffers) == list(BUFFERS)
    assert params["head.bias"] is PARAMS["head.bias"]


def test_one_error_lists_all_that_does_not_fit():
    values = surgery.drop(VALUES, "features.0.", "features.1.running_") | {
        "extra": torch.zeros(1),
        "head.bias": torch.zeros(3),
    }
    with pytest.raises(
        ValueError,
        match=r"values do not fit resnet18: missing: features.0.weight, features.1.running_mean, "
        r"features.1.running_var; unexpected: extra; misshapen: head.bias has shape \(3,\), expected \(10,\)",
    ):
        surgery.load(MODEL, values)
    with pytest.raises(ValueError, match="strict=False needs a key"):
        surgery.load(MODEL, values, strict=False)
    with pytest.warns(UserWarning, match="values do not fit resnet18 everywhere: missing: features.0.weight"):
        params, buffers = surgery.load(MODEL, values, strict=False, key=random.key(1))
    start, _ = MODEL.init(random.key(1))
    assert torch.equal(params["head.bias"], start["head.bias"])
    assert torch.equal(params["features.0.weight"], start["features.0.weight"])
    assert params["head.weight"] is PARAMS["head.weight"]
    assert torch.equal(buffers["features.1.running_var"], torch.ones(64))


def test_torchvisions_files_load_by_name():
    theirs = torchvision.models.resnet18(num_classes=4)
    model = lift(torchvision.models.resnet18, num_classes=4)
    params, buffers = surgery.load(model, theirs.state_dict())
    x = torch.ones(1, 3, 64, 64)
    assert torch.equal(model.apply(params, buffers, x)[0], theirs.eval()(x))
    assert surgery.head_names(model) == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet", "test_convnext", "test_vit"])
def test_timms_files_load_by_name(name):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(name, num_classes=4).eval()
    model = lift(timm.create_model, name, num_classes=4)
    params, buffers = surgery.load(model, theirs.state_dict())
    x = random.normal(random.key(0), (2, 3, 160, 160))
    torch.testing.assert_close(model.apply(params, buffers, x)[0], theirs(x))
    assert len(params[surgery.head_names(model)[0]]) == 4


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


def test_a_tensor_of_two_names_goes_by_its_first():
    model, theirs = lift(Tied), Tied()
    params, buffers = surgery.load(model, theirs.state_dict())
    assert list(params) == ["first.weight", "first.bias", "second.bias"]
    assert torch.equal(model.apply(params, buffers, torch.ones(1, 2))[0], theirs(torch.ones(1, 2)))


@pytest.mark.parametrize(
    "name", ["resnet18", "rexnet1_0x", "convnext_atto", "darknet19", "repvit_m0_9", "mobileone_s1"]
)
def test_a_new_head_changes_the_head_alone(name):
    params, buffers = models.create(name).init(random.key(0))
    model = models.create(name, num_classes=3)
    new = surgery.new_head(model, params, random.key(1))
    head = surgery.head_names(model)
    assert len(head) == 2
    assert all(new[n] is params[n] for n in params if n not in head)
    assert model.apply(new, buffers, torch.zeros(1, 3, 32, 32))[0].shape == (1, 3)
    assert torch.equal(new[head[0]], model.init(random.key(1))[0][head[0]])


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "repvgg_a0", "darknet24"])
def test_grey_images_give_what_they_gave_as_three_channels(name):
    params, buffers = models.create(name).init(random.key(0), dtype=torch.float64)
    grey = random.normal(random.key(1), (2, 1, 64, 64), dtype=torch.float64)
    expected, _ = models.create(name).apply(params, buffers, grey.expand(2, 3, 64, 64))
    model = models.create(name, in_channels=1)
    actual, _ = model.apply(surgery.new_input(model, params), buffers, grey)
    torch.testing.assert_close(actual, expected)
    model = models.create(name, in_channels=6)
    actual, _ = model.apply(surgery.new_input(model, params), buffers, grey.expand(2, 6, 64, 64))
    torch.testing.assert_close(actual, expected)


def test_a_stem_that_works_by_channel_cannot_be_adapted():
    params, _ = models.mobileone_s1().init(random.key(0))
    with pytest.raises(ValueError, match="mobileone_s1 does not start with an ordinary convolution"):
        surgery.new_input(models.mobileone_s1(in_channels=1), params)


def test_names_are_edited_without_touching_the_values():
    wrapped = {f"module.{n}": v for n, v in VALUES.items()}
    before = list(wrapped)
    assert surgery.rename(wrapped, "module.") == VALUES
    assert list(surgery.rename({"a.b": 1, "ab": 2}, "a.", "c.")) == ["c.b", "ab"]
    assert list(surgery.drop(VALUES, "features.")) == ["head.weight", "head.bias"]
    assert surgery.drop(VALUES) == VALUES
    assert list(wrapped) == before


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: surgery.rename({"a.b": 1, "b": 2}, "a."), ValueError, "gives two values the name b"),
        (lambda: surgery.load(MODEL, {**VALUES, "step": 3}), TypeError, "tensors by name, got int at 'step'"),
        (lambda: surgery.new_head(MODEL, {}, random.key(0)), ValueError, "params must hold at least one parameter"),
    ],
)
def test_edits_that_lose_something_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
