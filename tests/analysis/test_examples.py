"""The examples of the room do what they say."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_wrong_labels_are_found(capsys):
    recalls = example("find_label_errors").main()
    assert set(recalls) >= {"loss", "el2n", "gradient norm", "forgetting", "influence"}
    assert min(recalls.values()) >= 0.85
    assert "1442 digits, 144 labels changed" in capsys.readouterr().out


def test_private_training_learns(capsys):
    assert example("private_digits").main(steps=60) > 0.8
    assert "accuracy on the held-out fifth" in capsys.readouterr().out
