"""Model constructors, one file per family."""

from holofunc.models.resnet import (
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet50d,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
)

__all__ = [
    "ResNet",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet50d",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
]
