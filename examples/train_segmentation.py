"""Train a U-Net to segment shapes on textured grounds: `python examples/train_segmentation.py --out runs/shapes`.

Discs, squares, triangles and crosses, some hidden behind others, filled like the ground: only outlines tell them apart.
The folder holds the checkpoints, `history.csv`, `curves.png` and `predictions.png`; the same command again goes on
where the run ended. `--smoke` is a run of seconds.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from holofunc import checkpoint, data, losses, metrics, models, optim, plots, random, train

CLASSES = ("ground", *data.SHAPES)


def loss(scores: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Cross-entropy finds the shapes, Dice fits their outlines."""
    return {"cross_entropy": losses.cross_entropy(scores, masks), "dice": losses.dice(scores, masks)}


def mean_iou() -> metrics.Metric:
    """Intersection over union of each class, pooled over all pixels, then averaged over classes."""
    counts = metrics.confusion(len(CLASSES))
    return counts._replace(compute=lambda matrix: metrics.confusion_scores(matrix)["mean_iou"])


def shapes(seed: int, count: int, **options: int) -> tuple[Tensor, Tensor]:
    """Images and masks."""
    drawn = data.draw_shapes(random.key(seed), count, most=2, **options)
    return drawn.images, drawn.masks


def main(out: str | Path, *, smoke: bool = False, compile: bool = False) -> float:
    """Train, draw and return the mean IoU on held-out images."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    count, size, layout, epochs = (48, 32, (4, 8), 1) if smoke else (2400, 64, (16, 32, 64), 10)
    seen = data.Batches(
        shapes(0, count, size=size), 16, key=random.key(1), mean=0.5, std=0.25, num_classes=len(CLASSES)
    )
    held_out = data.Batches(shapes(2, count // 4, size=size), 16, mean=0.5, std=0.25, num_classes=len(CLASSES))

    model = models.unet(num_classes=len(CLASSES), layout=layout, norm_layer=torch.nn.BatchNorm2d)
    steps = epochs * len(seen)
    tx = optim.adamw(optim.schedules.one_cycle(4e-3, steps), weight_decay=1e-2, mask=optim.no_decay_mask)
    result = train.fit(
        train.make_train_step(train.supervised(model, loss), tx),
        train.create_state(model, tx, random.key(3)),
        seen,
        epochs=epochs,
        eval=(train.make_eval_step(model, {"mean_iou": mean_iou()}), held_out),
        hooks=[
            train.log("bar", out / "history.csv", every=20),
            train.checkpoint(out / "checkpoints", best="val/mean_iou", mode="max"),
        ],
        log_every=20,
        resume=out / "checkpoints" if checkpoint.steps(out / "checkpoints") else None,
        compile=compile,
    )

    plots.curves(result.history, names=["loss", "val/mean_iou"]).savefig(out / "curves.png")
    images, masks = shapes(2, 12, size=size)
    with torch.no_grad():
        scores, _ = model.apply(result.state.params, result.state.buffers, (images / 255 - 0.5) / 0.25)
    plots.segmentation(images, scores, masks, class_names=CLASSES).savefig(out / "predictions.png")
    found = result.history[-1]["val/mean_iou"]
    print(f"mean IoU on {count // 4} held-out images: {found:.3f}; pictures in {out}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/segmentation", help="folder of the run")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds, to see that everything works")
    parser.add_argument("--compile", action="store_true", help="compile the step; on two cores it takes a minute")
    given = parser.parse_args()
    main(given.out, smoke=given.smoke, compile=given.compile)
