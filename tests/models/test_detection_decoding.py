"""What becomes of detectors that are merged or copied, of outputs that are no numbers, and of other targets."""

import copy
import math

import pytest
import torch

from holofunc import models, random

SMALL = {
    "yolov1": {
        "layout": [(8,), (8, 16), (16, 32), (32, 32)], "stem_channels": 8, "head_channels": 16,
        "head_hidden_nodes": 16, "image_size": 128,
    },
    "yolov2": {"layout": [(8, 0), (16, 0), (16, 0), (32, 0), (32, 0)], "stem_channels": 8, "head_channels": 16},
    "yolov4": {"layout": [(8, 1), (8, 1), (16, 1), (16, 1), (16, 1)], "stem_channels": 8},
}  # fmt: skip


def small(name):
    return models.create(name, num_classes=3, **SMALL[name])


def outputs(name):
    shapes = {"yolov1": [(2, 52)], "yolov2": [(2, 40, 4, 4)], "yolov4": [(2, 24, side, side) for side in (16, 8, 4)]}
    drawn = tuple(random.normal(random.key(len(shape)), shape) for shape in shapes[name])
    return drawn if len(drawn) > 1 else drawn[0]


def some_targets():
    boxes = torch.tensor([[[0.1, 0.2, 0.6, 0.9], [0.4, 0.1, 0.5, 0.3]]]).expand(2, 2, 4)
    return models.Targets(boxes, torch.tensor([[0, 2]] * 2), torch.ones(2, 2, dtype=torch.bool))


def each(fn, out):
    return tuple(fn(x) for x in out) if isinstance(out, tuple) else fn(out)


@pytest.mark.parametrize("name", ["yolov2", pytest.param("yolov4", marks=pytest.mark.slow)])
def test_a_detector_that_is_reparametrized_or_copied_still_detects(name):
    model = small(name)
    targets = some_targets()
    params, buffers = model.init(random.key(0))
    buffers = {n: b + 0.5 if n.endswith("running_var") else b for n, b in buffers.items()}
    x = random.normal(random.key(1), (2, 3, 64, 64))
    out = model.apply(params, buffers, x)[0]
    merged, *state = models.reparametrize(model, params, buffers)
    assert len(state[0]) < len(params)
    for a, b in zip(model.decode(out), merged.decode(merged.apply(*state, x)[0]), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)
    assert merged.loss(out, targets).keys() == model.loss(out, targets).keys()
    decoding = models.reparametrize(model.decoding(max_detections=4), params, buffers)
    assert decoding[0].apply(*decoding[1:], x)[0].boxes.shape == (2, 4, 4)
    again = copy.deepcopy(model)
    torch.testing.assert_close(again.apply(params, buffers, x)[0], out)
    assert again.decode(out).boxes.shape == (2, 100, 4)


@pytest.mark.parametrize("name", SMALL)
def test_slots_of_nan_do_not_displace_others(name):
    model, out = small(name), outputs(name)
    spoiled = each(lambda x: x.index_fill(-1, torch.tensor([0]), math.nan), out)
    found = model.decode(spoiled, candidates=4, max_detections=4, score_threshold=0.0)
    assert found.mask[:, 0].all()
    assert all(part.isfinite().all() for part in found[:2])


def test_targets_of_another_kind_are_refused_by_the_loss():
    model, targets = small("yolov2"), some_targets()
    with pytest.raises(TypeError, match=r"targets must be Targets\(boxes, labels, mask\), got tuple"):
        model.loss(outputs("yolov2"), tuple(targets))
    with pytest.raises(
        ValueError, match=r"targets must have shapes \(2, M, 4\), \(2, M\) and \(2, M\), got .* \(2, 1\)"
    ):
        model.loss(outputs("yolov2"), targets._replace(mask=targets.mask[:, :1]))
    with pytest.raises(TypeError, match=r"floating boxes, integer labels and a bool mask, got .* torch.float32"):
        model.loss(outputs("yolov2"), targets._replace(mask=targets.mask.float()))
