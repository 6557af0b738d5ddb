"""Find wrong labels by per-sample scores: `python examples/find_label_errors.py`.

A tenth of the labels of the digits is changed. A small network is trained on them for a few epochs while the state
tracks every sample. Then all samples are ranked by six scores, and the table shows which fraction of the wrong labels
is in the first tenth of each ranking.
"""

import torch
from torch import Tensor, nn

from holofunc import analysis, data, lift, losses, optim, random, train

SHARE = 0.1


def corrupted(labels: Tensor, share: float = SHARE, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Labels with some replaced by other classes, and which ones."""
    chosen, shift = random.split(random.key(seed))
    count = round(share * len(labels))
    wrong = torch.zeros(len(labels), dtype=torch.bool)
    wrong[random.permutation(chosen, len(labels))[:count]] = True
    return torch.where(wrong, (labels + random.randint(shift, labels.shape, 1, 10)) % 10, labels), wrong


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 3 * 3, 10),
    )


def main(epochs: int = 12) -> dict[str, float]:
    """Train, rank, print; returns the recall of each score."""
    images, clean = data.digits("train")
    labels, wrong = corrupted(clean)
    model, tx = lift(network), optim.adamw(2e-3, weight_decay=0.1)
    objective = train.supervised(model, losses.cross_entropy)
    batches = data.Batches((images, labels), 64, key=random.key(1), mean=0.305, std=0.376)

    step = analysis.track_step(train.make_train_step(objective, tx), objective)
    state = analysis.TrackedState(*train.create_state(model, tx, random.key(0)), analysis.track_init(len(labels)))
    checkpoints = []

    def keep(event: train.Event) -> None:
        checkpoints.append(({n: p.clone() for n, p in event.state.params.items()}, {}))

    hooks = [train.every(f"{epochs // 3}ep", keep)]
    state = train.fit(step, state, analysis.Indexed(batches), epochs=epochs, hooks=hooks, compile=False).state

    told = analysis.track_summary(state.track)
    report = analysis.explain(objective, state.params, state.buffers, batches)
    batch = (images - 0.305) / 0.376, labels
    influence = torch.stack([analysis.self_influence(objective, *point, batch) for point in checkpoints]).sum(0)
    scores = {
        "loss": told["loss"],
        "el2n": told["el2n"],
        "gradient norm": report.stats["grad_norm"],
        "forgetting": told["forgetting"].clamp_max(1e6) - told["correctness"],  # never learned, then often forgotten
        "influence": influence,
        "loss at the end": report.stats["loss"],
    }
    recalls = {name: analysis.label_error_recall(values, wrong, SHARE) for name, values in scores.items()}
    print(f"{len(labels)} digits, {int(wrong.sum())} labels changed, {epochs} epochs")
    print(f"score            wrong labels found in the first {SHARE:.0%}")
    for name, found in recalls.items():
        print(f"{name:<16} {found:.1%}")
    return recalls


if __name__ == "__main__":
    main()
