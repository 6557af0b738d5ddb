"""Curvature of a loss as matrix-free linear maps: products, traces and diagonals."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from holofunc import random, tree
from holofunc.analysis.mapped import check_real, floats, jvp, unfused, value, with_floats
from holofunc.analysis.samples import EvalMode, sample_losses
from holofunc.train.objective import Supervised, pair, run_model
from holofunc.typing import Batch, Buffers, Key, Objective, Params, Scalar

__all__ = [
    "as_linear_operator",
    "curvature",
    "hessian_diagonal",
    "hessian_trace",
    "hvp",
    "sharpness",
]

Kind = Literal["hessian", "ggn", "fisher"]
KINDS = ("hessian", "ggn", "fisher")


def hvp(
    objective: Objective,
    params: Params,
    buffers: Buffers,
    batch: Batch,
    v: Params,
    *,
    kind: Kind = "hessian",
    key: Key | None = None,
) -> Params:
    """The product of a curvature matrix and a direction, without the matrix.

    - ``"hessian"``: second derivatives of the loss. Forward over reverse: 2 to 3 batch gradients. Of an objective in
      fp16 they are taken in fp32: gradients that are scaled within a network have no derivatives of their own.
    - ``"ggn"``: ``J.T @ H @ J`` with the Jacobian J of the outputs and the second derivatives H of the loss by the
      outputs. Positive semi-definite for convex losses, and equal to the Fisher matrix of a softmax or Gaussian
      model. Needs an objective of `holofunc.train.supervised`. 1.5 to 2.5 gradients.
    - ``"fisher"``: the empirical Fisher matrix, the mean of ``g @ g.T`` over the samples' gradients g. 2 gradients.

    Args:
        objective: as in training. BatchNorm in train mode is part of the function (for ``"fisher"``, in a supervised
            objective).
        params: where to look.
        buffers: statistics.
        batch: N samples.
        v: the direction, of the structure of ``params``.
        kind: which matrix.
        key: for an objective that draws; the same draws in every product.

    Raises:
        ValueError: an unknown kind; a direction of another structure; an objective that ``"ggn"`` cannot take apart; a
            layer without forward derivatives (recurrent layers; RoI pooling of torchvision).

    Source: Pearlmutter, "Fast exact multiplication by the Hessian" (1994); Schraudolph, "Fast curvature matrix-vector
        products" (2002).

    Example:
        >>> import torch
        >>> from holofunc import analysis
        >>> def objective(params, buffers, batch, key):
        ...     return (params["w"] ** 3).sum(), None
        >>> w = {"w": torch.tensor([1.0, 2.0])}
        >>> analysis.hvp(objective, w, {}, torch.zeros(1), {"w": torch.ones(2)})  # 6 w v
        {'w': tensor([ 6., 12.])}
    """
    return curvature(objective, params, buffers, batch, kind=kind, key=key)(v)


def curvature(
    objective: Objective,
    params: Params,
    buffers: Buffers,
    batch: Batch,
    *,
    kind: Kind = "hessian",
    key: Key | None = None,
) -> Callable[[Params], Params]:
    """`hvp` as a function of the direction: ``v -> matrix @ v``.

    Example:
        >>> import torch
        >>> from holofunc import analysis
        >>> loss = lambda params, buffers, batch, key: ((batch @ params["w"]).square().mean(), None)
        >>> product = analysis.curvature(loss, {"w": torch.zeros(2)}, {}, torch.eye(2))
        >>> product({"w": torch.tensor([1.0, 2.0])})
        {'w': tensor([1., 2.])}
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    if kind == "ggn" and not isinstance(objective, Supervised):
        raise ValueError(
            "kind='ggn' needs the outputs and the loss apart: objective must come from train.supervised, got "
            f"{objective!r}; kind='hessian' and 'fisher' take any"
        )
    check_real(params)
    params = {name: params[name] for name in params}  # a plain dict, like v, in compiled code too
    makers: dict[str, Callable[..., Any]] = {"hessian": _hessian, "ggn": _ggn, "fisher": _fisher}
    product = makers[kind](objective, params, buffers, batch, key)

    def checked(v: Params) -> Params:
        wrong = [n for n in sorted({*params, *v}) if n not in params or n not in v or not _alike(params[n], v[n])]
        if wrong:
            raise ValueError(f"v must have the names, shapes and dtypes of params, which it has not at {wrong[:8]}")
        try:
            return product({name: v[name] for name in params})
        except (NotImplementedError, RuntimeError) as error:
            if "forward AD" not in str(error) and "forward mode" not in str(error):
                raise
            raise ValueError(f"a layer has no forward derivative, which curvature needs: {error}") from error

    return checked


def _alike(p: Tensor, v: Tensor) -> bool:
    return (p.shape, p.dtype) == (v.shape, v.dtype)


def _hessian(objective: Objective, params: Params, buffers: Buffers, batch: Batch, key: Key | None) -> Any:
    if isinstance(objective, Supervised) and not isinstance(objective, EvalMode) and objective.gradient_scale != 1:
        objective = dataclasses.replace(objective, precision="fp32")  # what scales gradients has no second derivatives
    gradient = torch.func.grad(lambda params: value(objective, params, buffers, batch, key))
    return lambda v: jvp(gradient, params, v)[1]


def _ggn(objective: Supervised, params: Params, buffers: Buffers, batch: Batch, key: Key | None) -> Any:
    images, targets = pair(batch)
    train = not isinstance(objective, EvalMode)

    def outputs(params: Params) -> tuple[list[Tensor], Any]:
        with unfused():
            out = run_model(objective.model, objective.precision, params, buffers, images, train=train, key=key)[0]
        return floats(out), out

    def product(v: Params) -> Params:
        _, along = jvp(lambda params: outputs(params)[0], params, v)
        values, pull, out = torch.func.vjp(outputs, params, has_aux=True)  # type: ignore[misc]

        def loss(values: list[Tensor]) -> Tensor:
            return objective.criterion(with_floats(out, values), targets, key if train else None)[0]

        _, bent = jvp(torch.func.grad(loss), values, along)
        return pull(bent)[0]

    return product


def _fisher(objective: Objective, params: Params, buffers: Buffers, batch: Batch, key: Key | None) -> Any:
    def losses(params: Params) -> Tensor:
        with unfused():
            return sample_losses(objective, params, buffers, batch, key)[0]

    def product(v: Params) -> Params:
        _, along = jvp(losses, params, v)
        values, pull, *_ = torch.func.vjp(losses, params)
        return pull(along / len(values))[0]

    return product


# --- estimates -----------------------------------------------------------------------------------------------------


def hessian_trace(
    objective: Objective,
    params: Params,
    buffers: Buffers,
    batch: Batch,
    *,
    key: Key,
    probes: int = 16,
    method: Literal["hutchinson", "hutch++"] = "hutchinson",
    kind: Kind = "hessian",
) -> Tensor:
    """An unbiased estimate of the trace, a 0-d tensor, from ``probes`` products.

    Args:
        objective: as for `hvp`.
        params: where to look.
        buffers: statistics.
        batch: N samples.
        key: of the probes, vectors of random signs, and of an objective that draws.
        probes: products to spend, at least 1 (3 for Hutch++).
        method: ``"hutchinson"`` averages ``z @ H @ z``, with an error of about ``sqrt(2 / probes) * ||H||_F``;
            ``"hutch++"`` spends a third of the probes on the largest eigenvalues, whose trace is then exact, and needs
            far fewer where these dominate. It keeps a third of the probes as vectors in memory.
        kind: as for `hvp`.

    Source: Hutchinson (1990); Meyer et al., "Hutch++: optimal stochastic trace estimation" (SOSA 2021).

    Example:
        >>> import torch
        >>> from holofunc import analysis, random
        >>> loss = lambda params, buffers, batch, key: (params["w"].square().sum(), None)
        >>> analysis.hessian_trace(loss, {"w": torch.ones(5)}, {}, torch.zeros(1), key=random.key(0), probes=2)
        tensor(10.)
    """
    least = {"hutchinson": 1, "hutch++": 3}
    if method not in least:
        raise ValueError(f"method must be 'hutchinson' or 'hutch++', got {method!r}")
    if probes < least[method]:
        raise ValueError(f"probes must be at least {least[method]} for {method}, got {probes}")
    multiply = flat_product(curvature(objective, params, buffers, batch, kind=kind, key=key), params)
    if method == "hutchinson":
        signs = flat_signs(key, params, probes)
        return torch.stack([z @ multiply(z) for z in signs]).mean()
    third = probes // 3
    sketch, signs = (
        flat_signs(k, params, n) for k, n in zip(random.split(key), (third, probes - 2 * third), strict=True)
    )
    basis = torch.linalg.qr(torch.stack([multiply(z) for z in sketch], 1))[0]
    exact = torch.stack([q @ multiply(q) for q in basis.unbind(1)]).sum()
    rests = [z - basis @ (basis.mT @ z) for z in signs]
    return exact + torch.stack([z @ multiply(z) for z in rests]).mean()


def hessian_diagonal(
    objective: Objective,
    params: Params,
    buffers: Buffers,
    batch: Batch,
    *,
    key: Key,
    probes: int = 16,
    kind: Kind = "hessian",
) -> Params:
    """An unbiased estimate of the diagonal: the mean of ``z * (H @ z)`` over vectors of random signs.

    Args:
        objective: as for `hvp`.
        params: where to look.
        buffers: statistics.
        batch: N samples.
        key: of the probes, and of an objective that draws.
        probes: products to spend, at least 1. The error of an element is the norm of the rest of its row, divided by
            ``sqrt(probes)``.
        kind: as for `hvp`.

    Source: Bekas et al., "An estimator for the diagonal of a matrix" (2007).

    Example:
        >>> import torch
        >>> from holofunc import analysis, random
        >>> loss = lambda params, buffers, batch, key: ((params["w"] ** 3).sum(), None)
        >>> analysis.hessian_diagonal(loss, {"w": torch.ones(2)}, {}, torch.zeros(1), key=random.key(0), probes=1)
        {'w': tensor([6., 6.])}
    """
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    multiply = flat_product(curvature(objective, params, buffers, batch, kind=kind, key=key), params)
    mean = torch.stack([z * multiply(z) for z in flat_signs(key, params, probes)]).mean(0)
    return unflatten(mean, params)


def sharpness(
    objective: Objective,
    params: Params,
    buffers: Buffers,
    batch: Batch,
    *,
    rho: Scalar = 0.05,
    steps: int = 1,
    adaptive: bool = False,
    key: Key | None = None,
) -> Tensor:
    """The largest increase of the loss within a radius: ``max loss(params + e) - loss(params)`` over ``||e|| <= rho``.

    The maximum is looked for by gradient ascent, from the given point: a lower bound, one gradient and one forward
    pass per step. With one step it is what SAM minimizes.

    Args:
        objective: as in training.
        params: where to look.
        buffers: statistics.
        batch: N samples.
        rho: radius, positive.
        steps: of ascent, each followed by a projection onto the sphere; at least 1.
        adaptive: measure ``e / |params|`` instead of e, which a rescaling of layers does not change.
        key: for an objective that draws.

    Source: Foret et al., "Sharpness-aware minimization" (ICLR 2021); Kwon et al., "ASAM" (ICML 2021).

    Example:
        >>> import torch
        >>> from holofunc import analysis
        >>> loss = lambda params, buffers, batch, key: (params["w"].square().sum(), None)
        >>> analysis.sharpness(loss, {"w": torch.tensor([3.0, 4.0])}, {}, torch.zeros(1), rho=1.0)  # 6**2 - 5**2
        tensor(11.)
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not isinstance(rho, Tensor) and not rho > 0:
        raise ValueError(f"rho must be positive, got {rho}")
    check_real(params)
    look = torch.func.grad_and_value(lambda params: value(objective, params, buffers, batch, key))
    scale = tree.map(torch.abs, params) if adaptive else tree.map(torch.ones_like, params)
    grads, start = look(params)
    offset = tree.zeros_like(params)
    for _ in range(steps):
        offset = tree.map(lambda e, g, s: e + s * s * g, offset, grads, scale)
        length = tree.global_norm(tree.map(lambda e, s: torch.where(s > 0, e / s, 0.0), offset, scale))
        factor = rho / length.clamp_min(torch.finfo(length.dtype).tiny)
        offset = tree.map(lambda e, factor=factor: e * factor, offset)
        grads, end = look(tree.map(torch.add, params, offset))
    return end - start


# --- as matrices of flat vectors -----------------------------------------------------------------------------------


def as_linear_operator(
    objective: Objective,
    params: Params,
    buffers: Buffers,
    batch: Batch,
    *,
    kind: Kind = "hessian",
    key: Key | None = None,
) -> Any:
    """The curvature matrix as a `scipy.sparse.linalg.LinearOperator` on concatenated parameters.

    Args:
        objective: as for `hvp`, like all that follows.
        params: where to look.
        buffers: statistics.
        batch: N samples.
        kind: which matrix.
        key: for an objective that draws.

    Raises:
        ImportError: SciPy is not installed.

    Example:
        >>> import torch
        >>> from holofunc import analysis
        >>> loss = lambda params, buffers, batch, key: ((params["w"] ** 3).sum(), None)
        >>> operator = analysis.as_linear_operator(loss, {"w": torch.ones(2)}, {}, torch.zeros(1))  # doctest: +SKIP
        >>> operator @ [1.0, 2.0]  # doctest: +SKIP
        array([ 6., 12.])
    """
    try:
        from scipy.sparse.linalg import LinearOperator
    except ImportError as error:
        raise ImportError("as_linear_operator needs SciPy: pip install scipy") from error
    multiply = flat_product(curvature(objective, params, buffers, batch, kind=kind, key=key), params)
    like = flatten(params)

    def matvec(v: Any) -> Any:
        out = multiply(torch.as_tensor(v.reshape(-1)).to(like))
        return out.detach().cpu().double().numpy()

    return LinearOperator((like.numel(), like.numel()), matvec=matvec, rmatvec=matvec, dtype="float64")


def flatten(params: Params) -> Tensor:
    """At least float32: there are no eigenvalues in half precision."""
    return tree.upcast(torch.cat([p.reshape(-1) for p in params.values()]))


def unflatten(vector: Tensor, like: Params) -> Params:
    parts = vector.split([p.numel() for p in like.values()])
    return {name: part.view(p.shape).to(p.dtype) for part, (name, p) in zip(parts, like.items(), strict=True)}


def flat_product(product: Callable[[Params], Params], like: Params) -> Callable[[Tensor], Tensor]:
    return lambda vector: flatten(product(unflatten(vector, like)))


def flat_signs(key: Key, like: Params, count: int) -> list[Tensor]:
    """Vectors of +1 and -1."""
    first = tree.upcast(next(iter(like.values())))
    size = sum(math.prod(p.shape) for p in like.values())
    keys = random.split(key.to(first.device), count)
    return [random.bernoulli(k, (size,), 0.5).to(first.dtype) * 2 - 1 for k in keys.unbind()]
