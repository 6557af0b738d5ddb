"""Layers as modules, their functional forms, and parameter initialization."""

from holofunc.nn import functional, init
from holofunc.nn.activation import FReLU, HardMish, NLReLU
from holofunc.nn.attention import SAM, LambdaLayer, TripletAttention
from holofunc.nn.conv import Add2d, Involution2d, NormConv2d, PyConv2d, SlimConv2d
from holofunc.nn.downsample import SPP, BlurPool2d, ConcatDownsample2d, GlobalAvgPool2d, GlobalMaxPool2d, ZPool
from holofunc.nn.downsample import ConcatDownsample2dJit as ConcatDownsample2dJit
from holofunc.nn.dropout import DropBlock2d, Dropout, DropPath

__all__ = [
    "SAM",
    "SPP",
    "Add2d",
    "BlurPool2d",
    "ConcatDownsample2d",
    "DropBlock2d",
    "DropPath",
    "Dropout",
    "FReLU",
    "GlobalAvgPool2d",
    "GlobalMaxPool2d",
    "HardMish",
    "Involution2d",
    "LambdaLayer",
    "NLReLU",
    "NormConv2d",
    "PyConv2d",
    "SlimConv2d",
    "TripletAttention",
    "ZPool",
    "functional",
    "init",
]
