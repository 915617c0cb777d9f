"""The figures of a study: all of its students together. A student has the same colour, dash and mark in each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from statistics import fmean

from dpkd_offline.common.markdown import inline_code
from dpkd_offline.config.base import in_words
from dpkd_offline.config.objectives import OBJECTIVES
from dpkd_offline.evaluation.table import COLUMNS, QUALITY
from dpkd_offline.pipeline.report import figures
from dpkd_offline.pipeline.report.blocks import Block, Figure, Figures, Fold, Items, Table, Text
from dpkd_offline.pipeline.report.curves import Curve
from dpkd_offline.pipeline.report.figures import Series
from dpkd_offline.pipeline.report.study import Student, Study, by_length
from dpkd_offline.pipeline.report.training import alt_of

CURVES = {  # of validation, which measures the same of every student: what each shows, and its axis
    "val_rouge_l": ("Rouge-L of greedy responses to held-out prompts", "Rouge-L"),
    "val_loss_dpkd": ("The loss of eq. 9 on held-out pairs, whatever is trained", "nats"),
    "val_margin": ("The margin on held-out pairs: how far the reward of y_t is above that of y_s", "reward"),
    "val_logps_chosen": ("How likely held-out y_t are to the student, log q per token", "nats a token"),
    "val_forward_kl": ("KL(p‖q) at the positions of held-out y_t", "nats a token"),
    "val_reverse_kl_first": ("Reverse KL at the first token of held-out responses", "nats"),
}
OF_WHAT_IS_READ = "val_logps_chosen"  # which is of references where these are what is trained on
FEW = 10  # points of a curve, each of which then has a mark


def curves(study: Study) -> Iterator[Block]:
    """What validation saw while the students were trained."""
    shown = []
    for name, (caption, axis) in CURVES.items():
        series = [
            Series(student.name, curve.steps, curve.values, points=len(curve.steps) < FEW, place=place)
            for place, student in enumerate(study.students)
            if not (name == OF_WHAT_IS_READ and _reads_references(student)) and (curve := mean_curve(student, name))
        ]
        if series:
            alt = alt_of(caption, series)
            shown.append(Figure(figures.line_chart(name.replace("_", "-"), alt, series, y_label=axis), caption, alt))
    if shown:
        yield Text(
            "Each line is a student, as a mean over its seeds. Their own losses count different things, so the lines "
            "show what validation measures of all alike.",
            quiet=True,
        )
        yield Figures(shown)


def _reads_references(student: Student) -> bool:
    objectives = (run.training.settings.get("objective") for run in student.runs if run.training is not None)
    return any(objective in OBJECTIVES and OBJECTIVES[objective].data == "references" for objective in objectives)


def mean_curve(student: Student, name: str) -> Curve:
    """A curve as the mean over the seeds that have it, at the steps that these have in common."""
    of_seeds = [curve for run in student.runs if run.training is not None and (curve := run.training.curves[name])]
    by_step = [dict(zip(curve.steps, curve.values, strict=True)) for curve in of_seeds]
    steps = [step for step in (by_step[0] if by_step else ()) if all(step in of for of in by_step)]
    return Curve(steps, [fmean(of[step] for of in by_step) for step in steps])


def differences(study: Study, prompt_set: str) -> Iterator[Block]:
    """How far each student is from the baseline in what says how good it is, the best first."""
    base, models, shown = study.layout.baseline, study.measured[prompt_set], []
    for measure, better in QUALITY.items():
        changes = {s: c for s in study.names if (of := models.get(s, {}).get(measure)) and (c := of.change) is not None}
        known = {s: (c.mean, *c.interval) for s, c in changes.items() if c.interval is not None}
        if len(known) > 1:
            rows = {s: known[s] for s in sorted(known, key=lambda s: -better * known[s][0])}
            words = {"better": 1, "worse": -1, "cannot tell": 0}
            verdicts = {word: [s for s in rows if changes[s].better == n] for word, n in words.items()}
            title, form = COLUMNS[measure]
            caption = f"{title} minus that of {inline_code(str(base))}{_on(prompt_set)}, with 95 % intervals"
            verdict_of = {s: word for word, of_word in verdicts.items() for s in of_word}
            alt = f"{caption}: " + "; ".join(
                f"{s} {mean:+{form}} [{low:+{form}}, {high:+{form}}], {verdict_of[s]}"
                for s, (mean, low, high) in rows.items()
            )
            name = f"difference-{measure}-{prompt_set}".replace("_", "-").strip("-")
            svg = figures.interval_chart(name, alt, rows, verdicts, x_label=f"{title} − {base}")
            shown.append(Figure(svg, caption, alt))
    if shown:
        yield Figures(shown)


def costs(study: Study) -> Iterator[Block]:
    """Quality over what training took, and who is not beaten in both."""
    seconds = {student.name: student.seconds for student in study.students}
    tokens = {student.name: student.mean(lambda run: run.tokens) for student in study.students}
    timed = any(seconds.values())
    known, axis = (seconds, "seconds of training") if timed else (tokens, "tokens of training")
    shown, sentences = [], []
    for prompt_set, models in study.measured.items():
        for measure, better in QUALITY.items():
            points = {
                student: (cost, models[student][measure].mean)
                for student, cost in known.items()
                if cost is not None and measure in models.get(student, {})
            }
            if len(points) > 1:
                title = COLUMNS[measure][0]
                what = title + _on(prompt_set)
                caption = f"{what} over the cost of training; {'higher' if better > 0 else 'lower'} is better"
                shown.append(_cost_figure(study, f"cost-{measure}-{prompt_set}", caption, points, axis, title))
                best = undominated({student: (cost, better * value) for student, (cost, value) in points.items()})
                listed = in_words([inline_code(student) for student in best])
                sentences.append(f"{what}: {listed if len(best) < len(points) else 'all of them'}")
    if shown:
        yield Text("Students that no other beats in quality without costing more:")
        yield Items(sentences)
        yield Figures(shown)


def _cost_figure(
    study: Study, name: str, caption: str, points: Mapping[str, tuple[float, float]], axis: str, title: str
) -> Figure:
    series = [Series(s, [cost], [value], place=study.names.index(s)) for s, (cost, value) in points.items()]
    alt = f"{caption}: " + "; ".join(
        f"{student} {value:.4g} at {cost:,.4g}" for student, (cost, value) in points.items()
    )
    svg = figures.scatter_chart(name.replace("_", "-").strip("-"), alt, series, x_label=axis, y_label=title)
    return Figure(svg, caption, alt)


def undominated(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Of each name a cost and a quality: those that no other beats in one without being behind in the other."""

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one[0] <= other[0] and one[1] >= other[1] and one != other

    return [name for name, point in points.items() if not any(beats(other, point) for other in points.values())]


def lengths(study: Study) -> Iterator[Block]:
    """Rouge-L by words of the reference."""
    shown: list[Figure] = []
    tables: list[Block] = []
    for prompt_set in study.sets:
        of_models = by_length(study, prompt_set)
        buckets = list(dict.fromkeys(bucket for of in of_models.values() for bucket in of))
        if len(buckets) < 2:
            continue
        groups = [f"over {low}" if high is None else f"{low + 1} to {high}" for low, high in buckets]
        caption = f"Rouge-L by words of the reference{_on(prompt_set)}"
        series = [
            Series(name, range(len(buckets)), [of.get(b, math.nan) for b in buckets], points=True, place=place)
            for place, name in enumerate(study.names)
            if (of := of_models.get(name))
        ]
        alt = f"{caption}, {', '.join(groups)}: " + "; ".join(
            f"{one.label} {', '.join(f'{value:.1f}' for value in one.y)}" for one in series
        )
        svg = figures.line_chart(
            f"length-{prompt_set}", alt, series, x_label="words of the reference", y_label="Rouge-L", groups=groups
        )
        shown.append(Figure(svg, caption, alt))
        rows = [
            [inline_code(name) if name in study.names else name, *(f"{of[b]:.2f}" if b in of else "" for b in buckets)]
            for name, of in of_models.items()
        ]
        tables.append(Table(caption, ["model", *groups], rows))
    if shown:
        yield Figures(shown)
        yield Fold("The numbers", tables)


def _on(prompt_set: str) -> str:
    return f" on {inline_code(prompt_set)}" if prompt_set else ""
