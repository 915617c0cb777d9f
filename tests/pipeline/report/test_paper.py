"""The paper's tables beside ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dpkd_offline.common.markdown import markdown_table
from dpkd_offline.pipeline.report.paper import (
    ABLATIONS,
    EXACT_MATCH,
    ROUGE_L,
    ROUGE_L_BY_LENGTH,
    SETS,
    VARIANTS,
    Number,
    Paper,
    paper_tables,
)

PIPELINES = Path(__file__).parents[3] / "pipelines"


def test_our_numbers_stand_beside_the_papers_and_what_was_not_run_is_open() -> None:
    ours = {
        ("teacher", "dolly", "rouge_l"): Number(26.94, (25.0, 29.04)),
        ("dpkd", "dolly", "rouge_l"): Number(21.054),
        ("dpkd", "sni", "rouge_l"): Number(20.0),
        ("dpkd-340m", "selfinst", "rouge_l"): Number(12.5),
        ("dpkd-without-lm", "", "min_reverse_kl_first"): Number(0.123),
        ("dpkd", "", "max_reward"): Number(-0.5, (-0.6, -0.4)),
        ("minillm", "dolly", "exact_match:1"): Number(1.234),
        ("kd", "dolly", "rouge_l:2"): Number(9.0),
    }
    first, variants, ablations, exact_match, by_length = paper_tables("gpt2", ours)
    assert first.titles[1:4] == ["DollyEval, paper", "DollyEval, here", "SelfInst, paper"]
    assert first.rows[0] == ["GPT-2 1.5B, teacher", "27.6", "26.9 [25.0, 29.0]", "14.3", "", "27.6", ""]
    assert first.rows[5] == ["GPT-2 120M, AKL", "23.9", "", "–", "", "19.2", ""]
    assert first.rows[6] == ["GPT-2 120M, DPKD", "24.6", "21.1", "13.8", "", "25.4", "20.0"]
    assert first.rows[11] == ["GPT-2 340M, DPKD", "26.0", "", "14.3", "12.5", "27.6", ""]
    assert [first.rows[n][0][-4:] for n in first.strong] == ["DPKD", "DPKD"]
    assert [row[:2] for row in variants.rows] == [
        ["IPO", "18.78"],
        ["CPO", "24.31"],
        ["SimPO", "24.46"],
        ["DPKD", "24.62"],
    ]
    assert variants.rows[3][2] == "21.05"
    assert ablations.rows[0] == ["DPKD", "24.62", "21.05", "0.07", "", "0.97", "-0.50 [-0.60, -0.40]"]
    assert ablations.rows[1] == ["without LM loss", "23.47", "", "0.24", "0.12", "0.93", ""]
    assert exact_match.rows[1] == ["MiniLLM", "5.30", "", "0.93", "1.23", "0.63", ""]
    assert by_length.rows[0] == ["KD", "28.04", "", "21.65", "", "15.07", "9.00"]
    assert by_length.titles[5:] == ["over 70 words, paper", "over 70 words, here"]
    for table in (first, variants, ablations, exact_match, by_length):
        assert table.caption.startswith("Table ") and "2406.19774" in table.caption
        assert markdown_table(table.titles, table.rows)


def test_where_the_paper_has_no_number_of_opt_stands_a_dash() -> None:
    first, *others = paper_tables("opt", {("ipo", "dolly", "rouge_l"): Number(18.0)})
    assert [row[0] for row in first.rows] == ["OPT 13B, teacher", *(f"OPT 1.3B, {m}" for m in
        ("SFT", "KD", "SeqKD", "MiniLLM", "AKL", "DPKD"))]  # fmt: skip
    assert first.rows[6][1::2] == ["27.2", "14.9", "28.7"]
    assert others[0].rows[0] == ["IPO", "–", "18.00"]
    assert all(row[1::2] == ["–"] * len(row[1::2]) for table in others for row in table.rows)


@pytest.mark.parametrize("paper", ["gpt2", "opt"])
def test_the_papers_recipe_trains_every_row_of_the_tables(paper: Paper) -> None:
    recipe = yaml.safe_load((PIPELINES / f"paper-{paper}.yaml").read_text())
    assert recipe["paper"] == paper
    rows = {student for size in ROUGE_L[paper].values() for student in size}
    rows |= {*VARIANTS, *ABLATIONS, *EXACT_MATCH, *ROUGE_L_BY_LENGTH}
    assert set(recipe["students"]) == rows
    assert recipe["evaluate"]["prompts"].keys() == SETS.keys()
