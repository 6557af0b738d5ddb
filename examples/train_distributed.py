"""Train on several ranks: `torchrun --nproc-per-node=2 examples/train_distributed.py`, or on one without torchrun."""

import torch
from torch import nn

from holofunc import data, distributed, lift, losses, metrics, optim, random, train


def network() -> nn.Module:
    """Two convolutions and a head."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def main(epochs: int = 5, samples: int = 1024, *, compile: bool = True) -> float:
    """Train, evaluate on all ranks, print on rank 0; returns the accuracy on the held-out fifth."""
    device = distributed.init()  # 1: join the run
    me, ranks = distributed.rank(), distributed.world_size()
    images, labels = data.digits("train")
    pixels = {"mean": 0.305, "std": 0.376}
    batches = data.Batches((images[:samples], labels[:samples]), 128, key=random.key(1), drop_last=True, **pixels)
    batches = batches.shard(me, ranks)  # 2: this rank's part of each batch
    held_out = data.Batches(data.digits("test"), 360, **pixels).shard(me, ranks, uneven=True)

    model = distributed.sync_batch_norm(lift(network))
    schedule = optim.schedules.warmup_cosine(1e-2, steps=epochs * len(batches), warmup_steps=len(batches))
    tx = optim.chain(distributed.average_gradients(), optim.adamw(schedule))  # 3: average over all ranks
    state = train.create_state(model, tx, random.key(0), device=device)
    distributed.fingerprint(state, values=True)

    step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx)
    eval_step = train.make_eval_step(model, {"accuracy": metrics.accuracy()})
    hooks = [train.log("bar")] if distributed.is_rank_zero() else []
    on_device = data.prefetch(batches, device=device) if device.type != "cpu" else batches
    result = train.fit(step, state, on_device, epochs=epochs, eval=(eval_step, held_out), hooks=hooks, compile=compile)
    accuracy = result.history[-1]["val/accuracy"]
    each = 128 // ranks
    distributed.rank_zero(print)(
        f"{ranks} ranks with {each} of 128 samples: accuracy on the held-out fifth {accuracy:.1%}"
    )
    return accuracy


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
