"""Move boxes onto targets by gradient descent on each box loss: `python examples/regress_boxes.py`.

A smaller version of the simulation in the DIoU paper (arXiv 1911.08287): boxes of several sizes and shapes start around
a target, most without touching it. `1 - iou` has no gradient there, GIoU first enlarges the boxes, DIoU moves them.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from holofunc import optim
from holofunc.ops import boxes
from holofunc.typing import Params

TARGETS = torch.tensor([[-0.5, -0.5, 0.5, 0.5], [-0.7, -0.35, 0.7, 0.35], [-0.35, -0.7, 0.35, 0.7]])
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "1 - box_iou": lambda a, b: 1 - boxes.box_iou(a, b, paired=True),
    "giou_loss": partial(boxes.giou_loss, paired=True),
    "diou_loss": partial(boxes.diou_loss, paired=True),
    "ciou_loss": partial(boxes.ciou_loss, paired=True),
}


def decode(params: Params) -> Tensor:
    """Boxes with their corners in the right order, whatever the parameters are."""
    half = params["log_size"].exp() / 2
    return torch.cat([params["center"] - half, params["center"] + half], -1)


def starts() -> Params:
    """Boxes of three sizes and three shapes on a grid of places, once for each target."""
    place = torch.linspace(-3, 3, 7)
    size = torch.tensor([0.5, 1.0, 2.0]).log()
    shape = torch.tensor([0.5, 1.0, 2.0]).log() / 2
    x, y, s, r, _ = torch.meshgrid(place, place, size, shape, TARGETS[:, 0], indexing="ij")
    center, log_size = torch.stack([x, y], -1), torch.stack([s + r, s - r], -1)
    return {"center": center.reshape(-1, 2), "log_size": log_size.reshape(-1, 2)}


def regress(loss: Callable[[Tensor, Tensor], Tensor], steps: int, rate: float = 0.02) -> tuple[Tensor, Tensor]:
    """The IoU of every box with its target, before and after."""
    tx, params = optim.adam(rate), starts()
    targets = TARGETS.repeat(len(params["center"]) // len(TARGETS), 1)
    gradient = torch.func.grad(lambda params: loss(decode(params), targets).sum())
    state = tx.init(params)
    before = boxes.box_iou(decode(params), targets, paired=True)
    for _ in range(steps):
        updates, state = tx.update(gradient(params), state, params)
        params = optim.apply_updates(params, updates)
    return before, boxes.box_iou(decode(params), targets, paired=True)


def main(steps: int = 300) -> dict[str, tuple[float, float]]:
    """For each loss, the mean IoU of boxes that overlapped their target at the start, and of those that did not."""
    results = {}
    print(f"mean IoU after {steps} steps, of boxes that at first were  overlapping  disjoint")
    for name, loss in LOSSES.items():
        before, after = regress(loss, steps)
        results[name] = after[before > 0].mean().item(), after[before == 0].mean().item()
        print(f"{name:56}{results[name][0]:11.3f}{results[name][1]:10.3f}")
    return results


if __name__ == "__main__":
    main()
