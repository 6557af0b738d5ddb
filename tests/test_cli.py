"""The command line, called in this process: what runs leave behind, what is refused, how they end and go on."""

import csv
import io
import os
import re
import signal
import subprocess
import sys
import tomllib
from dataclasses import fields, replace
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from PIL import Image

from holofunc import checkpoint, config, data, models, random, train
from holofunc.cli import job, main
from holofunc.config import Config

ROOT = Path(__file__).parents[1]


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


def tensors(folder, step="latest"):
    number = checkpoint.manifest(folder, step=step)["step"]
    return torch.load(folder / f"step_{number:08}" / "state.pt", weights_only=True)


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def history(folder):
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def refused(argv, capsys):
    """The one line with which a command is refused."""
    assert main([str(each) for each in argv]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("holofunc: error: ")
    assert printed.err.count("\n") == 1
    return printed.err


# --- the main job ------------------------------------------------------------------------------------------------

FILES = {"config.toml", "history.csv", "curves.png", "confusion.png"}


def test_main_job(tmp_path):
    """The command of the README, compiled, as a program of its own."""
    command = [sys.executable, "-m", "holofunc", "train", "--data", "digits", "--epochs", "5", "--out", "runs/digits"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/digits"
    assert {path.name for path in folder.iterdir()} >= FILES
    assert checkpoint.verify(folder)[110] is None
    last = history(folder)[-1]
    assert float(last["val/accuracy"]) >= 0.97
    assert f"accuracy {float(last['val/accuracy']):.2%} on 355 held-out images after 110 steps" in done.stdout
    progress = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    assert re.fullmatch(
        r"step 100  epoch 4  loss \S+  .*accuracy \S+  learning_rate \S+  images/s \d+  left \d+ s", progress[-2]
    )


def test_run_leaves_everything_that_describes_it(small, pictures, tmp_path, capsys):
    out = tmp_path / "a/b"
    assert main([*small, "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} - {".lock"} == FILES | {"step_00000008", "step_00000016"}
    for name in ("curves.png", "confusion.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 200
    stored = config.read(out / "config.toml")
    assert stored == Config(
        data=f"folder:{pictures}", image_size=8, model_options={"widths": [4, 8]}, batch_size=4, epochs=2, log_every=2,
        device="cpu", compile=False, out=str(out), classes=("bright", "dark"), mean=stored.mean, std=stored.std,
    )  # fmt: skip
    rows = history(out)
    assert [int(row["step"]) for row in rows] == list(range(2, 17, 2))
    assert [bool(row["val/loss"]) for row in rows] == [False, False, False, True] * 2
    accuracy = float(rows[-1]["val/accuracy"])
    assert f"accuracy {accuracy:.2%} on 8 held-out images after 16 steps" in capsys.readouterr().out


def test_same_options_same_bits(small, tmp_path):
    for name in ("a", "b"):
        assert main([*small, "--out", str(tmp_path / name)]) == 0
    assert main([*small, "--out", str(tmp_path / "c"), "--seed", "1"]) == 0
    a, b, c = (tensors(tmp_path / name) for name in "abc")
    assert equal(a, b)
    assert not equal(a, c)


def test_config_file_repeats_a_run(small, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    options = ["--optimizer", "sgd", "--optimizer-options", "momentum=0.9", "--clip", "1", "--ema", "0.9", "--lr", "1"]
    assert main([*small, *options, "--label-smoothing", "0.1", "--schedule", "one_cycle", "--out", str(first)]) == 0
    assert main(["train", "--config", str(first / "config.toml"), "--out", str(again)]) == 0
    assert equal(tensors(first), tensors(again))
    assert config.read(again / "config.toml") == replace(config.read(first / "config.toml"), out=str(again))
    assert {name.split("/")[2] for name in tensors(first) if name.startswith("state/opt_state/")} >= {
        "average",
        "inner",
    }


def test_given_options_win_over_the_file(small, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("epochs = 3\nseed = 5\nlr = 1\n")
    options = ["--config", str(file), "--steps", "3", "--seed", "6", "--out", str(tmp_path / "run")]
    assert main([*small[:-2], *options]) == 0
    stored = config.read(tmp_path / "run/config.toml")
    assert (stored.steps, stored.epochs, stored.seed, stored.lr) == (3, None, 6, 1.0)
    assert checkpoint.steps(tmp_path / "run") == [3]


def test_fewer_images_than_a_batch(small, tmp_path):
    assert main([*small, "--batch-size", "500", "--out", str(tmp_path / "run")]) == 0
    assert checkpoint.steps(tmp_path / "run") == [1, 2]


@pytest.mark.parametrize(
    "options", [["--precision", "bf16"], ["--channels-last"], ["--workers", "1"], ["--schedule", "constant"]]
)
def test_options_reach_the_run(small, tmp_path, options):
    assert main([*small, *options, "--out", str(tmp_path / "run")]) == 0
    assert np.isfinite(float(history(tmp_path / "run")[-1]["val/loss"]))


def test_progress_bar_on_a_terminal(small, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main([*small, "--out", str(tmp_path / "run")]) == 0
    last = sys.stderr.getvalue().split("\r")[-1]
    assert "16/16" in last
    assert re.search(r"loss=.*accuracy=.*images/s=\d+.*val/accuracy=", last)


# --- ending and going on -----------------------------------------------------------------------------------------


class Interrupting(io.StringIO):
    """A standard error that sends its own process a signal when a record is written to it."""

    def __init__(self, number, record):
        super().__init__()
        self.number, self.record = number, record

    def write(self, text):
        if text.startswith(self.record):
            signal.raise_signal(self.number)
        return super().write(text)


@pytest.mark.parametrize(
    ("number", "code", "record", "saved"),
    [
        (signal.SIGINT, 130, "step 6 ", 6),
        (signal.SIGTERM, 143, "step 6 ", 6),
        (signal.SIGTERM, 143, "step 8 ", 8),
        (signal.SIGINT, 130, "step 14 ", 14),
    ],
)
def test_interrupted_run_goes_on_as_if_it_had_not_been(small, tmp_path, monkeypatch, number, code, record, saved):
    whole, parts, options = tmp_path / "whole", tmp_path / "parts", ["--ema", "0.9"]
    assert main([*small, *options, "--out", str(whole)]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Interrupting(number, record))
        assert main([*small, *options, "--out", str(parts)]) == code
        assert f"continue with: holofunc train --resume --out {parts}" in sys.stderr.getvalue()
    assert checkpoint.steps(parts)[-1] == saved
    assert {path.name for path in parts.iterdir()} >= FILES - {"confusion.png"}  # of an evaluation at the end
    before = (parts / "config.toml").read_bytes()
    assert main(["train", "--resume", "--out", str(parts)]) == 0
    assert (parts / "config.toml").read_bytes() == before
    assert equal(tensors(whole), tensors(parts))
    assert [row["step"] for row in history(parts)] == [row["step"] for row in history(whole)]
    assert history(parts)[-1] == history(whole)[-1]


def test_run_killed_before_its_first_checkpoint_starts_over(small, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert main([*small, "--out", str(whole)]) == 0
    again.mkdir()
    (again / "config.toml").write_bytes((whole / "config.toml").read_bytes())
    assert main(["train", "--resume", "--out", str(again)]) == 0
    assert equal(tensors(whole), tensors(again))


def test_resuming_a_finished_run_changes_nothing(small, tmp_path, capsys):
    assert main([*small, "--out", str(tmp_path)]) == 0
    before, said = history(tmp_path), capsys.readouterr().out
    assert main([*small, "--resume", "--out", str(tmp_path)]) == 0
    assert history(tmp_path) == before
    assert capsys.readouterr().out == said


def test_only_the_machine_may_change_when_a_run_goes_on(small, tmp_path, capsys):
    assert main([*small, "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(tmp_path), "--workers", "1", "--device", "auto"]) == 0
    capsys.readouterr()
    message = refused(["train", "--resume", "--out", tmp_path, "--lr", "0.1"], capsys)
    assert "lr was 0.003 and cannot become 0.1" in message
    file = tmp_path / "other.toml"
    file.write_text("epochs = 9")
    message = refused(["train", "--resume", "--out", tmp_path, "--config", file], capsys)
    assert "epochs was 2 and cannot become 9" in message


def test_finished_run_is_not_overwritten(small, tmp_path, capsys):
    assert main([*small, "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert "already holds a run: continue it with --resume" in refused([*small, "--out", tmp_path], capsys)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_goes_wrong_later_is_one_line_too(small, pictures, tmp_path, capsys):
    folder = tmp_path / "pictures"
    for path in pictures.rglob("*.png"):
        copy = folder / path.relative_to(pictures)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes()[: 60 if path.name == "11.png" else None])
    assert main([*small, "--data", f"folder:{folder}", "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"holofunc: error: cannot read image '.*11.png'", error)


# --- evaluation --------------------------------------------------------------------------------------------------


def test_evaluation_finds_what_the_run_found(small, tmp_path, capsys):
    assert main([*small, "--lr", "0.1", "--out", str(tmp_path)]) == 0
    measured = {row["step"]: (float(row["val/loss"]), float(row["val/accuracy"])) for row in history(tmp_path)[3::4]}
    assert len(measured) == 2
    best = checkpoint.manifest(tmp_path, step="best")["step"]
    for step, number in (("best", best), ("latest", 16), ("8", 8), ("16", 16)):
        (tmp_path / "confusion.png").unlink()
        capsys.readouterr()
        assert main(["evaluate", "--run", str(tmp_path), "--step", step]) == 0
        first, *metrics = capsys.readouterr().out.splitlines()
        assert f"8 held-out images of folder:{small[2].removeprefix('folder:')}, step {number}" in first
        values = {name: float(value) for name, value in map(str.split, metrics)}
        assert (values["loss"], values["accuracy"]) == pytest.approx(measured[str(number)], abs=1e-4)
        assert (tmp_path / "confusion.png").exists()


def test_evaluation_on_other_data(small, pictures, tmp_path, capsys):
    assert main([*small, "--lr", "0.03", "--out", str(tmp_path / "run")]) == 0
    for label, level in (("bright", 255), ("dark", 0)):
        for part in ("train", "test"):
            (tmp_path / "plain" / part / label).mkdir(parents=True)
            picture = Image.fromarray(np.full((9, 7, 3), level, np.uint8))
            picture.save(tmp_path / "plain" / part / label / "0.jpg")
    capsys.readouterr()
    assert main(["evaluate", "--run", str(tmp_path / "run"), "--data", f"folder:{tmp_path / 'plain'}"]) == 0
    assert "2 held-out images" in capsys.readouterr().out
    message = refused(["evaluate", "--run", tmp_path / "run", "--data", "digits"], capsys)
    assert "image_size must be" in message
    (tmp_path / "plain/train/dark").rename(tmp_path / "plain/train/black")
    (tmp_path / "plain/test/dark").rename(tmp_path / "plain/test/black")
    message = refused(["evaluate", "--run", tmp_path / "run", "--data", f"folder:{tmp_path / 'plain'}"], capsys)
    assert "has 2 classes (black, bright), but the network was made for 2 classes (bright, dark)" in message
    assert "no step 5" in refused(["evaluate", "--run", tmp_path / "run", "--step", "5"], capsys)


# --- what is refused ---------------------------------------------------------------------------------------------

BAD = [
    ("", "the following arguments are required: COMMAND"),
    ("tain", "invalid choice: 'tain'"),
    ("train --epoch 5", "unrecognized arguments: --epoch 5"),
    ("train --epochs five", "argument --epochs: invalid int value: 'five'"),
    ("train --epochs 0", "epochs must be at least 1, got 0"),
    ("train --epochs 1 --steps 1", "only one of epochs and steps may be given"),
    ("train --batch-size 0", "batch_size must be at least 1, got 0"),
    ("train --lr 0", "lr must be positive and finite, got 0.0"),
    ("train --lr nan", "lr must be positive and finite, got nan"),
    ("train --lr inf", "lr must be positive and finite, got inf"),
    ("train --weight-decay -1", "weight_decay must be at least 0 and finite"),
    ("train --label-smoothing 1", "label_smoothing must be at least 0 and below 1"),
    ("train --ema 1", "ema must be at least 0 and below 1"),
    ("train --clip 0", "clip must be positive"),
    ("train --seed -1", r"seed must be in \[0, 2\*\*63\), got -1"),
    ("train --log-every 0", "log_every must be at least 1"),
    ("train --precision fp8", "precision must be one of fp32, bf16, fp16, got 'fp8'"),
    ("train --device tpu", "device must be cpu, cuda, .* got 'tpu'"),
    ("train --device cuda:99", "device cuda:99 is not there"),
    ("train --model resnet81", "no model named 'resnet81': is it 'resnet18'"),
    ("train --model-options depth=3", "models.smallnet has no option 'depth'"),
    ("train --model-options num_classes=3", "model_options must not hold num_classes: the data decide"),
    ("train --model-options widths", "argument --model-options: must be NAME=VALUE, got 'widths'"),
    ("train --model-options when=2020-01-01", "model_options.when must be a number, text, .* got datetime.date"),
    ("train --model darknet19", "darknet19 does not take images of 1x8x8: "),
    ("train --optimizer adamm", "optimizer must be one of .*adam, .*sgd.*, got 'adamm'"),
    ("train --optimizer-options b9=3", "optimizer adamw has no option b9; it has b1, b2"),
    ("train --optimizer-options b1=x", "optimizer adamw refuses its options .*b1 must be"),
    ("train --schedule linear", "schedule must be one of constant, cosine, one_cycle, warmup_cosine, got 'linear'"),
    ("train --schedule cosine --warmup 0.1", "warmup is for warmup_cosine and one_cycle, not for cosine"),
    ("train --data mnist", "data must be digits, cifar10, imagenette or folder:PATH, got 'mnist'"),
    ("train --image-size 8", "image_size must be .* got 8 for 'digits'"),
    ("train --data cifar10 --root nowhere", "cifar10 is not in 'nowhere'"),
    ("train --data folder:nowhere", "folder 'nowhere' does not exist"),
    ("train --data folder:empty", "folder 'empty' needs a folder of images for each class"),
    ("train --data folder:imageless", "folder 'imageless' needs a folder of images for each class"),
    ("train --out file", "cannot write to 'file': '.*file' is a file"),
    ("train --out file/below/it", "cannot write to 'file/below/it': '.*file' is a file"),
    ("train --out empty --resume", "'empty' holds no run: there is no config.toml in it"),
    ("train --out nowhere --resume", "'nowhere' holds no run"),
    ("train --config nowhere.toml", "No such file or directory: 'nowhere.toml'"),
    ("train --config file", "file: Expected '=' after a key"),
    ("train --config unknown.toml", "unknown.toml: unknown key 'epoch', did you mean 'epochs'?"),
    ("train --config mistyped.toml", "mistyped.toml: lr must be a number, got '0.1'"),
    ("evaluate", "the following arguments are required: --run"),
    ("evaluate --run empty", "'empty' holds no run"),
    ("evaluate --run empty --step first", "argument --step: must be best, latest or a number, got 'first'"),
    ("evaluate --run unsaved", "checkpoint 'unsaved' .*"),
    ("models nothing*", r"no model is named like 'nothing\*'"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[line or "nothing" for line, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(line, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "fit", lambda *args, **kwargs: pytest.fail("something was computed"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "imageless/cat").mkdir(parents=True)
    (tmp_path / "imageless/dog").mkdir()
    (tmp_path / "unsaved").mkdir()
    (tmp_path / "file").write_text("some text")
    (tmp_path / "unknown.toml").write_text("epoch = 3")
    (tmp_path / "mistyped.toml").write_text("lr = '0.1'")
    config.write(replace(Config(epochs=1), classes=tuple("0123456789")), tmp_path / "unsaved/config.toml")
    before = sorted(tmp_path.rglob("*"))
    assert re.search(message, refused(line.split(), capsys))
    assert sorted(tmp_path.rglob("*")) == before


def test_folder_without_permission(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    script = (
        "import os, sys\nfrom holofunc.cli import commands, main\n"
        "if os.getuid() == 0:\n    os.setuid(65534)\n"
        "sys.exit(main(['train', '--out', 'locked/run']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    tmp_path.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert re.search(r"cannot write to 'locked/run': permission denied for '.*'", done.stderr)


# --- configuration -----------------------------------------------------------------------------------------------

texts = st.text(max_size=8)
shares = st.floats(0, 1, exclude_max=True)
scalars = st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False), texts)
tables = st.dictionaries(texts, st.one_of(scalars, st.lists(scalars, max_size=3)), max_size=3)
configurations = st.builds(
    Config,
    data=texts,
    download=st.booleans(),
    image_size=st.none() | st.integers(1, 10**9),
    model_options=tables,
    optimizer_options=tables,
    steps=st.none() | st.integers(min_value=1),
    lr=st.floats(0, exclude_min=True, allow_infinity=False),
    weight_decay=st.none() | st.floats(0, allow_infinity=False),
    warmup=st.none() | shares,
    seed=st.integers(0, 2**63 - 1),
    out=st.none() | texts,
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
        ({"model": None}, TypeError, "model must be text, got None"),
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


# --- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(job.optimizers()))
def test_every_optimizer_can_be_asked_for(name):
    settings = Config(optimizer=name, schedule="constant" if name == "rprop" else "warmup_cosine", clip=1.0)
    tx = job.optimizer(settings, 10)
    params = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    updates, _ = tx.update(params, tx.init(params), params, loss=torch.ones(()), grad_fn=lambda p: p)
    assert list(updates) == list(params)
    assert all(bool(x.isfinite().all()) for x in updates.values())


def test_optimizers_are_those_of_the_library():
    assert {"sgd", "adam", "adamw", "lion", "muon", "soap", "prodigy"} <= set(job.optimizers())
    assert not [name for name in job.optimizers() if name.startswith("scale")]


def test_weight_decay_spares_biases():
    tx = job.optimizer(Config(optimizer="sgd", schedule="constant", lr=1, weight_decay=0.5), 10)
    params = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    zeros = {name: torch.zeros_like(p) for name, p in params.items()}
    updates, _ = tx.update(zeros, tx.init(params), params)
    assert updates["weight"].eq(-0.5).all()
    assert updates["bias"].eq(0).all()


@pytest.mark.parametrize("name", sorted(job.SCHEDULES))
@pytest.mark.parametrize("steps", [1, 2, 100])
def test_every_schedule_has_its_peak_at_the_learning_rate(name, steps):
    tx = job.optimizer(Config(optimizer="sgd", schedule=name, lr=0.5), steps)
    params = {"weight": torch.ones(1, 1)}
    state, rates = tx.init(params), []
    for _ in range(steps):
        updates, state = tx.update(params, state, params)
        rates.append(-float(updates["weight"]))
    assert min(rates) >= 0
    assert max(rates) <= 0.5 + 1e-6
    if steps == 100:
        assert max(rates) == pytest.approx(0.5, rel=1e-3)


def test_feed_moves_batches_and_nothing_else():
    settings = replace(Config(channels_last=True, batch_size=100), device="cpu")
    source = data.open_dataset("digits")
    moved = job.feed(settings, source, key=random.key(1))
    plain = job.feed(replace(settings, channels_last=False), source, key=random.key(1))
    assert len(moved) == len(plain) == 14
    assert len(list(moved)) == 14
    for (x, y), (a, b) in zip(moved.epoch(2, 11), plain.epoch(2, 11), strict=True):
        assert torch.equal(x, a)
        assert torch.equal(y, b)
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_published_weights_are_not_needed_again():
    settings = Config(model_options={"weights": "nowhere.pth"}, classes=("a", "b"), mean=(0.5,), std=(1.0,))
    with pytest.raises(ValueError, match=r"nowhere.pth"):
        job.network(settings, (1, 8, 8), fresh=True)
    assert job.network(settings, (1, 8, 8), fresh=False).name == "smallnet"


# --- the program -------------------------------------------------------------------------------------------------


def test_table_of_models(capsys):
    assert main(["models", "resnet1*"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "parameters", "GMACs", "size", "task", "top-1", "weights"]
    assert [row.split()[0] for row in rows] == models.list_models("resnet1*")
    measured = ["93.61%", "imagenette", "resnet18.imagenette"]
    assert rows[-1].split() == ["resnet18", "11,181,642", "1.81", "224", "classification", *measured]
    assert rows[0].split() == ["resnet101", "42,520,650", "7.80", "224", "classification"]


def test_help_is_quick_because_torch_is_not_imported():
    script = (
        "import sys\nfrom holofunc.cli import main\n"
        "try:\n    main(['train', '--help'])\nexcept SystemExit as done:\n    assert done.code == 0\n"
        "assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"--{name.replace('_', '-')}" in done.stdout for name in ("data", "out", "resume", "label_smoothing"))


def test_program_can_be_run_as_a_module():
    done = subprocess.run([sys.executable, "-m", "holofunc", "trian"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("holofunc: error: argument COMMAND: invalid choice: 'trian'")
