"""The page of a study: its students in one table, together in each figure, and side by side in what they answer."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from statistics import fmean

from dpkd_offline.common.markdown import inline_code
from dpkd_offline.config.base import in_words
from dpkd_offline.evaluation.table import ARROWS, BETTER, COLUMNS, NOTES, SHARES, TEACHER
from dpkd_offline.pipeline.report.blocks import Block, Heading, Items, Link, Links, Page, Section, Table, Text
from dpkd_offline.pipeline.report.data import data_section
from dpkd_offline.pipeline.report.makers import duration, stages_section
from dpkd_offline.pipeline.report.paper import CAVEAT, number_text, paper_tables
from dpkd_offline.pipeline.report.responses import Scores, example
from dpkd_offline.pipeline.report.run import has_responses
from dpkd_offline.pipeline.report.sections import page_of
from dpkd_offline.pipeline.report.study import SeedRun, Student, Study, numbers_for_paper, run_of_student
from dpkd_offline.pipeline.report.study_figures import costs, curves, differences, lengths
from dpkd_offline.pipeline.study_results import FAILED_RUN, RUINED
from dpkd_offline.pipeline.study_table import ONE_SEED, seeds_of_training

HTML = "report.html"  # of any page
ROUGE_L = "rouge_l"
PER_GROUP = 2  # prompts with the responses of all students
SEED = 0


def study_page(study: Study, output: Path) -> Page:
    """The page of a study, done or under way.

    Args:
        output: the folder that it is for; it leads to the pages of students that are there.

    Raises:
        DataError, MismatchError: a file that it reads is broken.
    """
    blocks = {
        "Results": _results(study),
        "What to look at": _warnings(study),
        "Training": curves(study),
        "Quality and cost": costs(study),
        "Rouge-L by length": lengths(study),
        "The paper's tables": _paper(study),
        "Responses side by side": _responses(study),
        "The students": _students(study, output),
    }
    sections = [Section(title, listed) for title, of in blocks.items() if (listed := list(of))]
    sections += [data_section(study.dataset)] if study.dataset is not None else []
    sections += [stages_section(list(study.stages))] if study.stages else []
    return Page(study.name, "study", list(_lead(study)), sections)


def student_page(study: Study, student: Student, run: SeedRun) -> Page:
    """The page of one student with one seed, as that of any run, with the way back to the study."""
    page = page_of(run_of_student(study, student, run))
    up = "/".join([".."] * len(PurePosixPath(run.place).parts))
    back = Section("The study", [Links([Link(f"All students of {study.name}", f"{up}/{HTML}")])])
    title = f"{student.name}, seed {run.seed}"
    return replace(page, title=title, kind=f"student of {study.name}", sections=[*page.sections, back])


# --- what it comes to -------------------------------------------------------------------------------------------------


def _lead(study: Study) -> Iterator[str]:
    for name in study.sets:
        if (sentence := verdict(study, name)) is not None:
            yield f"{inline_code(name)}: {sentence}" if name else sentence
    states = [run["state"] for student in study.students for run in student.results["runs"].values()]
    if open_ := {state: states.count(state) for state in dict.fromkeys(states) if state != "done"}:
        listed = in_words([f"{count} {state}" for state, count in open_.items()])
        yield f"Of {len(states)} trainings {states.count('done')} are done, {listed}."


def verdict(study: Study, prompt_set: str) -> str | None:
    """Which student is best in Rouge-L, and whether that is more than chance; None where none is evaluated."""
    models = study.measured[prompt_set]
    scores = {name: models[name][ROUGE_L] for name in study.names if ROUGE_L in models.get(name, {})}
    if not scores:
        return None
    best = max(scores, key=lambda name: scores[name].mean)
    title, form = COLUMNS[ROUGE_L]
    base, change = study.layout.baseline, scores[best].change
    words = [f"The best student in {title} is {inline_code(best)} with {scores[best].mean:{form}}"]
    if best == base:
        words[0] += ", which is the baseline"
    elif change is not None:
        than = {1: "better than", -1: "worse than", 0: "no different beyond noise from"}[change.better]
        words[0] += f": {than} the baseline {inline_code(base)} ({number_text(change, f'+{form}')})"
    if ROUGE_L in models.get(TEACHER, {}):
        words[0] += f"; the teacher has {models[TEACHER][ROUGE_L].mean:{form}}"
    others = [s.change.better for name, s in scores.items() if name != best and s.change is not None]
    if others:
        counts = {"better": others.count(1), "worse": others.count(-1), "no different beyond noise": others.count(0)}
        listed = in_words([f"{count} {word}" for word, count in counts.items() if count])
        words.append(f"Of the other {len(others)}, compared with {inline_code(base)}, {listed}")
    return ". ".join(words) + "."


def _results(study: Study) -> Iterator[Block]:
    for name in study.sets:
        if name:
            yield Heading(f"On {inline_code(name)}")
        yield _table(study, name)
        yield from differences(study, name)
    shown = {measure for models in study.measured.values() for measures in models.values() for measure in measures}
    yield from (Text(NOTES[name], quiet=True) for name in COLUMNS if name in shown and name in NOTES)
    if rows := [[inline_code(s.name), *cells] for s in study.students if (cells := _judged(s))]:
        yield Table("What the judge says, over the seeds of training", JUDGED, rows)


def _table(study: Study, prompt_set: str) -> Table:
    models, base = study.measured[prompt_set], study.layout.baseline
    present = {measure for measures in models.values() for measure in measures}
    names, shares = ([name for name in of if name in present] for of in (COLUMNS, SHARES))
    titles = ["model"]
    for name in names:
        titles.append(COLUMNS[name][0] + ARROWS[BETTER.get(name, 0)])
        titles += [f"minus {inline_code(base)}"] if name == ROUGE_L and base is not None else []
    titles += [SHARES[name] + ARROWS[BETTER[name]] for name in shares]
    rows = []
    for model, measures in models.items():
        cells = [inline_code(model) if model in study.names else model]
        for name in names:
            form, measure = COLUMNS[name][1], measures.get(name)
            cells.append("" if measure is None else number_text(measure, form))
            if name == ROUGE_L and base is not None:
                change = None if measure is None else measure.change
                cells.append("" if change is None else number_text(change, f"+{form}"))
        rows.append([*cells, *(f"{measures[name].mean:.0%}" if name in measures else "" for name in shares)])
    scores = [
        (measures[ROUGE_L].mean, n)
        for n, (model, measures) in enumerate(models.items())
        if model in study.names and ROUGE_L in measures
    ]
    return Table(_caption(study, prompt_set), titles, rows, (max(scores)[1],) if scores else ())


def _caption(study: Study, prompt_set: str) -> str:
    prompts = next(of[prompt_set].results["prompts"] for of in study.evaluations.values() if prompt_set in of)
    measured = [student.results.get("sets", {"": student.results}).get(prompt_set, {}) for student in study.students]
    trained = seeds_of_training(study.layout.seeds, measured)
    over = "prompts, which says nothing of other seeds" if trained == ONE_SEED else "seeds and prompts"
    bold = "The best student in Rouge-L is in bold"
    return f"{prompts} prompts, {trained}: mean, 95 % interval over {over}. {bold}"


JUDGED = ("student", "judge", "win rate against its start, %", "score, % of the references'")


def _judged(student: Student) -> list[str]:
    judge = student.results.get("judge", {})
    cells = [_judge_number(judge.get(name)) for name in ("win_rate", "ratio_of_sums")]
    return [inline_code(judge["judge"]), *cells] if any(cells) else []


def _judge_number(numbers: Mapping[str, object] | None) -> str:
    if numbers is None:
        return ""
    interval = numbers.get("interval")
    within = f" [{interval[0]:.1f}, {interval[1]:.1f}]" if isinstance(interval, list | tuple) else ""
    return f"{numbers['mean']:.1f}{within}"


def _warnings(study: Study) -> Iterator[Block]:
    warnings = list(study.results["warnings"])
    for student in study.students:
        for run in student.runs:
            if run.judge is not None:
                warnings += [f"{student.name}, seed {run.seed}: judge: {warning}" for warning in run.judge.warnings]
    warnings.sort(key=lambda warning: not any(f": {state}: " in warning for state in (FAILED_RUN, RUINED)))
    yield Items(warnings, warn=True) if warnings else Text("Nothing stands out.")


def _paper(study: Study) -> Iterator[Block]:
    if study.layout.paper is not None:
        yield Text(CAVEAT, quiet=True)
        yield from paper_tables(study.layout.paper, numbers_for_paper(study))


# --- responses --------------------------------------------------------------------------------------------------------


def _responses(study: Study) -> Iterator[Block]:
    """Of the first prompt set, what each model answered."""
    for prompt_set in study.sets:
        evaluations = {name: of[prompt_set] for name, of in study.evaluations.items() if prompt_set in of}
        scores = {name: Scores.read(of) for name, of in evaluations.items() if has_responses(of)}
        students = [name for name in study.names if name in scores]
        if not students:
            continue
        of_set = f" of {inline_code(prompt_set)}" if prompt_set else ""
        yield Text(
            f"To prompts{of_set}, each student trained with seed {study.layout.seeds[0]}, sampled with the first seed. "
            "Long texts are cut.",
            quiet=True,
        )
        for n, (title, prompts) in enumerate(_groups(scores, students)):
            yield Heading(title)
            yield from (example(prompt, scores, unfolded=n == m == 0) for m, prompt in enumerate(prompts))
        return


def _groups(scores: Mapping[str, Scores], students: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Prompts that are worth a look; each in one group."""
    first = {name: of.first for name, of in scores.items()}
    prompts = [p for p in first[students[0]] if all(p in of for of in first.values())]
    of_students = {p: [first[name][p][0] for name in students] for p in prompts}
    orders = {}
    if all(math.isfinite(score) for values in of_students.values() for score in values):
        orders = {
            "Where the students differ most": sorted(prompts, key=lambda p: min(of_students[p]) - max(of_students[p])),
            "Where they do best": sorted(prompts, key=lambda p: -fmean(of_students[p])),
            "Where they do worst": sorted(prompts, key=lambda p: fmean(of_students[p])),
        }
    orders["Drawn at random"] = random.Random(SEED).sample(prompts, len(prompts))
    taken: set[str] = set()
    for title, order in orders.items():
        chosen = [prompt for prompt in order if prompt not in taken][:PER_GROUP]
        taken.update(chosen)
        if chosen:
            yield title, chosen


# --- the students -----------------------------------------------------------------------------------------------------


def _students(study: Study, output: Path) -> Iterator[Block]:
    titles = ["student", "objective", "from", "steps", "training", "tokens", "memory", "state"]
    yield Table("Means over the seeds", titles, [_row(student) for student in study.students])
    runs = [(student.name, run) for student in study.students for run in student.runs]
    links = [
        Link(f"{name}, seed {run.seed}", f"{run.place}/{HTML}")
        for name, run in runs
        if (output / run.place / HTML).exists()
    ]
    if len(links) < sum(run.training is not None for _, run in runs):
        yield Text("`dpkd-offline report` of this folder writes a page of each student with each seed.")
    if links:
        yield Text("Pages of their own:")
        yield Links(links)


def _row(student: Student) -> list[str]:
    trainings = [run.training for run in student.runs if run.training is not None]
    objective = trainings[0].settings.get("objective") if trainings else None
    steps = fmean(training.curves.steps for training in trainings) if trainings else None
    tokens, memory = student.mean(lambda run: run.tokens), student.mean(lambda run: run.peak_memory)
    return [
        inline_code(student.name),
        inline_code(objective) if isinstance(objective, str) else "",
        student.start,
        "" if steps is None else f"{steps:,.0f}",
        "" if student.seconds is None else duration(student.seconds),
        "" if tokens is None else f"{tokens:,.0f}",
        "" if memory is None else f"{memory / 2**30:.1f} GiB",
        student.results["state"],
    ]
