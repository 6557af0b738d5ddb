"""Pictures of analyses: the numbers that reach them, and what they refuse."""

import pytest
import torch

pytest.importorskip("holofunc.plots.drawing", exc_type=ImportError)

from holofunc.plots import analysis as pictures

PIXELS = torch.rand(6, 3, 8, 8)
SUMMARY = {name: torch.rand(20) for name in ("confidence", "variability", "correctness")}
PLACES = torch.linspace(-1, 1, 5)
FIGURES = {
    "data map": lambda: pictures.data_map(SUMMARY, marked=torch.arange(20) < 3),
    "data map, some not seen": lambda: pictures.data_map({n: torch.where(torch.arange(20) < 3, torch.nan, x) for n, x in SUMMARY.items()}),
    "spectrum": lambda: pictures.spectrum((PLACES, PLACES.exp()), eigenvalues=torch.tensor([0.5])),
    "line": lambda: pictures.landscape((PLACES, PLACES**2, ()), names=("one", "other")),
    "plane": lambda: pictures.landscape((PLACES, PLACES[:, None] ** 2 + PLACES**2, ())),
    "plane of negative losses": lambda: pictures.landscape((PLACES, PLACES[:, None] - PLACES - 3, ())),
    "plane of one loss": lambda: pictures.landscape((PLACES, torch.full((5, 5), 100.0), ())),
    "plane that explodes": lambda: pictures.landscape((PLACES, (PLACES[:, None] * PLACES).sqrt(), ())),
    "heat": lambda: pictures.heat(PIXELS, torch.randn(6, 3, 8, 8), titles=list("abcdef"), columns=3),
    "heat of nothing": lambda: pictures.heat(PIXELS, torch.zeros(6, 8, 8)),
    "neighbours": lambda: pictures.neighbours(PIXELS[:2], PIXELS, (torch.tensor([[1, 2], [3, 4]]), torch.rand(2, 2)), labels=torch.arange(2), other_labels=torch.arange(6)),
    "recall": lambda: pictures.recall({"loss": torch.rand(20), "el2n": torch.rand(20)}, torch.arange(20) < 3),
    "agreement": lambda: pictures.agreement(torch.rand(20), torch.rand(20)),
}  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_figures_draw(name):
    figure = FIGURES[name]()
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_recall_reaches_what_can_be_found():
    wrong = torch.arange(10) < 2
    lines = pictures.recall({"perfect": wrong.float()}, wrong).axes[0].lines
    assert lines[0].get_ydata().tolist() == lines[1].get_ydata().tolist() == [0.5] + [1.0] * 9


def test_equal_values_share_a_rank():
    title = pictures.agreement(torch.tensor([1.0, 1, 2, 3]), torch.tensor([1.0, 2, 2, 4])).axes[0].get_title(loc="left")
    assert title == "rank correlation 0.833"
    assert "nan" in pictures.agreement(torch.zeros(3), torch.arange(3.0)).axes[0].get_title(loc="left")


def test_what_cannot_be_drawn_is_told():
    with pytest.raises(
        ValueError, match=r"summary must be that of analysis.track_summary, it has no \['correctness'\]"
    ):
        pictures.data_map({n: SUMMARY[n] for n in ("confidence", "variability")})
    with pytest.raises(ValueError, match="summary must hold a sample that has been seen"):
        pictures.data_map({name: x * torch.nan for name, x in SUMMARY.items()})
    with pytest.raises(ValueError, match=r"maps must have the size of the images, \(6, 3, 8, 8\), got \(6, 4, 4\)"):
        pictures.heat(PIXELS, torch.zeros(6, 4, 4))
    with pytest.raises(ValueError, match="titles must hold 6 texts, one per image, got 1"):
        pictures.heat(PIXELS, torch.zeros(6, 8, 8), titles=["a"])
    with pytest.raises(ValueError, match="found must hold a row per test image, 6, got 1"):
        pictures.neighbours(PIXELS, PIXELS, (torch.tensor([[1]]), torch.ones(1, 1)))
    with pytest.raises(ValueError, match="wrong must mark some of the 3 samples, got none"):
        pictures.recall({"loss": torch.rand(3)}, torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"predicted and actual must have one length"):
        pictures.agreement(torch.rand(3), torch.rand(4))
