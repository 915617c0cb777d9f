"""Results of several models as a table, and in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dpkd_offline.common.markdown import markdown_table
from dpkd_offline.evaluation.task_results import TaskResult, task_columns, task_words
from dpkd_offline.metrics.text import BROKEN, MEASURES

COLUMNS = {
    **{name: (measure.title, measure.form) for name, measure in MEASURES.items()},
    "teacher_nll": ("teacher NLL/token", ".3f"),
    "reward": ("implicit reward", ".4f"),
    "accepted": ("accepted, %", ".1f"),
    "tokens": ("tokens", ".1f"),
}
SHARES = {"truncated": "cut off", "repeating": "repeating", "unfinished_thoughts": "unfinished thoughts"}
# Whether more of it is better, or less.
BETTER = {name: measure.better for name, measure in MEASURES.items()} | {"teacher_nll": -1, "accepted": 1}
QUALITY = {name: sign for name, sign in BETTER.items() if sign and name != "accepted"}  # what a verdict goes by
BETTER |= dict.fromkeys(SHARES, -1)
ARROWS = {1: " ↑", -1: " ↓", 0: ""}  # which direction is good
NOTES = {  # how to read what is not obvious
    "reward": "implicit reward: β/|y| log q/p of the model's own responses. At 0 the teacher finds them as likely as "
    "the model does; above it the model is surer of them than the teacher.",
    "accepted": "accepted: the share of the model's tokens that the teacher would accept of it as a draft in "
    "speculative decoding.",
}
Cells = tuple[list[str], list[list[str]]]  # titles of columns, and rows
BENCHMARKS = "benchmarks: value ± standard error, as lm-evaluation-harness reports them"
BEFORE, AFTER, TEACHER = "student-before", "student-after", "teacher"


class Measured(BaseModel):
    """A measure over the seeds."""

    mean: float
    spread: float
    by_seed: list[float]
    interval: tuple[float, float] | None = None  # 95 % over prompts


class LengthBucket(BaseModel):
    """The measures of text over the prompts whose references have so many words."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float] = Field(init=False)

    above: int
    to: int | None
    prompts: int


class EvaluationRecord(BaseModel):
    """results.json: the measures by their names, and what these are of."""

    model_config = ConfigDict(extra="allow")

    prompts: int
    seeds: list[int]
    truncated: float
    repeating: float = 0.0
    unfinished_thoughts: float = 0.0
    by_length: list[LengthBucket] = []
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
    """Results of several models as Markdown tables: means with intervals, then notes, verdict and warnings.

    A model's difference from another one is a row below them. Where there are several prompt sets, each has its tables.
    """
    first = next(iter(results.values()))
    if "sets" in first:
        tables = []
        for name in first["sets"]:
            of_set = {model: numbers["sets"][name] for model, numbers in results.items() if name in numbers["sets"]}
            tables.append(f"{name}:\n\n{results_table(of_set)}")
        if benchmarks := task_columns(results):
            models = [model.replace("-", " ") for model in results]
            rows = [list(row) for row in zip(models, *benchmarks.values(), strict=True)]
            tables.append(f"{BENCHMARKS}:\n\n{markdown_table(['model', *benchmarks], rows)}")
        return "\n\n".join(tables)
    seeds = len(first["seeds"])
    note = f"{first['prompts']} held-out prompts, {seeds} seed{'s' * (seeds > 1)}: mean [95 % interval over prompts]"
    if task_columns(results):
        note += f"; {BENCHMARKS}"
    sentence = verdict(results)
    warnings = [f"warning: {warning}" for numbers in results.values() for warning in numbers.get("warnings", ())]
    blocks = [markdown_table(*comparison(results)), "\n".join([note, *notes_of(results)])]
    if (by_length := by_length_table(results)) is not None:
        blocks.append(markdown_table(*by_length))
    return "\n\n".join([*blocks, *([sentence] if sentence else []), *(["\n".join(warnings)] if warnings else [])])


def comparison(results: Mapping[str, Mapping[str, Any]]) -> Cells:
    """The measures of several models on one prompt set: titles, and a row each; then how far they are from each other.

    A measure is `mean [low, high]`, with its 95 % interval over prompts.
    """
    first = next(iter(results.values()))
    columns = {name: column for name, column in COLUMNS.items() if name in first}
    shares = {name: title for name, title in SHARES.items() if any(name in numbers for numbers in results.values())}
    benchmarks = task_columns(results)
    titles = ["model", *(title + ARROWS[BETTER.get(name, 0)] for name, (title, _) in columns.items())]
    titles += [*(title + ARROWS[BETTER[name]] for name, title in shares.items()), *benchmarks]
    rows = []
    for n, (model, numbers) in enumerate(results.items()):
        cells = [measure_cell(numbers[name], form) for name, (_, form) in columns.items()]
        cells += [f"{numbers.get(name, 0):.0%}" for name in shares]
        rows.append([model.replace("-", " "), *cells, *(cells_of_task[n] for cells_of_task in benchmarks.values())])
    return titles, [*rows, *_difference_rows(results, columns, len(shares) + len(benchmarks))]


def notes_of(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How to read the columns of `comparison`, where that is not obvious."""
    first = next(iter(results.values()))
    return [note for name, note in NOTES.items() if name in first]


def measure_cell(measure: Mapping[str, Any], form: str, sign: str = "") -> str:
    """A mean with its interval, if it has one."""
    mean = f"{measure['mean']:{sign}{form}}"
    if (interval := measure.get("interval")) is None:
        return mean
    return f"{mean} [{interval[0]:{sign}{form}}, {interval[1]:{sign}{form}}]"


def _difference_rows(
    results: Mapping[str, Mapping[str, Any]], columns: Mapping[str, tuple[str, str]], shares: int
) -> Iterator[list[str]]:
    for model, numbers in results.items():
        difference = numbers.get("difference")
        if difference is None:
            continue
        title = "after − before" if model == AFTER else f"{model.replace('-', ' ')} − the other"
        cells = [measure_cell(difference[n], form, "+") if n in difference else "" for n, (_, form) in columns.items()]
        yield [title, *cells, *[""] * shares]
        closed = {name: value["gap_closed"] for name, value in difference.items() if "gap_closed" in _mapping(value)}
        if closed:
            yield [
                "of the gap to the teacher",
                *(f"{closed[name]:.0%}" if name in closed else "" for name in columns),
                *[""] * shares,
            ]


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def by_length_table(results: Mapping[str, Mapping[str, Any]]) -> Cells | None:
    """Measures of text by words of the reference; None where all references are of one length or there is no text."""
    buckets = next(iter(results.values())).get("by_length", [])
    filled = [n for n, bucket in enumerate(buckets) if bucket["prompts"]]
    if len(filled) < 2:
        return None
    titles = ["by words of the reference"]
    for n in filled:
        low, high = buckets[n]["above"], buckets[n]["to"]
        words = f"over {low}" if high is None else f"{low + 1} to {high}"
        titles.append(f"{words} ({buckets[n]['prompts']})")
    rows = []
    for name, measure in MEASURES.items():
        for model, numbers in results.items():
            cells = [numbers["by_length"][n].get(name) for n in filled if n < len(numbers.get("by_length", []))]
            shown = ["" if value is None else f"{value:{measure.form}}" for value in cells]
            rows.append([f"{measure.title}, {model.replace('-', ' ')}", *shown])
    return titles, rows


def verdict(results: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Whether training made the student better, in a sentence; None where it was not evaluated before and after."""
    if not {BEFORE, AFTER} <= results.keys():
        return None
    if "sets" in results[AFTER]:
        sentences = []
        for name in results[AFTER]["sets"]:
            of_set = {model: numbers["sets"][name] for model, numbers in results.items() if name in numbers["sets"]}
            sentences.append(f"{name}: {verdict(of_set)}")
        return " ".join(sentences)
    return verdict_of(results[BEFORE], results[AFTER])


def verdict_of(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Whether a student is better or worse than before, by each measure of quality.

    A difference counts if its 95 % interval over prompts, `after["difference"]`, leaves out zero. Responses that no
    longer end come first, since the other measures may praise them: endless repetition can contain more words of the
    reference, and be likelier for the teacher, than a proper response.
    """
    words = []
    if after["truncated"] - before["truncated"] > BROKEN:
        words = [f"worse: its responses no longer end ({before['truncated']:.0%} → {after['truncated']:.0%} cut off)"]
    for name in QUALITY:
        if name in before and name in after:
            title, form = COLUMNS[name]
            difference = after.get("difference", {}).get(name, {})
            word = difference.get("verdict", "cannot tell")
            if word.startswith("cannot tell"):
                word = word.replace("cannot tell", "no different beyond noise", 1)
            closed = difference.get("gap_closed")
            gap = "" if closed is None or word != "better" else f", {closed:.0%} of the gap to the teacher"
            words.append(f"{word} in {title} ({before[name]['mean']:{form}} → {after[name]['mean']:{form}}{gap})")
    told, open_ = task_words(before, after)
    cannot_tell = f" Cannot tell by {', '.join(open_)}." if open_ else ""
    return f"The student after training is {', '.join([*words, *told])}.{cannot_tell}"
