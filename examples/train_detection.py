"""Train YOLOv2 from scratch to find digits on canvases: `python examples/train_detection.py`, minutes on two cores.

The network is a small YOLOv2 with fewer channels and stride 16. Digits, positions, sizes and backgrounds are functions
of a key; training and test set have different digits. The script prints a progress bar and COCO's metrics, and writes
checkpoints, curves and a figure with boxes to `--out`; the same command resumes a run. `--augment none mosaic` trains
once without and once with mosaic, and prints a table of both.

`--data coco:PATH` and `--data voc:PATH` train the full network on such a folder at 416 pixels instead, on a GPU. This
has not been run on the real COCO or VOC, only on folders of their layout.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from holofunc import checkpoint, data, metrics, models, optim, plots, random, train, transforms
from holofunc.models import Targets

SMALL: dict[str, Any] = {
    "layout": [(24, 0), (48, 0), (96, 1), (128, 1)], "stem_channels": 16, "head_channels": 128, "passthrough_ratio": 4,
}  # fmt: skip
FULL: dict[str, Any] = {}
AUGMENTS = {"none": None, "mosaic": transforms.mosaic(0.5), "jitter": transforms.large_scale_jitter(scale=(0.5, 1.5))}
TERMS = ("loss", "obj_loss", "noobj_loss", "bbox_loss", "clf_loss")


# --- data --------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """What a run is made of."""

    train: data.Batches
    test: data.Batches
    classes: Sequence[str]
    channels: int
    boxes: Any
    network: dict[str, Any]
    scale: dict[str, Any]


def open_source(args: argparse.Namespace) -> Source:
    """Canvases, or a folder in COCO's or VOC's layout."""
    key = random.key(args.seed)
    if args.data != "canvases":
        train_set, test_set = (
            data.open_boxes(args.data, split=split, image_size=args.size) for split in ("train", "test")
        )
        batches = train_set.batches(args.batch_size, key=key, drop_last=True, num_workers=args.workers)
        test = test_set.batches(args.batch_size, num_workers=args.workers)
        scale = {"mean": train_set.mean, "std": train_set.std}
        return Source(batches, test, train_set.classes, 3, train_set.sizes(), FULL, scale)
    scale = {"mean": 0.25, "std": 0.2, "collate": data.collate_boxes(4, num_classes=10)}
    made = {
        split: data.canvases(random.fold_in(key, i), count, size=args.size, split=split)
        for i, (split, count) in enumerate((("train", args.images), ("test", max(32, args.images // 5))))
    }
    batches = data.Batches(data.Boxed(*made["train"]), args.batch_size, key=key, drop_last=True, **scale)
    test = data.Batches(data.Boxed(*made["test"]), args.batch_size, **scale)
    return Source(batches, test, "0123456789", 1, made["train"][1], SMALL, {"mean": 0.25, "std": 0.2})


# --- the run -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, evaluate and draw, once for each augmentation; returns the mean average precisions at an IoU of 0.5."""
    args = parse(argv)
    source = open_source(args)
    rows = {}
    for name in args.augment:
        began = time.perf_counter()
        scores = run(args, source, name, Path(args.out) / (name if len(args.augment) > 1 else ""))
        rows[name] = scores | {"seconds": time.perf_counter() - began}
    print(f"{args.epochs} epochs of {len(source.train)} batches of {args.batch_size}")
    print(f"{'augment':12}{'AP50':>8}{'AP':>8}{'s':>8}")
    for name, row in rows.items():
        print(f"{name:12}{row['ap50']:8.3f}{row['ap']:8.3f}{row['seconds']:8.0f}")
    return {name: row["ap50"] for name, row in rows.items()}


def run(args: argparse.Namespace, source: Source, augment: str, out: Path) -> dict[str, float]:
    """One training; returns COCO's numbers on the test set."""
    out.mkdir(parents=True, exist_ok=True)
    shapes = data.anchors(source.boxes, 5, key=random.key(args.seed))
    model = models.yolov2(len(source.classes), source.channels, anchors=shapes.tolist(), **source.network)
    print(f"{model}, anchors {(shapes * args.size).round().tolist()}, augmentation: {augment}")

    steps = args.epochs * len(source.train)
    rate = optim.schedules.warmup_cosine(args.lr, steps=steps, warmup_steps=steps // 20)
    adamw = optim.adamw(rate, weight_decay=0.05, mask=optim.no_decay_mask)
    tx = optim.chain(optim.clip_by_global_norm(args.clip), adamw)
    step = train.make_train_step(train.supervised(model, model.loss), tx, augment=AUGMENTS[augment])
    finding = model.decoding(score_threshold=0.01, max_detections=20)
    measured = metrics.coco(len(source.classes), image_size=(args.size, args.size))
    result = train.fit(
        step,
        train.create_state(model, tx, random.key(args.seed), device=args.device),
        source.train,
        epochs=args.epochs,
        eval=(train.make_eval_step(finding, {"box": measured}), source.test),
        eval_every=f"{args.eval_every}ep",
        hooks=[train.log("bar", out / "history.csv"), train.checkpoint(out / "checkpoints", every="1ep", keep=2)],
        compile=args.compile,
        resume=out / "checkpoints" if checkpoint.steps(out / "checkpoints") else None,
    )

    plots.curves(result.history, names=[*TERMS, "val/box/ap50"]).savefig(out / "curves.png")
    images, targets = next(iter(source.test))
    raw, _ = model.apply(dict(result.state.params), dict(result.state.buffers), images[:12].to(args.device))
    found = model.decode(raw, score_threshold=0.3, max_detections=20)
    truth = Targets(*(part[:12] for part in targets))
    picture = plots.detections(images[:12], found, truth, class_names=source.classes, **source.scale)
    picture.savefig(out / "predictions.png")
    last = result.history[-1]
    print(f"AP50 {last['val/box/ap50']:.3f} on {len(source.test)} test batches; figures in {out}")
    return {name: last[f"val/box/{name}"] for name in ("ap50", "ap")}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; `--smoke` is a test run of seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", default="canvases", help="canvases, coco:PATH or voc:PATH")
    parser.add_argument("--augment", nargs="+", choices=AUGMENTS, default=["none"], help="train once with each")
    parser.add_argument("--out", default="runs/detection")
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--images", type=int, default=1500, help="canvases in the training set")
    parser.add_argument("--size", type=int, default=None, help="pixels: 96 for canvases, 416 for folders")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--clip", type=float, default=20.0)
    parser.add_argument("--eval-every", type=int, default=1, help="epochs")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images of folders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the step; pays in long runs")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args(argv)
    if args.smoke:
        args.images, args.epochs, args.compile, args.batch_size = 32, args.epochs or 1, False, 16
    args.size = args.size or (96 if args.data == "canvases" else 416)
    args.epochs = args.epochs or (8 if args.data == "canvases" else 160)
    return args


if __name__ == "__main__":
    main(sys.argv[1:])
