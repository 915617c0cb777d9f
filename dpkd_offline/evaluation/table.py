"""Results of several models as a table, and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, model_validator

from dpkd_offline.common.markdown import markdown_table
from dpkd_offline.evaluation.task_results import TaskResult, task_columns, task_words
from dpkd_offline.metrics.text import BROKEN, MEASURES

COLUMNS = {
    **{name: (measure.title, measure.form) for name, measure in MEASURES.items()},
    "teacher_nll": ("teacher NLL/token", ".3f"),
    "reward": ("implicit reward", ".4f"),
    "tokens": ("tokens", ".1f"),
}
# Whether more of it is better, or less.
QUALITY = {name: measure.better for name, measure in MEASURES.items() if measure.better} | {"teacher_nll": -1}


class Measured(BaseModel):
    """A measure over the seeds."""

    mean: float
    spread: float
    by_seed: list[float]


class EvaluationRecord(BaseModel):
    """results.json: the measures by their names, and what these are of."""

    model_config = ConfigDict(extra="allow")

    prompts: int
    seeds: list[int]
    truncated: float
    made: dict[str, Any]
    responses: str | None = None  # sha256 of responses.jsonl
    tasks: dict[str, TaskResult] = {}  # benchmarks

    @model_validator(mode="after")
    def _measures(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name in COLUMNS:
                Measured.model_validate(value)
        return self


def results_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Results of several models as a Markdown table: mean ± spread over the seeds, then a note and the verdict."""
    first = next(iter(results.values()))
    columns = {name: column for name, column in COLUMNS.items() if name in first}
    benchmarks = task_columns(results)
    titles = ["model", *(title for title, _ in columns.values()), "cut off", *benchmarks]
    rows = []
    for n, (model, numbers) in enumerate(results.items()):
        cells = [
            f"{numbers[name]['mean']:{form}} ± {numbers[name]['spread']:{form}}" for name, (_, form) in columns.items()
        ]
        scores = [cells_of_task[n] for cells_of_task in benchmarks.values()]
        rows.append([model.replace("-", " "), *cells, f"{numbers['truncated']:.0%}", *scores])
    prompts, seeds = first["prompts"], len(first["seeds"])
    note = f"{prompts} held-out prompts, {seeds} seeds: mean ± standard deviation over seeds"
    if benchmarks:
        note += "; benchmarks: value ± standard error, as lm-evaluation-harness reports them"
    sentence = verdict(results)
    warnings = [f"warning: {warning}" for numbers in results.values() for warning in numbers.get("warnings", ())]
    return "\n".join(
        [
            markdown_table(titles, rows),
            "",
            note,
            *(["", sentence] if sentence else []),
            *(["", *warnings] if warnings else []),
        ]
    )


def verdict(results: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Whether training made the student better, in a sentence; None where it was not evaluated before and after."""
    if not {"student-before", "student-after"} <= results.keys():
        return None
    return verdict_of(results["student-before"], results["student-after"])


def verdict_of(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Whether a student is better or worse than before, by each measure of quality.

    A difference counts if it is more than two standard errors of the seeds' means; one seed has no standard error.
    Responses that no longer end come first, since the other measures may praise them: endless repetition can contain
    more words of the reference, and be likelier for the teacher, than a proper response.
    """
    words = []
    if after["truncated"] - before["truncated"] > BROKEN:
        words = [f"worse: its responses no longer end ({before['truncated']:.0%} → {after['truncated']:.0%} cut off)"]
    for name, sign in QUALITY.items():
        if name in before and name in after:
            title, form = COLUMNS[name]
            seeds = len(after[name]["by_seed"])
            error = math.hypot(before[name]["spread"], after[name]["spread"]) / math.sqrt(seeds)
            gain = sign * (after[name]["mean"] - before[name]["mean"])
            word = "better" if gain > 0 else "worse"
            if seeds < 2 or abs(gain) <= 2 * error:
                word = "no different beyond noise"
            words.append(f"{word} in {title} ({before[name]['mean']:{form}} → {after[name]['mean']:{form}})")
    told, open_ = task_words(before, after)
    cannot_tell = f" Cannot tell by {', '.join(open_)}." if open_ else ""
    return f"The student after training is {', '.join([*words, *told])}.{cannot_tell}"
