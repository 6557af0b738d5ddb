"""A training step of one's own, and a small one, side by side.

    python tests/benchmarks/bench_own_step.py [--rounds 5] [--steps 20]

Printed are first calls with an empty compiler cache and medians of later ones, of ResNet-18 at 32 pixels (batch 32):
``make_train_step``'s step, one function of one's own with `grad_and_value`, ``tx.update`` and its own metrics, and the
same with the norm of the updates; then of an MLP of 10,000 parameters against eager PyTorch.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch import nn


def resnet(kind: str) -> Callable[[], object]:
    from holofunc import jit, losses, models, optim, random, train, tree

    model, tx = models.resnet18(num_classes=10), optim.adamw(1e-3)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (32,), generator=generator)
    state = train.create_state(model, tx, random.key(0), memory_format=torch.channels_last)

    def own(state, images, labels):
        def loss_fn(params):
            outputs, buffers = model.apply(params, state.buffers, images, train=True)
            return losses.cross_entropy(outputs, labels), (buffers, outputs)

        grads, (loss, (buffers, outputs)) = torch.func.grad_and_value(loss_fn, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        new = train.TrainState(
            state.step + 1, optim.apply_updates(state.params, updates), buffers, opt_state, state.key
        )
        metrics = {"loss": loss, "accuracy": (outputs.argmax(1) == labels).float().mean()}
        if kind == "own, norm of updates":
            metrics["update_norm"] = tree.global_norm(updates)
        return new, metrics

    if kind == "make_train_step":
        step = jit(train.make_train_step(train.supervised(model, losses.cross_entropy), tx), donate=True)
        held = [state]

        def run() -> None:
            held[0], _ = step(held[0], (images, labels))
    else:
        step, held = jit(own, donate=True), [state]

        def run() -> None:
            held[0], _ = step(held[0], images, labels)

    return run


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def small(kind: str) -> Callable[[], object]:
    images, labels = torch.randn(32, 64), torch.randint(0, 10, (32,))
    if kind == "MLP, eager PyTorch":
        module = mlp()
        optimizer = torch.optim.AdamW(module.parameters(), 1e-3)

        def eager() -> None:
            loss = nn.functional.cross_entropy(module(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return eager
    from holofunc import jit, lift, losses, optim, random, train

    model, tx = lift(mlp), optim.adamw(1e-3)
    step = jit(train.make_train_step(train.supervised(model, losses.cross_entropy), tx), donate=True)
    held = [train.create_state(model, tx, random.key(0))]

    def run() -> None:
        held[0], _ = step(held[0], (images, labels))

    return run


KINDS: dict[str, Callable[[str], Callable[[], object]]] = {
    **dict.fromkeys(("make_train_step", "own", "own, norm of updates"), resnet),
    **dict.fromkeys(("MLP, eager PyTorch", "MLP, jit"), small),
}
BASELINES = {"own": "make_train_step", "own, norm of updates": "own", "MLP, jit": "MLP, eager PyTorch"}


class Contender:
    """A process of its own, with an empty compiler cache."""

    def __init__(self, kind: str) -> None:
        self.cache = tempfile.mkdtemp()
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", kind],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": self.cache},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        (self.first,) = self._read()

    def _read(self) -> list[float]:
        return json.loads(self.process.stdout.readline())

    def calls(self, count: int) -> list[float]:
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        return self._read()

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        shutil.rmtree(self.cache, ignore_errors=True)


def serve(kind: str) -> None:
    torch.compile(lambda x: x + 1)(torch.ones(2))  # the compiler's own start is nobody's
    run = KINDS[kind](kind)
    print(json.dumps([timed(run)]), flush=True)
    run(), run()
    for line in sys.stdin:
        print(json.dumps([timed(run) for _ in range(int(line))]), flush=True)


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    contenders = {kind: Contender(kind) for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(options.rounds):
        for kind, contender in contenders.items():
            times[kind] += contender.calls(options.steps)
    print(f"{'':>24}{'first call s':>22}{'ms':>22}")
    for kind, contender in contenders.items():
        first, later = contender.first, 1e3 * statistics.median(times[kind])
        base = BASELINES.get(kind)
        ratios = (
            (f" ({first / contenders[base].first:.2f}x)", f" ({later / (1e3 * statistics.median(times[base])):.2f}x)")
            if base
            else ("", "")
        )
        print(f"{kind:>24}{f'{first:.1f}{ratios[0]}':>22}{f'{later:.2f}{ratios[1]}':>22}")
        contender.end()


if __name__ == "__main__":
    main()
