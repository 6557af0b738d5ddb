"""Models as files that other programs run."""

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from holofunc import random
from holofunc.model import Model
from holofunc.models.base import image_channels
from holofunc.models.detection import Decoding, DecodingModule, Detector
from holofunc.ops.suppression import decompositions
from holofunc.ops.targets import Detections
from holofunc.typing import Buffers, Params

__all__ = ["ExportError", "check_path", "example_images", "export"]


class ExportError(RuntimeError):
    """What was written computes something else than the model. It was not kept."""


def check_path(path: str | Path) -> Path:
    """The path of a program to be written.

    Raises:
        ValueError: another suffix than .pt2 and .onnx. ImportError: what ONNX needs is not installed.
        OSError: there is no such folder.
    """
    path = Path(path)
    if path.suffix not in (".pt2", ".onnx"):
        raise ValueError(f"path must end with .pt2 or .onnx, got {str(path)!r}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{str(path.parent)!r}, where {path.name} is to be written, is no folder")
    absent = [n for n in ("onnx", "onnxscript") if path.suffix == ".onnx" and find_spec(n) is None]
    if absent:
        raise ImportError(f"writing {path} needs {', '.join(absent)}: pip install 'holofunc[export]'")
    return path


def export(
    model: Model, params: Params, buffers: Buffers, path: str | Path, *, size: int = 224, tolerance: float = 1e-4
) -> float:
    """Write a model in eval mode as a program for batches of any number of images; run it, and compare.

    Args:
        model: whose output is a tensor; `holofunc.models.reparametrize` first makes it faster. Of a detector the
            program has suppression inside, and outputs boxes, scores, labels and mask; ``detector.decoding(...)`` in
            its place has other thresholds.
        params: of the model.
        buffers: of the model.
        path: ``*.pt2`` for `torch.export.load`, ``*.onnx`` for ONNX runtimes (``pip install 'holofunc[export]'``). A
            file that is there is replaced once the new one is proved.
        size: height and width of the images.
        tolerance: by how much an output may differ, relative to the largest.

    Returns:
        By how much the file's outputs for random images differ from the model's, relative to the largest.

    Raises:
        ValueError: another suffix; a size that the model does not take; an output that is no tensor.
        ImportError: what ONNX needs is not installed. ExportError: the file computes something else; it is not kept.

    Example:
        >>> import os, tempfile
        >>> from holofunc import models, random
        >>> model = models.convnext_atto(num_blocks=[1, 1], planes=[40, 80])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "model.pt2")
        ...     models.export(model, *model.init(random.key(0)), path, size=32) < 1e-4
        True
    """
    path = check_path(path)
    model = model.decoding() if isinstance(model, Detector) else model
    model.check(params, buffers)
    like = next(iter(params.values()))
    images = example_images(model, size).to(like.device, like.dtype)
    with torch.no_grad():
        expected = model.apply(params, buffers, images)[0]
    save = _save_onnx if path.suffix == ".onnx" else _save_program
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=f".{path.name}.") as folder:
        outputs = save(model.to_module(params, buffers), images[:2], Path(folder, path.name), images)
        difference = _difference(outputs, expected)
        if not difference <= tolerance:
            raise ExportError(f"{path} would compute something else than {model.name}: it differs by {difference:.1e}")
        for file in Path(folder).iterdir():  # ONNX puts the weights of large models into a second one
            os.replace(file, path.parent / file.name)
    return difference


def _difference(outputs: Any, expected: Any) -> float:
    """The largest difference, relative to the largest number; of detections, those to the most similar ones."""
    if isinstance(expected, Tensor):
        return float((outputs.to(expected) - expected).abs().max() / expected.abs().max())
    got, wanted = (_described(Detections(*(part.detach().cpu() for part in each))) for each in (outputs, expected))
    apart = [(a[:, None] - b).abs().amax(-1) for a, b in zip(got, wanted, strict=True) if len(a) and len(b)]
    if [len(a) for a in got] != [len(b) for b in wanted]:
        return float("inf")
    return max([0.0, *(float(torch.maximum(d.amin(0).max(), d.amin(1).max())) for d in apart)])


def _described(found: Detections) -> list[Tensor]:
    """For each image a row of six numbers for each detection. Equally good ones may be found in another order."""
    rows = torch.cat([found.boxes, found.scores[..., None], found.labels[..., None].to(found.boxes.dtype)], -1)
    return [image[mask] for image, mask in zip(rows, found.mask, strict=True)]


def example_images(model: Model, size: int) -> Tensor:
    """Three images of noise.

    Raises:
        ValueError: the model does not take images of this size, or its output is no tensor.
    """
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"size must be an integer of at least 1, got {size!r}")
    images = random.normal(random.key(0), (3, image_channels(model.skeleton), size, size))
    decodes = isinstance(model, Decoding)
    try:
        shape = model.output_shape(images)
    except (IndexError, RuntimeError) as error:
        raise ValueError(f"{model.name} takes no images of size {size}: {str(error).partition(chr(10))[0]}") from error
    if shape is None and not decodes:
        raise ValueError(f"{model.name} has more outputs than one tensor: it cannot be exported")
    return images


def _program(module: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """The program for any number of images, of torch's own operators."""
    program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    own = decompositions()
    if any(node.target in own for node in program.graph.nodes):
        program = program.run_decompositions(own)
    return program


def _save_program(module: nn.Module, example: Tensor, path: Path, images: Tensor) -> Any:
    """Write the program and run the file on ``images``, whose number differs from the example's."""
    torch.export.save(_program(module, example), path)
    with torch.no_grad():
        return torch.export.load(path).module()(images)


def _save_onnx(module: nn.Module, example: Tensor, path: Path, images: Tensor) -> Any:
    names = list(Detections._fields) if isinstance(module, DecodingModule) else ["outputs"]
    program = torch.onnx.export(
        _program(module, example), dynamo=True, input_names=["images"], output_names=names, verbose=False,
    )  # fmt: skip
    assert program is not None  # it is None with ``f=``
    program.save(str(path))
    outputs = [torch.from_numpy(each) for each in _run_onnx(path, images.cpu().numpy())]
    return outputs if len(outputs) > 1 else outputs[0]


def _run_onnx(path: Path, images: np.ndarray) -> list[np.ndarray]:
    """The outputs of the file: of onnxruntime where it is installed, otherwise of the slow reference of onnx."""
    try:
        from onnxruntime import InferenceSession
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        session: Any = ReferenceEvaluator(str(path))
    else:
        session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})
