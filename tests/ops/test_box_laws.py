"""Every box operator, pairwise and paired, through the same laws: derivatives, transforms, compilation, precision."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from holofunc import random
from holofunc.ops import boxes

# torch compiles its decompositions for forward-mode differentiation with torch.jit, which it deprecates

OPERATORS: dict[str, Callable[..., Tensor]] = {
    "box_iou": boxes.box_iou,
    "box_giou": boxes.box_giou,
    "box_diou": boxes.box_diou,
    "box_ciou": partial(boxes.box_ciou, detach_alpha=False),
    "box_ciou-detached": boxes.box_ciou,
    "giou_loss": boxes.giou_loss,
    "diou_loss": boxes.diou_loss,
    "ciou_loss": partial(boxes.ciou_loss, detach_alpha=False),
    "ciou_loss-detached": boxes.ciou_loss,
    "iou_penalty": boxes.iou_penalty,
    "aspect_ratio_consistency": boxes.aspect_ratio_consistency,
}
NOT_OF_TWO_SETS = {"aspect_ratio", "check_boxes", "nms", "dynamic_nms", "Kept"}


def draw_boxes(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Boxes in general position, most of which overlap each other."""
    corner, size = random.split(random.key(seed))
    low = random.uniform(corner, (*shape, 2), dtype=dtype)
    return torch.cat([low, low + random.uniform(size, (*shape, 2), low=0.2, high=1.5, dtype=dtype)], -1)


class Case(NamedTuple):
    """`operator(a, b)`, curved, so that second derivatives mean something."""

    operator: Callable[..., Tensor]
    a: Tensor
    b: Tensor
    name: str = ""

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        return self.operator(a, b)

    def objective(self, a: Tensor, b: Tensor) -> Tensor:
        return self(a, b).square().sum()

    @property
    def point(self) -> tuple[Tensor, Tensor]:
        return self.a, self.b


def table() -> dict[str, Case]:
    pairwise = draw_boxes(0, 2, 3), draw_boxes(1, 2, 4)
    paired = draw_boxes(2, 2, 3), draw_boxes(3, 2, 3)
    cases = {f"{n}/pairwise": Case(fn, *pairwise, n) for n, fn in OPERATORS.items()}
    cases |= {f"{n}/paired": Case(partial(fn, paired=True), *paired, n) for n, fn in OPERATORS.items()}
    one = lambda a, b: boxes.aspect_ratio(a) * boxes.aspect_ratio(b)  # noqa: E731
    return cases | {"aspect_ratio": Case(one, *paired, "aspect_ratio")}


CASES = table()
EXACT = {name: case for name, case in CASES.items() if not case.name.endswith("detached")}
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
exact = pytest.mark.parametrize("case", EXACT.values(), ids=EXACT.keys())
grad = partial(torch.func.grad, argnums=(0, 1))
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


def along(case: Case, step: float) -> tuple[Tensor, Tensor]:
    return tuple(x + step * v for x, v in zip(case.point, direction(case), strict=True))


def direction(case: Case) -> tuple[Tensor, Tensor]:
    return tuple(random.normal(random.key(9), x.shape, dtype=x.dtype) for x in case.point)


def test_the_table_holds_every_operator() -> None:
    assert {case.name.split("-")[0] for case in CASES.values()} | NOT_OF_TWO_SETS == set(boxes.__all__)
    options = {n for n in boxes.__all__ if "paired" in inspect.signature(getattr(boxes, n)).parameters}
    assert {name.split("-")[0] for name in OPERATORS} == options


# --- derivatives -------------------------------------------------------------------------------------------------


@exact
def test_gradcheck(case: Case) -> None:
    inputs = tuple(x.clone().requires_grad_() for x in case.point)
    assert torch.autograd.gradcheck(case, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)


@exact
def test_jvp_is_the_finite_difference(case: Case) -> None:
    step = 1e-6
    _, tangent = torch.func.jvp(case, case.point, direction(case))
    close(tangent, (case(*along(case, step)) - case(*along(case, -step))) / (2 * step), rtol=1e-6, atol=1e-7)


@every
def test_hessian_vector_products_agree_and_are_the_finite_difference(case: Case) -> None:
    gradient = grad(case.objective)
    _, forward = torch.func.jvp(gradient, case.point, direction(case))
    if (
        case in EXACT.values()
    ):  # with a detached factor the gradient is no gradient of a function, nor its Hessian symmetric
        _, pull = torch.func.vjp(gradient, *case.point)
        close(pull(direction(case)), forward)
        step = 1e-6
        above, below = gradient(*along(case, step)), gradient(*along(case, -step))
        difference = tuple((a - b) / (2 * step) for a, b in zip(above, below, strict=True))
        close(forward, difference, rtol=1e-5, atol=1e-6)
    assert all(x.isfinite().all() for x in forward)


@every
def test_vmapped_gradients_are_those_of_a_loop(case: Case) -> None:
    mapped = torch.func.vmap(grad(case.objective))(*case.point)
    for i in range(2):
        close(tuple(g[i] for g in mapped), grad(case.objective)(case.a[i], case.b[i]))


@every
def test_leading_dimensions_are_a_loop(case: Case) -> None:
    whole = case(*case.point)
    close(whole, torch.stack([case(a, b) for a, b in zip(*case.point, strict=True)]))
    a, b = (x.expand(5, 1, *x.shape) for x in case.point)
    close(case(a, b), whole.expand(5, 1, *whole.shape))


# --- compilation -------------------------------------------------------------------------------------------------


def passes(case: Case) -> Callable[[Tensor, Tensor], Any]:
    """Forward, backward, and backward per sample."""
    gradient = grad(case.objective)
    return lambda a, b: (case(a, b), gradient(a, b), torch.func.vmap(gradient)(a, b))


@every
def test_compiles_whole_forward_and_backward(case: Case) -> None:
    torch.compiler.reset()
    fn = passes(case)
    close(torch.compile(fn, fullgraph=True, backend="aot_eager")(*case.point), fn(*case.point))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if "loss" in n else pytest.mark.slow) for n in CASES])
def test_jvp_and_hessian_vector_products_compile(name: str) -> None:
    torch.compiler.reset()
    case = CASES[name]
    gradient, v = grad(case.objective), direction(CASES[name])
    fn = lambda *point: (torch.func.jvp(case, point, v)[1], torch.func.jvp(gradient, point, v)[1])  # noqa: E731
    close(torch.compile(fn, fullgraph=True, backend="aot_eager")(*case.point), fn(*case.point))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "ciou_loss-detached/paired" else pytest.mark.slow) for n in CASES]
)
def test_inductor_agrees(name: str) -> None:
    torch.compiler.reset()
    case = CASES[name]
    fn = passes(case)
    close(torch.compile(fn, fullgraph=True)(*case.point), fn(*case.point))


@every
def test_exports(case: Case) -> None:
    class Module(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return case(a, b)

    close(torch.export.export(Module(), case.point).module()(*case.point), case(*case.point))


# --- layouts, precision, shapes ----------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(case: Case, dtype: torch.dtype) -> None:
    half = tuple(x.to(dtype) for x in case.point)
    value = case(*half)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, case(*(x.float() for x in half)), rtol=0, atol=0)
    gradients = grad(case.objective)(*half)
    assert all(g.dtype == dtype and g.isfinite().all() for g in gradients)


@every
def test_single_and_double_precision_are_kept(case: Case) -> None:
    assert case(*case.point).dtype == torch.float64
    single = case(*(x.float() for x in case.point))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), case(*case.point), rtol=1e-5, atol=1e-5)


@every
def test_integer_boxes_are_float32(case: Case) -> None:
    whole = tuple((10 * x).long() for x in case.point)
    torch.testing.assert_close(case(*whole), case(*(x.float() for x in whole)), rtol=0, atol=0)


@every
def test_strides_do_not_matter(case: Case) -> None:
    strided = tuple(torch.stack([x, -x], -1)[..., 0] for x in case.point)
    turned = tuple(x.mT.contiguous().mT for x in case.point)
    for point in (strided, turned):
        assert not point[0].is_contiguous()
        close(case(*point), case(*case.point))
        close(grad(case.objective)(*point), grad(case.objective)(*case.point))


@every
def test_shapes_are_enough(case: Case) -> None:
    meta = case(*(x.to("meta") for x in case.point))
    assert meta.shape == case(*case.point).shape
    assert meta.is_meta


@every
def test_one_box_and_none(case: Case) -> None:
    one = case(case.a[:, :1], case.b[:, :1])
    close(one, case(*case.point)[:, :1] if one.ndim == 2 else case(*case.point)[:, :1, :1])
    none = case(case.a[:, :0], case.b[:, :0])
    assert none.numel() == 0
    assert none.ndim == one.ndim


@every
def test_pure(case: Case) -> None:
    a, b, state = case.a.clone(), case.b.clone(), torch.random.get_rng_state()
    assert torch.equal(case(a, b), case(a, b))
    assert torch.equal(a, case.a)
    assert torch.equal(b, case.b)
    assert torch.equal(torch.random.get_rng_state(), state)


# --- boxes that are none -----------------------------------------------------------------------------------------

DEGENERATE = torch.tensor(
    [
        [0.0, 0.0, 0.0, 0.0],  # a point
        [2.0, 2.0, 2.0, 2.0],  # another
        [0.0, 0.0, 3.0, 0.0],  # flat
        [1.0, 0.0, 1.0, 3.0],  # narrow
        [3.0, 3.0, 1.0, 1.0],  # swapped corners
        [0.0, 0.0, 1.0, 1.0],
        [1.0, 1.0, 2.0, 2.0],  # touches it in a corner
        [1e6, 1e6, 1e6 + 1, 1e6 + 1],
        [0.0, 0.0, 1e9, 1e9],
        [0.0, 0.0, 1e-9, 1e-9],
        [0.0, 0.0, 1e-20, 1e9],
    ]
)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_boxes_are_finite_in_value_and_derivatives(name: str, dtype: torch.dtype) -> None:
    x = DEGENERATE.to(dtype)
    operator = OPERATORS[name]
    value, (a, b) = operator(x, x), torch.func.grad(lambda a, b: operator(a, b).sum(), argnums=(0, 1))(x, x)
    assert value.isfinite().all()
    assert a.isfinite().all()
    assert b.isfinite().all()
    low = {"iou": 0, "giou": -1, "diou": -1, "ciou": -2}.get(name.split("-")[0].removeprefix("box_"))
    if low is not None:
        assert (value >= low).all()
        assert (value <= 1).all()


def test_a_degenerate_box_has_an_angle_and_no_gradient_that_is_not_finite() -> None:
    gradient, angle = torch.func.grad_and_value(lambda x: boxes.aspect_ratio(x).sum())(DEGENERATE)
    assert angle.isfinite()
    assert gradient.isfinite().all()


def refusals() -> list[tuple[Callable[[], Any], str]]:
    flat, three, fine = torch.zeros(4), torch.zeros(2, 3), torch.zeros(2, 4)
    calls: list[tuple[Callable[[], Any], str]] = []
    for fn in OPERATORS.values():
        calls += [
            (partial(fn, three, fine), r"boxes1 must have shape \(\.\.\., 4\), got \(2, 3\)"),
            (partial(fn, fine, three), r"boxes2 must have shape \(\.\.\., 4\), got \(2, 3\)"),
            (partial(fn, fine, torch.tensor(1.0)), r"boxes2 must have shape \(\.\.\., 4\), got \(\)"),
            (partial(fn, flat, fine), r"or paired=True, got \(4,\) and \(2, 4\)"),
        ]
    return [*calls, (partial(boxes.aspect_ratio, three), r"boxes must have shape \(\.\.\., 4\), got \(2, 3\)")]


def test_refuses_what_is_no_box() -> None:
    for call, message in refusals():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    "wrong", [[1.0, 0.0, 0.5, 1.0], [0.0, 1.0, 1.0, 0.5], [0.0, 0.0, float("nan"), 1.0], [0.0, 0.0, 1.0, float("inf")]]
)
def test_values_are_checked_where_data_enters(wrong: list[float]) -> None:
    boxes.check_boxes(torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.5, 0.5]]))
    with pytest.raises(ValueError, match=r"boxes must be finite with x1 <= x2 and y1 <= y2, got \["):
        boxes.check_boxes(torch.tensor([[0.0, 0.0, 1.0, 1.0], wrong]))
