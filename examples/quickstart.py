"""Train a small network on handwritten digits, then show the hardest images: `python examples/quickstart.py`."""

import torch
from torch import Tensor, nn

from holofunc import data, lift, losses, metrics, optim, random, train


class Net(nn.Module):
    """An ordinary module: two convolutions and a head."""

    def __init__(self, width: int = 32, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2), nn.BatchNorm2d(2 * width), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def main(epochs: int = 10) -> float:
    """Train, evaluate, and print; returns the accuracy on the held-out fifth."""
    batches = data.Batches(data.digits("train"), 128, key=random.key(1), mean=0.305, std=0.376)
    held_out = data.Batches(data.digits("test"), 360, mean=0.305, std=0.376)

    model = lift(Net)
    schedule = optim.schedules.warmup_cosine(1e-2, steps=epochs * len(batches), warmup_steps=len(batches))
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(schedule, weight_decay=0.01))
    state = train.create_state(model, tx, random.key(0))

    step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx)
    eval_step = train.make_eval_step(model, {"accuracy": metrics.accuracy()}, loss=losses.cross_entropy)
    result = train.fit(step, state, batches, epochs=epochs, eval=(eval_step, held_out), hooks=[train.log("bar")])

    images, labels = next(iter(held_out))
    logits, _ = model.apply(result.state.params, result.state.buffers, images)
    per_sample = losses.cross_entropy(logits, labels, reduction="none")
    for i in torch.topk(per_sample, 3).indices.tolist():
        print(f"a {labels[i]} taken for a {logits[i].argmax()}, loss {per_sample[i]:.2f}")
    accuracy = result.history[-1]["val/accuracy"]
    print(f"accuracy on the held-out fifth: {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
