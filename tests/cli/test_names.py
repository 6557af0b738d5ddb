"""Optimizers, schedules, losses, metrics and augmentations by name, and what is made of them."""

import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from holofunc import distributed, losses, metrics, optim, random
from holofunc.cli import job, optimizers, training
from holofunc.cli.task import LOSSES
from holofunc.config import Config
from holofunc.metrics.registry import METRICS
from holofunc.optim import schedules

DIGITS = Config(data="digits", model="smallnet", device="cpu", model_options={"widths": [4, 8]})


def digits(**options):
    return job.open_data(replace(DIGITS, **options), "train")


@pytest.mark.parametrize("name", sorted(optimizers.optimizers()))
def test_every_optimizer_can_be_asked_for(name):
    settings = Config(optimizer=name, schedule="constant" if name == "rprop" else "warmup_cosine", clip=1.0)
    tx = optimizers.optimizer(settings, 10)
    params = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    updates, _ = tx.update(params, tx.init(params), params, loss=torch.ones(()), grad_fn=lambda p: p)
    assert list(updates) == list(params)
    assert all(bool(x.isfinite().all()) for x in updates.values())


def test_only_gradients_are_averaged_over_ranks(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for settings in (Config(optimizer="adamw"), Config(optimizer="sgd", schedule="constant"), Config(optimizer="muon")):
        optimizers.optimizer(settings, 10)
    for settings in (Config(schedule="reduce_on_plateau"), Config(optimizer="sophia")):
        with pytest.raises(ValueError, match="which are those of one rank: train in one process"):
            optimizers.optimizer(settings, 10)


def test_optimizers_are_those_of_the_library():
    assert {"sgd", "adam", "adamw", "lion", "muon", "soap", "prodigy"} <= set(optimizers.optimizers())
    assert not [name for name in optimizers.optimizers() if name.startswith("scale")]


PAGE = (Path(__file__).parents[2] / "docs/cli.md").read_text()


def public(room):
    """The functions of a room, by name."""
    return {name for name in room.__all__ if inspect.isfunction(getattr(room, name))}


@pytest.mark.parametrize(
    ("room", "reachable", "left_out"),
    [
        (schedules, optimizers.SCHEDULES, {"half_life"}),
        (losses, LOSSES, {"class_balanced", "check_labels"}),
        (metrics, METRICS, {"available", "combine", "confusion_scores", "from_torchmetrics", "get"}),
    ],
    ids=["schedules", "losses", "metrics"],
)
def test_every_name_is_reachable_or_the_page_says_why_not(room, reachable, left_out):
    assert public(room) - set(reachable) == left_out
    no_members = {"check_labels", "available", "combine", "confusion_scores", "get"}
    assert all(f"{name}`" in PAGE for name in left_out - no_members)


def test_the_page_lists_every_schedule():
    listed = re.search(r"`(constant [a-z_ ]+)`", PAGE)[1].split()
    assert set(listed) == set(optimizers.SCHEDULES) - {"reduce_on_plateau"}


def test_every_optimizer_of_the_library_is_reachable():
    pieces = {"corrected_decay", "schedule_free"}  # of chains, like those whose names say so
    wanted = {name for name in public(optim) if "learning_rate" in inspect.signature(getattr(optim, name)).parameters}
    assert {name for name in wanted - pieces if "scale_by_" not in name} == set(optimizers.optimizers())


def test_what_is_better_when_it_is_lower():
    lower = {name for name in METRICS if training._monitor(Config(monitor=f"val/{name}"))[1] == "min"}
    errors = {"calibration_error", "char_error_rate", "word_error_rate", "hamming", "mae", "mse"}
    assert lower == errors
    for part in ("val/loss", "val/errors/detection", "val/mse(root=true)", "val/hamming(num_classes=3)"):
        assert training._monitor(Config(monitor=part))[1] == "min"


def test_parts_learn_from_their_time_on():
    settings = Config(
        optimizer="sgd", schedule="constant", lr=1.0, accumulate=2, unfreeze={"features": "1ep", "head": 0}
    )
    model = job.network(digits()[0], fresh=True)
    starts = job.starts(settings, model)
    assert {starts[name] for name in starts if name.startswith("features")} == {"1ep"}
    params, _ = model.init(random.key(0))
    tx = optimizers.optimizer(settings, 12, epoch=3, starts=starts)  # three batches are two updates
    state, moved = tx.init(params), []
    for _ in range(6):
        updates, state = tx.update(params, state, params, weight=torch.ones(()))
        moved.append([name for name, u in updates.items() if u.any() and name.endswith("weight")])
    assert [any(n.startswith("head") for n in names) for names in moved] == [False, True] * 3
    assert [any(n.startswith("features") for n in names) for names in moved] == [False] * 5 + [True]


def test_weight_decay_spares_biases():
    tx = optimizers.optimizer(Config(optimizer="sgd", schedule="constant", lr=1, weight_decay=0.5), 10)
    params = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    zeros = {name: torch.zeros_like(p) for name, p in params.items()}
    updates, _ = tx.update(zeros, tx.init(params), params)
    assert updates["weight"].eq(-0.5).all()
    assert updates["bias"].eq(0).all()


SCHEDULES = {  # options that have no default
    "exponential": "exponential(rate=0.9)",
    "step": "step(every='1ep')",
    "piecewise": "piecewise(factors={1ep=0.1})",
    "cosine_restarts": "cosine_restarts(period='50%')",
    "noisy": "noisy(base='cosine', scale=1e-6)",
    "join": "join(parts=['constant', 'cosine'], boundaries=[1])",
}


def rates(steps, **options):
    """The learning rate of each update."""
    schedule = optimizers.learning_rate(Config(**options), steps, max(steps // 5, 1))
    return [float(schedule(i)) for i in range(steps)]


@pytest.mark.parametrize("name", sorted(optimizers.SCHEDULES))
@pytest.mark.parametrize("steps", [2, 100])
def test_every_schedule_has_its_peak_at_the_learning_rate(name, steps):
    found = rates(steps, schedule=SCHEDULES.get(name, name), lr=0.5)
    assert min(found) >= 0
    assert max(found) <= 0.5 + 1e-6
    if steps == 100:
        assert max(found) == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("warmup", [20, 20.0, 0.2, "20%", "1ep"])
def test_any_schedule_may_warm_up_first(warmup):
    found = rates(100, schedule="linear", warmup=warmup, lr=1.0)
    assert found[:21] == pytest.approx([i / 20 for i in range(21)])
    assert found[20:] == pytest.approx([1 - i / 80 for i in range(80)])


def test_durations_count_updates():
    found = rates(100, schedule="step(every='1ep', factor=0.5)", lr=1.0, accumulate=3)
    assert found[:8] == [1.0] * 7 + [0.5]  # 20 batches are 6 windows and one that the end of the epoch closes


def test_plateau_takes_the_place_of_a_schedule():
    settings = Config(optimizer="sgd", lr=1.0, schedule="reduce_on_plateau(factor=0.5, patience=0)", clip=None)
    tx, params = optimizers.optimizer(settings, 10), {"weight": torch.ones(1, 1)}
    state, steps = tx.init(params), []
    for _ in range(3):
        updates, state = tx.update(params, state, params, loss=torch.ones(()))
        steps.append(-float(updates["weight"]))
    assert steps == [1.0, 0.5, 0.25]


def test_losses_by_name_are_those_of_the_library():
    outputs, targets = random.normal(random.key(0), (4, 3)), torch.tensor([0, 1, 2, 0])
    task, model = job.TASKS["classification"], None
    plain = task.objective_loss(Config(), model, smooth=True)(outputs, targets)
    assert torch.equal(plain, losses.cross_entropy(outputs, targets))
    settings = Config(loss=("focal(gamma=1)", "cross_entropy"), label_smoothing=0.1)
    found = task.objective_loss(settings, model, smooth=True)(outputs, targets)
    assert torch.equal(found["focal"], losses.focal(outputs, targets, gamma=1, label_smoothing=0.1))
    assert torch.equal(found["cross_entropy"], losses.cross_entropy(outputs, targets, label_smoothing=0.1))
    measured = task.objective_loss(settings, model, smooth=False)(outputs, targets)
    assert torch.equal(measured["cross_entropy"], plain)


def test_frozen_parts():
    model = job.network(digits()[0], fresh=True)
    norms = job.frozen(replace(DIGITS, freeze_norms=True), model)
    assert [name for name, still in norms.items() if still] == [
        *("features.1.weight", "features.1.bias", "features.4.weight", "features.4.bias")
    ]
    both = job.frozen(replace(DIGITS, freeze=("head",), freeze_until="features.1"), model)
    assert [name for name, still in both.items() if not still] == [
        *("features.3.weight", "features.4.weight", "features.4.bias")
    ]
    assert job.frozen(DIGITS, model) is None


def test_augmentations_follow_one_another():
    settings = replace(digits()[0], augment=("random_flip(p=1.0)", "mixup(alpha=0.0)", "color_jitter(brightness=0.1)"))
    batch = next(iter(job.feed(settings, digits()[1])))
    images, targets = job.augmentation(settings)(batch, random.key(0))
    assert targets.shape == (64, 10)
    assert (images - batch[0].flip(3)).abs().max() < 1


def test_feed_moves_batches_and_nothing_else():
    settings, source = digits(channels_last=True, batch_size=100)
    moved = job.feed(settings, source, key=random.key(1))
    plain = job.feed(replace(settings, channels_last=False), source, key=random.key(1))
    assert len(moved) == len(plain) == 14
    assert len(list(moved)) == 14
    for (x, y), (a, b) in zip(moved.epoch(2, 11), plain.epoch(2, 11), strict=True):
        assert torch.equal(x, a)
        assert torch.equal(y, b)
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_published_weights_are_not_needed_again():
    settings = replace(digits()[0], model_options={"weights": "nowhere.pth"})
    with pytest.raises(ValueError, match=r"nowhere.pth"):
        job.network(settings, fresh=True)
    assert job.network(settings, fresh=False).name == "smallnet"
