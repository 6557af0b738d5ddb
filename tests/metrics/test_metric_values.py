"""Metrics against torchmetrics, where it is installed, and against numbers by hand."""

import csv
import math

import pytest
import torch
import torch.nn.functional as F

from holofunc import metrics

pytestmark = pytest.mark.filterwarnings("ignore")  # torchmetrics warns of its own ways
N, C = 60, 4


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(high, *shape, seed=1):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def value(metric, outputs, targets):
    return metric.compute(metric.update(metric.init(), outputs, targets))


def close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got.double(), torch.as_tensor(expected).double(), rtol=tolerance, atol=tolerance)


LOGITS, LABELS = draw(N, C), integers(C, N)
MANY, HOT = draw(N, 3, seed=2), integers(2, N, 3)
ONE, YES = draw(N, seed=3).mul(10).round() / 10 + 0.01, integers(2, N, seed=4)  # with ties
LIKELY = 0.5 + ONE / 16  # as high above a half as the logit above 0; a sigmoid would round ties apart
X, Y = draw(N, seed=5), draw(N, seed=6)
PICTURES = torch.rand(3, 2, 20, 24, generator=torch.Generator().manual_seed(7))
NOISY = (PICTURES + draw(*PICTURES.shape, seed=8) / 10).clamp(0, 1)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("precision", "precision"),
        ("recall", "recall"),
        ("f_beta", "f1_score"),
        ("iou", "jaccard_index"),
        ("specificity", "specificity"),
        ("auroc", "auroc"),
        ("average_precision", "average_precision"),
    ],
)
def test_classes_and_decisions_are_torchmetrics(name, theirs):
    functional = pytest.importorskip("torchmetrics.functional.classification")
    of = lambda kind: getattr(functional, f"{kind}_{theirs}")  # noqa: E731
    build = getattr(metrics, name)
    for average in ("macro", "weighted", "none"):
        expected = of("multiclass")(LOGITS.softmax(1), LABELS, num_classes=C, average=average)
        close(value(build(C, average=average), LOGITS, LABELS), expected)
        expected = of("multilabel")(MANY.sigmoid(), HOT, num_labels=3, average=average)
        close(value(build(3, multilabel=True, average=average), MANY, HOT), expected)
    close(value(build(), ONE, YES), of("binary")(LIKELY, YES))
    ignored = torch.where(LABELS == 2, -1, LABELS)
    expected = of("multiclass")(LOGITS.softmax(1), ignored, num_classes=C, average="macro", ignore_index=-1)
    absent = C / (C - 1) if name == "auroc" else 1  # torchmetrics takes an area that is not defined for 0
    close(value(build(C, ignore_index=-1), LOGITS, ignored), expected * absent)


def test_agreement_is_torchmetrics():
    f = pytest.importorskip("torchmetrics.functional.classification")
    for weights in (None, "linear", "quadratic"):
        close(
            value(metrics.kappa(C, weights=weights), LOGITS, LABELS),
            f.multiclass_cohen_kappa(LOGITS, LABELS, C, weights),
        )
    close(value(metrics.kappa(), ONE, YES), f.binary_cohen_kappa(LIKELY, YES))
    close(value(metrics.matthews(C), LOGITS, LABELS), f.multiclass_matthews_corrcoef(LOGITS, LABELS, C))
    close(value(metrics.matthews(), ONE, YES), f.binary_matthews_corrcoef(LIKELY, YES))
    close(value(metrics.hamming(3, multilabel=True), MANY, HOT), f.multilabel_hamming_distance(MANY.sigmoid(), HOT, 3))
    close(value(metrics.f_beta(C, beta=2.0), LOGITS, LABELS), f.multiclass_fbeta_score(LOGITS, LABELS, 2.0, C))
    for norm in ("l1", "l2", "max"):
        expected = f.multiclass_calibration_error(LOGITS, LABELS, C, n_bins=10, norm=norm)
        close(value(metrics.calibration_error(C, bins=10, norm=norm), LOGITS, LABELS), expected)


def test_numbers_and_pictures_are_torchmetrics():
    f = pytest.importorskip("torchmetrics.functional")
    ties = X.mul(3).round()
    close(value(metrics.r2(), X, Y), f.r2_score(X, Y))
    close(value(metrics.pearson(), X, Y), f.pearson_corrcoef(X, Y))
    close(value(metrics.spearman(), ties, Y), f.spearman_corrcoef(ties, Y))
    close(value(metrics.mse(root=True), X, Y), f.mean_squared_error(X, Y, squared=False))
    close(value(metrics.mae(), X, Y), f.mean_absolute_error(X, Y))
    images = pytest.importorskip("torchmetrics.functional.image")
    close(value(metrics.psnr(per_image=False), NOISY, PICTURES), images.peak_signal_noise_ratio(NOISY, PICTURES, 1.0))


def test_similarity_by_hand():
    place = torch.arange(5.0) - 2
    weight = torch.exp(-(place**2) / 4.5)
    weight = torch.outer(weight, weight) / weight.sum() ** 2
    found = []
    for i in range(16):
        for j in range(20):
            x, y = (image[0, 0, i : i + 5, j : j + 5].double() for image in (NOISY, PICTURES))
            mx, my = (weight * x).sum(), (weight * y).sum()
            sx, sy, sxy = (
                (weight * a * b).sum() - c for a, b, c in ((x, x, mx * mx), (y, y, my * my), (x, y, mx * my))
            )
            found.append((2 * mx * my + 1e-4) * (2 * sxy + 9e-4) / ((mx**2 + my**2 + 1e-4) * (sx + sy + 9e-4)))
    close(value(metrics.ssim(window=5), NOISY[:1, :1], PICTURES[:1, :1]), torch.stack(found).mean())


def test_many_bins_come_near_what_is_exact():
    for name in ("auroc", "average_precision"):
        build = getattr(metrics, name)
        close(value(build(C, bins=4096), LOGITS, LABELS), value(build(C), LOGITS, LABELS), 2e-3)


def test_areas_by_hand():
    scores, yes = torch.tensor([1.0, 1.0, 0.0, 2.0]), torch.tensor([1, 0, 0, 0])
    assert value(metrics.auroc(), scores, yes).item() == pytest.approx((0.5 + 1 + 0) / 3)
    assert value(metrics.average_precision(), scores, yes).item() == pytest.approx(1 / 3)
    wrong = torch.tensor([math.nan, 5.0])
    assert value(metrics.auroc(), wrong, torch.tensor([1, 0])).item() == 0
    assert value(metrics.auroc(), wrong, torch.tensor([0, 1])).item() == 0


def test_a_prediction_that_is_no_class_is_wrong_and_no_classs():
    predicted, true = torch.tensor([-1, 3, 0, 1]), torch.tensor([0, 0, 0, 1])
    assert value(metrics.recall(3, average="none"), predicted, true).tolist()[:2] == [1 / 3, 1]
    assert value(metrics.precision(3, average="none"), predicted, true).tolist()[:2] == [1, 1]
    assert value(metrics.confusion(3), predicted, true).sum() == 2


def test_absent_classes_have_no_score():
    each = value(metrics.recall(3, average="none"), torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert each[:2].tolist() == [0.5, 0]
    assert each[2].isnan()
    assert value(metrics.recall(3), torch.tensor([0, 1]), torch.tensor([0, 0])).item() == 0.25


def test_moments_do_not_cancel():
    far = X.double() + 1e8
    halves = metrics.pearson()
    state = halves.merge(
        halves.update(halves.init(), far[:7], Y[:7].double()), halves.update(halves.init(), far[7:], Y[7:].double())
    )
    close(halves.compute(state), value(metrics.pearson(), X.double(), Y.double()))


@pytest.mark.parametrize("constant", [0.0, 0.1, 1 / 3, 1e6 + 0.1, 7.0])
@pytest.mark.parametrize("name", ["pearson", "spearman", "r2"])
def test_a_constant_correlates_with_nothing(name, constant):
    """Whatever rounding makes of its mean, batch by batch."""
    metric = getattr(metrics, name)()
    generator = torch.Generator().manual_seed(0)
    sides = []
    for size in (1, 3, 7, 17, 25):
        sides.append((torch.full((size,), constant), torch.randn(size, generator=generator)))
    for swapped in (False, True) if name != "r2" else (True,):
        state = metric.init()
        for pair in sides:
            state = metric.merge(state, metric.update(metric.init(), *(pair[::-1] if swapped else pair)))
        assert metric.compute(state).isnan()
    tiny = torch.tensor([1.0, 1.0 + 1e-6, 1.0 + 2e-6], dtype=torch.float64)
    assert value(metric, tiny, tiny).item() == pytest.approx(1)


def test_images_count_alike_or_by_their_pixels():
    predicted = torch.tensor([[[0, 0, 0, 0]], [[1, 1, 1, 1]]])
    true = torch.tensor([[[0, 0, 0, 1]], [[1, 255, 255, 255]]])
    whole = value(metrics.segmentation(2, ignore_index=255), predicted, true)
    assert whole["accuracy"].item() == 4 / 5
    assert whole["mean_iou"].item() == pytest.approx((3 / 4 + 1 / 2) / 2)
    each = value(metrics.segmentation(2, ignore_index=255, per_image=True), predicted, true)
    assert each["accuracy"].item() == pytest.approx((3 / 4 + 1) / 2)
    assert each["mean_iou"].item() == pytest.approx(((3 / 4 + 0) / 2 + 1) / 2)


def test_predictions_to_a_file(tmp_path):
    metric = metrics.combine(
        predicted=metrics.collect(lambda outputs, targets: outputs.argmax(1)),
        true=metrics.collect(lambda outputs, targets: targets),
        logits=metrics.collect(shape=(2,)),
    )
    outputs, targets = torch.tensor([[0.0, 1.0], [2.0, 0.0], [2.0, 0.0]]), torch.tensor([1, 1, 1])
    state = metric.update(metric.init(), outputs, targets, weights=torch.tensor([1.0, 1.0, 0.0]))
    state = metric.merge(state, metric.update(metric.init(), outputs[:1], targets[:1]))
    found = metric.compute(state)
    with (tmp_path / "predictions.csv").open("w", newline="") as file:
        csv.writer(file).writerows(zip(found["predicted"].tolist(), found["true"].tolist(), strict=True))
    assert (tmp_path / "predictions.csv").read_text().split() == ["1,1", "0,1", "1,1"]
    assert found["logits"].tolist() == [[0, 1], [2, 0], [0, 1]]
    assert found["predicted"].dtype == torch.int64
    with pytest.raises(ValueError, match=r"value must have shape \(B,\), got \(3, 2\): see collect\(shape=\)"):
        metrics.collect().update(metrics.collect().init(), outputs)


def test_texts_are_torchmetrics():
    text = pytest.importorskip("torchmetrics.text")
    read = ["ab cd", "a", "  b  bc ", "", "dd a b c"]
    written = ["ab cd", "b a", "b b", "a", "d a c c"]
    alphabet = " abcd"

    def labels(texts):
        rows = [[alphabet.index(c) + 1 for c in text] for text in texts]
        return torch.tensor([row + [-100] * (9 - len(row)) for row in rows])

    for name, theirs in (("CharErrorRate", text.CharErrorRate()), ("WordErrorRate", text.WordErrorRate())):
        metric = metrics.get(name, **({"space": 1} if name == "WordErrorRate" else {}))
        state = metric.update(metric.init(), labels(read), labels(written))
        assert metric.compute(state).item() == pytest.approx(theirs(read, written).item())
    metric = metrics.char_error_rate(blank=0)
    frames = F.one_hot(torch.tensor([[1, 1, 0, 1, 2], [2, 0, 0, 0, 0]]).T, 3).float()
    state = metric.update(metric.init(), frames, torch.tensor([[1, 1], [2, 1]]), weights=torch.tensor([1.0, 0.5]))
    assert metric.compute(state).item() == pytest.approx((1 + 0.5) / (2 + 0.5 * 2))


def test_names():
    assert {"accuracy", "auroc", "coco", "ssim"} <= set(metrics.available())
    for name, theirs in (
        ("f_beta", "F1Score"),
        ("iou", "JaccardIndex"),
        ("mse", "MeanSquaredError"),
        ("auroc", "AUROC"),
    ):
        options = {"num_classes": 3} if name in ("f_beta", "iou", "auroc") else {}
        ours, named = metrics.get(name, **options), metrics.get(theirs, **options)
        assert type(ours.init()) is type(named.init())
    with pytest.raises(ValueError, match=r"name must be one of accuracy, auroc, average_precision.* got 'rouge'"):
        metrics.get("rouge")


THEIRS = {
    "Accuracy": ({"task": "multiclass", "num_classes": C}, LOGITS, LABELS),
    "F1Score": ({"task": "multiclass", "num_classes": C}, LOGITS, LABELS),
    "AUROC": ({"task": "multiclass", "num_classes": C}, LOGITS, LABELS),
    "ConfusionMatrix": ({"task": "multiclass", "num_classes": C}, LOGITS, LABELS),
    "CohenKappa": ({"task": "multiclass", "num_classes": C}, LOGITS, LABELS),
    "HingeLoss": ({"task": "multiclass", "num_classes": C}, LOGITS, LABELS),
    "MeanSquaredError": ({}, X, Y),
    "R2Score": ({}, X, Y),
    "SpearmanCorrCoef": ({}, X, Y),
    "ExplainedVariance": ({}, X, Y),
    "CosineSimilarity": ({}, MANY, MANY.flip(0)),
    "MeanMetric": ({}, X, None),
}


@pytest.mark.parametrize("name", THEIRS)
def test_any_of_torchmetrics_becomes_pure(name):
    torchmetrics = pytest.importorskip("torchmetrics")
    options, outputs, targets = THEIRS[name]
    theirs = getattr(torchmetrics, name)(**options)
    metric, args = metrics.from_torchmetrics(theirs), (outputs,) if targets is None else (outputs, targets)
    total = metric.init()
    for start in range(0, N, 25):
        batch = [x[start : start + 25] for x in args]
        padded = [torch.cat([x, x[-1:]]) for x in batch]
        weights = (torch.arange(len(padded[0])) < len(batch[0])).float()
        total = metric.merge(total, metric.update(metric.init(), *padded, weights=weights))
    fresh = theirs.clone()
    fresh.update(*args)
    torch.testing.assert_close(metric.compute(total), fresh.compute())
    assert not theirs.update_called
    assert metric.compute(metric.init()).isnan()


def test_those_that_take_more_than_targets_get_a_tuple():
    torchmetrics = pytest.importorskip("torchmetrics")
    theirs, groups = torchmetrics.RetrievalMAP(), torch.arange(N) % 7
    scores, relevant = X.sigmoid(), Y > 0
    metric = metrics.from_torchmetrics(theirs)
    halves = [metric.update(metric.init(), scores[i::2], (relevant[i::2], groups[i::2])) for i in range(2)]
    theirs.update(scores, relevant, groups)
    torch.testing.assert_close(metric.compute(metric.merge(*halves)), theirs.compute())


def test_texts_and_boxes_of_torchmetrics_are_lists():
    text, detection = pytest.importorskip("torchmetrics.text"), pytest.importorskip("torchmetrics.detection")
    said = ["the cat sat", "a dog ran", "it was so"], ["the cat sat down", "a dog ran off", "it is so"]
    boxes = torch.tensor([[10.0, 10.0, 20.0, 20.0]])
    found = [{"boxes": boxes + i, "scores": torch.ones(1), "labels": torch.tensor([0])} for i in range(3)]
    true = [{"boxes": boxes, "labels": torch.tensor([0])} for _ in range(3)]
    for theirs, args in ((text.BLEUScore(n_gram=2), said), (detection.MeanAveragePrecision(), (found, true))):
        metric = metrics.from_torchmetrics(theirs)
        padded = metric.update(metric.init(), *(x[:1] * 2 for x in args), weights=torch.tensor([1.0, 0.0]))
        theirs.update(*args)
        total = metric.merge(padded, metric.update(metric.init(), *(x[1:] for x in args)))
        torch.testing.assert_close(metric.compute(total), theirs.compute())
    with pytest.raises(TypeError, match="outputs and targets must be tensors or lists, got str"):
        metric.update(metric.init(), "text", "text")


def test_torchmetrics_is_an_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"from_torchmetrics needs torchmetrics: pip install 'holofunc\[torchmetrics\]'"
    ):
        metrics.from_torchmetrics(object())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.precision(0), "num_classes must be an integer of at least 1, got 0"),
        (lambda: metrics.precision(3, average="mean"), "average must be one of 'macro', 'micro', 'weighted', 'none'"),
        (lambda: metrics.recall(threshold=1.0), r"threshold must be inside \(0, 1\), got 1.0"),
        (lambda: metrics.f_beta(beta=0.0), "beta must be positive and finite, got 0.0"),
        (
            lambda: value(metrics.iou(3), torch.zeros(2, 4), torch.zeros(2).long()),
            r"outputs must be \(B, 3, ...\) scores",
        ),
        (lambda: value(metrics.auroc(), torch.zeros(2), torch.zeros(3)), "as many elements as outputs"),
        (lambda: metrics.auroc(bins=1), "bins must be an integer of at least 2, got 1"),
        (lambda: metrics.kappa(3, weights="cubic"), "weights must be None, 'linear' or 'quadratic', got 'cubic'"),
        (lambda: metrics.calibration_error(norm="l3"), "norm must be one of 'l1', 'l2', 'max', got 'l3'"),
        (
            lambda: value(metrics.mse(), torch.zeros(2), torch.zeros(3)),
            r"targets must have the shape of outputs \(2,\)",
        ),
        (lambda: metrics.psnr(0.0), "max_value must be positive and finite, got 0.0"),
        (lambda: metrics.ssim(window=4), "window must be odd and at least 1, got 4"),
        (lambda: metrics.ssim(sigma=math.nan), "sigma must be positive and finite, got nan"),
        (lambda: metrics.confusion(2.5), "num_classes must be an integer of at least 1, got 2.5"),
        (lambda: metrics.accuracy(1.5), r"topk must be integers of at least 1, got \(1.5,\)"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["accuracy", "precision", "auroc", "mse", "psnr", "calibration_error"])
def test_targets_that_are_none_are_named(name):
    metric = metrics.get(name)
    with pytest.raises(TypeError, match="targets must be a tensor, got NoneType"):
        metric.update(metric.init(), torch.zeros(4, 2), None)
    with pytest.raises(TypeError, match="name must be a text, got 3"):
        metrics.get(3)
