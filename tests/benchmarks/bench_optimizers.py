"""Optimizer updates on ResNet-50's 161 tensors, side by side with torch's and pylocron's.

    python tests/benchmarks/bench_optimizers.py [name ...] [--rounds 5] [--one-vector] [--sizes] [--memory] [--no-times]

Printed are, for each optimizer, milliseconds per update under ``jit(donate=True)``, their ratios to torch's fused AdamW
and to pylocron's class where there is one (below 1 is faster), and the seconds of the first call with an empty compiler
cache. Contenders share a process and take turns, the figures are medians over all turns; cold calls have a process
each. Gradients are a plain dict of tensors, which an update gathers first; ``--one-vector`` gives them as views of one vector
already. ``--sizes`` shows adamw's time against the number of tensors, ``--memory`` the greatest memory in use beyond
state and gradients.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torchvision

from holofunc import jit, optim, tree
from holofunc.optim import GradientTransformation


def by_ndim(params: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: "matrix" if p.ndim > 1 else "vector" for name, p in params.items()}


def all_but_the_last_stage(params: dict[str, torch.Tensor]) -> dict[str, bool]:
    return {name: not name.startswith(("layer4", "fc")) for name in params}


BUILDERS: dict[str, Callable[[], GradientTransformation]] = {
    "sgd": lambda: optim.sgd(1e-3, momentum=0.9),
    "muon": lambda: optim.muon(1e-3, adam_learning_rate=1e-3),
    "prodigy": lambda: optim.prodigy(),
    "lookahead": lambda: optim.lookahead(optim.adam(1e-3)),
    "scout": lambda: optim.scout(optim.adam(1e-3)),
    "ema_params": lambda: optim.ema_params(optim.adam(1e-3), 0.999),
    "multi_steps": lambda: optim.multi_steps(optim.adam(1e-3), 4),
    "apply_if_finite": lambda: optim.apply_if_finite(optim.adam(1e-3)),
    "cautious": lambda: optim.cautious(optim.adam(1e-3)),
    "partition": lambda: optim.partition({"matrix": optim.adamw(1e-3), "vector": optim.adam(1e-3)}, by_ndim),
    "freeze": lambda: optim.freeze(all_but_the_last_stage, optim.adamw(1e-3)),
} | {
    name: lambda name=name: getattr(optim, name)(1e-3)
    for name in (
        *("adam", "adamw", "nadam", "radam", "rmsprop", "adagrad", "adafactor", "lion", "lars", "lamb", "ralars"),
        *("tadam", "adabelief", "adamp", "adan", "ademamix", "soap", "schedule_free_adamw", "schedule_free_sgd"),
        *("adopt", "acprop", "madgrad", "mars", "simplified_ademamix", "sm3", "galore"),
    )
}
PYLOCRON = {
    "lars": "LARS", "lamb": "LAMB", "ralars": "RaLars", "tadam": "TAdam", "adabelief": "AdaBelief", "adamp": "AdamP",
    "adan": "Adan", "ademamix": "AdEMAMix", "lookahead": "Lookahead", "scout": "Scout",
}  # fmt: skip
SLOW = ("soap", "muon", "galore")
"""Matrix products and decompositions of every tensor: seconds per update at this size, so only on request."""

Shapes = dict[str, tuple[int, ...]]


def resnet_shapes() -> Shapes:
    with torch.device("meta"):
        return {n: tuple(p.shape) for n, p in torchvision.models.resnet50().named_parameters()}


def draw(shapes: Shapes, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.01 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def ours(name: str, shapes: Shapes, in_one_vector: bool = False) -> Callable[[], object]:
    tx, params, grads = BUILDERS[name](), draw(shapes, 0), draw(shapes, 1)
    if in_one_vector:
        grads = jit(lambda g: tree.elementwise(lambda x: x + 0, g), donate=True)(grads)

    def update(state, grads):
        params, inner = state
        updates, inner = tx.update(grads, inner, params)
        return optim.apply_updates(params, updates), inner

    step, held = jit(update, donate=True), [(params, tx.init(params))]

    def run() -> None:
        held[0] = step(held[0], grads)

    return run


def theirs(make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], shapes: Shapes) -> Callable[[], object]:
    params = [torch.nn.Parameter(p) for p in draw(shapes, 0).values()]
    for p, g in zip(params, draw(shapes, 1).values(), strict=True):
        p.grad = g
    return make(params).step


def fused(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, 1e-3, fused=True)


def pylocron(name: str) -> Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import holocron.optim as theirs_optim
    if name in ("lookahead", "scout"):
        wrap = getattr(theirs_optim.wrapper, PYLOCRON[name])
        return lambda params: wrap(torch.optim.Adam(params, 1e-3))
    options = {"momentum": 0.9} if name == "lars" else {}  # the one default that differs in what is computed
    return lambda params: getattr(theirs_optim, PYLOCRON[name])(params, 1e-3, **options)


def timed(contenders: dict[str, Callable[[], object]], rounds: int, turns: int = 5) -> dict[str, float]:
    """Milliseconds per call: medians over ``rounds`` rounds of ``turns`` calls in a row."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run(), run()
    for _ in range(rounds):
        for name, run in contenders.items():
            for _ in range(turns):
                began = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - began)
    return {name: 1e3 * statistics.median(found) for name, found in times.items()}


def alone(option: str, name: str, **environment: str) -> float:
    """What this script prints with a hidden option, in a process of its own with an empty compiler cache."""
    cache = tempfile.mkdtemp()
    try:
        done = subprocess.run(
            [sys.executable, __file__, option, name], env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, **environment},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    return json.loads(done.stdout.splitlines()[-1])


def first_call(name: str) -> float:
    torch.compile(lambda x: x + 1)(torch.ones(2))  # the compiler's own start is not this update's
    run = ours(name, resnet_shapes())
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def table(names: Sequence[str], rounds: int, in_one_vector: bool, cold: bool) -> None:
    shapes = resnet_shapes()
    print(f"{'update of 161 tensors':>22}{'ms':>10}{'/ fused':>10}{'/ pylocron':>12}{'cold s':>10}")
    for name in names:
        contenders = {"ours": ours(name, shapes, in_one_vector), "fused": theirs(fused, shapes)}
        if name in PYLOCRON:
            contenders["pylocron"] = theirs(pylocron(name), shapes)
        found = timed(contenders, rounds, turns=1 if name in SLOW else 5)
        versus = f"{found['ours'] / found['pylocron']:.2f}x" if name in PYLOCRON else ""
        first = f"{alone('--cold', name):.1f}" if cold else ""
        print(
            f"{name:>22}{found['ours']:>10.1f}{found['ours'] / found['fused']:>9.2f}x{versus:>12}{first:>10}",
            flush=True,
        )


def against_number(rounds: int) -> None:
    """adamw on 2**22 numbers cut into more and more tensors."""
    print(f"\n{'tensors of 2**22':>22}{'ours ms':>10}{'fused ms':>10}{'cold s':>10}")
    for count in (1, 16, 64, 256, 1024):
        shapes = {f"p{i}": (2**22 // count,) for i in range(count)}
        run = ours("adamw", shapes)
        began = time.perf_counter()
        run()
        first = time.perf_counter() - began
        found = timed({"ours": run, "fused": theirs(fused, shapes)}, rounds)
        print(f"{count:>22}{found['ours']:>10.2f}{found['fused']:>10.2f}{first:>10.1f}", flush=True)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_beyond(run: Callable[[], object]) -> float:
    """The greatest growth of resident memory during a call."""
    run(), run()
    before, most, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], resident())
            time.sleep(1e-4)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(10):
        run()
    done.set()
    watcher.join()
    return (most[0] - before) / 2**20


def memory(names: Sequence[str]) -> None:
    """With an allocator that gives back at once what is freed: otherwise memory of the first call would hide the rest."""
    one = 4 * sum(torch.Size(s).numel() for s in resnet_shapes().values()) / 2**20
    print(f"\nMiB beyond state and gradients while updates run (one gradient: {one:.0f} MiB)")
    for name in names:
        print(f"{name:>22}{alone('--peak', name, MALLOC_MMAP_THRESHOLD_='65536'):>10.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[n for n in BUILDERS if n not in SLOW], help="of optimizers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one-vector", action="store_true", help="gradients as views of one vector")
    parser.add_argument("--warm", action="store_true", help="leave the cold first calls out")
    parser.add_argument("--sizes", action="store_true", help="time against the number of tensors")
    parser.add_argument("--memory", action="store_true", help="memory beyond state and gradients")
    parser.add_argument("--no-times", action="store_true", help="leave the table out")
    parser.add_argument("--cold", help=argparse.SUPPRESS)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cold:
        print(json.dumps(first_call(options.cold)))
        return
    if options.peak:
        print(json.dumps(peak_beyond(ours(options.peak, resnet_shapes()))))
        return
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    if not options.no_times:
        table(options.names, options.rounds, options.one_vector, not options.warm)
    if options.sizes:
        against_number(options.rounds)
    if options.memory:
        memory(options.names)


if __name__ == "__main__":
    main()
