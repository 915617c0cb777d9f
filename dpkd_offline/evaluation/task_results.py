"""What benchmarks say of a model, and how that is shown beside the other measures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

FORM = ".4f"  # as lm-eval prints them: an accuracy is a share, not percent


class TaskMetric(BaseModel):
    """A metric of a task. None: lm-eval has no such number."""

    value: float | None
    stderr: float | None = None
    higher_is_better: bool | None = None


class TaskResult(BaseModel):
    """A task, or a group of tasks, as lm-eval reports it."""

    metrics: dict[str, TaskMetric]  # by lm-eval's names, `metric,filter`, in its order
    version: float | str | None = None
    fewshot: int | None = None  # examples in each prompt
    samples: int  # questions that were asked
    hash: str | None = None  # of questions, prompts and targets: equal where two models were asked the same
    subtasks: dict[str, TaskResult] = {}  # of a group
    made: dict[str, Any] = {}  # by what: lm-eval's version, engine, dtype, chat template; a subtask as its group

    @property
    def main_metric(self) -> str:
        """The metric that the task names first, and of its filters the last, which is the most lenient one."""
        first = next(iter(self.metrics)).partition(",")[0]
        return [name for name in self.metrics if name.partition(",")[0] == first][-1]


def tasks_of(results: Mapping[str, Any]) -> dict[str, TaskResult]:
    """The benchmarks in the results of a model, by their names."""
    return {name: TaskResult.model_validate(value) for name, value in results.get("tasks", {}).items()}


def task_columns(results: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """A column for the main metric of each benchmark of several models: its title, and a cell for each model."""
    by_model = [tasks_of(numbers) for numbers in results.values()]
    columns = {}
    for task in dict.fromkeys(name for tasks in by_model for name in tasks):
        have = [tasks[task] for tasks in by_model if task in tasks]
        name = have[0].main_metric
        better = have[0].metrics[name].higher_is_better
        arrow = {True: " ↑", False: " ↓", None: ""}[better]
        columns[_title(task, name) + arrow] = [_cell(tasks.get(task), name) for tasks in by_model]
    return columns


def task_words(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """By which benchmarks a student is better or worse than before, and by which one cannot tell.

    A difference counts if it is more than two standard errors, those of both results combined as if the questions
    were not the same: which is cautious.
    """
    told, open_ = [], []
    earlier, later = tasks_of(before), tasks_of(after)
    for task in (name for name in later if name in earlier):
        name = later[task].main_metric
        new, old = later[task].metrics[name], earlier[task].metrics.get(name, TaskMetric(value=None))
        if new.value is None or old.value is None or new.higher_is_better is None:
            continue
        gain = (new.value - old.value) * (1 if new.higher_is_better else -1)
        change = f"{_title(task, name)} ({old.value:{FORM}} → {new.value:{FORM}})"
        if new.stderr is None or old.stderr is None or abs(gain) <= 2 * math.hypot(new.stderr, old.stderr):
            open_.append(change)
        else:
            told.append(f"{'better' if gain > 0 else 'worse'} in {change}")
    return told, open_


def _title(task: str, name: str) -> str:
    metric, _, filter_ = name.partition(",")
    return f"{task} {metric}" + (f" ({filter_})" if filter_ not in ("", "none") else "")


def _cell(task: TaskResult | None, name: str) -> str:
    metric = task.metrics.get(name) if task else None
    if metric is None or metric.value is None:
        return "–"
    return f"{metric.value:{FORM}}" + (f" ± {metric.stderr:{FORM}}" if metric.stderr is not None else "")
