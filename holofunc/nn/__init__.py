"""Layers as module skeletons, their functional forms, and how their parameters start."""

from holofunc.nn import functional, init
from holofunc.nn.activation import FReLU, HardMish, NLReLU
from holofunc.nn.attention import SAM, TripletAttention
from holofunc.nn.conv import PyConv2d
from holofunc.nn.downsample import SPP, BlurPool2d, ConcatDownsample2d, GlobalAvgPool2d, GlobalMaxPool2d, ZPool
from holofunc.nn.dropout import DropBlock2d, Dropout, DropPath

__all__ = [
    "SAM",
    "SPP",
    "BlurPool2d",
    "ConcatDownsample2d",
    "DropBlock2d",
    "DropPath",
    "Dropout",
    "FReLU",
    "GlobalAvgPool2d",
    "GlobalMaxPool2d",
    "HardMish",
    "NLReLU",
    "PyConv2d",
    "TripletAttention",
    "ZPool",
    "functional",
    "init",
]
