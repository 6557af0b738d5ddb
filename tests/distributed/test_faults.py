"""What goes wrong on one rank is an error on all of them that names it; what was saved on some, others read."""

import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from holofunc import checkpoint, data, distributed, lift, losses, optim, random, train, tree

ROOT = Path(__file__).parents[2]

# --- a rank fails ------------------------------------------------------------------------------------------------


def fails(how):
    """The message on rank 0, and that of `launch`."""

    def work():
        distributed.psum(torch.ones(3))
        if distributed.rank() == 1:
            how()
        try:
            distributed.psum(torch.ones(3))
        except distributed.RankError as error:
            (folder / f"rank{distributed.rank()}").write_text(str(error))
            raise

    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with pytest.raises(distributed.RankError) as caught:
            distributed.launch(work, 3, timeout=4)
        seen = [(folder / f"rank{r}").read_text() for r in (0, 2)]
    return seen, caught.value


def broken():
    raise ValueError("image 7 is damaged")


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        (broken, "rank 1: ValueError: image 7 is damaged"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "rank 1: was killed (exit code -9)"),
        (lambda: os._exit(3), "rank 1: ended (exit code 3)"),
        pytest.param(lambda: time.sleep(60), "rank 1: was killed, or hangs", marks=pytest.mark.slow),
    ],
    ids=["error", "killed", "exit", "hang"],
)
def test_every_rank_learns_which_one_failed_and_of_what(how, cause):
    seen, error = fails(how)
    assert seen == [cause] * 2
    assert str(error).startswith(cause) or "hangs" in str(error)
    assert list(error.causes) == [1]


def test_the_traceback_of_the_rank_is_a_note():
    _, error = fails(broken)
    assert any("in broken" in note for note in error.__notes__)


def test_a_rank_with_fewer_batches():
    def work():
        for _ in range(3 - distributed.rank()):
            distributed.psum(torch.ones(1))

    with pytest.raises(distributed.RankError, match=r"rank 1: ended without an error .* did it see fewer batches?"):
        distributed.launch(work, 2, timeout=10)


def test_nobody_is_left_behind():
    def work():
        if distributed.rank() == 1:
            raise ValueError("first")
        time.sleep(60)  # and takes part in nothing

    began = time.monotonic()
    with pytest.raises(distributed.RankError, match="rank 1: ValueError: first"):
        distributed.launch(work, 2)
    assert time.monotonic() - began < 20
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    if children.exists():
        names = [Path(f"/proc/{pid}/stat").read_text().split()[2] for pid in children.read_text().split()]
        assert "Z" not in names


def test_fingerprint_names_the_rank_and_the_difference():
    def work(tree_of):
        return distributed.fingerprint(tree_of(distributed.rank()))

    def config(rank):
        return {"params": {"w": torch.zeros(2)}, "lr": 0.1}

    assert len(set(distributed.launch(work, 2, config))) == 1
    for changed, what in [
        (
            {"params": {"w": torch.zeros(3)}, "lr": 0.1},
            r"has params/w: float32 \(3,\) where rank 0 has params/w: float32 \(2,\)",
        ),
        ({"params": {"w": torch.zeros(2).double()}, "lr": 0.1}, r"has params/w: float64 \(2,\) where rank 0"),
        ({"params": {"v": torch.zeros(2)}, "lr": 0.1}, r"has params/v: .* where rank 0 has params/w"),
        ({"params": {"w": torch.zeros(2)}, "lr": 0.2}, "has lr: 0.2 where rank 0 has lr: 0.1"),
    ]:
        with pytest.raises(distributed.RankError, match=f"rank 1: {what}"):
            distributed.launch(work, 2, lambda rank, changed=changed: changed if rank == 1 else config(rank))


def test_fingerprint_of_values():
    one, two = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    assert distributed.fingerprint(one) == distributed.fingerprint(two)
    assert distributed.fingerprint(one, values=True) != distributed.fingerprint(two, values=True)
    assert distributed.fingerprint({"a": 1, "b": 2}) == distributed.fingerprint({"b": 2, "a": 1})


def test_rank_zero(capfd):
    def work():
        return distributed.rank_zero(lambda x: x + 1)(1)

    assert distributed.launch(work, 2) == [2, None]


@pytest.mark.slow
def test_torchrun(tmp_path):
    """A script, once as it should be and once with a rank that fails."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import sys, torch
        from holofunc import distributed
        distributed.init(timeout=20)
        print(int(distributed.psum(torch.tensor(1 + distributed.rank()))))
        if len(sys.argv) > 1 and distributed.rank() == 1:
            raise ValueError("no more data")
        distributed.psum(torch.ones(2))
        """)
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29533", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3", "3"]
    done = subprocess.run([*command, "fail"], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert "ValueError: no more data" in done.stderr


HOST = """
import os, sys, time, torch
from holofunc import distributed
distributed.init(timeout=6)
print("sum", int(distributed.psum(torch.tensor(1 + distributed.rank()))), flush=True)
while True:
    distributed.psum(torch.ones(2))
    time.sleep(0.05)
"""


@pytest.fixture
def two_hosts():
    """Two network namespaces with an address each, joined by a cable: ``run(host, command)``, and the name of a cable."""
    names, links = (
        [f"holofunc{os.getpid()}{host}" for host in "ab"],
        [f"hf{os.getpid() % 10**6}{host}" for host in "ab"],
    )

    def ip(*words, inside=None):
        command = ["ip", *(["-n", inside] if inside else []), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for number, (name, link) in enumerate(zip(names, links, strict=True), start=1):
            ip("link", "set", link, "netns", name)
            ip("addr", "add", f"10.77.0.{number}/24", "dev", link, inside=name)
            for device in ("lo", link):
                ip("link", "set", device, "up", inside=name)
    except (OSError, subprocess.CalledProcessError) as error:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        pytest.skip(f"this machine makes no network namespaces: {getattr(error, 'stderr', error)}")
    yield names, links, ip
    for name in names:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.slow
def test_two_hosts_and_a_cut_cable(two_hosts):
    """Two addresses reach the same sum; where the cable is cut, both end in time, and name the other one."""
    names, links, ip = two_hosts
    hosts = []
    for rank, (name, link) in enumerate(zip(names, links, strict=True)):
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": link, "RANK": str(rank),
            "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29400",
        }  # fmt: skip
        command = ["ip", "netns", "exec", name, sys.executable, "-W", "ignore", "-c", HOST]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        hosts.append(subprocess.Popen(command, env=environment, text=True, **streams))
    try:
        assert [host.stdout.readline() for host in hosts] == ["sum 3\n"] * 2
        ip("link", "set", links[1], "down", inside=names[1])
        began = time.monotonic()
        told = [host.communicate(timeout=60)[1] for host in hosts]
        assert time.monotonic() - began < 30
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [1, 1]
    assert "RankError: rank 1: was killed, or hangs" in told[0]
    assert "RankError: rank 0: was killed, or hangs" in told[1]


# --- shards on the disk ------------------------------------------------------------------------------------------


def optimizer_state(steps=3):
    """A state with shares of moments in it, after some updates."""
    tx = distributed.shard(optim.adam(0.1))
    params = {name: random.normal(random.key(i), (3, 1 + i)) for i, name in enumerate("abcd")}
    state = tx.init(params)
    for step in range(steps):
        grads = {name: random.normal(random.fold_in(random.key(9), step), p.shape) for name, p in params.items()}
        updates, state = tx.update(grads, state, params)
        params = optim.apply_updates(params, updates)
    return {"params": params, "opt_state": state}


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_saved_on_two_ranks_read_on_others(tmp_path, world):
    def save():
        distributed.save_sharded(tmp_path, optimizer_state(), 3, metadata={"epoch": 1})

    def read():
        found = distributed.restore_sharded(tmp_path, tree.map(torch.zeros_like, optimizer_state(0)))
        expected = optimizer_state()
        return all(
            torch.allclose(a, b, atol=1e-6) for a, b in zip(tree.leaves(found), tree.leaves(expected), strict=True)
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distributed.launch(save, 2)
        assert checkpoint.steps(tmp_path) == [3]
        assert distributed.launch(read, world) == [True] * world


def test_what_does_not_fit_is_refused_and_nothing_is_cast(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = distributed.save_sharded(tmp_path, {"w": torch.ones(2), "v": torch.ones(3)}, 1)
    like = {"w": torch.ones(2).double(), "v": torch.ones(4), "u": torch.ones(1)}
    with pytest.raises(checkpoint.CheckpointError) as caught:
        distributed.restore_sharded(tmp_path, like)
    for line in (
        "mismatched 'w': float32 (2,) is stored, float64 (2,) expected",
        "mismatched 'v': float32 (3,) is stored, float32 (4,) expected",
        "missing 'u'",
    ):
        assert line in str(caught.value)
    with pytest.raises(checkpoint.CheckpointError, match="exists already"):
        distributed.save_sharded(tmp_path, {"w": torch.ones(2)}, 1)
    with pytest.raises(checkpoint.CheckpointError, match="holds no step 5"):
        distributed.restore_sharded(tmp_path, like, step=5)
    with pytest.raises(TypeError, match="leaf 'n' must be a tensor, got int"):
        distributed.save_sharded(tmp_path, {"n": 3}, 2)

    metadata = path / ".metadata"
    content = bytearray(metadata.read_bytes())
    content[len(content) // 2] ^= 1
    metadata.write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match=r"has a damaged or missing \.metadata"):
        distributed.restore_sharded(tmp_path, {"w": torch.ones(2)})


def elastic(folder, stop):
    """Train to step ``stop``, from what is in the folder; the losses of all ranks together and the order of samples."""
    images, labels = data.digits("train")
    seen = []

    def batches():
        whole = data.Batches((images[:96], labels[:96]), 16, key=random.key(0))
        return whole.shard(distributed.rank(), distributed.world_size())

    model = distributed.sync_batch_norm(
        lift(
            lambda: nn.Sequential(
                nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
            )
        )
    )
    tx = distributed.shard(optim.adam(1e-2))
    step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx)
    state = train.create_state(model, tx, random.key(1))
    if checkpoint.steps(folder):
        state = distributed.restore_sharded(folder, state)
    found = []
    while int(state.step) < stop:
        epoch, start = divmod(int(state.step), 6)
        for batch in batches().epoch(epoch, start):
            state, measured = step(state, batch)
            seen += distributed.all_gather(batch[1]).tolist()
            found.append(measured["loss"].item())
            if int(state.step) == stop:
                break
    distributed.save_sharded(folder, state, stop)
    return found, seen, state.params


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, world):
    """Saved on 2 ranks after 8 of 14 steps, in the midst of an epoch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = elastic(tmp_path / "whole", 14)
        first = distributed.launch(elastic, 2, tmp_path / "run", 8)
        rest = distributed.launch(elastic, world, tmp_path / "run", 14)
    for before, after in zip(first, rest, strict=False):
        assert before[1] + after[1] == whole[1]
        assert before[0] + after[0] == pytest.approx(whole[0], rel=1e-4)
        torch.testing.assert_close(after[2], whole[2], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_twenty_kills_and_the_same_state_in_the_end(tmp_path):
    """A rank is killed at a random instant, 20 times; what goes on from the last step ends where no one was killed."""
    steps = 60

    def work(folder, killed_after):
        tx, start = distributed.shard(optim.adam(0.05)), 0
        params = {name: random.normal(random.key(i), (3, 1 + i)) for i, name in enumerate("abcd")}
        state = {"params": params, "opt_state": tx.init(params)}
        if found := checkpoint.steps(folder):
            start, state = found[-1], distributed.restore_sharded(folder, state)
        if killed_after is not None and distributed.rank() == int(killed_after * 1e4) % 2:
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            signal.setitimer(signal.ITIMER_REAL, killed_after)
        for step in range(start, steps):
            key = random.fold_in(random.fold_in(random.key(9), step), distributed.rank())
            grads = {name: random.normal(key, p.shape) for name, p in params.items()}
            updates, inner = tx.update(grads, state["opt_state"], state["params"])
            state = {"params": optim.apply_updates(state["params"], updates), "opt_state": inner}
            if (step + 1) % 5 == 0:
                distributed.save_sharded(folder, state, step + 1)
        return state["params"]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = distributed.launch(work, 2, tmp_path / "whole", None)[0]
        kills = 0
        for attempt in range(20):
            instant = 0.05 + 0.5 * float(random.uniform(random.key(attempt), ()))
            folder = tmp_path / f"run{attempt // 4}"
            try:
                distributed.launch(work, 2, folder, instant, timeout=20)
            except distributed.RankError as error:
                kills += "was killed (exit code -9)" in str(error)
        assert kills >= 10
        for run in range(5):
            found = distributed.launch(work, 2, tmp_path / f"run{run}", None)[0]
            assert all(torch.equal(found[name], expected[name]) for name in expected)
