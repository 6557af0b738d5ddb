"""What users report of runs, shares and checkpoints on several ranks: programs like theirs, by the public contract."""

import copy
import signal

import pytest
import torch
from rank_checks import Checks, me, same
from torch import nn

from holofunc import checkpoint, data, distributed, lift, losses, metrics, optim, random, train, tree

check = CHECKS = Checks()


# --- steps, runs and checkpoints ---------------------------------------------------------------------------------


def a_run(samples, batch_size, tx, epochs=2, compiled=False, **options):
    images, labels = data.digits("train")
    batches = data.Batches((images[:samples], labels[:samples]), batch_size, key=random.key(0), **options)
    model = lift(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx)
    parts = batches.shard(me(), distributed.world_size())
    return train.fit(step, train.create_state(model, tx, random.key(1)), parts, epochs=epochs, compile=compiled)


@check
def a_last_batch_that_is_uneven():
    tx = optim.chain(distributed.average_gradients(), optim.sgd(0.1))
    state = a_run(19, 8, tx).state  # 8, 8 and 3
    both = distributed.all_gather(state.params["1.weight"][None])
    same(both[0], both[1])
    assert int(state.step) == 6


@check
def batches_smaller_than_the_ranks():
    with pytest.raises(ValueError, match="batches must have a sample for each of 2 ranks, got one of 1: use drop_last"):
        a_run(17, 8, optim.sgd(0.1))
    assert int(a_run(17, 8, optim.sgd(0.1), drop_last=True).state.step) == 4


@check
def windows_that_are_closed_by_the_end():
    tx = optim.multi_steps(optim.chain(distributed.average_gradients(), optim.sgd(0.1)), 2)
    params = a_run(43, 16, tx, epochs=1).state.params  # batches of 16, 16 and 11
    both = distributed.all_gather(params["1.weight"][None])
    same(both[0], both[1])


@check
def an_evaluation_without_data_on_any_rank():
    model = lift(nn.Linear, 3, 2)
    state = train.create_state(model, optim.sgd(0.1), random.key(0))
    with pytest.raises(ValueError, match="data must hold a batch on some rank, got none"):
        train.evaluate(train.make_eval_step(model, {"accuracy": metrics.accuracy()}), state, [])


@check
def rank_zero_saves_while_others_wait(folder):
    state = {"w": torch.arange(3.0)}
    if distributed.is_rank_zero():
        checkpoint.save(folder / "rank zero", state, 1)
    distributed.psum(torch.zeros(()))  # the others wait here
    same(checkpoint.restore(folder / "rank zero", tree.map(torch.zeros_like, state)), state)


@check
def a_step_that_is_there_already_is_an_error_on_all_ranks(folder):
    distributed.save_sharded(folder / "twice", {"w": torch.ones(2)}, 1)
    with pytest.raises(checkpoint.CheckpointError, match="exists already"):
        distributed.save_sharded(folder / "twice", {"w": torch.ones(2)}, 1)


@check
def leaves_of_one_rank_and_of_all(folder):
    mine = {
        "all": torch.ones(2),
        f"only {me()}": torch.full((1 + me(),), float(me())),
        "half": torch.ones(2).bfloat16(),
    }
    distributed.save_sharded(folder / "some", mine, 1)
    same(distributed.restore_sharded(folder / "some", tree.map(torch.zeros_like, mine)), mine)


@check
def a_damaged_step_is_an_error_on_all_ranks(folder):
    path = distributed.save_sharded(folder / "damaged", {"w": torch.ones(2)}, 1)
    if distributed.is_rank_zero():
        (path / ".metadata").write_bytes(b"no pickle")
    distributed.psum(torch.zeros(()))
    with pytest.raises(checkpoint.CheckpointError, match=r"damaged or missing \.metadata"):
        distributed.restore_sharded(folder / "damaged", {"w": torch.ones(2)})


@check
def a_disk_that_is_full_on_one_rank(folder):
    resource = pytest.importorskip("resource")
    mine, old = {f"only {me()}": torch.ones(10_000)}, resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if me() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    with pytest.raises(checkpoint.CheckpointError, match="cannot be written on rank 1: "):
        distributed.save_sharded(folder / "full", mine, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert checkpoint.steps(folder / "full") == []
    distributed.save_sharded(folder / "full", mine, 1)
    same(distributed.restore_sharded(folder / "full", tree.map(torch.zeros_like, mine)), mine)


@check
def trees_that_cannot_be_saved(folder):
    for value, kind, text in (
        ({"a/b": torch.ones(1), "a": {"b": torch.ones(1)}}, ValueError, "two leaves have the path 'a/b'"),
        ({"w": torch.ones(2 + me())}, ValueError, "leaf 'w' must be of one shape and dtype on all ranks that have it"),
        (
            {"w": torch.ones(2, device="meta")},
            TypeError,
            r"leaf 'w' must be a tensor, got one without data \(device meta\)",
        ),
    ):
        with pytest.raises(kind, match=text):
            distributed.save_sharded(folder / "never", value, 1)
    for options, kind in (({"step": True}, ValueError), ({"step": 1, "metadata": {"f": print}}, TypeError)):
        with pytest.raises(kind):
            distributed.save_sharded(folder / "never", {"w": torch.ones(2)}, **options)
    assert checkpoint.steps(folder / "never") == []


@check
def leaves_of_all_kinds(folder):
    values = {
        "key": random.key(3), "number": torch.tensor(3), "flag": torch.tensor(True), "none": torch.zeros(0, 3),
        "part": torch.arange(1e6)[:5], "turned": torch.arange(6.0).reshape(2, 3).T, "half": torch.ones(2).bfloat16(),
        "complex": torch.tensor([1 + 2j]), "repeated": torch.ones(1).expand(4), "a name/.x é": torch.ones(1),
    }  # fmt: skip
    path = distributed.save_sharded(folder / "kinds", values, 1)
    same(distributed.restore_sharded(folder / "kinds", tree.map(torch.zeros_like, values)), values)
    like = tree.map(lambda x: torch.empty(x.shape, dtype=x.dtype, device="meta"), values)
    same(distributed.restore_sharded(folder / "kinds", like), values)
    assert sum(file.stat().st_size for file in path.iterdir()) < 100_000


@check
def what_was_not_saved_sharded(folder):
    if distributed.is_rank_zero():
        checkpoint.save(folder / "whole", {"w": torch.ones(2)}, 1)
    distributed.psum(torch.zeros(()))
    with pytest.raises(checkpoint.CheckpointError, match="is a step of one process; read it by"):
        distributed.restore_sharded(folder / "whole", {"w": torch.ones(2)})
    with pytest.raises(checkpoint.CheckpointError, match="holds no step 'latest'; check the path"):
        distributed.restore_sharded(folder / "nowhere", {"w": torch.ones(2)})


@check
def values_that_differ_are_named():
    assert distributed.fingerprint({"lr": 0.1}) == distributed.fingerprint({"lr": 0.1})
    with pytest.raises(distributed.RankError, match=r"rank 1: has w: float32 \(2,\)"):
        distributed.fingerprint({"w": torch.full((2,), float(me()))}, values=True)


@check
def functions_and_objects_in_a_fingerprint():
    """Where they lie in the memory of a rank is no difference."""
    distributed.fingerprint(
        {"loss": losses.cross_entropy, "model": nn.ReLU(), "object": object(), "rate": float("nan")}
    )


@check
def states_are_data(folder):
    """They can be copied, and saved, as any other."""
    tx = distributed.shard(optim.adam(0.1))
    state = tx.init({"w": torch.ones(2), "v": torch.ones(2)})
    same(tree.leaves(copy.deepcopy(state)), tree.leaves(state))


@check
def shares_of_fewer_leaves_than_ranks():
    tx, params = distributed.shard(optim.adam(1.0)), {"w": torch.ones(3)}
    updates, _ = tx.update({"w": torch.ones(3) * (1 + me())}, tx.init(params), params)
    same(updates["w"], torch.full((3,), -1.0), rtol=1e-5, atol=0)


@check
def shares_of_parameters_in_another_order():
    """The state keeps its structure, and updates are as wide as those of one process."""
    params = {name: torch.ones(3, 1 + i, dtype=[torch.float32, torch.bfloat16][i % 2]) for i, name in enumerate("dbca")}
    plain = optim.adam(0.1)
    tx, grads = distributed.shard(plain), tree.map(torch.ones_like, params)
    state = tx.init(params)
    updates, new = tx.update(grads, state, params)
    assert tree.paths(state) == tree.paths(new)
    same(updates, plain.update(grads, plain.init(params), params)[0], rtol=1e-6, atol=0)


@check
def parameters_that_are_no_flat_dict():
    for params in ({"a": {"w": torch.ones(2)}}, [torch.ones(2)]):
        with pytest.raises(TypeError, match="params must be a flat dict of tensors"):
            distributed.shard(optim.sgd(0.1)).init(params)


@check
def gathered_by_shapes_alone():
    params = {"w": torch.ones(3), "v": torch.full((2,), 2.0).bfloat16()}
    like = tree.map(lambda x: torch.empty(x.shape, dtype=x.dtype, device="meta"), params)
    same(distributed.gather(distributed.share(params), like), params)


@check
def joining_twice():
    assert distributed.init() == torch.device("cpu")


# --- all of them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(ranks, name):
    for rank, failed in enumerate(ranks):
        assert name not in failed, f"on rank {rank}:\n{failed[name]}"
