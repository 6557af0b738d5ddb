"""AdamP: Adam without the part of an update that only makes weights longer."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import tree
from holofunc.compile import opaque
from holofunc.optim.adam import AdamState, adam_state
from holofunc.optim.base import GradientTransformation, MaybeParams, named_chain
from holofunc.optim.checks import need_params
from holofunc.optim.deprecation import moved_to_holocron
from holofunc.optim.labels import Mask, check_mask, mask_flags
from holofunc.optim.numerics import ABSENT, divisor, far_norm, root, scalar_dtype, shortening, squares_average
from holofunc.optim.ranges import check_count, check_decay, check_flags, check_nonnegative
from holofunc.optim.scalars import gains, value_at
from holofunc.optim.transforms import descend, moving_average, scale_by_learning_rate
from holofunc.typing import Params, PyTree, Scalar, Schedule

__all__ = ["adamp", "scale_by_adamp"]


def scale_by_adamp(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    *,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
    delta: Scalar = 0.1,
    wd_ratio: Scalar = 0.1,
    nesterov: bool = False,
    amsgrad: bool = False,
    views: tuple[str, ...] = ("channel", "layer"),
    absolute: bool = True,
    min_ndim: int = 2,
) -> GradientTransformation:
    """Adam's ``u``, projected where weights look scale-invariant, plus ``weight_decay * p``:

        cos = |<g, p>| / ((norm(g) + eps) * (norm(p) + eps))       # for each row of the view
        if max(cos) < delta / sqrt(length of a row):               # the first view for which this holds
            u = u - <u, p> * p / (norm(p) + eps)**2
            weight_decay = weight_decay * wd_ratio

    Args:
        b1, b2: in [0, 1).
        eps: added outside of the root, and to norms.
        weight_decay: decoupled; it belongs here because it depends on the projection.
        mask: True where weights decay; None is everywhere.
        delta: threshold of the cosine.
        wd_ratio: factor of the decay where the update was projected.
        nesterov: ``b1 * mu + (1 - b1) * g`` in place of ``mu``.
        amsgrad: divide by the root of the largest ``nu`` so far, debiased afterwards.
        views: what a row is: ``"channel"`` an index of the first axis, ``"layer"`` the whole tensor.
        absolute: False compares the cosine with its sign, as Holocron 0.3.0 does.
        min_ndim: tensors of fewer axes are left to Adam.

    Source: Heo et al., "AdamP" (arXiv 2006.08217), the authors' rule.
    """
    check_flags(nesterov=nesterov, amsgrad=amsgrad, absolute=absolute)
    check_decay(b1=b1, b2=b2)
    check_nonnegative(True, weight_decay=weight_decay)
    check_nonnegative(eps=eps, delta=delta, wd_ratio=wd_ratio)
    check_count(0, min_ndim=min_ndim)
    if not views or any(view not in ("channel", "layer") for view in views):
        raise ValueError(f"views must be some of 'channel' and 'layer', got {views!r}")
    projection = _Projection(tuple(views), absolute, min_ndim)

    def init(params: Params) -> AdamState:
        check_mask(mask, params)
        return adam_state(params, amsgrad)

    def update(updates: PyTree, state: AdamState, params: MaybeParams = None) -> tuple[PyTree, AdamState]:
        need_params(params, "scale_by_adamp")
        step = state.step + 1
        mu, nu = moving_average(updates, state.mu, b1), squares_average(updates, state.nu, b2)
        nu_max = tree.elementwise(torch.maximum, state.nu_max, nu) if amsgrad else ABSENT
        c1, c2 = gains(b1, b2, step, scalar_dtype(updates))
        first = moving_average(updates, mu, b1) if nesterov else mu
        u = tree.elementwise(lambda m, v: m * c1 / divisor(root(v, c2), eps), first, nu_max if amsgrad else nu)
        decay = value_at("weight_decay", weight_decay, state.step, updates)
        whole = u, updates, params, mask_flags(mask, params)
        numbers = decay, eps, delta, wd_ratio
        out = opaque(projection.of_leaves, *whole, *numbers)
        return out, AdamState(step, mu, nu, nu_max)

    return GradientTransformation(init, update)


class _Projection(NamedTuple):
    """What `scale_by_adamp` does with Adam's ``u``, given gradients, parameters, and which of these decay."""

    views: tuple[str, ...]
    absolute: bool
    min_ndim: int

    def of_leaves(self, *args: Any) -> PyTree:
        """Leaf by leaf, but for the numbers of channels."""
        (u, g, p, decays), (decay, *numbers) = (dict(tree.leaves_with_path(x)) for x in args[:4]), args[4:]
        done: dict[str, Tensor] = {}
        alike: dict[Any, list[str]] = {}
        for path, x in p.items():
            if x.ndim >= self.min_ndim and x.numel():
                alike.setdefault((x.device, *(t[path].dtype for t in (u, g, p))), []).append(path)
            else:
                done[path] = tree.upcast(u[path]) + decay * decays[path] * tree.upcast(x)
        for paths in alike.values():
            us, gs, ps = ([_by_channel(tree.upcast(t[path])) for path in paths] for t in (u, g, p))
            products = [[(x * y).sum(1) for x, y in zip(xs, ps, strict=True)] for xs in (us, gs)]
            # without squares of all elements; for the cosine, gradients may have any length whose square is finite
            of_gs, of_ps = ([far_norm(_channel_norms, x) for x in xs] for xs in (gs, ps))
            units = [shortening(x.amax(), 2.0**50) for x in of_gs]
            products[1] = [x * unit for x, unit in zip(products[1], units, strict=True)]
            squares = [(x * unit).square() for x, unit in zip(of_gs, units, strict=True)], [x.square() for x in of_ps]
            sums = [torch.cat(x) for x in (*products, *squares)]
            used = decay * sums[0].new_tensor([float(decays[path]) for path in paths])
            factor = self._factors(sums, [x.shape for x in ps], used, *numbers)
            for path, x, y, f in zip(paths, us, ps, factor.split([len(x) for x in ps]), strict=True):
                done[path] = torch.addcmul(x, y, f[:, None]).view(u[path].shape)
        return tree.rebuild(args[0], [done[path] for path in u])

    def _factors(
        self,
        sums: Sequence[Tensor],
        shapes: Sequence[torch.Size],
        decays: Tensor,
        eps: Scalar,
        delta: Scalar,
        wd_ratio: Scalar,
    ) -> Tensor:
        """What of ``p`` is added to ``u``: a scalar for each channel of leaves of ``shapes`` (channels, elements).

        ``sums`` are those of ``u * p``, ``g * p``, ``g * g`` and ``p * p`` over each channel.
        """
        like, counts = sums[0], [n for n, _ in shapes]
        leaves = torch.arange(len(counts), device=like.device)
        owner = leaves.repeat_interleave(torch.tensor(counts, device=like.device), output_size=sum(counts))

        def total(x: Tensor) -> Tensor:
            return x.new_zeros(len(counts)).index_add(0, owner, x)

        def most(x: Tensor) -> Tensor:
            return x.new_zeros(len(counts)).scatter_reduce(0, owner, x, "amax", include_self=False)

        along, kept = torch.zeros_like(like), torch.ones_like(decays)
        for view in reversed(self.views):
            channels = view == "channel"
            up, gp, gg, pp = sums if channels else [total(x) for x in sums]
            length = tree.safe_sqrt(pp) + eps
            cosine = (gp / ((tree.safe_sqrt(gg) + eps) * length)).detach()  # which only decides
            cosine = cosine.abs() if self.absolute else cosine
            cosine = most(cosine) if channels else cosine
            sizes = [float(n if channels else count * n) for count, n in shapes]
            invariant = cosine < delta / like.new_tensor(sizes).sqrt()
            part = up / length.square()
            along = torch.where(invariant[owner], part if channels else part[owner], along)
            kept = torch.where(invariant, wd_ratio, kept)
        return (decays * kept)[owner] - along


def _by_channel(x: Tensor) -> Tensor:
    return x.reshape(len(x) if x.ndim > 1 else 1, -1)


def _channel_norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1)


@moved_to_holocron(views=("channel", "layer"), absolute=True, min_ndim=2)
def adamp(
    learning_rate: Scalar | Schedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar | Schedule = 0.0,
    mask: Mask | None = None,
    delta: Scalar = 0.1,
    wd_ratio: Scalar = 0.1,
    nesterov: bool = False,
    amsgrad: bool = False,
    decoupled: bool = True,
) -> GradientTransformation:
    """Adam without the part of the update that only makes scale-invariant weights longer:
    ``p - learning_rate * (u + weight_decay * p)``, with both terms of `scale_by_adamp`.

    Args:
        learning_rate, weight_decay, mask: as `adamw`.
        b1, b2, eps, delta, wd_ratio, nesterov, amsgrad: as `scale_by_adamp`.
        decoupled: False adds the decay to the gradient, without ``wd_ratio``.

    Source: Heo et al. (arXiv 2006.08217), the authors' rule.

    Example:
        >>> import torch
        >>> from holofunc import optim
        >>> tx, params = optim.adamp(0.1), {"w": torch.tensor([[1.0, 0.0]])}
        >>> tx.update({"w": torch.tensor([[0.0, 1.0]])}, tx.init(params), params)[0]
        {'w': tensor([[-0.0000, -0.1000]])}
    """
    check_flags(decoupled=decoupled)
    rule = scale_by_adamp(
        b1,
        b2,
        eps,
        weight_decay=weight_decay if decoupled else 0.0,
        mask=mask,
        delta=delta,
        wd_ratio=wd_ratio,
        nesterov=nesterov,
        amsgrad=amsgrad,
    )
    if decoupled:
        return named_chain(adamp=rule, learning_rate=scale_by_learning_rate(learning_rate))
    return descend(learning_rate, weight_decay, mask, decoupled=False, adamp=rule)
