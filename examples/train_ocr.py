"""Train the CTC recognizer to read lines of text: `python examples/train_ocr.py --out runs/ocr`.

The data are random words of letters and digits in eight fonts, dark on bright or bright on dark, slanted and noisy. The
script first trains a classifier of single characters for half a minute: the recognizer starts from its body, because
from scratch it would predict only blanks for a long time. `--out` then holds the checkpoints, `history.csv`,
`curves.png` and `predictions.png`; the same command resumes a run. `--smoke` is a test run of seconds.

`--data text:PATH` reads images of lines and their texts from a folder instead, for training on a GPU. This has been run
only on small folders of that layout, not on a public data set.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import checkpoint, data, losses, metrics, models, optim, plots, random, train
from holofunc.ops import ctc
from holofunc.typing import Buffers, Params

ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"


def loss(log_probs: Tensor, labels: Tensor) -> Tensor:
    """CTC loss over all frames: those beside the text have to predict the blank."""
    return losses.ctc(log_probs, labels)


def character_error_rate() -> metrics.Metric:
    """The edit distance divided by the number of true characters."""

    def errors(log_probs: Tensor, labels: Tensor) -> Tensor:
        return ctc.edit_distance(ctc.greedy_decode(log_probs).labels, labels).float()

    def characters(log_probs: Tensor, labels: Tensor) -> Tensor:
        return (labels != ctc.PADDING).sum(1).float()

    both = metrics.combine(errors=metrics.mean(errors), characters=metrics.mean(characters))

    def compute(state: Any) -> Tensor:
        means = both.compute(state)
        return means["errors"] / means["characters"]

    return both._replace(compute=compute)


# --- data --------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """What a run is made of."""

    train: data.Batches
    test: data.Batches
    codec: data.CTCCodec
    scale: dict[str, Any]


def open_source(args: argparse.Namespace) -> Source:
    """Drawn lines, or a folder of images of lines."""
    key = random.key(args.seed)
    if args.data == "drawn":
        codec, scale = data.CTCCodec(ALPHABET), {"mean": 0.5, "std": 0.3}
        counts = (args.lines, max(args.lines // 8, 8))
        sets = [lines(random.fold_in(key, i), n, args.width, codec) for i, n in enumerate(counts)]
    else:
        seen = data.open_lines(args.data, width=args.width)
        codec, scale = seen.codec, {"mean": seen.mean, "std": seen.std}
        held_out = data.open_lines(args.data, split="test", width=args.width, alphabet=codec.alphabet)
        sets = [seen, held_out]
    options = {"ignore_index": ctc.PADDING, "num_classes": len(codec) + 1, "num_workers": args.workers, **scale}
    batches = data.Batches(sets[0], args.batch_size, key=key, drop_last=True, **options)
    return Source(batches, data.Batches(sets[1], args.batch_size, **options), codec, scale)


def lines(key: Tensor, count: int, width: int, codec: data.CTCCodec) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    longest = width // 16
    images, texts = data.draw_text_lines(key, count, codec.alphabet, length=(longest // 2, longest), size=(32, width))
    return images, codec.encode_all(texts, longest)


# --- characters first --------------------------------------------------------------------------------------------


def body_of_characters(args: argparse.Namespace) -> tuple[Params, Buffers]:
    """Parameters and buffers of a body trained to classify single characters."""
    key = random.key(args.seed + 1)
    images, texts = data.draw_text_lines(key, args.characters, ALPHABET, length=(1, 1), size=(32, 32))
    labels = data.CTCCodec(ALPHABET).encode_all(texts)[:, 0] - 1
    batches = data.Batches((images, labels), 64, key=key, mean=0.5, std=0.3, num_classes=len(ALPHABET))
    model = models.character_classifier(num_classes=len(ALPHABET))
    tx = optim.adamw(optim.schedules.one_cycle(5e-3, 4 * len(batches)))
    step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx)
    state = train.create_state(model, tx, key, device=args.device)
    result = train.fit(step, state, batches, epochs=4, hooks=[train.log("bar")], compile=False)
    print(f"characters: loss {result.history[-1]['loss']:.2f}")
    trained = result.state.params, result.state.buffers
    params, buffers = ({n: v for n, v in values.items() if n.startswith("backbone.")} for values in trained)
    return params, buffers


# --- the run -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> float:
    """Train, draw and return the character error rate on held-out lines."""
    args = parse(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    source = open_source(args)
    model = models.ctc_recognizer(num_classes=len(source.codec))
    params, buffers = model.init(random.key(args.seed), device=args.device)
    begun = bool(checkpoint.steps(out / "checkpoints"))
    if args.characters and not begun:
        body = body_of_characters(args)
        params, buffers = params | body[0], buffers | body[1]
    schedule = optim.schedules.one_cycle(args.lr, args.epochs * len(source.train), warmup_fraction=args.warmup)
    adamw = optim.adamw(schedule, weight_decay=1e-2, mask=optim.no_decay_mask)
    tx = optim.chain(optim.clip_by_global_norm(5.0), adamw)
    result = train.fit(
        train.make_train_step(train.supervised(model, loss), tx),
        train.create_state(model, tx, random.key(args.seed), params=params, buffers=buffers),
        source.train,
        epochs=args.epochs,
        eval=(train.make_eval_step(model, {"error_rate": character_error_rate()}), source.test),
        hooks=[
            train.log("bar", out / "history.csv", every=20),
            train.checkpoint(out / "checkpoints", best="val/error_rate"),
        ],
        log_every=20,
        resume=out / "checkpoints" if begun else None,
        compile=False,  # compiling the loop over frames takes longer than this run
    )

    plots.curves(result.history, names=["loss", "val/error_rate"]).savefig(out / "curves.png")
    images, labels = (part[:24] for part in next(iter(source.test)))
    with torch.no_grad():
        log_probs, _ = model.apply(dict(result.state.params), dict(result.state.buffers), images.to(args.device))
    read = source.codec.texts(ctc.prefix_beam_decode(log_probs).labels)
    picture = plots.recognition(images, read, source.codec.texts(labels), **source.scale)
    picture.savefig(out / "predictions.png")
    found = result.history[-1]["val/error_rate"]
    print(f"character error rate on {len(source.test)} test batches: {found:.1%}; figures in {out}")
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; `--smoke` is a test run of seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", default="drawn", help="drawn, or text:PATH")
    parser.add_argument("--out", default="runs/ocr", help="folder of the run")
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--lines", type=int, default=6000, help="drawn lines in the training set")
    parser.add_argument("--characters", type=int, default=4000, help="single characters to begin with")
    parser.add_argument("--width", type=int, default=None, help="pixels of the images, 96 by default; they are 32 high")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=float, default=0.1, help="fraction of the steps with increasing learning rate")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images of folders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args(argv)
    if args.smoke:
        args.lines, args.characters, args.width, args.epochs = 32, 64, args.width or 32, args.epochs or 1
    args.width = args.width or 96
    args.epochs = args.epochs or 5
    return args


if __name__ == "__main__":
    main(sys.argv[1:])
