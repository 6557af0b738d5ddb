"""Losses of regions and of decisions against independent definitions."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import draw
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from holofunc import losses

K = 3


def close(actual: Tensor, expected: Tensor | float, tolerance: float = 1e-7) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


LOGITS = draw(2, K, 4, 5)
LABELS = torch.randint(0, K, (2, 4, 5), generator=torch.Generator().manual_seed(1))
TRUTH = F.one_hot(LABELS, K).movedim(-1, 1).double()


def test_sigmoid_focal_is_torchvisions() -> None:
    for alpha, gamma in ((0.25, 2.0), (0.7, 0.5), (None, 1.0)):
        expected = sigmoid_focal_loss(LOGITS, TRUTH, alpha=-1 if alpha is None else alpha, gamma=gamma)
        close(losses.sigmoid_focal(LOGITS, TRUTH, alpha=alpha, gamma=gamma, reduction="none"), expected)
    plain = losses.binary_cross_entropy(LOGITS, TRUTH)
    close(losses.sigmoid_focal(LOGITS, TRUTH, alpha=None, gamma=0.0), plain)


def test_certain_answers() -> None:
    x = torch.tensor([[math.inf, -math.inf, math.inf, -math.inf]])
    for loss in (losses.binary_cross_entropy, losses.sigmoid_focal):
        right, wrong = torch.tensor([[1.0, 0.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.5, 0.0]])
        for smoothing in (0.0, 0.1):
            gradient, value = torch.func.grad_and_value(loss)(x, right, label_smoothing=smoothing)
            assert value == 0
            assert (gradient == 0).all()
        assert loss(x, wrong, reduction="none").tolist() == [[math.inf, math.inf, math.inf, 0]]


def test_pos_weight_may_be_a_number() -> None:
    x, t = draw(4, K), (draw(4, K, seed=1) > 0).double()
    expected = F.binary_cross_entropy_with_logits(x, t, pos_weight=torch.full((K,), 3.0).double())
    close(losses.binary_cross_entropy(x, t, pos_weight=3.0), expected)
    close(losses.binary_cross_entropy(x, t, pos_weight=[3, 3, 3]), expected)


def test_one_number_weighs_two_classes() -> None:
    x, t = draw(6, 2), torch.tensor([0, 1, 1, 0, 1, 0])
    close(losses.cross_entropy(x, t, weight=0.2), F.cross_entropy(x, t, weight=torch.tensor([0.2, 0.8]).double()))


def test_tversky_by_hand() -> None:
    p = LOGITS.softmax(1)
    expected = []
    for i in range(2):
        of_classes = []
        for k in range(K):
            true, false, missed = (
                float(v)
                for v in ((p * TRUTH)[i, k].sum(), (p * (1 - TRUTH))[i, k].sum(), ((1 - p) * TRUTH)[i, k].sum())
            )
            of_classes.append((1 - true / (true + 0.2 * false + 0.8 * missed)) ** 1.5)
        expected.append(sum(of_classes) / K)
    each = losses.tversky(LOGITS, LABELS, alpha=0.2, beta=0.8, gamma=1.5, reduction="none")
    close(each, torch.tensor(expected))
    halves = losses.tversky(LOGITS, LABELS, alpha=0.5, beta=0.5)
    close(halves, losses.dice(LOGITS, LABELS, squared=False))


def test_generalized_dice_by_hand() -> None:
    p, labels = LOGITS[:1].softmax(1), LABELS[:1].clamp_max(1)  # class 2 is absent: it weighs as the smallest
    truth = F.one_hot(labels, K).movedim(-1, 1).double()
    sizes = [float(truth[0, k].sum()) for k in range(K)]
    weights = [s**-2 for s in sizes[:2]] + [min(sizes[:2]) ** -2]
    above = 2 * sum(w * float((p * truth)[0, k].sum()) for k, w in enumerate(weights))
    below = sum(w * float((p + truth)[0, k].sum()) for k, w in enumerate(weights))
    close(losses.generalized_dice(LOGITS[:1], labels), 1 - above / below)


def test_lovasz_is_one_minus_iou_where_all_is_certain() -> None:
    predicted = torch.randint(0, K, LABELS.shape, generator=torch.Generator().manual_seed(2))
    certain = F.one_hot(predicted, K).movedim(-1, 1).double()
    expected = []
    for i in range(2):
        both = [((predicted[i] == k) & (LABELS[i] == k)).sum() for k in range(K)]
        any_ = [((predicted[i] == k) | (LABELS[i] == k)).sum() for k in range(K)]
        expected.append(1 - sum(float(b / a) for b, a in zip(both, any_, strict=True)) / K)
    close(losses.lovasz(certain, LABELS, activation="none", reduction="none"), torch.tensor(expected))


def test_lovasz_extension_by_its_definition() -> None:
    p = LOGITS.softmax(1)
    errors, truth = (TRUTH - p).abs()[0, 1].flatten(), TRUTH[0, 1].flatten()
    order, previous, total = errors.argsort(descending=True).tolist(), 0.0, 0.0
    for n in range(1, len(order) + 1):
        wrong = order[:n]
        missed = sum(float(truth[i]) for i in wrong)
        size = float(truth.sum())
        loss = 1 - (size - missed) / (size + n - missed)
        total += float(errors[order[n - 1]]) * (loss - previous)
        previous = loss
    one = losses.lovasz(p[:1, 1:2], TRUTH[:1, 1:2], activation="none")
    close(one, total)


@pytest.mark.parametrize("loss", [losses.tversky, losses.generalized_dice, losses.lovasz])
def test_perfect_regions_cost_nothing_and_ignored_pixels_neither(loss) -> None:
    certain = 60 * TRUTH
    close(loss(certain, LABELS), 0.0, 1e-6)
    labels = LABELS.clone()
    labels[:, :2] = 255
    moved = LOGITS.clone()
    moved[:, :, :2] = 7.0
    close(loss(moved, labels, ignore_index=255), loss(LOGITS, labels, ignore_index=255))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.tversky(LOGITS, LABELS, alpha=0.0), "alpha, beta and gamma must be above 0, got alpha=0.0"),
        (lambda: losses.sigmoid_focal(LOGITS, TRUTH, alpha=1.5), r"alpha must be in \[0, 1\] or None, got 1.5"),
        (lambda: losses.sigmoid_focal(LOGITS, TRUTH, gamma=-1.0), "gamma must be at least 0, got -1.0"),
        (lambda: losses.lovasz(LOGITS, LABELS, absent="skip"), "absent must be one of"),
        (lambda: losses.generalized_dice(LOGITS, LABELS, eps=0.0), "eps must be above 0, got 0.0"),
    ],
)
def test_refuses(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
