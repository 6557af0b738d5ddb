"""Models as files that other programs run."""

import functools
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holofunc import random
from holofunc.model import Model
from holofunc.model.skeleton import tensors
from holofunc.models.base import image_channels
from holofunc.models.detection import DecodingModule, Detector
from holofunc.ops.checks import check_counts
from holofunc.ops.suppression import decompositions
from holofunc.ops.targets import Detections
from holofunc.typing import Buffers, Params

__all__ = ["ExportError", "Exported", "check_path", "example_images", "export", "load", "metadata"]


METADATA = "metadata.json"
"""The extra file of a .pt2."""


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
        raise FileNotFoundError(f"{str(path.parent)!r}, where {path.name} is to be written, is not a folder")
    absent = [n for n in ("onnx", "onnxscript") if path.suffix == ".onnx" and find_spec(n) is None]
    if absent:
        raise ImportError(f"writing {path} needs {', '.join(absent)}: pip install 'holofunc[export]'")
    return path


class Exported(float):
    """By how much a file's outputs differ from the model's, relative to the largest.

    Attributes:
        inputs: the shapes that the file takes; N is any number of images.
    """

    inputs: tuple[str, ...] = ()


def export(
    model: Model,
    params: Params,
    buffers: Buffers,
    path: str | Path,
    *,
    size: int = 224,
    example: Tensor | tuple[Tensor, ...] | None = None,
    tolerance: float = 1e-4,
    metadata: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a model in eval mode as a program for batches of any number of images; run it, and compare.

    The first dimension of every input is the batch, of any size if the model allows that; all other sizes are those of
    the example. What the file takes is said by ``inputs`` of the returned number.

    Args:
        model: whose output is a tensor, or dicts and tuples of them; `holofunc.models.reparametrize` first makes it
            faster. Of a detector the program has suppression inside, and outputs boxes, scores, labels and mask;
            ``detector.decoding(...)`` in its place has other thresholds.
        params: of the model.
        buffers: of the model.
        path: ``*.pt2`` for `torch.export.load`, ``*.onnx`` for ONNX runtimes (``pip install 'holofunc[export]'``). A
            file that is there is replaced once the new one is proved. ONNX has one list of outputs, which go by the
            keys of a dict.
        size: height and width of the images, if no example is given.
        example: what the model takes, a batch, or a tuple of its inputs. None is images of noise.
        tolerance: by how much an output may differ, relative to the largest.
        metadata: what the file says of itself, as JSON has it: class names, mean and std, say. ``metadata(path)`` reads
            it again; in ONNX it is among the model's properties, in ``.pt2`` the extra file ``metadata.json``.

    Returns:
        By how much the file's outputs for the example differ from the model's, relative to the largest.

    Raises:
        ValueError: another suffix; a size that the model does not take; an output without tensors; a forward that reads
            values.
        ImportError: what ONNX needs is not installed. ExportError: the file computes something else; it is not kept.

    Example:
        >>> import os, tempfile
        >>> from holofunc import models, random
        >>> model = models.convnext_atto(num_blocks=[1, 1], planes=[40, 80])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "model.pt2")
        ...     difference = models.export(model, *model.init(random.key(0)), path, size=32)
        >>> difference < 1e-4, difference.inputs
        (True, ('(N, 3, 32, 32)',))
    """
    path = check_path(path)
    model = model.decoding() if isinstance(model, Detector) else model
    model.check(params, buffers)
    inputs = _inputs(model, params, size, example)
    module = model.to_module(params, buffers)
    with torch.no_grad():
        expected = model.apply(params, buffers, *inputs)[0]
    if not tensors(expected):
        raise ValueError(f"{model.name} outputs no tensor, but {type(expected).__name__}: it cannot be exported")
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=f".{path.name}.") as folder:
        try:
            outputs, dynamic = _written(module, inputs, Path(folder, path.name), metadata or {})
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{model.name} cannot be written as a program of torch.export: {reason}") from error
        difference = Exported(_difference(outputs, expected))
        if not difference <= tolerance:
            raise ExportError(f"{path} would compute something else than {model.name}: it differs by {difference:.1e}")
        for file in Path(folder).iterdir():  # ONNX puts the weights of large models into a second one
            os.replace(file, path.parent / file.name)
    difference.inputs = tuple(
        f"({', '.join(['N' if dynamic else str(len(x)), *map(str, x.shape[1:])])})" for x in inputs
    )
    return difference


def _difference(outputs: Any, expected: Any) -> float:
    """The largest difference, relative to the largest number unless all are zero; of detections, those to the most
    similar ones.
    """
    if not isinstance(expected, Detections):
        pairs = zip(tensors(outputs), tensors(expected), strict=True)
        return max(float((a.to(b) - b).abs().max()) / (float(b.abs().max()) or 1.0) for a, b in pairs)
    got, wanted = (_described(Detections(*(part.detach().cpu() for part in each))) for each in (outputs, expected))
    apart = [(a[:, None] - b).abs().amax(-1) for a, b in zip(got, wanted, strict=True) if len(a) and len(b)]
    if [len(a) for a in got] != [len(b) for b in wanted]:
        return float("inf")
    return max([0.0, *(float(torch.maximum(d.amin(0).max(), d.amin(1).max())) for d in apart)])


def _described(found: Detections) -> list[Tensor]:
    """For each image a row of six numbers for each detection. Equally good ones may be found in another order."""
    rows = torch.cat([found.boxes, found.scores[..., None], found.labels[..., None].to(found.boxes.dtype)], -1)
    return [image[mask] for image, mask in zip(rows, found.mask, strict=True)]


def _names(outputs: Any) -> list[str]:
    """Of a program's outputs: the keys of a dict of tensors."""
    count = len(tensors(outputs))
    if isinstance(outputs, dict) and len(outputs) == count:
        return [str(key) for key in outputs]
    return ["outputs", *(f"outputs{i}" for i in range(1, count))]


def example_images(model: Model, size: int) -> Tensor:
    """Three images of noise.

    Raises:
        ValueError: the model does not take images of this size.
    """
    check_counts(size=size)
    known = image_channels(model.skeleton, default=0)
    reason = ""
    for channels in [known] if known else [3, 1]:
        images = random.normal(random.key(0), (3, channels, size, size))
        try:
            model.output_shape(images)
            return images
        except (IndexError, RuntimeError) as error:
            reason = reason or str(error).partition("\n")[0]
    raise ValueError(f"{model.name} takes no images of size {size}: {reason}. What it takes can be given as example=")


def _inputs(model: Model, params: Params, size: int, example: Any) -> tuple[Tensor, ...]:
    """A batch of two or more: one of a single image would be taken for the only size."""
    if example is None:
        images = example_images(model, size)
        like = next(iter(params.values()), images)
        return (images.to(like.device, like.dtype),)
    inputs = example if isinstance(example, tuple) else (example,)
    if not inputs or not all(isinstance(x, Tensor) and x.ndim and len(x) for x in inputs):
        raise ValueError(f"example must be a batch, or a tuple of batches, got {type(example).__name__}")
    return tuple(torch.cat([x, x]) if len(x) == 1 else x for x in inputs)


def _written(module: nn.Module, inputs: tuple[Tensor, ...], path: Path, about: Mapping[str, Any]) -> tuple[Any, bool]:
    """What the file computes, and whether it takes any number of images."""
    save: Callable[..., None] = _save_onnx if path.suffix == ".onnx" else _save_program
    save = functools.partial(save, path=path, about={name: json.dumps(value) for name, value in about.items()})
    fewer = tuple(x[: max(2, len(x) - 1)] for x in inputs)
    try:
        save(module, fewer, dynamic_shapes=tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs))
        return load(path)(*inputs), True
    except (RuntimeError, ValueError):  # the forward asks for one size
        save(module, inputs)
        return load(path)(*inputs), False


def _program(module: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> torch.export.ExportedProgram:
    """The program, of torch's own operators."""
    program, own = torch.export.export(module, inputs, **options), decompositions()
    if any(node.target in own for node in program.graph.nodes):
        program = program.run_decompositions(own)
    return program


def _save_program(
    module: nn.Module, inputs: tuple[Tensor, ...], *, path: Path, about: Mapping[str, str], **options: Any
) -> None:
    extra = {name: json.loads(text) for name, text in about.items()}
    torch.export.save(_program(module, inputs, **options), path, extra_files={METADATA: json.dumps(extra)})


def _save_onnx(
    module: nn.Module, inputs: tuple[Tensor, ...], *, path: Path, about: Mapping[str, str], **options: Any
) -> None:
    names = ["images", *(f"inputs{i}" for i in range(1, len(inputs)))]
    outputs = list(Detections._fields) if isinstance(module, DecodingModule) else _names(module(*inputs))
    program = torch.onnx.export(
        _program(module, inputs, **options), dynamo=True, input_names=names, output_names=outputs, verbose=False
    )
    assert program is not None  # it is None with ``f=``
    _name_batch(program.model.graph)
    program.model.metadata_props.update(about)
    program.save(str(path))


def _name_batch(graph: Any) -> None:
    """Call the number of images ``batch``, wherever it is a dimension."""
    symbol = str(graph.inputs[0].shape[0])
    if symbol.isdecimal():
        return
    values = [*graph.inputs, *graph.outputs, *(value for node in graph for value in node.outputs)]
    for value in {id(value): value for value in values if value.shape is not None}.values():
        for i, size in enumerate(value.shape):
            if not isinstance(size, int) and symbol in str(size):
                value.shape[i] = str(size).replace(symbol, "batch")


def metadata(path: str | Path) -> dict[str, Any]:
    """What a file of `export` says of itself.

    Raises:
        ValueError: another suffix.

    Example:
        >>> import os, tempfile, torch
        >>> from holofunc import lift, models, random
        >>> model = lift(torch.nn.Linear, 4, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "model.pt2")
        ...     about = {"classes": ["cat", "dog"]}
        ...     _ = models.export(model, *model.init(random.key(0)), path, example=torch.ones(3, 4), metadata=about)
        ...     models.exporting.metadata(path)
        {'classes': ['cat', 'dog']}
    """
    path = Path(path)
    if path.suffix == ".pt2":
        with zipfile.ZipFile(path) as archive:  # torch would load the program too
            found = [name for name in archive.namelist() if name.endswith(f"extra/{METADATA}")]
            return json.loads(archive.read(found[0])) if found else {}
    if path.suffix != ".onnx":
        raise ValueError(f"path must end with .pt2 or .onnx, got {str(path)!r}")
    import onnx

    properties = onnx.load(str(path), load_external_data=False).metadata_props
    return {each.key: _value(each.value) for each in properties}


def _value(text: str) -> Any:
    """What it stands for in JSON; torch writes properties of its own, which are texts."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def load(path: str | Path) -> Callable[..., Any]:
    """A file of `export` as a function of what it takes; ONNX runs in onnxruntime, or in onnx's slow reference.

    Returns:
        ``program(*inputs)``, of tensors on the CPU; an output, or a list of several.

    Raises:
        ValueError: another suffix.
    """
    path = Path(path)
    if path.suffix == ".pt2":
        return torch.no_grad()(torch.export.load(path).module())
    if path.suffix != ".onnx":
        raise ValueError(f"path must end with .pt2 or .onnx, got {str(path)!r}")
    try:
        from onnxruntime import InferenceSession
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        session: Any = ReferenceEvaluator(str(path))
    else:
        session = InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def program(*inputs: Tensor) -> Any:
        names = ["images", *(f"inputs{i}" for i in range(1, len(inputs)))]
        given = {name: x.detach().cpu().numpy() for name, x in zip(names, inputs, strict=True)}
        outputs = [torch.from_numpy(each) for each in session.run(None, given)]
        return outputs if len(outputs) > 1 else outputs[0]

    return program
