"""``holofunc train --ranks``: the run of one process on several, ended together, gone on with on fewer."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from holofunc import checkpoint, random, tree
from holofunc.cli import main

ROOT = Path(__file__).parents[2]
KILLS = 5


def history(folder):
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def close(one, other, rel=1e-3):
    """Whether two runs have measured the same, up to the order of sums."""
    measured = [[float(row["val/loss"]) for row in history(each) if row["val/loss"]] for each in (one, other)]
    assert len(measured[0]) > 0
    assert measured[0] == pytest.approx(measured[1], rel=rel)


def started(argv):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "holofunc", *map(str, argv)]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(argv):
    process = started(argv)
    process.communicate(timeout=200)
    return process.returncode


def test_two_ranks_train_as_one_and_one_goes_on(small, tmp_path, capfd):
    whole, ranks = tmp_path / "whole", tmp_path / "ranks"
    assert main([*small, "--epochs", "1", "--out", str(whole)]) == 0
    said = capfd.readouterr().out
    assert main([*small, "--epochs", "1", "--ranks", "2", "--out", str(ranks)]) == 0
    printed = capfd.readouterr()
    assert printed.err.count("2 ranks with 2 of 4 images") == 1
    assert printed.out.replace(str(ranks), str(whole)) == said  # once
    close(whole, ranks)
    assert main(["train", "--resume", "--out", str(ranks)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--ema", "0.9", "--accumulate", "2"], ["--precision", "fp16"]])
def test_stopped_on_two_ranks_and_continued_on_one(small, tmp_path, options):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    argv = [*small, *options, "--epochs", "4", "--save-every", "1"]
    assert main([*argv, "--out", str(whole)]) == 0
    process = started([*argv, "--ranks", "2", "--out", parts])
    for line in process.stderr:
        if line.startswith("step 6 "):
            process.send_signal(signal.SIGTERM)
            break
    _, error = process.communicate(timeout=120)
    assert process.returncode == 143
    assert f"continue with: holofunc train --resume --out {parts}" in error
    assert 6 <= checkpoint.steps(parts)[-1] < 32
    assert main(["train", "--resume", "--out", str(parts)]) == 0
    close(whole, parts, rel=5e-3 if "fp16" in options else 1e-3)  # halves of a batch are rounded otherwise


@pytest.mark.slow
def test_a_rank_that_fails_is_named(small, pictures, tmp_path):
    folder = tmp_path / "pictures"
    for path in pictures.rglob("*.png"):
        copy = folder / path.relative_to(pictures)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes()[: 60 if path.name == "11.png" else None])
    process = started([*small, "--data", f"folder:{folder}", "--ranks", "2", "--out", tmp_path / "run"])
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "holofunc: error: cannot read image" in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named(small, tmp_path):
    process = started([*small, "--epochs", "50", "--ranks", "2", "--out", tmp_path / "run"])
    for line in process.stderr:
        if line.startswith("step 6 "):
            children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            os.kill(int(children[-1]), signal.SIGKILL)
            break
    _, error = process.communicate(timeout=120)
    assert process.returncode == 137
    assert "holofunc: error: rank 1: was killed" in error


@pytest.mark.slow
def test_random_kills_and_the_same_state_in_the_end(small, tmp_path):
    """Some rank is killed at some instant, again and again; what goes on ends where nobody was killed."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    argv, two, kills = [*small, "--epochs", "12", "--save-every", "1"], ["--ranks", "2"], 0
    assert ended([*argv, *two, "--out", whole]) == 0
    for attempt in range(KILLS):
        steps = checkpoint.steps(run)
        process = started([*(["train", "--resume"] if steps else [*argv, "--overwrite"]), *two, "--out", run])
        wanted = int(random.randint(random.key(attempt), (), 0, 6))
        for line in process.stderr:  # the run says a line per epoch or record
            wanted -= line.startswith("step ")
            if wanted < 0:
                break
        time.sleep(float(random.uniform(random.key(attempt), (), high=0.1)))
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        if found:
            os.kill(int(found[attempt % len(found)]), signal.SIGKILL)
        process.communicate(timeout=120)
        kills += process.returncode == 137
    assert kills >= KILLS // 2
    assert ended(["train", "--resume", *two, "--out", run]) == 0
    states = [tree.leaves(torch.load(sorted(d.glob("step_*/state.pt"))[-1], weights_only=True)) for d in (whole, run)]
    assert len(states[0]) > 4
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.slow
def test_under_torchrun(small, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "holofunc"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *small, "--out", str(tmp_path)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out images after 16 steps") == 1
