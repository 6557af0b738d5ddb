"""Models as files that other programs run."""

from pathlib import Path

import torch
from torch import Tensor, nn

from holofunc import random
from holofunc.model import Model
from holofunc.models.base import image_channels
from holofunc.typing import Buffers, Params

__all__ = ["export"]


def export(
    model: Model, params: Params, buffers: Buffers, path: str | Path, *, size: int = 224, tolerance: float = 1e-4
) -> float:
    """Write a model in eval mode as a program for batches of any number of images; run it, and compare.

    Args:
        model: whose output is a tensor; `holofunc.models.reparametrize` first makes it faster.
        params: of the model.
        buffers: of the model.
        path: ``*.pt2`` for `torch.export.load`, ``*.onnx`` for ONNX runtimes (``pip install 'holofunc[export]'``).
        size: height and width of the images.
        tolerance: by how much an output may differ, relative to the largest.

    Returns:
        By how much the file's outputs for random images differ from the model's, relative to the largest.

    Raises:
        ValueError: another suffix. ImportError: what ONNX needs is not installed. RuntimeError: the file computes
            something else; it is not kept.

    Example:
        >>> import os, tempfile
        >>> from holofunc import models, random
        >>> model = models.convnext_atto(num_blocks=[1, 1], planes=[40, 80])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "model.pt2")
        ...     models.export(model, *model.init(random.key(0)), path, size=32) < 1e-4
        True
    """
    path = Path(path)
    if path.suffix not in (".pt2", ".onnx"):
        raise ValueError(f"path must end with .pt2 or .onnx, got {str(path)!r}")
    module = model.to_module(params, buffers)
    like = next(iter(params.values()))
    images = random.normal(random.key(0, device=like.device), (3, image_channels(module), size, size)).to(like.dtype)
    save = _save_onnx if path.suffix == ".onnx" else _save_program
    outputs = save(module, images[:2], path, images)
    expected = model.apply(params, buffers, images)[0].detach()
    difference = float((outputs.to(expected) - expected).abs().max() / expected.abs().max())
    if not difference <= tolerance:
        path.unlink()
        raise RuntimeError(f"{path} computed something else than {model.name}: outputs differ by {difference:.1e}")
    return difference


def _save_program(module: nn.Module, example: Tensor, path: Path, images: Tensor) -> Tensor:
    """Write the program and run the file on ``images``, whose number differs from the example's."""
    torch.export.save(torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)), path)
    return torch.export.load(path).module()(images).detach()


def _save_onnx(module: nn.Module, example: Tensor, path: Path, images: Tensor) -> Tensor:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (what torch translates with)
    except ImportError as error:
        raise ImportError(f"writing {path} needs onnx: pip install 'holofunc[export]'") from error
    program = torch.onnx.export(
        module, (example,), dynamo=True, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        input_names=["images"], output_names=["outputs"], verbose=False,
    )  # fmt: skip
    assert program is not None  # it is None with ``f=``
    program.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.cpu().numpy()})[0])
