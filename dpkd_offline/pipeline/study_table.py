"""The results of a study as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dpkd_offline.common.markdown import markdown_table
from dpkd_offline.evaluation.table import ARROWS, BETTER, COLUMNS, NOTES, QUALITY, SHARES, measure_cell
from dpkd_offline.evaluation.task_results import task_columns

Numbers = Mapping[str, Any]
ONE_SEED = "1 seed of training"
JUDGED = {"win_rate": ("judge: win rate against the start, %", ".1f"), "ratio_of_sums": ("judge: score, %", ".1f")}


def study_table(results: Numbers) -> str:
    """One table of all models, those of the differences, and the warnings. Of several prompt sets each has its own."""
    models = _models(results)
    sets = list(next((numbers["sets"] for numbers in models.values() if "sets" in numbers), {}))
    parts = []
    for name in sets or [""]:
        of_set = {model: {**n, **n["sets"].get(name, {})} if "sets" in n else n for model, n in models.items()}
        parts += [f"{name}:"] if name else []
        parts += _blocks(results, of_set)
    if warnings := results.get("warnings"):
        parts.append("\n".join(f"warning: {warning}" for warning in warnings))
    return "\n\n".join(parts)


def _models(results: Numbers) -> dict[str, Numbers]:
    """Teacher, starts and students, as the rows of the table call them."""
    models: dict[str, Numbers] = {"teacher": results["teacher"]} if "teacher" in results else {}
    one = len(results["starts"]) == 1
    for name, start in results["starts"].items():
        for when, title in (("before", "before"), ("warm", "after the warm start")):
            if when in start:
                models[title if one else f"{name}, {title}"] = start[when]
    models |= results["students"]
    return models


def _blocks(results: Numbers, models: Mapping[str, Numbers]) -> Iterator[str]:
    columns = {name: column for name, column in COLUMNS.items() if any(name in numbers for numbers in models.values())}
    yield _main_table(models, columns)
    yield "\n".join([_note(results, models), *(NOTES[name] for name in columns if name in NOTES)])
    students = {name: models[name] for name in results["students"]}
    if (baseline := results["baseline"]) is not None:
        yield from _difference_table(students, columns, "difference", f"minus `{baseline}`")
    yield from _difference_table(students, columns, "difference_to_before", "minus its start")


def _main_table(models: Mapping[str, Numbers], columns: Mapping[str, tuple[str, str]]) -> str:
    shares = {name: title for name, title in SHARES.items() if any(name in numbers for numbers in models.values())}
    judged = [name for name in JUDGED if any(name in numbers.get("judge", {}) for numbers in models.values())]
    benchmarks = task_columns(models)
    titles = ["model", *(title + ARROWS[BETTER.get(name, 0)] for name, (title, _) in columns.items())]
    titles += [*(title + ARROWS[BETTER[name]] for name, title in shares.items()), *benchmarks]
    titles += [*(JUDGED[name][0] + ARROWS[1] for name in judged), "training, min", "state"]
    rows = []
    for n, (model, numbers) in enumerate(models.items()):
        cells = [_measured(numbers[name], form) if name in numbers else "" for name, (_, form) in columns.items()]
        cells += [f"{numbers[name]:.0%}" if name in numbers else "" for name in shares]
        cells += [of_task[n] for of_task in benchmarks.values()]
        verdicts = numbers.get("judge", {})
        cells += [_measured(verdicts[name], JUDGED[name][1]) if name in verdicts else "" for name in judged]
        seconds = numbers.get("training_seconds")
        rows.append([model, *cells, f"{seconds['mean'] / 60:.1f}" if seconds else "", numbers.get("state", "")])
    return markdown_table(titles, rows)


def _measured(measure: Numbers, form: str) -> str:
    """A mean with its interval and, of several seeds of training, its spread over them."""
    spread = f" ± {measure['spread']:{form}}" if len(measure["by_seed"]) > 1 else ""
    return measure_cell(measure, form) + spread


def _note(results: Numbers, models: Mapping[str, Numbers]) -> str:
    prompts = next((numbers["prompts"] for numbers in models.values() if "prompts" in numbers), None)
    if prompts is None:
        return "The recipe has no evaluate: students are trained and not measured."
    trained = seeds_of_training(results["seeds"], [models[name] for name in results["students"]])
    if trained == ONE_SEED:
        return (
            f"{prompts} held-out prompts, {trained}: mean [95 % interval over prompts], which says nothing of "
            f"other seeds. ± of teacher and starts is over seeds of sampling."
        )
    return (
        f"{prompts} held-out prompts, {trained}: mean [95 % interval over seeds and prompts] ± spread over seeds; "
        f"of teacher and starts, which have one training, over prompts, ± over seeds of sampling."
    )


def seeds_of_training(planned: Sequence[int], students: Iterable[Numbers]) -> str:
    """How many seeds the evaluated students have, in words, and how many they are to have where one lacks some."""
    counts = [len(numbers["seeds"]) for numbers in students if "seeds" in numbers]
    if max(counts, default=1) == 1:
        return ONE_SEED
    of_each = " to ".join(dict.fromkeys((str(min(counts)), str(max(counts)))))
    return f"{of_each}{'' if min(counts) == len(planned) else f' of {len(planned)}'} seeds of training"


def _difference_table(
    students: Mapping[str, Numbers], columns: Mapping[str, tuple[str, str]], key: str, title: str
) -> Iterator[str]:
    rows = []
    for name, numbers in students.items():
        if difference := numbers.get(key):
            rows.append([name, *(_worded(difference.get(m), form) for m, (_, form) in columns.items() if m in QUALITY)])
    if rows:
        titles = [f"{column}{ARROWS[QUALITY[m]]}" for m, (column, _) in columns.items() if m in QUALITY]
        yield markdown_table([title, *titles], rows)


def _worded(difference: Numbers | None, form: str) -> str:
    if difference is None:
        return ""
    closed = difference.get("gap_closed") if difference["verdict"] == "better" else None
    gap = "" if closed is None else f", {closed:.0%} of the gap to the teacher"
    return f"{measure_cell(difference, form, '+')}: {difference['verdict']}{gap}"
