"""What a further student of a dataset costs, beside TRL's online distillation trainers, turn by turn.

usage: python tests/benchmarks/second_student.py FOLDER --teacher MODEL --student MODEL [--prompts FILE] [--count 64]
           [--batch 8] [--max-new-tokens 64] [--turns 3]

A dataset is made in FOLDER. Then each turn trains MODEL on the same prompts, in the same number of steps:
- by `train` on the stored pairs, and on pairs with y_s of its own, which `generate` and `score-teacher` make first
- by TRL's GKDTrainer, on its own responses alone (lmbda 1) and in half of its steps, drawn at random (its default), and
  by TRL's DistillationTrainer, on its own responses; the teacher is in memory
Each command is a process of its own. All work in bfloat16, without gradient checkpointing; ours keeps float32 masters,
TRL's weights are bfloat16 alone.

Prints a Markdown table of medians over the turns: of whole processes the seconds, those of the CPU (which other work on
the machine changes least) and the peak memory (RSS); the seconds in steps of training; and how many times as much that
is as `train` on the stored pairs needs. What the dataset cost is printed below.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parents[2] / "data" / "demo" / "train.jsonl"
TOP_K = 32
RATE = 5e-5
TRL = {
    "gkd": "TRL GKDTrainer, lmbda 1: its own responses",
    "gkd-half": "TRL GKDTrainer, lmbda 0.5: those in half of its steps, else references",
    "distillation": "TRL DistillationTrainer: its own responses",
}


@dataclass(frozen=True)
class Cost:
    """What a process took."""

    seconds: float  # all of it
    cpu: float  # seconds
    in_steps: float  # seconds, of training
    peak_gib: float

    def __add__(self, other: Cost) -> Cost:
        """Of both, one after the other."""
        peak = max(self.peak_gib, other.peak_gib)
        return Cost(self.seconds + other.seconds, self.cpu + other.cpu, self.in_steps + other.in_steps, peak)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True, help="both the first student and the second")
    parser.add_argument("--prompts", type=Path, default=DEMO, help="JSON lines: id, instruction, input, reference")
    parser.add_argument("--count", type=int, default=64, help="prompts")
    parser.add_argument("--batch", type=int, default=8, help="prompts a step")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--trl", choices=TRL, help=argparse.SUPPRESS)
    return parser.parse_args()


def process(*command: object, result: Path | None = None) -> Cost:
    """Run a process to its end. With `result`, the file where it leaves its seconds in steps."""
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {os.waitstatus_to_exitcode(status)}")
    in_steps = json.loads(result.read_text()) if result else 0.0
    return Cost(seconds, usage.ru_utime + usage.ru_stime, in_steps, usage.ru_maxrss / 2**20)


def ours(*command: object) -> Cost:
    return process("-m", "dpkd_offline.cli", *command)


def answer(options: argparse.Namespace, *name: str) -> Cost:
    """The student's responses and the pairs with them."""
    dataset, engine = ["--dataset", options.folder / "dataset"], ["--engine", "transformers", "--batch-size", 32]
    sampling = ["--max-new-tokens", options.max_new_tokens]
    sampled = ours("generate", "--role", "student", *dataset, "--model", options.student, *engine, *sampling, *name)
    return sampled + ours("score-teacher", *dataset, "--model", options.teacher, *engine, "--top-k", TOP_K, *name)


def make_dataset(options: argparse.Namespace) -> Cost:
    shutil.rmtree(options.folder / "dataset", ignore_errors=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    prompts = options.folder / "prompts.jsonl"
    prompts.write_text("".join(f"{line}\n" for line in options.prompts.read_text().splitlines()[: options.count]))
    dataset, engine = ["--dataset", options.folder / "dataset"], ["--engine", "transformers", "--batch-size", 32]
    asked = ["--prompts", prompts, "--max-new-tokens", options.max_new_tokens]
    teacher = ours("generate", "--role", "teacher", *dataset, "--model", options.teacher, *engine, *asked)
    return teacher + answer(options)


def train(options: argparse.Namespace, output: Path) -> Cost:
    shutil.rmtree(output, ignore_errors=True)
    steps = ["--batch-size", options.batch, "--max-steps", options.count // options.batch, "--learning-rate", RATE]
    where = ["--dataset", options.folder / "dataset", "--student", options.student, "--output", output]
    cost = ours("train", *where, *steps, "--holdout", 0)
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    in_steps = sum(options.batch / line["pairs_per_s"] for line in lines if "pairs_per_s" in line)
    return replace(cost, in_steps=in_steps)


def train_by_trl(options: argparse.Namespace) -> None:
    """Train by the trainer of this name, and leave the seconds in steps in a file."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    rows = list(map(json.loads, (options.folder / "prompts.jsonl").read_text().splitlines()))
    prompts = [
        [{"role": "user", "content": "\n\n".join(filter(None, (row["instruction"], row.get("input"))))}] for row in rows
    ]
    answers = [[{"role": "assistant", "content": row["reference"]}] for row in rows]
    shared: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,  # the weights are
        "per_device_train_batch_size": options.batch,
        "max_steps": options.count // options.batch,
        "learning_rate": RATE,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    models = [AutoModelForCausalLM.from_pretrained(m, dtype=torch.bfloat16) for m in (options.student, options.teacher)]
    more = {"processing_class": AutoTokenizer.from_pretrained(options.student), "callbacks": [Clock()]}
    if options.trl == "distillation":
        config = DistillationConfig(max_completion_length=options.max_new_tokens, **shared)
        trainer = DistillationTrainer(*models, config, Dataset.from_dict({"prompt": prompts}), **more)
    else:
        lmbda = {"gkd": 1.0, "gkd-half": 0.5}[options.trl]
        config = GKDConfig(max_new_tokens=options.max_new_tokens, lmbda=lmbda, **shared)
        messages = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        trainer = GKDTrainer(*models, config, train_dataset=Dataset.from_dict({"messages": messages}), **more)
    trainer.train()
    trainer.save_model()
    in_steps = sum(end - start for start, end in zip(times[::2], times[1::2], strict=True))
    (options.folder / f"{options.trl}.json").write_text(json.dumps(in_steps))
    shutil.rmtree(shared["output_dir"])


def main() -> None:
    options = arguments()
    if options.trl:
        train_by_trl(options)
        return
    made = make_dataset(options)
    costs: dict[str, list[Cost]] = {}

    def note(title: str, cost: Cost) -> None:
        costs.setdefault(title, []).append(cost)
        print(f"turn {turn + 1}: {title}: {cost.seconds:.0f} s, {cost.peak_gib:.2f} GiB", file=sys.stderr, flush=True)

    for turn in range(options.turns):
        trained = train(options, options.folder / "student")
        note("`train` on the stored pairs", trained)
        name = f"turn-{turn}"
        shutil.rmtree(options.folder / "dataset" / "students" / name, ignore_errors=True)
        own = answer(options, "--student-name", name) + trained
        note("`generate`, `score-teacher`, `train`: y_s of its own", own)
        for role, title in TRL.items():
            note(title, process(*sys.argv, "--trl", role, result=options.folder / f"{role}.json"))
    print_table(costs)
    print(f"\nThe dataset took {made.seconds:.0f} s ({made.cpu:.0f} of the CPU), up to {made.peak_gib:.2f} GiB.")


def print_table(costs: dict[str, list[Cost]]) -> None:
    print("| a further student by | s | CPU s | s in steps | GiB | × s | × CPU s | × s in steps | × GiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    medians = {
        title: [statistics.median(getattr(cost, field.name) for cost in of) for field in fields(Cost)]
        for title, of in costs.items()
    }
    first = next(iter(medians.values()))
    for title, values in medians.items():
        *times, peak = values
        ratios = " | ".join(f"{value / of:.2f}" for value, of in zip(values, first, strict=True))
        print(f"| {title} | {' | '.join(f'{time:.0f}' for time in times)} | {peak:.2f} | {ratios} |")


if __name__ == "__main__":
    main()
