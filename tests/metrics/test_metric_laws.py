"""Metrics: hand numbers, numpy references, and the laws every member obeys."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from holofunc import metrics

CLASSES = 4
NAN = math.nan


def per_row_loss(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


# Every member of the room: name -> (metric, makes one batch (outputs, targets) of n rows from a numpy generator).
def labelled(rng, n):
    return torch.tensor(rng.normal(size=(n, CLASSES)), dtype=torch.float32), torch.tensor(rng.integers(0, CLASSES, n))


def dense(rng, n):
    scores = torch.tensor(rng.normal(size=(n, CLASSES, 2, 3)), dtype=torch.float32)
    return scores, torch.tensor(rng.integers(0, CLASSES, (n, 2, 3)))


def soft(rng, n):
    outputs, labels = labelled(rng, n)
    return outputs, 0.8 * F.one_hot(labels, CLASSES) + 0.05


def binary(rng, n):
    return torch.tensor(rng.normal(size=(n, 3)), dtype=torch.float32), torch.tensor(rng.integers(0, 2, (n, 3)))


def numbers(rng, n):
    x = torch.tensor(rng.normal(size=(n, 2)).round(1), dtype=torch.float32)
    return x, x + torch.tensor(rng.normal(size=(n, 2)).round(1), dtype=torch.float32)


def one(rng, n):
    return torch.tensor(rng.normal(size=n).round(1), dtype=torch.float32), torch.tensor(rng.integers(0, 2, n))


def pictures(rng, n):
    x = torch.tensor(rng.uniform(size=(n, 2, 12, 13)), dtype=torch.float32)
    return x, (x + torch.tensor(rng.normal(size=x.shape), dtype=torch.float32) / 9).clamp(0, 1)


def texts(rng, n):
    labels = [torch.tensor(rng.integers(1, 4, (n, length))) for length in (6, 5)]
    lengths = [torch.tensor(rng.integers(low, 6, (n, 1))) for low in (0, 1)]
    return tuple(torch.where(torch.arange(x.shape[1]) < y, x, -100) for x, y in zip(labels, lengths, strict=True))


COUNTED = {
    name: getattr(metrics, name)
    for name in ("precision", "recall", "f_beta", "iou", "specificity", "hamming", "auroc", "average_precision")
}
MEMBERS = {
    **{f"{name}, one decision": (build(), one) for name, build in COUNTED.items()},
    **{f"{name}, classes": (build(CLASSES, ignore_index=2), dense) for name, build in COUNTED.items()},
    **{f"{name}, labels": (build(3, multilabel=True), binary) for name, build in COUNTED.items()},
    "precision, each": (metrics.precision(CLASSES, average="none"), labelled),
    "recall, weighted": (metrics.recall(CLASSES, average="weighted"), soft),
    "iou, micro": (metrics.iou(CLASSES, average="micro"), labelled),
    "auroc, each": (metrics.auroc(CLASSES, average="none"), labelled),
    "auroc, bins": (metrics.auroc(CLASSES, bins=8), labelled),
    "average precision, weighted": (metrics.average_precision(CLASSES, average="weighted"), labelled),
    "average precision, bins": (metrics.average_precision(3, multilabel=True, bins=8), binary),
    "class scores": (metrics.class_scores(CLASSES), labelled),
    "kappa": (metrics.kappa(CLASSES, weights="quadratic"), labelled),
    "kappa, one decision": (metrics.kappa(), one),
    "matthews": (metrics.matthews(CLASSES), labelled),
    "matthews, one decision": (metrics.matthews(threshold=0.4), one),
    "calibration error": (metrics.calibration_error(CLASSES, bins=5), labelled),
    "calibration error, one decision": (metrics.calibration_error(norm="max", bins=4), one),
    "mse": (metrics.mse(), numbers),
    "rmse": (metrics.mse(root=True), numbers),
    "mae": (metrics.mae(), numbers),
    "r2": (metrics.r2(), numbers),
    "pearson": (metrics.pearson(), numbers),
    "spearman": (metrics.spearman(), numbers),
    "psnr": (metrics.psnr(), pictures),
    "psnr of all": (metrics.psnr(per_image=False), pictures),
    "ssim": (metrics.ssim(window=5), pictures),
    "sum": (metrics.sum(per_row_loss), labelled),
    "min": (metrics.min(per_row_loss), labelled),
    "max": (metrics.max(lambda outputs, _: outputs), dense),
    "segmentation": (metrics.segmentation(CLASSES, ignore_index=1), dense),
    "segmentation, per image": (metrics.segmentation(CLASSES, ignore_index=1, per_image=True), dense),
    "mean": (metrics.mean(per_row_loss), labelled),
    "mean of elements": (metrics.mean(lambda outputs, _: outputs), dense),
    "accuracy": (metrics.accuracy(), labelled),
    "accuracy, soft targets": (metrics.accuracy(), soft),
    "accuracy, dense": (metrics.accuracy(ignore_index=2), dense),
    "accuracy, top 1 and 3": (metrics.accuracy(topk=(1, 3)), labelled),
    "binary accuracy": (metrics.binary_accuracy(0.3), binary),
    "confusion": (metrics.confusion(CLASSES), labelled),
    "confusion, dense": (metrics.confusion(CLASSES, ignore_index=0), dense),
    "confusion, soft targets": (metrics.confusion(CLASSES), soft),
    "char error rate": (metrics.char_error_rate(), texts),
    "word error rate": (metrics.word_error_rate(3), texts),
    "combined": (metrics.combine(loss=metrics.mean(per_row_loss), top=metrics.accuracy(topk=(1, 2))), labelled),
}
members = pytest.mark.parametrize("name", MEMBERS)


def test_table_is_complete():
    built = {name.split(",")[0].replace(" ", "_") for name in MEMBERS}
    elsewhere = {"coco", "collect", "detection_errors"}  # whose rows are not tensors: tests of their own
    assert set(metrics.available()) <= built | elsewhere


def computed(metric, state):
    value = metric.compute(state)
    return value if isinstance(value, dict) else {"": value}


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], equal_nan=True, **tolerance)


# --- laws ---


@members
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**16), cuts=st.lists(st.integers(0, 12), max_size=4))
def test_merging_any_split_equals_the_whole(name, seed, cuts):
    metric, make = MEMBERS[name]
    outputs, targets = make(np.random.default_rng(seed), 12)
    edges = [0, *sorted(cuts), 12]
    whole = metric.update(metric.init(), outputs, targets)
    parts = [metric.update(metric.init(), outputs[a:b], targets[a:b]) for a, b in pairwise(edges) if b > a]
    merged, running = metric.init(), metric.init()
    for part in parts:
        merged = metric.merge(merged, part)
    for a, b in pairwise(edges):
        if b > a:
            running = metric.update(running, outputs[a:b], targets[a:b])
    assert_same(computed(metric, merged), computed(metric, whole), rtol=1e-6, atol=1e-9)
    assert_same(computed(metric, running), computed(metric, whole), rtol=1e-6, atol=1e-9)


@members
def test_rows_of_weight_zero_are_not_there(name):
    metric, make = MEMBERS[name]
    outputs, targets = make(np.random.default_rng(0), 6)
    padded = torch.cat([outputs, torch.full_like(outputs[:2], NAN if outputs.is_floating_point() else 7)])
    padded_targets = torch.cat([targets, targets[:2]])
    weights = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0])
    got = metric.update(metric.init(), padded, padded_targets, weights=weights)
    assert_same(computed(metric, got), computed(metric, metric.update(metric.init(), outputs, targets)))


@members
def test_a_weight_of_two_is_the_row_twice(name):
    metric, make = MEMBERS[name]
    outputs, targets = make(np.random.default_rng(1), 3)
    weighted = metric.update(metric.init(), outputs, targets, weights=torch.tensor([1.0, 2.0, 1.0]))
    index = [0, 1, 1, 2]
    twice = metric.update(metric.init(), outputs[index], targets[index])
    assert_same(computed(metric, weighted), computed(metric, twice))


@members
def test_compiles_in_one_graph_to_the_same_numbers(name):
    metric, make = MEMBERS[name]
    rng = np.random.default_rng(2)
    torch.compiler.reset()
    compiled = torch.compile(metric.update, backend="eager", fullgraph=True)
    state, expected = metric.init(), metric.init()
    for _ in range(3):
        outputs, targets = make(rng, 5)
        weights = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.5])
        state = compiled(state, outputs, targets, weights=weights)
        expected = metric.update(expected, outputs, targets, weights=weights)
    assert_same(computed(metric, state), computed(metric, expected))


@members
def test_vmap_over_stacked_states(name):
    metric, make = MEMBERS[name]
    rng = np.random.default_rng(3)
    batches = [make(rng, 5) for _ in range(3)]
    outputs, targets = (torch.stack(column) for column in zip(*batches, strict=True))

    def run(outputs, targets):
        return metric.compute(metric.update(metric.init(), outputs, targets))

    stacked = torch.func.vmap(run)(outputs, targets)
    stacked = stacked if isinstance(stacked, dict) else {"": stacked}
    for i, batch in enumerate(batches):
        assert_same({k: v[i] for k, v in stacked.items()}, computed(metric, metric.update(metric.init(), *batch)))


@members
def test_update_changes_no_argument_and_nothing_seen_is_nan_or_zero(name):
    metric, make = MEMBERS[name]
    outputs, targets = make(np.random.default_rng(4), 4)
    state = metric.init()
    before = computed(metric, state)
    copies = outputs.clone(), targets.clone()
    metric.update(state, outputs, targets)
    assert_same(computed(metric, state), before)
    assert torch.equal(outputs, copies[0])
    assert torch.equal(targets, copies[1])
    assert all(value.isnan().all() or not value.any() for value in before.values())


# --- values ---


@members
def test_a_batch_of_no_rows_changes_nothing(name):
    metric, make = MEMBERS[name]
    outputs, targets = make(np.random.default_rng(0), 5)
    state = metric.update(metric.init(), outputs, targets)
    assert_same(computed(metric, metric.update(state, outputs[:0], targets[:0])), computed(metric, state))


@members
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_half_precision_is_measured_as_the_numbers_that_it_holds(name, dtype):
    """Nothing is rounded to a threshold, or counted up to 256."""
    metric, make = MEMBERS[name]
    if name in ("sum", "min", "mean", "combined"):
        pytest.skip("of a value that is computed in half precision")
    half = [x.to(dtype) if x.is_floating_point() else x for x in make(np.random.default_rng(1), 300)]
    single = [x.float() if x.is_floating_point() else x for x in half]
    found = (computed(metric, metric.update(metric.init(), *values)) for values in (half, single))
    assert_same(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mse", "mae", "r2", "pearson", "spearman", "psnr"])
def test_integers_do_not_wrap(name):
    metric = metrics.get(name)
    outputs, targets = torch.tensor([[1, 250, 3, 9], [2, 10, 5, 1]], dtype=torch.uint8)[..., None]
    plain = computed(metric, metric.update(metric.init(), outputs.float(), targets.float()))
    assert_same(computed(metric, metric.update(metric.init(), outputs, targets)), plain)


@pytest.mark.parametrize("name", ["accuracy", "confusion", "precision", "kappa", "calibration_error", "auroc"])
def test_labels_that_are_no_classes_are_named(name):
    metric = metrics.get(name) if name == "accuracy" else metrics.get(name, num_classes=3)
    for label in (3, -2):
        with pytest.raises(ValueError, match=rf"targets must be in \[0, 3\) or equal ignore_index=-100, got {label}"):
            metric.update(metric.init(), torch.zeros(2, 3), torch.tensor([0, label]))
    metric.update(metric.init(), torch.zeros(2, 3), torch.tensor([0, -100]))


def test_mean_is_weighted_by_rows_not_by_batches():
    metric = metrics.mean(lambda outputs, _: outputs.mean())  # a batch mean counts as often as its batch has rows
    state = metric.update(metric.init(), torch.tensor([1.0, 2.0, 3.0]))
    state = metric.update(state, torch.tensor([10.0]))
    assert metric.compute(state).item() == 4.0
    assert state.weight.item() == 4


def test_mean_of_a_scalar_with_a_count():
    metric = metrics.mean()
    state = metric.update(metric.init(), torch.tensor(2.0), weights=3)
    state = metric.update(state, torch.tensor(6.0))
    assert metric.compute(state).item() == 3.0


def test_a_batch_mean_cannot_be_weighted_by_row():
    metric = metrics.mean(lambda outputs, _: outputs.mean())
    with pytest.raises(ValueError, match="return one value per row"):
        metric.update(metric.init(), torch.ones(3), weights=torch.ones(3))


def test_weights_of_another_length():
    metric = metrics.mean()
    with pytest.raises(ValueError, match=r"weights \(2,\) must match the leading axes of the values \(3,\)"):
        metric.update(metric.init(), torch.ones(3), weights=torch.ones(2))


def test_counts_stay_exact_where_float32_stops_counting():
    metric = metrics.mean()
    state = metrics.Average(torch.tensor(0.0).double(), torch.tensor(2.0**24).double())
    state = metric.update(state, torch.ones(1))
    assert state.weight.item() == 2**24 + 1


def test_accuracy_agrees_with_topk():
    outputs, targets = labelled(np.random.default_rng(5), 200)
    metric = metrics.accuracy(topk=(1, 2, 3, 4))
    got = metric.compute(metric.update(metric.init(), outputs, targets))
    order = np.argsort(-outputs.numpy(), axis=1)
    for k in (1, 2, 3, 4):
        expected = (order[:, :k] == targets.numpy()[:, None]).any(1).mean()
        assert got[f"top{k}"].item() == pytest.approx(expected, abs=1e-12)


def test_constant_outputs_do_not_win():
    metric = metrics.accuracy()
    state = metric.update(metric.init(), torch.zeros(4, 4), torch.arange(4))
    assert metric.compute(state).item() == 0.25


def test_nan_outputs_are_wrong():
    outputs = torch.tensor([[NAN, NAN, NAN], [0.0, NAN, 1.0]])
    metric = metrics.accuracy(topk=(1, 2))
    got = metric.compute(metric.update(metric.init(), outputs, torch.tensor([0, 2])))
    assert (got["top1"].item(), got["top2"].item()) == (0.0, 0.5)
    metric = metrics.binary_accuracy()
    assert metric.compute(metric.update(metric.init(), torch.tensor([NAN, NAN]), torch.tensor([0, 1]))).item() == 0.0


@pytest.mark.parametrize("name", ["precision", "recall", "f_beta", "iou"])
def test_nan_outputs_are_no_class(name):
    """Not the class at which argmax finds the nan: a network that has diverged does not score."""
    outputs, labels = torch.full((6, 3), NAN), torch.tensor([0, 1, 2, 0, 0, 0])
    metric = getattr(metrics, name)(3, average="none")
    assert metric.compute(metric.update(metric.init(), outputs, labels)).nan_to_num().tolist() == [0, 0, 0]
    outputs[0, 0], outputs[1] = 9.0, torch.tensor([0.0, 1.0, 0.0])
    micro = metrics.recall(3, average="micro")
    assert micro.compute(micro.update(micro.init(), outputs, labels)).item() == pytest.approx(1 / 6)
    assert metrics.confusion(3).update(metrics.confusion(3).init(), outputs, labels).tolist() == [
        *([0, 0, 0], [0, 1, 0], [0, 0, 0])
    ]


def test_topk_above_the_number_of_classes():
    metric = metrics.accuracy(topk=(1, 5))
    got = metric.compute(metric.update(metric.init(), torch.eye(3), torch.arange(3)))
    assert got["top1"].item() == 1.0
    assert got["top5"].isnan()
    with pytest.raises(ValueError, match=r"topk must be at most num_classes=3, got \(1, 5\)"):
        metrics.accuracy(topk=(1, 5), num_classes=3)
    with pytest.raises(ValueError, match="topk must be integers of at least 1"):
        metrics.accuracy(0)
    with pytest.raises(ValueError, match="topk must be integers of at least 1"):
        metrics.accuracy(topk=(0,))


def test_ignored_rows_are_not_counted():
    metric = metrics.accuracy()
    state = metric.update(metric.init(), torch.eye(3), torch.tensor([0, -100, 1]))
    assert metric.compute(state).item() == 0.5


def test_binary_accuracy_of_a_column_against_flat_targets():
    metric = metrics.binary_accuracy(threshold=0.8)
    outputs = torch.tensor([[1.0], [2.0], [-2.0]])  # probabilities .73, .88, .12
    state = metric.update(metric.init(), outputs, torch.tensor([1.0, 1.0, 0.0]))
    assert metric.compute(state).item() == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match=r"as many elements as outputs \(3, 1\), got \(2,\)"):
        metric.update(metric.init(), outputs, torch.ones(2))
    with pytest.raises(ValueError, match=r"inside \(0, 1\), got 1.0"):
        metrics.binary_accuracy(1.0)


@pytest.mark.parametrize(
    "targets", [torch.tensor([0.0, 1.0, 2.0]), torch.zeros(3, 1, dtype=torch.long), torch.zeros(3, 2)]
)
@pytest.mark.parametrize("metric", [metrics.accuracy(), metrics.confusion(4)], ids=["accuracy", "confusion"])
def test_targets_of_the_wrong_kind(metric, targets):
    with pytest.raises(ValueError, match=r"targets must be integers \(3,\) or soft targets \(3, 4\)"):
        metric.update(metric.init(), torch.zeros(3, 4), targets)


def test_confusion_against_numpy():
    outputs, targets = dense(np.random.default_rng(6), 20)
    targets[0] = 255
    metric = metrics.confusion(CLASSES, ignore_index=255)
    matrix = metric.compute(metric.update(metric.init(), outputs, targets))
    expected = np.zeros((CLASSES, CLASSES))
    for true, predicted in zip(targets.flatten().tolist(), outputs.argmax(1).flatten().tolist(), strict=True):
        if true != 255:
            expected[true, predicted] += 1
    np.testing.assert_array_equal(matrix.numpy(), expected)
    from_labels = metric.update(metric.init(), outputs.argmax(1), targets)
    assert torch.equal(from_labels, matrix)


def test_confusion_checks_the_number_of_scores():
    metric = metrics.confusion(3)
    with pytest.raises(ValueError, match=r"outputs must be \(B, 3, ...\) scores, got \(2, 4\)"):
        metric.update(metric.init(), torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="num_classes must be an integer of at least 1, got 0"):
        metrics.confusion(0)


def test_scores_leave_absent_classes_out_of_the_mean():
    matrix = torch.tensor([[5, 1, 0, 0], [2, 2, 0, 0], [0, 0, 0, 0], [0, 2, 0, 0]], dtype=torch.float64)
    scores = metrics.confusion_scores(matrix)
    iou = [5 / 8, 2 / 7, NAN, 0 / 2]
    assert scores["accuracy"].item() == 7 / 12
    np.testing.assert_allclose(scores["iou"], iou)
    np.testing.assert_allclose(scores["mean_iou"], (5 / 8 + 2 / 7 + 0) / 3)
    np.testing.assert_allclose(scores["recall"], [5 / 6, 2 / 4, NAN, 0 / 2])
    np.testing.assert_allclose(scores["precision"], [5 / 7, 2 / 5, NAN, NAN])


def test_combined_names_nest():
    metric = metrics.combine(a=metrics.combine(b=metrics.mean(), c=metrics.accuracy()), d=metrics.mean())
    state = metric.init()
    assert state.keys() == {"a", "d"}
    assert list(metric.compute(state)) == ["a/b", "a/c", "d"]


def test_state_lives_on_the_device_it_is_asked_for():
    for metric, _ in MEMBERS.values():
        leaves = torch.utils._pytree.tree_leaves(metric.init(device="meta"))
        assert leaves
        assert all(leaf.device.type == "meta" for leaf in leaves)


def test_compiles_with_partial_functions():
    metric = metrics.combine(
        loss=metrics.mean(partial(F.cross_entropy, reduction="none")), matrix=metrics.confusion(CLASSES)
    )
    outputs, targets = labelled(np.random.default_rng(7), 9)
    got = torch.compile(metric.update, backend="aot_eager", fullgraph=True)(metric.init(), outputs, targets)
    assert_same(metric.compute(got), metric.compute(metric.update(metric.init(), outputs, targets)))
