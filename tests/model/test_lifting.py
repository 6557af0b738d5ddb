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
KEPT = ("yes", "sampled", "torch cannot: ")


def specimens(library):
    pytest.importorskip(library)
    return {f"{library} {name}": specimen for name, specimen in getattr(lifting, library)().items()}


@pytest.mark.filterwarnings("ignore")  # of the libraries
@pytest.mark.parametrize("name", SHORT)
def test_laws_of_lifting(name):
    answers = dict(lifting.laws(specimens(name.split()[0])[name]))
    assert {law: answer for law, answer in answers.items() if not answer.startswith(KEPT)} == {}
    assert set(answers) <= set(lifting.LAWS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", [library.__name__ for library in lifting.LIBRARIES])
def test_laws_of_lifting_of_all(library):
    rows = {name: lifting.row(name, specimen) for name, specimen in specimens(library).items()}
    assert [row for row in rows.values() if "FAILS" in str(row)] == []
    assert set(rows) <= set(lifting.written())


def test_the_page_has_what_was_tried():
    rows = lifting.written()
    assert set(SHORT) < set(rows)
    assert [row for row in rows.values() if "FAILS" in row] == []
