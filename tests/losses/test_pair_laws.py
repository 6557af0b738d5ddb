"""Losses of two inputs of one kind (embeddings, numbers, two models' logits): definitions, and laws over all of them."""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import draw
from torch import Tensor

from holofunc import losses

N, D = 5, 4


class Case(NamedTuple):
    loss: Callable[..., Tensor]
    rest: tuple[Tensor, ...] = (draw(N, D, seed=1),)
    options: dict[str, Any] = {}  # noqa: RUF012
    logits: Tensor = draw(N, D)

    def __call__(self, logits: Tensor, **more: Any) -> Tensor:
        return self.loss(logits, *self.rest, **{**self.options, **more})


LABELS = torch.tensor([0, 1, 0, 2, 0])
CASES = {
    "huber": Case(losses.huber, options={"delta": 0.7}),
    "smooth_l1": Case(losses.smooth_l1, options={"beta": 0.5}),
    "smooth_l1-zero": Case(losses.smooth_l1, options={"beta": 0.0}),
    "kl_divergence": Case(losses.kl_divergence, options={"temperature": 2.0}),
    "cosine": Case(losses.cosine, options={"similar": LABELS == 0, "margin": -0.4}),
    "triplet": Case(losses.triplet, (draw(N, D, seed=1), draw(N, D, seed=2)), {"swap": True}),
    "nt_xent": Case(losses.nt_xent),
    "supervised_contrastive": Case(losses.supervised_contrastive, (LABELS,)),
    "supervised_contrastive-views": Case(losses.supervised_contrastive, (LABELS,), logits=draw(N, 2, D)),
}
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def close(actual: Any, expected: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


# --- laws --------------------------------------------------------------------------------------------------------


@every
def test_derivatives(case: Case) -> None:
    x, v, step = case.logits, draw(*case.logits.shape, seed=5), 1e-6
    assert torch.autograd.gradcheck(case, (x.clone().requires_grad_(),), check_forward_ad=True, fast_mode=True)
    gradient = torch.func.grad(case)
    forward = torch.func.jvp(gradient, (x,), (v,))[1]
    close(forward, torch.func.grad(lambda x: (gradient(x) * v).sum())(x))
    close(forward, (gradient(x + step * v) - gradient(x - step * v)) / (2 * step), 1e-5)


@every
def test_maps_and_compiles_into_one_graph(case: Case) -> None:
    torch.compiler.reset()
    mapped = torch.func.vmap(torch.func.grad(case))
    xs = torch.stack([case.logits, -case.logits])
    close(mapped(xs), torch.stack([torch.func.grad(case)(x) for x in xs]))
    close(torch.compile(mapped, fullgraph=True, backend="aot_eager")(xs), mapped(xs))


@every
def test_half_precision_is_computed_in_float32(case: Case) -> None:
    half = case.logits.half()
    close(case(half), case(half.float()), 1e-6)
    assert case(half).dtype == torch.float32


@every
def test_equal_and_zero_inputs_have_finite_derivatives(case: Case) -> None:
    for x in (torch.zeros_like(case.logits), case.rest[0] if case.rest[0].is_floating_point() else case.logits):
        assert case(x).isfinite()
        assert torch.func.grad(case)(x).isfinite().all()
        assert torch.func.jvp(torch.func.grad(case), (x,), (torch.ones_like(x),))[1].isfinite().all()


@every
def test_reductions_and_purity(case: Case) -> None:
    before, state = case.logits.clone(), torch.random.get_rng_state()
    total, mass = case(case.logits, reduction="parts")
    close(case(case.logits), total / mass)
    close(case(case.logits, reduction="sum"), total)
    close(case(case.logits, reduction="none").sum(), total)
    assert torch.equal(case.logits, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', 'none', 'parts', got 'avg'"):
        case(case.logits, reduction="avg")


WEIGHED = [name for name in CASES if name != "kl_divergence"]


@pytest.mark.parametrize("name", WEIGHED)
def test_weights_of_samples(name: str) -> None:
    case, weight = CASES[name], torch.tensor([0.0, 1.0, 2.0, 0.5, 1.0])
    if case.loss in (losses.huber, losses.smooth_l1):
        weight = weight[:, None]
    each = case(case.logits, reduction="none")
    heavy = weight.double().reshape(N, *[1] * (each.ndim - 1)) * (each != 0 if "contrastive" in name else 1)
    close(case(case.logits, weight=weight), (each * heavy).sum() / heavy.expand_as(each).sum())
    assert case(case.logits, weight=torch.zeros_like(weight)) == 0
    with pytest.raises((ValueError, RuntimeError), match=r"weight must|must match"):
        case(case.logits, weight=torch.ones(3, 7))


@every
def test_refuses_integers_and_other_shapes(case: Case) -> None:
    with pytest.raises(TypeError, match=r"logits must be floating point, got torch.int64"):
        case.loss(case.logits.long(), *case.rest, **case.options)
    with pytest.raises(ValueError, match="shape"):
        case.loss(case.logits[:3], *case.rest, **case.options)


# --- definitions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_numbers_equal_torchs(reduction: str) -> None:
    x, y = 3 * draw(6, 3), draw(6, 3, seed=1)
    close(losses.huber(x, y, delta=1.5, reduction=reduction), F.huber_loss(x, y, delta=1.5, reduction=reduction))
    for beta in (0.0, 0.3, 2.0):
        expected = F.smooth_l1_loss(x, y, beta=beta, reduction=reduction)
        close(losses.smooth_l1(x, y, beta=beta, reduction=reduction), expected)


def test_what_has_no_weight_may_be_nan() -> None:
    target = torch.tensor([1.0, math.nan])
    gradient, value = torch.func.grad_and_value(losses.huber)(torch.zeros(2), target, weight=torch.tensor([1.0, 0.0]))
    assert value == 0.5
    assert gradient.tolist() == [-1, 0]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_divergence_equals_torchs(temperature: float) -> None:
    student, teacher = draw(6, 4, 3), draw(6, 4, 3, seed=1)
    expected = F.kl_div(
        (student / temperature).log_softmax(1),
        (teacher / temperature).log_softmax(1),
        log_target=True,
        reduction="none",
    ).sum(1)
    close(losses.kl_divergence(student, teacher, temperature=temperature), temperature**2 * expected.mean())
    close(losses.kl_divergence(student, teacher, temperature=temperature, reduction="none"), temperature**2 * expected)


def test_divergence_with_classes_that_do_not_exist() -> None:
    student, teacher = torch.tensor([[-math.inf, 0.0, 1.0]]), torch.tensor([[-math.inf, 1.0, 0.0]])
    gradient, value = torch.func.grad_and_value(losses.kl_divergence)(student, teacher)
    close(value, losses.kl_divergence(student[:, 1:], teacher[:, 1:]), 1e-6)
    assert gradient.isfinite().all()
    assert losses.kl_divergence(student, torch.zeros(1, 3)) == math.inf


def test_embeddings_equal_torchs() -> None:
    x, y, z = draw(N, D), draw(N, D, seed=1), draw(N, D, seed=2)
    similar = LABELS == 0
    expected = F.cosine_embedding_loss(x, y, torch.where(similar, 1, -1), margin=0.1, reduction="none")
    close(losses.cosine(x, y, similar=similar, margin=0.1, reduction="none"), expected, 1e-7)
    for swap in (False, True):
        expected = F.triplet_margin_loss(x, y, z, margin=0.8, eps=0, swap=swap, reduction="none")
        close(losses.triplet(x, y, z, margin=0.8, swap=swap, reduction="none"), expected, 1e-7)


def contrast(z: Tensor, labels: list[int], temperature: float) -> list[float]:
    """Khosla's equation 2, term by term."""
    z, found = z / z.norm(dim=1, keepdim=True), []
    for i in range(len(z)):
        scores = {k: math.exp(float(z[i] @ z[k]) / temperature) for k in range(len(z)) if k != i}
        same = [k for k in scores if labels[k] == labels[i]]
        terms = [math.log(scores[k] / sum(scores.values())) for k in same]
        found.append(-sum(terms) / len(terms) if terms else 0.0)
    return found


def test_contrast_by_hand() -> None:
    x, y = draw(N, D), draw(N, D, seed=1)
    each = torch.tensor(contrast(torch.cat([x, y]), [*range(N), *range(N)], 0.5), dtype=torch.float64)
    close(losses.nt_xent(x, y), each.mean())
    close(losses.nt_xent(x, y, reduction="none"), each.view(2, N).mean(0))
    expected = torch.tensor(contrast(x, LABELS.tolist(), 0.1), dtype=torch.float64)
    close(losses.supervised_contrastive(x, LABELS, reduction="none"), expected)
    close(losses.supervised_contrastive(x, LABELS), expected[LABELS == 0].mean())  # others have no partner
    ignored = losses.supervised_contrastive(torch.cat([x, y[:1]]), torch.cat([LABELS, torch.tensor([-100])]))
    close(ignored, expected[LABELS == 0].mean())
    assert losses.supervised_contrastive(x, torch.arange(N)) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: losses.huber(x, x, delta=0.0), "delta must be above 0, got 0.0"),
        (lambda x: losses.smooth_l1(x, x, beta=-1.0), "beta must be at least 0, got -1.0"),
        (lambda x: losses.kl_divergence(x, x, temperature=0.0), "temperature must be above 0, got 0.0"),
        (lambda x: losses.cosine(x, x, margin=2.0), r"margin must be in \[-1, 1\], got 2.0"),
        (lambda x: losses.cosine(x, x, similar=LABELS), r"similar must be bool of shape \(5,\), got torch.int64"),
        (lambda x: losses.triplet(x, x, x, margin=0.0), "margin must be above 0, got 0.0"),
        (lambda x: losses.nt_xent(x, x, temperature=-1.0), "temperature must be above 0, got -1.0"),
        (lambda x: losses.nt_xent(x[:1], x[:1]), "N at least 2"),
        (lambda x: losses.supervised_contrastive(x[0], LABELS), r"\(N, V, D\)"),
    ],
)
def test_refuses(call: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(draw(N, D))


OPTIONS = [
    (name, option)
    for name in losses.__all__
    for option, parameter in inspect.signature(getattr(losses, name)).parameters.items()
    if isinstance(parameter.default, float)
]


def call_with(name: str, **options: float) -> Tensor:
    """Any loss, on inputs that it takes."""
    x, y = draw(N, D), draw(N, D, seed=1)
    others = {
        "triplet": (x, y, -y),
        "mutual_channel": (draw(2, 6, 4, 4), torch.tensor([0, 1])),
        **dict.fromkeys(("cosine", "huber", "kl_divergence", "nt_xent", "smooth_l1"), (x, y)),
    }
    return getattr(losses, name)(*others.get(name, (x, LABELS)), **options)


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_numbers_that_are_not_finite_are_named(name: str, option: str) -> None:
    for number in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=rf"^{option} must be .*, got {number}$"):
            call_with(name, **{option: number})
    for other in ("much", None, True):
        if (name, option, other) != ("sigmoid_focal", "alpha", None):  # which weighs nothing
            with pytest.raises(TypeError, match=rf"^{option} must be a number, got {other!r}$"):
                call_with(name, **{option: other})
