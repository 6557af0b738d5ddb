"""A training step of every constructor: what a step and the first step take, against pylocron eager and compiled.

    python tests/benchmarks/bench_models.py [pattern ...] [--task classification] [--batch 8] [--size 64] [--steps 5]

Tasks are classification, segmentation (cross entropy of all pixels) and detection (ten boxes on each image). Each
contender runs in a process of its own with an empty compiler cache, one after the other. Ours is the compiled step with
AdamW; pylocron's are its module, eager and under ``torch.compile``, with torch's fused AdamW. All use channels_last.
The last column is our first step against that of the first row. Constructors fixed here (the two of depth 152,
PyConv's) are not the same network as pylocron's.
"""

import argparse
import fnmatch
import inspect
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

CONTENDERS = ("holofunc", "pylocron", "pylocron compiled")
REFERENCE = {"classification": "resnet50", "segmentation": "unet", "detection": "yolov2"}
BOXES = 10


def make_batch(options: argparse.Namespace) -> tuple[Any, Any]:
    import torch

    from holofunc.models import Targets

    generator = torch.Generator().manual_seed(0)
    batch, size = options.batch, options.size
    images = torch.randn(batch, 3, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
    if options.task == "detection":
        corner, side = 0.6 * torch.rand(2, batch, BOXES, 2, generator=generator)
        labels = torch.randint(0, 10, (batch, BOXES), generator=generator)
        boxes = torch.cat([corner, corner + side / 2 + 0.05], -1)
        return images, Targets(boxes, labels, torch.ones(batch, BOXES, dtype=torch.bool))
    shape = (batch, size, size) if options.task == "segmentation" else (batch,)
    return images, torch.randint(0, 10, shape, generator=generator)


def our_step(name: str, options: argparse.Namespace) -> Callable[[], object]:
    import torch

    from holofunc import jit, losses, models, optim, random, train

    model, tx, batch = models.create(name, num_classes=10), optim.adamw(1e-3, weight_decay=1e-2), make_batch(options)
    loss = model.loss if isinstance(model, models.Detector) else losses.cross_entropy
    step = jit(train.make_train_step(train.supervised(model, loss), tx), donate=True)
    held = [train.create_state(model, tx, random.key(0), memory_format=torch.channels_last)]

    def run() -> None:
        held[0], _ = step(held[0], batch)

    return run


def their_step(name: str, options: argparse.Namespace, *, compiled: bool) -> Callable[[], object]:
    import holocron.models as pylocron
    import torch

    images, targets = make_batch(options)
    build = getattr(getattr(pylocron, options.task), name)
    plain = "pretrained_backbone" not in inspect.signature(build).parameters
    module = build(pretrained=False, num_classes=10, **({} if plain else {"pretrained_backbone": False}))
    module = module.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=1e-2, fused=True)
    forward = torch.compile(module) if compiled else module
    lists = (
        [{"boxes": b, "labels": n} for b, n in zip(*targets[:2], strict=True)] if options.task == "detection" else []
    )

    def run() -> None:
        if lists:
            loss = sum(forward(images, lists).values())
        else:
            loss = torch.nn.functional.cross_entropy(forward(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run


def measure(contender: str, name: str, options: argparse.Namespace) -> dict[str, float]:
    ours = contender == "holofunc"
    run = our_step(name, options) if ours else their_step(name, options, compiled=contender == "pylocron compiled")
    times = []
    for _ in range(options.steps + 2):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return {"step": statistics.median(times[2:]), "first": times[0]}


def measure_alone(contender: str, name: str, options: argparse.Namespace) -> dict[str, float] | None:
    """The times of a process of its own; None if it fails or takes longer than half an hour."""
    cache = tempfile.mkdtemp()
    command = [sys.executable, __file__, "--alone", contender, name, "--batch", str(options.batch)]
    command += ["--size", str(options.size), "--steps", str(options.steps), "--task", options.task]
    try:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=1800)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", default=["*"])
    parser.add_argument("--task", default="classification", choices=REFERENCE)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=CONTENDERS)
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(measure(*options.alone, options)))
        return
    import holocron.models as pylocron
    import torch

    from holofunc import models

    names = [n for n in models.list_models(task=options.task) if hasattr(getattr(pylocron, options.task), n)]
    names = [n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in options.patterns)]
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"batch {options.batch} at {options.size}x{options.size}, AdamW; ms per step / s of the first step")
    print(f"{'':18}" + "".join(f"{contender:>22}" for contender in options.only) + f"{'first / first':>22}")
    first = 0.0
    for name in sorted(names, key=lambda name: name != REFERENCE[options.task]):
        found = {contender: measure_alone(contender, name, options) for contender in options.only}
        cells = [f"{f['step'] * 1e3:.0f} / {f['first']:.1f}" if f else "failed" for f in found.values()]
        if ours := found.get("holofunc"):
            first = first or ours["first"]
            cells.append(f"{ours['first'] / first:.2f}x")
        print(f"{name:18}" + "".join(f"{cell:>22}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
