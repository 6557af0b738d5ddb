"""Optimizers between Adam and the newest: ADOPT, ACProp, MADGRAD, MARS, simplified AdEMAMix, SM3, GaLore, Sophia."""

from holofunc.optim.adam import scale_by_adam
from holofunc.optim.adan import scale_by_simplified_ademamix
from holofunc.optim.adopt import reduce_variance, scale_by_acprop, scale_by_adopt, scale_by_madgrad
from holofunc.optim.base import GradientTransformation, named_chain
from holofunc.optim.galore import scale_by_galore, scale_by_sm3
from holofunc.optim.labels import Mask
from holofunc.optim.numerics import check_decay, is_zero
from holofunc.optim.optimizers import descend
from holofunc.optim.sophia import scale_by_sophia
from holofunc.optim.transforms import add_decayed_weights, ema
from holofunc.typing import Key, Scalar, Schedule

__all__ = ["acprop", "adopt", "galore", "madgrad", "mars", "simplified_ademamix", "sm3", "sophia"]


def adopt(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.9999,
    eps: Scalar = 1e-6,
    clip: bool = True,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Adam whose gradient is divided before it is averaged, by a root that has not seen it:

        mu = b1 * mu + (1 - b1) * clip(g / max(sqrt(nu), eps), count**0.25)
        p = p - learning_rate * (mu + weight_decay * p)
        nu = b2 * nu + (1 - b2) * g**2                         # the first gradient sets nu, and moves nothing

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        b1, b2, eps, clip: of `scale_by_adopt`.
        weight_decay: decoupled.
        mask: True where weights decay; None is everywhere.

    Source: Taniguchi et al. (arXiv 2411.02853).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.adopt(0.1), {"w": torch.ones(1)}
        >>> first, state = tx.update({"w": torch.ones(1)}, tx.init(params), params)
        >>> first, tx.update({"w": torch.ones(1)}, state, params)[0]
        ({'w': tensor([-0.])}, {'w': tensor([-0.0100])})
    """
    return descend(learning_rate, weight_decay, mask, decoupled=True, adopt=scale_by_adopt(b1, b2, eps, clip=clip))


def acprop(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """The gradient over the root of the variance before it:

        p = p - learning_rate * (g / (sqrt(nu_hat) + eps) + weight_decay * p)              # at first without g
        mu = b1 * mu + (1 - b1) * g
        nu = b2 * nu + (1 - b2) * (g - mu)**2

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        b1, b2, eps: of `scale_by_acprop`.
        weight_decay: decoupled.
        mask: True where weights decay; None is everywhere.

    Source: Zhuang et al. (arXiv 2110.05454).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.acprop(0.1, b1=0.5), {"w": torch.ones(1)}
        >>> first, state = tx.update({"w": torch.ones(1)}, tx.init(params), params)
        >>> first, tx.update({"w": torch.ones(1)}, state, params)[0]
        ({'w': tensor([-0.])}, {'w': tensor([-0.2000])})
    """
    return descend(learning_rate, weight_decay, mask, decoupled=True, acprop=scale_by_acprop(b1, b2, eps))


def madgrad(
    learning_rate: Scalar | Schedule,
    *,
    momentum: Scalar = 0.9,
    eps: Scalar = 1e-6,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Dual averaging under a cube root:

        g = g + weight_decay * p,  rate = learning_rate * sqrt(count)
        total = total + rate * g,  squares = squares + rate * g**2
        p = momentum * p + (1 - momentum) * (start - total / (cbrt(squares) + eps))

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        momentum, eps: of `scale_by_madgrad`.
        weight_decay: L2 regularisation; the authors use less of it than with others, often none.
        mask: True where weights decay; None is everywhere.

    Source: Defazio and Jelassi (arXiv 2101.11075).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.madgrad(0.001, momentum=0.0, eps=0.0), {"w": torch.ones(1)}
        >>> tx.update({"w": torch.ones(1)}, tx.init(params), params)[0]
        {'w': tensor([-0.0100])}
    """
    rule = scale_by_madgrad(learning_rate, momentum, eps)
    return named_chain(weight_decay=add_decayed_weights(weight_decay, mask), madgrad=rule)


def mars(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.95,
    b2: Scalar = 0.99,
    gamma: Scalar = 0.025,
    eps: Scalar = 1e-8,
    max_norm: Scalar = 1.0,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """MARS-AdamW: Adam of gradients that are corrected by the one before:

        c = g + gamma * b1 / (1 - b1) * (g - previous),  shortened to max_norm for each tensor
        mu = b1 * mu + (1 - b1) * c
        nu = b2 * nu + (1 - b2) * c**2
        p = p - learning_rate * (mu_hat / (sqrt(nu_hat) + eps) + weight_decay * p)

    ``named_chain(variance=reduce_variance(), lion=scale_by_lion(0.95), ...)`` is MARS-Lion, and so on.

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        b1, b2, eps: of `scale_by_adam`.
        gamma, max_norm: of `reduce_variance`.
        weight_decay: decoupled.
        mask: True where weights decay; None is everywhere.

    Source: Yuan et al. (arXiv 2411.10438), algorithm 2, approximate.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.mars(0.1), {"w": torch.ones(1)}
        >>> tx.update({"w": torch.ones(1)}, tx.init(params), params)[0]
        {'w': tensor([-0.1000])}
    """
    rules = {"variance": reduce_variance(b1, gamma, max_norm=max_norm), "adam": scale_by_adam(b1, b2, eps)}
    return descend(learning_rate, weight_decay, mask, decoupled=True, **rules)


def simplified_ademamix(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar | Schedule = 0.99,
    b2: Scalar = 0.95,
    alpha: Scalar | Schedule = 0.0,
    eps: Scalar = 1e-8,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """AdEMAMix with one sum for both of its averages:

        total = b1 * total + g
        nu = b2 * nu + (1 - b2) * g**2
        p = p - learning_rate * ((total + alpha * g) / (sqrt(nu_hat) + eps) + weight_decay * p)

    Args:
        learning_rate: a number, a 0-d tensor or a schedule; ``1 - b1`` times that of `adamw`.
        b1, b2, alpha, eps: of `scale_by_simplified_ademamix`.
        weight_decay: decoupled.
        mask: True where weights decay; None is everywhere.

    Source: Morwani et al. (arXiv 2502.02431).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.simplified_ademamix(0.1, alpha=2.0), {"w": torch.ones(1)}
        >>> tx.update({"w": torch.ones(1)}, tx.init(params), params)[0]
        {'w': tensor([-0.3000])}
    """
    rule = scale_by_simplified_ademamix(b1, b2, alpha, eps)
    return descend(learning_rate, weight_decay, mask, decoupled=True, simplified_ademamix=rule)


def sm3(
    learning_rate: Scalar | Schedule,
    *,
    momentum: Scalar = 0.9,
    decay: Scalar | None = None,
    eps: Scalar = 1e-8,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Adagrad that keeps one number per row and column, and a moving average of its updates:

        nu = min(rows[:, None], columns[None, :]) + g**2
        rows, columns = max(nu, columns), max(nu, rows)
        mu = momentum * mu + (1 - momentum) * g / (sqrt(nu) + eps)
        p = p - learning_rate * (mu + weight_decay * p)

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        momentum: of the average, in [0, 1). The Python number 0 keeps none, and with it hardly any state.
        decay, eps: of `scale_by_sm3`.
        weight_decay: decoupled.
        mask: True where weights decay; None is everywhere.

    Source: Anil et al. (arXiv 1901.11150).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.sm3(0.1, momentum=0.0), {"w": torch.ones(2, 2)}
        >>> tx.update({"w": torch.tensor([[3.0, 0.0], [4.0, 0.0]])}, tx.init(params), params)[1]["sm3"].bounds
        {'w/0': tensor([ 9., 16.]), 'w/1': tensor([16.,  0.])}
    """
    check_decay(momentum=momentum)
    rules = {"sm3": scale_by_sm3(decay, eps)}
    if not is_zero(momentum):
        rules["momentum"] = ema(momentum, debias=False)
    return descend(learning_rate, weight_decay, mask, decoupled=True, **rules)


def galore(
    learning_rate: Scalar | Schedule,
    *,
    rank: int = 128,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    scale: Scalar = 0.25,
    update_every: int = 200,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Adam of gradients projected to a low rank:

        r = Q.T @ g                                            # Q: the first rank left singular vectors of a g
        u = scale * Q @ (mu_hat / (sqrt(nu_hat) + eps))        # mu and nu of r
        p = p - learning_rate * (u + weight_decay * p)

    Args:
        learning_rate: a number, a 0-d tensor or a schedule.
        rank, b1, b2, eps, scale, update_every: of `scale_by_galore`.
        weight_decay: decoupled.
        mask: True where weights decay; None is everywhere.

    Source: Zhao et al. (arXiv 2403.03507).

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.galore(0.1, rank=2, scale=1.0), {"w": torch.ones(4, 50)}
        >>> {name: tuple(m.shape) for name, m in tx.init(params)["galore"].mu.items()}
        {'w': (2, 50)}
    """
    rule = scale_by_galore(rank, b1=b1, b2=b2, eps=eps, scale=scale, update_every=update_every)
    return descend(learning_rate, weight_decay, mask, decoupled=True, galore=rule)


def sophia(
    learning_rate: Scalar | Schedule,
    *,
    key: Key,
    b1: Scalar = 0.96,
    b2: Scalar = 0.99,
    eps: Scalar = 1e-12,
    gamma: Scalar = 0.01,
    clip_threshold: Scalar = 1.0,
    update_every: int = 10,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Momentum over the diagonal of the Hessian, clipped; ``update`` needs ``grad_fn=``:

        mu = b1 * mu + (1 - b1) * g
        hessian = b2 * hessian + (1 - b2) * estimate           # every update_every updates
        u = clip(mu / max(gamma * hessian, eps), clip_threshold)
        p = p - learning_rate * (u + weight_decay * p)

    Args:
        learning_rate: a number, a 0-d tensor or a schedule; no element moves further than ``clip_threshold`` times it.
        key, b1, b2, eps, gamma, clip_threshold, update_every: of `scale_by_sophia`.
        weight_decay: decoupled.
        mask: True where weights decay; None is everywhere.

    Source: Liu et al. (arXiv 2305.14342).

    Example:
        >>> import torch
        >>> from holofunc import optim, random
        >>> grad_fn = torch.func.grad(lambda params: (params["w"] ** 2).sum())
        >>> tx, params = optim.sophia(0.1, key=random.key(0)), {"w": torch.ones(1)}
        >>> updates, state = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
        >>> updates, state["sophia"].hessian
        ({'w': tensor([-0.1000])}, {'w': tensor([0.0200])})
    """
    rule = scale_by_sophia(key, b1, b2, eps, gamma=gamma, clip_threshold=clip_threshold, update_every=update_every)
    return descend(learning_rate, weight_decay, mask, decoupled=True, sophia=rule)
