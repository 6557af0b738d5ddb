"""Losses and boxes of public reports (torch, torchvision, optax, MONAI): edges at which others are NaN, or wrong."""

import itertools

import pytest
import torch
import torch.nn.functional as F
import torchvision

from holofunc import losses, ops, random

X = random.normal(random.key(0), (6, 5))
Y = torch.tensor([0, 1, 2, 3, 4, -100])
WEIGHT = torch.tensor([0.2, 1.0, 0.0, 2.0, 3.0])
OF_LABELS = ("cross_entropy", "focal", "poly", "complement_cross_entropy", "multilabel_cross_entropy")
OF_REGIONS = ("dice", "generalized_dice", "tversky", "lovasz")


def finite(loss, *args):
    """The value, if it and its gradients are finite."""
    value = loss(*args)
    gradients = torch.func.grad(lambda *xs: loss(*xs).float().sum(), tuple(range(len(args))))(*args)
    assert all(x.isfinite().all() for x in (value, *gradients))
    return value, gradients


@pytest.mark.parametrize(
    ("weight", "smoothing", "reduction"),
    list(itertools.product((None, WEIGHT), (0.0, 0.1, 1.0), ("mean", "sum", "none"))),
)
def test_weights_smoothing_and_ignored_labels_together(weight, smoothing, reduction):
    options = {"weight": weight, "label_smoothing": smoothing, "reduction": reduction}
    torch.testing.assert_close(losses.cross_entropy(X, Y, **options), F.cross_entropy(X, Y, **options))


@pytest.mark.parametrize("name", [*OF_LABELS, *OF_REGIONS, "supervised_contrastive"])
def test_where_all_is_ignored_nothing_is_learnt(name):
    _, (gradient,) = finite(lambda x: getattr(losses, name)(x, torch.full((6,), -100)), X)
    assert not gradient.any()


@pytest.mark.parametrize("name", [*OF_LABELS, *OF_REGIONS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_huge_logits_of_half_precision(name, dtype):
    finite(lambda x: getattr(losses, name)(x, Y.clamp_min(0)), (3e3 * X).to(dtype))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_focal_of_certain_predictions(gamma, dtype):
    """The derivative of ``(1 - p)**gamma`` is infinite at 1 for a gamma below 1."""
    x = torch.tensor([[200.0, -200.0], [-200.0, 200.0], [0.0, 0.0]], dtype=dtype)
    finite(lambda x: losses.focal(x, torch.tensor([0, 0, 1]), gamma=gamma), x)
    finite(lambda x: losses.sigmoid_focal(x[:, 0], torch.tensor([1.0, 0.0, 1.0]), gamma=gamma), x)


def test_values_are_torchs():
    targets = (random.uniform(random.key(1), (6, 5)) > 0.5).float()
    other, third = (random.normal(random.key(seed), (6, 5)) for seed in (2, 3))
    extreme = torch.tensor([1e4, -1e4, 100.0, -100.0, 0.0])
    halves = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.5])
    sides = torch.tensor([1, -1, 1, -1, 1, 1])
    close = torch.testing.assert_close
    close(
        losses.sigmoid_focal(X, targets, reduction="sum"),
        torchvision.ops.sigmoid_focal_loss(X, targets, reduction="sum"),
    )
    close(
        finite(lambda x: losses.binary_cross_entropy(x, halves, pos_weight=3.0), extreme)[0],
        F.binary_cross_entropy_with_logits(extreme, halves, pos_weight=torch.tensor(3.0)),
    )
    close(losses.huber(X, other, delta=0.7), F.huber_loss(X, other, delta=0.7))
    close(losses.smooth_l1(X, other, beta=0.7), F.smooth_l1_loss(X, other, beta=0.7))
    close(losses.smooth_l1(X, other, beta=0.0), F.l1_loss(X, other))
    close(losses.triplet(X, other, third, swap=True), F.triplet_margin_loss(X, other, third, swap=True))
    close(losses.cosine(X, other, similar=sides > 0, margin=0.1), F.cosine_embedding_loss(X, other, sides, margin=0.1))
    for dtype in (torch.int32, torch.uint8, torch.int16, torch.int8):
        close(losses.cross_entropy(X[:5], Y[:5].to(dtype)), F.cross_entropy(X[:5], Y[:5]))
    each = torch.vmap(lambda x, y: losses.cross_entropy(x[None], y[None]))(X, Y)
    close(each, F.cross_entropy(X, Y, reduction="none"))


def test_vectors_of_zero_and_equal_ones():
    zero, ones = torch.zeros(4, 3), torch.ones(4, 3)
    labels = torch.tensor([0, 0, 1, 1])
    finite(lambda a: losses.cosine(a, ones), zero)
    finite(lambda a: losses.nt_xent(a, ones), zero)
    finite(lambda a: losses.supervised_contrastive(a, labels), zero)
    finite(lambda a: losses.triplet(a, ones, ones, swap=True), ones)
    finite(lambda a: losses.supervised_contrastive(a, labels, temperature=0.01), (100 * X[:4]).half())
    for some in ([0, 1, 2, 3], [0, 0, 0, 0], [-100, -100, 0, 1]):
        finite(lambda a: losses.supervised_contrastive(a, torch.tensor(some)), X[:4])  # noqa: B023


def test_regions_without_anything_in_them():
    finite(
        lambda x: losses.dice(x, torch.zeros(2, 1, 4, 4), activation="sigmoid"),
        torch.full((2, 1, 4, 4), -50.0),
    )
    labels = torch.arange(18).view(2, 3, 3) % 2
    certain = torch.full((2, 2, 3, 3), -40.0).scatter(1, labels[:, None], 40.0)
    assert finite(lambda x: losses.lovasz(x, labels), certain)[0] < 1e-3


def test_masked_logits_of_teacher_and_student():
    x, teacher = X.clone(), X.roll(1, 0)
    x[:, 0] = teacher[:, 0] = -torch.inf
    finite(lambda x: losses.kl_divergence(x, teacher, temperature=2.0), x)


@pytest.mark.parametrize("lengths", [(5, 5), (2, 5), (1, 1)])
@pytest.mark.parametrize("labels", [(3, 3), (0, 2), (3, 0), (0, 0)])
def test_ctc_of_what_does_not_fit_and_of_nothing(lengths, labels):
    targets = torch.tensor([[1, 1, 1], [1, 2, 3]])
    logits = random.normal(random.key(0), (5, 2, 4))
    lengths, labels = torch.tensor(lengths), torch.tensor(labels)
    finite(lambda x: losses.ctc(x, targets, input_lengths=lengths, target_lengths=labels), logits)


@pytest.mark.parametrize("name", ["giou_loss", "diou_loss", "ciou_loss"])
@pytest.mark.parametrize("paired", [True, False])
def test_boxes_without_area(name, paired):
    boxes = torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.2, 0.2, 0.2, 0.5]])
    finite(lambda a, b: getattr(ops.boxes, name)(a, b, paired=paired).sum(), boxes, boxes.clone())


def test_boxes_of_half_precision_and_none():
    boxes = torch.tensor([[0.0, 0.0, 1200.0, 1200.0], [10.0, 10.0, 900.0, 900.0]])  # whose areas overflow in fp16
    torch.testing.assert_close(
        ops.boxes.box_iou(boxes.half(), boxes.half()).float(),
        torchvision.ops.box_iou(boxes, boxes),
        rtol=2e-3,
        atol=1e-3,
    )
    assert ops.boxes.dynamic_nms(torch.zeros(0, 4), torch.zeros(0), 0.5).numel() == 0
    twice = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(2, 4)
    assert ops.boxes.dynamic_nms(twice, torch.tensor([0.5, 0.5]), 0.5).tolist() == [0]
