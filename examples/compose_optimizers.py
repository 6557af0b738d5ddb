"""An optimizer composed of pieces, read and changed while it runs: `python examples/compose_optimizers.py`."""

from collections import OrderedDict

import torch
from torch import nn

from holofunc import data, jit, lift, losses, optim, random, train
from holofunc.optim import schedules
from holofunc.typing import Params


def network() -> nn.Module:
    """Parts with names, for the rules that go by them."""
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            body=nn.Sequential(nn.Conv2d(32, 64, 3, stride=2), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten()),
            head=nn.Linear(64 * 3 * 3, 10),
        )
    )


def compose(params: Params, steps: int) -> optim.GradientTransformation:
    """AdamW with what a long run wants around it. Each line is a transformation, and could be left out or moved."""
    adamw = optim.inject_hyperparams(optim.adamw)(
        learning_rate=schedules.warmup_cosine(2e-2, steps=steps, warmup_steps=steps // 10),
        b2=0.99,
        weight_decay=0.1,
        mask=optim.no_decay_mask,
    )
    tx = optim.named_chain(
        clip=optim.clip_by_global_norm(1.0),
        adamw=adamw,
        depth=optim.scale_leaves(optim.layer_decay(params, ["stem", "body", "head"], 0.7)),
    )
    return optim.ema_params(optim.apply_if_finite(tx), decay=0.95, warmup=True)


def main(epochs: int = 8) -> tuple[float, float]:
    """Train and print; returns the accuracies of the raw and of the averaged parameters on the held-out fifth."""
    batches = data.Batches(data.digits("train"), 128, key=random.key(1), mean=0.305, std=0.376)
    held_out = next(iter(data.Batches(data.digits("test"), 360, mean=0.305, std=0.376)))

    model = lift(network)
    params, buffers = model.init(random.key(0))
    tx = compose(params, steps=epochs * len(batches))
    state = train.create_state(model, tx, random.key(0), params=params, buffers=buffers)
    step = jit(train.make_train_step(train.supervised(model, losses.cross_entropy), tx), donate=True)

    def accuracy(params: Params) -> float:
        logits, _ = model.apply(params, state.buffers, held_out[0])
        return (logits.argmax(1) == held_out[1]).float().mean().item()

    print("epoch  rate    decay  loss   raw    averaged")
    for epoch in range(epochs):
        if epoch == epochs // 2:  # a hyperparameter is a number in the state: nothing is compiled again
            state = state._replace(opt_state=optim.set_hyperparams(state.opt_state, weight_decay=0.0))
        for images, labels in batches.epoch(epoch):
            state, measured = step(state, (images, labels))
        now = optim.get_hyperparams(state.opt_state)
        raw, averaged = accuracy(state.params), accuracy(optim.eval_params(state.opt_state, state.params))
        print(
            f"{epoch:5d}  {now['learning_rate']:.4f}  {now['weight_decay']:.2f}   {measured['loss']:.3f}"
            f"  {raw:.1%}  {averaged:.1%}"
        )

    state, _ = step(state, (torch.full_like(images, torch.nan), labels))  # skipped: nothing moves
    skipped = optim.skipped(state.opt_state).item()
    print(f"a batch of NaN was skipped: {skipped}; accuracy {accuracy(state.params):.1%}")
    return raw, averaged


if __name__ == "__main__":
    main()
