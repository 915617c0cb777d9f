from __future__ import annotations

from typing import Any

from dpkd_offline.evaluation.table import results_table, verdict


def of(mean: float, low: float, high: float, *buckets: float) -> dict[str, Any]:
    """The results of a model; by length, 2 and 1 prompts."""
    by_length = [
        {"above": above, "to": to, "prompts": count, "rouge_l": value, "exact_match": 0.0}
        for above, to, count, value in zip((0, 30), (30, None), (2, 1), buckets, strict=False)
    ]
    rouge = {"mean": mean, "spread": 0.5, "by_seed": [mean] * 2, "interval": [low, high]}
    return {
        "prompts": 3,
        "seeds": [1, 2],
        "rouge_l": rouge,
        "truncated": 0.25,
        "repeating": 0.0,
        "by_length": by_length,
    }


AFTER = {
    **of(12, 10, 14, 13, 9),
    "difference": {
        "prompts": 3,
        "rouge_l": {"mean": 2.75, "interval": [1.5, 4.0], "verdict": "better", "gap_closed": 0.25},
    },
    "warnings": ["step 3: odd"],
}


def test_the_table_is_aligned_markdown_with_intervals_and_the_difference() -> None:
    results = {"teacher": of(20, 18, 22, 21, 18), "student-before": of(9.25, 8, 10.5, 9, 9.75), "student-after": AFTER}
    assert results_table(results).splitlines() == [
        "| model                     | Rouge-L ↑            | cut off ↓   | repeating ↓   |",
        "|---------------------------|----------------------|-------------|---------------|",
        "| teacher                   | 20.00 [18.00, 22.00] | 25%         | 0%            |",
        "| student before            | 9.25 [8.00, 10.50]   | 25%         | 0%            |",
        "| student after             | 12.00 [10.00, 14.00] | 25%         | 0%            |",
        "| after − before            | +2.75 [+1.50, +4.00] |             |               |",
        "| of the gap to the teacher | 25%                  |             |               |",
        "",
        "3 held-out prompts, 2 seeds: mean [95 % interval over prompts]",
        "",
        "| by words of the reference   | 1 to 30 (2)   | over 30 (1)   |",
        "|-----------------------------|---------------|---------------|",
        "| Rouge-L, teacher            | 21.00         | 18.00         |",
        "| Rouge-L, student before     | 9.00          | 9.75          |",
        "| Rouge-L, student after      | 13.00         | 9.00          |",
        "| exact match, teacher        | 0.00          | 0.00          |",
        "| exact match, student before | 0.00          | 0.00          |",
        "| exact match, student after  | 0.00          | 0.00          |",
        "",
        "The student after training is better in Rouge-L (9.25 → 12.00, 25% of the gap to the teacher).",
        "",
        "warning: step 3: odd",
    ]


def test_each_prompt_set_has_its_tables_and_its_verdict() -> None:
    before = of(9.25, 8, 10.5)
    results = {
        "student-before": {"sets": {"one": before, "two": before}},
        "student-after": {"sets": {"one": AFTER, "two": {**before, "difference": {}}}},
    }
    sentence = verdict(results)
    assert sentence is not None
    assert sentence.startswith("one: The student after training is better in Rouge-L")
    assert "two: The student after training is no different beyond noise in Rouge-L" in sentence
    lines = results_table(results).splitlines()
    assert lines[0] == "one:" and "two:" in lines
