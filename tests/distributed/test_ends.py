"""Ranks that differ, programs that are interrupted, and how runs are started: as users of torchrun report it."""

import collections
import concurrent.futures
import functools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from holofunc import distributed, lift, metrics, optim, random, train

WORLD = 2
ROOT = str(Path(__file__).parents[2])


def me():
    return distributed.rank()


# --- what ends a run ---------------------------------------------------------------------------------------------


def an_image(number):
    if me() and number == 1:
        raise OSError("the disk is gone")
    return torch.ones(4, 3), torch.zeros(4, dtype=torch.long)


def evaluated():
    model, tx = lift(nn.Linear, 3, 2), optim.sgd(0.1)
    step = train.make_eval_step(model, {"accuracy": metrics.accuracy()})
    return train.evaluate(step, train.create_state(model, tx, random.key(0)), map(an_image, range(3)))


def outside_of_its_group():
    distributed.psum(torch.ones(1), torch.distributed.new_group([0]))


def a_parameter_less():
    grads = {"w": torch.ones(2)} | ({} if me() else {"v": torch.ones(3)})
    tx = distributed.average_gradients()
    tx.update(grads, tx.init(grads))


def only_one_of_them(end):
    if me():
        end()
    distributed.psum(torch.ones(1))


ENDS = {
    "other shapes": (
        lambda: distributed.psum(torch.ones(2 + 1000 * me())),
        "rank 1: has sum of float32 (1002,) where rank 0 has sum of float32 (2,)",
    ),
    "other dtypes of one size": (
        lambda: distributed.psum(torch.ones(4, dtype=[torch.float32, torch.int32][me()])),
        "rank 1: has sum of int32 (4,) where rank 0 has sum of float32 (4,)",
    ),
    "other collectives": (
        lambda: (distributed.psum if me() else distributed.all_gather)(torch.ones(4)),
        "rank 1: has sum of float32 (4,) where rank 0 has gather of float32 (4,)",
    ),
    "other rows": (
        lambda: distributed.all_gather(torch.ones(2 + me())),
        "rank 1: has gather of float32 (3,) where rank 0 has gather of float32 (2,)",
    ),
    "ragged in a second axis": (
        lambda: distributed.all_gather(torch.ones(2, 2 + me()), ragged=True),
        "rank 1: has gather of float32 (2, 3) where rank 0 has gather of float32 (2, 2)",
    ),
    "a parameter less": (a_parameter_less, "rank 1: has sum of float32 (5,) where rank 0 has sum of float32 (8,)"),
    "a step more": (lambda: only_one_of_them(lambda: distributed.psum(torch.ones(1))), "rank 0: ended without an error while others went on: did it see fewer batches?"),
    "evaluation": (evaluated, "rank 1: OSError: the disk is gone"),
    "another group": (outside_of_its_group, "rank 1: ValueError: group must be one that this rank belongs to, got another one"),
    "sys.exit": (lambda: only_one_of_them(lambda: sys.exit(3)), "rank 1: SystemExit: 3"),
    "Ctrl-C": (lambda: only_one_of_them(lambda: signal.raise_signal(signal.SIGINT)), "rank 1: KeyboardInterrupt"),
    "an abort": (lambda: only_one_of_them(os.abort), "rank 1: was killed (exit code -6)"),
    "no way back": (lambda: threading.Lock() if me() else 0, "rank 1: TypeError: what another process is to have must be picklable"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_one_rank_that_differs_is_named(name):
    work, cause = ENDS[name]
    with pytest.raises(distributed.RankError) as caught:
        distributed.launch(work, WORLD, timeout=20)
    assert str(caught.value).startswith(cause)


def busy_while_another_fails():
    if me() == 1:
        raise ValueError("image 7 is damaged")
    if me() == 2:
        time.sleep(5)
    distributed.psum(torch.ones(1))


def in_another_group():
    """Ranks 2 and 3 go on for a while with what does not need the one that fails."""
    pairs = [torch.distributed.new_group(pair) for pair in ([0, 1], [2, 3])]
    for step in range(40):
        if me() == 1 and step == 2:
            raise ValueError("image 7 is damaged")
        distributed.psum(torch.ones(1), pairs[me() // 2])
        time.sleep(0.1 * (me() > 1))


@pytest.mark.slow
@pytest.mark.parametrize(("work", "world"), [(busy_while_another_fails, 3), (in_another_group, 4)])
def test_ranks_that_are_only_busy_are_not_accused(work, world, tmp_path):
    def told():
        try:
            work()
        except distributed.RankError as error:
            (tmp_path / f"rank{me()}").write_text(str(error))
            raise

    with pytest.raises(distributed.RankError):
        distributed.launch(told, world, timeout=20)
    assert (tmp_path / "rank0").read_text() == "rank 1: ValueError: image 7 is damaged"


# --- how a run is started ----------------------------------------------------------------------------------------


def test_variables_of_a_stale_torchrun(monkeypatch):
    """They are those of another run: `launch` sets its own; a script that joins says what is missing, in time."""
    for name, value in {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "5"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        distributed.init(timeout=5)
    assert distributed.launch(lambda: (me(), distributed.world_size()), 2) == [(0, 2), (1, 2)]


def alone(**variables):
    """What a process says that joins a run of these variables."""
    environment = {**os.environ, "PYTHONPATH": ROOT, "MASTER_ADDR": "127.0.0.1", **variables}
    program = "from holofunc import distributed; distributed.init(timeout=2); print(distributed.world_size())"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def port():
    """One that is taken."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield str(server.getsockname()[1])


@pytest.mark.slow
def test_a_port_that_is_taken(port):
    said = alone(WORLD_SIZE="2", RANK="0", MASTER_PORT=port)
    assert said.returncode == 1
    assert port in said.stderr.splitlines()[-1]


@pytest.mark.slow
def test_ranks_that_never_come():
    said = alone(WORLD_SIZE="2", RANK="0", MASTER_PORT="0")
    assert said.returncode == 1
    assert "1/2" in said.stderr.splitlines()[-1]


def test_a_timeout_of_nothing():
    with pytest.raises(ValueError, match="timeout must be positive seconds, got 0"):
        distributed.launch(me, 2, timeout=0)


@pytest.mark.slow
def test_a_run_of_one_rank():
    assert alone(WORLD_SIZE="1", RANK="0", MASTER_PORT="0").stdout == "1\n"


AGAIN = """
import os, signal, torch
from holofunc import distributed
distributed.init(timeout=30)
sums = int(distributed.psum(torch.tensor(1 + distributed.rank())))
if distributed.rank() and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os.kill(os.getpid(), signal.SIGKILL)
distributed.psum(torch.ones(2))
open(f"rank{distributed.rank()}", "w").write(str(sums))
"""


@pytest.mark.slow
def test_ranks_that_torchrun_starts_again(tmp_path):
    """They find each other, though the store of its agent holds the addresses of those before."""
    (tmp_path / "script.py").write_text(AGAIN)
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "script.py"]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *options]
    environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["3", "3"]


FOREVER = """
import os, pathlib, sys, time
from holofunc import distributed
def work(folder):
    distributed.init()
    pathlib.Path(folder, str(os.getpid())).touch()
    time.sleep(60)
if len(sys.argv) > 2:
    work(sys.argv[1])
elif os.environ["HOW"] == "launch":
    distributed.launch(work, 2, sys.argv[1])
else:
    distributed.run_program([sys.executable, "-W", "ignore", __file__, sys.argv[1], "rank"], 2)
"""


def lives(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes as Linux shows them")
@pytest.mark.parametrize(("how", "number"), [("launch", "SIGKILL"), ("program", "SIGKILL"), ("program", "SIGHUP")])
def test_ranks_end_with_what_started_them(tmp_path, how, number):
    (script := tmp_path / "script.py").write_text(FOREVER)
    (folder := tmp_path / "ranks").mkdir()
    environment = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "HOW": how}
    process = subprocess.Popen([sys.executable, "-W", "ignore", str(script), str(folder)], env=environment)
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(getattr(signal, number))
    process.wait(timeout=30)
    pids = [int(path.name) for path in folder.iterdir()]
    while any(map(lives, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [len(pids), *map(lives, pids)] == [2, False, False]


def test_what_can_be_launched():
    """Methods, partial functions and objects that can be called; one that returns much."""
    count = collections.Counter("aab")
    assert distributed.launch(count.most_common, 2, 1) == [[("a", 2)]] * 2
    assert distributed.launch(functools.partial(max, 3), 1, 5) == [5]
    assert distributed.launch(nn.Identity(), 1, 7) == [7]
    assert distributed.launch(lambda: torch.ones(3_000_000), 1)[0].sum() == 3e6


def test_launched_from_a_thread():
    with concurrent.futures.ThreadPoolExecutor() as pool:
        assert pool.submit(distributed.launch, me, 2).result() == [0, 1]


def test_a_notebook_that_is_interrupted(tmp_path):
    """Ctrl-C ends `launch`, and its ranks with it."""

    def work(folder):
        (folder / str(me())).write_text(str(os.getpid()))
        time.sleep(60)

    def interrupt():
        while len(list(tmp_path.iterdir())) < WORLD:
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        distributed.launch(work, WORLD, tmp_path)
    thread.join()
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


def test_a_program_from_a_thread_and_one_that_is_interrupted(tmp_path):
    """Ctrl-C, which the shell sends to the parent, reaches the ranks; the exit code is theirs."""
    ready, program = tmp_path / "ready", "import sys, time, pathlib; pathlib.Path(sys.argv[1]).touch(); time.sleep(60)"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        assert pool.submit(distributed.run_program, [sys.executable, "-c", "exit(4)"], 2).result() == 4

    def interrupt():
        while not ready.exists():
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    command = [sys.executable, "-c", program, str(ready)]
    assert distributed.run_program(command, 2) == 128 + signal.SIGINT
    thread.join()
