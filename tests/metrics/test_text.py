from __future__ import annotations

import pytest

from dpkd_offline.metrics.intervals import mean_and_spread
from dpkd_offline.metrics.text import exact_match, rouge_l


def longest_common_subsequence(a: list[str], b: list[str]) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@pytest.mark.parametrize(
    ("response", "reference"),
    [
        ("the cat sat on the mat", "a cat sat on a mat"),
        ("red green blue", "blue green red"),
        ("one two three four", "two four"),
        ("nothing shared", "in these words"),
    ],
)
def test_rouge_l_equals_the_f_measure_of_the_longest_common_subsequence(response: str, reference: str) -> None:
    a, b = response.split(), reference.split()
    common = longest_common_subsequence(a, b)
    expected = 0.0 if not common else 2 * (common / len(a)) * (common / len(b)) / (common / len(a) + common / len(b))
    assert rouge_l(response, [reference]) == pytest.approx(100 * expected)


def test_rouge_l_stems_and_takes_the_best_reference() -> None:
    assert rouge_l("runs quickly", ["running quick"]) == pytest.approx(100.0 * 0.5)  # "quickli" and "quick" differ
    assert rouge_l("jumping dogs", ["cats sleep", "jumps dog"]) == pytest.approx(100.0)


def test_exact_match_ignores_case_and_punctuation_but_not_articles() -> None:
    assert exact_match("  Yes, it is!", ["no", "yes it is"]) == 100.0
    assert exact_match("The answer", ["answer"]) == 0.0


def test_mean_and_spread() -> None:
    assert mean_and_spread([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert mean_and_spread([4.0]) == (4.0, 0.0)
