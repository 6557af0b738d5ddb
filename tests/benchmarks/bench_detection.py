"""The losses of the detectors with their gradients, eager and compiled, against pylocron's on the same outputs.

16 images with 10 boxes each; the gradient is that with respect to the raw outputs. Prints milliseconds (the fastest of
interleaved runs) and how many times faster ours is. Run as ``python tests/benchmarks/bench_detection.py [name ...]``;
``--step`` also times a whole training step of a YOLOv4 with one block in each stage, and counts our graphs: pylocron's
are 45.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from holofunc import jit, models, optim, random, train
from holofunc.compile.memory import keep_freed_memory

warnings.filterwarnings("ignore")  # pylocron compiles a torch.jit class when it is imported

from holocron.models import detection as theirs  # noqa: E402

IMAGES, BOXES, CLASSES = 16, 10, 20
MIDDLE = 416


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def targets(images: int = IMAGES) -> models.Targets:
    low = random.uniform(random.key(0), (images, BOXES, 2), high=0.6)
    size = random.uniform(random.key(1), (images, BOXES, 2), low=0.05, high=0.4)
    labels = random.randint(random.key(2), (images, BOXES), 0, CLASSES)
    return models.Targets(torch.cat([low, low + size], -1), labels, torch.ones(images, BOXES, dtype=torch.bool))


def as_lists(padded: models.Targets) -> list[dict[str, Tensor]]:
    return [{"boxes": boxes, "labels": labels} for boxes, labels, _ in zip(*padded, strict=True)]


def case(name: str) -> tuple[Any, tuple[Tensor, ...], Callable[..., Tensor]]:
    """Our detector, raw outputs, and pylocron's loss of them."""
    with torch.device("meta"):
        module = getattr(theirs, name)(pretrained_backbone=False, num_classes=CLASSES)
    model, lists = getattr(models, name)(num_classes=CLASSES), as_lists(targets())
    if name == "yolov1":
        out: tuple[Tensor, ...] = (draw(IMAGES, 49 * (10 + CLASSES)),)
    elif name == "yolov2":
        out, module.anchors = (draw(IMAGES, 5 * (5 + CLASSES), 13, 13),), torch.tensor(models.yolo2.ANCHORS)
    else:
        out = tuple(draw(IMAGES, 3 * (5 + CLASSES), MIDDLE // s, MIDDLE // s) for s in (8, 16, 32))
        layers = [getattr(module.head, f"yolo{i}").to_empty(device="cpu") for i in (1, 2, 3)]
        flat = torch.tensor(models.yolo4.RELATIVE)
        for i, layer in enumerate(layers):
            layer.anchors.copy_(flat[i])
            layer.all_anchors.copy_(flat.flatten(0, 1))
            layer.anchor_mask.copy_(torch.arange(3 * i, 3 * i + 3))

    def loss(*out: Tensor) -> Tensor:
        if name != "yolov4":
            return torch.cat(list(module._compute_losses(*module._format_outputs(out[0]), lists).values())).sum()
        parts = [layer._compute_losses(*layer._format_outputs(x), lists) for layer, x in zip(layers, out, strict=True)]
        return torch.stack([value for part in parts for value in part.values()]).sum()

    return model, out, loss


def timed(functions: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Milliseconds of each, the fastest of interleaved runs: what others do on the machine only adds."""
    for fn in functions.values():
        fn()
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for name, fn in functions.items():
            began = time.perf_counter()
            fn()
            times[name].append(time.perf_counter() - began)
    return {name: 1e3 * min(values) for name, values in times.items()}


def losses(names: list[str], seconds: float) -> None:
    print(f"loss and gradient of {IMAGES} images with {BOXES} boxes, ms {'pylocron':>11}{'eager':>18}{'compiled':>18}")
    for name in names:
        model, out, their_loss = case(name)
        padded = targets()

        def our_loss(out: tuple[Tensor, ...], padded: models.Targets, model: Any = model) -> Tensor:
            return torch.stack(list(model.loss(out if len(out) > 1 else out[0], padded).values())).sum()

        leaves = tuple(x.clone().requires_grad_() for x in out)
        gradient = torch.func.grad(our_loss)
        compiled = jit(gradient)
        found = timed(
            {
                "pylocron": lambda leaves=leaves, fn=their_loss: torch.autograd.grad(fn(*leaves), leaves),
                "eager": lambda out=out, padded=padded, fn=gradient: fn(out, padded),
                "compiled": lambda out=out, padded=padded, fn=compiled: fn(out, padded),
            },
            seconds,
        )
        base = found["pylocron"]
        cells = [f"{found[k]:9.2f} {f'({base / found[k]:.0f}x)':>8}" for k in ("eager", "compiled")]
        print(f"  {name:42}{base:12.1f}{''.join(cells)}")


def whole_step(seconds: float) -> None:
    """A training step of YOLOv4 with one block in each stage: ours, one gradient and one update graph, and pylocron's."""
    layout, size, images = [(64, 1), (128, 1), (256, 1), (512, 1), (1024, 1)], 128, 2
    model, tx, padded, x = (
        models.yolov4(CLASSES, layout=layout),
        optim.sgd(1e-4),
        targets(images),
        draw(2, 3, size, size),
    )
    state, eager = (
        train.create_state(model, tx, random.key(0)),
        train.make_train_step(train.supervised(model, model.loss), tx),
    )
    module, lists = theirs.YOLOv4(layout, num_classes=CLASSES).train(), as_lists(padded)
    optimizer, compiled_module, step = torch.optim.SGD(module.parameters(), 1e-4), torch.compile(module), jit(eager)

    def their_step(forward: Callable[..., Any]) -> None:
        loss = torch.stack([*forward(x, lists).values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    contenders: dict[str, Callable[[], Any]] = {
        "ours, eager": lambda: eager(state, (x, padded)),
        "ours, compiled": lambda: step(state, (x, padded)),
        "pylocron, eager": lambda: their_step(module),
        "pylocron, compiled": lambda: their_step(compiled_module),
    }
    first = {}
    for name, run in contenders.items():
        began = time.perf_counter()
        run()
        first[name] = time.perf_counter() - began
    found = timed(contenders, seconds)
    print(
        f"a step of a YOLOv4 of one block a stage, {images} images of {size} pixels; ours are {step.num_graphs} graphs"
    )
    for name, value in found.items():
        print(f"  {name:42}{value:12.0f} ms, the first {first[name]:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=["yolov1", "yolov2", "yolov4"])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--step", action="store_true")
    args = parser.parse_args()
    keep_freed_memory()  # fresh pages would be most of what is measured
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {torch.backends.cpu.get_cpu_capability()}")
    losses(args.names, args.seconds)
    if args.step:
        whole_step(args.seconds)


if __name__ == "__main__":
    main()
