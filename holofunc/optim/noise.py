"""Gradient noise: Gaussian noise whose variance falls."""

from typing import NamedTuple

from torch import Tensor

from holofunc import random, tree
from holofunc.optim.base import GradientTransformation
from holofunc.optim.capabilities import KeepsProgress
from holofunc.optim.deprecation import renamed
from holofunc.optim.numerics import in_shapes_of, scalar_dtype
from holofunc.optim.ranges import check_nonnegative
from holofunc.optim.scalars import own_key, zero_count
from holofunc.typing import Key, PyTree, Scalar

__all__ = ["NoiseState", "add_noise"]


class _Noise(NamedTuple):
    step: Tensor
    key: Key


class NoiseState(_Noise, KeepsProgress):
    """Updates so far, and the key that the noise of all updates derives from."""

    __slots__ = ()


@renamed(first="key")
def add_noise(eta: Scalar, gamma: Scalar = 0.55, *, key: Key) -> GradientTransformation:
    """Gaussian noise of variance ``eta / (1 + step)**gamma`` on each element.

    Args:
        key: the noise is a function of it, of the number of the update and of the paths.
        eta: variance of the first noise.
        gamma: how fast the variance falls.

    Source: Neelakantan et al., "Adding gradient noise improves learning" (arXiv 1511.06807).
    """
    check_nonnegative(eta=eta, gamma=gamma)
    random.check_key(key)

    def update(updates: PyTree, state: NoiseState) -> tuple[PyTree, NoiseState]:
        dtype = scalar_dtype(updates)
        std = (eta / (1 + state.step.to(dtype)) ** gamma) ** 0.5
        draws = std * random.normal(random.fold_in(state.key, state.step), (tree.size(updates),), dtype=dtype)
        pairs = zip(tree.leaves(updates), tree.leaves(in_shapes_of(draws, updates)), strict=True)
        noisy = tree.rebuild(updates, [tree.upcast(u) + noise for u, noise in pairs])
        return noisy, NoiseState(state.step + 1, state.key)

    return GradientTransformation(lambda params: NoiseState(zero_count(params), own_key(key, params)), update)
