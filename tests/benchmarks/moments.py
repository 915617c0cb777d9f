"""What fewer bytes for AdamW's moments change: the same run with each `--moments-dtype`, side by side.

usage: python tests/benchmarks/moments.py --dataset DATASET --student STUDENT --output FOLDER [--steps 30] [--seeds 1]

The seed is that of the order of the pairs and of the rounding. Of each dtype: the loss of the first and the last five
steps, the largest difference of a step's loss from float32's with the same seed, log q(y_t) per token and the loss on
held-out pairs, and the seconds of a step.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from tabulate import tabulate

from dpkd_offline.config.train import MOMENT_BYTES, TrainConfig
from dpkd_offline.training.trainer import train


def lines_of(options: argparse.Namespace, dtype: str, seed: int) -> tuple[list[dict[str, float]], float]:
    values = {
        "dataset": options.dataset,
        "student": str(options.student),
        "output": options.output / f"{dtype}-{seed}",
        "max_steps": options.steps,
        "seed": seed,
        "moments_dtype": dtype,
        "learning_rate": options.learning_rate,
        "holdout": 0.2,
        "validate_responses": 0,
        "validate_every": options.steps,
    }
    config = TrainConfig.model_validate(values)
    started = time.monotonic()
    train(config)
    path = config.output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()], time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("dataset", "student", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    options = parser.parse_args()
    rows = []
    for seed in range(options.seeds):
        reference: list[float] = []
        for dtype, size in MOMENT_BYTES.items():
            lines, seconds = lines_of(options, dtype, seed)
            steps = [line["loss"] for line in lines if "loss" in line]
            held_out = [line for line in lines if "val_loss_kd" in line][-1]
            reference = reference or steps
            row: dict[str, Any] = {
                "moments": dtype,
                "bytes": size,
                "seed": seed,
                "first 5": sum(steps[:5]) / 5,
                "last 5": sum(steps[-5:]) / 5,
                "largest difference": max(abs(a - b) for a, b in zip(steps, reference, strict=True)),
                "held out: log q(y_t)": held_out["val_logps_chosen"],
                "held out: loss": held_out["val_loss_kd"],
                "s": seconds,
            }
            rows.append(row)
            print(dtype, seed, [round(loss, 4) for loss in steps], flush=True)
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".4f"))


if __name__ == "__main__":
    main()
