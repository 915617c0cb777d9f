"""Responses side by side: which prompts are worth a look, and what each model answered.

An evaluation may have very many responses: of those of its first seed only a number and a place each are in memory.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from dpkd_offline.common.errors import DataError, MismatchError
from dpkd_offline.common.files import first_fault, opened
from dpkd_offline.evaluation.responses import ResponseRow
from dpkd_offline.evaluation.summary import RESPONSES
from dpkd_offline.metrics.intervals import interval_of_mean
from dpkd_offline.metrics.text import word_count
from dpkd_offline.pipeline.report.blocks import Example, Quote
from dpkd_offline.pipeline.report.run import Evaluation

LONGEST_LINE = 1 << 24  # bytes
MOST_LETTERS = 1500  # of a text that is shown
LONGEST_EXCERPT = 110
PER_GROUP = 3
SEED = 0


class EvaluatedRow(ResponseRow):
    """A line of responses.jsonl with its score."""

    finish_reason: str = "stop"
    tokens: int = 0
    rouge_l: float = math.nan  # of a line that was not scored


@dataclass
class Scores:
    """Of an evaluation: per prompt the first seed's score and the place of its line; and what all seeds come to."""

    path: Path
    seed: int | None = None
    first: dict[str, tuple[float, int, int]] = field(default_factory=dict)  # Rouge-L, number of the line, its place
    words: dict[str, int] = field(default_factory=dict)  # of the first reference
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)  # Rouge-L over seeds, how many

    @classmethod
    def read(cls, evaluation: Evaluation) -> Scores:
        """One pass over all lines.

        Raises:
            DataError: a line is malformed.
            MismatchError: the file is not the one that its results.json vouches for.
        """
        scores, digest, place = cls(evaluation.folder / RESPONSES), hashlib.sha256(), 0
        with opened(scores.path) as file:
            number = 0
            while line := file.readline(LONGEST_LINE):
                number += 1
                digest.update(line)
                row = _row(line, scores.path, number)
                scores.seed = row.seed if scores.seed is None else scores.seed
                if row.seed == scores.seed:
                    scores.first[row.id] = row.rouge_l, number, place
                    scores.words[row.id] = word_count((row.references or [""])[0])
                total, count = scores.sums.get(row.id, (0.0, 0))
                scores.sums[row.id] = total + row.rouge_l, count + 1
                place += len(line)
        if evaluation.results.get("responses") not in (None, digest.hexdigest()):
            raise MismatchError(f"{scores.path}: was changed after the results beside it were written; evaluate again")
        return scores

    def row(self, prompt: str) -> EvaluatedRow:
        """The first seed's line of a prompt."""
        _, number, place = self.first[prompt]
        with opened(self.path) as file:
            file.seek(place)
            return _row(file.readline(LONGEST_LINE), self.path, number)

    def interval(self, above: int, to: int | None) -> tuple[float, float] | None:
        """The 95 % interval of mean Rouge-L over the prompts whose references have so many words."""
        means = [
            total / count
            for prompt, (total, count) in self.sums.items()
            if (self.words[prompt] > above or above == 0) and (to is None or self.words[prompt] <= to)
        ]
        return interval_of_mean(np.array(means))


def _row(line: bytes, path: Path, number: int) -> EvaluatedRow:
    try:
        return EvaluatedRow.model_validate_json(line)
    except ValidationError as error:
        raise DataError(f"{path}:{number}: {first_fault(error)}") from error


def examples(scores: dict[str, Scores], before: str | None, after: str) -> list[tuple[str, list[Example]]]:
    """Groups of examples with what each shows; a prompt stands in one group at most.

    Args:
        scores: of each model.
        before: the model that `after` is compared with, if there is one.
    """
    prompts = [p for p in scores[after].first if all(p in of.first for of in scores.values())]
    of_after = {prompt: scores[after].first[prompt][0] for prompt in prompts}
    scored = all(math.isfinite(score) for of in scores.values() for score, _, _ in of.first.values())
    groups: list[tuple[str, list[str]]] = []
    if scored and before is not None:
        change = {prompt: of_after[prompt] - scores[before].first[prompt][0] for prompt in prompts}
        groups.append(("What got better the most", sorted(prompts, key=lambda p: -change[p])))
        groups.append(("What got worse the most", sorted(prompts, key=lambda p: change[p])))
    if scored:
        groups.append(("The best responses", sorted(prompts, key=lambda p: -of_after[p])))
        groups.append(("The worst responses", sorted(prompts, key=lambda p: of_after[p])))
    groups.append(("Drawn at random", random.Random(SEED).sample(prompts, len(prompts))))
    taken: set[str] = set()
    shown = []
    for title, order in groups:
        chosen = [prompt for prompt in order if prompt not in taken][:PER_GROUP]
        taken.update(chosen)
        if chosen:
            shown.append((title, [example(prompt, scores, n == 0) for n, prompt in enumerate(chosen)]))
    return shown


def example(prompt: str, scores: Mapping[str, Scores], unfolded: bool) -> Example:
    """A prompt, its reference, and what each model answered with its first seed."""
    rows = {model: of.row(prompt) for model, of in scores.items()}
    first = next(iter(rows.values()))
    question = [Quote("prompt", cut(first.task)), Quote("reference", cut((first.references or [""])[0]))]
    scored, answers, numbers = not any(math.isnan(row.rouge_l) for row in rows.values()), [], []
    for model, row in rows.items():
        name = model.replace("-", " ")
        score = f"Rouge-L {row.rouge_l:.1f}, " if scored else ""
        cut_off = ", cut off" if row.finish_reason == "length" else ""
        answers.append(Quote(f"{name}: {score}{row.tokens} tokens{cut_off}", cut(row.text)))
        numbers.append(f"{name} {row.rouge_l:.0f}")
    detail = f"Rouge-L: {', '.join(numbers)}" if scored else "not scored"
    return Example(_excerpt(first.task), detail, question, answers, unfolded)


def _excerpt(text: str) -> str:
    line = " ".join(text.replace("`", "'").split())
    return line if len(line) <= LONGEST_EXCERPT else f"{line[: LONGEST_EXCERPT - 1]}…"


def cut(text: str, most: int = MOST_LETTERS) -> str:
    """The beginning of a long text, and how much follows."""
    rest = len(text) - most
    return text if rest <= 0 else f"{text[:most]}… ({rest:,} more characters)"
