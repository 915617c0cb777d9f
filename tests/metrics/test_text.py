from __future__ import annotations

import math
import random
import unicodedata

import pytest
from rouge_score.rouge_scorer import RougeScorer

from dpkd_offline.metrics import text
from dpkd_offline.metrics.intervals import mean_and_spread
from dpkd_offline.metrics.text import (
    acceptance,
    answer_of,
    compares_by_unicode,
    exact_match,
    repetition,
    rouge_l,
    word_count,
)


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


@pytest.mark.parametrize(
    "reference",
    [
        "莱茵河是欧洲的第0条河。",
        "ライン川はヨーロッパの川です。",
        "Рейн — река в Европе.",
        "แม่น้ำไรน์",
        "राइन एक नदी है।",
        "라인강은 유럽의 강이다.",
        "نهر الراين",
        "Où est l’été ?",
        "é",
        "١٢٣",
        "🙂",
        "→ 🙂",
    ],
)
def test_equal_text_scores_100_in_any_script(reference: str) -> None:
    assert compares_by_unicode([reference])
    assert rouge_l(reference, [reference]) == pytest.approx(100.0)
    assert rouge_l(unicodedata.normalize("NFD", reference).upper(), [reference]) == pytest.approx(100.0)
    assert rouge_l("nothing of the kind", [reference]) == 0.0
    assert exact_match(reference, [reference]) == 100.0


def test_rouge_l_counts_words_and_where_there_are_none_characters() -> None:
    assert rouge_l("мама мыла раму", ["папа мыл раму"]) == pytest.approx(100 / 3)
    assert rouge_l("莱茵河在亚洲", ["莱茵河在欧洲"]) == pytest.approx(100 * 5 / 6)
    assert rouge_l("café", ["cafe", "cafés"]) == 0.0
    assert rouge_l("Große Straße", ["große Strasse"]) == pytest.approx(50.0)  # in lower case ß is no ss
    assert rouge_l("three cats sat by the river Łódź", ["Three cat sits by Łódź"]) == pytest.approx(100 * 2 * 4 / 12)


def test_a_reference_in_ascii_is_compared_by_words_of_ascii() -> None:
    """Of a response, too: it has the words a, na, ve and approach then."""
    assert rouge_l("a naïve approach", ["a quick approach to it"]) == pytest.approx(100 * 2 * 2 / (4 + 5))


def test_in_ascii_rouge_l_is_the_number_of_rouge_score() -> None:
    """Also beside quotation marks and dashes, which are no letters; and the words are the same in both ways."""
    scorer, words, draw = RougeScorer(["rougeL"], use_stemmer=True), text._UnicodeTokenizer(), random.Random(0)
    letters = "aaeeiiosstnrdlgy019 ' .-_,\n\tTS“—’"

    def some_text() -> str:
        return "".join(draw.choice(letters) for _ in range(draw.randrange(80)))

    for _ in range(2000):
        response, reference = some_text() + "running", some_text() + " runs flies"
        assert not compares_by_unicode([reference])
        expected = 100.0 * scorer.score(reference, response)["rougeL"].fmeasure
        assert rouge_l(response, [reference]) == expected
        assert words.tokenize(reference) == scorer._tokenizer.tokenize(reference)


@pytest.mark.parametrize(
    ("response", "reference", "same"),
    [
        ("3.5", "35", False),
        ("It is 3.5.", "it is 3.5", True),
        (".5", "5", False),
        ("-5", "5", False),
        ("it is -5", "it is 5", False),
        ("Straße", "STRASSE", False),
        ("3/5", "35", False),
        ("3-5", "35", False),
        ("10:30", "1030", False),
        ("1,5", "15", False),
        ("1,000,000 cats", "1000000 cats", True),
        ("12,345.67", "12345.67", True),
        ("(5), then 6.", "5 then 6", True),
        ("well-known", "wellknown", True),
        ("It’s “so”.", "its so", True),
        ("是。", "是", True),
        ("", "...", False),
        (" ", "", False),
        ("!!!", "...", False),
        ("<", ">", False),
        ("<", " <", True),
    ],
)
def test_exact_match_keeps_numbers_and_equates_no_empty_texts(response: str, reference: str, same: bool) -> None:
    assert exact_match(response, [reference]) == (100.0 if same else 0.0)
    assert exact_match(reference, [response]) == (100.0 if same else 0.0)


def test_mean_and_spread() -> None:
    assert mean_and_spread([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert mean_and_spread([4.0]) == (4.0, 0.0)
    assert mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))


def test_words_are_counted_in_any_script() -> None:
    assert word_count("Two words, it's four") == 4
    assert word_count("") == 0
    assert word_count("莱茵河 is long") == 5
    assert word_count("Привет, большой мир") == 3


def test_what_follows_the_thoughts_is_the_answer() -> None:
    end = "</think>"
    assert answer_of("p", "all of it", None) == "all of it"
    assert answer_of("p", "<think>a b</think>\n\nfour", end) == "four"
    assert answer_of("p<think>", "a b</think> four", end) == "four"
    assert answer_of("p", "<think>a</think>b<think>c</think>d", end) == "d"
    assert answer_of("p", "<think>for ever", end) is None
    assert answer_of("p<think>\n", "for ever", end) is None
    assert answer_of("p<think></think>", "no thought", end) == "no thought"  # as where thinking is turned off
    assert answer_of("p", "no thought", end) == "no thought"
    turns = "<think>a</think>b, and then "  # in a prompt of several turns the last thought counts
    assert answer_of(turns + "<think>", "for ever", end) is None
    assert answer_of(turns, "no thought", end) == "no thought"
    assert answer_of("p", "no end", "[done]") is None
    assert answer_of("p", "x[done]y", "[done]") == "y"


def test_repeated_n_grams_are_those_that_stood_before() -> None:
    assert repetition([1, 2, 3, 4] * 3) == pytest.approx(5 / 9)  # of 9 four are new: 1234, 2341, 3412, 4123
    assert repetition([1, 2, 3, 1, 2, 3, 4], n=2) == pytest.approx(2 / 6)  # 12 and 23, of 12 23 31 12 23 34
    assert repetition([7] * 5) == 0.5
    assert repetition([1, 2, 3, 4, 5]) == repetition([7] * 4) == repetition([7] * 3) == repetition([]) == 0


def test_accepted_drafts_are_those_that_two_distributions_share() -> None:
    """The mean over what q samples is 1 - TV(p, q)."""
    rng = random.Random(0)
    q, p = [0.5, 0.3, 0.15, 0.05], [0.2, 0.4, 0.1, 0.3]
    tokens = rng.choices(range(4), q, k=40_000)
    logs = [[math.log(d[token]) for token in tokens] for d in (q, p)]
    assert acceptance(*logs) == pytest.approx(sum(map(min, q, p)), abs=0.01)
    assert acceptance(logs[0], logs[0]) == 1.0
    with pytest.raises(ValueError, match="zip"):  # of other tokens
        acceptance([-1.0, -2.0], [-1.0])
