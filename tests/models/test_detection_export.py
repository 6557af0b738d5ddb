"""Detectors as files: suppression inside, any number of images, the same detections in onnxruntime."""

import pytest
import torch

from holofunc import models, random
from holofunc.models import Detections, exporting

onnxruntime = pytest.importorskip("onnxruntime")

SMALL = {
    "yolov1": {
        "layout": [(8,), (8, 16), (16, 32), (32, 32)], "stem_channels": 8, "head_channels": 16,
        "head_hidden_nodes": 16, "image_size": 64,
    },
    "yolov2": {"layout": [(8, 0), (16, 0), (16, 0)], "stem_channels": 8, "head_channels": 16},
    "yolov4": {"layout": [(8, 1), (8, 1), (16, 1), (16, 1), (16, 1)], "stem_channels": 8},
}  # fmt: skip
ALL = [
    pytest.param(name, suffix, marks=[] if (name, suffix) == ("yolov2", ".onnx") else pytest.mark.slow)
    for name in SMALL
    for suffix in (".onnx", ".pt2")
]


def spread(name):
    """A detector whose scores differ enough that rounding does not change their order."""
    model = models.create(name, num_classes=3, **SMALL[name])
    params, buffers = model.init(random.key(0))
    heads = [n for n, p in params.items() if p.ndim == 4 and n.startswith("head.") and p.shape[0] == 24]
    heads += ["head.weight"] if name == "yolov2" else []
    return model, {n: p * 50 if n in heads else p for n, p in params.items()}, buffers


def run(path, images):
    if path.suffix == ".pt2":
        return Detections(*torch.export.load(path).module()(images))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == list(Detections._fields)
    return Detections(*map(torch.from_numpy, session.run(None, {"images": images.numpy()})))


@pytest.mark.parametrize(("name", "suffix"), ALL)
def test_files_find_what_detectors_do(name, suffix, tmp_path):
    model, params, buffers = spread(name)
    decoding = model.decoding(score_threshold=0.01, max_detections=8)
    path = tmp_path / f"model{suffix}"
    assert models.export(decoding, params, buffers, path, size=64) < 1e-4
    for count in (1, 5):
        images = random.normal(random.key(count), (count, 3, 64, 64))
        with torch.no_grad():
            expected = decoding.apply(params, buffers, images)[0]
        assert isinstance(expected, Detections)
        assert expected.mask.any(1).all()
        for got, wanted in zip(run(path, images), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_detectors_own_thresholds_by_default(tmp_path):
    model, params, buffers = spread("yolov2")
    models.export(model, params, buffers, tmp_path / "m.pt2", size=64)
    images = random.normal(random.key(1), (2, 3, 64, 64))
    expected = model.decode(model.apply(params, buffers, images)[0])
    assert run(tmp_path / "m.pt2", images).boxes.shape == expected.boxes.shape == (2, 100, 4)


@pytest.mark.slow
def test_programs_are_of_torchs_own_operators():
    model, params, buffers = spread("yolov2")
    module = model.decoding(max_detections=3).to_module(params, buffers)
    program = exporting._program(module, (torch.zeros(2, 3, 64, 64),))
    assert not [node for node in program.graph.nodes if "holofunc" in str(node.target)]


def test_detections_are_compared_whatever_their_order():
    rows = torch.tensor([[[0.1, 0.1, 0.2, 0.2], [0.5, 0.5, 0.9, 0.9]]])
    found = Detections(rows, torch.tensor([[0.5, 0.5]]), torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool))
    turned = Detections(*(part.flip(1) for part in found))
    assert exporting._difference(turned, found) == 0
    assert exporting._difference(found._replace(boxes=rows + 0.01), found) == pytest.approx(0.01)
    assert exporting._difference(found._replace(labels=torch.tensor([[1, 1]])), found) >= 0.5
    assert exporting._difference(found._replace(mask=torch.tensor([[True, False]])), found) == float("inf")
