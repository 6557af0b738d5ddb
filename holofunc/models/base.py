"""What the families share: the check of their images, convolution with normalization, and how a model is made."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from holofunc.model import ChecksInput, Model
from holofunc.models.weights import pretrained, resolve
from holofunc.nn.init import kaiming
from holofunc.ops.checks import check_counts
from holofunc.typing import Key, Params

__all__ = ["Classifier", "Images", "build_model", "conv_bn", "image_channels", "is_sequence"]


class Images(ChecksInput):
    """A skeleton that takes images of shape (N, ``in_channels``, H, W).

    Attributes:
        heads: paths of the layers that depend on the number of classes, where that is not the last layer alone.
    """

    heads: tuple[str, ...] = ()

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels

    def check_input(self, *inputs: Any) -> None:
        """Called by `Model.apply` before the forward pass; reads no values.

        Raises:
            TypeError: no floating tensor. ValueError: another rank, number of channels, or no images.
        """
        (x,) = inputs
        if not isinstance(x, Tensor):
            raise TypeError(f"images must be a tensor of shape (N, {self.in_channels}, H, W), got {type(x).__name__}")
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"images must have shape (N, {self.in_channels}, H, W), got {tuple(x.shape)}")
        if x.shape[0] == 0:
            raise ValueError(f"images must hold at least one image, got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"images must be floating (uint8 images are scaled by data.Batches), got {x.dtype}")


class Classifier(Images):
    """Feature maps, averaged over the image, and a head: what most families are."""

    def __init__(self, in_channels: int, features: nn.Module, head: nn.Module) -> None:
        super().__init__(in_channels)
        self.features = features
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def image_channels(module: nn.Module, default: int | None = None) -> int:
    """How many channels the images have that a module takes: its ``in_channels``, else the first convolution's.

    Raises:
        ValueError: there is no convolution, and no default.
    """
    known = getattr(module, "in_channels", None)
    convs = (m.in_channels for m in module.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)))
    channels = known if isinstance(known, int) else next(convs, default)
    if channels is None:
        raise ValueError(f"{type(module).__name__} has no convolution that tells how many channels its images have")
    return channels


def is_sequence(module: nn.Module) -> bool:
    """Whether a module does nothing but run its children one after the other."""
    return type(module).forward is nn.Sequential.forward


def conv_bn(
    channels: int, out: int, kernel_size: int, stride: int = 1, *, groups: int = 1, dilation: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A convolution that keeps the size (at stride 1), without bias, and its normalization."""
    padding = dilation * (kernel_size // 2)
    conv = nn.Conv2d(channels, out, kernel_size, stride, padding, dilation, groups, bias=False)
    return conv, nn.BatchNorm2d(out)


def build_model(
    name: str,
    body: Callable[..., nn.Module],
    num_classes: int,
    in_channels: int,
    weights: Any,
    options: Mapping[str, Any],
    *,
    make: Callable[..., Model] = Model,
    small: Sequence[str] = (),
) -> Model:
    """The model of a body: convolutions start as in `holofunc.nn.init.kaiming`.

    Args:
        name: of the constructor.
        body: called as ``body(num_classes=..., in_channels=..., **options)``.
        num_classes: outputs of the head.
        in_channels: channels of the images.
        weights: None, or what `holofunc.models.weights.resolve` takes.
        options: the body's; ``new_head`` (load all weights but the head's); for bodies of residual blocks
            ``zero_init_residual``: start the last normalization of each block at zero (arXiv 1706.02677, 5.1).
        make: the class of the model.
        small: names of weights that start with a standard deviation of 0.01 instead.

    Raises:
        ValueError: ``num_classes`` or ``in_channels`` below 1. TypeError: an option the body does not have.
    """
    check_counts(num_classes=num_classes, in_channels=in_channels)
    options = dict(options)
    new_head = options.pop("new_head", False)
    if new_head and weights is None:
        raise ValueError(f"new_head=True keeps everything but the head of some weights: weights must be given ({name})")
    if not hasattr(body, "zero_init_names") and "zero_init_residual" in options:
        raise TypeError(f"models.{name} has no option 'zero_init_residual'")
    zero_init = options.pop("zero_init_residual", False)

    def initialize(skeleton: nn.Module, key: Key) -> Params:
        params = kaiming(skeleton, key)
        params.update({n: params[n] * (0.01 / params[n].std()) for n in small})
        if zero_init:
            params.update({n: torch.zeros_like(params[n]) for n in skeleton.zero_init_names()})  # type: ignore[operator]
        return params

    def build() -> nn.Module:
        try:
            return body(num_classes=num_classes, in_channels=in_channels, **options)
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument ('\w+')", str(error))
            if unknown is None:
                raise
            hint = ": weights= takes what to load" if unknown[1] == "'pretrained'" else ""
            raise TypeError(f"models.{name} has no option {unknown[1]}{hint}") from None

    model = make(build, initialize=initialize, name=name)
    return model if weights is None else pretrained(model, resolve(weights, name), new_head=new_head)
