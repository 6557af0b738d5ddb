"""Train YOLOv2 from scratch to find digits on canvases: `python examples/train_detection.py`, minutes on two cores.

The network is YOLOv2 made small: the same layers, narrower, on a grid of 16 pixels. Digits, their places, sizes and
grounds are functions of a key; the test set's digits are not among those of the training set. It prints a progress
bar and the average precision of each digit, and leaves checkpoints, curves and a picture with boxes in `--out`;
interrupted, `--resume` goes on where it was.

`--data coco:PATH` and `--data voc:PATH` train the whole network on 416 pixels of such a folder instead: the same
script, for a GPU. That has not been run on the real COCO or VOC, only on folders of their layout.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import data, metrics, models, optim, plots, random, train
from holofunc.models import Detections, Detector, Targets
from holofunc.ops.boxes import box_iou
from holofunc.typing import PyTree

SMALL: dict[str, Any] = {
    "layout": [(24, 0), (48, 0), (96, 1), (128, 1)], "stem_channels": 16, "head_channels": 128, "passthrough_ratio": 4,
}  # fmt: skip
FULL: dict[str, Any] = {}


# --- average precision -------------------------------------------------------------------------------------------


def average_precision(model: Detector, names: Sequence[str], iou: float = 0.5) -> metrics.Metric:
    """Average precision at one IoU, of each class and their mean: the area under the envelope of precision over recall.

    Detections are taken best first; each takes the true box of its class that it overlaps most, if none has before. The
    state is what was found and what there is, so that a batch's update has a fixed shape.
    """

    def update(state: PyTree, out: Any, targets: Targets, *, weights: Tensor | None = None) -> PyTree:
        found, there = model.decode(out, score_threshold=0.01, max_detections=20), targets.mask
        if weights is not None:  # rows that pad a short batch
            there, found = there & (weights > 0)[:, None], found._replace(mask=found.mask & (weights > 0)[:, None])
        return {"found": found, "truth": Targets(targets.boxes, targets.labels, there)}

    def merge(a: PyTree, b: PyTree) -> PyTree:
        return {n: type(a[n])(*(torch.cat(pair) for pair in zip(a[n], b[n], strict=True))) for n in a}

    def compute(state: PyTree) -> dict[str, Tensor]:
        found, truth = state["found"], state["truth"]
        hits = matched(found, truth, iou)
        each = [_area(found, truth, hits, label) for label in range(len(names))]
        present = (
            torch.stack([x for x in each if x is not None]) if any(x is not None for x in each) else torch.zeros(1)
        )
        return {"mAP50": present.mean()} | {f"AP {n}": x for n, x in zip(names, each, strict=True) if x is not None}

    return metrics.Metric(lambda *, device=None: {}, update, merge, compute)


def matched(found: Detections, truth: Targets, iou: float) -> Tensor:
    """Which detections (N, D) have found a box."""
    overlap = box_iou(found.boxes, truth.boxes)
    fits = (found.labels[:, :, None] == truth.labels[:, None, :]) & truth.mask[:, None] & (overlap >= iou)
    free, hits = torch.ones_like(truth.mask), []
    for rank in range(found.mask.shape[1]):
        value, best = torch.where(fits[:, rank] & free, overlap[:, rank], -1.0).max(1)
        hits.append(found.mask[:, rank] & (value >= 0))
        free = free & ~(torch.nn.functional.one_hot(best, free.shape[1]).bool() & hits[-1][:, None])
    return torch.stack(hits, 1)


def _area(found: Detections, truth: Targets, hits: Tensor, label: int) -> Tensor | None:
    count = (truth.mask & (truth.labels == label)).sum()
    if count == 0:
        return None
    mine = found.mask & (found.labels == label)
    hit = hits[mine][found.scores[mine].argsort(descending=True, stable=True)].double()
    precision = hit.cumsum(0) / torch.arange(1, len(hit) + 1)
    envelope = precision.flip(0).cummax(0).values.flip(0)
    return (envelope * hit).sum() / count


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


def main(argv: Sequence[str] | None = None) -> float:
    """Train, evaluate, draw; returns the mean average precision at an IoU of 0.5 on the test set."""
    args = parse(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    source = open_source(args)
    shapes = data.anchors(source.boxes, 5, key=random.key(args.seed))
    model = models.yolov2(len(source.classes), source.channels, anchors=shapes.tolist(), **source.network)
    print(f"{model}, {len(source.train)} batches of {args.batch_size}, anchors {(shapes * args.size).round().tolist()}")

    steps = args.epochs * len(source.train)
    rate = optim.schedules.warmup_cosine(args.lr, steps=steps, warmup_steps=steps // 20)
    adamw = optim.adamw(rate, weight_decay=0.05, mask=optim.no_decay_mask)
    tx = optim.chain(optim.clip_by_global_norm(args.clip), adamw)
    step = train.make_train_step(train.supervised(model, model.loss), tx)
    eval_step = train.make_eval_step(model, {"box": average_precision(model, source.classes)})
    state = train.create_state(model, tx, random.key(args.seed), device=args.device)
    hooks = [train.log("bar", out / "history.csv"), train.checkpoint(out / "checkpoints", every="1ep", keep=2)]
    result = train.fit(
        step, state, source.train, epochs=args.epochs, eval=(eval_step, source.test),
        eval_every=f"{args.eval_every}ep", hooks=hooks, compile=args.compile,
        resume=out / "checkpoints" if args.resume else None,
    )  # fmt: skip

    scores = {n.removeprefix("val/box/"): v for n, v in result.history[-1].items() if n.startswith("val/box/")}
    for name, value in scores.items():
        print(f"{name:10}{value:.3f}")
    curves = plots.curves(
        result.history, names=["loss", "obj_loss", "noobj_loss", "bbox_loss", "clf_loss", "val/box/mAP50"]
    )
    curves.savefig(out / "curves.png")
    images, targets = next(iter(source.test))
    raw, _ = model.apply(dict(result.state.params), dict(result.state.buffers), images[:12].to(args.device))
    found = model.decode(raw, score_threshold=0.3, max_detections=20)
    truth = Targets(*(part[:12] for part in targets))
    picture = plots.detections(images[:12], found, truth, class_names=source.classes, **source.scale)
    picture.savefig(out / "detections.png")
    seconds = time.perf_counter() - began
    print(f"mAP50 {scores['mAP50']:.3f} after {args.epochs} epochs and {seconds:.0f} s; pictures in {out}")
    return scores["mAP50"]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; `--smoke` is a run of seconds, to see that it runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", default="canvases", help="canvases, coco:PATH or voc:PATH")
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
    parser.add_argument("--compile", action="store_true", help="pays in long runs")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args(argv)
    if args.smoke:
        args.images, args.epochs, args.compile, args.batch_size = 32, args.epochs or 1, False, 16
    args.size = args.size or (96 if args.data == "canvases" else 416)
    args.epochs = args.epochs or (10 if args.data == "canvases" else 160)
    return args


if __name__ == "__main__":
    main(sys.argv[1:])
