"""Every layer, forward and backward in train mode, eager and compiled, against pylocron's.

Prints milliseconds (medians of interleaved runs) and the ratio ours / theirs: below 1 is faster. Run as
``python tests/benchmarks/bench_layers.py [name ...]``; names select rows. Gradients are those of input and parameters,
except where pylocron's cannot be had: its NormConv2d and normalized Add2d differentiate to their parameters only.
``--add2d`` measures time and peak memory of Add2d at 64 x 56 x 56 -> 64, 3 x 3, each in a process of its own.
"""

import argparse
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from bench_losses import compiled, time_pair
from torch import Tensor

from holofunc import nn
from holofunc.compile.memory import keep_freed_memory

warnings.filterwarnings("ignore")  # pylocron compiles a torch.jit class when it is imported

import holocron.nn as theirs  # noqa: E402
import torchvision.ops  # noqa: E402

IMAGES = (8, 32, 28, 28)


class Case(NamedTuple):
    """Two modules and the shape of their input."""

    name: str
    ours: torch.nn.Module
    theirs: torch.nn.Module
    shape: tuple[int, ...] = IMAGES
    reference: str = "pylocron"
    to_input: bool = True


def cases() -> list[Case]:
    def pair(name: str, *args: object, label: str = "", to_input: bool = True, **options: object) -> Case:
        modules = getattr(nn, name)(*args, **options), getattr(theirs, name)(*args, **options)
        return Case(name + label, *modules, to_input=to_input)

    return [
        pair("HardMish"),
        pair("NLReLU"),
        pair("FReLU", 32),
        pair("SAM", 32),
        pair("TripletAttention"),
        pair("NormConv2d", 32, 32, 3, padding=1, to_input=False),
        pair("Add2d", 32, 32, 3, padding=1),
        pair("Add2d", 32, 32, 3, padding=1, normalize_slices=True, label="/normalized", to_input=False),
        pair("SlimConv2d", 32, 3, padding=1),
        pair("PyConv2d", 32, 32, 3, 4, padding=1),
        pair("Involution2d", 32, 7, padding=3, groups=2, reduction_ratio=4),
        pair("Involution2d", 32, 3, padding=1, stride=2, groups=2, label="/stride"),
        pair("LambdaLayer", 32, 32, 16, r=7, label="/local"),
        pair("LambdaLayer", 32, 32, 16, n=28 * 28, label="/global"),
        pair("DropBlock2d", 0.1, 7),
        Case("Dropout", nn.Dropout(0.1), torch.nn.Dropout(0.1), reference="torch"),
        Case("DropPath", nn.DropPath(0.1), torchvision.ops.StochasticDepth(0.1, "row"), reference="torchvision"),
        pair("ConcatDownsample2d", 2),
        pair("GlobalAvgPool2d"),
        pair("GlobalMaxPool2d"),
        pair("BlurPool2d", 32),
        pair("SPP", [5, 9, 13]),
        pair("ZPool"),
    ]


def images(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def runner(
    fn: Callable[[Tensor], Tensor], module: torch.nn.Module, shape: tuple[int, ...], to_input: bool
) -> Callable[[], None]:
    """One forward and backward pass."""
    x = images(shape).requires_grad_(to_input)
    wanted = [*([x] if to_input else []), *module.parameters()]

    def run() -> None:
        torch.autograd.grad(fn(x).sum(), wanted)

    return run


def rows(names: list[str], seconds: float) -> None:
    print(f"{'':24}{'against':>12}{'eager ms':>10}{'theirs':>9}{'ratio':>7}{'compiled':>10}{'theirs':>9}{'ratio':>7}")
    for case in cases():
        if names and not case.name.startswith(tuple(names)):
            continue
        torch._dynamo.reset()
        both = ((case.ours, True), (case.theirs, case.to_input))
        eager = time_pair(*(runner(m, m, case.shape, to_input) for m, to_input in both), seconds)
        fast = time_pair(*(runner(compiled(m), m, case.shape, to_input) for m, to_input in both), seconds)
        columns = (*eager, eager[0] / eager[1], *fast, fast[0] / fast[1])
        widths = zip(columns, (10, 9, 7) * 2, strict=True)
        numbers = "".join(f"{value:{width}.{2 if width == 7 else 3}f}" for value, width in widths)
        print(f"{case.name:24}{case.reference:>12}{numbers}", flush=True)


def add2d(which: str, batch: int) -> None:
    """Print seconds of a forward and backward pass, and the MB by which it raised the peak of this process."""
    module = {"ours": nn, "theirs": theirs}[which].Add2d(64, 64, 3, padding=1)
    run = runner(module, module, (batch, 64, 56, 56), True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"Add2d {batch:3} x 64 x 56 x 56 -> 64, 3 x 3, {which:6}: {seconds:7.2f} s, {peak:8.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="rows whose name starts with one of these")
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--add2d", nargs="*", metavar="WHICH:BATCH", help="by default theirs:2 theirs:4 ours:2 ours:4 ours:32"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # fresh pages would be most of what is measured
    if options.add2d is None:
        print(f"torch {torch.__version__}, {options.threads} thread(s), {torch.backends.cpu.get_cpu_capability()}")
        rows(options.names, options.seconds)
    elif len(options.add2d) == 1:
        which, batch = options.add2d[0].split(":")
        add2d(which, int(batch))
    else:
        for job in options.add2d or ["theirs:2", "theirs:4", "ours:2", "ours:4", "ours:32"]:
            subprocess.run([sys.executable, __file__, "--threads", str(options.threads), "--add2d", job], check=True)


if __name__ == "__main__":
    main()
