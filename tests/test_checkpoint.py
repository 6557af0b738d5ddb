"""Checkpoints: what is saved comes back, and what went wrong is said."""

import json
import os
import zipfile
from typing import NamedTuple

import numpy as np
import pytest
import torch

from holofunc import checkpoint, optim, tree
from holofunc.checkpoint import CheckpointError


class Moments(NamedTuple):
    mu: dict
    count: torch.Tensor


class State(NamedTuple):
    step: torch.Tensor
    params: dict
    opt_state: tuple


def state(value=1.0):
    params = {"layer1.0.weight": torch.full((2, 3), value), "head.bias": torch.full((3,), value)}
    moments = Moments({name: leaf * 2 for name, leaf in params.items()}, torch.tensor(7))
    return State(torch.tensor(5), params, ({"adam": moments}, None, ()))


def blank(like):
    return tree.map(lambda leaf: torch.zeros_like(leaf) if isinstance(leaf, torch.Tensor) else type(leaf)(), like)


def same(a, b):
    """Bit equality, of structure, types and values."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
            and a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


big = torch.arange(10_000.0)
TREES = {
    "training state": state(),
    "flat dict": {"w": torch.ones(2), "b": torch.zeros(())},
    "lists and tuples": [torch.ones(1), (torch.zeros(2), [torch.ones(3)])],
    "one leaf": torch.arange(4),
    "no leaf": {},
    "python values": {"patience": 3, "best": 0.1, "seen": True, "name": "é\n", "none": None, "inf": float("inf")},
    "dtypes": {
        str(dtype): torch.arange(6).to(dtype)
        for dtype in (
            torch.bfloat16,
            torch.float16,
            torch.float64,
            torch.uint8,
            torch.int64,
            torch.complex64,
            torch.bool,
        )
    },
    "empty tensors": {"a": torch.zeros(0, 3), "b": torch.zeros(3, 0)},
    "not a number": {"a": torch.tensor([float("nan"), -0.0, float("-inf")])},
    "strides": {"t": torch.arange(6.0).reshape(2, 3).T, "e": torch.ones(1).expand(4), "s": big[::7]},
    "channels last": {"w": torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)},
    "views of one vector": dict(zip("ab", big.split([4000, 6000]), strict=True)),
    "parameters": dict(torch.nn.Linear(2, 3).named_parameters()),
    "odd names": {"../../x": torch.ones(1), "": torch.ones(2), "a\nb": torch.ones(3)},
}


@pytest.mark.parametrize("name", TREES)
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_what_is_saved_comes_back(tmp_path, name):
    saved = tree.map(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, TREES[name])
    checkpoint.save(tmp_path, TREES[name], 3)
    assert same(checkpoint.restore(tmp_path, blank(saved)), saved)


def test_memory_format_comes_back(tmp_path):
    checkpoint.save(tmp_path, TREES["channels last"], 0)
    restored = checkpoint.restore(tmp_path, blank(TREES["channels last"]))
    assert restored["w"].is_contiguous(memory_format=torch.channels_last)


def test_the_file_is_an_ordinary_one(tmp_path):
    path = checkpoint.save(tmp_path, state(), 12, metadata={"loss": 0.5, "seed": (1, 2)})
    assert path == tmp_path / "step_00000012"
    content = torch.load(path / "state.pt", weights_only=True)
    assert list(content) == tree.paths(state())
    written = json.loads((path / "manifest.json").read_text())
    assert written["leaves"]["params/layer1.0.weight"] == [[2, 3], "float32"]
    assert written["leaves"]["opt_state/0/adam/mu/head.bias"] == [[3], "float32"]
    about = checkpoint.manifest(tmp_path)
    assert (about["step"], about["metadata"], about["best"]) == (12, {"loss": 0.5, "seed": [1, 2]}, False)
    assert about["torch"] == torch.__version__
    assert about["threads"] == torch.get_num_threads()
    assert about["device"] == ["cpu"]


def test_a_small_view_does_not_save_its_large_storage(tmp_path):
    view = checkpoint.save(tmp_path / "view", {"a": big[:10], "b": big[5:15]}, 0)
    whole = checkpoint.save(tmp_path / "whole", dict(zip("ab", big.split([4000, 6000]), strict=True)), 0)
    assert (view / "state.pt").stat().st_size < 5000
    assert 40_000 < (whole / "state.pt").stat().st_size < 45_000


def test_restored_leaves_are_new_and_take_the_place_asked_for(tmp_path):
    checkpoint.save(tmp_path, {"w": torch.ones(2)}, 0)
    like = {"w": torch.zeros(2)}
    first, second = (checkpoint.restore(tmp_path, like) for _ in range(2))
    first["w"] += 1
    assert like["w"].tolist() == [0, 0]
    assert second["w"].tolist() == [1, 1]
    assert not first["w"].requires_grad
    restored = checkpoint.restore(tmp_path, {"w": torch.zeros(2, device="meta")})
    assert restored["w"].tolist() == [1, 1]


# --- which step ---


def fill(dir, numbers, **options):
    for step in numbers:
        checkpoint.save(dir, {"w": torch.full((2,), float(step))}, step, **options)


def value(dir, step="latest"):
    return checkpoint.restore(dir, {"w": torch.zeros(2)}, step=step)["w"][0].item()


def test_steps_are_ordered_as_numbers_whatever_the_clock_says(tmp_path):
    numbers = [9, 123_456_792, 10, 100, 99_999_999]
    fill(tmp_path, numbers)
    for age, path in enumerate(sorted(tmp_path.glob("step_*"))):
        os.utime(path, (10**9 - age, 10**9 - age))
    assert checkpoint.steps(tmp_path) == sorted(numbers)
    assert value(tmp_path) == 123_456_792
    assert value(tmp_path, 10) == 10


def test_keep_removes_the_oldest_but_never_the_best_or_the_last_saved(tmp_path):
    fill(tmp_path, [1, 2, 3])
    fill(tmp_path, [4], best=True)
    fill(tmp_path, [5, 6, 7], keep=2)
    assert checkpoint.steps(tmp_path) == [4, 6, 7]
    fill(tmp_path, [8], best=True, keep=1)
    assert checkpoint.steps(tmp_path) == [8]
    fill(tmp_path, [3], keep=1)  # a run continued from an earlier step
    assert checkpoint.steps(tmp_path) == [3, 8]
    assert not [name for name in os.listdir(tmp_path) if name.startswith((".tmp", ".del"))]


def test_best_is_the_newest_step_saved_as_best(tmp_path):
    fill(tmp_path, [1], best=True)
    fill(tmp_path, [2], best=True)
    fill(tmp_path, [3])
    assert (value(tmp_path, "best"), value(tmp_path)) == (2, 3)
    (tmp_path / "step_00000002" / "state.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="step_00000002' has a state.pt of 0 bytes"):
        assert value(tmp_path, "best") == 1


def test_saving_a_step_again_replaces_it(tmp_path):
    for attempt in range(3):
        checkpoint.save(tmp_path, {"w": torch.full((2,), float(attempt))}, 5)
    assert checkpoint.steps(tmp_path) == [5]
    assert len(list(tmp_path.glob("step_*"))) == 1
    assert value(tmp_path) == value(tmp_path, 5) == 2


def test_a_single_step_or_file_can_be_read(tmp_path):
    fill(tmp_path / "run", [1, 2])
    first = tmp_path / "run" / "step_00000001"
    assert value(first) == value(first / "state.pt") == 1
    copy = first.rename(tmp_path / "best model")
    assert value(copy) == 1
    torch.save({"w": torch.full((2,), 9.0)}, tmp_path / "weights.pt")
    assert value(tmp_path / "weights.pt") == 9
    torch.save({"params": {"w": torch.full((2,), 8.0)}, "step": torch.tensor(1)}, tmp_path / "nested.pt")
    nested = checkpoint.restore(tmp_path / "nested.pt", {"w": torch.zeros(2)}, prefix="params")
    assert nested["w"].tolist() == [8, 8]


def test_the_newest_step_that_verifies_is_the_latest(tmp_path):
    fill(tmp_path, [1, 2, 3, 4])
    (tmp_path / "step_00000003" / "state.pt").write_bytes(b"x")
    (tmp_path / "step_00000004" / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="skipped a broken checkpoint") as caught:
        assert value(tmp_path) == 2
    assert "step_00000004' has no readable manifest (No such file" in str(caught[0].message)
    assert "step_00000003' has a state.pt of 1 bytes instead of" in str(caught[1].message)
    found = checkpoint.verify(tmp_path)
    assert [found[1], found[2]] == [None, None]
    assert "1 bytes" in str(found[3])
    assert "no readable manifest" in str(found[4])
    with pytest.raises(CheckpointError, match=r"holds no step that verifies: step_00000003 has a state.pt of 1 bytes"):
        value(tmp_path, 3)


def test_what_is_called_like_a_step_and_is_none(tmp_path):
    """A file of that name, and a directory without a manifest, keep nobody from the steps that are there."""
    checkpoint.save(tmp_path, {"a": torch.tensor(1)}, 1)
    (tmp_path / "step_00000006").write_text("mine")
    assert checkpoint.steps(tmp_path) == [1]
    assert checkpoint.restore(tmp_path, {"a": torch.tensor(0)})["a"] == 1
    (tmp_path / "step_00000005").mkdir()
    with pytest.warns(UserWarning, match="skipped a broken checkpoint: .*step_00000005.*has no readable manifest"):
        assert checkpoint.restore(tmp_path, {"a": torch.tensor(0)})["a"] == 1


def test_the_errors_of_what_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="none' does not exist; check the path"):
        value(tmp_path / "none")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        value(tmp_path)
    fill(tmp_path, [1, 5])
    with pytest.raises(CheckpointError, match=r"holds no step 3; restore one of \[1, 5\]"):
        value(tmp_path, 3)
    with pytest.raises(CheckpointError, match=r"holds no step saved with best=True; restore one of \[1, 5\]"):
        value(tmp_path, "best")
    with pytest.raises(ValueError, match="step must be 'latest', 'best' or a number, got 'newest'"):
        value(tmp_path, "newest")
    for path in tmp_path.glob("step_*/state.pt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds no step that verifies.*start again") as caught:
        value(tmp_path)
    assert caught.value.path == tmp_path


def test_a_newer_format_says_so(tmp_path):
    from holofunc.checkpoint.layout import sealed

    fill(tmp_path, [1])
    path = tmp_path / "step_00000001" / "manifest.json"
    about = json.loads(path.read_text())
    del about["sha256"]
    path.write_bytes(sealed({**about, "format": 2}))
    with pytest.raises(CheckpointError, match="has format 2, and this holofunc reads 1"):
        value(tmp_path)


# --- does it fit ---


def test_every_difference_is_listed_at_once(tmp_path):
    checkpoint.save(
        tmp_path, {"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1), "n": 3, "old": torch.ones(1)}, 0
    )
    like = {"a": torch.ones(2), "b": torch.ones(4), "c": torch.ones(1).double(), "n": 3.0, "new": torch.ones(1)}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.restore(tmp_path, like)
    assert str(caught.value).splitlines()[1:] == [
        "  missing 'new'",
        "  unexpected 'old'",
        "  mismatched 'b': float32 (3,) is stored, float32 (4,) expected",
        "  mismatched 'c': float32 (1,) is stored, float64 (1,) expected",
        "  mismatched 'n': int  is stored, float  expected; restore with the model and optimizer it was saved with",
    ]


def test_not_strict_takes_what_fits_and_still_refuses_other_shapes(tmp_path):
    checkpoint.save(tmp_path, {"a": torch.ones(2), "old": torch.ones(1)}, 0)
    restored = checkpoint.restore(tmp_path, {"a": torch.zeros(2), "new": torch.zeros(1)}, strict=False)
    assert same(restored, {"a": torch.ones(2), "new": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="mismatched 'a'"):
        checkpoint.restore(tmp_path, {"a": torch.zeros(3)}, strict=False)
    with pytest.raises(CheckpointError, match=r"missing 'params.a'"):  # nothing fits: surely the wrong tree
        checkpoint.restore(tmp_path, {"params": {"a": torch.zeros(2)}}, strict=False)


def test_fields_of_states_under_their_names_from_before(tmp_path):
    """A step saved when states counted in `count` restores, strictly, into states that count in `step`."""
    params = {"count": torch.ones(2), "w": torch.ones(2)}  # a parameter keeps its name
    tx = optim.multi_steps(optim.lookahead(optim.adamw(optim.schedules.linear(0.1, 0.0, 9))), 2)
    now = tx.init(params)
    for _ in range(3):
        _, now = tx.update(params, now, params)
    old = {"step": "count", "mini_step": "window"}
    parts = [(path.rpartition("/"), leaf) for path, leaf in tree.leaves_with_path(now)]
    before = {f"{node}{slash}{old.get(last, last)}": leaf for (node, slash, last), leaf in parts}
    checkpoint.save(tmp_path, {"opt_state": before, "step": torch.tensor(3)}, 3)
    like = {"opt_state": tx.init(params), "step": torch.tensor(0)}
    assert same(checkpoint.restore(tmp_path, like), {"opt_state": now, "step": torch.tensor(3)})
    assert same(checkpoint.restore(tmp_path, like["opt_state"], prefix="opt_state"), now)
    with pytest.raises(CheckpointError, match="missing 'opt_state/other'"):
        checkpoint.restore(tmp_path, {"opt_state": {"other": torch.tensor(0)}, "step": torch.tensor(0)})


def test_a_subtree_by_its_prefix(tmp_path):
    checkpoint.save(tmp_path, state(3.0), 0)
    like = blank(state())
    assert same(checkpoint.restore(tmp_path, like.params, prefix="params"), state(3.0).params)
    moments = checkpoint.restore(tmp_path, like.opt_state[0]["adam"], prefix="opt_state/0/adam")
    assert same(moments, state(3.0).opt_state[0]["adam"])
    with pytest.raises(CheckpointError, match=r"to be restored at 'param':\n  missing 'layer1.0.weight'"):
        checkpoint.restore(tmp_path, like.params, prefix="param")


def test_a_dtype_changes_on_request_only(tmp_path):
    checkpoint.save(tmp_path, {"w": torch.tensor([1.0, 1 / 3])}, 0)
    like = {"w": torch.zeros(2, dtype=torch.bfloat16)}
    with pytest.raises(CheckpointError, match=r"float32 \(2,\) is stored, bfloat16 \(2,\) expected"):
        checkpoint.restore(tmp_path, like)
    assert same(checkpoint.restore(tmp_path, like, cast=True), {"w": torch.tensor([1.0, 1 / 3]).bfloat16()})
    with pytest.raises(CheckpointError, match="mismatched"):
        checkpoint.restore(tmp_path, {"w": torch.zeros(3)}, cast=True)


BAD = [
    (lambda dir: checkpoint.save(dir, {}, -1), ValueError, "step must be an integer of at least 0, got -1"),
    (lambda dir: checkpoint.save(dir, {}, "x"), ValueError, "step must be an integer of at least 0, got 'x'"),
    (lambda dir: checkpoint.save(dir, {}, True), ValueError, "step must be an integer of at least 0, got True"),
    (lambda dir: checkpoint.save(dir, {}, 1, keep=1.5), ValueError, "keep must be an integer of at least 1, got 1.5"),
    (lambda dir: checkpoint.save(dir, {}, 1, metadata=[1]), TypeError, "metadata must be a dict, got list"),
    (lambda dir: checkpoint.save(dir, {}, 1.5), ValueError, "step must be an integer of at least 0, got 1.5"),
    (lambda dir: checkpoint.save(dir, {}, 1, keep=0), ValueError, "keep must be an integer of at least 1, got 0"),
    (lambda dir: checkpoint.save(dir, {"f": print}, 1), TypeError, "leaf 'f' must be .*got builtin_function_or_method"),
    (lambda dir: checkpoint.save(dir, {"n": np.ones(1)}, 1), TypeError, "leaf 'n' must be .*got ndarray"),
    (lambda dir: checkpoint.save(dir, {"m": torch.ones(1, device="meta")}, 1), TypeError, "got a tensor without data"),
    (lambda dir: checkpoint.save(dir, {}, 1, metadata={"m": {1}}), TypeError, "set is not JSON serializable"),
    (
        lambda dir: checkpoint.save(dir, {"a/b": torch.ones(1), "a": {"b": torch.ones(1)}}, 1),
        ValueError,
        "two leaves have the path 'a/b'",
    ),
]


@pytest.mark.parametrize(("call", "error", "match"), BAD, ids=[match[:20] for _, _, match in BAD])
def test_bad_input_leaves_no_trace(tmp_path, call, error, match):
    with pytest.raises(error, match=match):
        call(tmp_path)
    assert os.listdir(tmp_path) == [".lock"]


def test_a_step_may_be_a_tensor(tmp_path):
    checkpoint.save(tmp_path, {}, torch.tensor(4))
    assert checkpoint.steps(tmp_path) == [4]


def test_metadata_with_keys_that_are_numbers(tmp_path):
    checkpoint.save(tmp_path, {}, 1, metadata={10: "a", 9: float("nan")})
    assert checkpoint.manifest(tmp_path)["metadata"]["10"] == "a"


# --- asynchronous ---


def test_saving_in_the_background_saves_what_was_given(tmp_path):
    with checkpoint.Writer(tmp_path) as writer:
        for step in range(5):
            params = {"w": torch.full((1000,), float(step))}
            writer.save_async(params, step, copy=True)
            params["w"].fill_(-1)  # a donated state is written over
        writer.save({"w": torch.zeros(1)}, 9)
    for step in range(5):
        restored = checkpoint.restore(tmp_path, {"w": torch.zeros(1000)}, step=step)
        assert restored["w"].unique().tolist() == [step]
    assert checkpoint.steps(tmp_path) == [0, 1, 2, 3, 4, 9]


def test_a_failed_background_save_is_raised_by_the_next(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    writer = checkpoint.Writer(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    failed = writer.save_async({}, 1)
    with pytest.raises(CheckpointError, match="No space left on device"):
        writer.save({}, 2)
    assert isinstance(failed.exception(), CheckpointError)
    monkeypatch.undo()
    writer.save({}, 3)
    assert checkpoint.steps(tmp_path) == [3]
    writer.close()


# --- foreign and hostile files ---


class Bomb:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["file", "step"])
def test_a_malicious_pickle_is_not_executed(tmp_path, legacy, place):
    canary = tmp_path / "canary"
    path = tmp_path / "evil.pt"
    torch.save({"w": Bomb(canary)}, path, _use_new_zipfile_serialization=not legacy)
    if place == "step":  # and somebody who can write to the directory can seal it
        reseal(tmp_path, path.read_bytes())
        path = tmp_path
    with pytest.raises(CheckpointError) as caught:
        value(path)
    assert not canary.exists()
    assert "weights_only" not in str(caught.value)
    expected = "no readable file of tensors" if (legacy, place) == (True, "file") else "something else than tensors"
    assert expected in str(caught.value)


def reseal(dir, content, **changes):
    """Put other bytes in a step's state, and make its manifest vouch for them."""
    from hashlib import sha256

    from holofunc.checkpoint.layout import sealed

    fill(dir, [1])
    step = dir / "step_00000001"
    (step / "state.pt").write_bytes(content)
    about = json.loads((step / "manifest.json").read_text())
    del about["sha256"]
    files = {"state.pt": [len(content), sha256(content).hexdigest()]}
    (step / "manifest.json").write_bytes(sealed({**about, "files": files, **changes}))


def test_a_tiny_file_that_claims_to_be_huge(tmp_path):
    torch.save({"w": torch.as_strided(torch.zeros(1), (2**40,), (0,))}, tmp_path / "bomb.pt")
    with pytest.raises(CheckpointError, match=r"float32 \(1099511627776,\) is stored, float32 \(2,\) expected"):
        value(tmp_path / "bomb.pt")


def test_file_names_in_a_manifest_are_not_followed(tmp_path):
    (tmp_path / "outside.pt").write_bytes(b"")
    reseal(tmp_path / "run", b"", files={"../../outside.pt": [0, ""]})
    with pytest.raises(CheckpointError, match=r"has no readable state.pt"):
        value(tmp_path / "run")


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>404</html>", b"PK\x05\x06" + bytes(18), b"PK\x03\x04junk"],
    ids=["empty", "html", "no entry", "torn"],
)
def test_a_file_that_is_none_of_ours(tmp_path, content):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights.pt"):
        value(path)


def test_a_flipped_bit_in_a_file_without_manifest(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"w": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data/0"))
        data = archive.read(name)
    content = bytearray(path.read_bytes())
    content[content.index(data)] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged at '.*data/0'"):
        value(path)


def test_a_writer_that_is_closed_writes_no_more(tmp_path):
    writer = checkpoint.Writer(tmp_path)
    writer.close()
    for save in (writer.save, writer.save_async):
        with pytest.raises(CheckpointError, match="is no longer this writer's, which was closed; open another Writer"):
            save({}, 1)
    writer.close()


def test_what_does_not_help_is_not_advised(tmp_path):
    checkpoint.save(tmp_path, {"w": torch.ones(2), "n": 3}, 1)
    advice = "restore with the model and optimizer it was saved with"
    for like, strict, more in (
        ({"w": torch.ones(2)}, True, ", or strict=False"),
        ({"w": torch.ones(3), "n": 3}, True, ""),
        ({"v": torch.ones(2)}, False, ""),
    ):
        with pytest.raises(CheckpointError, match=f"{advice}{more}$"):
            checkpoint.restore(tmp_path, like, strict=strict)
