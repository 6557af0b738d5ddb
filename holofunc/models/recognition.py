"""Recognition of characters, and of lines of text, in grey images 32 pixels high.

Source: Shi et al., "An end-to-end trainable neural network for image-based sequence recognition" (arXiv 1507.05717);
Cho et al., "Learning phrase representations" (arXiv 1406.1078), the gated recurrent unit. The sizes are Holocron's.
"""

from typing import Any

import torch
from torch import Tensor, nn

from holofunc.model import ChecksInput, Drop, Model
from holofunc.models.base import build_model, conv_bn
from holofunc.ops import ctc

__all__ = ["CTCRecognizer", "CharacterClassifier", "character_classifier", "ctc_recognizer"]

HEIGHT, PIXELS = 32, 4
"""The images' height, and how many of their columns are one frame."""


class CharacterBackbone(nn.Module):
    """Four convolutions: maps 4 high, a frame for every 4 pixels of the width.

    Args:
        masked: zero what lies beyond each image's width before every convolution, so that an image gives what it gives
            without padding.
    """

    def __init__(self, in_channels: int, masked: bool) -> None:
        super().__init__()
        self.masked = masked
        pools: list[list[nn.Module]] = [[nn.MaxPool2d(2)], [nn.MaxPool2d(2)], [nn.MaxPool2d((2, 1))], []]
        layers: list[nn.Module] = []
        channels = in_channels
        for out, pool in zip((24, 48, 96, 96), pools, strict=True):
            layers += [*conv_bn(channels, out, 3), nn.ReLU(), *pool]
            channels = out
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """Images (N, C, 32, W) and lengths (N,) in frames to frames (N, W / 4, 384)."""
        frames = x.shape[-1] // PIXELS
        for layer in self.features:
            if self.masked and lengths is not None and isinstance(layer, nn.Conv2d):
                column = torch.arange(x.shape[-1], device=x.device)
                x = torch.where((column < (lengths * (x.shape[-1] // frames))[:, None])[:, None, None], x, 0)
            x = layer(x)
        return x.permute(0, 3, 1, 2).flatten(2)


class TextImages(ChecksInput):
    """A skeleton that takes images (N, C, 32, W), W a multiple of 4, and their widths divided by 4, (N,)."""

    def __init__(self, in_channels: int, masked: bool) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.backbone = CharacterBackbone(in_channels, masked)

    def check_input(self, *inputs: Any) -> None:
        """Called by `Model.apply` before the forward pass; reads lengths where that costs nothing.

        Raises:
            TypeError: images that are no floating tensor, lengths that are no integer tensor.
            ValueError: another shape, no images, or lengths outside of [1, W / 4].
        """
        x, lengths = (*inputs, None)[:2]
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"images must be a floating tensor, got {x.dtype if isinstance(x, Tensor) else type(x)}")
        if x.ndim != 4 or x.shape[1:3] != (self.in_channels, HEIGHT) or len(x) == 0:
            raise ValueError(
                f"images must have shape (N, {self.in_channels}, {HEIGHT}, W) with N at least 1, got {tuple(x.shape)}"
            )
        if x.shape[3] == 0 or x.shape[3] % PIXELS:
            raise ValueError(f"images must be a multiple of {PIXELS} pixels wide, got {x.shape[3]}")
        ctc.check_lengths("lengths", lengths, len(x), 1, x.shape[3] // PIXELS, f"the width divided by {PIXELS}")


class CharacterClassifier(TextImages):
    """The body: the mean of the frames of an image, with their height kept apart, and a linear head."""

    def __init__(self, *, num_classes: int, in_channels: int, masked: bool = False) -> None:
        super().__init__(in_channels, masked)
        self.head = nn.Linear(384, num_classes)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        frames = self.backbone(x, lengths)
        if lengths is None:
            return self.head(frames.mean(1))
        total = torch.where(_valid(frames, lengths), frames, 0).sum(1)
        return self.head(total / lengths[:, None].to(total.dtype))


class Context(nn.Module):
    """A bidirectional GRU of sequences padded at their end, whose padding it neither sees nor fills.

    Each direction runs by itself, the second over the frames of each sequence in reverse. The names are those of
    `torch.nn.GRU`, which no compiler follows.
    """

    def __init__(self, channels: int, hidden: int, num_layers: int, drop: float) -> None:
        super().__init__()
        self.hidden, self.num_layers = hidden, num_layers
        for i in range(num_layers):
            inputs = 2 * hidden if i else channels
            shapes: dict[str, tuple[int, ...]] = {"weight_ih": (3 * hidden, inputs), "weight_hh": (3 * hidden, hidden)}
            shapes |= {"bias_ih": (3 * hidden,), "bias_hh": (3 * hidden,)}
            for layer in (f"l{i}", f"l{i}_reverse"):
                for kind, shape in shapes.items():
                    start = torch.empty(shape).uniform_(-(hidden**-0.5), hidden**-0.5)
                    self.register_parameter(f"{kind}_{layer}", nn.Parameter(start))
        self.drop = Drop(drop)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        for i in range(self.num_layers):
            if i > 0:
                x = self.drop(x)
            back = _reversed(self._run(_reversed(x, lengths), f"l{i}_reverse"), lengths)
            x = torch.cat([self._run(x, f"l{i}"), back], -1)
        return x if lengths is None else torch.where(_valid(x, lengths), x, 0)

    def _run(self, x: Tensor, layer: str) -> Tensor:
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        values = [getattr(self, f"{kind}_{layer}") for kind in kinds]
        start = x.new_zeros(1, x.shape[0], self.hidden)  # len() would make a number of it in an exported program
        return torch.gru(x, start, values, True, 1, 0.0, False, False, True)[0]


def _valid(x: Tensor, lengths: Tensor) -> Tensor:
    """Which frames (N, T, 1) there are."""
    return (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None]


def _reversed(x: Tensor, lengths: Tensor | None) -> Tensor:
    if lengths is None:
        return x.flip(1)
    place = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
    place = torch.where(place < lengths[:, None], lengths[:, None] - 1 - place, place)
    return x.gather(1, place[..., None].expand_as(x))


class CTCRecognizer(TextImages):
    """The body: frames, each projected, seen in the context of all others, and classified; class 0 is no character.

    Args:
        masked: as in `CharacterBackbone`.
        dropout: between the two layers of the context.
    """

    def __init__(self, *, num_classes: int, in_channels: int, masked: bool = False, dropout: float = 0.1) -> None:
        super().__init__(in_channels, masked)
        self.projection = nn.Sequential(nn.Linear(384, 128), nn.ReLU())
        self.context = Context(128, 96, 2, dropout)
        self.head = nn.Linear(192, num_classes + 1)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        frames = self.context(self.projection(self.backbone(x, lengths)), lengths)
        return torch.log_softmax(self.head(frames), -1).transpose(0, 1)


# --- variants ----------------------------------------------------------------------------------------------------


def character_classifier(num_classes: int = 10, in_channels: int = 1, weights: Any = None, **options: Any) -> Model:
    """A classifier of single characters, 0.1 M parameters.

    Its ``backbone.`` is that of `ctc_recognizer`, so the parameters of one serve the other.

    Args:
        num_classes: outputs of the head.
        in_channels: channels of the images.
        weights: as for `resnet18`.
        options: ``masked``, as for `ctc_recognizer`.

    Returns:
        A model from images (N, C, 32, W) and, optionally, lengths (N,) to scores (N, K).

    Example:
        >>> import torch
        >>> from holofunc import models, random
        >>> model = models.character_classifier(num_classes=26)
        >>> params, buffers = model.init(random.key(0))
        >>> scores, _ = model.apply(params, buffers, torch.zeros(3, 1, 32, 24), torch.tensor([6, 5, 3]))
        >>> scores.shape
        torch.Size([3, 26])
    """
    return build_model("character_classifier", CharacterClassifier, num_classes, in_channels, weights, options)


def ctc_recognizer(num_classes: int = 10, in_channels: int = 1, weights: Any = None, **options: Any) -> Model:
    """A recognizer of lines of text for `holofunc.losses.ctc`: convolutions and a bidirectional GRU, 0.5 M parameters.

    Args:
        num_classes: characters of the alphabet; there is one class more, 0, for none.
        in_channels: channels of the images.
        weights: as for `resnet18`.
        options: ``masked``: a padded image gives exactly what it gives alone (False: its last frames see the padding
            through the convolutions, as in Holocron); ``dropout``: between the layers of the GRU, 0.1.

    Returns:
        A model from images (N, C, 32, W) and, optionally, lengths (N,), the widths of their texts divided by 4, to
        log-probabilities (W / 4, N, K + 1). What lies beyond a length is for no loss and no decoding to see.

    Example:
        >>> import torch
        >>> from holofunc import models, random
        >>> from holofunc.ops import ctc
        >>> model = models.ctc_recognizer(num_classes=10)
        >>> params, buffers = model.init(random.key(0))
        >>> lengths = torch.tensor([16, 9])
        >>> log_probs, _ = model.apply(params, buffers, torch.zeros(2, 1, 32, 64), lengths)
        >>> log_probs.shape
        torch.Size([16, 2, 11])
        >>> ctc.greedy_decode(log_probs, lengths).labels.shape
        torch.Size([2, 16])
    """
    return build_model("ctc_recognizer", CTCRecognizer, num_classes, in_channels, weights, options)
