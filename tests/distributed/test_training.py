"""Ranks that train together: the same losses and parameters as one process with the whole batch, at the stated cost."""

import pytest
import torch
from torch import nn

from holofunc import data, distributed, jit, lift, losses, metrics, optim, random, train, tree

chain, average, shard = optim.chain, distributed.average_gradients, distributed.shard
STEPS = 30

WRAPPED = {
    "sgd": lambda: chain(average(), optim.sgd(0.1, momentum=0.9)),
    "clip": lambda: chain(average(), optim.clip_by_global_norm(0.5), optim.adamw(1e-2)),
    "multi_steps": lambda: optim.multi_steps(chain(average(), optim.sgd(0.2)), 2),
    "apply_if_finite": lambda: optim.apply_if_finite(chain(average(), optim.adam(1e-2))),
    "ema": lambda: optim.ema_params(chain(average(), optim.sgd(0.1)), 0.9),
    "sam": lambda: chain(average(), optim.sam(chain(average(), optim.sgd(0.1)))),
    "shard": lambda: shard(optim.adam(1e-2)),
    "shard, clipped": lambda: chain(average(), optim.clip_by_global_norm(0.5), shard(optim.adam(1e-2), averaged=True)),
    "shard in multi_steps": lambda: optim.multi_steps(shard(optim.sgd(0.2, momentum=0.9)), 2),
    "shard of matrices": lambda: shard(optim.muon(1e-2)),
}
RARELY = {"sgd", "sam", "apply_if_finite", "ema", "shard, clipped", "shard in multi_steps", "shard of matrices"}
SOME = [pytest.param(name, marks=pytest.mark.slow) if name in RARELY else name for name in WRAPPED]


def network():
    convolution = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2)
    return nn.Sequential(*convolution, nn.Flatten(), nn.Linear(4 * 36, 10))


def digits(samples):
    images, labels = data.digits("train")
    return images[:samples], labels[:samples]


def batches(samples, **options):
    whole = data.Batches(digits(samples), 16, key=random.key(0), **options)
    return whole.shard(distributed.rank(), distributed.world_size())


def trained(tx, samples=64, steps=STEPS, compiled=False):
    """The losses of all ranks together, and the state in the end."""
    model = distributed.sync_dropout(distributed.sync_batch_norm(lift(network)))
    state = train.create_state(model, tx, random.key(1))
    step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx)
    step = jit(step) if compiled else step
    seen, parts = [], batches(samples)
    while len(seen) < steps:
        for batch in parts.epoch(len(seen) // len(parts), len(seen) % len(parts)):
            state, measured = step(state, batch)
            weight = torch.tensor(float(len(batch[1])))
            seen.append(float(distributed.psum(weight * measured["loss"]) / distributed.psum(weight)))
            if len(seen) == steps:
                break
    return seen, state


def facts(name, **options):
    seen, state = trained(WRAPPED[name](), **options)
    return seen, state.params, state.buffers, optim.eval_params(state.opt_state, state.params)


def assert_same(found, expected, atol=2e-6):
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), atol=atol, rtol=0)
    for got, wanted in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(got, wanted, atol=2 * atol, rtol=2e-5)


@pytest.mark.parametrize("name", SOME)
def test_two_ranks_are_one_process(name):
    first, second = distributed.launch(lambda: facts(name), 2)
    assert first[0] == second[0]
    for a, b in zip(tree.leaves(first[1:]), tree.leaves(second[1:]), strict=True):
        assert torch.equal(a, b)
    assert_same(first, facts(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPED)
def test_four_ranks_are_one_process(name):
    for rank in distributed.launch(lambda: facts(name), 4):
        assert_same(rank, facts(name))


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_uneven_parts_count_by_their_samples(world):
    """69 samples in batches of 16: the last one has 5. Dropout would draw otherwise there, so there is none."""

    def work():
        model = distributed.sync_batch_norm(
            lift(lambda: nn.Sequential(*[m for m in network() if type(m) is not nn.Dropout]))
        )
        tx = chain(average(), optim.sgd(0.1, momentum=0.9))
        step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx)
        state = train.create_state(model, tx, random.key(1))
        mean = []
        for epoch in range(3):
            for batch in batches(69).epoch(epoch):
                state, _ = step(state, batch)
                mean.append(float(tree.get(state.opt_state, "AverageGradientsState").loss))
        return mean, state.params, state.buffers

    for rank in distributed.launch(work, world):
        assert_same(rank, work())


def test_steps_report_the_loss_and_the_norm_of_all_ranks_together():
    """But with windows of several calls: there they are the rank's own."""

    def work():
        model = lift(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
        objective, found = train.supervised(model, losses.cross_entropy), {}
        for name in ("clip", "shard", "multi_steps"):
            tx = WRAPPED[name]()
            state, step = train.create_state(model, tx, random.key(1)), train.make_train_step(objective, tx)
            found[name] = []
            for batch in batches(69).epoch(0):
                state, measured = step(state, batch)
                found[name].append([measured["loss"].item(), measured["grad_norm"].item()])
        return found

    alone = work()
    first, second = distributed.launch(work, 2)
    for name in ("clip", "shard"):
        assert first[name] == second[name]
        torch.testing.assert_close(torch.tensor(first[name]), torch.tensor(alone[name]), rtol=1e-5, atol=1e-6)
    assert all(a != b for a, b in zip(first["multi_steps"][:-1], second["multi_steps"][:-1], strict=True))


def test_a_window_that_ranks_would_close_apart_is_refused():
    def work():
        model = lift(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
        tx = optim.apply_if_finite(optim.multi_steps(chain(average(), optim.sgd(0.1)), 2))
        step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx)
        step(train.create_state(model, tx, random.key(1)), next(iter(batches(16))))

    work()  # in one process there is nothing to refuse
    with pytest.raises(
        distributed.RankError, match=r"ValueError: apply_if_finite around multi_steps .*: write multi_s"
    ):
        distributed.launch(work, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "multi_steps", "shard"])
def test_compiled_two_ranks_are_one_process(name):
    for rank in distributed.launch(lambda: facts(name, compiled=True), 2):
        assert_same(rank, facts(name))


# --- what it costs -----------------------------------------------------------------------------------------------


def collectives(fn):
    """The collectives that ran, by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fn()
    return {e.key.removeprefix("gloo:"): e.count for e in profile.key_averages() if e.key.startswith("gloo:")}


def test_one_collective_per_update():
    def work():
        params = {"w": torch.ones(3, 2), "v": torch.ones(4)}
        grads = tree.map(torch.ones_like, params)

        def updates(tx, times):
            state = tx.init(params)
            for _ in range(times):
                _, state = tx.update(grads, state, params, weight=torch.tensor(2.0), loss=torch.tensor(1.0))

        return {
            "average": collectives(lambda: updates(WRAPPED["clip"](), 4)),
            "window": collectives(lambda: updates(WRAPPED["multi_steps"](), 4)),
            "shard": collectives(lambda: updates(shard(optim.adam(1e-2)), 4)),
            "shard in a window": collectives(lambda: updates(WRAPPED["shard in multi_steps"](), 4)),
        }

    for found in distributed.launch(work, 2):
        assert {name: sum(counts.values()) for name, counts in found.items()} == {
            "average": 4,
            "window": 2,
            "shard": 8,
            "shard in a window": 4,
        }


def test_a_share_of_the_optimizer_state():
    def work():
        params = {f"layer{i}": torch.ones(8, 8) for i in range(4)}
        return tree.size(shard(optim.adam(0.1)).init(params).inner["adam"].mu)

    assert distributed.launch(work, 2) == [2 * 64] * 2


@pytest.mark.parametrize(
    ("tx", "what"),
    [
        (chain(optim.clip_by_global_norm(1.0), optim.sgd(0.1)), "what looks at all parameters, as clip_by_global_norm"),
        (optim.prodigy(), "what looks at all parameters"),
        (optim.apply_if_finite(optim.sgd(0.1)), r"apply_if_finite, .* write apply_if_finite\(shard\(tx\)\)"),
        (optim.ema_params(optim.sgd(0.1), 0.9), "lookahead, ema_params and the like, whose weights are whole"),
        (optim.sam(optim.sgd(0.1)), r"sam, .* write sam\(shard\(tx\)\)"),
    ],
    ids=["clip", "prodigy", "finite", "ema", "sam"],
)
def test_shard_refuses_what_looks_beyond_a_share(tx, what):
    with pytest.raises(ValueError, match=f"shard cannot wrap {what}"):
        shard(tx).init({"w": torch.ones(3, 3), "v": torch.ones(2)})


# --- one rank goes wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["gradient", "loss", "buffers"])
@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("averaging", ["average", "shard"])
def test_all_ranks_refuse_what_is_not_finite_on_one(where, outside, averaging):
    if averaging == "shard" and not outside:
        pytest.skip("shard refuses to stand around apply_if_finite")

    def work():
        inner = optim.sgd(1.0)
        if averaging == "shard":
            tx = optim.apply_if_finite(shard(inner))
        else:
            tx = (
                optim.apply_if_finite(chain(average(), inner))
                if outside
                else chain(average(), optim.apply_if_finite(inner))
            )
        bad = float("nan") if distributed.rank() == 1 else 1.0
        values = {name: torch.tensor([bad if name == where else 1.0]) for name in ("gradient", "loss", "buffers")}
        params = {"w": torch.zeros(1), "v": torch.zeros(2)}
        grads = {"w": values["gradient"], "v": torch.ones(2)}
        extra = {"loss": values["loss"][0], "buffers": {"b": values["buffers"]}}
        updates, state = tx.update(grads, tx.init(params), params, **extra)
        return bool(optim.skipped(state)), [u.abs().max().item() for u in updates.values()]

    assert distributed.launch(work, 2) == [(True, [0.0, 0.0])] * 2


# --- data and evaluation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("samples", [64, 82, 69])
def test_ranks_see_what_one_process_sees(world, samples):
    whole = data.Batches(digits(samples), 16, key=random.key(3))
    parts = [whole.shard(rank, world, uneven=True) for rank in range(world)]
    for epoch in range(2):
        joined = zip(*[p.epoch(epoch) for p in parts], strict=False)
        for (images, labels), shares in zip(whole.epoch(epoch), joined, strict=False):
            assert torch.equal(torch.cat([s[0] for s in shares]), images[: sum(len(s[1]) for s in shares)])
            assert torch.equal(torch.cat([s[1] for s in shares]), labels[: sum(len(s[1]) for s in shares)])
    assert sum(len(labels) for p in parts for _, labels in p) == samples


def test_draws_for_a_sample_are_those_of_one_process():
    noisy = lambda image, key: image + random.uniform(key, image.shape)  # noqa: E731
    whole = data.Batches(digits(32), 16, key=random.key(3), augment=noisy)
    parts = [list(whole.shard(rank, 2)) for rank in range(2)]
    for (images, _), *shares in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([s[0] for s in shares]), images)


def test_shards_that_cannot_be():
    whole = data.Batches(digits(18), 16)
    with pytest.raises(ValueError, match="batches must have a sample for each of 4 ranks, got one of 2: use drop_last"):
        whole.shard(0, 4)
    with pytest.raises(ValueError, match=r"rank must be an integer in \[0, 2\), got 2"):
        whole.shard(2, 2)
    with pytest.raises(ValueError, match="world must be an integer of at least 1, got 0"):
        whole.shard(0, 0)
    with pytest.raises(ValueError, match="batches must be those of all ranks, got the part of rank 1 of 2"):
        whole.shard(1, 2).shard(0, 2)
    assert [len(whole.shard(rank, 4, uneven=True)) for rank in range(4)] == [2, 1, 2, 1]


@pytest.mark.parametrize("samples", [82, 3])
def test_evaluation_is_exact_for_any_sizes(samples):
    def work():
        model, tx = lift(network), optim.sgd(0.1)
        state = train.create_state(model, tx, random.key(1))
        measures = {"accuracy": metrics.accuracy(), "confusion": metrics.confusion(10)}
        step = train.make_eval_step(model, measures, loss=losses.cross_entropy)
        whole = data.Batches(digits(samples), 16)
        found = train.evaluate(step, state, whole.shard(distributed.rank(), distributed.world_size(), uneven=True))
        return found["accuracy"], found["confusion"].tolist(), found["loss"]

    accuracy, confusion, loss = work()
    for rank in distributed.launch(work, 4):
        assert rank[:2] == (accuracy, confusion)
        assert rank[2] == pytest.approx(loss, rel=1e-6)


# --- layers ------------------------------------------------------------------------------------------------------


def test_batch_norm_of_uneven_parts():
    """Values, gradients and running statistics of 7 rows on ranks with 5 and 2."""
    rows, target = torch.arange(28.0).reshape(7, 4).sin(), torch.arange(28.0).reshape(7, 4).cos()

    def work():
        mine = {(2, 0): slice(0, 5), (2, 1): slice(5, 7)}.get(
            (distributed.world_size(), distributed.rank()), slice(None)
        )
        model = distributed.sync_batch_norm(lift(nn.BatchNorm1d, 4))
        params, buffers = model.init(random.key(0))

        def loss(params, x):
            y, new = model.apply(params, buffers, x, train=True)
            return ((y - target[mine]) ** 2).mean(), (y, new)

        (grads, by_rows), (_, (y, new)) = torch.func.grad_and_value(loss, argnums=(0, 1), has_aux=True)(
            params, rows[mine]
        )
        tx, weight = average(), torch.tensor(float(len(y)))
        averaged, _ = tx.update(grads, tx.init(params), params, weight=weight)
        scaled = by_rows * weight / 7  # of the mean over all rows
        ragged = [distributed.all_gather(x.detach(), ragged=True) for x in (y, scaled)]
        return averaged, new, *ragged

    alone = work()
    for rank in distributed.launch(work, 2):
        torch.testing.assert_close(rank, alone, atol=1e-6, rtol=1e-5)


def test_synced_layers_are_the_old_ones_but_in_train_mode():
    model = lift(network)
    synced = distributed.sync_dropout(distributed.sync_batch_norm(model))
    params, buffers = model.init(random.key(0))
    assert list(synced.init(random.key(0))[0]) == list(params)
    x, key = digits(8)[0].float(), random.key(5)
    for options in ({}, {"train": True, "key": key}):
        for got, wanted in zip(
            synced.apply(params, buffers, x, **options), model.apply(params, buffers, x, **options), strict=True
        ):
            torch.testing.assert_close(got, wanted)
    assert isinstance(synced.to_module(params, buffers)[1], nn.BatchNorm2d)

    class Mine(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match="'0' must be a BatchNorm of torch, got Mine"):
        distributed.sync_batch_norm(lift(lambda: nn.Sequential(Mine(3))))


# --- through the parallel step -----------------------------------------------------------------------------------


def test_hessian_products_and_norms_per_sample_of_all_ranks():
    images, labels = digits(16)

    def work():
        mine = (
            slice(None) if distributed.world_size() == 1 else slice(8 * distributed.rank(), 8 * distributed.rank() + 8)
        )
        model = lift(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
        params, buffers = model.init(random.key(0))
        x, y = images[mine].float() / 16, labels[mine]

        def loss(params, x, y):
            return losses.cross_entropy(model.apply(params, buffers, x)[0], y)

        direction = tree.map(torch.ones_like, params)
        mean = lambda p: distributed.pmean(loss(p, x, y))  # noqa: E731
        product = torch.func.vjp(torch.func.grad(mean), params)[1](direction)[0]
        norm = lambda x, y: tree.global_norm(torch.func.grad(loss)(params, x[None], y[None]))  # noqa: E731
        return product, distributed.all_gather(torch.vmap(norm)(x, y))

    alone = work()
    for rank in distributed.launch(work, 2):
        torch.testing.assert_close(rank, alone, atol=1e-6, rtol=1e-5)


def test_population_of_parallel_steps():
    def work():
        tx, params = chain(average(), optim.sgd(1.0)), {"w": torch.zeros(3, 2)}
        grads = {"w": torch.arange(6.0).reshape(3, 2) * (1 + 2 * distributed.rank())}
        states = tree.stack([tx.init({"w": torch.zeros(2)})] * 3)
        return torch.vmap(lambda g, s, p: tx.update(g, s, p)[0])(grads, states, params)["w"]

    for rank in distributed.launch(work, 2):
        assert torch.equal(rank, -2 * torch.arange(6.0).reshape(3, 2))


def test_parameters_in_shares():
    """ZeRO 3: every rank keeps a share of the parameters, and of the optimizer's state."""

    def work():
        model = lift(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)))
        objective, tx = train.supervised(model, losses.cross_entropy), optim.adam(1e-2)
        whole, buffers = model.init(random.key(1))
        own = distributed.share(whole)
        step = train.make_train_step(lambda params, *rest: objective(distributed.gather(params, whole), *rest), tx)
        state = train.TrainState(torch.tensor(0), own, buffers, tx.init(own), random.key(0))
        for epoch in range(3):
            for batch in batches(64).epoch(epoch):
                state, _ = step(state, batch)
        return distributed.gather(state.params, whole), len(own)

    alone, count = work()
    ranks = distributed.launch(work, 2)
    assert sum(own for _, own in ranks) == count == 4
    for params, _ in ranks:
        torch.testing.assert_close(params, alone, atol=1e-5, rtol=1e-5)
