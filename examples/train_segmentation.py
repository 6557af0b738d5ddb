"""Train a U-Net to segment shapes on textured grounds: `python examples/train_segmentation.py --out runs/shapes`.

The data are partly hidden discs, squares, triangles and crosses with the texture of the background, so only outlines
tell them apart. `--out` then holds the checkpoints, `history.csv`, `curves.png` and `predictions.png`; the same command
resumes a run. `--smoke` is a test run of seconds.

`--data coco:PATH`, `--data voc:PATH` and `--data masks:PATH` train the full U-Net on such a folder at 256 pixels
instead, on a GPU. This has not been run on the real COCO or VOC, only on folders of their layout.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from holofunc import checkpoint, data, losses, metrics, models, optim, plots, random, train, transforms

CLASSES = ("ground", *data.SHAPES)
SMALL: dict[str, Any] = {"layout": (16, 32, 64)}
FULL: dict[str, Any] = {}


def loss(scores: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """The sum of cross entropy and Dice loss."""
    return {"cross_entropy": losses.cross_entropy(scores, masks), "dice": losses.dice(scores, masks)}


# --- data --------------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """What a run is made of."""

    train: data.Batches
    test: data.Batches
    classes: Sequence[str]
    network: dict[str, Any]
    augment: transforms.Augment | None
    scale: dict[str, Any]


def open_source(args: argparse.Namespace) -> Source:
    """Shapes, or a folder of images with masks."""
    key = random.key(args.seed)
    if args.data == "shapes":
        sets = [shapes(random.fold_in(key, i), n, args.size) for i, n in enumerate((args.images, args.images // 4))]
        classes, network, augment, scale = CLASSES, SMALL, None, {"mean": 0.5, "std": 0.25}
    else:
        known = data.open_masks(args.data, image_size=args.size)
        classes, network, scale = known.classes, FULL, {"mean": known.mean, "std": known.std}
        sets = [known, data.open_masks(args.data, split="test", image_size=args.size, classes=classes)]
        augment = transforms.compose(transforms.random_flip(), transforms.large_scale_jitter(scale=(0.5, 2.0)))
    options = {"num_classes": len(classes), "num_workers": args.workers, **scale}
    seen = data.Batches(sets[0], args.batch_size, key=key, drop_last=True, **options)
    return Source(seen, data.Batches(sets[1], args.batch_size, **options), classes, network, augment, scale)


def shapes(key: Tensor, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Images and masks."""
    drawn = data.draw_shapes(key, count, size=size, most=2)
    return drawn.images, drawn.masks


# --- the run -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> float:
    """Train, draw and return the mean IoU on held-out images."""
    args = parse(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    source = open_source(args)
    model = models.unet(num_classes=len(source.classes), norm_layer=torch.nn.BatchNorm2d, **source.network)
    tx = optim.adamw(
        optim.schedules.one_cycle(args.lr, args.epochs * len(source.train)), weight_decay=1e-2, mask=optim.no_decay_mask
    )
    measured = {"pixels": metrics.segmentation(len(source.classes))}
    result = train.fit(
        train.make_train_step(train.supervised(model, loss), tx, augment=source.augment),
        train.create_state(model, tx, random.key(args.seed), device=args.device),
        source.train,
        epochs=args.epochs,
        eval=(train.make_eval_step(model, measured), source.test),
        hooks=[
            train.log("bar", out / "history.csv", every=20),
            train.checkpoint(out / "checkpoints", best="val/pixels/mean_iou", mode="max"),
        ],
        log_every=20,
        resume=out / "checkpoints" if checkpoint.steps(out / "checkpoints") else None,
        compile=args.compile,
    )

    plots.curves(result.history, names=["loss", "val/pixels/mean_iou"]).savefig(out / "curves.png")
    images, masks = (part[:12] for part in next(iter(source.test)))
    with torch.no_grad():
        scores, _ = model.apply(dict(result.state.params), dict(result.state.buffers), images.to(args.device))
    picture = plots.segmentation(images, scores.cpu(), masks, class_names=source.classes, **source.scale)
    picture.savefig(out / "predictions.png")
    found = result.history[-1]["val/pixels/mean_iou"]
    print(f"mean IoU on {len(source.test)} test batches: {found:.3f}; figures in {out}")
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; `--smoke` is a test run of seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", default="shapes", help="shapes, coco:PATH, voc:PATH or masks:PATH")
    parser.add_argument("--out", default="runs/segmentation", help="folder of the run")
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--images", type=int, default=2400, help="images of shapes in the training set")
    parser.add_argument("--size", type=int, default=None, help="pixels: 64 for shapes, 256 for folders")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images of folders")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the step; on two cores it takes a minute")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args(argv)
    if args.smoke:
        args.images, args.epochs, args.compile, args.size = 48, args.epochs or 1, False, args.size or 32
    args.size = args.size or (64 if args.data == "shapes" else 256)
    args.epochs = args.epochs or (10 if args.data == "shapes" else 60)
    return args


if __name__ == "__main__":
    main(sys.argv[1:])
