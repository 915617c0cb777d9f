"""What came of a study: means over seeds with their intervals, differences to the baseline, and what training took.

Everything follows from the files of the study, so that whichever process writes `results.json` and `results.md`, they
are the same but for times.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from dpkd_offline.common.files import find_json, find_model, read_bounded, write_atomically, write_json
from dpkd_offline.evaluation.summary import RESPONSES, RESULTS, values_by_prompt
from dpkd_offline.evaluation.table import QUALITY, SHARES
from dpkd_offline.evaluation.task_results import tasks_of
from dpkd_offline.generation.health import dataset_warnings
from dpkd_offline.metrics.intervals import Difference, interval_over_seeds, mean_and_spread
from dpkd_offline.pipeline.study_layout import StudyLayout, StudyRun
from dpkd_offline.pipeline.study_table import study_table
from dpkd_offline.pipeline.throughput import LARGEST_RECORD, RECORD
from dpkd_offline.training.record import TrainingRecord

Results = dict[str, Any]
Values = npt.NDArray[np.float64]
FAILED = "failed.json"  # in a unit's folder: which of its stages ended with an error
FIRST = "start-1"  # whose responses have no name in the dataset
DONE, RUINED, FAILED_RUN, NOT_YET = "done", "ruined", "failed", "not trained"


@dataclass(frozen=True)
class Run:
    """A student trained with one seed, as its folder and that of its start say."""

    seed: int
    folder: Path
    state: str
    why: str | None  # what happened, where it is not done
    training: TrainingRecord | None
    seconds: float  # of training and its rounds, in this folder, all tries together

    @classmethod
    def read(cls, root: Path, layout: StudyLayout, name: str, run: StudyRun) -> Run:
        folder = root / run.folder
        training = find_model(folder / "student" / "training.json", TrainingRecord)
        places = (folder, root / layout.starts[layout.students[name].start].folder, root)
        failure = next((found for place in places if (found := find_json(place / FAILED)) is not None), None)
        evaluated = layout.teacher is None or (folder / "evaluation" / RESULTS).exists()
        state, why = DONE, None
        if failure is not None:
            state, why = FAILED_RUN, f"{failure['stage']} ended with exit code {failure['exit_code']}"
        elif training is None or not evaluated:
            state = NOT_YET
        elif training.ruined is not None:
            state, why = RUINED, training.ruined
        return cls(run.seed, folder, state, why, training, sum(_seconds(folder)))


def _seconds(folder: Path) -> Iterator[float]:
    """Of the stages that trained a student, not of those that looked at it."""
    path = folder / RECORD
    if path.exists():
        for line in read_bounded(path, LARGEST_RECORD).splitlines():
            stage = json.loads(line)
            if not stage["stage"].startswith(("evaluate", "judge")):
                yield stage["seconds"]


@dataclass(frozen=True)
class Evaluated:
    """The evaluations of one student with one set of prompts, a row for each seed that has one."""

    runs: Sequence[Run]
    set_name: str  # empty where there is one set without a name
    _values: dict[Path, dict[str, tuple[list[str], dict[str, float]]]] = field(default_factory=dict, repr=False)

    @cached_property
    def by_seed(self) -> dict[int, dict[str, tuple[list[str], dict[str, float]]]]:
        folders = {run.seed: run.folder / "evaluation" / self.set_name for run in self.runs}
        return {seed: values_by_prompt(f) for seed, f in folders.items() if (f / RESPONSES).exists()}

    @cached_property
    def prompts(self) -> list[str]:
        first, *others = self.by_seed.values()
        return [prompt for prompt in first if all(prompt in other for other in others)]

    @property
    def measures(self) -> list[str]:
        return list(next(iter(next(iter(self.by_seed.values())).values()))[1])

    def values(self, measure: str, seeds: Sequence[int] | None = None) -> Values:
        """[seeds, prompts]"""
        chosen = [self.by_seed[seed] for seed in (seeds or self.by_seed)]
        return np.array([[of[prompt][1][measure] for prompt in self.prompts] for of in chosen])


def collect_results(root: Path, layout: StudyLayout) -> Results:
    """Write results.json and results.md of a study."""
    results = study_results(root, layout)
    write_json(root / RESULTS, results)
    write_atomically(root / "results.md", (study_table(results) + "\n").encode())
    return results


def study_results(root: Path, layout: StudyLayout) -> Results:
    """What is known of the students of a study; of what is not done yet, that it is not."""
    results: Results = {"baseline": layout.baseline, "seeds": layout.seeds, "starts": {}, "students": {}}
    if layout.teacher is not None and (numbers := find_json(root / layout.teacher / RESULTS)) is not None:
        results = {"teacher": numbers, **results}
    for name, start in layout.starts.items():
        found = {"before": start.before, "warm": start.warm}
        results["starts"][name] = {
            when: numbers
            for when, folder in found.items()
            if folder is not None and (numbers := find_json(root / folder / RESULTS)) is not None
        }
    runs = {
        name: [Run.read(root, layout, name, run) for run in student.runs] for name, student in layout.students.items()
    }
    sets = _sets(results)
    for name in runs:
        results["students"][name] = _student(root, layout, name, runs, sets)
    results["warnings"] = _warnings(root, layout, runs)
    return results


def _sets(results: Results) -> list[str]:
    """The names of the prompt sets that students are evaluated on; one that is empty where there is a single set."""
    evaluations = [results.get("teacher"), *(start.get("before") for start in results["starts"].values())]
    first = next((numbers for numbers in evaluations if numbers), None)
    return [] if first is None else list(first.get("sets", {"": None}))


def _student(
    root: Path, layout: StudyLayout, name: str, runs: Mapping[str, Sequence[Run]], sets: Sequence[str]
) -> Results:
    own, start = runs[name], layout.students[name].start
    result: Results = {"start": start, "state": _state(own)}
    result["runs"] = {str(run.seed): {"state": run.state, **({"why": run.why} if run.why else {})} for run in own}
    trained = [run for run in own if run.training is not None]
    if trained:
        mean, spread = mean_and_spread([run.seconds for run in trained])
        result["training_seconds"] = {"mean": mean, "spread": spread, "by_seed": [run.seconds for run in trained]}
    measured = {}
    for set_name in sets:
        evaluated = Evaluated(own, set_name)
        if evaluated.by_seed:
            before = layout.starts[start].before
            measured[set_name] = _measures(evaluated) | {
                "difference_to_before": _difference(evaluated, root, before, layout.teacher),
                **_to_baseline(evaluated, layout, name, runs),
            }
    if measured:
        result |= {"sets": measured} if "" not in measured else measured[""]
    return result | _tasks(own) | _judgement(own)


def _state(runs: Sequence[Run]) -> str:
    """`done`, or what happened with which seeds."""
    states: dict[str, list[int]] = defaultdict(list)
    for run in runs:
        states[run.state].append(run.seed)
    if len(states) == 1:
        return next(iter(states))
    parts = [f"{state} with seed {', '.join(map(str, seeds))}" for state, seeds in states.items() if state != DONE]
    return "; ".join(parts)


def _measures(evaluated: Evaluated) -> Results:
    """As results.json of an evaluation has them, with intervals over seeds and prompts."""
    seeds = list(evaluated.by_seed)
    result: Results = {"prompts": len(evaluated.prompts), "seeds": seeds}
    for measure in evaluated.measures:
        values = evaluated.values(measure)
        by_seed = values.mean(1).tolist()
        mean, spread = mean_and_spread(by_seed)
        interval = interval_over_seeds(values)
        result[measure] = {"mean": mean, "spread": spread, "by_seed": by_seed, "interval": interval}
    numbers = [
        found
        for run in evaluated.runs
        if (found := find_json(run.folder / "evaluation" / evaluated.set_name / RESULTS)) is not None
    ]
    for share in SHARES:
        if any(share in of_seed for of_seed in numbers):
            result[share] = fmean(of_seed.get(share, 0.0) for of_seed in numbers)
    return result


def _difference(evaluated: Evaluated, root: Path, before: str | None, teacher: str | None) -> Results:
    """To the start of the student, prompt by prompt, and what share of its gap to the teacher is closed."""
    if before is None or not (folder := root / before / evaluated.set_name / RESPONSES).exists():
        return {}
    first = values_by_prompt(folder.parent)
    of_teacher = values_by_prompt(root / teacher / evaluated.set_name) if teacher is not None else {}
    result: Results = {}
    for measure in evaluated.measures:
        start = np.array([first[prompt][1][measure] for prompt in evaluated.prompts])
        result[measure] = _worded(Difference.of(start, evaluated.values(measure)), measure)
        if measure in QUALITY and of_teacher:
            gap = Difference.of(start, [of_teacher[prompt][1][measure] for prompt in evaluated.prompts])
            if gap.sign == QUALITY[measure]:
                result[measure]["gap_closed"] = result[measure]["mean"] / gap.mean
    return result


def _to_baseline(
    evaluated: Evaluated, layout: StudyLayout, name: str, runs: Mapping[str, Sequence[Run]]
) -> dict[str, Results]:
    """Seed by seed and prompt by prompt, on the seeds that both have."""
    if layout.baseline in (None, name):
        return {}
    other = Evaluated(runs[str(layout.baseline)], evaluated.set_name)
    seeds = [seed for seed in evaluated.by_seed if seed in other.by_seed]
    if not seeds:
        return {}
    result: Results = {}
    for measure in evaluated.measures:
        values = (of.values(measure, seeds) for of in (other, evaluated))
        result[measure] = _worded(Difference.of(*values), measure)
    return {"difference": {"seeds": seeds, **result}}


def _worded(difference: Difference, measure: str) -> Results:
    better = QUALITY.get(measure, 0)
    return asdict(difference) | ({"verdict": difference.word(better)} if better else {})


def _tasks(runs: Sequence[Run]) -> Results:
    """Benchmarks: the main metric's mean over seeds, with the larger of its errors over questions and over seeds."""
    found = [tasks_of(n) for run in runs if (n := find_json(run.folder / "evaluation" / RESULTS)) is not None]
    results = {}
    for task in dict.fromkeys(name for tasks in found for name in tasks):
        of_task = [tasks[task] for tasks in found if task in tasks]
        name = of_task[0].main_metric
        metrics = [of.metrics[name] for of in of_task if name in of.metrics]
        values = [metric.value for metric in metrics if metric.value is not None]
        if values:
            mean, spread = mean_and_spread(values)
            errors = [metric.stderr for metric in metrics if metric.stderr is not None]
            stderr = max(fmean(errors), spread / len(values) ** 0.5) if errors else None
            metric = metrics[0].model_copy(update={"value": mean, "stderr": stderr})
            whole = of_task[0].model_copy(update={"metrics": {name: metric}, "subtasks": {}})
            results[task] = whole.model_dump() | {"by_seed": values}
    return {"tasks": results} if results else {}


def _judgement(runs: Sequence[Run]) -> Results:
    """How often the student is preferred to its start, or how its responses are scored, over seeds and prompts."""
    folders = [run.folder / "judge" for run in runs]
    found = [(folder, n) for folder in folders if (n := find_json(folder / RESULTS)) is not None]
    if not found:
        return {}
    name = "ratio_of_sums" if found[0][1]["form"] == "score" else "win_rate"
    by_seed = [numbers[name] for _, numbers in found]
    mean, spread = mean_and_spread(by_seed)
    result: Results = {"mean": mean, "spread": spread, "by_seed": by_seed}
    if name == "win_rate":
        outcomes = [_outcomes(folder) for folder, _ in found]
        both = [prompt for prompt in outcomes[0] if all(prompt in of for of in outcomes)]
        if both:
            result["interval"] = interval_over_seeds(np.array([[of[prompt] for prompt in both] for of in outcomes]))
    elif len(found) == 1:
        result["interval"] = found[0][1].get("ratio_of_sums_interval")
    return {"judge": {"judge": found[0][1]["judge"], name: result}}


def _outcomes(folder: Path) -> dict[str, float]:
    """Of each prompt, in percent, how often the student wins in both orders; a tie counts half."""
    values: dict[tuple[str, int], list[float | None]] = defaultdict(list)
    for line in (folder / "verdicts.jsonl").read_text(encoding="utf-8").splitlines():
        verdict = json.loads(line)
        values[verdict["id"], verdict["seed"]].append(verdict["value"])
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for (prompt, _), orders in values.items():
        known = [value for value in orders if value is not None]
        if len(known) == 2:
            wins, losses = (all(value > 0.5 for value in known), all(value < 0.5 for value in known))
            by_prompt[prompt].append(50.0 * (1 + wins - losses))
    return {prompt: fmean(outcomes) for prompt, outcomes in by_prompt.items()}


def _warnings(root: Path, layout: StudyLayout, runs: Mapping[str, Sequence[Run]]) -> list[str]:
    """What the stages said of responses, pairs and students, as it follows from what they left."""
    warnings: list[str] = []
    for name, start in layout.starts.items():
        of_start = dataset_warnings(root / "dataset", start.student_name)
        warnings += [w if name == FIRST else f"{name}: {w}" for w in of_start if name == FIRST or w not in warnings]
        for part in ("student-sft", "student-warm"):
            training = find_model(root / start.folder / part / "training.json", TrainingRecord)
            warnings += [f"{name}, {part}: step {w.step}: {w.warning}" for w in (training.warnings if training else ())]
    for name, of_student in runs.items():
        for run in of_student:
            if run.why is not None:
                warnings.append(f"{name}, seed {run.seed}: {run.state}: {run.why}")
            of_rounds = dataset_warnings(root / "dataset", f"{name}.seed-{run.seed}")  # where it has any of its own
            warnings += [f"{name}, seed {run.seed}: {w}" for w in of_rounds if w not in warnings]
            of_run = run.training.warnings if run.training else ()
            warnings += [f"{name}, seed {run.seed}: step {w.step}: {w.warning}" for w in of_run]
    return warnings
