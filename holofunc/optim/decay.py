"""Weight decay by other laws: cautious, corrected, independent of the learning rate."""

import torch
from torch import Tensor

from holofunc.optim.base import GradientTransformation
from holofunc.optim.checks import check_function
from holofunc.optim.labels import Mask
from holofunc.optim.ranges import check_nonnegative, check_positive
from holofunc.optim.transforms import decaying
from holofunc.typing import Scalar, Schedule

__all__ = ["add_cautious_decay", "corrected_decay", "decay_independently"]


def add_cautious_decay(weight_decay: Scalar | Schedule, mask: Mask | None = None) -> GradientTransformation:
    """``u + weight_decay * p`` where ``u * p >= 0``, that is where the update shrinks the weight too; ``u`` elsewhere.

    Stands where `add_decayed_weights` does, between rule and learning rate.

    Args:
        weight_decay, mask: as `add_decayed_weights`.

    Source: Chen et al., "Cautious weight decay" (arXiv 2510.12402).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> params, grads = {"w": torch.full((2,), 10.0)}, {"w": torch.tensor([1.0, -1.0])}
        >>> optim.add_cautious_decay(0.1).update(grads, optim.EmptyState(), params)[0]
        {'w': tensor([ 2., -1.])}
    """

    def decayed(u: Tensor, p: Tensor, decay: Tensor | float) -> Tensor:
        return u + decay * torch.where(u * p >= 0, p, torch.zeros_like(p))

    return decaying("add_cautious_decay", decayed, weight_decay, mask)


def decay_independently(weight_decay: Scalar | Schedule, mask: Mask | None = None) -> GradientTransformation:
    """``u - weight_decay * p`` at the end of a chain, behind the learning rate: weights decay by the same share in each
    update, whatever the rate is.

    Args:
        weight_decay, mask: as `add_decayed_weights`; the former is the share.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization" (arXiv 1711.05101), whose rule this is with a
    constant schedule multiplier; Wortsman et al., "Small-scale proxies" (arXiv 2309.14322).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.chain(optim.adam(0.1), optim.decay_independently(0.01)), {"w": torch.full((1,), 10.0)}
        >>> tx.update({"w": torch.ones(1)}, tx.init(params), params)[0]
        {'w': tensor([-0.2000])}
    """
    return decaying("decay_independently", lambda u, p, decay: u - decay * p, weight_decay, mask)


def corrected_decay(weight_decay: Scalar, learning_rate: Schedule, max_learning_rate: float) -> Schedule:
    """The schedule ``weight_decay * learning_rate(step) / max_learning_rate``, for ``weight_decay=`` of any optimizer.

    Decoupled decay shrinks weights by ``rate * decay``, updates move them by ``rate``: where these are in balance, the
    norm of the weights is that of ``sqrt(rate / decay)``, and grows at the end of a falling schedule unless the decay
    falls likewise.

    Args:
        weight_decay: that of the greatest rate.
        learning_rate: the schedule of the optimizer.
        max_learning_rate: its greatest value.

    Source: Defazio, "Why gradients rapidly increase near the end of training" (arXiv 2506.02285).

    Example:
        >>> from holofunc import optim
        >>> rate = optim.schedules.cosine(0.01, 100)
        >>> tx = optim.adamw(rate, weight_decay=optim.corrected_decay(0.1, rate, 0.01))
    """
    check_nonnegative(weight_decay=weight_decay)
    check_function(learning_rate=learning_rate)
    check_positive(max_learning_rate=max_learning_rate)
    return lambda count: weight_decay * learning_rate(count) / max_learning_rate
