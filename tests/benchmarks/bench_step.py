"""A whole training step of ResNet-18, side by side with what people use today.

    python tests/benchmarks/bench_step.py [--rounds 3] [--blocks 10] [--steps 5] [--batch 32] [--size 64]

Every contender runs in a process of its own that begins with an empty compiler cache; the processes take their steps by
turns. Printed are medians, and ratios to ``torch.compile(module)`` with the fused AdamW. All use channels_last.
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
        from holofunc import compile, jit, losses, models, optim, random, train

        compile.keep_freed_memory()  # as `holofunc train` does

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


def serve(name: str, batch: int, size: int) -> None:
    """A contender: tell the time of the first step, then, for each number read, take so many steps and tell theirs."""
    run = make_step(name, batch, size)
    print(json.dumps([timed(run)]), flush=True)
    run()
    for line in sys.stdin:
        print(json.dumps([timed(run) for _ in range(int(line))]), flush=True)
    print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]), flush=True)


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


class Contender:
    """A process of its own, that began with an empty compiler cache."""

    def __init__(self, name: str, batch: int, size: int) -> None:
        self.cache = tempfile.mkdtemp()
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", name, "--batch", str(batch), "--size", str(size)],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": self.cache},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        (self.first,) = self.read()

    def read(self) -> list[float]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a contender ended early: {self.process.args}")
        return json.loads(line)

    def steps(self, count: int) -> list[float]:
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        return self.read()

    def end(self) -> float:
        """Peak memory in MB."""
        self.process.stdin.close()
        (peak,) = self.read()
        self.process.wait()
        shutil.rmtree(self.cache, ignore_errors=True)
        return peak


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """First steps one contender after the other; then all stay alive, and take their steps by turns."""
    columns = ("step ms", "first step s", "peak RSS MB")
    found: dict[str, dict[str, list[float]]] = {name: {c: [] for c in columns} for name in options.only}
    for _ in range(options.rounds):
        contenders = {name: Contender(name, options.batch, options.size) for name in options.only}
        for _ in range(options.blocks):
            for name, contender in contenders.items():
                found[name]["step ms"] += [1e3 * t for t in contender.steps(options.steps)]
        for name, contender in contenders.items():
            found[name]["first step s"].append(contender.first)
            found[name]["peak RSS MB"].append(contender.end())
    return {name: {c: statistics.median(v) for c, v in values.items()} for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=10, help="turns of each contender in a round")
    parser.add_argument("--steps", type=int, default=5, help="steps in a turn")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--only", nargs="*", default=CONTENDERS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.batch, options.size)
        return
    import torch

    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"ResNet-18, batch {options.batch} at {options.size}x{options.size}, AdamW, n={options.rounds}")
    medians = measure(options)
    print("".join(f"{title:>26}" for title in ("", *medians[options.only[0]])))
    for name, found in medians.items():
        cells = [
            f"{v:.1f} ({v / medians[BASELINE][k]:.2f}x)" if BASELINE in medians else f"{v:.1f}"
            for k, v in found.items()
        ]
        print(f"{name:>26}" + "".join(f"{cell:>26}" for cell in cells))


if __name__ == "__main__":
    main()
