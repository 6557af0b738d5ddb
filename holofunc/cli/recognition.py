"""Images of lines of text with their characters."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from holofunc import data, metrics, plots, random
from holofunc.cli.segmentation import drawn_images
from holofunc.cli.task import IMAGES, Opened, Task
from holofunc.config import Config
from holofunc.data.text_files import line_pixels
from holofunc.metrics import Metric
from holofunc.model import Model
from holofunc.models.derived import Derived
from holofunc.ops import ctc
from holofunc.typing import PyTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Recognition"]

ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"


class Recognition(Task):
    """Connectionist temporal classification; the classes are the characters."""

    sources = ("lines", "text:PATH")
    model = "ctc_recognizer"
    monitor = "val/error_rate"
    loss = ("ctc",)
    axes: ClassVar = {"images": IMAGES, "outputs": ("frames", "batch", "classes")}

    def usual_size(self, config: Config) -> int | None:
        return 96 if config.data == "lines" else 128

    def open(self, config: Config, split: str) -> Opened:
        width, known = config.image_size or 96, "".join(config.classes)
        if config.data == "lines":
            key = random.fold_in(random.key(config.seed), int(split == "test"))
            length = (min(3, max(1, width // 32)), max(1, width // 16))
            images, texts = data.draw_text_lines(key, drawn_images(config, split), length=length, size=(32, width))
            labels = data.CTCCodec(ALPHABET).encode_all(texts, length[1])
            return Opened((images, labels), tuple(ALPHABET), (0.5,), (0.3,), _options(ALPHABET))
        found = data.open_lines(str(config.data), split=split, width=width, alphabet=known or None)
        alphabet, paths = found.codec.alphabet, tuple(map(str, found.paths))
        return Opened(found, tuple(alphabet), found.mean, found.std, _options(alphabet), paths)

    def check_model(self, config: Config, model: Model, output: torch.Size | None, shape: Sequence[int]) -> None:
        if output is None or len(output) != 3 or output[1:] != (1, len(config.classes) + 1):
            size = "x".join(map(str, shape))
            raise ValueError(f"model {config.model} reads no lines: from an image of {size} it makes {output}")

    def by_image(self, model: Model) -> Model:
        return Derived(model, change=_ByImage)

    def term(self, text: str, smoothing: float) -> Callable[..., Any]:
        loss = super().term(text, smoothing)
        return lambda outputs, targets: loss(outputs.transpose(0, 1), targets)

    def measured(self, config: Config, model: Model, *, held_out: bool) -> dict[str, Metric]:
        return {"error_rate": _character_error_rate()} if held_out else {}

    def draw(self, config: Config, model: Model, images: Tensor, outputs: PyTree, targets: PyTree) -> "Figure":
        codec = data.CTCCodec("".join(config.classes))
        read = codec.texts(ctc.prefix_beam_decode(outputs.transpose(0, 1)).labels)
        return plots.recognition(images, read, codec.texts(targets), mean=config.mean, std=config.std)

    def pixels(self, image: Image.Image, shape: Sequence[int]) -> Tensor:
        return line_pixels(image, shape[2])

    def told(self, outputs: Any, classes: Sequence[str]) -> list[str]:
        return data.CTCCodec("".join(classes)).texts(ctc.prefix_beam_decode(outputs).labels)

    def summary(self, values: Mapping[str, Any]) -> str:
        return f"character error rate {values['error_rate']:.2%}"


def _options(alphabet: str) -> dict[str, Any]:
    return {"num_classes": len(alphabet) + 1, "ignore_index": ctc.PADDING}


class _ByImage(nn.Module):
    """A recognizer whose frames are the second dimension, under its names."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self._modules, self._parameters, self._buffers = network._modules, network._parameters, network._buffers
        self._non_persistent_buffers_set = network._non_persistent_buffers_set
        self.network_forward, self.check_input = network.forward, network.check_input

    def forward(self, x: Tensor) -> Tensor:
        return self.network_forward(x).transpose(0, 1)


def _character_error_rate() -> Metric:
    """Characters to insert, remove or replace, over characters written."""

    def errors(log_probs: Tensor, labels: Tensor) -> Tensor:
        return ctc.edit_distance(ctc.greedy_decode(log_probs.transpose(0, 1)).labels, labels).float()

    def characters(log_probs: Tensor, labels: Tensor) -> Tensor:
        return (labels != ctc.PADDING).sum(1).float()

    both = metrics.combine(errors=metrics.mean(errors), characters=metrics.mean(characters))

    def compute(state: PyTree) -> Tensor:
        means = both.compute(state)
        return means["errors"] / means["characters"]

    return both._replace(compute=compute)
