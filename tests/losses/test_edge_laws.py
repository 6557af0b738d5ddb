"""Losses at the edges: classes that do not exist, ignored classes beside soft targets, a softmax of one class."""

import math

import pytest
import torch
from torch import Tensor

from holofunc import losses, random

N, K, SIDE = 3, 4, 3
CLASSWISE = {
    "cross_entropy": (losses.cross_entropy, {"label_smoothing": 0.1}),
    "focal": (losses.focal, {"gamma": 0.5, "label_smoothing": 0.1}),
    "poly": (losses.poly, {"eps": 1.5, "label_smoothing": 0.1}),
    "multilabel_cross_entropy": (losses.multilabel_cross_entropy, {}),
    "complement_cross_entropy": (losses.complement_cross_entropy, {"gamma": -1.0, "label_smoothing": 0.1}),
    "class_balanced": (losses.class_balanced(losses.focal, [5, 10, 0, 100], beta=0.9), {}),
}
BINARY = {name: (getattr(losses, name), {}) for name in ("binary_cross_entropy", "sigmoid_focal")}
REGIONS = {name: (getattr(losses, name), {}) for name in ("dice", "tversky", "generalized_dice", "lovasz")}
ALL = {**CLASSWISE, **BINARY, **REGIONS}
LOGITS = torch.randn(N, K, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([[1, 2, 3], [2, 2, 1], [3, 1, 1]])  # class 0 is never asked for
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.25], dtype=torch.float64)


def one_hot(targets: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(targets, K).movedim(-1, 1).double()


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def without_class_zero(dtype: torch.dtype) -> Tensor:
    missing = LOGITS.clone()
    missing[:, 0] = -torch.inf
    return missing.to(dtype)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_class_that_does_not_exist_is_as_good_as_impossible(name: str, dtype: torch.dtype) -> None:
    loss, options = ALL[name]
    plain = {key: value for key, value in options.items() if key != "label_smoothing"}
    x = without_class_zero(dtype)
    for targets in (LABELS, one_hot(LABELS)):
        gradient, value = torch.func.grad_and_value(lambda x: loss(x, targets, **plain))(x)  # noqa: B023
        low = x.clamp_min(-1e4)
        expected_gradient, expected = torch.func.grad_and_value(lambda x: loss(x, targets, **plain))(low)  # noqa: B023
        close(value, expected, 1e-6)
        close(gradient, expected_gradient, 1e-3)
        gradient, value = torch.func.grad_and_value(lambda x: loss(x, targets, **options))(x)  # noqa: B023
        assert value.isfinite()
        assert gradient.isfinite().all()
    assert (
        torch.func.jvp(torch.func.grad(lambda x: loss(x, LABELS, **options)), (x,), (LOGITS.to(dtype),))[1]
        .isfinite()
        .all()
    )


def test_a_label_that_does_not_exist_costs_infinity() -> None:
    for loss, options in CLASSWISE.values():
        for targets in (LABELS - 1, one_hot(LABELS - 1)):
            assert loss(without_class_zero(torch.float64), targets, **options) == math.inf


def test_channels_and_frames_of_nothing() -> None:
    maps = torch.randn(2, 6, 3, 3)
    maps[:, :3] = -torch.inf  # the channels of class 0
    for key in (None, random.key(0)):
        gradient, value = torch.func.grad_and_value(losses.mutual_channel)(maps, torch.tensor([1, 1]), xi=3, key=key)
        assert value.isfinite()
        assert gradient.isfinite().all()
    frames = torch.randn(5, 2, K)
    frames[:, :, 3] = -torch.inf
    gradient, value = torch.func.grad_and_value(losses.ctc)(frames, torch.tensor([[1, 2], [2, 1]]))
    close(value, losses.ctc(frames[:, :, :3], torch.tensor([[1, 2], [2, 1]])), 1e-5)
    assert gradient.isfinite().all()
    impossible = torch.tensor([[1, 3], [2, 1]])
    assert losses.ctc(frames, impossible, reduction="none")[0] == 0
    assert losses.ctc(frames, impossible, reduction="none", zero_infinity=False)[0] == math.inf


@pytest.mark.parametrize("name", CLASSWISE)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
def test_ignoring_a_class_is_the_same_for_labels_and_one_hot_targets(
    name: str, reduction: str, weight: Tensor | None
) -> None:
    loss, options = CLASSWISE[name]
    options = options | {"reduction": reduction, "weight": weight, "ignore_index": 2}
    expected = loss(LOGITS, LABELS, **options)
    close(loss(LOGITS, one_hot(LABELS), **options), expected)
    filled = torch.where((LABELS == 2)[:, None], 255.0, one_hot(LABELS))
    close(loss(LOGITS, filled, **options | {"ignore_index": 255}), expected)


@pytest.mark.parametrize("name", [*BINARY, *REGIONS])
def test_an_ignored_class_beside_soft_targets_is_ambiguous_for_decisions(name: str) -> None:
    loss, options = ALL[name]
    with pytest.raises(ValueError, match=rf"ignore_index must be outside \[0, {K}\) beside soft or multi-hot targets"):
        loss(LOGITS, one_hot(LABELS), **options, ignore_index=1)
    unknown = one_hot(LABELS)
    unknown[0] = 255
    total = loss(LOGITS, unknown, **options, ignore_index=255, reduction="sum")
    close(total, loss(LOGITS[1:], one_hot(LABELS)[1:], **options, reduction="sum"))


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "poly", "multilabel_cross_entropy", *REGIONS])
def test_one_class_has_no_softmax(name: str) -> None:
    with pytest.raises(ValueError, match=r"logits must have at least 2 classes.* \(the softmax of one is 1"):
        getattr(losses, name)(torch.zeros(2, 1, 3), torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize("name", [name for name in CLASSWISE if name != "class_balanced"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}], ids=["plain", "smoothed"])
def test_a_label_of_no_weight_costs_nothing_even_where_its_class_does_not_exist(name: str, options: dict) -> None:
    loss = CLASSWISE[name][0]
    labels, weight = LABELS.clone(), torch.tensor([0.0, 1.0, 2.0, 0.5], dtype=torch.float64)
    labels[0, 0] = 0
    gradient, value = torch.func.grad_and_value(lambda x: loss(x, labels, weight=weight))(
        without_class_zero(LOGITS.dtype)
    )
    ignored = torch.where(labels == 0, -100, labels)
    expected = torch.func.grad_and_value(lambda x: loss(x, ignored, weight=weight))(without_class_zero(LOGITS.dtype))
    close(gradient, expected[0])
    close(value, expected[1])
    x = without_class_zero(LOGITS.dtype)
    assert loss(x, labels, weight=weight, **options).isfinite()


def test_weights_of_foreign_losses_have_the_dtype_of_the_logits() -> None:
    ours, torchs = (
        losses.class_balanced(loss, [5, 10, 0, 100])
        for loss in (losses.cross_entropy, torch.nn.functional.cross_entropy)
    )
    for logits in (LOGITS, LOGITS.float()):
        close(torchs(logits, LABELS), ours(logits, LABELS), 1e-6)


def test_a_soft_class_of_nearly_no_size_keeps_generalized_dice_finite() -> None:
    soft = LOGITS.float().softmax(1)
    soft[:, 0] = 1e-22
    gradient, value = torch.func.grad_and_value(losses.generalized_dice)(LOGITS.float(), soft)
    close(value, losses.generalized_dice(LOGITS, soft.double()), 1e-5)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("pos_weight", [[1.0, 2.0, 3.0], torch.ones(2, 1), torch.ones(1, 4)])
@pytest.mark.parametrize("num_classes", [1, 2])
def test_a_positive_weight_is_one_per_class(pos_weight: object, num_classes: int) -> None:
    with pytest.raises(ValueError, match=rf"pos_weight must be a number or have shape \({num_classes},\)"):
        losses.binary_cross_entropy(torch.zeros(2, num_classes), torch.zeros(2, num_classes), pos_weight=pos_weight)


@pytest.mark.parametrize(
    "name", ["binary_cross_entropy", "sigmoid_focal", "dice", "generalized_dice", "tversky", "lovasz"]
)
def test_labels_out_of_range_are_named_where_looking_costs_nothing(name):
    loss, x = getattr(losses, name), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"^targets must be in \[0, 3\) or equal ignore_index=-100, got 7$"):
        loss(x, torch.tensor([0, 7]))
    assert loss(x, torch.tensor([0, -100])).isfinite()
    assert loss(x, torch.tensor([0, 255], dtype=torch.uint8), ignore_index=255).isfinite()
    assert loss(x.to("meta"), torch.tensor([0, 7], device="meta")).is_meta  # no value to look at
