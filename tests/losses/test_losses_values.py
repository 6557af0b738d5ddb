"""What each loss computes: definitions written as loops, hand-made cases, limits, torch, torchvision, and pylocron where
it is right."""

import itertools
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.ops
from torch import Tensor

from holofunc import losses, random

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pylocron compiles a torch.jit class when it is imported
    import holocron.nn
    import holocron.nn.functional as theirs

close = torch.testing.assert_close
K = 4
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 0.25], dtype=torch.float64)
SPATIAL = [(), (5,), (2, 3), (2, 1, 3)]
spatial = pytest.mark.parametrize("spatial", SPATIAL, ids=lambda s: f"{len(s)}d")
weighted = pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*shape: int, seed: int = 7) -> Tensor:
    return torch.randint(K, shape, generator=torch.Generator().manual_seed(seed))


def one_hot(targets: Tensor, classes: int = K) -> Tensor:
    return F.one_hot(targets, classes).movedim(-1, 1).double()


# --- the definitions, one position and one class at a time ---------------------------------------------------------


def softmax(z: list[float]) -> list[float]:
    return [math.exp(a) / sum(math.exp(b) for b in z) for a in z]


def complement(z: list[float], k: int) -> float:
    p = softmax(z)
    return -sum(q * math.log(q) for q in (p[j] / (1 - p[k]) for j in range(len(z)) if j != k))


OF_CLASS: dict[str, Callable[[list[float], int], float]] = {
    "cross_entropy": lambda z, k: -math.log(softmax(z)[k]),
    "multilabel_cross_entropy": lambda z, k: -math.log(softmax(z)[k]),
    "focal": lambda z, k: -((1 - softmax(z)[k]) ** 1.5) * math.log(softmax(z)[k]),
    "poly": lambda z, k: -math.log(softmax(z)[k]) + 0.7 * (1 - softmax(z)[k]),
    "complement_cross_entropy": lambda z, k: -math.log(softmax(z)[k]) - 0.9 / (K - 1) * complement(z, k),
}
OPTIONS: dict[str, dict[str, float]] = {
    "focal": {"gamma": 1.5}, "poly": {"eps": 0.7}, "complement_cross_entropy": {"gamma": -0.9},
}  # fmt: skip


@pytest.mark.parametrize("name", OF_CLASS)
@spatial
@weighted
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_equals_its_definition(name: str, spatial: tuple[int, ...], weight: Tensor | None, smoothing: float) -> None:
    x, hard, soft = draw(6, K, *spatial), labels(6, *spatial), draw(6, K, *spatial, seed=1).softmax(1)
    hard.view(-1)[::3] = 255
    w = [1.0] * K if weight is None else weight.tolist()
    loss = partial(getattr(losses, name), weight=weight, label_smoothing=smoothing, **OPTIONS.get(name, {}))

    def at(z: list[float], t: list[float]) -> float:
        smoothed = [(1 - smoothing) * a + smoothing / K for a in t]
        return sum(w[k] * smoothed[k] * OF_CLASS[name](z, k) for k in range(K))

    positions = [z.tolist() for z in x.movedim(1, -1).reshape(-1, K)]
    of_hard = [0.0 if y == 255 else at(z, [float(k == y) for k in range(K)]) for z, y in zip(positions, hard.flatten().tolist(), strict=True)]  # fmt: skip
    rows = soft.movedim(1, -1).reshape(-1, K).tolist()
    of_soft = [at(z, t) for z, t in zip(positions, rows, strict=True)]
    mass_hard = [w[y] for y in hard.flatten().tolist() if y != 255]
    mass_soft = [sum(a * b for a, b in zip(w, t, strict=True)) for t in rows]
    for targets, each, mass in ((hard, of_hard, mass_hard), (soft, of_soft, mass_soft)):
        fn = partial(loss, x, targets, ignore_index=255)
        expected = torch.tensor(each, dtype=torch.float64)
        close(fn(reduction="none"), expected.view(hard.shape))
        close(fn(reduction="sum"), expected.sum())
        close(fn(reduction="mean"), expected.sum() / sum(mass))
        close(fn(reduction="mean", mean_over="samples"), expected.sum() / len(mass))


@spatial
def test_spatial_dimensions_are_one_list_of_positions(spatial: tuple[int, ...]) -> None:
    x, hard, soft = draw(3, 2 * K, *spatial), labels(3, *spatial), draw(3, K, *spatial, seed=1).softmax(1)
    flat = lambda t, start: t.reshape(*t.shape[:start], -1)  # noqa: E731
    named: dict[str, Callable[..., Tensor]] = {name: getattr(losses, name) for name in [*OF_CLASS, "dice", "binary_cross_entropy"]}  # fmt: skip
    for name, fn in named.items():
        for targets, start in ((hard, 1), (soft, 2)):
            close(fn(x[:, :K], targets), fn(flat(x[:, :K], 2), flat(targets, start)), msg=name)
    if spatial:
        for targets, start in ((hard, 1), (soft, 2)):
            mutual = partial(losses.mutual_channel, key=random.key(0))
            close(mutual(x, targets), mutual(flat(x, 2), flat(targets, start)))


# --- limits --------------------------------------------------------------------------------------------------------


@weighted
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_become_cross_entropy(weight: Tensor | None, smoothing: float) -> None:
    x, hard, soft = draw(6, K, 3), labels(6, 3), draw(6, K, 3, seed=1).softmax(1)
    options: dict[str, Any] = {"weight": weight, "label_smoothing": smoothing}
    for targets in (hard, soft):
        expected = losses.cross_entropy(x, targets, **options)
        close(losses.focal(x, targets, gamma=0.0, **options), expected)
        close(losses.poly(x, targets, eps=0.0, **options), expected)
        close(losses.complement_cross_entropy(x, targets, gamma=0.0, **options), expected)
        close(losses.multilabel_cross_entropy(x, targets, **options), expected)
        close(losses.mutual_channel(x, targets, xi=1, alpha=0.0, **options), expected)
        close(losses.class_balanced(losses.cross_entropy, [1, 2, 3, 4], beta=0.0)(x, targets, **options), expected)


def test_the_gradient_of_focal_at_gamma_zero_is_that_of_cross_entropy() -> None:
    x, t = draw(6, K), labels(6)
    gradient = torch.func.grad(lambda x: losses.focal(x, t, gamma=0.0))(x)
    close(gradient, torch.func.grad(losses.cross_entropy)(x, t))


def test_smoothed_completely_the_label_does_not_matter() -> None:
    x, t = draw(6, K), labels(6)
    for name in OF_CLASS:
        fn = partial(getattr(losses, name), label_smoothing=1.0)
        close(fn(x, t), fn(x, (t + 1) % K))


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_closed_forms_for_equal_logits(classes: int) -> None:
    x, t = torch.zeros(1, classes, dtype=torch.float64), torch.tensor([classes - 1])
    log = math.log(classes)
    expected = {
        "cross_entropy": log,
        "focal": (1 - 1 / classes) ** 2 * log,
        "poly": log + 2 * (1 - 1 / classes),
        "complement_cross_entropy": log - math.log(classes - 1) / (classes - 1),
        "binary_cross_entropy": math.log(2),
        "multilabel_cross_entropy": log,
    }
    for name, value in expected.items():
        close(getattr(losses, name)(x, t).item(), value, msg=name)


def test_more_focus_costs_less_and_more_polynomial_more() -> None:
    x, t = draw(20, K), labels(20)
    for less, more in itertools.pairwise([0.0, 0.5, 1.0, 2.0, 5.0]):
        assert (
            losses.focal(x, t, gamma=more, reduction="none") < losses.focal(x, t, gamma=less, reduction="none")
        ).all()
        assert (losses.poly(x, t, eps=more, reduction="none") > losses.poly(x, t, eps=less, reduction="none")).all()


def test_hyperparameters_may_be_tensors_and_are_differentiated() -> None:
    x, t, value = draw(6, K), labels(6), torch.tensor(1.3, dtype=torch.float64)
    named = {"focal": "gamma", "poly": "eps", "complement_cross_entropy": "gamma"}
    for name, option in named.items():
        fn = lambda v, name=name, option=option: getattr(losses, name)(x, t, **{option: v})  # noqa: E731
        close(fn(value), fn(1.3))
        close(torch.func.grad(fn)(value), (fn(value + 1e-6) - fn(value - 1e-6)) / 2e-6)


# --- torch and torchvision -----------------------------------------------------------------------------------------


@spatial
@weighted
@pytest.mark.parametrize("ignored", [-100, 255, -1, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_of_labels_is_torchs(
    spatial: tuple[int, ...], weight: Tensor | None, ignored: int, reduction: str
) -> None:
    x, t = draw(6, K, *spatial), labels(6, *spatial)
    t.view(-1)[::4] = ignored
    for smoothing in (0.0, 0.3):
        options = {"weight": weight, "ignore_index": ignored, "reduction": reduction, "label_smoothing": smoothing}
        (gradient, value), (expected_gradient, expected) = (
            torch.func.grad_and_value(lambda x, fn=fn: fn(x, t, **options).sum())(x)  # noqa: B023
            for fn in (losses.cross_entropy, F.cross_entropy)
        )
        close(value, expected)
        close(gradient, expected_gradient)


@spatial
@weighted
def test_cross_entropy_of_soft_targets_is_torchs(spatial: tuple[int, ...], weight: Tensor | None) -> None:
    x, t = draw(6, K, *spatial), draw(6, K, *spatial, seed=1).softmax(1)
    for smoothing in (0.0, 0.3):
        options: dict[str, Any] = {"weight": weight, "label_smoothing": smoothing}
        for reduction in ("sum", "none"):
            expected = F.cross_entropy(x, t, reduction=reduction, **options)
            close(losses.cross_entropy(x, t, reduction=reduction, **options), expected)
        close(losses.cross_entropy(x, t, mean_over="samples", **options), F.cross_entropy(x, t, **options))


@spatial
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_binary_cross_entropy_is_torchs(spatial: tuple[int, ...], reduction: str) -> None:
    x, t, positive = draw(6, K, *spatial), draw(6, K, *spatial, seed=1).sigmoid(), WEIGHT.flip(0)
    column = lambda w: w.view(-1, *[1] * len(spatial))  # noqa: E731
    ours = losses.binary_cross_entropy(
        x, t, pos_weight=positive, weight=WEIGHT, reduction=reduction, mean_over="samples"
    )
    expected = F.binary_cross_entropy_with_logits(
        x, t, column(WEIGHT), pos_weight=column(positive), reduction=reduction
    )
    close(ours, expected)
    close(losses.binary_cross_entropy(x, t.round().long(), reduction=reduction),
          F.binary_cross_entropy_with_logits(x, t.round(), reduction=reduction))  # fmt: skip


def test_binary_targets_of_one_decision_may_lack_its_dimension() -> None:
    x, t = draw(6, 1, 3), labels(6, 3) % 2
    expected = F.binary_cross_entropy_with_logits(x[:, 0], t.double())
    for targets in (t, t.double(), t[:, None], t[:, None].double()):
        close(losses.binary_cross_entropy(x, targets), expected)
    close(losses.binary_cross_entropy(x[0, 0, 0], t[0, 0]), losses.binary_cross_entropy(x[:1, :, :1], t[:1, :1]))


def test_unknown_answers_count_nothing() -> None:
    x, t = draw(6, K), (labels(6, K) % 2).double()
    t[1, 2] = t[3] = -1
    known = t != -1
    for reduction in ("mean", "sum"):
        expected = F.binary_cross_entropy_with_logits(x[known], t[known], reduction=reduction)
        close(losses.binary_cross_entropy(x, t, ignore_index=-1, reduction=reduction), expected)


def test_two_classes_are_one_decision() -> None:
    x, t = draw(8), labels(8) % 2
    pair = torch.stack([torch.zeros_like(x), x], 1)
    close(losses.cross_entropy(pair, t), F.binary_cross_entropy_with_logits(x, t.double()))
    focal = torchvision.ops.sigmoid_focal_loss(x, t.double(), alpha=-1, gamma=1.5, reduction="none")
    close(losses.focal(pair, t, gamma=1.5, reduction="none"), focal)


# --- confidence ----------------------------------------------------------------------------------------------------


def test_where_the_label_is_certain() -> None:
    for peak in (30.0, 200.0, 1e4):
        x, t = torch.tensor([[peak, 0.0, 0.0]]), torch.tensor([0])
        close(losses.complement_cross_entropy(x, t), torch.tensor(-math.log(2) / 2))
        assert not theirs.complement_cross_entropy(x, t).isfinite()
        for name in ("cross_entropy", "focal", "poly", "multilabel_cross_entropy"):
            close(getattr(losses, name)(x, t), torch.tensor(0.0), rtol=0, atol=1e-6)
            wrong = {"cross_entropy": peak, "focal": peak, "poly": peak + 2, "multilabel_cross_entropy": peak}[name]
            close(getattr(losses, name)(x, t + 1), torch.tensor(wrong))


def test_focal_below_one_has_a_gradient_where_the_label_is_certain() -> None:
    x, t = torch.tensor([[200.0, 0.0]]), torch.tensor([0])
    close(torch.func.grad(lambda x: losses.focal(x, t, gamma=0.5))(x), torch.zeros(1, 2), rtol=0, atol=1e-4)


# --- pylocron ------------------------------------------------------------------------------------------------------


@spatial
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@weighted
def test_equals_pylocron(spatial: tuple[int, ...], reduction: str, weight: Tensor | None) -> None:
    x, t, soft = draw(6, K, *spatial), labels(6, *spatial), draw(6, K, *spatial, seed=1).softmax(1)
    ours: dict[str, Any] = {"reduction": reduction, "weight": weight, "mean_over": "samples"}
    options: dict[str, Any] = {"reduction": reduction, "weight": weight}
    close(losses.multilabel_cross_entropy(x, soft, **ours), theirs.multilabel_cross_entropy(x, soft, **options))
    expected = theirs.poly_loss(x, t, **options)  # which flattens
    close(losses.poly(x, t, **ours).flatten(), expected.flatten())
    t.view(-1)[::4] = 255
    close(losses.focal(x, t, ignore_index=255, **ours), theirs.focal_loss(x, t, ignore_index=255, **options))


@spatial
def test_complement_entropy_equals_pylocrons(spatial: tuple[int, ...]) -> None:
    x, t = draw(6, K, *spatial), labels(6, *spatial)
    for reduction in ("mean", "sum", "none"):
        expected = theirs.complement_cross_entropy(x, t, gamma=-2, reduction=reduction)
        close(losses.complement_cross_entropy(x, t, gamma=-2.0, reduction=reduction), expected)


# --- dice ----------------------------------------------------------------------------------------------------------


def dice_of_sets(predicted: list[int], true: list[int], **options: Any) -> float:
    """Of one binary class."""
    p, t = torch.tensor([[predicted]]).double(), torch.tensor([[true]]).double()
    return losses.dice(p, t, activation="none", **options).item()


def test_dice_counts_sets() -> None:
    predicted, true = [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0]  # 2 right, 1 false, 2 missed
    close(dice_of_sets(predicted, true), 1 - 4 / 7)
    close(dice_of_sets(predicted, true, squared=False), 1 - 4 / 7)
    for gamma in (0.5, 1.0, 4.0):  # 1 - F_beta, gamma = beta^2
        expected = 1 - (1 + gamma) * 2 / ((1 + gamma) * 2 + gamma * 2 + 1)
        close(dice_of_sets(predicted, true, squared=False, gamma=gamma), expected)
    close(dice_of_sets(true, true), 0.0)
    close(dice_of_sets([0, 0, 0, 1], [1, 1, 0, 0]), 1.0)


def test_dice_squares_what_is_uncertain() -> None:
    p, t = torch.full((1, 1, 4), 0.5).double(), torch.tensor([[[1.0, 1.0, 0.0, 0.0]]]).double()
    close(losses.dice(p, t, activation="none").item(), 1 - 2 * 1 / (1 + 2))
    close(losses.dice(p, t, activation="none", squared=False).item(), 1 - 2 * 1 / (2 + 2))


def test_absent_classes_neither_help_nor_harm_unless_counted() -> None:
    t = torch.zeros(1, 6, dtype=torch.int64)
    p = one_hot(t, 3)
    close(losses.dice(p, t, activation="none").item(), 0.0)
    close(losses.dice(p, t, activation="none", absent="count").item(), 0.0)
    assert theirs.dice_loss(p, one_hot(t, 3)) < -0.6  # where [0, 1] is promised
    p = torch.tensor([0.8, 0.2, 0.0]).double().view(1, 3, 1).expand(1, 3, 6)
    one = 1 - 2 * 0.8 * 6 / (0.64 * 6 + 6)
    close(losses.dice(p, t, activation="none").item(), one)
    close(losses.dice(p, t, activation="none", absent="count").item(), (one + 1 + 0) / 3, rtol=0, atol=1e-6)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("absent", ["exclude", "count"])
def test_dice_is_in_its_range_and_activates(activation: Any, squared: bool, absent: Any) -> None:
    options: dict[str, Any] = {"squared": squared, "absent": absent}
    for seed in range(20):
        x, t = 10 * draw(2, K, 3, seed=seed), labels(2, 3, seed=seed)
        value = losses.dice(x, t, activation=activation, **options)
        assert 0 <= value <= 1
        p = x.softmax(1) if activation == "softmax" else x.sigmoid()
        close(losses.dice(p, t, activation="none", **options), value)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_dice_pooled_over_the_batch_equals_pylocrons(gamma: float) -> None:
    x, t = draw(3, K, 4, 5), one_hot(labels(3, 4, 5))
    pooled = [v.transpose(0, 1).flatten(1)[None] for v in (x, t)]
    close(losses.dice(*pooled, squared=False, gamma=gamma), theirs.dice_loss(x.softmax(1), t, gamma=gamma))
    weight = WEIGHT.clone()
    per_class = torch.stack([
        losses.dice(pooled[0].softmax(1)[:, k : k + 1], pooled[1][:, k : k + 1], activation="none") for k in range(K)
    ])  # fmt: skip
    close(losses.dice(*pooled, weight=weight), (per_class * weight).sum() / weight.sum())


def test_dice_leaves_ignored_pixels_out() -> None:
    x, t = draw(1, K, 12), labels(1, 12)
    t[0, 8:] = 255
    close(losses.dice(x, t, ignore_index=255), losses.dice(x[..., :8], t[..., :8]))


# --- mutual channel ------------------------------------------------------------------------------------------------


def test_mutual_channel_equals_its_definition() -> None:
    x, t, xi, alpha = draw(3, 2 * 3, 2, 2), torch.tensor([0, 1, 1]), 3, 1.7
    maps = x.view(3, 2, xi, 4)
    for i in range(3):
        pooled = [sum(max(maps[i, k, j, p].item() for j in range(xi)) for p in range(4)) / 4 for k in range(2)]
        spread = maps[i].softmax(-1)
        h = sum(max(spread[k, j, p].item() for j in range(xi)) for k in range(2) for p in range(4)) / 2
        expected = -math.log(softmax(pooled)[int(t[i])]) - alpha * h
        close(losses.mutual_channel(x[i : i + 1], t[i : i + 1], xi=xi, alpha=alpha).item(), expected)
    each = losses.mutual_channel(x, t, xi=xi, alpha=alpha, reduction="none")
    close(losses.mutual_channel(x, t, xi=xi, alpha=alpha), each.mean())


def test_diversity_counts_the_places() -> None:
    t = torch.tensor([0])
    for places in (1, 2, 3):
        maps = torch.full((1, 3, 9), -100.0)
        for channel in range(3):
            maps[0, channel, channel % places] = 100.0
        with_, without = (losses.mutual_channel(maps, t, xi=3, alpha=alpha) for alpha in (1.0, 0.0))
        close(without - with_, torch.tensor(float(places)))


@pytest.mark.parametrize("xi", [1, 2, 3, 5])
def test_the_mask_hides_half_of_each_classs_channels(xi: int) -> None:
    """Sample i raises channel i only, so its cost tells whether that channel is seen."""
    x, t = 3 * torch.eye(K * xi)[..., None], torch.arange(K).repeat_interleave(xi)
    seen = []
    for seed in range(200):
        each = losses.mutual_channel(x, t, xi=xi, alpha=0.0, key=random.key(seed), reduction="none")
        seen.append((each < math.log(K) - 0.1).view(K, xi))
    counts = torch.stack(seen).sum(2)
    assert (counts == xi - xi // 2).all()
    rates = torch.stack(seen).double().mean(0)
    close(rates, torch.full_like(rates, 1 - (xi // 2) / xi), rtol=0, atol=0.15)
    if xi > 1:
        assert any(len(masks.unique(dim=0)) > 1 for masks in seen)  # each class has a mask of its own
    assert (losses.mutual_channel(x, t, xi=xi, alpha=0.0, reduction="none") < math.log(K) - 0.1).all()


def test_mutual_channel_equals_pylocrons_but_for_the_scale_of_diversity() -> None:
    x, t = draw(3, 2 * K, 3, 5), labels(3, 3, 5)
    expected = theirs.mutual_channel_loss(x, t, xi=2, alpha=15.0, training=False)
    close(losses.mutual_channel(x, t, xi=2, alpha=1.0), expected)


# --- balanced ------------------------------------------------------------------------------------------------------


def test_balanced_weights_by_hand() -> None:
    counts, beta, t = [10, 1, 0, 3], 0.9, torch.arange(4)
    effective = [(1 - beta ** max(n, 1)) / (1 - beta) for n in counts]
    weights = torch.tensor([1 / e for e in effective], dtype=torch.float64)
    weights *= 4 / weights.sum()
    each = losses.class_balanced(losses.cross_entropy, counts, beta)(torch.zeros(4, 4).double(), t, reduction="none")
    close(each, weights * math.log(4))
    close(each.sum().item(), 4 * math.log(4))


def test_balanced_limits_and_purity() -> None:
    x, t, counts = draw(20, K), labels(20), torch.tensor([5.0, 10.0, 20.0, 40.0])
    before = counts.clone()
    near_one = losses.class_balanced(losses.focal, counts, beta=1 - 1e-9)
    close(near_one(x, t), losses.focal(x, t, weight=1 / counts), rtol=1e-6, atol=1e-7)
    balanced = losses.class_balanced(losses.cross_entropy, counts, beta=0.95)
    given = WEIGHT.clone()
    own = (1 - 0.95 ** counts.double()).reciprocal()
    close(balanced(x, t, weight=given), losses.cross_entropy(x, t, weight=own * given))
    assert torch.equal(given, WEIGHT)
    assert torch.equal(counts, before)
    criterion = holocron.nn.ClassBalancedWrapper(torch.nn.CrossEntropyLoss(), counts, beta=0.95)
    close(balanced(x.float(), t), criterion(x.float(), t))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.class_balanced(losses.focal, [1, -1]), "num_samples must be one number per class"),
        (lambda: losses.class_balanced(losses.focal, []), "num_samples must be one number per class"),
        (lambda: losses.class_balanced(losses.focal, [1, 2], beta=1.0), r"beta must be in \[0, 1\), got 1.0"),
        (
            lambda: losses.class_balanced(losses.focal, [1, 2])(torch.zeros(1, 3), torch.tensor([0])),
            r"weight must have shape \(3,\), one value per class, got \(2,\)",
        ),
        (lambda: losses.focal(torch.zeros(1, 2), torch.tensor([0]), gamma=-1.0), "gamma must be at least 0, got -1.0"),
        (lambda: losses.cross_entropy(torch.zeros(1, 2), torch.tensor([0]), label_smoothing=1.1), "label_smoothing"),
        (lambda: losses.binary_cross_entropy(torch.zeros(1, 2), torch.zeros(1, 2), label_smoothing=-1), "smoothing"),
        (lambda: losses.complement_cross_entropy(torch.zeros(1, 1), torch.tensor([0])), "at least 2 classes"),
        (lambda: losses.cross_entropy(torch.tensor(0.0), torch.tensor(0)), "logits must have a class dimension"),
        (lambda: losses.mutual_channel(torch.zeros(1, 5, 2), torch.tensor([0])), "xi=2 channels per class, got "),
        (lambda: losses.mutual_channel(torch.zeros(1, 4), torch.tensor([0]), xi=0), "xi must be at least 1, got 0"),
        (lambda: losses.dice(torch.zeros(1, 2), torch.tensor([0]), eps=0.0), "eps must be above 0"),
        (lambda: losses.dice(torch.zeros(1, 2), torch.tensor([0]), gamma=2.0), "gamma must be 1 with squared=True"),
        (lambda: losses.dice(torch.zeros(1, 2), torch.tensor([0]), activation="relu"), "activation must be one of"),  # type: ignore[arg-type]
        (lambda: losses.dice(torch.zeros(1, 2), torch.tensor([0]), absent="skip"), "absent must be one of"),  # type: ignore[arg-type]
    ],
)
def test_refuses(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
