"""What each box operator computes: hand-made cases, invariances, torchvision, and pylocron where it is right."""

import math
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torchvision.ops
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from holofunc.ops import boxes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pylocron compiles a torch.jit class when it is imported
    from holocron.ops import boxes as theirs

close = torch.testing.assert_close
UNIT = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)


def draw_boxes(seed: int, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = 2 * torch.rand(count, 2, generator=generator, dtype=dtype)
    return torch.cat([low, low + 0.1 + torch.rand(count, 2, generator=generator, dtype=dtype)], -1)


# --- hand-made ---------------------------------------------------------------------------------------------------

V = 4 / math.pi**2 * (math.atan(2) - math.atan(1)) ** 2
SMALL = math.atan(3) - math.atan(1)
CASES = [  # other box; iou, giou, penalty, aspect-ratio consistency
    ([0.0, 0.0, 1.0, 1.0], 1, 1, 0, 0),
    ([0.5, 0.0, 1.5, 1.0], 1 / 3, 1 / 3, 0.25 / 3.25, 0),
    ([0.5, 0.5, 1.5, 1.5], 1 / 7, 1 / 7 - 0.5 / 2.25, 0.5 / 4.5, 0),
    ([0.0, 0.0, 2.0, 1.0], 1 / 2, 1 / 2, 0.25 / 5, V),
    ([2.0, 0.0, 3.0, 1.0], 0, -1 / 3, 4 / 10, 0),
    ([1.0, 1.0, 2.0, 2.0], 0, -1 / 2, 2 / 8, 0),
    ([0.25, 0.25, 0.75, 0.75], 1 / 4, 1 / 4, 0, 0),
    ([0.0, 0.0, 3.0, 1.0], 1 / 3, 1 / 3, 1 / 10, 4 / math.pi**2 * SMALL**2),
    ([0.5, 0.5, 0.5, 0.5], 0, 0, 0, 1 / 4),  # a point in the middle
    ([0.0, 0.5, 1.0, 0.5], 0, 0, 0, 1 / 4),  # a line through it
]


@pytest.mark.parametrize(("other", "iou", "giou", "penalty", "v"), CASES)
def test_by_hand(other: list[float], iou: float, giou: float, penalty: float, v: float) -> None:
    alpha = v / (1 - iou + v) if v else 0.0
    b = torch.tensor(other, dtype=torch.float64)
    expected = {
        "box_iou": iou,
        "box_giou": giou,
        "iou_penalty": penalty,
        "aspect_ratio_consistency": v,
        "box_diou": iou - penalty,
        "box_ciou": iou - penalty - alpha * v,
        "giou_loss": 1 - giou,
        "diou_loss": 1 - iou + penalty,
        "ciou_loss": 1 - iou + penalty + alpha * v,
    }
    for name, value in expected.items():
        for a, b_ in ((UNIT, b), (b, UNIT)):  # all are symmetric
            close(getattr(boxes, name)(a, b_, paired=True), torch.tensor(value, dtype=torch.float64), msg=name)


@pytest.mark.parametrize(
    ("box", "angle"),
    [
        ([0.0, 0.0, 1.0, 1.0], math.pi / 4),
        ([1.0, 2.0, 1.0 + math.sqrt(3), 3.0], math.pi / 3),
        ([0.0, 0.0, 1.0, 0.0], math.pi / 2),
        ([0.0, 0.0, 0.0, 1.0], 0),
        ([0.0, 0.0, 0.0, 0.0], 0),
        ([0.0, 0.0, -1.0, 1.0], 0),
    ],
)
def test_an_aspect_ratio_is_an_angle(box: list[float], angle: float) -> None:
    close(boxes.aspect_ratio(torch.tensor(box).double()), torch.tensor(angle).double())


# --- the same elsewhere ------------------------------------------------------------------------------------------


def test_the_diagonal_is_torchvisions() -> None:
    a, b = draw_boxes(0, 500, torch.float32), draw_boxes(1, 500, torch.float32)
    pairs: list[tuple[Callable[..., Tensor], Tensor]] = [
        (boxes.box_iou, torchvision.ops.box_iou(a, b)),
        (boxes.box_giou, torchvision.ops.generalized_box_iou(a, b)),
        (boxes.box_diou, torchvision.ops.distance_box_iou(a, b)),
        (boxes.box_ciou, torchvision.ops.complete_box_iou(a, b)),
    ]
    for ours, expected in pairs:
        close(ours(a, b), expected, rtol=0, atol=2e-6)
        close(ours(a, b, paired=True), expected.diagonal(), rtol=0, atol=2e-6)
        close(ours(a, b).diagonal(), ours(a, b, paired=True), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["giou", "diou", "ciou"])
def test_losses_and_gradients_are_torchvisions(name: str) -> None:
    spelled = {"giou": "generalized", "diou": "distance", "ciou": "complete"}[name]
    reference = getattr(torchvision.ops, f"{spelled}_box_iou_loss")
    a, b = draw_boxes(0, 500), draw_boxes(1, 500)
    ours = partial(getattr(boxes, f"{name}_loss"), paired=True)
    close(ours(a, b), reference(a, b), rtol=0, atol=1e-6)
    x = a.clone().requires_grad_()
    (expected,) = torch.autograd.grad(reference(x, b).sum(), x)
    close(torch.func.grad(lambda a: ours(a, b).sum())(a), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["box_giou", "diou_loss", "ciou_loss", "iou_penalty", "aspect_ratio_consistency", "box_iou"]
)
def test_equals_pylocron(name: str) -> None:
    a, b = draw_boxes(0, 40), draw_boxes(1, 30)
    theirs_, ours = getattr(theirs, name)(a.float(), b.float()), getattr(boxes, name)(a, b)
    close(ours.float(), theirs_, rtol=1e-5, atol=1e-5)
    close(boxes.aspect_ratio(a), theirs.aspect_ratio(a))


def test_pylocron_has_no_value_for_boxes_without_area() -> None:
    point = torch.zeros(1, 4)
    assert theirs.ciou_loss(point, point).isnan().all()
    close(boxes.ciou_loss(point, point), torch.ones(1, 1))


# --- the trade-off of the complete loss --------------------------------------------------------------------------


def test_the_trade_off_is_a_constant_unless_asked() -> None:
    a, b = draw_boxes(2, 50), draw_boxes(3, 50)
    paired = {"paired": True}
    v, iou = boxes.aspect_ratio_consistency(a, b, **paired), boxes.box_iou(a, b, **paired)
    alpha = v / (1 - iou + v)

    def by_hand(x: Tensor) -> Tensor:
        return (boxes.diou_loss(x, b, **paired) + alpha * boxes.aspect_ratio_consistency(x, b, **paired)).sum()

    def loss(x: Tensor, detach: bool) -> Tensor:
        return boxes.ciou_loss(x, b, paired=True, detach_alpha=detach).sum()

    close(loss(a, True), loss(a, False), rtol=0, atol=0)
    detached, whole = (torch.func.grad(partial(loss, detach=detach))(a) for detach in (True, False))
    close(detached, torch.func.grad(by_hand)(a))
    assert (whole - detached).abs().max() > 0.01
    theirs_ = torch.func.grad(lambda x: theirs.ciou_loss(x, b.float()).diagonal().sum())(a.float())
    close(whole.float(), theirs_, rtol=1e-3, atol=1e-4)


# --- invariances -------------------------------------------------------------------------------------------------

number = st.floats(-3, 3)
size = st.floats(0.05, 3)
box = st.tuples(number, number, size, size).map(lambda b: torch.tensor([b[0], b[1], b[0] + b[2], b[1] + b[3]]).double())
OF_TWO = ["box_iou", "box_giou", "box_diou", "box_ciou", "iou_penalty", "aspect_ratio_consistency"]


@settings(max_examples=100, deadline=None)
@given(a=box, b=box, shift=st.tuples(number, number), factor=st.floats(0.01, 100))
def test_neither_place_nor_unit_nor_order_nor_axes_matter(
    a: Tensor, b: Tensor, shift: tuple[float, float], factor: float
) -> None:
    offset = torch.tensor([*shift, *shift]).double()
    mirrored = [torch.stack([-x[2], x[1], -x[0], x[3]]) for x in (a, b)]
    turned = [x[[1, 0, 3, 2]] for x in (a, b)]
    for name in OF_TWO:
        fn = partial(getattr(boxes, name), paired=True)
        value = fn(a, b)
        close(fn(b, a), value, rtol=0, atol=1e-12)
        close(fn(a + offset, b + offset), value, rtol=0, atol=1e-9)
        close(fn(factor * a, factor * b), value, rtol=0, atol=1e-9)
        close(fn(*mirrored), value, rtol=0, atol=1e-9)
        close(fn(*turned), value, rtol=0, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(a=box, b=box)
def test_ranges_and_order_of_the_measures(a: Tensor, b: Tensor) -> None:
    iou, giou, diou, ciou, penalty, v = (getattr(boxes, name)(a, b, paired=True) for name in OF_TWO)
    assert 0 <= iou <= 1
    assert -1 <= giou <= iou + 1e-12
    assert -1 <= diou <= iou
    assert ciou <= diou
    assert 0 <= penalty <= 1
    assert 0 <= v <= 1
    for name in OF_TWO[:4]:
        close(getattr(boxes, name)(a, a, paired=True), torch.ones(()).double(), rtol=0, atol=1e-12)
    close(boxes.iou_penalty(a, a, paired=True), torch.zeros(()).double())


def test_far_boxes_attract_each_other_by_all_losses_but_the_plain_one() -> None:
    far = UNIT + 5
    for name, moves in (("box_iou", False), ("box_giou", True), ("box_diou", True), ("box_ciou", True)):
        gradient = torch.func.grad(lambda x, name=name: getattr(boxes, name)(x, far, paired=True))(UNIT)
        assert bool(gradient.sum() > 0) is moves
