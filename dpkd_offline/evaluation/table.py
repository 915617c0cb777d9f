"""Results of several models as a table, and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dpkd_offline.metrics.text import BROKEN

COLUMNS = {
    "rouge_l": ("Rouge-L", ".2f"),
    "exact_match": ("exact match", ".2f"),
    "teacher_nll": ("teacher NLL/token", ".3f"),
    "reward": ("implicit reward", ".4f"),
    "tokens": ("tokens", ".1f"),
}
QUALITY = {"rouge_l": 1, "teacher_nll": -1}  # whether more of it is better


def results_table(results: dict[str, dict[str, Any]]) -> str:
    """Results of several models as a Markdown table: mean ± spread over the seeds."""
    first = next(iter(results.values()))
    shown = {name: column for name, column in COLUMNS.items() if name in first}
    lines = [["model", *(title for title, _ in shown.values()), "cut off"]]
    for model, r in results.items():
        cells = [f"{r[name]['mean']:{form}} ± {r[name]['spread']:{form}}" for name, (_, form) in shown.items()]
        lines.append([model.replace("-", " "), *cells, f"{r['truncated']:.0%}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rows.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    prompts, seeds = first["prompts"], len(first["seeds"])
    note = f"{prompts} held-out prompts, {seeds} seeds: mean ± standard deviation over seeds"
    verdict = []
    if {"student-before", "student-after"} <= results.keys():
        verdict = ["", verdict_of(results["student-before"], results["student-after"])]
    return "\n".join([*rows, "", note, *verdict])


def verdict_of(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Whether a student is better or worse than it was, by each measure that is of quality.

    A difference counts where it is more than two standard errors of the seeds' means; of one seed nothing is known.
    Responses that no longer end come first: what repeats itself until it is cut off may have more words of the
    reference in it, and be likelier for the teacher, than a response.
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
    return f"The student after training is {', '.join(words)}."
