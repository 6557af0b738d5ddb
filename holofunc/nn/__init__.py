"""Layers as module skeletons, their functional forms, and how their parameters start."""

from holofunc.nn import init

__all__ = ["init"]
