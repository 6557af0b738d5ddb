"""What users of DDP, FSDP, Horovod and Accelerate report: programs like theirs, on two ranks, by the public contract."""

import pytest
import torch
from rank_checks import Checks, me, same
from torch import nn

from holofunc import distributed, lift, metrics, optim, random, tree

WORLD = 2
check = CHECKS = Checks()


def averaged(grads, tx=None, **extra):
    tx = tx or distributed.average_gradients()
    params = tree.map(torch.zeros_like, grads)
    return tx.update(grads, tx.init(params), params, **extra)[0]


# --- gradients ---------------------------------------------------------------------------------------------------


def half_used(params, x):
    """A branch by rank: one that some ranks take and others do not."""
    return (params["shared"] * x).sum() + (params["rare"] * x).sum() * (me() == 1) + 0 * params["shared"].sum()


@check
def a_parameter_that_no_rank_uses():
    params = {"used": torch.ones(2), "unused": torch.ones(3)}
    same(
        averaged(torch.func.grad(lambda p: p["used"].sum())(params)), {"used": torch.ones(2), "unused": torch.zeros(3)}
    )


@check
def a_parameter_that_one_rank_uses():
    params = {"shared": torch.ones(2), "rare": torch.ones(2)}
    found = averaged(torch.func.grad(half_used)(params, torch.ones(2)))
    same(found, {"shared": torch.ones(2), "rare": torch.full((2,), 0.5)})


@check
def parameters_in_another_order_on_each_rank():
    grads = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    found = averaged(dict(reversed(grads.items())) if me() else grads)
    assert list(found) == (["b", "a"] if me() else ["a", "b"])
    same(dict(sorted(found.items())), grads)


@check
def gradients_in_bf16_and_the_sum_in_fp32():
    grads = {"w": torch.tensor([256.0, 1.0]).bfloat16() if me() else torch.tensor([1.0, 256.0]).bfloat16()}
    found = averaged(grads)["w"]
    assert found.dtype == torch.bfloat16
    same(found, torch.full((2,), 128.5).bfloat16())


@check
def gradients_in_fp16_whose_sum_overflows():
    same(averaged({"w": torch.full((3,), 6e4).half()})["w"], torch.full((3,), 6e4).half())


@check
def dtypes_of_several_kinds_in_one_tree():
    grads = {
        n: torch.full((2,), 1.0 + me(), dtype=d)
        for n, d in {"a": torch.float64, "b": torch.bfloat16, "c": torch.float32}.items()
    }
    found = averaged(grads)
    assert [x.dtype for x in found.values()] == [x.dtype for x in grads.values()]
    assert all(float(x[0]) == 1.5 for x in found.values())


@check
def a_loss_with_an_axis():
    grads = {"w": torch.ones(2)}
    for tx in (distributed.average_gradients(), distributed.shard(optim.sgd(0.1))):
        with pytest.raises(ValueError, match=r"loss must be a number or a 0-d tensor, got shape \(1,\)"):
            averaged(grads, tx, loss=torch.ones(1))


@check
def a_schedule_that_goes_by_the_loss():
    """It sees the rank's own; an objective that returns the mean over ranks gives all the same, and the same gradient."""
    tx = optim.chain(distributed.average_gradients(), optim.sgd(1.0), optim.reduce_on_plateau(patience=0, factor=0.5))
    params = {"w": torch.zeros(1)}
    for together in (False, True):
        state = tx.init(params)
        for step in range(4):
            loss = torch.tensor(1.0 + step * (1 - 2 * me()) / (1 + me()))
            grads = {"w": torch.ones(1) * (1 + me())}
            loss = distributed.pmean(loss) if together else loss
            updates, state = tx.update(grads, state, params, loss=loss)
        found = distributed.all_gather(updates["w"])
        assert (found[0] == found[1]).item() is together


@check
def wrappers_that_compare_with_the_gradient_of_one_rank():
    for tx in (optim.chain(distributed.average_gradients(), optim.adam(0.1)), distributed.shard(optim.adam(0.1))):
        with pytest.raises(
            ValueError, match=r"write chain\(average_gradients\(\), cautious\(tx\)\) or shard\(cautious"
        ):
            optim.cautious(tx).init({"w": torch.ones(2)})
    inside = optim.chain(distributed.average_gradients(), optim.cautious(optim.adam(0.1)))
    averaged({"w": torch.tensor([1.0, -3.0 * me()])}, inside)


@check
def a_tree_without_a_leaf():
    assert averaged({}) == {}
    assert averaged({}, distributed.shard(optim.sgd(0.1))) == {}


@check
def a_loss_that_is_a_number():
    tx, grads = distributed.average_gradients(), {"w": torch.ones(2)}
    _, state = tx.update(grads, tx.init(grads), grads, loss=2.0 * me())
    assert state.loss.item() == 1.0


@check
def layouts_of_several_kinds():
    whole = torch.arange(120.0).reshape(2, 3, 4, 5)
    for x in (
        whole.mT,
        whole.to(memory_format=torch.channels_last),
        torch.ones(3, 1).expand(3, 4),
        torch.zeros(0, 3),
        torch.tensor(2.0),
    ):
        same(distributed.psum(x), 2 * x)
        same(averaged({"w": x})["w"], x.contiguous() if x.dtype == torch.float32 else x)


@check
def a_loss_that_is_a_mean_over_ranks_already():
    """As good as the rank's own: `pmean` hands each rank the mean of equal cotangents."""
    x = torch.tensor([1.0, 3.0])[me()]
    params = {"w": torch.tensor(2.0)}
    own = torch.func.grad(lambda p: (p["w"] * x) ** 2)(params)
    together = torch.func.grad(lambda p: distributed.pmean((p["w"] * x) ** 2))(params)
    same(averaged(together), averaged(own))
    same(averaged(own)["w"], torch.tensor(20.0))


@check
def a_loss_that_is_a_sum_over_ranks():
    params = {"w": torch.tensor(2.0)}
    found = torch.func.grad(lambda p: distributed.psum(p["w"] * (1.0 + me())))(params)
    same(averaged(found)["w"], torch.tensor(3.0))  # the mean of the ranks' parts of the sum's derivative, times ranks


@check
def parts_that_are_uneven():
    mine = torch.tensor([2.0, 4.0, 6.0]) if me() == 0 else torch.tensor([10.0])
    found = averaged({"w": mine.mean()}, weight=len(mine), loss=mine.mean())
    same(found["w"], torch.tensor(5.5))


@check
def a_rank_without_a_sample():
    """The mean of nothing is NaN, and counts for nothing."""
    mine = torch.tensor([2.0, 4.0]) if me() == 0 else torch.zeros(0)
    for tx in (distributed.average_gradients(), optim.chain(distributed.shard(optim.scale(1.0)))):
        found = averaged({"w": mine.mean(), "v": mine.mean()}, tx, weight=len(mine), loss=mine.mean())
        same(found, {"w": torch.tensor(3.0), "v": torch.tensor(3.0)})


@check
def no_rank_has_a_sample():
    found = averaged({"w": torch.ones(2)}, weight=0, loss=torch.tensor(0.0))
    same(found["w"], torch.zeros(2))


@check
def weights_that_are_large_and_broken_numbers():
    found = averaged({"w": torch.tensor(float(me()))}, weight=torch.tensor(1e6 + me()))
    same(found["w"], torch.tensor((1e6 + 1) / (2e6 + 1)), rtol=1e-6, atol=0)
    same(averaged({"w": torch.tensor(float(me()))}, weight=0.5)["w"], torch.tensor(0.5))


@check
def accumulation_without_a_collective_until_the_window_closes():
    tx = optim.multi_steps(optim.chain(distributed.average_gradients(), optim.sgd(1.0)), 3)
    params = {"w": torch.zeros(2)}
    state = tx.init(params)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for micro in range(3):
            size = 1 + micro + me()  # every micro-batch of every rank of another size
            grads = {"w": torch.full((2,), float(micro + 10 * me()))}
            updates, state = tx.update(grads, state, params, weight=torch.tensor(float(size)))
    ran = [e.count for e in profile.key_averages() if e.key.startswith("gloo:")]
    assert ran == [1]
    mean = sum(m * (1 + m) + (m + 10) * (2 + m) for m in range(3)) / sum(3 + 2 * m for m in range(3))
    same(updates["w"], torch.full((2,), -mean), rtol=1e-6, atol=1e-6)


@check
def clipping_before_and_after_the_average():
    grads = {"w": torch.tensor([3.0, 4.0]) * (1 + 2 * me())}  # norms 5 and 15, of the mean 10
    after = averaged(grads, optim.chain(distributed.average_gradients(), optim.clip_by_global_norm(1.0)))
    same(after["w"], torch.tensor([0.6, 0.8]), rtol=1e-6, atol=0)


@check
def frozen_parameters():
    tx = optim.chain(distributed.average_gradients(), optim.freeze({"w": True, "v": False}, optim.sgd(1.0)))
    same(
        averaged({"w": torch.ones(2) * me(), "v": torch.ones(2) * me()}, tx),
        {"w": torch.zeros(2), "v": torch.full((2,), -0.5)},
    )


@check
def a_group_of_one_and_a_group_of_all():
    alone = [torch.distributed.new_group([r]) for r in range(WORLD)][me()]
    everyone = torch.distributed.new_group([0, 1])
    grads = {"w": torch.tensor([float(me())])}
    same(averaged(grads, distributed.average_gradients(alone))["w"], grads["w"])
    same(averaged(grads, distributed.average_gradients(everyone))["w"], torch.tensor([0.5]))
    nested = distributed.psum(distributed.psum(grads["w"], alone), everyone)
    same(nested, torch.tensor([1.0]))


# --- collectives -------------------------------------------------------------------------------------------------


@check
def what_the_engine_cannot_send_is_told_and_the_run_goes_on():
    for op in (distributed.psum, distributed.all_gather, distributed.reduce_scatter):
        with pytest.raises(distributed.RankError, match="scalar type"):
            op(torch.ones(2, dtype=torch.int16))
    same(distributed.psum(torch.ones(7)), torch.full((7,), 2.0))


@check
def tensors_without_an_element():
    for shape in ((0,), (0, 3), (2, 0)):
        same(distributed.psum(torch.zeros(shape)), torch.zeros(shape))
        same(distributed.all_gather(torch.zeros(shape)), torch.zeros(2 * shape[0], *shape[1:]))
        same(distributed.reduce_scatter(torch.zeros(shape)), torch.zeros(shape[0] // 2, *shape[1:]))
    same(distributed.all_gather(torch.zeros(me(), 0), ragged=True), torch.zeros(1, 0))


@check
def gradients_of_complex_numbers():
    z = (torch.tensor([1.0 + 2j, 3.0 - 1j]) * (1 + me())).requires_grad_()
    (distributed.psum(z).abs() ** 2).sum().backward()
    same(z.grad, 2 * 2 * 3 * torch.tensor([1.0 + 2j, 3.0 - 1j]), rtol=1e-6, atol=0)


@check
def nothing_that_goes_in_is_changed():
    x = torch.arange(4.0) + me()
    before = x.clone()
    for op in (distributed.psum, distributed.pmean, distributed.all_gather, distributed.reduce_scatter):
        op(x)
        same(x, before)


@check
def whole_numbers_and_bytes():
    for dtype in (torch.int8, torch.uint8, torch.int32, torch.int64):
        found = distributed.psum(torch.tensor([3, 4], dtype=dtype))
        same(found, torch.tensor([6, 8], dtype=dtype))
    big = torch.tensor([2**53 + 1])
    same(distributed.psum(big), 2 * big)
    same(distributed.all_gather(torch.tensor([me() == 1])), torch.tensor([False, True]))
    same(distributed.pmean(torch.tensor(me())), torch.tensor(0.5))


@check
def truth_values_and_complex_numbers():
    same(distributed.psum(torch.tensor([me() == 1, True])), torch.tensor([True, True]))
    same(distributed.psum(torch.tensor([1 + 2j])), torch.tensor([2 + 4j]))


@check
def a_tree_in_place_of_a_tensor():
    for op in (distributed.psum, distributed.pmean, distributed.all_gather, distributed.reduce_scatter):
        with pytest.raises(TypeError, match=r"x must be a tensor, got dict: take tree.map for the tensors of a tree"):
            op({"w": torch.ones(2)})


@check
def jacobians_and_hessians():
    x = torch.tensor([1.0, 2.0])

    def total(x):
        return distributed.psum((x**3).sum())  # of two ranks with the same x

    same(torch.func.jacrev(total)(x), 2 * 3 * x**2)
    same(torch.func.jacfwd(total)(x), 2 * 3 * x**2)
    same(torch.func.hessian(total)(x), 2 * torch.diag(6 * x), rtol=1e-6, atol=0)


@check
def vmap_of_vmap_and_of_what_is_not_mapped():
    x = torch.arange(24.0).reshape(2, 3, 4)
    for op in (distributed.psum, distributed.pmean):
        same(torch.vmap(torch.vmap(op))(x), op(x))
        same(torch.vmap(lambda y, op=op: op(x[0, 0]) + y)(x[0]), op(x[0, 0]) + x[0])
    same(torch.vmap(torch.vmap(distributed.all_gather))(x), torch.cat([x, x], dim=2))
    same(torch.vmap(torch.func.grad(lambda y: distributed.psum(y**2).sum()))(x[0]), 4 * x[0])


@check
def jvp_of_psum_with_another_tangent_on_each_rank():
    value, tangent = torch.func.jvp(distributed.psum, (torch.ones(2),), (torch.full((2,), 1.0 + me()),))
    same((value, tangent), (torch.full((2,), 2.0), torch.full((2,), 3.0)))


@check
def recomputed_in_the_backward_pass():
    def block(x):
        return distributed.psum(x.sin())

    x = torch.tensor([0.5], requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
    y.sum().backward()
    same(x.grad, 2 * torch.tensor([0.5]).cos())


@check
def modes_of_autograd():
    x = torch.ones(2)
    with torch.inference_mode():
        same(distributed.psum(x), 2 * x)
    with torch.no_grad():
        assert not distributed.psum(x.clone().requires_grad_()).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert distributed.psum(x).dtype == torch.float32


@check
def rows_of_any_number():
    for rows in ((0, 3), (3, 0), (0, 0), (2, 2)):
        mine = torch.full((rows[me()], 2), float(me()))
        found = distributed.all_gather(mine, ragged=True)
        same(found, torch.cat([torch.full((n, 2), float(r)) for r, n in enumerate(rows)]))
    grad = torch.func.grad(lambda x: (distributed.all_gather(x, ragged=True) ** 2).sum())
    same(grad(torch.ones(1 + me(), 2)), torch.full((1 + me(), 2), 4.0))
    several = torch.vmap(lambda x: distributed.all_gather(x, ragged=True))(torch.ones(5, 1 + me(), 2))
    same(several, torch.ones(5, 3, 2))


@check
def a_metric_over_ranks_of_which_one_saw_nothing():
    mean = metrics.mean()
    state = mean.update(mean.init(), torch.tensor([1.0, 4.0])) if me() == 0 else mean.init()
    assert mean.compute(distributed.fold(mean.merge, state)).item() == 2.5


@check
def buffers_of_whole_numbers():
    """The recipe of the page: means of what is floating, counters as they are."""
    buffers = {"mean": torch.tensor([float(me())]), "count": torch.tensor(7)}
    found = tree.map(lambda b: distributed.pmean(b) if b.is_floating_point() else b, buffers)
    same(found, {"mean": torch.tensor([0.5]), "count": torch.tensor(7)})


# --- layers ------------------------------------------------------------------------------------------------------


@check
def batch_norm_of_one_sample_per_rank():
    model = distributed.sync_batch_norm(lift(nn.BatchNorm1d, 3))
    params, buffers = model.init(random.key(0))
    rows = torch.tensor([[1.0, 2.0, 3.0], [3.0, 6.0, 9.0]])
    y, new = model.apply(params, buffers, rows[me()][None], train=True)
    expected, wanted = lift(nn.BatchNorm1d, 3).apply(params, buffers, rows, train=True)
    same(y[0], expected[me()], rtol=1e-5, atol=1e-6)
    same(new, wanted, rtol=1e-5, atol=1e-6)


@check
def batch_norm_where_a_rank_has_no_sample():
    model = distributed.sync_batch_norm(lift(nn.BatchNorm1d, 3))
    params, buffers = model.init(random.key(0))
    rows = torch.tensor([[1.0, 2.0, 3.0], [3.0, 6.0, 9.0]])
    y, new = model.apply(params, buffers, rows if me() == 0 else rows[:0], train=True)
    expected, wanted = lift(nn.BatchNorm1d, 3).apply(params, buffers, rows, train=True)
    same(y, expected if me() == 0 else expected[:0], rtol=1e-5, atol=1e-6)
    same(new, wanted, rtol=1e-5, atol=1e-6)


@check
def batch_norm_of_one_sample_in_all():
    model = distributed.sync_batch_norm(lift(nn.BatchNorm1d, 3))
    params, buffers = model.init(random.key(0))
    _, new = model.apply(params, buffers, torch.ones(1 - me(), 3), train=True)
    assert tree.all_finite(new)


@check
def batch_norm_in_eval_mode_is_local():
    model = distributed.sync_batch_norm(lift(nn.BatchNorm2d, 3))
    params, buffers = model.init(random.key(0))
    for _ in range(1 + me()):  # as often as one likes
        model.apply(params, buffers, torch.ones(2, 3, 4, 4), train=False)


@check
def batch_norm_of_all_kinds():
    x = torch.arange(4 * 3 * 2 * 2.0).reshape(4, 3, 2, 2).sin()
    mine = slice(2 * me(), 2 * me() + 2)
    kinds = {
        "untracked": (lambda: nn.BatchNorm2d(3, track_running_stats=False), x),
        "cumulative": (lambda: nn.BatchNorm2d(3, momentum=None), x),
        "plain": (lambda: nn.BatchNorm2d(3, affine=False), x),
        "volumes": (lambda: nn.BatchNorm3d(3), x[:, :, None]),
        "sequences": (lambda: nn.BatchNorm1d(3), x.flatten(2)),
        "float64": (lambda: nn.BatchNorm2d(3).double(), x.double()),
        "channels last": (lambda: nn.BatchNorm2d(3), x.to(memory_format=torch.channels_last)),
        "far from zero": (lambda: nn.BatchNorm2d(3), x + 1e3),
    }
    for build, values in kinds.values():
        model = lift(build)
        params, buffers = model.init(random.key(0))
        for _ in range(2):
            y, new = distributed.sync_batch_norm(model).apply(params, buffers, values[mine], train=True)
            expected, buffers = model.apply(params, buffers, values, train=True)
            same(y, expected[mine], rtol=2e-3, atol=2e-3 if values.max() > 1e2 else 1e-5)
            same(new, buffers, rtol=1e-4, atol=1e-5)


@check
def batch_norm_of_another_number_of_axes():
    model = distributed.sync_batch_norm(lift(nn.BatchNorm2d, 3))
    with pytest.raises(ValueError, match="expected 4D input"):
        model.apply(*model.init(random.key(0)), torch.ones(4, 3), train=True)


class Frozen(nn.Module):
    """Layers that stay in eval mode."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(3), nn.Dropout(0.9)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval(), self.drop.eval()
        return self

    def forward(self, x):
        return self.drop(self.norm(x))


@check
def layers_that_stay_in_eval_mode():
    model = lift(Frozen)
    params, buffers = model.init(random.key(0))
    x = torch.arange(6.0).reshape(2, 3) + me()
    synced = distributed.sync_dropout(distributed.sync_batch_norm(model))
    same(synced.apply(params, buffers, x, train=True, key=random.key(1)), model.apply(params, buffers, x))


@check
def dropout_that_drops_nothing_and_all():
    for p, expected in ((0.0, 1.0), (1.0, 0.0)):
        model = distributed.sync_dropout(lift(nn.Dropout, p))
        same(model.apply({}, {}, torch.ones(3, 2), train=True, key=random.key(0))[0], torch.full((3, 2), expected))


# --- all of them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(ranks, name):
    for rank, failed in enumerate(ranks):
        assert name not in failed, f"on rank {rank}:\n{failed[name]}"
