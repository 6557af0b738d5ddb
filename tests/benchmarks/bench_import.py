"""The time of ``import holofunc`` against that of ``import torch``.

    python tests/benchmarks/bench_import.py [--rounds 9]

Fresh processes, in alternation; medians.
"""

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = {"import torch": "import torch", "import holofunc": "import holofunc"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(options.rounds + 1):  # the first round fills the page cache
        for name, code in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            times[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}
    for name, found in medians.items():
        print(f"{name:>18}  {found:.2f} s  {found / medians['import torch']:.2f}x")


if __name__ == "__main__":
    main()
