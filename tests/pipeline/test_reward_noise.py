"""The script that makes Figure 2 of the paper."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from helpers.runs import log_prob

from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.models.loading import load_model

SCRIPT = Path(__file__).parents[2] / "pipelines" / "reward_noise.py"


def rows_of(printed: str) -> list[list[float]]:
    """The table's rows: scale, seed, reverse KL, rewards of y_t and y_s, margin, Rouge-L."""
    return [list(map(float, line.strip("| ").split("|"))) for line in printed.splitlines()[2:]]


def test_noise_takes_a_student_away_from_its_teacher(
    datasets_by_family: dict[str, Path],
    teachers: dict[str, Path],
    students: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    figure = tmp_path / "figures" / "noise.svg"
    how = ["--figure", str(figure), "--limit", "6", "--max-new-tokens", "12", "--dtype", "float32", "--seeds", "0,1"]
    folder, teacher, student = (str(of["gpt2"]) for of in (datasets_by_family, teachers, students))

    main([folder, "--teacher", teacher, "--student", teacher, "--scales", "0,0.5", *how])
    own, *noisy = rows_of(capsys.readouterr().out)
    assert own[2:6] == pytest.approx([0.0] * 4, abs=1e-3)
    assert [row[:2] for row in noisy] == [[0.5, 0], [0.5, 1]]
    assert all(row[2] > 0.02 and row[3] < -0.02 for row in noisy)  # reverse KL, and the reward of y_t
    assert figure.read_text().count("reverse KL") >= 1 and "<svg" in figure.read_text()

    main([folder, "--teacher", teacher, "--student", student, "--scales", "0", *how, "--limit", "100"])
    ((_, _, _, *rewards, _),) = rows_of(capsys.readouterr().out)
    model, dataset = load_model(student, "float32"), Dataset.open(Path(folder))
    pairs = [pair for shard in range(dataset.plan.count) for pair in dataset.pairs(0).read(shard)]
    expected = [0.0, 0.0]
    with torch.no_grad():
        for pair in pairs:
            for side, (y, p) in enumerate(
                ((pair.chosen_ids, pair.teacher_chosen_logps), (pair.rejected_ids, pair.teacher_rejected_logps))
            ):
                expected[side] += 2 * (log_prob(model, pair.prompt_ids, y).item() - sum(p)) / len(y) / len(pairs)
    assert rewards == pytest.approx([*expected, expected[0] - expected[1]], abs=2e-3)
