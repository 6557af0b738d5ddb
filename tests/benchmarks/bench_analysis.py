"""Analyses and those of other libraries, in units of one gradient of the same batch, all in one run.

Prints for each row the milliseconds (best of some interleaved runs), their ratio to the batch gradient (eager to eager,
compiled to compiled), the peak of memory that a call allocates, and the difference of what it returns from our own row
of the same quantity. Opacus, BackPACK, PyHessian and curvlinops are rows where they are installed; none is needed. Opacus
refuses a ResNet (its buffers): ``--model plain`` is a network that all of them take. Run as
``python tests/benchmarks/bench_analysis.py [--model resnet18] [--side 32] [--batch 32] [--compiled] [--device cuda]``.
"""

import argparse
import itertools
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from holofunc import analysis, data, jit, lift, losses, models, optim, random, train, tree

warnings.filterwarnings("ignore")
Rows = dict[str, Callable[[], Any]]

# --- measuring ---------------------------------------------------------------------------------------------------


def seconds(rows: Rows, device: str, repeats: int) -> dict[str, float]:
    """The best of some runs of each, in turns; each has run once before. What takes long is run once."""
    best = dict.fromkeys(rows, float("inf"))
    for _ in range(repeats):
        for name, fn in rows.items():
            if 3 < best[name] < float("inf"):
                continue
            began = time.perf_counter()
            fn()
            if device == "cuda":
                torch.cuda.synchronize()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def peak(fn: Callable[[], Any], device: str) -> float:
    """MiB allocated at the same time by a call, its result included; on a CPU, as torch's profiler sees its allocator."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = fn()
        torch.cuda.synchronize()
        del kept
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            kept = fn()
        profile.export_chrome_trace(str(file))
        del kept
        events = [e for e in json.loads(file.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    total = highest = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        total += event["args"]["Bytes"]
        highest = max(highest, total)
    return highest / 2**20


def table(title: str, rows: Rows, same: dict[str, str], args: argparse.Namespace) -> None:
    """``same``: rows that compute what another row does."""
    found = {}
    for name, fn in list(rows.items()):
        try:
            found[name] = fn()
        except Exception as error:
            print(f"{name}: cannot ({type(error).__name__}: {str(error).splitlines()[0][:90]})")
            del rows[name]
    times = seconds(rows, args.device, args.repeats)
    print(f"\n{title:<22} {'ms':>9} {'ratio':>6} {'peak MiB':>9} {'ratio':>6}  difference")
    least = peak(rows["gradient"], args.device)
    for name, taken in times.items():
        most = least if name == "gradient" else peak(rows[name], args.device)
        line = f"{name:<22} {taken * 1e3:9.1f} {taken / times['gradient']:6.2f} {most:9.0f} {most / least:6.2f} "
        told = f" {difference(found[name], found[same[name]]):.0e} from {same[name]}" if same.get(name) in found else ""
        print(line + told, flush=True)


def difference(one: Any, other: Any) -> float:
    """The largest, relative to the largest number."""
    a, b = (torch.cat([x.detach().double().flatten().cpu() for x in tree.leaves(each)]) for each in (one, other))
    return float((a - b).abs().max() / b.abs().max())


# --- rows --------------------------------------------------------------------------------------------------------


def own(objective: Any, params: Any, buffers: Any, batch: Any, *, compiled: bool = False) -> Rows:
    v = {name: torch.ones_like(p) for name, p in params.items()}
    functions: dict[str, Callable[..., Any]] = {
        "gradient": lambda p, b, x, v: torch.func.grad(lambda p: objective(p, b, x)[0])(p),
        "norms by taps": lambda p, b, x, v: analysis.per_sample_grad_norms(objective, p, b, x),
        "hessian product": lambda p, b, x, v: analysis.hvp(objective, p, b, x, v),
        "ggn product": lambda p, b, x, v: analysis.hvp(objective, p, b, x, v, kind="ggn"),
        "fisher product": lambda p, b, x, v: analysis.hvp(objective, p, b, x, v, kind="fisher"),
    }
    if compiled:
        functions = {name: jit(fn) for name, fn in list(functions.items())[:4]}
    else:
        functions |= {
            "norms by vmap": lambda p, b, x, v: analysis.per_sample_grad_norms(objective, p, b, x, method="vmap"),
            "norms, last layer": lambda p, b, x, v: analysis.per_sample_grad_norms(
                objective, p, b, x, method="last_layer"
            ),
            "losses": lambda p, b, x, v: analysis.per_sample_losses(objective, p, b, x),
            "clipped": lambda p, b, x, v: analysis.clipped_grads(objective, p, b, x, max_norm=1.0),
        }
    return {name: lambda fn=fn: fn(params, buffers, batch, v) for name, fn in functions.items()}  # type: ignore[misc]


def others(model: Any, params: Any, buffers: Any, batch: Any) -> tuple[Rows, dict[str, str]]:
    """The same quantities by libraries that are installed."""
    images, labels = batch
    rows: Rows = {}
    for add in (opacus_rows, backpack_rows, pyhessian_rows, curvlinops_rows):
        try:
            rows |= add(model.to_module(params, buffers).eval(), images, labels)
        except ImportError as error:
            print(f"{error.name} is not installed")
        except Exception as error:
            print(f"{add.__name__}: cannot ({type(error).__name__}: {str(error).splitlines()[0][:90]})")
    same = {"norms": "norms by taps", "hessian": "hessian product", "ggn": "ggn product"}
    return rows, {name: same[name.split()[-1]] for name in rows}


def plain() -> nn.Module:
    """Convolutions without BatchNorm, one after the other."""
    widths = (3, 32, 64, 64, 128)
    stages = [
        layer
        for inputs, outputs in itertools.pairwise(widths)
        for layer in (nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    ]
    return nn.Sequential(*stages, nn.Flatten(), nn.Linear(512, 10))


def opacus_rows(module: nn.Module, images: Any, labels: Any) -> Rows:
    from opacus.grad_sample import GradSampleModule

    hooked = GradSampleModule(module, strict=False).train()  # it looks at nothing in eval mode

    def norms() -> Any:
        hooked.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(hooked(images), labels).backward()
        return torch.stack([p.grad_sample.flatten(1).square().sum(1) for p in hooked.parameters()]).sum(0).sqrt()

    return {"opacus norms": norms}


def backpack_rows(module: nn.Module, images: Any, labels: Any) -> Rows:
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    extended, loss = extend(module), extend(nn.CrossEntropyLoss())

    def norms() -> Any:
        extended.zero_grad(set_to_none=True)
        with backpack(BatchL2Grad()):
            loss(extended(images), labels).backward()
        return len(images) * torch.stack([p.batch_l2 for p in extended.parameters()]).sum(0).sqrt()

    return {"backpack norms": norms}


def pyhessian_rows(module: nn.Module, images: Any, labels: Any) -> Rows:
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    def product() -> Any:  # it keeps the graph of the gradient, which the first product pays for
        found = hessian(module, nn.CrossEntropyLoss(), data=(images, labels), cuda=images.is_cuda)
        v = [torch.ones_like(p) for p in found.params]
        return [x.detach() for x in hessian_vector_product(found.gradsH, found.params, v)]

    return {"pyhessian hessian": product}


def curvlinops_rows(module: nn.Module, images: Any, labels: Any) -> Rows:
    from curvlinops import GGNLinearOperator, HessianLinearOperator

    named = [p.requires_grad_() for p in module.parameters()]
    rows: Rows = {}
    for name, kind in (("hessian", HessianLinearOperator), ("ggn", GGNLinearOperator)):
        operator = kind(module, nn.CrossEntropyLoss(), named, [(images, labels)], check_deterministic=False)
        v = torch.ones(operator.shape[1], device=images.device)
        rows[f"curvlinops {name}"] = lambda operator=operator, v=v: operator @ v  # type: ignore[misc]
    return rows


# --- reports -----------------------------------------------------------------------------------------------------


def report_analyses(args: argparse.Namespace) -> None:
    model = lift(plain) if args.model == "plain" else models.create(args.model, num_classes=10)
    objective = analysis.in_eval_mode(train.supervised(model, losses.cross_entropy))
    params, buffers = model.init(random.key(0), device=args.device)
    x = random.normal(random.key(1), (args.batch, 3, args.side, args.side)).to(args.device)
    state = params, buffers, (x, torch.arange(args.batch, device=args.device) % 10)
    rows, same = others(model, *state)
    print(f"{args.model}, {args.side} px, batch {args.batch}, {args.device}, {torch.get_num_threads()} threads")

    def wanted(rows: Rows) -> Rows:
        chosen = ("gradient", *args.only)
        return {name: fn for name, fn in rows.items() if not args.only or any(part in name for part in chosen)}

    rows = wanted({**own(objective, *state), **rows})
    table("eager", rows, {"norms by vmap": "norms by taps", **same}, args)
    if args.compiled:
        table("compiled", wanted(own(objective, *state, compiled=True)), {}, args)


def report_population(args: argparse.Namespace, members: int = 64) -> None:
    """Small dense networks, all at once and one after the other."""
    model = lift(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)))
    tx = optim.adamw(1e-3)
    step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx)
    states = analysis.create_population(model, tx, random.split(random.key(0), members))
    images, labels = data.digits("train")
    first, batch = {}, (images[:128], labels[:128])
    for method in ("vmap", "loop"):
        began = time.perf_counter()
        analysis.population(step, method=method)(states, batch)  # type: ignore[arg-type]
        first[method] = time.perf_counter() - began
    choice = analysis.fastest_method(step, states, batch, repeats=args.repeats)
    ratio = choice.seconds["loop"] / choice.seconds["vmap"]
    print(f"\n{members} networks of 2,410 parameters, eager: {choice}, {ratio:.1f} times faster at once")
    print(f"their first step: {', '.join(f'{name} {value * 1e3:.0f} ms' for name, value in first.items())}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help="parts of names of rows")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compiled", action="store_true")
    arguments = parser.parse_args()
    report_analyses(arguments)
    report_population(arguments)
