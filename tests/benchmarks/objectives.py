"""What each objective makes of a mild cut, a deep cut and a far student: held-out pairs, and the student's responses.

usage: python tests/benchmarks/objectives.py FOLDER --teacher MODEL [--ways "dpkd;seqkd"] [--seeds 0,1,2] ...

The students are the teacher with 24, 18 and 12 of its 30 layers, after 8, 20 and 20 steps of SFT. Makes in FOLDER what
is not there yet: the students, pairs of each to train on and held-out ones, with the teacher's likeliest tokens; then
trains in each way, with each seed, on the same pairs and as many steps, and samples responses to the held-out prompts.
All of it by the commands that a user has; the same call goes on where it stopped.

Prints a Markdown table, a row for the students before and one for each way; in a cell mean ± standard deviation over
the seeds of training (where there are several):
- log q(y_t): nats a token, of the held-out pairs
- Rouge-L, teacher NLL (nats a token), cut off: of one response to each held-out prompt, sampled at temperature 1
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import islice, product
from pathlib import Path
from queue import SimpleQueue
from statistics import fmean, stdev
from typing import Any

import torch

from dpkd_offline.common.files import read_json
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.pipeline.starter import Starter
from dpkd_offline.training.distributed import Processes
from dpkd_offline.training.examples import pair_stream
from dpkd_offline.training.objectives import facts_of, score
from dpkd_offline.training.student import load_student
from dpkd_offline.training.validation import MEASURED

DATA = Path(__file__).parents[2] / "data" / "demo"
PLAIN = ["--off-policy", "none", "--chosen-nll-weight", 0]
WAYS: dict[str, list[object]] = {
    "dpkd": [],
    "dpkd, without the anchor": ["--chosen-nll-weight", 0],
    "dpkd, as the paper prints it": PLAIN,
    "dpkd-sum": ["--objective", "dpkd-sum"],
    "dpkd-sum, as the paper prints it": ["--objective", "dpkd-sum", *PLAIN],
    "ipo": ["--objective", "ipo"],
    "ipo, as the paper prints it": ["--objective", "ipo", *PLAIN],
    "cpo": ["--objective", "cpo"],
    "cpo, as its paper prints it": ["--objective", "cpo", *PLAIN],
    "simpo": ["--objective", "simpo", "--gamma", 1],
    "simpo, as the paper prints it": ["--objective", "simpo", "--gamma", 1, *PLAIN],
    **{name: ["--objective", name] for name in ("dpkd-token", "sft", "seqkd", "kd", "rkl", "akl", "minillm")},
}
STUDENTS = {24: 8, 18: 20, 12: 20}  # layers, and steps of SFT
Measures = dict[str, float]
MEASURES = {"logps_chosen": ".2f", "rouge_l": ".1f", "teacher_nll": ".2f", "cut_off": ".0%"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folder", type=Path)
    add("--teacher", required=True, help="a model folder; pipelines/demo_teacher.py makes the demo's")
    add("--layers", type=lambda text: list(map(int, text.split(","))), default=list(STUDENTS))
    add("--ways", type=lambda text: text.split(";"), default=list(WAYS), help="of those above, separated by ;")
    add("--seeds", type=lambda text: list(map(int, text.split(","))), default=[0, 1, 2], help="of training")
    add("--steps", type=int, default=30)
    add("--batch-size", type=int, default=8)
    add("--learning-rate", type=float, default=5e-5)
    add("--max-new-tokens", type=int, default=64)
    add("--top-k", type=int, default=16)
    add("--engine", default="transformers", help="of the data and the evaluation")
    add("--jobs", type=int, default=1, help="students that are trained at once, such as on a GPU")
    add(
        "--train", type=str.split, default=["--micro-batch-tokens", 1280], help="what else train is told: --train='...'"
    )
    add("--keep", action="store_true", help="keep the trained students, 300 MB each")
    return parser.parse_args()


STARTERS: SimpleQueue[Starter] = SimpleQueue()  # as many as students are trained at once


def run(*words: object) -> None:
    """A command as a user gives it, as a fork of a process that has imported; what it says goes to stderr."""
    command = list(map(str, words))
    print("$ dpkd-offline", *command, file=sys.stderr, flush=True)
    starter = STARTERS.get()
    try:
        with starter.start(command, os.environ) as stage:
            if code := stage.wait():
                raise RuntimeError(f"{command[0]} ended with exit code {code}")
    finally:
        STARTERS.put(starter)


def responses_of_teacher(options: argparse.Namespace, name: str) -> Path:
    """A dataset with the teacher's responses to the demo's prompts of this name."""
    folder: Path = options.folder / name
    how = ["--prompts", DATA / f"{name}.jsonl", "--limit", 280, "--max-prompt-tokens", 96, "--temperature", 0.5]
    how += ["--max-new-tokens", options.max_new_tokens, "--engine", options.engine, "--batch-size", 64]
    run("generate", "--dataset", folder, "--role", "teacher", "--model", options.teacher, *how)
    return folder


def student_of(options: argparse.Namespace, layers: int, prompts: Path) -> str:
    """A cut of the teacher after a short fine-tuning on the references."""
    cut, student = options.folder / f"cut-{layers}", options.folder / f"student-{layers}"
    run("init-student", "--teacher", options.teacher, "--output", cut, "--layers", layers)
    how = ["--objective", "sft", "--max-steps", STUDENTS.get(layers, 20), "--batch-size", 16, "--learning-rate", 3e-4]
    run("train", "--dataset", prompts, "--student", cut, "--output", student, "--holdout", 0, *how)
    return str(student)


def pairs_of(options: argparse.Namespace, student: str, layers: int, base: Path) -> Path:
    """The same prompts and y_t with y_s of this student, the log-probs and the teacher's likeliest tokens."""
    folder = base.with_name(f"{base.name}-{layers}")
    if not folder.exists():
        making = folder.with_name(f".{folder.name}")
        shutil.rmtree(making, ignore_errors=True)
        shutil.copytree(base, making)
        making.rename(folder)
    how = ["--dataset", folder, "--engine", options.engine]
    new = ["--max-new-tokens", options.max_new_tokens, "--batch-size", 64]
    run("generate", "--role", "student", "--model", student, *new, *how)
    run("score-teacher", "--model", options.teacher, "--top-k", options.top_k, "--batch-size", 16, *how)
    return folder


@torch.no_grad()
def of_held_out(model: str, dataset: Path) -> float:
    """log q(y_t) in nats a token, the mean over held-out pairs."""
    values = {"dataset": dataset, "student": model, "output": "none", "holdout": 0.0}
    config = TrainConfig.model_validate(values)
    stream, _ = pair_stream(Dataset.open(dataset), config, ModelInfo(model).vocab_size)
    student = load_student(config, Processes()).to(getattr(torch, config.precision))
    sums: Counter[str] = Counter()
    for examples in islice(stream.batches(8), -(-len(stream) // 8)):
        sums.update({k: float(v) for k, v in facts_of(score(student, MEASURED, examples, config)).items()})
    return sums["logps_chosen"] / len(stream)


def measures_of(options: argparse.Namespace, pool: Executor, model: str, layers: int, output: Path) -> Measures:
    """What MEASURES says, of one model; kept in a file, as the model need not be."""
    done = output.with_suffix(".json")
    if not done.exists():
        how = ["--prompts", DATA / "test.jsonl", "--max-new-tokens", options.max_new_tokens, "--batch-size", 63]
        how += ["--seeds", 10, "--teacher", options.teacher, "--engine", options.engine]
        run("evaluate", "--model", model, "--output", output, *how)
        results: dict[str, Any] = read_json(output / "results.json")
        of_responses = {name: results[name]["mean"] for name in ("rouge_l", "teacher_nll")}
        logps_chosen = pool.submit(of_held_out, model, options.folder / f"test-{layers}").result()
        measures = {"logps_chosen": logps_chosen, "cut_off": results["truncated"], **of_responses}
        done.write_text(json.dumps(measures))
    return dict(read_json(done))


def trained(options: argparse.Namespace, pool: Executor, way: str, seed: int, student: str, layers: int) -> Measures:
    """The measures of a student after training."""
    folder: Path = options.folder / "runs" / f"{way} {layers} {seed}".replace(", ", "-").replace(" ", "-")
    results = folder.with_name(f"{folder.name}-results")
    if not results.with_suffix(".json").exists():
        how = ["--max-steps", options.steps, "--batch-size", options.batch_size, "--holdout", 0, "--seed", seed]
        how += ["--learning-rate", options.learning_rate, *options.train]
        pairs = options.folder / f"train-{layers}"
        run("train", "--dataset", pairs, "--student", student, "--output", folder, *how, *WAYS[way])
    measures = measures_of(options, pool, str(folder), layers, results)
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return measures


def cells(of_seeds: Sequence[Measures]) -> Iterator[str]:
    for name, form in MEASURES.items():
        values = [measures[name] for measures in of_seeds]
        spread = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
        yield f"{fmean(values):{form}}{spread}"


def main() -> None:
    options = arguments()
    starters = [Starter() for _ in range(options.jobs)]
    for starter in starters:
        STARTERS.put(starter)
    apart = multiprocessing.get_context("spawn")  # this process asks for no device
    with ThreadPoolExecutor(options.jobs) as threads, ProcessPoolExecutor(options.jobs, apart) as pool:
        names = ("train", "test")
        base = dict(zip(names, threads.map(lambda name: responses_of_teacher(options, name), names), strict=True))

        def prepared(layers: int) -> str:
            student = student_of(options, layers, base["train"])
            for dataset in base.values():
                pairs_of(options, student, layers, dataset)
            return student

        def before(layers: int) -> Measures:
            return measures_of(options, pool, students[layers], layers, options.folder / f"before-{layers}")

        def after(run: tuple[int, int, str]) -> Measures:
            seed, layers, way = run
            return trained(options, pool, way, seed, students[layers], layers)

        students = dict(zip(options.layers, threads.map(prepared, options.layers), strict=True))
        of_start = dict(zip(students, threads.map(before, students), strict=True))
        runs = list(product(options.seeds, students, options.ways))
        of_runs = dict(zip(runs, threads.map(after, runs), strict=True))
    for starter in starters:
        starter.close()
    titles = [f"{name}, {layers} layers" for layers in students for name in ("log q(y_t)", "Rouge-L", "NLL", "cut off")]
    print("| | " + " | ".join(titles) + " |\n" + "|---" * (len(titles) + 1) + "|")
    rows = {"before": {layers: [of_start[layers]] for layers in students}}
    for way in options.ways:
        rows[way] = {layers: [of_runs[seed, layers, way] for seed in options.seeds] for layers in students}
    for name, of_seeds in rows.items():
        print(f"| {name} | " + " | ".join(cell for layers in students for cell in cells(of_seeds[layers])) + " |")
    print(f"\n{options.steps} steps of {options.batch_size} pairs, learning rate {options.learning_rate:g}")


if __name__ == "__main__":
    main()
