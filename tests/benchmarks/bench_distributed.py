"""What a step on several ranks costs: measured here, and a model of more ranks on faster wires.

    python tests/benchmarks/bench_distributed.py [--ranks 2] [--params 1000000] [--images 32] [--steps 20]

Measured: a gradient, a gradient with the average, and the all-reduce alone for some sizes (gloo, one thread per rank).
The model, for a ring: a step takes ``compute + exposed * (2 (W - 1) / W * bytes / bandwidth + 2 (W - 1) * latency)``;
``exposed`` is 1 here, since the average is one collective after the backward pass, and less where it overlaps with it.
"""

import argparse
import platform
import time
from collections.abc import Callable

import torch
from torch import nn

from holofunc import distributed, lift, losses, optim, random, train

WIRES = {"PCIe 4": (20e9, 10e-6), "NVLink": (300e9, 5e-6), "100 Gbit/s": (11e9, 30e-6), "10 Gbit/s": (1.1e9, 60e-6)}
"""Bytes per second and seconds per message that are usual; figures of vendors, not measured here."""


def fastest(fn: Callable[[], object], steps: int) -> float:
    times = []
    for _ in range(steps + 2):
        distributed.psum(torch.zeros(1))  # all begin together
        began = time.perf_counter()
        fn()
        times.append(time.perf_counter() - began)
    return min(times[2:])  # others may be using the machine


def work(width: int, images: int, steps: int) -> dict[str, object]:
    def network() -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(256, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, 10)
        )

    model = lift(network)
    x, y = random.normal(random.key(0), (images, 1, 16, 16)), torch.arange(images) % 10
    found: dict[str, object] = {}
    for name, tx in {
        "alone": optim.sgd(0.1),
        "average": optim.chain(distributed.average_gradients(), optim.sgd(0.1)),
        "shard": distributed.shard(optim.sgd(0.1)),
    }.items():
        step = train.make_train_step(train.supervised(model, losses.cross_entropy), tx)
        state = train.create_state(model, tx, random.key(1))
        found[name] = fastest(lambda step=step, state=state: step(state, (x, y)), steps)  # type: ignore[misc]
        found["params"] = sum(p.numel() for p in state.params.values())
    found["wire"] = {n: fastest(lambda n=n: distributed.psum(torch.zeros(n)), steps) for n in (1, 1 << 14, 1 << 20)}  # type: ignore[misc]
    return found


def predicted(compute: float, size: float, ranks: int, bandwidth: float, latency: float, exposed: float = 1.0) -> float:
    return compute + exposed * (2 * (ranks - 1) / ranks * size / bandwidth + 2 * (ranks - 1) * latency)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {"ranks": 2, "params": 1_000_000, "images": 32, "steps": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    found = distributed.launch(work, options.ranks, int(options.params**0.5), options.images, options.steps)[0]
    print(f"torch {torch.__version__}, {platform.machine()}, {options.ranks} ranks, gloo, fastest of {options.steps}")
    print(f"{found['params']:,} parameters, {options.images} images per rank")
    for name in ("alone", "average", "shard"):
        print(f"  step, {name:8}{1e3 * found[name]:9.2f} ms{found[name] / found['alone']:8.2f} x")
    for count, seconds in found["wire"].items():
        print(f"  psum of {4 * count:>9,} bytes{1e3 * seconds:9.3f} ms")
    small, large = found["wire"][1], found["wire"][1 << 20]
    latency = small / (2 * (options.ranks - 1))
    bandwidth = 2 * (options.ranks - 1) / options.ranks * (4 << 20) / max(large - small, 1e-9)
    size = 4 * found["params"]
    told = predicted(found["alone"], size, options.ranks, bandwidth, latency)
    print(f"gloo here: {bandwidth / 1e9:.2f} GB/s, {1e6 * latency:.0f} us per message")
    print(
        f"  the model says {1e3 * told:.2f} ms for a step with the average, measured were {1e3 * found['average']:.2f} ms"
    )
    print("\nefficiency (time alone / time on W ranks, equal parts) that the model gives for this step")
    print(f"  {'':12}" + "".join(f"{ranks:>8}" for ranks in (2, 4, 8, 32, 128)))
    for name, wire in {"gloo here": (bandwidth, latency), **WIRES}.items():
        shares = [found["alone"] / predicted(found["alone"], size, r, *wire) for r in (2, 4, 8, 32, 128)]
        print(f"  {name:12}" + "".join(f"{share:8.1%}" for share in shares))


if __name__ == "__main__":
    main()
