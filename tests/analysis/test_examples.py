"""The examples of the room do what they say."""

import importlib.util
from pathlib import Path

import pytest

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


def test_a_derivative_foretells_retraining_better_than_what_looks_at_the_end(capsys):
    table = example("data_attribution").main(60, 24, trainings=("SGD, 60 steps",), shares=(0.1,), short=4)
    at_one, at_mean, _, in_the_end, loss = table["SGD, 60 steps", 0.1]
    assert min(at_one, at_mean) > 0.95
    assert at_one > max(in_the_end, loss)
    assert "at mean      TracIn  in the end" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("training", ["SGD, 60 steps", "SGD and momentum, 60 steps"])
def test_metagradient_foretells_two_hundred_retrainings(training):
    """At the mean weight, without 5 and 20 % of the samples: what docs/analysis.md says of it."""
    for at_one, at_mean, *others in (
        example("data_attribution").main(trainings=(training,), shares=(0.05, 0.2)).values()
    ):
        assert at_mean >= 0.95
        assert min(at_one, at_mean) > max(others)
