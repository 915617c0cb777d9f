"""What rounds of regeneration do: none, one, three, and where the drift is too large, with as many steps of training.

usage: python tests/benchmarks/rounds.py FOLDER --teacher MODEL [--steps 36] [--limit 280] [--seeds 0,1,2] …

The demo's recipe, by `distill`, from the root of a clone. What does not depend on rounds is made once; then each way
and seed is a run of its own. The same call goes on where it stopped.

Prints two Markdown tables:
- of each way, over the seeds: Rouge-L and the teacher's NLL of responses to the held-out prompts, mean ± standard
  deviation over seeds of training, and seconds in training, and in sampling and scoring the rounds
- of each round of the first seed: at which step it began, and the drift before and after, in nats a token
With --plot FILE.svg it draws the drift of the first seed over steps.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

DEMO = Path(__file__).parents[2] / "pipelines" / "demo.yaml"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--steps", type=int, default=36, help="of training")
    parser.add_argument("--limit", type=int, default=280, help="prompts to distil on")
    parser.add_argument("--held-out", type=int, default=63, help="prompts to evaluate on")
    parser.add_argument("--above", type=float, default=0.1, help="the drift that triggers, in nats a token")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--plot", type=Path, help="a picture of the drift over steps")
    return parser.parse_args()


def recipe(options: argparse.Namespace, output: Path, seed: int, regenerate: dict[str, Any] | None) -> Path:
    values = yaml.safe_load(DEMO.read_text())
    values |= {"teacher": options.teacher, "output": str(output)}
    for section in ("generate", "generate_teacher"):
        values[section]["limit"] = options.limit
    del values["train"]["epochs"]
    values["train"] |= {"max_steps": options.steps, "seed": seed}
    values["evaluate"]["limit"] = options.held_out
    if regenerate is not None:
        values["regenerate"] = regenerate
    output.mkdir(parents=True, exist_ok=True)
    path = output / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def distill(path: Path) -> None:
    subprocess.run([sys.executable, "-m", "dpkd_offline.cli", "distill", str(path)], check=True)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def seconds_of(run: Path) -> dict[str, float]:
    """Of training, of sampling the rounds, and of scoring them."""
    names = {"train": "train", "generate: student, round": "sampling", "score-teacher, round": "scoring"}
    return {
        name: sum(
            line["seconds"] for line in lines_of(run / "stages.jsonl") if line["stage"].rstrip(" 0123456789") == stage
        )
        for stage, name in names.items()
    }


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"


def plot(runs_of: dict[str, list[dict[str, Any]]], above: float, file: Path) -> None:
    """The first seed's drift over steps: of the fixed prompts at each measure, and of each step's own pairs."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "dpkd-offline"  # the same file of the same numbers
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.4), layout="constrained")
    for (name, runs), color in zip(runs_of.items(), ("0.45", "tab:purple", "tab:blue", "tab:orange"), strict=True):
        title = {"0": "no regeneration", "drift": f"drift above {above:g}"}.get(name, f"{name} by steps")
        measures, own = runs[0]["drift"], runs[0]["own"]
        if measures:
            steps, drift = [m["step"] for m in measures], [m["drift_kl_token"] for m in measures]
            error = [m["drift_kl_error"] * m["drift_kl_token"] / m["drift_kl"] for m in measures]
            axes.errorbar(steps, drift, error, color=color, marker="o", markersize=3, capsize=2, label=title)
        else:
            axes.plot(*zip(*own, strict=True), color=color, linestyle=":", label=f"{title}, each step's pairs")
    axes.axhline(above, color="tab:orange", linewidth=0.6, linestyle="--")
    axes.set(xlabel="step", ylabel="drift, nats a token")
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    options = arguments()
    ways: dict[str, dict[str, Any] | None] = {
        "0": None,
        "1": {"when": "steps", "every": options.steps // 2, "rounds": 1},
        "3": {"when": "steps", "every": options.steps // 4, "rounds": 3},
        "drift": {"when": "drift", "above": options.above, "every": max(options.steps // 8, 1), "rounds": 3},
    }
    base = options.folder / "base"
    distill(recipe(options, base, 0, None))
    shared = ("dataset", "student-init", "student-sft")
    runs_of: dict[str, list[dict[str, Any]]] = {}
    for name, regenerate in ways.items():
        for seed in map(int, options.seeds.split(",")):
            run = options.folder / f"{name}-seed-{seed}"
            if not run.exists():
                making = run.with_name(f".{run.name}")
                shutil.rmtree(making, ignore_errors=True)
                for part in shared:
                    shutil.copytree(base / part, making / part)
                shutil.copytree(base / "evaluation" / "teacher", making / "evaluation" / "teacher")
                shutil.copytree(base / "evaluation" / "student-before", making / "evaluation" / "student-before")
                making.rename(run)
            distill(recipe(options, run, seed, regenerate))
            results = json.loads((run / "results.json").read_text())["student-after"]
            lines = lines_of(run / "student" / "metrics.jsonl")
            drift = [line for line in lines if "drift_kl" in line]
            own = [(line["step"], line["drift"]) for line in lines if "drift" in line]
            runs_of.setdefault(name, []).append({**results, "seconds": seconds_of(run), "drift": drift, "own": own})
    print("| regenerations | Rouge-L | teacher NLL/token | rounds made | seconds in train | sampling | scoring |")
    print("|---|---|---|---|---|---|---|")
    before = json.loads((base / "results.json").read_text())["student-before"]
    print(f"| (before) | {before['rouge_l']['mean']:.2f} | {before['teacher_nll']['mean']:.2f} | | | | |")
    for name, runs in runs_of.items():
        rounds = [len({line["drift_round"] for line in run["drift"]}) - 1 if run["drift"] else 0 for run in runs]
        rouge, nll = ([run[measure]["mean"] for run in runs] for measure in ("rouge_l", "teacher_nll"))
        times = (f"{statistics.mean(run['seconds'][what] for run in runs):.0f}" for what in runs[0]["seconds"])
        print(
            f"| {name} | {spread(rouge)} | {spread(nll)} | {spread(list(map(float, rounds)))} | {' | '.join(times)} |"
        )
    print("\n| regenerations | round | step | drift before | drift after |\n|---|---|---|---|---|")
    for name, runs in runs_of.items():
        at = {(line["step"], line["drift_round"]): line["drift_kl_token"] for line in runs[0]["drift"]}
        for step, round in at:
            if (step, round - 1) in at:
                print(f"| {name} | {round} | {step} | {at[step, round - 1]:.4f} | {at[step, round]:.4f} |")
    if options.plot:
        plot(runs_of, options.above, options.plot)


if __name__ == "__main__":
    main()
