"""The laws of lifting over other libraries' architectures: a few here, the long table with ``-m slow``."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("lifting", Path(__file__).parents[2] / "docs/lifting.py")
lifting = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lifting)

SHORT = (
    "torchvision mobilenet_v3_small",
    "torchvision segmentation.lraspp_mobilenet_v3_large",
    "timm ghostnet_050",
    "timm lcnet_050",
)
NAMES = [
    *(f"torchvision {name}" for name in lifting.TORCHVISION),
    *(f"timm {name}" for name in lifting.TIMM),
]


@pytest.mark.filterwarnings("ignore")  # of the libraries
@pytest.mark.parametrize("name", [n if n in SHORT else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_laws_of_lifting(name):
    library = name.split()[0]
    pytest.importorskip(library)
    constructors = lifting.constructors(library)
    if name not in constructors:
        pytest.skip("not in this version")
    answers = dict(lifting.laws(*constructors[name]))
    assert answers["eval"] == answers["keyed"] == "yes"
    assert answers["train"] in ("yes", "sampled")  # detectors sample
    assert set(answers) <= set(lifting.LAWS)
