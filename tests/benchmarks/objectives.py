"""All objectives with one budget: what each does to held-out pairs and to the student's own responses.

usage: python tests/benchmarks/objectives.py FOLDER --teacher MODEL [--objectives dpkd,kd] [--engine vllm] ...

With the defaults, the demo's setting: the student is the teacher with 24 of its 30 layers, after a short SFT. Makes in
FOLDER what is not there yet: the student, a dataset of pairs to train on and one of held-out pairs, both with the
teacher's likeliest tokens; then trains with each objective on the same pairs, as many steps, and samples responses to
the held-out prompts. All of it by the commands that a user has; the same call goes on where it stopped.

Prints a Markdown table, a row for the student before and one for each objective:
- loss: mean over the first and over the last quarter of the steps; of minillm the reverse KL, its loss is no measure
- margin, accuracy: of the implicit rewards of held-out pairs, DPKD's, with --reward-beta whatever the objective
- forward KL, reverse KL: per token of the held-out pairs, over the stored tokens and all others as one
- Rouge-L, teacher NLL, tokens: of responses to the held-out prompts
- pairs/s: examples per second of training, from the second step on
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import torch

from dpkd_offline.checkpoint import vocab_size
from dpkd_offline.config import ObjectiveName, TrainConfig
from dpkd_offline.dataset import Dataset
from dpkd_offline.files import read_json
from dpkd_offline.objectives import OBJECTIVES, PAIR, Objective, facts_of, score, word_facts_of
from dpkd_offline.pairs import pair_stream
from dpkd_offline.processes import Processes
from dpkd_offline.trainee import load_trainee

DATA = Path(__file__).parents[2] / "data" / "demo"
SETTINGS: dict[str, list[object]] = {
    "dpkd": ["--beta", 2],
    "dpkd-sum": ["--beta", 0.1],
    "ipo": ["--tau", 0.1],
    "cpo": ["--beta", 0.1],
    "simpo": ["--beta", 2, "--gamma", 1],
    "dpkd-token": ["--beta", 0.1],
}
# Reads what every measure on held-out pairs needs, and is never trained.
MEASURED = Objective(lambda s: -s.sums[:, 0], "pair", PAIR, top_k=True)
HELD_OUT = ("margin", "accuracy", "forward_kl", "reverse_kl")
RESPONSES = ("rouge_l", "teacher_nll", "tokens")
DIGITS = {"accuracy": 2, "rouge_l": 2, "tokens": 1}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path)
    add("--teacher", required=True, help="a model folder; pipelines/demo_teacher.py makes the demo's")
    add("--student", help="by default made from the teacher, with --layers and --sft-steps")
    add("--layers", type=int, default=24)
    add("--sft-steps", type=int, default=8)
    add("--objectives", type=lambda text: text.split(","), default=list(get_args(ObjectiveName)))
    add("--train-prompts", type=Path, default=DATA / "train.jsonl")
    add("--held-out-prompts", type=Path, default=DATA / "test.jsonl")
    add("--pairs", type=int, default=120)
    add("--held-out", type=int, default=40)
    add("--max-new-tokens", type=int, default=64)
    add("--top-k", type=int, default=16)
    add("--engine", default="transformers", help="of the data and the evaluation")
    add("--steps", type=int, default=8)
    add("--batch-size", type=int, default=16)
    add("--pair-rate", type=float, default=5e-5, help="learning rate where the loss is of a pair, and of minillm")
    add("--token-rate", type=float, default=1e-4, help="learning rate where the loss is of a token")
    add("--reward-beta", type=float, default=2.0)
    add("--seeds", default="10", help="of the responses to held-out prompts, comma-separated")
    add("--dtype", default="bfloat16")
    return parser.parse_args()


def run(*words: object) -> None:
    """A command as a user gives it; what it says goes to stderr."""
    command = list(map(str, words))
    print("$ dpkd-offline", *command, file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "dpkd_offline.cli", *command], check=True, stdout=sys.stderr)


def teacher_data(given: argparse.Namespace, name: str, prompts: Path, limit: int) -> Path:
    """A dataset with the teacher's responses."""
    folder: Path = given.folder / name
    how = ["--prompts", prompts, "--limit", limit, "--max-prompt-tokens", 96, "--temperature", 0.5]
    how += ["--max-new-tokens", given.max_new_tokens, "--engine", given.engine, "--dtype", given.dtype]
    run("generate", "--dataset", folder, "--role", "teacher", "--model", given.teacher, *how)
    return folder


def student_data(given: argparse.Namespace, folder: Path, student: str) -> None:
    """The student's responses, the pairs, and the teacher's likeliest tokens."""
    how = ["--dataset", folder, "--engine", given.engine, "--dtype", given.dtype]
    run("generate", "--role", "student", "--model", student, "--max-new-tokens", given.max_new_tokens, *how)
    run("score-teacher", "--model", given.teacher, "--top-k", given.top_k, *how)


def make_student(given: argparse.Namespace, dataset: Path) -> str:
    """A cut of the teacher after a short fine-tuning, as in pipelines/demo.yaml."""
    cut = given.folder / "cut"
    if not (cut / "config.json").exists():
        run("init-student", "--teacher", given.teacher, "--output", cut, "--layers", given.layers)
    how = ["--objective", "sft", "--max-steps", given.sft_steps, "--batch-size", given.batch_size]
    how += ["--learning-rate", 3e-4, "--dtype", given.dtype]
    run("train", "--dataset", dataset, "--student", cut, "--output", given.folder / "student", *how)
    return str(given.folder / "student")


def train(given: argparse.Namespace, objective: str, student: str, dataset: Path) -> tuple[Path, float]:
    """The trained student's folder, and the learning rate that it had."""
    output: Path = given.folder / "students" / objective
    by_token = OBJECTIVES[objective].per == "token" and objective != "minillm"
    rate = given.token_rate if by_token else given.pair_rate
    how = ["--objective", objective, "--max-steps", given.steps, "--batch-size", given.batch_size]
    how += ["--learning-rate", rate, "--dtype", given.dtype, *SETTINGS.get(objective, [])]
    run("train", "--dataset", dataset, "--student", student, "--output", output, *how)
    return output, rate


def course(output: Path, objective: str) -> tuple[str, str]:
    """The loss in the first and the last quarter of the steps, and examples per second."""
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    quarter = max(len(steps) // 4, 1)
    measure = "reverse_kl" if objective == "minillm" else "loss"
    first, last = (fmean(step[measure] for step in part) for part in (steps[:quarter], steps[-quarter:]))
    return f"{first:.3f} → {last:.3f}", f"{fmean(step['pairs_per_s'] for step in steps[1:] or steps):.2f}"


@torch.no_grad()
def on_held_out(given: argparse.Namespace, model: str, dataset: Path) -> Iterator[str]:
    """The measures HELD_OUT: means over pairs, and over the tokens of both responses."""
    values = {"dataset": dataset, "student": model, "output": given.folder, "beta": given.reward_beta}
    config = TrainConfig.model_validate(values)
    stream, _ = pair_stream(Dataset.open(dataset), config, vocab_size(model), top_k=True)
    student = load_trainee(config, Processes()).to(getattr(torch, given.dtype))
    sums: Counter[str] = Counter()
    for examples in islice(stream.batches(8), -(-len(stream) // 8)):
        scored = score(student, MEASURED, examples, config)
        sums.update({**facts_of(scored), **word_facts_of(scored), "tokens": float(scored.lengths.sum())})
    for name in HELD_OUT:
        mean = sums[name] / (sums["tokens"] if name.endswith("_kl") else len(stream))
        yield f"{mean:.{DIGITS.get(name, 3)}f}"


def of_responses(given: argparse.Namespace, model: str, name: str) -> Iterator[str]:
    """The measures RESPONSES, means over prompts and seeds."""
    output = given.folder / "results" / name
    how = ["--prompts", given.held_out_prompts, "--limit", given.held_out, "--teacher", given.teacher]
    how += ["--max-new-tokens", given.max_new_tokens, "--seeds", given.seeds, "--batch-size", given.held_out]
    run("evaluate", "--model", model, "--output", output, *how, "--engine", given.engine, "--dtype", given.dtype)
    results: dict[str, Any] = read_json(output / "results.json")
    return (f"{results[measure]['mean']:.{DIGITS.get(measure, 3)}f}" for measure in RESPONSES)


def main() -> None:
    given = arguments()
    dataset = teacher_data(given, "train", given.train_prompts, given.pairs)
    held_out = teacher_data(given, "held-out", given.held_out_prompts, given.held_out)
    student = given.student or make_student(given, dataset)
    for folder in (dataset, held_out):
        student_data(given, folder, student)

    def row(name: str, model: str, rate: str, loss: str, speed: str) -> str:
        measures = [*on_held_out(given, model, held_out), *of_responses(given, model, name)]
        return "| " + " | ".join([name, rate, loss, *measures, speed]) + " |"

    rows = [row("before", student, "", "", "")]
    for objective in given.objectives:
        output, rate = train(given, objective, student, dataset)
        loss, speed = course(output, objective)
        rows.append(row(objective, str(output), f"{rate:.0e}", loss, speed))
    print(
        "| objective | learning rate | loss, first → last quarter | margin | accuracy | forward KL | reverse KL "
        "| Rouge-L | teacher NLL | tokens | pairs/s |\n" + "|---" * 11 + "|"
    )
    print(*rows, sep="\n")
    print(f"\n{given.steps} steps of {given.batch_size}; prompts: {given.pairs}, held out {given.held_out}")


if __name__ == "__main__":
    main()
