"""Checkpoints under faults: kills, crashes at every system call, flipped bits, full disks, links, second writers."""

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import time
import traceback
import warnings

import pytest
import torch

from holofunc import checkpoint
from holofunc.checkpoint import CheckpointError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

SIZE = 2000


def tensors(step):
    """Two tensors that must always be of one step."""
    return {"a": torch.full((SIZE,), float(step)), "b": torch.full((SIZE,), float(step))}


def consistent_step(dir, step="latest"):
    """The step that is read, checked to be of one piece."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # after a crash nothing that is visible is broken
        restored = checkpoint.restore(dir, tensors(0), step=step)
    values = set(restored["a"].tolist()) | set(restored["b"].tolist())
    assert len(values) == 1
    return int(values.pop())


def leftovers(dir):
    return [name for name in os.listdir(dir) if name.startswith((".tmp-", ".del-"))]


def fork(work, *args):
    """Run `work` in a child process; 0 is a clean end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn that other threads do not survive a fork
        pid = os.fork()
    if pid == 0:
        try:
            warnings.simplefilter("ignore")
            work(*args)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


def join(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- death ---


def write_until_killed(dir, acknowledge, background):
    with checkpoint.Writer(dir) as writer:
        for step in range(1, 10_000):
            save = writer.save_async if background and step % 2 else writer.save
            done = save(tensors(step), step, keep=2, best=step % 3 == 0)
            if not (background and step % 2):
                assert done.is_dir()
                os.write(acknowledge, step.to_bytes(4, "little"))


def kill_at_a_random_instant(dir, trial):
    rng = random.Random(trial)
    read, write = os.pipe()
    pid = fork(write_until_killed, dir, write, trial % 2)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        acknowledged = pipe.read(4 * rng.randrange(4))  # so that a kill hits a writer at work, however slow the disk
        time.sleep(rng.uniform(0, 0.01))
        os.kill(pid, signal.SIGKILL)
        join(pid)
        acknowledged += pipe.read()
    last = int.from_bytes(acknowledged[-4:], "little") if acknowledged else 0
    if not checkpoint.steps(dir):
        assert last == 0
        return
    found = consistent_step(dir)
    assert found >= last
    if any(checkpoint.manifest(dir, step=step)["best"] for step in checkpoint.steps(dir)):
        assert consistent_step(dir, "best") % 3 == 0
    assert len(leftovers(dir)) <= 2  # what was being written, and what was being removed
    checkpoint.save(dir, tensors(found + 1), found + 1)
    assert not leftovers(dir)


def campaign(tmp_path, trials):
    for trial in range(trials):
        kill_at_a_random_instant(tmp_path / str(trial), trial)


def test_a_kill_at_a_random_instant_loses_nothing(tmp_path):
    campaign(tmp_path, 40)


@pytest.mark.slow
def test_500_kills_at_random_instants_lose_nothing(tmp_path):
    campaign(tmp_path, 500)


CALLS = ["open", "write", "fsync", "mkdir", "rename", "unlink", "rmdir"]


def tap(monkeypatch, before):
    """Call `before(name, args)` before each system call that changes the disk."""
    for name in CALLS:

        def tapped(*args, _original=getattr(os, name), _name=name, **kwargs):
            before(_name, args)
            return _original(*args, **kwargs)

        monkeypatch.setattr(os, name, tapped)


def save_and_crash(dir, at, monkeypatch):
    count = 0

    def before(name, args):
        nonlocal count
        count += 1
        if count == at:
            os._exit(7)

    tap(monkeypatch, before)
    checkpoint.save(dir, tensors(3), 3, keep=1)


def prepared(dir):
    """Two steps, of which one is the best, to be saved over."""
    checkpoint.save(dir, tensors(1), 1, best=True)
    checkpoint.save(dir, tensors(2), 2)
    return dir


def test_a_crash_at_any_system_call_loses_nothing(tmp_path, monkeypatch):
    original = prepared(tmp_path / "original")
    for at in range(1, 200):
        dir = shutil.copytree(original, tmp_path / str(at))
        code = join(fork(save_and_crash, dir, at, monkeypatch))
        assert consistent_step(dir) in ((2, 3) if code else (3,))
        assert consistent_step(dir, "best") == 1
        checkpoint.save(dir, tensors(4), 4)
        assert not leftovers(dir)
        if code == 0:
            break
        assert code == 7
    assert 15 < at < 100


def test_an_error_at_any_system_call_is_reported_and_cleaned_up(tmp_path, monkeypatch):
    original = prepared(tmp_path / "original")
    for at in range(1, 200):
        dir = shutil.copytree(original, tmp_path / str(at))
        count = 0

        def before(name, args, at=at):
            nonlocal count
            count += 1
            if count == at:
                raise OSError(errno.EIO, "Input/output error")

        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tap(patch, before)
            failed = None
            try:
                checkpoint.save(dir, tensors(3), 3, keep=1)
            except CheckpointError as error:
                failed = error
        assert failed is None or (failed.path, failed.what) == (dir, "cannot be written: Input/output error")
        assert consistent_step(dir) in ((2, 3) if failed else (3,))
        assert consistent_step(dir, "best") == 1
        checkpoint.save(dir, tensors(4), 4)
        assert not leftovers(dir)
        if count < at:
            break
    assert 15 < at < 100


def test_saving_a_step_again_survives_a_crash_at_any_system_call(tmp_path, monkeypatch):
    for at in range(1, 200):
        dir = tmp_path / str(at)
        checkpoint.save(dir, tensors(1), 3)
        code = join(fork(save_and_crash, dir, at, monkeypatch))
        assert consistent_step(dir, 3) in ((1, 3) if code else (3,))
        if code == 0:
            break


def test_everything_is_synced_before_it_counts(tmp_path, monkeypatch):
    events, open_files = [], {}
    original_open = os.open

    def opened(path, flags, *args, **kwargs):
        descriptor = original_open(path, flags, *args, **kwargs)
        open_files[descriptor] = os.path.basename(path)
        return descriptor

    def before(name, args):
        if name == "fsync":
            events.append(("sync", open_files[args[0]]))
        elif name == "rename":
            events.append(("rename", os.path.basename(args[0]), os.path.basename(args[1])))

    tap(monkeypatch, before)
    monkeypatch.setattr(os, "open", opened)
    dir = tmp_path / "new" / "run"
    checkpoint.save(dir, tensors(1), 1)
    checkpoint.save(dir, tensors(2), 2, keep=1)
    names = [event[1].split("-")[0] if event[1].startswith(".") else event[1] for event in events]
    # The directory itself; then files, their directory, the rename, the parent; then the old step goes.
    committed = ["state.pt", "manifest.json", ".tmp", ".tmp", "run"]
    assert names == [tmp_path.name, "new", *committed, *committed, "step_00000001"]
    assert [event[0] for event in events[2:7]] == ["sync", "sync", "sync", "rename", "sync"]
    assert events[5][2] == "step_00000001"
    assert events[-1][2].startswith(".del-")


# --- corruption ---


def corruptions(rng, content):
    """Named ways to damage a file."""
    for _ in range(120):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        yield "flip", bytes(damaged)
    for _ in range(40):
        yield "truncate", content[: rng.randrange(len(content))]
    for _ in range(40):
        at = rng.randrange(len(content))
        yield "delete", content[:at] + content[at + 1 :]
    for _ in range(20):
        yield "insert", content + bytes([rng.randrange(256)])
    yield "empty", b""
    yield "html", b"<!doctype html><title>404</title>"


@pytest.mark.parametrize("file", ["state.pt", "manifest.json"])
def test_no_damage_goes_unnoticed(tmp_path, file):
    path = checkpoint.save(tmp_path, {"w": torch.arange(50.0), "n": 3}, 1, metadata={"loss": 0.25})
    like = {"w": torch.zeros(50), "n": 0}
    truth = checkpoint.restore(tmp_path, like), checkpoint.manifest(tmp_path)
    content = (path / file).read_bytes()
    refused = 0
    for kind, damaged in corruptions(random.Random(0), content):
        (path / file).write_bytes(damaged)
        problem = checkpoint.verify(tmp_path)[1]
        if problem is None:  # then it was white space
            assert file == "manifest.json", kind
            restored = checkpoint.restore(tmp_path, like)
            assert torch.equal(restored["w"], truth[0]["w"])
            assert (restored["n"], checkpoint.manifest(tmp_path)) == (3, truth[1])
        else:
            refused += 1
            with pytest.raises(CheckpointError, match=r"holds no step that verifies: step_00000001 has a "):
                checkpoint.restore(tmp_path, like)
    assert refused > 200
    (path / file).unlink()
    (path / file).mkdir()
    with pytest.raises(CheckpointError):
        checkpoint.restore(tmp_path, like)


def test_files_swapped_between_steps_are_noticed(tmp_path):
    paths = [checkpoint.save(tmp_path, tensors(step), step) for step in (1, 2)]
    swap(paths[0] / "state.pt", paths[1] / "state.pt")
    assert all("SHA-256" in str(error) for error in checkpoint.verify(tmp_path).values())
    swap(paths[0] / "manifest.json", paths[1] / "manifest.json")
    messages = [str(error) for error in checkpoint.verify(tmp_path).values()]
    assert "holds step 2, which is not what its name says" in messages[0]
    assert "holds step 1" in messages[1]


def swap(a, b):
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


@pytest.mark.parametrize("body", ["[" * 100_000, "9" * 5000, '{"sha256": 1}', "null", '{"format": NaN}', "\x00", '"a"'])
def test_a_hostile_manifest_is_refused(tmp_path, body):
    path = checkpoint.save(tmp_path, tensors(1), 1)
    (path / "manifest.json").write_text(body)
    with pytest.raises(CheckpointError, match="step_00000001 has a damaged manifest"):
        checkpoint.restore(tmp_path, tensors(0))


def read_mutants(dir, file, content, seed, count):
    """Read ``count`` files, each mutated in many places at once, within 2 GiB of memory and 30 seconds."""
    signal.alarm(30)
    rng, around = random.Random(seed), sorted(os.listdir(dir.parent))
    for _ in range(count):
        mutant = bytearray(content)
        for _ in range(rng.randrange(1, 12)):
            at = rng.randrange(len(mutant))
            kind = rng.randrange(3)
            if kind == 0:
                mutant[at] = rng.randrange(256)
            elif kind == 1:
                del mutant[at : at + rng.randrange(1, 40)]
            else:
                mutant[at:at] = mutant[at : at + rng.randrange(1, 40)]
            mutant = mutant or bytearray(b"x")
        file.write_bytes(mutant)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                restored = checkpoint.restore(dir, tensors(0))
                assert torch.equal(restored["a"], tensors(1)["a"])
                assert torch.equal(restored["b"], tensors(1)["b"])
            except CheckpointError:
                pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert peak < 2, peak
    assert sorted(os.listdir(dir.parent)) == around


@pytest.mark.parametrize("trials", [200, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["manifest.json", "state.pt"])
def test_no_parser_hangs_crashes_or_takes_the_machine(tmp_path, name, trials):
    """Of the manifest, of JSON, of the zip archive: mutated files are refused, or are what they were."""
    path = checkpoint.save(tmp_path / "run", tensors(1), 1)
    content = (path / name).read_bytes()
    for seed in range(trials // 100):
        assert join(fork(read_mutants, tmp_path / "run", path / name, content, seed, 100)) == 0


def save_with_few_files(dir, limit):
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 9, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    taken = []
    with contextlib.suppress(OSError):
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    for descriptor in taken[:limit]:
        os.close(descriptor)
    said = "nothing"
    try:
        checkpoint.save(dir, tensors(2), 2)
    except CheckpointError as error:
        said = str(error)
    assert "Too many open files" in said or (said == "nothing" and limit > 0), said


def test_too_many_open_files_are_called_that(tmp_path):
    checkpoint.save(tmp_path, tensors(1), 1)
    for limit in range(3):
        assert join(fork(save_with_few_files, tmp_path, limit)) == 0
        assert consistent_step(tmp_path) in (1, 2)
        assert not leftovers(tmp_path)


# --- a disk that is full, a directory that cannot be used ---


def save_with_limit(dir, limit):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(dir, tensors(2), 2)
    message = str(caught.value)
    assert "cannot be written: File too large (16000 bytes needed, " in message, message
    assert "free some space" in message
    assert not leftovers(dir)


def test_a_full_disk_is_called_that_and_harms_nothing(tmp_path):
    size = checkpoint.save(tmp_path / "run", tensors(1), 1).joinpath("state.pt").stat().st_size
    for i in range(20):
        assert join(fork(save_with_limit, tmp_path / "run", 64 + i * (size - 65) // 19)) == 0
        assert consistent_step(tmp_path / "run") == 1


def save_as_nobody(dir):
    os.setuid(65534)
    with pytest.raises(CheckpointError, match="cannot be written: Permission denied; use a directory you can write to"):
        checkpoint.Writer(dir)


@pytest.mark.skipif(os.getuid() != 0, reason="needs to become another user")
@pytest.mark.parametrize("name", ["", "missing/parent"])
def test_a_directory_without_permission_is_noticed_on_opening(tmp_path, name):
    for parent in [tmp_path, *tmp_path.parents][:-2]:
        parent.chmod(0o755)
    assert join(fork(save_as_nobody, tmp_path / name)) == 0


def test_a_path_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(CheckpointError, match="cannot be written: Not a directory"):
            checkpoint.Writer(path)


@pytest.mark.parametrize("name", ["a b", "line\nbreak", "ü", "\udc80", "d" * 200 + "/" + "e" * 200])
def test_odd_directory_names(tmp_path, name):
    checkpoint.save(tmp_path / name, tensors(1), 1)
    assert consistent_step(tmp_path / name) == 1
    with pytest.raises(CheckpointError) as caught:
        checkpoint.restore(tmp_path / name, tensors(0), step=2)
    str(caught.value).encode()  # can be printed
    assert "\n" not in str(caught.value)


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written: File name too long"):
        checkpoint.Writer(tmp_path / ("x" * 300))


# --- links ---


def test_a_link_laid_for_the_writer_leads_nowhere(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "empty").mkdir()
    dir = tmp_path / "run"
    dir.mkdir()
    (dir / ".lock").symlink_to(victim)
    with pytest.raises(CheckpointError, match="cannot be written: Too many levels of symbolic links"):
        checkpoint.save(dir, tensors(1), 1)
    (dir / ".lock").unlink()

    writer = checkpoint.Writer(dir)
    monkeypatch.setattr("secrets.token_hex", lambda size: "guessed")
    (dir / f".tmp-1-{os.getpid()}-guessed").symlink_to(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="cannot be written: File exists"):
        writer.save(tensors(1), 1)
    assert victim.read_text() == "precious"
    assert os.listdir(tmp_path / "empty") == []
    writer.close()


def test_the_directory_itself_may_be_a_link_and_so_may_a_step(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    archived = checkpoint.save(tmp_path / "archive", tensors(1), 1)
    (tmp_path / "run" / "step_00000001").symlink_to(archived)
    for step in (2, 3):
        checkpoint.save(tmp_path / "run", tensors(step), step, keep=1)
    assert checkpoint.steps(tmp_path / "disk") == [1, 3]  # what others keep is not removed
    assert consistent_step(tmp_path / "run", 1) == 1


# --- several processes ---


def test_a_second_writer_is_told_who_the_first_is(tmp_path):
    with checkpoint.Writer(tmp_path):
        for attempt in (checkpoint.Writer, lambda dir: checkpoint.save(dir, tensors(1), 1)):
            with pytest.raises(CheckpointError, match=f"is being written by process {os.getpid()} on .*; wait for it"):
                attempt(tmp_path)
    checkpoint.save(tmp_path, tensors(1), 1)


def test_a_killed_writer_lets_go_while_its_children_live(tmp_path):
    """As the workers of a loader do, for some seconds."""
    read, write = os.pipe()

    def open_and_have_a_child():
        writer = checkpoint.Writer(tmp_path)
        child = fork(time.sleep, 60)
        writer.save(tensors(1), 1)  # the child's end of the lock is not this one's
        with pytest.raises(CheckpointError, match="is being written by"):
            checkpoint.Writer(tmp_path)
        os.write(write, child.to_bytes(4, "little"))
        time.sleep(60)

    pid = fork(open_and_have_a_child)
    child = int.from_bytes(os.read(read, 4), "little")
    os.kill(pid, signal.SIGKILL)
    join(pid)
    try:
        os.kill(child, 0)
        checkpoint.save(tmp_path, tensors(2), 2)
    finally:
        os.kill(child, signal.SIGKILL)
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_a_forgotten_writer_lets_go(tmp_path):
    writer = checkpoint.Writer(tmp_path)
    writer.save(tensors(1), 1)
    del writer
    checkpoint.save(tmp_path, tensors(2), 2)


def save_often(dir, first):
    for step in range(first, first + 40, 2):
        while step not in checkpoint.steps(dir):
            try:
                checkpoint.save(dir, tensors(step), step, keep=1)
            except CheckpointError as error:
                if "is being written by" not in error.what:
                    raise
                time.sleep(random.random() / 1000)
            else:
                break


def test_two_writers_and_a_reader_at_once(tmp_path):
    checkpoint.save(tmp_path, tensors(0), 0)
    writers = [fork(save_often, tmp_path, first) for first in (1, 2)]
    seen = []
    while len(writers) > 0:
        seen.append(consistent_step(tmp_path))
        writers = [pid for pid in writers if os.waitpid(pid, os.WNOHANG) == (0, 0)]
    assert consistent_step(tmp_path) == 40
    assert seen == sorted(seen)
    assert len(set(seen)) > 3


@pytest.mark.parametrize("saves", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_file_stays_open(tmp_path, saves):
    before = len(os.listdir("/proc/self/fd"))
    for step in range(saves):
        checkpoint.save(tmp_path, tensors(step), step, keep=2)
        consistent_step(tmp_path)
        checkpoint.verify(tmp_path)
        with pytest.raises(CheckpointError):
            checkpoint.restore(tmp_path, {})
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.slow
def test_saving_and_loading_take_no_second_copy(tmp_path):
    read, write = os.pipe()

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def work():
        state = {str(i): torch.zeros(2**22) + i for i in range(16)}  # 256 MiB
        before = peak()
        checkpoint.save(tmp_path, state, 1)
        saved = peak()
        del state
        like = {str(i): torch.empty(2**22, device="meta") for i in range(16)}
        restored = checkpoint.restore(tmp_path, like)
        assert restored["15"][-1] == 15
        os.write(write, json.dumps([before, saved, peak()]).encode())

    assert join(fork(work)) == 0
    before, saved, restored = json.loads(os.read(read, 1000))
    assert saved - before < 0.05 * 256
    assert restored - before < 0.2 * 256
