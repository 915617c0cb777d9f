"""What the stages of a recipe take before, between and after their work, against another checkout, turn by turn.

usage: python tests/benchmarks/start_up.py pipelines/demo.yaml --other CHECKOUT [--teacher MODEL] [--turns 3]

Each turn runs `distill` from both checkouts on a few prompts: one step, two evaluated prompts, short responses. Of each
stage the seconds are noted, and those of its work: batches that are sampled or scored, steps, a student that is cut or
saved. What is left is its start: imports, loading, hashing, trials of the model, and its end.

Prints the seconds of each start (medians over turns), of all, and of the whole command, with the ratio of each turn;
and the CPU seconds of the whole command, in which other processes on the machine have less part.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

HERE = Path(__file__).parents[2]
NOTES = """
import functools, importlib.abc, importlib.machinery, json, os, sys, time

WORK = {  # functions by module, a stage last
    "dpkd_offline.engines.transformers": ["TransformersEngine._sample", "TransformersEngine._score"],
    "dpkd_offline.training.step": ["Run.step"],
    "dpkd_offline.training.shallower": ["shallower"],
    "dpkd_offline.models.loading": ["save_student"],
    "dpkd_offline.pipeline.distill": ["_run"],
}

def noted(function):
    @functools.wraps(function)
    def timed(*args, **options):
        began = time.monotonic()
        try:
            return function(*args, **options)
        finally:
            with open(os.environ["START_UP_NOTES"], "a") as file:
                file.write(json.dumps([function.__name__, time.monotonic() - began]) + chr(10))
    return timed

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in WORK:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            for function in WORK[name]:
                *owners, last = function.split(".")
                owner = functools.reduce(getattr, owners, module)
                setattr(owner, last, noted(getattr(owner, last)))
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""
LITTLE = {  # work of each section
    "generate": {"limit": 8, "max_new_tokens": 2},
    "generate_teacher": {"limit": 8, "max_new_tokens": 2},
    "sft": {"max_steps": 1, "batch_size": 4},
    "train": {"max_steps": 1, "batch_size": 4},
    "evaluate": {"limit": 2, "max_new_tokens": 2, "seeds": [10]},
}


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(checkout: Path, recipe: Path) -> dict[str, float]:
    """The seconds of each stage without its work, in order, and of the whole."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sitecustomize.py").write_text(NOTES)
        notes = Path(folder) / "notes"
        command = [sys.executable, "-m", "dpkd_offline.cli", "distill", str(recipe), "--set", f"output={folder}/run"]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([folder, str(checkout)]),
            "DPKD_OFFLINE_VERBOSITY": "quiet",
            "START_UP_NOTES": str(notes),
        }
        began, used = time.monotonic(), cpu_seconds()
        subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=True)
        whole, used = time.monotonic() - began, cpu_seconds() - used
        titles = [
            json.loads(line)["stage"] for line in (Path(folder) / "run" / "stages.jsonl").read_text().splitlines()
        ]
        starts, work = [], 0.0
        for name, seconds in map(json.loads, notes.read_text().splitlines()):
            if name == "_run":
                starts.append(seconds - work)
                work = 0.0
            else:
                work += seconds
    stages = dict(zip(titles, starts, strict=True))
    return {**stages, "all starts": sum(starts), "distill": whole, "distill, CPU": used}


def with_little_work(recipe: Path, teacher: str | None, to: Path) -> Path:
    values = yaml.safe_load(recipe.read_text())
    for section, changes in LITTLE.items():
        if section in values:
            values[section] |= changes
        for key in ("prompts", "references"):
            if key in values.get(section, {}):
                values[section][key] = str(Path(values[section][key]).resolve())
    values["teacher"] = str(Path(teacher or values["teacher"]).resolve())
    to.write_text(yaml.safe_dump(values))
    return to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--other", type=Path, required=True)
    parser.add_argument("--teacher")
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    turns: list[tuple[dict[str, float], dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        recipe = with_little_work(arguments.recipe, arguments.teacher, Path(folder) / "recipe.yaml")
        for turn in range(arguments.turns):
            checkouts = [arguments.other, HERE]
            of_turn = {path: run(path.resolve(), recipe) for path in (checkouts if turn % 2 == 0 else checkouts[::-1])}
            turns.append((of_turn[arguments.other], of_turn[HERE]))
            print(f"turn {turn + 1} of {arguments.turns}", file=sys.stderr)
    print("| seconds | other | this | this / other, each turn |\n|---|---|---|---|")
    for name in turns[0][0]:
        other, this = (statistics.median(of_turn[i][name] for of_turn in turns) for i in (0, 1))
        ratios = ", ".join(f"{b[name] / a[name]:.2f}" for a, b in turns)
        print(f"| {name} | {other:.1f} | {this:.1f} | {ratios} |")


if __name__ == "__main__":
    main()
