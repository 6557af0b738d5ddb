"""Memory and time of a step whose activations are kept, and computed again (`supervised(remat=)`), each in a new process.

    python tests/benchmarks/bench_remat.py

Printed is by how much the peak of the process's memory grows over that before the step, in MiB.
"""

import json
import subprocess
import sys

PROGRAM = """
import json, sys, time
import torch
from torch import nn
from holofunc import jit, lift, losses, optim, random, train
def block(): return nn.Sequential(*[layer for _ in range(3) for layer in (nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.SiLU())])
model = lift(lambda: nn.Sequential(nn.Conv2d(3, 32, 1), *[block() for _ in range(6)], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)))
tx = optim.sgd(0.1)
state = train.create_state(model, tx, random.key(0))
batch = random.normal(random.key(1), (16, 3, 48, 48)), torch.arange(16) % 10
remat, compiled = sys.argv[1] == "again", sys.argv[2] == "compiled"
objective = train.supervised(model, losses.cross_entropy, remat="[1-6]" if remat else ())
step = train.make_train_step(objective, tx)
step = jit(step) if compiled else step
if compiled:
    step(state, batch)  # what compiling takes is not what a step takes
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
def high(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
before = high()
_, metrics = step(state, batch)
grown = high() - before
began = time.perf_counter()
for _ in range(3):
    step(state, batch)
print(json.dumps([grown, (time.perf_counter() - began) / 3, float(metrics["loss"])]))
"""


def main() -> None:
    print("| step | kept, MiB | again, MiB | kept, s | again, s |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for mode in ("eager", "compiled"):
        found = []
        for way in ("kept", "again"):
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, way, mode], capture_output=True, text=True, check=True
            )
            found.append(json.loads(done.stdout.splitlines()[-1]))
        assert abs(found[0][2] - found[1][2]) < 1e-4
        memory, seconds = ([f"{each[i]:.{d}f}" for each in found] for i, d in ((0, 0), (1, 2)))
        print(f"| {mode} | {' | '.join([*memory, *seconds])} |")


if __name__ == "__main__":
    main()
