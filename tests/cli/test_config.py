"""The configuration: what it accepts, and that TOML keeps it."""

import tomllib
from dataclasses import fields

import hypothesis
import pytest
from hypothesis import strategies as st

from holofunc import config
from holofunc.config import Config

texts = st.text(max_size=8)
shares = st.floats(0, 1, exclude_max=True)
scalars = st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False), texts)
tables = st.dictionaries(texts, st.one_of(scalars, st.lists(scalars, max_size=3)), max_size=3)
configurations = st.builds(
    Config,
    data=texts.filter(bool),
    download=st.booleans(),
    image_size=st.none() | st.integers(1, 10**9),
    model_options=tables,
    optimizer_options=tables,
    steps=st.none() | st.integers(min_value=1),
    lr=st.floats(0, exclude_min=True, allow_infinity=False),
    weight_decay=st.none() | st.floats(0, allow_infinity=False),
    warmup=st.none() | shares,
    seed=st.integers(0, 2**63 - 1),
    out=st.none() | texts.filter(bool),
    classes=st.lists(texts, max_size=3).map(tuple),
    mean=st.lists(st.floats(allow_nan=False), max_size=3).map(tuple),
)


@hypothesis.given(configurations)
@hypothesis.settings(deadline=None)
def test_configuration_survives_toml(tmp_path_factory, made):
    path = tmp_path_factory.mktemp("toml") / "config.toml"
    config.write(made, path, comment="about\nit")
    assert config.read(path) == made
    assert path.read_text(encoding="utf-8").startswith("# about\n# it\n")
    assert [other.name for other in path.parent.iterdir()] == ["config.toml"]
    assert set(tomllib.loads(path.read_text(encoding="utf-8"))) <= {field.name for field in fields(Config)}


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"epochs": True}, TypeError, "epochs must be an integer, got True"),
        ({"epochs": 1.0}, TypeError, "epochs must be an integer, got 1.0"),
        ({"lr": "1"}, TypeError, "lr must be a number, got '1'"),
        ({"lr": False}, TypeError, "lr must be a number, got False"),
        ({"lr": 10**400}, TypeError, "lr must be a number"),
        ({"compile": 1}, TypeError, "compile must be true or false, got 1"),
        ({"optimizer": None}, TypeError, "optimizer must be text, got None"),
        ({"warmup": True}, TypeError, "warmup must be a number or text, got True"),
        ({"eval_every": 0.5}, TypeError, "eval_every must be an integer or text, got 0.5"),
        ({"augment": ["flip("]}, ValueError, r"augment must be a name, or one with options .*, got \["),
        ({"loss": [3]}, TypeError, r"loss\[0\] must be text, got 3"),
        ({"mean": 0.5}, TypeError, "mean must be a list, got 0.5"),
        ({"classes": ["a", 3]}, TypeError, r"classes\[1\] must be text, got 3"),
        ({"model_options": [1]}, TypeError, r"model_options must be a table, got \[1\]"),
        ({"model_options": {"a": {}}}, TypeError, "model_options.a must be a number, text, true, false or a list"),
        ({"epochs": 1, "steps": 1}, ValueError, "only one of epochs and steps may be given, got 1 and 1"),
    ],
)
def test_configuration_checks_itself(values, error, message):
    with pytest.raises(error, match=message):
        Config(**values)


def test_integers_and_lists_become_what_they_stand_for():
    made = Config(lr=1, mean=[0, 1])
    assert (made.lr, made.mean) == (1.0, (0.0, 1.0))
    assert isinstance(made.lr, float)


def test_file_that_is_not_text(tmp_path):
    (tmp_path / "run.toml").write_bytes(b"data = '\xff'")
    with pytest.raises(ValueError, match=r"run.toml: .*utf-8"):
        config.read(tmp_path / "run.toml")
