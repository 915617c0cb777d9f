"""What a page shows of a run of `train`: its curves, and the paper's figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from dpkd_offline.common.markdown import inline_code
from dpkd_offline.pipeline.report import figures
from dpkd_offline.pipeline.report.blocks import Block, Figure, Figures, Fold, Section, Text
from dpkd_offline.pipeline.report.curves import Curve, Curves
from dpkd_offline.pipeline.report.figures import Series
from dpkd_offline.pipeline.report.run import Training

# Of each figure its name, what it shows, the axis, and the curves with what the legend calls them.
PANELS: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    (
        "loss",
        "The loss of the steps and its parts, without their weights",
        "nats",
        {"loss": "loss", "loss_kd": "objective", "loss_nll": "−log q(y_t)", "loss_lm": "corpus"},
    ),
    (
        "held-out",
        "The loss on held-out pairs: of the objective, and of eq. 9 whatever is trained",
        "nats",
        {"val_loss_kd": "objective, held out", "val_loss_dpkd": "eq. 9, held out"},
    ),
    (
        "rewards",
        "Implicit rewards β/|y| log q/p of y_t and y_s",
        "reward",
        {
            "reward_chosen": "y_t",
            "reward_rejected": "y_s",
            "val_reward_chosen": "y_t, held out",
            "val_reward_rejected": "y_s, held out",
        },
    ),
    (
        "margin",
        "The margin: how far the reward of y_t is above that of y_s",
        "reward",
        {"margin": "steps", "val_margin": "held out"},
    ),
    (
        "accuracy",
        "Accuracy: the share of pairs in which y_t has the higher reward",
        "share of the pairs",
        {"accuracy": "steps", "val_accuracy": "held out"},
    ),
    (
        "logps",
        "How likely the responses are to the student, log q per token",
        "nats a token",
        {
            "logps_chosen": "y_t",
            "logps_rejected": "y_s",
            "val_logps_chosen": "y_t, held out",
            "val_logps_rejected": "y_s, held out",
        },
    ),
    (
        "drift",
        "Drift: how far the student has moved from the one that sampled y_s",
        "nats a token",
        {"drift": "steps", "val_drift": "held out", "drift_kl_token": "same prompts each time"},
    ),
    (
        "kl",
        "KL to the teacher on the responses of the steps",
        "nats a token",
        {"forward_kl": "KLD", "reverse_kl": "reverse KLD"},
    ),
    (
        "form",
        "Greedy held-out responses: the share that is cut off, and that repeats itself",
        "share",
        {"val_cut_off": "cut off", "val_repetition": "repeated 4-grams"},
    ),
    ("rouge", "Rouge-L of greedy responses to held-out prompts", "Rouge-L", {"val_rouge_l": "held out"}),
    ("gradient", "Norm of the gradient before clipping", "norm", {"grad_norm": "gradient norm"}),
    ("rate", "Learning rate", "", {"learning_rate": "learning rate"}),
    ("speed", "Speed of the steps", "tokens/s", {"tokens_per_s": "tokens/s"}),
)
SINGLE = ("val_", "drift_kl")  # curves of few points, each of which has a mark
MOST_EPOCHS = 5  # that have a colour of their own
SHARES = ("accuracy", "form")  # panels whose values are from 0 to 1


def training_section(trainings: Sequence[Training]) -> Section:
    """The curves of a run; those of the trainings before the last step of the experiment are folded."""
    blocks: list[Block] = []
    for n, training in enumerate(trainings):
        shown = list(_panels(training, f"training-{n}"))
        if not shown:
            blocks.append(Text(f"{inline_code(training.name)}: no step is done yet."))
        elif n == 0:
            blocks += [Text(_summary(training)), Figures(shown)]
        else:
            blocks.append(Fold(f"{training.title}: {_summary(training)}", [Figures(shown)]))
    return Section("Training", blocks)


def _summary(training: Training) -> str:
    objective = training.settings.get("objective")
    done = "" if training.record is not None else " so far; it is not done"
    what = inline_code(training.name) + (f", objective {inline_code(objective)}" if objective else "")
    return f"{what}: {training.curves.steps} steps{done}."


def _panels(training: Training, prefix: str) -> Iterator[Figure]:
    for name, caption, axis, names in PANELS:
        curves = training.curves.some(*names)
        if not any(math.isfinite(value) for curve in curves.values() for value in curve.values):
            continue
        if len(curves) == 2 and len({tuple(curve.values) for curve in curves.values()}) == 1:
            curves.popitem()  # the one number by its two names
        series = [series_of(names[key], curve, key) for key, curve in curves.items()]
        marks = training.curves.rounds
        alt = alt_of(caption, series)
        share = name in SHARES
        svg = figures.line_chart(f"{prefix}-{name}", alt, series, y_label=axis, marks=marks, share=share)
        yield Figure(svg, caption, alt)


def series_of(label: str, curve: Curve, name: str) -> Series:
    """A curve as a line, with a mark at each value where it has few."""
    return Series(label, curve.steps, curve.values, points=name.startswith(SINGLE))


def alt_of(caption: str, series: Sequence[Series]) -> str:
    """What a figure shows, in words: each line from its first value to its last."""
    lines = []
    for one in series:
        rows = one.finite
        if rows:
            (first, y, _), (last, z, _) = rows[0], rows[-1]
            label = f"{one.label} " if len(series) > 1 else ""
            lines.append(f"{label}from {y:.4g} at {first:g} to {z:.4g} at {last:g}")
    return f"{caption}: {'; '.join(lines)}"


FIGURE_4: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    (
        "reward",
        "Fig. 4: reward of held-out responses over training",
        "reward",
        {"val_reward_chosen": "y_t", "val_reward_rejected": "y_s"},
    ),
    (
        "first",
        "Fig. 4: KLD and reverse KLD of the first token, as in the paper",
        "nats",
        {"val_forward_kl_first": "KLD", "val_reverse_kl_first": "reverse KLD"},
    ),
    (
        "token",
        "Fig. 4: the same per token of y_t",
        "nats a token",
        {"val_forward_kl": "KLD", "val_reverse_kl": "reverse KLD"},
    ),
    (
        "acceptance",
        "How much of what the student samples the teacher would accept: Σ min(p, q) per token",
        "share",
        {"val_acceptance": "acceptance"},
    ),
)


# --- the paper's figures ----------------------------------------------------------------------------------------------


def paper_figures(training: Training) -> Iterator[Block]:
    """Reward against reverse KL (Fig. 3), and reward, KLD and reverse KLD over training (Fig. 4)."""
    curves = training.curves
    shown = [*_figure_3(training), *_figure_4(curves)]
    if shown:
        yield Figures(shown)
    if not curves.some("val_reverse_kl", "val_reverse_kl_first"):
        yield Text(
            "Figures 3 and 4 need KLD and reverse KLD of held-out responses, which this run did not measure: they are "
            "measured where the teacher's likeliest tokens are stored (`score-teacher --top-k 64`, or `top_k: 64` in "
            "section `score_teacher` of a recipe).",
            quiet=True,
        )
    elif mass := curves["val_top_k_mass"].values:
        yield Text(
            f"KLD and reverse KLD are over the teacher's stored tokens and all others as one, which hold "
            f"{mass[-1]:.1%} of its probability: both are a little smaller than over the whole vocabulary.",
            quiet=True,
        )


def _figure_3(training: Training) -> Iterator[Figure]:
    for kl, reward, what in (
        ("val_reverse_kl", "val_reward_chosen", "held out"),
        ("reverse_kl", "reward_chosen", "steps"),
    ):
        pairs = _paired(training.curves[kl], training.curves[reward])
        if len(pairs) < 2:
            continue
        groups = _by_epoch(pairs, training.epoch_steps)
        series = [Series(label, [x for x, _ in points], [y for _, y in points]) for label, points in groups.items()]
        lowest, highest = min(pairs.values()), max(pairs.values())
        ends = f"from {_point(lowest)} to {_point(highest)}"
        alt = f"Fig. 3: reward of y_t against reverse KLD, {what}: {len(pairs)} points, {ends}"
        svg = figures.scatter_chart(
            f"figure-3-{what.replace(' ', '-')}",
            alt,
            series,
            x_label="reverse KLD, nats a token",
            y_label="reward of y_t",
            ordered=True,
        )
        yield Figure(svg, f"Fig. 3: reward of y_t against reverse KLD, {what}, by epoch", alt)


def _paired(x: Curve, y: Curve) -> dict[float, tuple[float, float]]:
    """By the steps that both have, their values there."""
    other = dict(zip(y.steps, y.values, strict=True))
    pairs = {step: (value, other[step]) for step, value in zip(x.steps, x.values, strict=True) if step in other}
    return {step: pair for step, pair in pairs.items() if all(map(math.isfinite, pair))}


def _by_epoch(
    pairs: Mapping[float, tuple[float, float]], epoch_steps: float | None
) -> dict[str, list[tuple[float, float]]]:
    """The points of each epoch; of several together where there are many, and of equal shares where none is known."""
    last = max(pairs)
    total = math.ceil(round(last / epoch_steps, 6)) if epoch_steps else MOST_EPOCHS
    size = epoch_steps or max(last / MOST_EPOCHS, 1)
    together = max(1, math.ceil(total / MOST_EPOCHS))
    groups: dict[str, list[tuple[float, float]]] = {}
    for step, pair in pairs.items():
        number = max(math.ceil(round(step / size, 6)), 1 if not epoch_steps else 0)
        if epoch_steps and number == 0:
            label = "before"
        elif epoch_steps:
            first = (number - 1) // together * together + 1
            end = min(first + together - 1, total)
            label = f"epoch {first}" if first == end else f"epochs {first} to {end}"
        else:
            label = f"to step {min(math.ceil(number * size), int(last))}"
        groups.setdefault(label, []).append(pair)
    return groups


def _point(pair: tuple[float, float]) -> str:
    return f"{pair[1]:.3g} at {pair[0]:.3g} nats"


def _figure_4(curves: Curves) -> Iterator[Figure]:
    for name, caption, axis, names in FIGURE_4:
        measured = curves.some(*names)
        if name == "reward" and not curves.some("val_reverse_kl", "val_reverse_kl_first"):
            continue  # it stands among the curves already
        if any(math.isfinite(value) for curve in measured.values() for value in curve.values):
            series = [series_of(names[key], curve, key) for key, curve in measured.items()]
            alt = alt_of(caption, series)
            yield Figure(figures.line_chart(f"figure-4-{name}", alt, series, y_label=axis), caption, alt)
