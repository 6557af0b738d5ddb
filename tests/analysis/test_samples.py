"""Losses and scores of single samples, their course in training, and what they owe to each other."""

import math

import pytest
import torch
from torch import nn

import holofunc
from holofunc import analysis, checkpoint, data, lift, losses, models, optim, random, train, tree

torch.manual_seed(0)


@pytest.fixture(scope="module")
def digits():
    return data.digits("test")


@pytest.fixture(scope="module")
def small():
    model = models.smallnet(in_channels=1, widths=(4, 6, 8))
    return model, train.supervised(model, losses.cross_entropy), *model.init(random.key(0))


def dense_model(inputs=4, classes=3):
    return lift(lambda: nn.Sequential(nn.Flatten(), nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, classes)))


# --- losses and scores ---------------------------------------------------------------------------------------------


def test_scores_are_those_of_their_definitions(small, digits):
    model, objective, params, buffers = small
    x, y = digits[0][:20], digits[1][:20]
    stats = analysis.per_sample_losses(objective, params, buffers, (x, y), indices=torch.arange(20) + 5)
    logits = model.apply(params, buffers, x)[0]
    p = logits.softmax(1)
    torch.testing.assert_close(stats["loss"], losses.cross_entropy(logits, y, reduction="none"))
    torch.testing.assert_close(stats["el2n"], (p - nn.functional.one_hot(y, 10)).norm(dim=1))
    torch.testing.assert_close(stats["entropy"], torch.distributions.Categorical(p).entropy())
    torch.testing.assert_close(stats["probability"], p[range(20), y])
    others = p.clone()
    others[range(20), y] = -1
    torch.testing.assert_close(stats["margin"], p[range(20), y] - others.max(1).values)
    torch.testing.assert_close((stats["confidence"], stats["prediction"]), tuple(p.max(1)))
    assert stats["index"].tolist() == list(range(5, 25))


def test_classes_that_do_not_exist_have_no_part_in_scores():
    def masked():
        return nn.Sequential(nn.Linear(3, 4), Masked())

    model, batch = lift(masked), (torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1]))
    objective, state = train.supervised(model, losses.cross_entropy), model.init(random.key(0))
    stats = analysis.per_sample_losses(objective, *state, batch)
    p = model.apply(*state, batch[0])[0][:, :3].softmax(1)
    torch.testing.assert_close(stats["entropy"], torch.distributions.Categorical(p).entropy())
    members = analysis.stack([model.init(random.key(seed)) for seed in range(3)])
    told = analysis.ensemble(model, *members, batch[0])
    assert all(part.isfinite().all() for part in told[1:])
    assert (told.mutual_information > 0).all()


class Masked(nn.Module):
    """The last class is masked."""

    def forward(self, x):
        return x.masked_fill(torch.arange(4) == 3, -torch.inf)


def test_soft_targets_are_scored_by_their_distance():
    model = dense_model()
    params, buffers = model.init(random.key(0))
    x, soft = torch.randn(6, 4), torch.rand(6, 3).softmax(1)
    stats = analysis.per_sample_losses(train.supervised(model, losses.cross_entropy), params, buffers, (x, soft))
    p = model.apply(params, buffers, x)[0].softmax(1)
    torch.testing.assert_close(stats["el2n"], (p - soft).norm(dim=1))
    assert torch.equal(stats["label"], soft.argmax(1))


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_binary_scores(shape):
    model = lift(lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(0) if shape == (6,) else nn.Identity()))
    params, buffers = model.init(random.key(0))
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 1, 0]).float().view(shape)
    loss = lambda out, target: nn.functional.binary_cross_entropy_with_logits(out, target)  # noqa: E731
    stats = analysis.per_sample_losses(train.supervised(model, loss), params, buffers, (x, y))
    p = model.apply(params, buffers, x)[0].sigmoid().flatten()
    assert torch.equal(stats["prediction"], (p > 0.5).long())
    torch.testing.assert_close(stats["probability"], torch.where(y.flatten() > 0, p, 1 - p))
    torch.testing.assert_close(stats["loss"], -stats["probability"].log())


def test_segmentation_is_scored_per_image():
    model = lift(nn.Conv2d, 2, 3, 1)
    params, buffers = model.init(random.key(0))
    x, y = torch.randn(4, 2, 5, 5), torch.randint(0, 3, (4, 5, 5))
    y[:, 0] = -100
    stats = analysis.per_sample_losses(train.supervised(model, losses.cross_entropy), params, buffers, (x, y))
    out = model.apply(params, buffers, x)[0]
    for i in range(4):
        torch.testing.assert_close(stats["loss"][i], losses.cross_entropy(out[i : i + 1], y[i : i + 1]))
        predicted, true = out[i].argmax(0)[1:], y[i, 1:]
        ious = [((predicted == c) & (true == c)).sum() / ((predicted == c) | (true == c)).sum() for c in range(3)]
        torch.testing.assert_close(stats["iou"][i], torch.stack(ious).nanmean())
        p = out[i].softmax(0)[:, 1:]
        torch.testing.assert_close(stats["probability"][i], p.gather(0, true[None]).mean())


def test_losses_in_parts_are_told_apart():
    model = lift(nn.Linear, 4, 2)
    params, buffers = model.init(random.key(0))
    batch = torch.randn(3, 4), torch.randn(3, 2, 1)

    def loss(out, target):
        target = target.squeeze(-1)
        return {"near": (out - target).abs().mean(), "far": (out - target).square().mean()}

    stats = analysis.per_sample_losses(train.supervised(model, loss), params, buffers, batch)
    torch.testing.assert_close(stats["loss"], stats["loss/near"] + stats["loss/far"])
    assert set(stats) == {"loss", "loss/near", "loss/far"}


@pytest.mark.parametrize("aux", [None, (), "nothing", "a number", "a dict"])
def test_what_an_objective_returns_beside_the_loss_is_its_own(aux, digits):
    model = dense_model(64, 10)
    state, batch = model.init(random.key(0)), (digits[0][:4], digits[1][:4])

    def objective(params, buffers, batch, key):
        out, buffers = model.apply(params, buffers, batch[0])
        outputs = {"nothing": None, "a number": out.sum(), "a dict": {"out": out}}
        beside = train.Aux(buffers, {}, outputs[aux]) if isinstance(aux, str) else aux
        return losses.cross_entropy(out, batch[1]), beside

    expected = analysis.per_sample_losses(train.supervised(model, losses.cross_entropy), *state, batch)["loss"]
    torch.testing.assert_close(analysis.per_sample_losses(objective, *state, batch), {"loss": expected})
    weights = torch.tensor([1.0, 0, 2, 0])
    torch.testing.assert_close(
        analysis.weighted(objective)(*state, (*batch, weights), None)[0], (weights * expected).mean()
    )
    assert analysis.influence(objective, *state, batch, batch).shape == (4, 4)
    assert analysis.hvp(objective, *state, batch, state[0], kind="fisher")["1.weight"].isfinite().all()


def test_what_is_no_tensor_in_a_batch_belongs_to_every_sample(digits):
    model = dense_model(64, 10)
    params, buffers = model.init(random.key(0))
    batch = {"x": digits[0][:4], "y": digits[1][:4], "scale": 2.0, "times": torch.tensor(3.0), "names": ["a", "b"]}

    def objective(params, buffers, batch, key):
        out, buffers = model.apply(params, buffers, batch["x"])
        assert batch["names"] == ["a", "b"]
        return batch["scale"] * batch["times"] * losses.cross_entropy(out, batch["y"]), None

    plain = train.supervised(model, losses.cross_entropy)
    expected = analysis.per_sample_grad_norms(plain, params, buffers, (batch["x"], batch["y"]))
    torch.testing.assert_close(analysis.per_sample_grad_norms(objective, params, buffers, batch), 6 * expected)
    assert analysis.gradient_noise_scale(objective, params, buffers, batch, parts=2).trace.isfinite()


@pytest.mark.parametrize("width", [24, 12])
def test_texts_are_scored_one_by_one(width):
    """Three frames of three texts are no reason to take the one for the other."""
    model = models.ctc_recognizer(num_classes=4)
    params, buffers = model.init(random.key(0))
    images, texts = torch.rand(3, 1, 32, width), torch.tensor([[1, 2], [3, -100], [4, 4]])
    stats = analysis.per_sample_losses(train.supervised(model, losses.ctc), params, buffers, (images, texts))
    alone = [losses.ctc(model.apply(params, buffers, images[i : i + 1])[0], texts[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(stats, {"loss": torch.stack(alone)}, rtol=1e-4, atol=1e-5)


def test_any_objective_is_mapped_over_samples(small, digits):
    _, objective, params, buffers = small
    batch = digits[0][:6], digits[1][:6]
    mapped = analysis.in_eval_mode(objective)
    own = lambda params, buffers, batch, key: mapped(params, buffers, batch)  # noqa: E731
    torch.testing.assert_close(
        analysis.per_sample_losses(own, params, buffers, batch),
        analysis.per_sample_losses(objective, params, buffers, batch),
    )


def test_dataset_is_scored_by_index_whatever_the_order(small, digits):
    _, objective, params, buffers = small
    straight = analysis.score_dataset(objective, params, buffers, data.Batches(digits, 100), progress=True)
    shuffled = analysis.score_dataset(objective, params, buffers, data.Batches(digits, 64, key=random.key(1)))
    torch.testing.assert_close(straight, shuffled)
    torch.testing.assert_close(straight["label"], digits[1])
    order = torch.randperm(len(digits[1]))
    triples = [(digits[0][rows], digits[1][rows], rows) for rows in order.split(90)]
    torch.testing.assert_close(straight, analysis.score_dataset(objective, params, buffers, triples))
    with pytest.raises(ValueError, match="the index of the samples is missing: batches must end with it"):
        analysis.score_dataset(objective, params, buffers, [digits])
    with pytest.raises(ValueError, match="data must hold at least one batch"):
        analysis.score_dataset(objective, params, buffers, [])


def test_top_losses_keep_their_rows_together(small, digits):
    _, objective, params, buffers = small
    stats = analysis.score_dataset(objective, params, buffers, data.Batches(digits, 100))
    top = analysis.top_losses({**stats, "image": digits[0]}, 9)
    expected, order = stats["loss"].topk(9)
    torch.testing.assert_close(top["loss"], expected)
    assert torch.equal(top["index"], order)
    assert torch.equal(top["image"], digits[0][order])
    assert torch.equal(top["label"], digits[1][order])
    low = analysis.top_losses(stats, 2, by="margin", largest=False)
    assert torch.equal(low["margin"], stats["margin"].sort().values[:2])
    with pytest.raises(ValueError, match=r"k must be in \[1, 355\], the number of samples, got 0"):
        analysis.top_losses(stats, 0)
    with pytest.raises(ValueError, match=r"by must be one of 'index', 'loss', .*, got 'badness'"):
        analysis.top_losses(stats, 1, by="badness")


@pytest.mark.slow
def test_scores_compile(small, digits):
    _, objective, params, buffers = small
    batch = digits[0][:6], digits[1][:6]

    def scores(params, buffers, batch):
        return analysis.per_sample_losses(objective, params, buffers, batch)

    torch.testing.assert_close(holofunc.jit(scores)(params, buffers, batch), scores(params, buffers, batch))


def test_wrong_indices_are_told(small, digits):
    _, objective, params, buffers = small
    with pytest.raises(ValueError, match=r"indices must have shape \(6,\), one per sample, got \(5,\)"):
        analysis.per_sample_losses(objective, params, buffers, (digits[0][:6], digits[1][:6]), indices=torch.arange(5))


# --- statistics ----------------------------------------------------------------------------------------------------


def test_calibrated_model_computes_in_eval_mode_what_it_does_in_train_mode(small, digits):
    model, _, params, buffers = small
    calibrated = analysis.calibrate(model, params, buffers, digits)
    trained, _ = model.apply(params, buffers, digits[0], train=True)
    torch.testing.assert_close(model.apply(params, calibrated, digits[0])[0], trained, rtol=1e-3, atol=1e-3)
    again = analysis.calibrate(model, params, {n: b + 3 for n, b in buffers.items()}, digits[0])
    statistics = [n for n in buffers if "running" in n]
    assert statistics
    assert all(torch.equal(again[n], calibrated[n]) for n in statistics)


def test_calibration_brings_gradients_of_samples_closer_to_that_of_the_batch(small, digits):
    model, objective, params, buffers = small
    batch = digits[0][:32], digits[1][:32]
    real = torch.func.grad(lambda p: objective(p, buffers, batch, None)[0])(params)

    def cosine(buffers):
        grads = analysis.per_sample_grads(analysis.in_eval_mode(objective), params, buffers, batch)
        mean = tree.map(lambda g: g.mean(0), grads)
        return tree.total(tree.map(torch.mul, mean, real)) / tree.global_norm(mean) / tree.global_norm(real)

    assert cosine(analysis.calibrate(model, params, buffers, batch)) > max(0.5, cosine(buffers) + 0.1)


def test_noise_scale_of_a_known_noise():
    """Gradients of samples are the samples: mean 1 in each of 10 directions, variance 4."""
    samples = 1 + 2 * torch.randn(4000, 10)

    def objective(params, buffers, batch, key):
        return (batch * params["w"]).sum(1).mean(), None

    params = {"w": torch.zeros(10)}
    norms = analysis.gradient_noise_scale(objective, params, {}, samples, method="norms")
    parts = analysis.gradient_noise_scale(objective, params, {}, samples, parts=400)
    for found in (norms, parts):
        torch.testing.assert_close(found.trace, torch.tensor(40.0), rtol=0.15, atol=0)
        torch.testing.assert_close(found.squared_norm, torch.tensor(10.0), rtol=0.15, atol=0)
        torch.testing.assert_close(found.noise_scale, found.trace / found.squared_norm)
    torch.testing.assert_close(norms.trace, samples.var(0).sum())
    with pytest.raises(ValueError, match="divide the number of samples, got 3 for 4000 samples"):
        analysis.gradient_noise_scale(objective, params, {}, samples, parts=3)


def test_noise_scale_with_batch_statistics(small, digits):
    _, objective, params, buffers = small
    batch = digits[0][:64], digits[1][:64]
    assert analysis.gradient_noise_scale(objective, params, buffers, batch).trace.isfinite()
    with pytest.raises(ValueError, match="normalizes over the batch"):
        analysis.gradient_noise_scale(objective, params, buffers, batch, method="norms")


# --- dynamics ------------------------------------------------------------------------------------------------------


def test_track_counts_and_averages():
    track = analysis.track_init(4)
    right = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 0, 1], [0, 0, 1]], dtype=torch.bool)
    probabilities = torch.rand(4, 3)
    for correct, p in zip(right, probabilities, strict=True):
        stats = {"probability": p, "el2n": p + 1, "loss": p + 2, "prediction": correct.long(), "label": torch.ones(3)}
        track = analysis.track_update(track, torch.tensor([2, 0, 3], dtype=torch.int32), stats)
    told = analysis.track_summary(track)
    rows = [2, 0, 3]
    torch.testing.assert_close(told["confidence"][rows], probabilities.mean(0))
    torch.testing.assert_close(told["variability"][rows], probabilities.std(0, correction=0))
    torch.testing.assert_close(told["el2n"][rows], probabilities.mean(0) + 1)
    torch.testing.assert_close(told["loss"][rows], probabilities.mean(0) + 2)
    assert told["forgetting"][rows].tolist() == [2, math.inf, 0]
    assert told["correctness"][rows].tolist() == [0.5, 0, 1]
    assert told["seen"].tolist() == [4, 0, 4, 4]
    assert told["confidence"][1].isnan()
    assert told["forgetting"][1].isnan()


def test_track_needs_indices_and_scores():
    one = torch.ones(2)
    stats = {"probability": one, "el2n": one, "loss": one, "prediction": one, "label": one}
    with pytest.raises(ValueError, match=r"indices must be integers of shape \(2,\), one per sample, got None"):
        analysis.track_update(analysis.track_init(3), None, stats)
    with pytest.raises(ValueError, match=r"got none for \['probability', 'el2n', 'prediction', 'label'\]"):
        analysis.track_update(analysis.track_init(3), torch.arange(2), {"loss": one})
    with pytest.raises(ValueError, match="n must be the number of samples in the dataset, at least 1, got 0"):
        analysis.track_init(0)


def test_track_is_exact_across_resume(tmp_path):
    model, tx = dense_model(64, 10), optim.sgd(0.1)
    objective = train.supervised(model, losses.cross_entropy)
    step = analysis.track_step(train.make_train_step(objective, tx), objective)
    batches = analysis.Indexed(data.Batches(data.digits("test"), 100, key=random.key(1)))
    start = analysis.TrackedState(*train.create_state(model, tx, random.key(0)), analysis.track_init(355))
    whole = train.fit(step, start, batches, epochs=3, compile=False).state
    part = train.fit(step, start, batches, steps=6, compile=False).state  # in the middle of the second epoch
    checkpoint.save(tmp_path, part, 6)
    resumed = train.fit(step, checkpoint.restore(tmp_path, part), batches, steps=6, compile=False).state
    assert all(torch.equal(x, y) for x, y in zip(tree.leaves(whole), tree.leaves(resumed), strict=True))
    assert whole.track.seen.tolist() == [3] * 355
    with pytest.raises(ValueError, match="the index of the samples is missing: batches must end with it"):
        step(start, data.digits("test"))


# --- influence -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blobs():
    model = dense_model()
    params, buffers = model.init(random.key(0), dtype=torch.float64)
    make = lambda seed, n: (torch.randn(n, 4, dtype=torch.float64), torch.arange(n) % 3)  # noqa: E731
    return train.supervised(model, losses.cross_entropy), params, buffers, make(1, 9), make(2, 4)


def rows(objective, params, buffers, batch):
    grads = analysis.per_sample_grads(objective, params, buffers, batch)
    return torch.cat([g.flatten(1) for g in grads.values()], 1)


def test_influence_is_the_product_of_gradients(blobs):
    objective, params, buffers, batch, test = blobs
    expected = rows(objective, params, buffers, test) @ rows(objective, params, buffers, batch).mT
    torch.testing.assert_close(analysis.influence(*blobs), expected)
    wide = analysis.influence(*blobs, projection=200_000, key=random.key(0))
    torch.testing.assert_close(wide, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))
    norms = analysis.self_influence(objective, params, buffers, batch)
    torch.testing.assert_close(norms, analysis.influence(objective, params, buffers, batch, batch).diagonal())
    part = analysis.influence(*blobs, where="3")
    last = [
        torch.cat(
            [g.flatten(1) for g in analysis.per_sample_grads(objective, params, buffers, b, where="3").values()], 1
        )
        for b in (test, batch)
    ]
    torch.testing.assert_close(part, last[0] @ last[1].mT)


def test_projections_are_unbiased(blobs):
    exact = analysis.influence(*blobs)
    several = [analysis.influence(*blobs, projection=64, key=random.key(seed)) for seed in range(60)]
    spread = torch.stack(several).std(0) / 60**0.5
    assert ((torch.stack(several).mean(0) - exact).abs() < 5 * spread + 1e-9).all()


def test_tracin_sums_checkpoints(blobs):
    objective, params, buffers, batch, test = blobs
    later = tree.map(lambda p: p * 0.9, params)
    expected = 0.1 * analysis.influence(*blobs) + 0.2 * analysis.influence(objective, later, buffers, batch, test)
    got = analysis.tracin(objective, [(params, buffers), (later, buffers)], batch, test, learning_rates=[0.1, 0.2])
    torch.testing.assert_close(got, expected)
    found = analysis.nearest(got, 3)
    assert torch.equal(found.values, got.sort(dim=1, descending=True).values[:, :3])
    assert torch.equal(analysis.nearest(got, 1, harmful=True).indices[:, 0], got.argmin(1))
    with pytest.raises(ValueError, match="got 0 checkpoints and 0 learning rates"):
        analysis.tracin(objective, [], batch, test)
    with pytest.raises(ValueError, match="projection must be at least 1 and needs a key, got projection=8, key=None"):
        analysis.influence(*blobs, projection=8)
    with pytest.raises(ValueError, match=r"k must be in \[1, 9\], the number of training samples, got 10"):
        analysis.nearest(got, 10)


# --- reports -------------------------------------------------------------------------------------------------------


def test_report_holds_the_worst_by_every_score(small, digits):
    _, objective, params, buffers = small
    track = analysis.track_init(355)._replace(seen=torch.ones(355, dtype=torch.int64))
    report = analysis.explain(objective, params, buffers, data.Batches(digits, 100), count=5, track=track)
    assert set(report.worst) == {"loss", "el2n", "grad_norm", "entropy", "margin", "probability", "forgetting"}
    assert all(len(rows["index"]) == 5 for rows in report.worst.values())
    assert report.worst["margin"]["margin"][0] == report.stats["margin"].min()
    assert report.worst["grad_norm"]["grad_norm"][0] == report.stats["grad_norm"].max()
    assert report.summary["samples"] == 355
    assert report.summary["loss/mean"] == pytest.approx(float(report.stats["loss"].mean()), rel=1e-5)
    lines = analysis.to_csv(report.stats, [f"digit {i}" for i in range(10)]).splitlines()
    assert len(lines) == 356
    assert lines[0].startswith("index,loss,prediction,label")
    assert f"digit {int(digits[1][0])}" in lines[1]
    ignored = {"label": torch.tensor([1, -100, -1]), "prediction": torch.tensor([0, 1, 1])}
    assert analysis.to_csv(ignored, ["a", "b"]) == "label,prediction\nb,a\n-100,b\n-1,b\n"
    with pytest.raises(ValueError, match="track must cover all samples, got 3 for index 354"):
        analysis.explain(objective, params, buffers, data.Batches(digits, 100), track=analysis.track_init(3))


def test_report_of_a_detector_has_the_worst_images_by_each_term_of_the_loss():
    layout = [(8, 1), (8, 1), (16, 1), (16, 1), (16, 1)]
    model = models.create("yolov4", num_classes=3, layout=layout, stem_channels=8)
    params, buffers = model.init(random.key(0))
    images, corner = random.normal(random.key(1), (4, 3, 64, 64)), torch.tensor([[0.1, 0.2, 0.5, 0.6]]).expand(4, 1, 4)
    targets = models.Targets(corner, torch.arange(4)[:, None] % 3, torch.ones(4, 1, dtype=torch.bool))
    objective = analysis.in_eval_mode(train.supervised(model, model.loss))

    def some(*rows):
        return images[list(rows)], tree.map(lambda x: x[list(rows)], targets)

    batches = [(*some(0, 1), torch.tensor([0, 1])), (*some(2, 3), torch.tensor([2, 3]))]
    report = analysis.explain(objective, params, buffers, batches, count=2)
    terms = {f"loss/{name}" for name in model.loss(model.apply(params, buffers, images)[0], targets)}
    assert set(report.worst) == {"loss", "grad_norm", *terms}
    for name, rows in report.worst.items():
        assert rows[name][0] == report.stats[name].max()
    alone = [objective(params, buffers, some(i))[0] for i in range(4)]
    torch.testing.assert_close(report.stats["loss"], torch.stack(alone), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sum(report.stats[name] for name in terms), report.stats["loss"])


def test_report_of_segmentation_has_the_images_of_the_lowest_iou():
    model = lift(nn.Conv2d, 2, 3, 1)
    x, y = random.normal(random.key(1), (6, 2, 5, 5)), random.randint(random.key(2), (6, 5, 5), 0, 3)
    objective = train.supervised(model, losses.cross_entropy)
    report = analysis.explain(objective, *model.init(random.key(0)), data.Batches((x, y), 4), count=2)
    assert report.worst["iou"]["iou"].tolist() == report.stats["iou"].sort().values[:2].tolist()
    assert {"iou/mean", "loss/mean", "grad_norm/mean"} <= set(report.summary)
    assert "accuracy" not in report.summary


def test_recall_of_label_errors():
    wrong = torch.tensor([True, False, True, False, False])
    assert analysis.label_error_recall(torch.tensor([5.0, 4, 3, 2, 1]), wrong, 0.4) == 0.5
    assert analysis.label_error_recall(torch.tensor([5.0, 4, 3, 2, 1]), wrong, 0.6) == 1
    with pytest.raises(ValueError, match="wrong must mark some of the 5 samples, got 0 of 5"):
        analysis.label_error_recall(torch.zeros(5), torch.zeros(5, dtype=torch.bool))
