"""Training by one process with all cores beside one process a core, turn by turn.

usage: python tests/benchmarks/processes.py DATASET --student MODEL [--other CHECKOUT] [--count 2] [--turns 3]

DATASET is scored. Each run takes the same steps of the same pairs; what is compared is the speed of a step (medians
in metrics.jsonl, without the first two). With `--other`, processes of another checkout are a third column, as of one
that adds up the gradients after the last backward pass.

Prints the pairs per second of each run, and the ratios of each turn to one process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parents[2]
WARM_UP = 2  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--student", required=True)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--count", type=int, default=os.cpu_count())
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    runs = {
        f"one process, {arguments.count} threads": (HERE, 1),
        f"{arguments.count} processes": (HERE, arguments.count),
    }
    if arguments.other:
        runs[f"{arguments.count} processes of {arguments.other.name}"] = (arguments.other.resolve(), arguments.count)
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(arguments.turns):
        speeds = {name: pairs_per_s(arguments, *run) for name, run in runs.items()}
        first = next(iter(speeds.values()))
        for name, speed in speeds.items():
            ratios[name].append(speed / first)
            print(f"turn {turn + 1}: {name}: {speed:.3f} pairs/s, {speed / first:.2f}", flush=True)
    for name, values in ratios.items():
        print(f"{name}: {', '.join(f'{value:.2f}' for value in values)}; median {statistics.median(values):.2f}")


def pairs_per_s(arguments: argparse.Namespace, checkout: Path, count: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "student"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
        options = {
            "dataset": arguments.dataset.resolve(),
            "student": arguments.student,
            "output": output,
            "batch-size": arguments.batch_size,
            "max-steps": arguments.steps,
            "holdout": 0,
            "learning-rate": 1e-6,
        }
        subprocess.run(
            [
                sys.executable,
                *launcher,
                "-m",
                "dpkd_offline.cli",
                "train",
                *(f"--{name}={value}" for name, value in options.items()),
            ],
            env={
                **os.environ,
                "PYTHONPATH": str(checkout),
                "OMP_NUM_THREADS": str(arguments.count // count),
                "HF_HUB_OFFLINE": "1",
            },
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return statistics.median([line["pairs_per_s"] for line in lines if "loss" in line][WARM_UP:])


if __name__ == "__main__":
    main()
