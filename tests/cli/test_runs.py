"""``holofunc train`` and ``evaluate``, called in this process: what runs leave behind, how they end and go on."""

import csv
import io
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from holofunc import checkpoint, config, train
from holofunc.cli import job, main, training
from holofunc.config import Config

ROOT = Path(__file__).parents[2]


def tensors(folder, step="latest"):
    number = checkpoint.manifest(folder, step=step)["step"]
    saved = sorted(folder.glob(f"step_{number:08}*"))[-1]  # the last attempt
    return torch.load(saved / "state.pt", weights_only=True)


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def history(folder):
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# --- the main job ------------------------------------------------------------------------------------------------

FILES = {"config.toml", "history.csv", "curves.png", "confusion.png", "predictions.png"}


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
        model="smallnet", shape=(3, 8, 8),
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
    "options",
    [
        *(["--precision", "bf16"], ["--workers", "1"]),
        *(pytest.param(option, marks=pytest.mark.slow) for option in (["--channels-last"], ["--schedule", "constant"])),
    ],
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
        pytest.param(signal.SIGTERM, 143, "step 6 ", 6, marks=pytest.mark.slow),
        (signal.SIGTERM, 143, "step 8 ", 8),
        pytest.param(signal.SIGINT, 130, "step 14 ", 14, marks=pytest.mark.slow),
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
    assert {path.name for path in parts.iterdir()} >= FILES - {
        "confusion.png",
        "predictions.png",
    }  # of an evaluation at the end
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


def test_only_the_machine_may_change_when_a_run_goes_on(small, tmp_path, refused):
    assert main([*small, "--out", str(tmp_path)]) == 0
    assert main(["train", "--resume", "--out", str(tmp_path), "--workers", "1", "--device", "auto"]) == 0
    message = refused(["train", "--resume", "--out", tmp_path, "--lr", "0.1"])
    assert "lr was 0.003 and cannot become 0.1" in message
    file = tmp_path / "other.toml"
    file.write_text("epochs = 9")
    message = refused(["train", "--resume", "--out", tmp_path, "--config", file])
    assert "epochs was 2 and cannot become 9" in message


def broken_copy(pictures, folder, name=None):
    """The pictures in a folder of their own; one of them is cut off."""
    for path in pictures.rglob("*.png"):
        copy = folder / path.relative_to(pictures)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes()[: 60 if str(path.relative_to(pictures)) == name else None])
    return f"folder:{folder}"


def test_a_run_that_cannot_go_on_is_refused(small, pictures, tmp_path, refused):
    """Where it would be found out in the loop, too: nothing was computed."""
    photos, out = broken_copy(pictures, tmp_path / "photos"), tmp_path / "run"
    assert main([*small[:-2], "--data", photos, "--steps", "3", "--save-every", "1", "--out", str(out)]) == 0
    resume = ["train", "--resume", "--out", out]
    with checkpoint.Writer(out):
        assert f"is being written by process {os.getpid()}" in refused(resume)
    extra = tmp_path / "photos/dark/99.png"
    extra.write_bytes((tmp_path / "photos/dark/00.png").read_bytes())
    assert "resume continues a run on the data that it had: data: samples was 32 and is 33" in refused(resume)
    extra.unlink()
    edited = (out / "config.toml").read_text().replace("[4, 8]", "[4, 4]")
    (out / "config.toml").write_text(edited)
    assert "does not fit the tree to be restored" in refused(resume)


def test_a_run_is_not_begun_where_another_is_being_written(small, tmp_path, refused):
    with checkpoint.Writer(tmp_path):
        assert "is being written by" in refused([*small, "--out", tmp_path])
    assert not (tmp_path / "config.toml").exists()


@pytest.mark.parametrize("name", ["dark/11.png", "dark/14.png"], ids=["training", "held out"])
def test_a_run_in_which_an_image_broke_is_rescued(small, pictures, tmp_path, monkeypatch, capsys, name):
    photos, out = broken_copy(pictures, tmp_path / "photos"), tmp_path / "run"
    argv = [*small, "--data", photos, "--save-every", "2", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Interrupting(signal.SIGINT, "step 6 "))
        assert main(argv) == 130
    broken_copy(pictures, tmp_path / "photos", name)
    resume = ["train", "--resume", "--out", str(out)]
    assert main(resume) == 1
    assert f"cannot read image '{tmp_path / 'photos' / name}'" in capsys.readouterr().err
    with pytest.warns(UserWarning, match=r"(left out|take the places of) 1 images that cannot be read: .*" + name):
        assert main([*resume, "--bad-images", "skip"]) == 0
    assert config.read(out / "config.toml").bad_images == "skip"
    assert history(out)[-1]["step"] == "16"
    before = tensors(out)
    with pytest.warns(UserWarning, match="1 images that cannot be read"):
        assert main(resume) == 0  # which has been said once
    assert equal(before, tensors(out))


def test_what_takes_the_place_of_a_broken_image_comes_from_all_over(pictures, tmp_path):
    photos = broken_copy(pictures, tmp_path / "photos")
    for name in ("00", "01", "02"):
        (tmp_path / f"photos/bright/{name}.png").write_bytes(b"")
    settings = Config(data=photos, image_size=8, bad_images="skip")
    with pytest.warns(UserWarning, match="others take the places of 3 images"):
        _, source = job.open_data(settings, "train", keeps_places=True)
    with pytest.warns(UserWarning, match="left out 3 images"):
        _, shorter = job.open_data(settings, "train")
    names = [f"{Path(path).parent.name}/{Path(path).stem}" for path in source.paths]
    assert len(names) == 32
    assert names[3:] == [f"{Path(path).parent.name}/{Path(path).stem}" for path in shorter.paths]
    assert len({*names[:3]}) == 3
    assert {name.split("/")[0] for name in names[:3]} == {"bright", "dark"}


def test_finished_run_is_not_overwritten(small, tmp_path, refused):
    assert main([*small, "--out", str(tmp_path)]) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert "already holds a run: continue it with --resume" in refused([*small, "--out", tmp_path])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_what_goes_wrong_later_is_one_line_too(small, pictures, tmp_path, capsys):
    photos = broken_copy(pictures, tmp_path / "pictures", "dark/11.png")
    assert main([*small, "--data", photos, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"holofunc: error: cannot read image '.*11.png'", error)


# --- evaluation --------------------------------------------------------------------------------------------------


def test_evaluation_finds_what_the_run_found(small, tmp_path, capsys):
    """Of a run whose optimizer has durations in epochs, which evaluation does not know."""
    times = ["--schedule", "cosine", "--warmup", "1ep", "--unfreeze", "features.0=25%"]
    assert main([*small, "--lr", "0.1", *times, "--out", str(tmp_path)]) == 0
    measured = {row["step"]: (float(row["val/loss"]), float(row["val/accuracy"])) for row in history(tmp_path)[3::4]}
    assert len(measured) == 2
    best = checkpoint.manifest(tmp_path, step="best")["step"]
    for step, number in (("best", best), ("latest", 16), ("8", 8), ("16", 16)):
        (tmp_path / "confusion.png").unlink()
        capsys.readouterr()
        assert main(["evaluate", "--run", str(tmp_path), "--step", step]) == 0
        first, *metrics, pictures = capsys.readouterr().out.splitlines()
        assert pictures.endswith(": confusion.png, predictions.png")
        assert f"8 held-out images of folder:{small[2].removeprefix('folder:')}, step {number}" in first
        values = {name: float(value) for name, value in map(str.split, metrics)}
        assert (values["loss"], values["accuracy"]) == pytest.approx(measured[str(number)], abs=1e-4)
        assert (tmp_path / "confusion.png").exists()


def test_evaluation_on_other_data(small, pictures, tmp_path, capsys, refused):
    assert main([*small, "--lr", "0.03", "--out", str(tmp_path / "run")]) == 0
    for label, level in (("bright", 255), ("dark", 0)):
        for part in ("train", "test"):
            (tmp_path / "plain" / part / label).mkdir(parents=True)
            picture = Image.fromarray(np.full((9, 7, 3), level, np.uint8))
            picture.save(tmp_path / "plain" / part / label / "0.jpg")
    capsys.readouterr()
    assert main(["evaluate", "--run", str(tmp_path / "run"), "--data", f"folder:{tmp_path / 'plain'}"]) == 0
    assert "2 held-out images" in capsys.readouterr().out
    message = refused(["evaluate", "--run", tmp_path / "run", "--data", "digits"])
    assert "image_size must be" in message
    (tmp_path / "plain/train/dark").rename(tmp_path / "plain/train/black")
    (tmp_path / "plain/test/dark").rename(tmp_path / "plain/test/black")
    message = refused(["evaluate", "--run", tmp_path / "run", "--data", f"folder:{tmp_path / 'plain'}"])
    assert "has 2 classes (black, bright), but the network was made for 2 classes (bright, dark)" in message
    assert "no step 5" in refused(["evaluate", "--run", tmp_path / "run", "--step", "5"])


# --- what happens beside the steps -------------------------------------------------------------------------------


def test_cadences_metrics_and_frozen_parts(small, tmp_path, capsys):
    argv = [*small, "--eval-every", "4", "--save-every", "4", "--keep", "1", "--metrics", "kappa", "--freeze-norms"]
    assert main([*argv, "--monitor", "val/kappa", "--loss", "focal(gamma=1)", "--out", str(tmp_path)]) == 0
    assert "4 of 8 parameters frozen" in capsys.readouterr().err
    rows = history(tmp_path)
    assert [row["step"] for row in rows if row["val/kappa"]] == ["4", "8", "12", "16"]
    assert 1 <= len(checkpoint.steps(tmp_path)) <= 2  # the newest, and the best
    best = checkpoint.manifest(tmp_path, step="best")["step"]
    found = {int(row["step"]): float(row["val/kappa"]) for row in rows if row["val/kappa"]}
    assert found[best] == max(found.values())
    norms = [
        value for name, value in tensors(tmp_path).items() if name.endswith("features.1.weight") and "params" in name
    ]
    assert torch.equal(norms[0], torch.ones(4))


def test_early_stopping_and_no_evaluations(small, tmp_path, capsys):
    options = ["--lr", "1e-12", "--early-stopping", "2", "--monitor", "val/loss", "--min-delta", "1", "--epochs", "9"]
    assert main([*small, *options, "--out", str(tmp_path / "a")]) == 0
    assert checkpoint.steps(tmp_path / "a")[-1] == 24
    assert "val/loss did not improve for 2 evaluations" in capsys.readouterr().err
    assert main([*small, "--eval-every", "never", "--out", str(tmp_path / "b")]) == 0
    assert "val/loss" not in history(tmp_path / "b")[-1]
    assert capsys.readouterr().out == f"{tmp_path / 'b'}: checkpoints, config.toml, history.csv, curves.png\n"


def test_overwriting_leaves_nothing_of_the_old_run(small, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    assert main([*small, "--save-every", "1", "--keep", "9", "--out", str(old)]) == 0
    options = ["--steps", "3", "--seed", "1"]
    assert main([*small[:-2], *options, "--overwrite", "--out", str(old)]) == 0
    assert main([*small[:-2], *options, "--out", str(new)]) == 0
    assert checkpoint.steps(old) == checkpoint.steps(new) == [3]
    assert history(old) == history(new)
    assert equal(tensors(old), tensors(new))


def test_records_for_tensorboard(small, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(training, "find_spec", lambda name: None)
    assert "pip install 'holofunc[tensorboard]'" in refused([*small, "--tensorboard", "--out", tmp_path])
    seen = []
    monkeypatch.setattr(training, "find_spec", lambda name: name)
    monkeypatch.setattr(train, "tensorboard", lambda folder: lambda step, metrics: seen.append((folder, step)))
    assert main([*small, "--tensorboard", "--epochs", "1", "--out", str(tmp_path)]) == 0
    assert seen == [(tmp_path / "tensorboard", step) for step in (2, 4, 6, 8)]


def test_learning_rates_are_searched(small, tmp_path, capsys):
    argv = [*small[1 : small.index("--log-every")], *small[small.index("--device") : -2]]
    assert main(["find-lr", *argv, "--tries", "12", "--start", "1e-4", "--out", str(tmp_path)]) in (0, 1)
    assert (tmp_path / "lr_search.png").exists()
    assert "lr_search.png" in capsys.readouterr().out
