"""Shared by all families: input checks, convolution with normalization, and building a model."""

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
    """A module whose input is images of shape (N, ``in_channels``, H, W).

    Attributes:
        heads: paths of the layers that depend on the number of classes; empty if that is only the last layer.
    """

    heads: tuple[str, ...] = ()

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels

    def check_input(self, *inputs: Any) -> None:
        """Called by `Model.apply` before the forward pass; reads no values.

        Raises:
            TypeError: the input is not a floating-point tensor. ValueError: its shape is wrong, or the batch is empty.
        """
        (x,) = inputs
        if not isinstance(x, Tensor):
            raise TypeError(f"images must be a tensor of shape (N, {self.in_channels}, H, W), got {type(x).__name__}")
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"images must have shape (N, {self.in_channels}, H, W), got {tuple(x.shape)}")
        if x.shape[0] == 0:
            raise ValueError(f"images must hold at least one image, got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"images must be floating point (data.Batches converts uint8 images), got {x.dtype}")


class Classifier(Images):
    """Feature maps, global average pooling and a head."""

    def __init__(self, in_channels: int, features: nn.Module, head: nn.Module) -> None:
        super().__init__(in_channels)
        self.features = features
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def image_channels(module: nn.Module, default: int | None = None) -> int:
    """The number of image channels of a module: its ``in_channels``, or that of its first convolution.

    Raises:
        ValueError: there is no convolution and no default.
    """
    known = getattr(module, "in_channels", None)
    convs = (m.in_channels for m in module.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)))
    channels = known if isinstance(known, int) else next(convs, default)
    if channels is None:
        raise ValueError(f"{type(module).__name__} has no convolution from which to infer the number of image channels")
    return channels


def is_sequence(module: nn.Module) -> bool:
    """Whether a module only runs its children one after the other."""
    return type(module).forward is nn.Sequential.forward


def conv_bn(
    channels: int, out: int, kernel_size: int, stride: int = 1, *, groups: int = 1, dilation: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A convolution without bias that keeps the size at stride 1, and a BatchNorm."""
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
    """Make a model of a body, initialized by `holofunc.nn.init.kaiming`.

    Args:
        name: of the constructor.
        body: called as ``body(num_classes=..., in_channels=..., **options)``.
        num_classes: outputs of the head.
        in_channels: channels of the images.
        weights: None, or an argument of `holofunc.models.weights.resolve`.
        options: of the body; also ``new_head`` (load all weights except the head's) and, for residual bodies,
            ``zero_init_residual`` (zero the last normalization of each block; arXiv 1706.02677, 5.1).
        make: the class of the model.
        small: names of weights that are initialized with a standard deviation of 0.01 instead.

    Raises:
        ValueError: ``num_classes`` or ``in_channels`` is below 1. TypeError: the body has no such option.
    """
    check_counts(num_classes=num_classes, in_channels=in_channels)
    options = dict(options)
    new_head = options.pop("new_head", False)
    if new_head and weights is None:
        raise ValueError(f"new_head=True loads everything but the head: weights must be given, got None ({name})")
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
            hint = ": use weights=" if unknown[1] == "'pretrained'" else ""
            raise TypeError(f"models.{name} has no option {unknown[1]}{hint}") from None

    model = make(build, initialize=initialize, name=name)
    return model if weights is None else pretrained(model, resolve(weights, name), new_head=new_head)
