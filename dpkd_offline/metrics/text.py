"""Numbers from a response and its references: Rouge-L, exact match, repetition."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(response: str, references: Sequence[str]) -> float:
    """Rouge-L F-measure x 100 with stemming, the best over the references (the protocol of MiniLLM and DPKD)."""
    scorer = _rouge_scorer()
    scores: list[float] = [scorer.score(reference, response)["rougeL"].fmeasure for reference in references]
    return 100.0 * max(scores)


def _normalise(text: str) -> str:
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def exact_match(response: str, references: Sequence[str]) -> float:
    """100 if the response equals a reference after lower-casing and stripping punctuation (articles stay), else 0."""
    return 100.0 * (_normalise(response) in {_normalise(reference) for reference in references})


@dataclass(frozen=True)
class Measure:
    """A number of a response beside its references, and how a table shows its mean."""

    of: Callable[[str, Sequence[str]], float]  # response, references
    title: str
    form: str
    better: int  # 1: more is better, -1: less is, 0: it is no verdict


# What `evaluate` measures of every response, by the name in results.json. A new measure is an entry here.
MEASURES = {
    "rouge_l": Measure(rouge_l, "Rouge-L", ".2f", better=1),
    "exact_match": Measure(exact_match, "exact match", ".2f", better=0),
}


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams of a response that stood in it before; 0 where it is too short to repeat one."""
    grams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


BROKEN = 0.4  # by how much the share of responses that are cut off, or of repeated n-grams, may grow in training
