"""A run as a page: what is shown, in which order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpkd_offline.common.errors import StudentRuined
from dpkd_offline.common.markdown import inline_code
from dpkd_offline.evaluation.table import (
    AFTER,
    BEFORE,
    BENCHMARKS,
    COLUMNS,
    TEACHER,
    by_length_table,
    comparison,
    notes_of,
    verdict_of,
)
from dpkd_offline.evaluation.task_results import task_columns
from dpkd_offline.generation.health import dataset_warnings
from dpkd_offline.pipeline.report import figures
from dpkd_offline.pipeline.report.blocks import Block, Figure, Figures, Heading, Items, Page, Section, Table, Text
from dpkd_offline.pipeline.report.data import data_lead, data_section
from dpkd_offline.pipeline.report.makers import makers_section, stages_section
from dpkd_offline.pipeline.report.responses import Scores, examples
from dpkd_offline.pipeline.report.run import Evaluation, JudgeRecord, Run, has_responses
from dpkd_offline.pipeline.report.training import paper_figures, training_section


def page_of(run: Run) -> Page:
    """The page of what a folder holds.

    Raises:
        DataError, MismatchError: a file that it reads is broken.
    """
    scores = {
        name: {one.model: Scores.read(one) for one in evaluations if has_responses(one)}
        for name, evaluations in run.sets.items()
    }
    sections = [
        _results(run, scores),
        _warnings(run),
        training_section(run.trainings) if run.trainings else None,
        _paper(run, scores),
        _responses(scores),
        data_section(run.dataset) if run.dataset is not None else None,
        stages_section(run.stages) if run.stages else None,
        makers_section(run),
    ]
    return Page(run.name, run.kind, list(_lead(run)), [section for section in sections if section is not None])


def _lead(run: Run) -> Iterator[str]:
    """Whether the student is better, by how much, and of how much of the way to the teacher; or what is not done."""
    for name, evaluations in run.sets.items():
        by_name = {one.model: one.results for one in evaluations}
        if BEFORE in by_name and AFTER in by_name:
            yield (f"{inline_code(name)}: " if name else "") + verdict_of(by_name[BEFORE], by_name[AFTER])
        elif len(by_name) == 1 and run.kind == "evaluation":
            yield from _of_one(name, next(iter(by_name.values())))
    if run.judge is not None:
        yield judge_sentence(run.judge)
    for training in run.trainings:
        if training.record is not None and training.record.ruined:
            yield f"{inline_code(training.name)}: training stopped early: {training.record.ruined}"
    if run.kind == "training":
        yield from _of_training(run)
    if run.kind == "dataset" and run.dataset is not None:
        yield data_lead(run.dataset)
    if run.missing:
        yield f"Not all is done: {'; '.join(run.missing)}."


def _of_one(name: str, results: Mapping[str, Any]) -> Iterator[str]:
    measure = results.get("rouge_l")
    if measure is not None:
        title, form = COLUMNS["rouge_l"]
        low, high = measure.get("interval") or (None, None)
        within = "" if low is None else f", 95 % interval {low:{form}} to {high:{form}}"
        of_set = f"{inline_code(name)}: " if name else ""
        yield f"{of_set}{title} {measure['mean']:{form}}{within}, on {results['prompts']} held-out prompts."


def _of_training(run: Run) -> Iterator[str]:
    training = run.trainings[0]
    record, curves = training.record, training.curves
    if record is None:
        yield f"Training is at step {curves.steps}, and not done."
    elif record.best is not None and isinstance(by := record.best.get("by"), str):
        first = next(iter(curves[by].values), None)
        value = record.best.get(by)
        before = "" if first is None else f", {first:.4g} before training"
        if isinstance(value, int | float):
            best = f"that of step {record.best.get('step')}, by {inline_code(by)}: {value:.4g}{before}"
            yield f"{record.steps} steps. The best student is {best}."
    else:
        yield f"{record.steps} steps, without held-out prompts."


# --- results ----------------------------------------------------------------------------------------------------------


def _results(run: Run, scores: Mapping[str, Mapping[str, Scores]]) -> Section | None:
    blocks: list[Block] = []
    for name, evaluations in run.sets.items():
        if name:
            blocks.append(Heading(inline_code(name)))
        blocks += _tables(evaluations, scores[name])
    if run.benchmarks and (columns := task_columns(run.benchmarks)):
        models = [model.replace("-", " ") for model in run.benchmarks]
        rows = [list(row) for row in zip(models, *columns.values(), strict=True)]
        blocks.append(Table(BENCHMARKS, ["model", *columns], rows))
    if run.judge is not None:
        blocks.append(judge_table(run.judge))
    return Section("Results", blocks) if blocks else None


def _tables(evaluations: Sequence[Evaluation], scores: Mapping[str, Scores]) -> Iterator[Block]:
    results = {one.model: one.results for one in evaluations}
    first = next(iter(results.values()))
    seeds = len(first["seeds"])
    caption = f"{first['prompts']} held-out prompts, {seeds} seed{'s' * (seeds > 1)}: mean, 95 % interval over prompts"
    titles, rows = comparison(results)
    strong = [n for n, row in enumerate(rows) if row[0] in ("after − before", "of the gap to the teacher")]
    yield Table(caption, titles, rows, strong)
    for note in notes_of(results):
        yield Text(note, quiet=True)
    if (by_length := by_length_table(results)) is not None:
        titles, rows = by_length
        yield Table(
            "By words of the reference, in brackets the number of prompts; of Rouge-L the 95 % interval over these",
            titles,
            [_with_intervals(row, results, scores) for row in rows],
        )


def _with_intervals(
    row: Sequence[str], results: Mapping[str, Mapping[str, Any]], scores: Mapping[str, Scores]
) -> list[str]:
    """A row of the table by length, where it is of Rouge-L with the interval of each number."""
    title, *cells = row
    model = next((m for m in scores if title == f"{COLUMNS['rouge_l'][0]}, {m.replace('-', ' ')}"), None)
    if model is None:
        return list(row)
    buckets = [bucket for bucket in next(iter(results.values()))["by_length"] if bucket["prompts"]]
    shown = []
    for cell, bucket in zip(cells, buckets, strict=True):
        interval = scores[model].interval(bucket["above"], bucket["to"]) if cell else None
        shown.append(cell if interval is None else f"{cell} [{interval[0]:.2f}, {interval[1]:.2f}]")
    return [title, *shown]


def judge_sentence(judge: JudgeRecord) -> str:
    """What a judge says of the student, in a sentence."""
    who, a = inline_code(judge.judge), _side(judge, "a")
    if judge.form == "score":
        ratio = _number(judge, "ratio_of_sums", " %")
        return f"By the judge {who}, the responses of {a} reach {ratio} of the scores of their references."
    interval, b = judge.win_rate_interval, _side(judge, "b")
    word = f"{a} cannot be told from {b} on {judge.prompts} prompts"
    if interval is not None and not interval[0] <= 50 <= interval[1]:
        word = f"{a} is {'better' if interval[0] > 50 else 'worse'} than {b}"
    return f"By the judge {who}, {word}: it wins {_number(judge, 'win_rate', ' %')}."


def _side(judge: JudgeRecord, side: str) -> str:
    evaluation = judge.made.get(side)
    model = evaluation.get("model") if isinstance(evaluation, dict) else None
    return inline_code(model.get("name", side.upper())) if isinstance(model, dict) else side.upper()


def judge_table(judge: JudgeRecord) -> Table:
    """The numbers of a judge, with how to read them."""
    if judge.form == "score":
        rows = [
            ["mean score of A", _number(judge, "mean_score"), "1 to 10, more is better"],
            ["mean score of references", _number(judge, "mean_reference_score"), ""],
            ["ratio of sums", _number(judge, "ratio_of_sums", " %"), "A / references; more is better"],
        ]
    else:
        rows = [
            ["win rate of A", _number(judge, "win_rate", " %"), "above 50: A is better"],
            ["mean preference for A", _number(judge, "preference", " %"), "the same with the judge's doubts"],
            ["the latter at equal lengths", _number(judge, "controlled_win_rate", " %"), "above 50: A is better"],
            ["ties", _number(judge, "ties", " %"), "the orders disagree, or neither is preferred"],
            ["order disagreement", _number(judge, "order_disagreement", " %"), "less is better: a steadier judge"],
        ]
    rows.append(["failed verdicts", str(judge.failed), f"of {judge.asked}; in no number"])
    sides = f"A is {_side(judge, 'a')}" + (f", B {_side(judge, 'b')}" if judge.form == "pairwise" else "")
    caption = f"The judge {inline_code(judge.judge)} on {judge.prompts} prompts, {judge.pairs} pairs; {sides}"
    return Table(caption, ["measure", "value", "how to read it"], rows)


def _number(judge: JudgeRecord, name: str, unit: str = "") -> str:
    value, interval = getattr(judge, name), getattr(judge, f"{name}_interval", None)
    if value is None:
        return "unknown"
    form = ".1f" if unit else ".2f"
    return f"{value:{form}}{unit}" + ("" if interval is None else f" [{interval[0]:{form}}, {interval[1]:{form}}]")


# --- what to look at --------------------------------------------------------------------------------------------------


def _warnings(run: Run) -> Section:
    warnings = [] if run.dataset is None else dataset_warnings(run.dataset)
    for training in run.trainings:
        if training.record is not None:
            title = "" if training.name == "student" else f"{inline_code(training.name)}, "
            warnings += [f"{title}step {found.step}: {found.warning}" for found in training.record.warnings]
    if run.judge is not None:
        warnings += [f"judge: {warning}" for warning in run.judge.warnings]
    latest = {line.stage: line for line in run.stages}
    warnings += [
        f"stage {inline_code(line.stage)} ended with exit code {line.exit_code}; the same command goes on"
        for line in latest.values()
        if line.exit_code not in (0, StudentRuined.exit_code)  # which the training says itself
    ]
    blocks: list[Block] = [Items(warnings, warn=True)] if warnings else [Text("Nothing stands out.")]
    return Section("What to look at", blocks)


# --- the paper's figures ----------------------------------------------------------------------------------------------


def _paper(run: Run, scores: Mapping[str, Mapping[str, Scores]]) -> Section | None:
    blocks: list[Block] = []
    student = next((t for t in run.trainings if t.name == "student" or run.kind == "training"), None)
    if student is not None and student.curves.steps:
        blocks += paper_figures(student)
    shown = [_figure_5(n, name, run.sets[name], scores[name]) for n, name in enumerate(run.sets)]
    if run.judge is not None and (verdicts := judge_figure(run.judge)) is not None:
        shown.append(verdicts)
    if any(shown):
        blocks.append(Figures([figure for figure in shown if figure is not None]))
    return Section("The paper's figures", blocks) if blocks else None


def _figure_5(number: int, name: str, evaluations: Sequence[Evaluation], scores: Mapping[str, Scores]) -> Figure | None:
    """Rouge-L by words of the reference."""
    results = {one.model: one.results for one in evaluations}
    if by_length_table(results) is None:
        return None
    buckets = [bucket for bucket in next(iter(results.values()))["by_length"] if bucket["prompts"]]
    groups = [f"over {b['above']}" if b["to"] is None else f"{b['above'] + 1} to {b['to']}" for b in buckets]
    values, intervals = {}, {}
    for model, numbers in results.items():
        by_start = {bucket["above"]: bucket.get("rouge_l") for bucket in numbers.get("by_length", [])}
        title = model.replace("-", " ")
        values[title] = [by_start.get(bucket["above"]) for bucket in buckets]
        if model in scores:
            intervals[title] = [scores[model].interval(bucket["above"], bucket["to"]) for bucket in buckets]
    alt = "Rouge-L by words of the reference: " + "; ".join(
        f"{model} {', '.join('none' if v is None else f'{v:.1f}' for v in row)}" for model, row in values.items()
    )
    svg = figures.bar_chart(
        f"figure-5-{number}",
        alt,
        groups,
        values,
        y_label="Rouge-L",
        x_label="words of the reference",
        intervals=intervals,
    )
    of_set = f" on {inline_code(name)}" if name else ""
    return Figure(svg, f"Fig. 5: Rouge-L by words of the reference{of_set}, with 95 % intervals", alt)


def judge_figure(judge: JudgeRecord) -> Figure | None:
    """Wins, ties and losses; None where responses are scored and not compared."""
    if judge.wins is None or judge.ties is None or judge.losses is None:
        return None
    a, b = _side(judge, "a").strip("`"), _side(judge, "b").strip("`")
    alt = f"Verdicts: {a} wins {judge.wins:.0f} %, ties {judge.ties:.0f} %, loses {judge.losses:.0f} % against {b}"
    parts = {"wins": judge.wins, "ties": judge.ties, "losses": judge.losses}
    svg = figures.share_chart("figure-1", alt, {a: parts})
    return Figure(svg, f"Fig. 1: verdicts of the judge on {_side(judge, 'a')} against {_side(judge, 'b')}", alt)


# --- responses --------------------------------------------------------------------------------------------------------


def _responses(scores: Mapping[str, Mapping[str, Scores]]) -> Section | None:
    """Of the first prompt set, what the models answered."""
    blocks: list[Block] = []
    for name, of in scores.items():
        if not of or blocks:
            continue
        last = AFTER if AFTER in of else list(of)[-1]
        before = BEFORE if last == AFTER and BEFORE in of else None
        shown = {model: of[model] for model in (TEACHER, BEFORE, "student-warm", AFTER) if model in of} or dict(of)
        for title, group in examples(shown, before, last):
            blocks += [Heading(title), *group]
        seed = next(iter(shown.values())).seed
        of_set = f" of {inline_code(name)}" if name else ""
        note = f"To the prompts{of_set}, with seed {seed}; a prompt stands in one group at most. Long texts are cut."
        blocks.insert(0, Text(note, quiet=True))
    return Section("Responses side by side", blocks) if blocks else None
