"""Numbers from a response and its references: Rouge-L, exact match, lengths, repetition."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import regex

# rouge_score takes a-z and 0-9 alone for words. A reference that has other letters is compared by words of Unicode, and
# by characters in scripts that put no spaces between words.
BEYOND_ASCII = regex.compile(r"(?V1)[[\p{L}\p{Nd}]--\p{ASCII}]")
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
WORD = regex.compile(rf"(?V1)[{UNSPACED}]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{UNSPACED}]]+")
UNSPOKEN = regex.compile(r"\S")  # of text without words, such as an emoji

# What exact match drops. Between digits, and before one, a mark is part of a number, but for the comma of thousands.
PUNCTUATION = regex.compile(r"(?<=\d),(?=\d{3}(?!\d))|(?!(?<=\d)[.,:/-](?=\d)|(?<![\w)])[-.](?=\d))[\p{P}$+<=>^`|~]")


def compares_by_unicode(references: Sequence[str]) -> bool:
    """Whether Rouge-L compares some of these references by words of Unicode, not by those of rouge_score."""
    return any(map(_needs_unicode, references))


def _needs_unicode(reference: str) -> bool:
    wordless = not reference.isascii() and not regex.search("[a-z0-9]", reference.lower())
    return wordless or BEYOND_ASCII.search(reference) is not None


class _UnicodeTokenizer:
    """Words of any script; for text in ASCII, exactly those of rouge_score."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._ascii = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        text = unicodedata.normalize("NFKC", text).lower()
        words = WORD.findall(text) or UNSPOKEN.findall(text)
        return [token for word in words for token in (self._ascii.tokenize(word) if word.isascii() else [word])]


@cache
def _rouge_scorer(beyond_ascii: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True, tokenizer=_UnicodeTokenizer() if beyond_ascii else None)


def rouge_l(response: str, references: Sequence[str]) -> float:
    """Rouge-L F-measure x 100 with stemming, the best over the references (the protocol of MiniLLM and DPKD).

    A reference in ASCII gives the number of rouge_score. One with other letters, which that drops, is compared by words
    of Unicode, or by characters where a script puts no spaces between words.
    """
    scores: list[float] = [
        _rouge_scorer(_needs_unicode(reference)).score(reference, response)["rougeL"].fmeasure
        for reference in references
    ]
    return 100.0 * max(scores)


def word_count(text: str) -> int:
    """Words of a text: what stands between spaces, and each character of scripts that put none between words."""
    return len(WORD.findall(text)) if BEYOND_ASCII.search(text) else len(text.split())


def _normalise(text: str) -> str:
    """Lower case without punctuation; of text that is nothing else, the text."""
    text = " ".join(text.lower().split())
    return " ".join(PUNCTUATION.sub("", text).split()) or text


def exact_match(response: str, references: Sequence[str]) -> float:
    """100 if the response equals a reference after lower-casing and stripping punctuation, else 0.

    Articles stay, and so do the marks of a number: 3.5 is not 35, and -5 is not 5, but 1,000 is 1000. A response that
    is empty equals nothing.
    """
    normalised = _normalise(response)
    return 100.0 * (bool(normalised) and normalised in {_normalise(reference) for reference in references})


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


def acceptance(draft_logps: Sequence[float], target_logps: Sequence[float]) -> float:
    """The share of a draft's tokens that its target accepts in speculative decoding, from log-probs [N] of both.

    For tokens that the draft q has sampled, the mean of min(1, p/q): its expectation is 1 - TV(p, q) of each position.
    """
    ratios = [math.exp(min(p - q, 0.0)) for q, p in zip(draft_logps, target_logps, strict=True)]
    return math.fsum(ratios) / len(ratios)


REPEATING = 0.5  # of the n-grams: a response that repeats more of them repeats itself
BROKEN = 0.4  # by how much the share of responses that are cut off, or of repeated n-grams, may grow in training


def answer_of(prompt: str, response: str, thinking_end: str | None) -> str | None:
    """What a response says after its thoughts, which `thinking_end` ends, such as </think>; all of it without one.

    None where the thoughts have no end. A response that never began to think, which is known where the text is a
    closing tag, is an answer.
    """
    if thinking_end is None:
        return response
    *_, end, answer = response.rpartition(thinking_end)
    if end:
        return answer.strip()
    if not thinking_end.startswith("</"):
        return None
    begin = "<" + thinking_end.removeprefix("</")
    _, begun, rest = prompt.rpartition(begin)
    is_thinking = begin in response or (bool(begun) and thinking_end not in rest)
    return None if is_thinking else response
