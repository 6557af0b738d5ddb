"""Train the CTC recognizer to read lines of text: `python examples/train_ocr.py --out runs/ocr`.

Random words of letters and digits in eight fonts, dark on bright or bright on dark, slanted, noisy, anywhere on the
line. The folder holds the checkpoints, `history.csv`, `curves.png` and `predictions.png`; the same command again goes
on where the run ended. `--smoke` is a run of seconds.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holofunc import checkpoint, data, losses, metrics, models, optim, plots, random, train
from holofunc.ops import ctc

CODEC = data.CTCCodec("0123456789abcdefghijklmnopqrstuvwxyz")
LONGEST = 6


def loss(log_probs: Tensor, labels: Tensor) -> Tensor:
    """For every label, over all frames: those beside the text have to say that nothing is there."""
    return losses.ctc(log_probs, labels)


def character_error_rate() -> metrics.Metric:
    """Characters to insert, remove or replace, over characters written."""

    def errors(log_probs: Tensor, labels: Tensor) -> Tensor:
        return ctc.edit_distance(ctc.greedy_decode(log_probs).labels, labels).float()

    def characters(log_probs: Tensor, labels: Tensor) -> Tensor:
        return (labels != ctc.PADDING).sum(1).float()

    both = metrics.combine(errors=metrics.mean(errors), characters=metrics.mean(characters))

    def compute(state: Any) -> Tensor:
        means = both.compute(state)
        return means["errors"] / means["characters"]

    return both._replace(compute=compute)


def lines(seed: int, count: int, width: int) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    images, texts = data.draw_text_lines(
        random.key(seed), count, CODEC.alphabet, length=(min(3, width // 32), width // 16), size=(32, width)
    )
    return images, CODEC.encode_all(texts, LONGEST)


def main(out: str | Path, *, smoke: bool = False) -> float:
    """Train, draw and return the character error rate on held-out lines."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    count, width, epochs = (32, 32, 1) if smoke else (6000, 96, 20)
    scale: dict[str, Any] = {"mean": 0.5, "std": 0.3, "ignore_index": ctc.PADDING, "num_classes": len(CODEC) + 1}
    seen = data.Batches(lines(0, count, width), 32, key=random.key(1), **scale)
    held_out = data.Batches(lines(2, count // 8, width), 32, **scale)

    model = models.ctc_recognizer(num_classes=len(CODEC))
    schedule = optim.schedules.one_cycle(3e-3, epochs * len(seen), warmup_fraction=0.1)
    tx = optim.adamw(schedule, weight_decay=1e-2, mask=optim.no_decay_mask)
    tx = optim.chain(optim.clip_by_global_norm(5.0), tx)
    result = train.fit(
        train.make_train_step(train.supervised(model, loss), tx),
        train.create_state(model, tx, random.key(3)),
        seen,
        epochs=epochs,
        eval=(train.make_eval_step(model, {"error_rate": character_error_rate()}), held_out),
        hooks=[
            train.log("bar", out / "history.csv", every=20),
            train.checkpoint(out / "checkpoints", best="val/error_rate"),
        ],
        log_every=20,
        resume=out / "checkpoints" if checkpoint.steps(out / "checkpoints") else None,
        compile=False,  # the graph of a loop over frames compiles for longer than this run takes
    )

    plots.curves(result.history, names=["loss", "val/error_rate"]).savefig(out / "curves.png")
    images, labels = lines(2, 24, width)
    with torch.no_grad():
        log_probs, _ = model.apply(result.state.params, result.state.buffers, (images / 255 - 0.5) / 0.3)
    read = CODEC.texts(ctc.prefix_beam_decode(log_probs).labels)
    plots.recognition(images, read, CODEC.texts(labels)).savefig(out / "predictions.png")
    found = result.history[-1]["val/error_rate"]
    print(f"character error rate on {count // 8} held-out lines: {found:.1%}; pictures in {out}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/ocr", help="folder of the run")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, to see that everything works")
    given = parser.parse_args()
    main(given.out, smoke=given.smoke)
