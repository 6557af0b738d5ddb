"""Fine-tune a file of weights: a new head on a frozen body, then all layers at layer-wise rates, or one by one.

A small network learns the ten digits, and is saved like a published checkpoint: a state dict whose file name contains
the first digits of its hash. Then it learns a new task, even or odd, from three images of each digit. For digits like
those of the first task a new head is enough; for mirrored ones the body has to be trained too:
`python examples/finetune.py`.
"""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import torch

from holofunc import Model, data, losses, metrics, models, optim, random, train
from holofunc.models import surgery
from holofunc.optim import GradientTransformation
from holofunc.typing import Batch, Params

SCALE = {"mean": 0.305, "std": 0.376}


def fit(model: Model, tx: GradientTransformation, source: Batch, epochs: int, **start: Any) -> train.TrainState:
    """Train on images and labels; ``start`` are the parameters and buffers to begin with."""
    batches = data.Batches(source, 30, key=random.key(1), drop_last=True, **SCALE)
    step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx)
    state = train.create_state(model, tx, random.key(0), **start)
    return train.fit(step, state, batches, epochs=epochs, compile=False).state


def accuracy(model: Model, state: train.TrainState, source: Batch) -> float:
    """The accuracy with the averaged weights, if there are any."""
    step = train.make_eval_step(model, {"accuracy": metrics.accuracy()})
    return train.evaluate(step, state, data.Batches(source, 60, **SCALE))["accuracy"]


def even_or_odd(split: str, *, each: int | None = None, mirrored: bool = False) -> Batch:
    """All digits of a split, or the first ``each`` of every kind."""
    images, labels = data.digits(split)
    rows = torch.cat([(labels == digit).nonzero()[:each, 0] for digit in range(10)])
    return images[rows].flip(-1) if mirrored else images[rows], labels[rows] % 2


def pretrain(folder: Path) -> Path:
    """A file in the format of published weights."""
    model = models.smallnet(num_classes=10, in_channels=1)
    state = fit(model, optim.adamw(3e-3), data.digits("train"), epochs=4)
    print(f"which digit, from all images: {accuracy(model, state, data.digits('test')):.1%} of those held out")
    file = folder / "smallnet.pth"
    torch.save({**state.params, **state.buffers}, file, _use_new_zipfile_serialization=False)
    return file.rename(folder / f"smallnet_8-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth")


def layerwise(params: Params, rate: float, decay: float) -> GradientTransformation:
    """AdamW with layer-wise learning rates: ``rate`` for the last layer, times ``decay`` for each layer before it."""
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in params))
    rates = {layer: rate * decay**depth for depth, layer in enumerate(reversed(layers))}
    each = {layer: optim.adamw(rates[layer], mask=optim.no_decay_mask) for layer in layers}
    return optim.partition(each, optim.label_by_path(params, [(layer, layer) for layer in layers]))


def one_after_another(params: Params, rate: float, batches: int, epochs: int) -> GradientTransformation:
    """AdamW for the last layer at once, and every few epochs for one more, up to the first."""
    body = list(dict.fromkeys(name.rpartition(".")[0] for name in params))[:-1]
    starts = {layer: f"{depth * epochs}ep" for depth, layer in enumerate(reversed(body), start=1)}
    return optim.chain(optim.adamw(rate, mask=optim.no_decay_mask), train.unfreeze(starts, batches))


def compare(file: Path, *, mirrored: bool) -> dict[str, float]:
    """Accuracies on held-out images, from scratch, in the two stages of fine-tuning, and in one run that unfreezes."""
    few, held_out = even_or_odd("train", each=3, mirrored=mirrored), even_or_odd("test", mirrored=mirrored)
    fresh = models.smallnet(num_classes=2, in_channels=1)
    scratch = fit(fresh, optim.adamw(3e-3), few, epochs=90)  # as many as both stages below

    model = models.smallnet(num_classes=2, in_channels=1, weights=file, new_head=True)  # all of the file but its head
    params, buffers = model.init(random.key(0))
    head = surgery.head_names(model)
    body = {name: name not in head for name in params}  # BatchNorm statistics are not parameters: they still adapt
    frozen = fit(model, optim.freeze(body, optim.adamw(1e-2)), few, epochs=60, params=params, buffers=buffers)
    assert all(torch.equal(frozen.params[name], params[name]) for name in params if body[name])

    tx = optim.ema_params(layerwise(frozen.params, rate=3e-3, decay=0.8), 0.95, warmup=True)
    tuned = fit(model, tx, few, epochs=30, params=frozen.params, buffers=frozen.buffers)
    gradual = one_after_another(params, rate=3e-3, batches=1, epochs=10)  # all 30 images are a batch
    unfrozen = fit(model, gradual, few, epochs=90, params=params, buffers=buffers)
    return {
        "from scratch": accuracy(fresh, scratch, held_out),
        "new head, frozen body": accuracy(model, frozen, held_out),
        "then all layers": accuracy(model, tuned, held_out),
        "one layer after another": accuracy(model, unfrozen, held_out),
    }


def main() -> tuple[dict[str, float], dict[str, float]]:
    """Compare on unchanged and on mirrored digits; returns both comparisons."""
    with tempfile.TemporaryDirectory() as folder:
        file = pretrain(Path(folder))
        known, mirrored = compare(file, mirrored=False), compare(file, mirrored=True)
    print(f"even or odd, from 30 images:  {'as known':>10}{'mirrored':>10}")
    for name in known:
        print(f"  {name:28}{known[name]:>10.1%}{mirrored[name]:>10.1%}")
    return known, mirrored


if __name__ == "__main__":
    main()
