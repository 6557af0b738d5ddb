"""The laws of lifting over other libraries' architectures: a few here, the long table with ``-m slow``."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("lifting", Path(__file__).parents[2] / "docs/lifting.py")
lifting = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lifting)

SHORT = (
    "torchvision mobilenet_v3_small",
    "torchvision lraspp_mobilenet_v3_large",
    "timm ghostnet_050",
    "transformers SegformerForSemanticSegmentation",
    "segmentation_models_pytorch Unet",
)
"""One for every kind of output and of draw."""
SPECIMENS = lifting.specimens()
KEPT = ("yes", "sampled", "torch cannot: ")


def test_the_table_has_all_there_is():
    rows = lifting.written()
    assert set(SPECIMENS) <= set(rows)
    assert [row for row in rows.values() if "FAILS" in row] == []


@pytest.mark.filterwarnings("ignore")  # of the libraries
@pytest.mark.parametrize("name", [n if n in SHORT else pytest.param(n, marks=pytest.mark.slow) for n in SPECIMENS])
def test_laws_of_lifting(name):
    answers = dict(lifting.laws(SPECIMENS[name], name in lifting.COMPILED))
    assert {law: answer for law, answer in answers.items() if not answer.startswith(KEPT)} == {}
    assert set(answers) <= set(lifting.LAWS)
