"""Own photos in a folder, a small run on them, and commands that are refused."""

import numpy as np
import pytest
from PIL import Image

from holofunc.cli import main


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Two classes, dark and bright, of 20 noisy pictures each; a fifth of them is held out."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for label, level in (("bright", 150), ("dark", 0)):
        (folder / label).mkdir()
        for i in range(20):
            pixels = draw.integers(level, level + 100, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i:02}.png")
    return folder


@pytest.fixture
def small(pictures):
    """``holofunc train`` on these: eight steps an epoch, sixteen in all."""
    return [
        *("train", "--data", f"folder:{pictures}", "--image-size", "8", "--model-options", "widths=[4, 8]"),
        *("--batch-size", "4", "--log-every", "2", "--device", "cpu", "--no-compile", "--epochs", "2"),
    ]


@pytest.fixture
def refused(capsys):
    """The one line with which a command is refused."""

    def check(argv):
        capsys.readouterr()
        assert main([str(each) for each in argv]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("holofunc: error: ")
        assert printed.err.count("\n") == 1
        return printed.err

    return check
