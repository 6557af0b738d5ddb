"""Plots: the numbers that reach the picture, and pictures that can be read."""

import math
import pickle
import subprocess
import sys
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from holofunc import data, plots, random

HISTORY = [
    {"step": 10, "epoch": 0, "loss": 2.0, "accuracy": 0.30},
    {"step": 20, "epoch": 0, "loss": math.nan, "accuracy": 0.60, "val/loss": 1.51, "val/accuracy": 0.55},
    {"step": 30, "epoch": 1, "loss": 1.5, "accuracy": torch.tensor(0.75), "note": "text", "flag": True},
    {"step": 40, "epoch": 1, "accuracy": 0.8, "val/loss": 1.49, "val/accuracy": 0.79},
]
MATRIX = torch.tensor([[5, 1, 0], [0, 0, 0], [2, 0, 8]])
SEARCH = SimpleNamespace(
    lrs=torch.logspace(-5, 0, 6), losses=torch.tensor([2.0, 1.9, 1.0, 0.8, 30.0, math.nan]), suggestion=1e-3
)
PIXELS, LABELS = data.digits("test")
DRAWN = data.draw_shapes(random.key(0), 3, size=32)
LINES, TEXTS = data.draw_text_lines(random.key(0), 5)

# Every function of the room, in the situations that differ.
FIGURES = {
    "curves": lambda: plots.curves(HISTORY),
    "curves, one point": lambda: plots.curves([{"loss": 1.0}]),
    "curves, nothing finite": lambda: plots.curves([{"step": 1, "loss": math.nan}, {"step": 2, "loss": math.inf}]),
    "confusion": lambda: plots.confusion(MATRIX, ["cat", "a rather long name", "dog"]),
    "confusion, empty": lambda: plots.confusion(torch.zeros(2, 2)),
    "confusion, 60 classes": lambda: plots.confusion(torch.eye(60)),
    "schedule": lambda: plots.schedule(lambda step: 1 - step / 100, 100),
    "schedule, one step": lambda: plots.schedule(lambda step: torch.tensor(0.5), 1),
    "schedules": lambda: plots.schedule({"up": lambda step: step, "same": lambda step: step + 0.001}, 5000),
    "lr_search": lambda: plots.lr_search(SEARCH),
    "lr_search, nothing found": lambda: plots.lr_search(
        SimpleNamespace(lrs=[1e-3, 1e-2], losses=[math.nan, math.nan], suggestion=None)
    ),
    "images": lambda: plots.images(PIXELS[:11]),
    "images, color": lambda: plots.images(torch.zeros(3, 3, 4, 4, dtype=torch.uint8), titles=["a", "$b_$", "c\nd"]),
    "segmentation": lambda: plots.segmentation(DRAWN.images, DRAWN.masks, class_names=("ground", *data.SHAPES)),
    "segmentation, ground alone": lambda: plots.segmentation(DRAWN.images, DRAWN.masks, class_names=["ground"]),
    "segmentation, two rows": lambda: plots.segmentation(DRAWN.images, DRAWN.masks, DRAWN.masks.flip(0)),
    "segmentation, a short row": lambda: plots.segmentation(DRAWN.images, DRAWN.masks, DRAWN.masks, columns=2),
    "recognition": lambda: plots.recognition(LINES, ["?", "$x_2", *TEXTS[2:]], TEXTS),
    "recognition, one": lambda: plots.recognition(LINES[:1].float() / 255, TEXTS[:1]),
    "top_losses": lambda: plots.top_losses(PIXELS, torch.arange(355), LABELS, LABELS.flip(0)),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_a_picture_whose_text_can_be_read(name):
    from matplotlib import rcParams
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    before = dict(rcParams)
    figure = FIGURES[name]()
    assert dict(rcParams) == before
    assert figure._repr_png_().startswith(b"\x89PNG")
    pickle.loads(pickle.dumps(figure))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [child for axes in figure.axes for child in axes.get_children() if isinstance(child, Text)]
    texts += [axis.label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    width, height = canvas.get_width_height()
    for text in filter(Text.get_text, texts):
        box = text.get_window_extent()
        assert box.x0 > -1, text
        assert box.y0 > -1, text
        assert box.x1 < width + 1, text
        assert box.y1 < height + 1, text
    for axes in figure.axes:  # what we wrote ourselves does not overlap
        boxes = [text.get_window_extent().shrunk(0.9, 0.75) for text in axes.texts]
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def lines(axes):
    return {tuple(line.get_xdata()): tuple(line.get_ydata()) for line in axes.lines}


def written(axes):
    return [text.get_text() for text in axes.texts]


def test_curves_draw_the_history():
    loss, accuracy = plots.curves(HISTORY).axes
    assert [axes.get_title(loc="left") for axes in (loss, accuracy)] == ["loss", "accuracy"]
    assert lines(accuracy) == {(10, 20, 30, 40): (0.3, 0.6, 0.75, 0.8), (20, 40): (0.55, 0.79)}
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), [2.0, math.nan, 1.5])
    assert lines(loss)[(20, 40)] == (1.51, 1.49)
    assert sorted(written(loss)) == ["train 1.5", "val 1.49"]
    assert sorted(written(accuracy)) == ["train 0.8", "val 0.79"]
    assert [axes.get_xlabel() for axes in (loss, accuracy)] == ["step", "step"]


def test_metrics_of_one_name_share_a_panel():
    record = {
        "top/top1": 0.5,
        "val/top/top1": 0.4,
        "val/iou": 0.1,
        "test/iou": 0.2,
        "val/alone": 0.3,
        "lr": 1e-3,
        "loss": 1,
    }
    figure = plots.curves([{"step": 1, **record}])
    found = {axes.get_title(loc="left"): sorted(written(axes)) for axes in figure.axes}
    assert found == {
        "loss": ["1"],
        "top/top1": ["train 0.5", "val 0.4"],
        "iou": ["test 0.2", "val 0.1"],
        "val/alone": ["0.3"],
        "lr": ["0.001"],
    }
    assert figure.axes[0].get_title(loc="left") == "loss"
    chosen = plots.curves([record], names=["lr", "iou"])
    assert [axes.get_title(loc="left") for axes in chosen.axes] == ["lr", "iou"]


@pytest.mark.parametrize(
    ("history", "names", "match"),
    [
        ([], None, "history must hold numbers to draw, got none in 0 records"),
        ([{"step": 1, "note": "text"}], None, "history must hold numbers to draw, got none in 1 records"),
        (HISTORY, [], r"names must be among the metrics of the history, \['accuracy', 'loss'\], got \[\]"),
        (HISTORY, ["f1"], r"\['accuracy', 'loss'\], got \['f1'\]"),
    ],
)
def test_curves_of_nothing(history, names, match):
    with pytest.raises(ValueError, match=match):
        plots.curves(history, names=names)


def test_confusion_writes_counts_and_recalls():
    (axes,) = plots.confusion(MATRIX, ["cat", "emu", "dog"]).axes
    assert written(axes) == ["5", "1", "2", "8", "83%", "", "80%", "recall"]
    assert axes.get_title(loc="left") == "accuracy 81.2 % (13 of 16)"
    np.testing.assert_allclose(axes.images[0].get_array(), [[5 / 6, 1 / 6, 0], [0, 0, 0], [0.2, 0, 0.8]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "emu", "dog"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    with pytest.raises(ValueError, match=r"matrix must have shape \(C, C\), got \(2, 3\)"):
        plots.confusion(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="class_names must hold 3 names, one per class, got 1"):
        plots.confusion(MATRIX, ["cat"])


def test_schedule_is_evaluated_at_its_steps():
    (axes,) = plots.schedule(lambda step: torch.tensor(float(min(step, 4 - step))), 5).axes
    assert lines(axes) == {(0, 1, 2, 3, 4): (0, 1, 2, 1, 0)}
    assert written(axes) == ["0", "2 at step 2"]
    (axes,) = plots.schedule({"a": lambda step: 1, "b": lambda step: step}, 10**6).axes
    assert [len(line.get_xdata()) for line in axes.lines] == [1000, 1000]
    assert written(axes) == ["a 1", "b 1e+06"]
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        plots.schedule(lambda step: 1, 0)


def test_lr_search_shows_the_valley_not_the_explosion():
    (axes,) = plots.lr_search(SEARCH, beta=0).axes
    low, high = axes.get_ylim()
    assert low < 0.8
    assert 2.0 < high < 4
    assert written(axes) == ["suggested 0.001"]
    assert axes.lines[-1].get_xydata().tolist() == [[1e-3, pytest.approx(1.0)]]
    with pytest.raises(ValueError, match="lrs and losses must have the same length, got 2 and 1"):
        plots.lr_search(SimpleNamespace(lrs=[1, 2], losses=[1], suggestion=1))


def test_images_are_denormalised_and_cut_off():
    pixels = torch.tensor([[0.0, 1.0], [-1.0, 9.0]]).reshape(1, 1, 2, 2)
    (axes,) = plots.images(pixels, mean=0.5, std=0.25).axes
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.5, 0.75], [0.25, 1.0]])
    color = torch.tensor([51, 102, 255], dtype=torch.uint8).reshape(1, 3, 1, 1)
    (axes,) = plots.images(color).axes
    np.testing.assert_allclose(axes.images[0].get_array(), [[[0.2, 0.4, 1.0]]])
    with pytest.raises(ValueError, match=r"images must have shape .*got \(2, 2, 4, 4\)"):
        plots.images(torch.zeros(2, 2, 4, 4))
    with pytest.raises(ValueError, match="titles must hold 2 texts, one per image, got 1"):
        plots.images(torch.zeros(2, 1, 4, 4), titles=["a"])


def test_lr_search_is_smoothed_over_what_was_measured():
    found = SimpleNamespace(lrs=[1e-3, 1e-2, 1e-1], losses=[2.0, 1.0, 3.0], suggestion=None)
    behind, line = plots.lr_search(found, beta=0.5).axes[0].lines
    assert list(behind.get_ydata()) == found.losses
    assert list(line.get_ydata()) == pytest.approx([2.0, 4 / 3, 16 / 7])
    (line,) = plots.lr_search(found, beta=0).axes[0].lines
    assert list(line.get_ydata()) == found.losses
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\), got 1"):
        plots.lr_search(found, beta=1)


def test_top_losses_are_the_worst_first():
    losses = torch.tensor([0.5, 3.0, 1.0, 2.0])
    figure = plots.top_losses(
        PIXELS[:4], losses, torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 1, 1]), class_names=["no", "yes"], count=3
    )
    assert [axes.get_title() for axes in figure.axes] == [
        "no → yes\nloss 3.00",
        "yes → no\nloss 2.00",
        "yes → yes\nloss 1.00",
    ]
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), PIXELS[1, 0])
    colors = [axes.title.get_color() for axes in figure.axes]
    assert colors[0] == colors[1] != colors[2]
    sure = plots.top_losses(
        PIXELS[:4], losses, torch.ones(4), torch.zeros(4), probabilities=torch.tensor([1, 0.5, 1, 1])
    )
    assert sure.axes[0].get_title() == "0 → 1 (50%)\nloss 3.00"
    labels, predictions = torch.tensor([-100, -1, 1]), torch.tensor([1, 0, 7])
    titles = [
        a.get_title() for a in plots.top_losses(PIXELS[:3], torch.arange(3), predictions, labels, class_names="ab").axes
    ]
    assert [title.split("\n")[0] for title in titles] == ["b → 7", "-1 → a", "-100 → b"]
    with pytest.raises(ValueError, match=r"mean must be a number, or one for each of 1 channels, got 3"):
        plots.images(PIXELS[:4], mean=(0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match=r"same length, got \[4, 4, 2, 4\]"):
        plots.top_losses(PIXELS[:4], losses, torch.zeros(2), torch.zeros(4))


def test_segmentation_shows_where_masks_differ():
    images, predicted = torch.full((1, 3, 2, 3), 128, dtype=torch.uint8), torch.tensor([[[0, 1, 2], [1, 1, 1]]])
    true = torch.tensor([[[0, 1, 1], [1, -100, 1]]])
    left, right = plots.segmentation(images, predicted, true, class_names=("ground", "cat", "dog")).axes
    ours, theirs = left.images[0].get_array(), right.images[0].get_array()
    np.testing.assert_allclose(ours[0, 0], 128 / 255, atol=1e-6)
    assert not np.allclose(ours[0, 1], ours[0, 2])
    assert np.allclose(ours[0, 1], theirs[0, 1])
    assert (theirs[0, 2] == 0).all()  # wrong
    assert (theirs[1, 1] == 1).all()  # ignored
    scores = torch.nn.functional.one_hot(predicted, 3).movedim(-1, 1).float()
    assert np.array_equal(plots.segmentation(images, scores).axes[0].images[0].get_array(), ours)
    with pytest.raises(ValueError, match=r"masks must be integers of shape \(1, 2, 3\).*got torch.int64 \(1, 2, 2\)"):
        plots.segmentation(images, predicted[..., :2])
    with pytest.raises(ValueError, match=r"targets must be integers of shape \(1, 2, 3\)"):
        plots.segmentation(images, predicted, true.float())


def test_recognition_tells_what_was_read_and_what_is_true():
    right, wrong = plots.recognition(LINES[:2], ["a", "b"], ["a", "c"]).axes
    assert (right.get_title(), wrong.get_title()) == ("a", "b (true: c)")
    assert right.title.get_color() != wrong.title.get_color()
    with pytest.raises(ValueError, match="texts must hold 2 texts, one per image, got 1"):
        plots.recognition(LINES[:2], ["a"])


def test_pyplot_is_never_imported_and_matplotlib_only_to_draw():
    code = """
import sys
from holofunc import plots
assert "matplotlib" not in sys.modules
plots.curves([{"loss": 1.0}]).savefig(sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code, "/dev/null"], check=True)
