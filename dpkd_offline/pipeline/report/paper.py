"""The numbers of the paper (arXiv 2406.19774 v2), and its Tables 1 to 5 with those of a study beside them.

Rows are told by the names of students, columns by those of prompt sets, as `pipelines/paper-gpt2.yaml` has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dpkd_offline.pipeline.report.blocks import Table

Paper = Literal["gpt2", "opt"]
TEACHER = "teacher"
SETS = {"dolly": "DollyEval", "selfinst": "SelfInst", "sni": "S-NI"}
BUCKETS = ((0, 30), (30, 70), (70, None))  # words of the reference: above, and to
SOURCE = "arXiv 2406.19774 v2"
CAVEAT = (
    "The paper's numbers are of one seed; ours are means over the seeds of training, with 95 % intervals where these "
    "are known. Models, prompts, settings and seeds may differ from the paper's: compare rows within a column, not the "
    "two columns. A dash is a number that the paper does not have, an empty cell one that was not measured here."
)
NONE = "–"


@dataclass(frozen=True)
class Number:
    """A mean over the seeds of training, with its 95 % interval where that is known."""

    mean: float
    interval: tuple[float, float] | None = None


Ours = Mapping[tuple[str, str, str], Number]  # by student, prompt set and measure

# Table 1: Rouge-L on SETS.
TEACHERS: dict[Paper, tuple[str, tuple[float, ...]]] = {
    "gpt2": ("GPT-2 1.5B, teacher", (27.6, 14.3, 27.6)),
    "opt": ("OPT 13B, teacher", (29.2, 18.4, 30.4)),
}
METHODS = {"sft": "SFT", "kd": "KD", "seqkd": "SeqKD", "minillm": "MiniLLM", "akl": "AKL", "dpkd": "DPKD"}
ROUGE_L: dict[Paper, dict[str, dict[str, tuple[float | None, ...]]]] = {
    "gpt2": {
        "GPT-2 120M": {
            "sft": (23.3, 10.0, 16.3),
            "kd": (22.8, 10.8, 13.4),
            "seqkd": (22.7, 10.1, 16.4),
            "minillm": (24.6, 13.2, 25.3),
            "akl": (23.9, None, 19.2),
            "dpkd": (24.6, 13.8, 25.4),
        },
        "GPT-2 340M": {
            "sft-340m": (25.5, 13.0, 25.1),
            "kd-340m": (25.0, 12.0, 23.7),
            "seqkd-340m": (25.3, 12.6, 22.9),
            "minillm-340m": (25.4, 15.6, 27.4),
            "dpkd-340m": (26.0, 14.3, 27.6),
        },
    },
    "opt": {
        "OPT 1.3B": {
            "sft": (26.0, 11.4, 23.1),
            "kd": (25.4, 12.2, 21.9),
            "seqkd": (26.1, 12.7, 21.4),
            "minillm": (26.7, 14.8, 28.6),
            "akl": (None, None, None),
            "dpkd": (27.2, 14.9, 28.7),
        },
    },
}
# Tables 2 to 5 are of GPT-2 120M on DollyEval.
VARIANTS = {"ipo": ("IPO", 18.78), "cpo": ("CPO", 24.31), "simpo": ("SimPO", 24.46), "dpkd": ("DPKD", 24.62)}
# Rouge-L, the least reverse KL from the teacher, the highest reward.
ABLATIONS = {
    "dpkd": ("DPKD", (24.62, 0.07, 0.97)),
    "dpkd-without-lm": ("without LM loss", (23.47, 0.24, 0.93)),
    "dpkd-without-length": ("without length normalisation", (22.79, 0.23, 0.90)),
}
EXACT_MATCH = {"seqkd": (5.15, 0.00, 0.00), "minillm": (5.30, 0.93, 0.63), "dpkd": (5.57, 1.85, 0.63)}
ROUGE_L_BY_LENGTH = {
    "kd": (28.04, 21.65, 15.07),
    "seqkd": (29.32, 24.67, 16.16),
    "sft": (30.10, 25.28, 16.09),
    "dpkd": (30.98, 26.69, 17.26),
}


def paper_tables(paper: Paper, ours: Ours) -> list[Table]:
    """The paper's tables, each of its numbers with ours beside it.

    Args:
        paper: whose part of Table 1. With `opt` the paper's columns of Tables 2 to 5 are dashes.
        ours: by student (or `teacher`), prompt set and measure; what is not there stays open. Measures are `rouge_l`
            and `exact_match`, these also with `:0`, `:1` and `:2` for BUCKETS. Training measures those of the set
            ``""``: `min_reverse_kl_first` and `max_reward`.
    """
    return [
        _table_1(paper, ours),
        _variants(paper, ours),
        _ablations(paper, ours),
        _by_length(paper, ours, "Table 4", "exact match", "exact_match", EXACT_MATCH),
        _by_length(paper, ours, "Table 5", "Rouge-L", "rouge_l", ROUGE_L_BY_LENGTH),
    ]


def _table_1(paper: Paper, ours: Ours) -> Table:
    rows: list[tuple[str, str, tuple[float | None, ...]]] = [(TEACHERS[paper][0], TEACHER, TEACHERS[paper][1])]
    strong = []
    for size, students in ROUGE_L[paper].items():
        for student, theirs in students.items():
            method = student.partition("-")[0]
            strong += [len(rows)] if method == "dpkd" else []
            rows.append((f"{size}, {METHODS[method]}", student, theirs))
    cells = [
        [title, *_cells(theirs, [ours.get((student, name, "rouge_l")) for name in SETS], ".1f")]
        for title, student, theirs in rows
    ]
    return Table(f"Table 1 of {SOURCE}: Rouge-L", ["", *_titles(SETS.values())], cells, strong)


def _variants(paper: Paper, ours: Ours) -> Table:
    rows = [
        [title, *_cells(_of_gpt2(paper, [value]), [ours.get((student, "dolly", "rouge_l"))], ".2f")]
        for student, (title, value) in VARIANTS.items()
    ]
    return Table(f"Table 2 of {SOURCE}: forms of preference, on DollyEval", ["", *_titles(["Rouge-L"])], rows, [3])


def _ablations(paper: Paper, ours: Ours) -> Table:
    measures = (("dolly", "rouge_l"), ("", "min_reverse_kl_first"), ("", "max_reward"))
    rows = [
        [title, *_cells(_of_gpt2(paper, theirs), [ours.get((student, *measure)) for measure in measures], ".2f")]
        for student, (title, theirs) in ABLATIONS.items()
    ]
    caption = (
        f"Table 3 of {SOURCE}: ablations, on DollyEval. The least reverse KL from the teacher at the first token, and "
        "the highest reward of y_t, while training; here on held-out prompts. A reward is β log q/p, and the paper "
        "states no β"
    )
    return Table(caption, ["", *_titles(["Rouge-L", "reverse KL", "reward"])], rows, [0])


def _by_length(
    paper: Paper, ours: Ours, number: str, title: str, measure: str, theirs: Mapping[str, Sequence[float]]
) -> Table:
    rows = [
        [
            METHODS[student],
            *_cells(
                _of_gpt2(paper, values),
                [ours.get((student, "dolly", f"{measure}:{n}")) for n in range(len(BUCKETS))],
                ".2f",
            ),
        ]
        for student, values in theirs.items()
    ]
    words = [f"over {low} words" if high is None else f"{low + 1} to {high} words" for low, high in BUCKETS]
    caption = f"{number} of {SOURCE}: {title} by words of the reference, on DollyEval"
    return Table(caption, ["", *_titles(words)], rows, [len(rows) - 1])


def _titles(of: Iterable[str]) -> list[str]:
    return [f"{title}, {whose}" for title in of for whose in ("paper", "here")]


def _of_gpt2(paper: Paper, values: Sequence[float]) -> Sequence[float | None]:
    return values if paper == "gpt2" else [None] * len(values)


def _cells(theirs: Sequence[float | None], ours: Sequence[Number | None], form: str) -> list[str]:
    """The paper's number and ours, in turn."""
    cells = []
    for value, number in zip(theirs, ours, strict=True):
        cells += [NONE if value is None else f"{value:{form}}", "" if number is None else number_text(number, form)]
    return cells


def number_text(number: Number, form: str) -> str:
    """`mean [from, to]`, or the mean alone."""
    if number.interval is None:
        return f"{number.mean:{form}}"
    low, high = number.interval
    return f"{number.mean:{form}} [{low:{form}}, {high:{form}}]"
