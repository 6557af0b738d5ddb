"""A training step of every constructor: what a step and the first step take, against pylocron eager and compiled.

    python tests/benchmarks/bench_models.py [pattern ...] [--batch 8] [--size 64] [--steps 5]

Each contender runs in a process of its own with an empty compiler cache, one after the other. Ours is the compiled step
with AdamW; pylocron's are its module, eager and under ``torch.compile``, with torch's fused AdamW. All use
channels_last. The last column is our first step against our ResNet-50's. Constructors fixed here (the two of depth 152,
PyConv's) are not the same network as pylocron's.
"""

import argparse
import fnmatch
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

CONTENDERS = ("holofunc", "pylocron", "pylocron compiled")
REFERENCE = "resnet50"


def make_step(contender: str, name: str, batch: int, size: int) -> Callable[[], object]:
    import torch

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,), generator=generator)
    if contender == "holofunc":
        from holofunc import jit, losses, models, optim, random, train

        model, tx = models.create(name), optim.adamw(1e-3, weight_decay=1e-2)
        step = jit(train.make_train_step(train.supervised(model, losses.cross_entropy), tx), donate=True)
        held = [train.create_state(model, tx, random.key(0), memory_format=torch.channels_last)]

        def run() -> None:
            held[0], _ = step(held[0], (images, labels))

        return run
    import holocron.models.classification as pylocron

    module = getattr(pylocron, name)(pretrained=False, num_classes=10).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=1e-2, fused=True)
    forward = torch.compile(module) if contender == "pylocron compiled" else module

    def run_module() -> None:
        loss = torch.nn.functional.cross_entropy(forward(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run_module


def measure(contender: str, name: str, options: argparse.Namespace) -> dict[str, float]:
    run = make_step(contender, name, options.batch, options.size)
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
    command += ["--size", str(options.size), "--steps", str(options.steps)]
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
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=CONTENDERS)
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(measure(*options.alone, options)))
        return
    import holocron.models.classification as pylocron
    import torch

    from holofunc import models

    names = [n for n in models.list_models(task="classification") if hasattr(pylocron, n)]
    names = [n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in options.patterns)]
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"batch {options.batch} at {options.size}x{options.size}, AdamW; ms per step / s of the first step")
    print(f"{'':18}" + "".join(f"{contender:>22}" for contender in options.only) + f"{'first / ' + REFERENCE:>22}")
    first = {}
    for name in [REFERENCE, *(n for n in names if n != REFERENCE)]:
        found = {contender: measure_alone(contender, name, options) for contender in options.only}
        cells = [f"{f['step'] * 1e3:.0f} / {f['first']:.1f}" if f else "failed" for f in found.values()]
        if ours := found.get("holofunc"):
            first[name] = ours["first"]
            cells.append(f"{first[name] / first[REFERENCE]:.2f}x" if REFERENCE in first else "")
        print(f"{name:18}" + "".join(f"{cell:>22}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
