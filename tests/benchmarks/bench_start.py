"""How long the first step of a run takes in a new process: with empty caches, with those of an earlier process.

    python tests/benchmarks/bench_start.py [model ...]

Inductor's caches, of graphs and of what the C++ compiler made, lie in ``TORCHINDUCTOR_CACHE_DIR``.
"""

import json
import os
import subprocess
import sys
import tempfile

PROGRAM = """
import json, sys, time
import torch
from holofunc import jit, losses, models, optim, random, train
model = models.create(sys.argv[1], num_classes=10)
size = int(sys.argv[2])
tx = optim.adamw(1e-3)
state = train.create_state(model, tx, random.key(0))
batch = random.normal(random.key(1), (8, 3, size, size)), torch.arange(8) % 10
step = jit(train.make_train_step(train.supervised(model, losses.cross_entropy), tx), donate=True)
began = time.perf_counter()
state, metrics = step(state, batch)
first = time.perf_counter() - began
began = time.perf_counter()
state, metrics = step(state, batch)
print(json.dumps({"first": first, "next": time.perf_counter() - began, "loss": float(metrics["loss"])}))
"""


def started(name: str, size: int, cache: str) -> dict[str, float]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, name, str(size)], env=environment, capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    print("| model | first start, s | second start, s | second / first | a step, s |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in sys.argv[1:] or ["resnet18", "mobileone_s0"]:
        with tempfile.TemporaryDirectory() as cache:
            first, second = started(name, 32, cache), started(name, 32, cache)
        assert first["loss"] == second["loss"]
        ratio = second["first"] / first["first"]
        print(f"| {name} | {first['first']:.1f} | {second['first']:.1f} | {ratio:.2f} | {second['next']:.2f} |")


if __name__ == "__main__":
    main()
