"""Analyses, in units of one gradient of the same batch, measured in the same run.

Prints milliseconds (best of some interleaved runs) and the ratio to the batch gradient by `torch.func.grad`, eager
against eager and compiled against compiled. Peak memory of eager rows above that of the gradient is measured on CUDA.
Where Opacus or curvlinops is installed, its figures are printed beside ours. Run as
``python tests/benchmarks/bench_analysis.py [--model resnet18] [--side 32] [--batch 32] [--compiled] [--device cuda]``.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from holofunc import analysis, data, jit, lift, losses, models, optim, random, train, tree

warnings.filterwarnings("ignore")


def seconds(fn: Callable[[], Any], device: str, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        fn()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def peak(fn: Callable[[], Any], device: str) -> float:
    if device != "cuda":
        return float("nan")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = fn()
    torch.cuda.synchronize()
    del kept
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def rows(name: str, side: int, batch_size: int, device: str) -> dict[str, Callable[..., Any]]:
    """Functions of (params, buffers, batch), the gradient first."""
    model = models.create(name, num_classes=10)
    objective = analysis.in_eval_mode(train.supervised(model, losses.cross_entropy))

    def gradient(params: Any, buffers: Any, batch: Any) -> Any:
        return torch.func.grad(lambda p: objective(p, buffers, batch)[0])(params)

    def direction(params: Any) -> Any:
        return {name: torch.ones_like(p) for name, p in params.items()}

    return {
        "gradient": gradient,
        "norms by taps": lambda p, b, x: analysis.per_sample_grad_norms(objective, p, b, x),
        "norms by vmap": lambda p, b, x: analysis.per_sample_grads(objective, p, b, x, reduce=tree.global_norm),
        "norms, last layer": lambda p, b, x: analysis.per_sample_grad_norms(objective, p, b, x, method="last_layer"),
        "losses": lambda p, b, x: analysis.per_sample_losses(objective, p, b, x),
        "clipped": lambda p, b, x: analysis.clipped_grads(objective, p, b, x, max_norm=1.0),
        "hessian product": lambda p, b, x: analysis.hvp(objective, p, b, x, direction(p)),
        "ggn product": lambda p, b, x: analysis.hvp(objective, p, b, x, direction(p), kind="ggn"),
        "fisher product": lambda p, b, x: analysis.hvp(objective, p, b, x, direction(p), kind="fisher"),
    }


def report_analyses(args: argparse.Namespace) -> None:
    model = models.create(args.model, num_classes=10)
    params, buffers = model.init(random.key(0), device=args.device)
    x = random.normal(random.key(1), (args.batch, 3, args.side, args.side)).to(args.device)
    state = params, buffers, (x, torch.arange(args.batch, device=args.device) % 10)
    functions = rows(args.model, args.side, args.batch, args.device)
    kept = {name: fn for name, fn in functions.items() if not args.only or name in ("gradient", *args.only)}
    print(f"{args.model}, {args.side} px, batch {args.batch}, {args.device}, {torch.get_num_threads()} threads")
    print(
        f"{'':<20} {'eager ms':>9} {'ratio':>6} {'peak MiB':>9}"
        + (f" {'jit ms':>9} {'ratio':>6}" if args.compiled else "")
    )
    first: tuple[float, float] = (0.0, 0.0)
    for name, fn in kept.items():
        eager = seconds(lambda fn=fn: fn(*state), args.device, args.repeats)
        fast = float("nan")
        if args.compiled and name != "norms by vmap":
            compiled = jit(fn)
            fast = seconds(lambda compiled=compiled: compiled(*state), args.device, args.repeats)
        if name == "gradient":
            first = eager, fast
        line = (
            f"{name:<20} {eager * 1e3:9.1f} {eager / first[0]:6.2f} {peak(lambda fn=fn: fn(*state), args.device):9.0f}"
        )
        print(line + (f" {fast * 1e3:9.1f} {fast / first[1]:6.2f}" if args.compiled else ""), flush=True)
    compare_with_others(model, state, args)


def compare_with_others(model: Any, state: Any, args: argparse.Namespace) -> None:
    """The same quantities of libraries that may be installed."""
    params, buffers, batch = state
    module = model.to_module(params, buffers)
    try:
        from opacus.grad_sample import GradSampleModule
    except ImportError:
        print("opacus is not installed")
    else:
        hooked = GradSampleModule(module, strict=False)

        def norms() -> Any:
            hooked.zero_grad()
            losses.cross_entropy(hooked(batch[0]), batch[1]).backward()
            return torch.stack([p.grad_sample.flatten(1).square().sum(1) for p in hooked.parameters()]).sum(0).sqrt()

        print(f"{'opacus hooks':<20} {seconds(norms, args.device, args.repeats) * 1e3:9.1f}")
    try:
        from curvlinops import GGNLinearOperator, HessianLinearOperator
    except ImportError:
        print("curvlinops is not installed")
    else:
        named = [p.requires_grad_() for p in module.parameters()]
        for name, kind in (("hessian", HessianLinearOperator), ("ggn", GGNLinearOperator)):
            operator = kind(module, torch.nn.CrossEntropyLoss(), named, [batch], check_deterministic=False)
            v = torch.ones(operator.shape[1], device=args.device)
            taken = seconds(lambda operator=operator, v=v: operator @ v, args.device, args.repeats)
            print(f"{'curvlinops ' + name:<20} {taken * 1e3:9.1f}")


def report_population(args: argparse.Namespace, members: int = 64) -> None:
    """Small dense networks, all at once and one after the other."""
    model = lift(
        lambda: torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10)
        )
    )
    tx = optim.adamw(1e-3)
    step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx)
    states = analysis.create_population(model, tx, random.split(random.key(0), members))
    images, labels = data.digits("train")
    choice = analysis.fastest_method(step, states, (images[:128], labels[:128]), repeats=args.repeats)
    ratio = choice.seconds["loop"] / choice.seconds["vmap"]
    told = ", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in choice.seconds.items())
    print(f"a step of {members} networks of 2,410 parameters, eager: {told}, {ratio:.1f} times faster at once")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help="names of rows")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compiled", action="store_true")
    arguments = parser.parse_args()
    report_analyses(arguments)
    report_population(arguments)
