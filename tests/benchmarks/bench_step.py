"""A whole training step of ResNet-18, side by side with what people use today.

    python tests/benchmarks/bench_step.py [--rounds 3] [--batch 32] [--size 64] [--steps 20]

Every contender runs in a process of its own with an empty compiler cache, in alternation; printed are medians over the
rounds, and ratios to ``torch.compile(module)`` with the fused AdamW. All use channels_last.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

CONTENDERS = ("holofunc", "compiled module", "eager module", "pylocron")
BASELINE = "compiled module"


def make_step(name: str, batch: int, size: int) -> Callable[[], object]:
    import torch

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,), generator=generator)
    if name == "holofunc":
        from holofunc import jit, losses, models, optim, random, train

        model, tx = models.resnet18(num_classes=10), optim.adamw(1e-3, weight_decay=1e-2)
        step = jit(train.make_train_step(train.supervised(model, losses.cross_entropy), tx), donate=True)
        held = [train.create_state(model, tx, random.key(0), memory_format=torch.channels_last)]

        def run() -> None:
            held[0], _ = step(held[0], (images, labels))

        return run
    if name == "pylocron":
        from holocron.models import resnet18

        module = resnet18(pretrained=False, num_classes=10)
    else:
        import torchvision

        module = torchvision.models.resnet18(num_classes=10)
    module = module.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=1e-2, fused=name != "pylocron")
    forward = torch.compile(module) if name == "compiled module" else module

    def run_module() -> None:
        loss = torch.nn.functional.cross_entropy(forward(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run_module


def measure(name: str, batch: int, size: int, steps: int) -> dict[str, float]:
    run = make_step(name, batch, size)
    began = time.perf_counter()
    run()
    first = time.perf_counter() - began
    run()
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"step ms": 1e3 * statistics.median(times), "first step s": first, "peak RSS MB": peak}


def measure_alone(name: str, options: argparse.Namespace) -> dict[str, float]:
    cache = tempfile.mkdtemp()
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--alone", name, "--batch", str(options.batch), "--size", str(options.size),
             "--steps", str(options.steps)],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}, capture_output=True, text=True, check=True,
        )  # fmt: skip
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=CONTENDERS)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(measure(options.alone, options.batch, options.size, options.steps)))
        return
    import torch

    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"ResNet-18, batch {options.batch} at {options.size}x{options.size}, AdamW, n={options.rounds}")
    results: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    for _ in range(options.rounds):
        for name in options.only:
            results[name].append(measure_alone(name, options))
    medians = {n: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for n, runs in results.items()}
    print("".join(f"{title:>26}" for title in ("", "step ms", "first step s", "peak RSS MB")))
    for name, found in medians.items():
        cells = [
            f"{v:.1f} ({v / medians[BASELINE][k]:.2f}x)" if BASELINE in medians else f"{v:.1f}"
            for k, v in found.items()
        ]
        print(f"{name:>26}" + "".join(f"{cell:>26}" for cell in cells))


if __name__ == "__main__":
    main()
