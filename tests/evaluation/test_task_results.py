from __future__ import annotations

from typing import Any

from dpkd_offline.evaluation.table import results_table, verdict_of


def model(**tasks: dict[str, tuple[float | None, float | None, bool | None]]) -> dict[str, Any]:
    """Results of a model with one measure and some benchmarks: value, standard error, whether more is better."""
    metrics = {
        task: {
            name: {"value": value, "stderr": stderr, "higher_is_better": better}
            for name, (value, stderr, better) in named.items()
        }
        for task, named in tasks.items()
    }
    return {
        "prompts": 5,
        "seeds": [1, 2],
        "rouge_l": {"mean": 10.0, "spread": 1.0, "by_seed": [9.3, 10.7]},
        "truncated": 0.0,
        "tasks": {task: {"metrics": named, "samples": 100} for task, named in metrics.items()},
    }


def test_the_main_metric_of_each_benchmark_has_a_column() -> None:
    gsm8k = {
        "exact_match,strict-match": (0.1, 0.01, True),
        "exact_match,flexible-extract": (0.25, 0.02, True),
        "other,strict-match": (0.9, 0.02, True),
    }
    table = results_table(
        {
            "student-before": model(gsm8k=gsm8k, wiki={"word_perplexity,none": (20.5, None, False)}),
            "student-after": model(gsm8k={"exact_match,flexible-extract": (0.3, 0.02, True)}),
        }
    )
    header, _, before, after = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[:4])
    assert header[-2:] == ["gsm8k exact_match (flexible-extract) ↑", "wiki word_perplexity ↓"]
    assert before[-2:] == ["0.2500 ± 0.0200", "20.5000"]
    assert after[-2:] == ["0.3000 ± 0.0200", "–"]
    assert "± standard error" in table


def test_a_difference_of_two_standard_errors_is_better_or_worse() -> None:
    names = ("up", "down", "loss", "close", "single", "neither")
    values: list[tuple[Any, Any]] = [
        ((0.5, 0.03, True), (0.6001, 0.04, True)),  # two combined standard errors are 0.1
        ((0.6001, 0.03, True), (0.5, 0.04, True)),
        ((3.0, 0.03, False), (2.8, 0.04, False)),
        ((0.5, 0.03, True), (0.5999, 0.04, True)),
        ((0.5, None, True), (0.9, None, True)),
        ((0.5, 0.01, None), (0.9, 0.01, None)),
    ]
    before, after = (
        model(**{name: {"acc,none": pair[side]} for name, pair in zip(names, values, strict=True)}) for side in (0, 1)
    )
    told, _, open_ = verdict_of(before, after).partition(" Cannot tell by ")
    assert "better in up acc (0.5000 → 0.6001)" in told
    assert "worse in down acc" in told and "better in loss acc" in told
    assert open_ == "close acc (0.5000 → 0.5999), single acc (0.5000 → 0.9000)."
    assert "neither" not in told
    assert "Cannot tell" not in verdict_of({**before, "tasks": {}}, after)
