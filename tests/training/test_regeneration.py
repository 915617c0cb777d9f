"""Rounds of the student's responses: how far it has moved, and when it answers anew."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.launched import ended, options, start
from helpers.runs import write_recipe
from helpers.studies import start_worker
from helpers.tiny import files_of, generate_config, score_config

from dpkd_offline.common.errors import Interrupted, MismatchError
from dpkd_offline.config.recipe import read_recipe
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.curation.verify import verify
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.generation.generate import generate
from dpkd_offline.generation.score_teacher import score_teacher
from dpkd_offline.models.loading import load_model
from dpkd_offline.training.checkpoint import load_state
from dpkd_offline.training.distributed import Processes
from dpkd_offline.training.examples import pair_source, pair_stream
from dpkd_offline.training.regeneration import measure_drift
from dpkd_offline.training.step import Run
from dpkd_offline.training.student import Student
from dpkd_offline.training.trainer import train

STEPS, EVERY = 6, 2
Line = dict[str, Any]


@pytest.fixture
def folder(datasets_by_family: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(datasets_by_family["llama"], tmp_path / "ds")
    return tmp_path / "ds"


def config_of(folder: Path, student: Path, output: Path, **changes: object) -> TrainConfig:
    values = {
        "dataset": folder,
        "student": str(student),
        "output": output,
        "dtype": "float32",
        "batch_size": 5,
        "learning_rate": 3e-3,
        "beta": 2.0,
        "max_steps": STEPS,
        "regenerate_every": EVERY,
        "regenerate_rounds": 2,
        "holdout": 0.0,
    }
    return TrainConfig.model_validate({**values, **changes})


def make_round(folder: Path, teacher: Path, config: TrainConfig) -> int:
    """The round that training waits for."""
    due = json.loads(config.due.read_text())
    generate(generate_config(folder, "student", config.due.parent / due["student"], round=due["round"]))
    score_teacher(score_config(folder, teacher, round=due["round"]))
    return int(due["round"])


def train_in_rounds(folder: Path, teacher: Path, config: TrainConfig) -> list[int]:
    """Until the student is there; the rounds that were made for it."""
    rounds = []
    while True:
        try:
            train(config)
        except Interrupted:
            rounds.append(make_round(folder, teacher, config))
        else:
            assert not config.due.exists()
            return rounds


def result(output: Path) -> dict[str, bytes]:
    """All that a run left but the metrics, which hold the rate of each step."""
    return {name: data for name, data in files_of(output).items() if name != "metrics.jsonl"}


def drift_lines(output: Path) -> list[Line]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "drift_kl" in line]


def test_the_drift_is_what_its_definition_says(folder: Path, students: dict[str, Path], tmp_path: Path) -> None:
    dataset = Dataset.open(folder)
    config = config_of(folder, students["llama"], tmp_path / "out", drift_pairs=9)
    stream, _ = pair_stream(dataset, config, 10**6)
    examples = list(stream.drift_examples())
    assert len(examples) == 9
    own = measure_drift(Student(load_model(str(students["llama"]), "float32")), examples, config, Processes())
    assert own["drift_kl"] == pytest.approx(0, abs=1e-4)
    assert own["drift_ess"] == pytest.approx(1, abs=1e-4)
    model = load_model(str(students["llama"]), "float32")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.9)
    d, lengths = [], []
    for e in examples:
        y = e.responses[1]
        with torch.inference_mode():
            logits = model(torch.tensor([e.prompt_ids + y])).logits[0].double()
        logps = logits.log_softmax(-1)[len(e.prompt_ids) - 1 : -1].gather(-1, torch.tensor(y)[:, None])
        d.append(sum(e.behavior_logps[1]) - float(logps.sum()))
        lengths.append(len(y))
    drift = measure_drift(Student(model), examples, config, Processes())
    weights = np.exp(-np.array(d))
    assert drift == pytest.approx(
        {
            "drift_kl": np.mean(d),
            "drift_kl_error": np.std(d, ddof=1) / 3,
            "drift_kl_token": sum(d) / sum(lengths),
            "drift_ess": weights.sum() ** 2 / (weights**2).sum() / 9,
            "drift_responses": 9,
        },
        rel=1e-3,
    )


def test_training_waits_for_each_round_and_goes_on_with_it(
    folder: Path, teachers: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    config = config_of(folder, students["llama"], tmp_path / "out")
    assert train_in_rounds(folder, teachers["llama"], config) == [1, 2]
    training = json.loads((tmp_path / "out" / "training.json").read_text())
    assert training["rounds"] == [EVERY, 2 * EVERY]
    lines = {(line["step"], line["drift_round"]): line for line in drift_lines(tmp_path / "out")}
    assert lines.keys() == {(0, 0), (2, 0), (2, 1), (4, 1), (4, 2), (6, 2)}
    for step, before in ((2, 0), (4, 1)):  # it falls to nothing when the student answers anew
        assert lines[step, before]["drift_kl_token"] > 100 * abs(lines[step, before + 1]["drift_kl_token"])
        assert lines[step, before + 1]["drift_ess"] == pytest.approx(1, abs=1e-3)
    # A run that finds all rounds there changes them at the same steps, and one without them learns something else.
    again = config_of(folder, students["llama"], tmp_path / "again" / "out")
    train(again)
    assert result(tmp_path / "again" / "out") == result(tmp_path / "out")
    assert drift_lines(tmp_path / "again" / "out") == drift_lines(tmp_path / "out")
    alone = config_of(folder, students["llama"], tmp_path / "alone", regenerate_every=None, round=0)
    train(alone)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "alone")]
    assert weights[0] != weights[1]


def test_a_run_that_was_stopped_anywhere_has_the_same_rounds(
    folder: Path, teachers: dict[str, Path], students: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(folder, students["llama"], tmp_path / "whole" / "out", save_every=1, replay=0.5)
    train_in_rounds(folder, teachers["llama"], config)
    run, step = json.loads((tmp_path / "whole" / "out" / "training.json").read_text())["run"], Run.step
    for stop in range(1, STEPS):
        output = tmp_path / f"stopped-{stop}" / "out"
        part = config_of(folder, students["llama"], output, save_every=1, replay=0.5)

        def stopped(self: Run, number: int, *rest: Any, at: int = stop) -> Any:
            if number == at:
                raise KeyboardInterrupt
            return step(self, number, *rest)

        monkeypatch.setattr(Run, "step", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(part)
        monkeypatch.setattr(Run, "step", step)
        state = load_state(output / "checkpoints", run)
        assert state is not None and state[0].switches == [s for s in (2, 4) if s <= stop]
        train(part)
        assert result(output) == result(tmp_path / "whole" / "out")
        assert drift_lines(output) == drift_lines(tmp_path / "whole" / "out")


def test_a_round_is_due_where_the_drift_is_too_large(
    folder: Path, teachers: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    changes = {"regenerate_every": None, "regenerate_above": 0.05, "drift_every": 1, "regenerate_rounds": 1}
    config = config_of(folder, students["llama"], tmp_path / "out", **changes)
    assert train_in_rounds(folder, teachers["llama"], config) == [1]
    (began,) = json.loads((tmp_path / "out" / "training.json").read_text())["rounds"]
    lines = drift_lines(tmp_path / "out")
    first = next(line["step"] for line in lines if line["step"] and line["drift_kl_token"] > 0.05)
    assert began == first < STEPS
    patient = config_of(folder, students["llama"], tmp_path / "none", **{**changes, "regenerate_above": 1e9})
    assert train_in_rounds(folder, teachers["llama"], patient) == []


def test_the_round_of_another_student_is_refused(
    folder: Path, teachers: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    config = config_of(folder, students["llama"], tmp_path / "out")
    with pytest.raises(Interrupted, match=r"round 1 is due after step 2: let .*round-001 answer"):
        train(config)
    generate(generate_config(folder, "student", students["llama"], round=1))
    score_teacher(score_config(folder, teachers["llama"], round=1))
    with pytest.raises(MismatchError, match=r"the student of round 1 is sha256:.*, the one that waits for it, .*001"):
        train(config)


def test_rows_come_from_the_latest_round_that_has_them(
    folder: Path, teachers: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    for round in (1, 2):
        generate(generate_config(folder, "student", students["llama"], round=round, seed=round))
        score_teacher(score_config(folder, teachers["llama"], round=round))
    dataset = Dataset.open(folder)
    rows = [
        {p.id: p.rejected_ids for s in range(dataset.plan.count) for p in dataset.pairs(r).read(s)} for r in range(3)
    ]

    def turns(replay: float, drop: str = "keep") -> list[int]:
        config = config_of(folder, students["llama"], tmp_path, replay=replay, truncated=drop)
        stream, first = pair_stream(dataset, config, 10**6)
        order = [e.id for e in stream.epoch(0)]
        assert first == 0
        for round in (1, 2):
            stream.add_round(pair_source(dataset, config, round, 10**6, False, False))
        examples = list(stream.epoch(0))
        assert [e.id for e in examples] == order
        assert examples == list(stream.epoch(0))
        return [max(r for r in range(3) if rows[r][e.id] == e.responses[1]) for e in examples]

    assert set(turns(0.0)) == {2}
    counts = np.bincount(turns(0.6), minlength=3)
    assert counts.min() > 0
    assert counts.sum() == dataset.plan.rows
    dropped = turns(0.0, "drop")
    assert len(dropped) == sum(
        p.chosen_finish_reason == p.rejected_finish_reason == "stop" for s in range(3) for p in dataset.pairs(0).read(s)
    )


@pytest.mark.slow
def test_two_processes_begin_a_round_at_the_same_step(
    folder: Path, teachers: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    more = {"regenerate-every": EVERY, "regenerate-rounds": 1, "save-every": 1}
    arguments = options(folder, students["llama"], tmp_path / "two", **more)
    waits = ended(start(tmp_path / "notes", arguments, 2))
    assert [code for code, _, _ in waits] == [75, 75]
    assert "round 1 is due after step 2" in waits[0][2] + waits[1][2]
    config = config_of(folder, students["llama"], tmp_path / "two")
    assert make_round(folder, teachers["llama"], config) == 1
    assert [code for code, _, _ in ended(start(tmp_path / "notes", arguments, 2))] == [0, 0]
    training = json.loads((tmp_path / "two" / "training.json").read_text())
    assert training["rounds"] == [EVERY]
    lines = [(line["step"], line["drift_round"]) for line in drift_lines(tmp_path / "two")]
    assert lines == [(0, 0), (2, 0), (2, 1), (4, 1)]


def recipe_in_rounds(folder: Path, teacher: Path) -> Path:
    path = write_recipe(folder, teacher)
    recipe = yaml.safe_load(path.read_text())
    del recipe["evaluate"]
    recipe["train"] |= {"max_steps": 4, "save_every": 1, "learning_rate": 1e-3}
    recipe["regenerate"] = {"when": "steps", "every": 1, "rounds": 2, "share": 0.5}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@pytest.mark.slow
def test_distill_makes_the_rounds_and_goes_on_wherever_it_was_killed(tmp_path: Path, teachers: dict[str, Path]) -> None:
    results = {}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        recipe = recipe_in_rounds(tmp_path / name, teachers["llama"])
        kills, draw = 0, random.Random(3)
        while name == "killed" and kills < 4:
            process = start_worker(recipe, printed=tmp_path / "killed-run")
            process.join(draw.uniform(1, 12))
            kills += process.is_alive()
            process.kill()
            process.join()
        process = start_worker(recipe, printed=tmp_path / f"{name}-run")
        process.join(300)
        assert process.exitcode == 0, (tmp_path / f"{name}-run.err").read_text()
        files = files_of(tmp_path / name / "run")
        lines = [json.loads(line) for line in files.pop("stages.jsonl").splitlines()]
        assert {line["stage"] for line in lines} >= {"generate: student, round 2", "score-teacher, round 2", "train"}
        assert verify(tmp_path / name / "run" / "dataset").rows["pairs/round-002"] == 12
        dataset = Dataset.open(tmp_path / name / "run" / "dataset")
        answers = [row.round for shard in range(3) for row in dataset.responses("student", 2).read(shard)]
        assert len(set(answers)) > 1 and max(answers) == 2
        assert dataset.pairs(2).require_provenance()["reused_from"]
        results[name] = {
            path: data
            for path, data in files.items()
            if not path.endswith(("metrics.jsonl", ".yaml", "report.html", "report.md")) and "_table.json" not in path
        }
    assert results["whole"].keys() == results["killed"].keys()
    assert not [path for path, data in results["whole"].items() if results["killed"][path] != data]


def test_a_recipe_says_when(tmp_path: Path) -> None:
    recipe = read_recipe(recipe_in_rounds(tmp_path, Path("big")), ["regenerate={when: drift, above: 0.2, replay: 0.3}"])
    assert recipe.regenerate is not None
    assert recipe.regenerate.for_train() == {"regenerate_above": 0.2, "regenerate_rounds": 3, "replay": 0.3}
    for wrong, message in (
        ("{when: drift}", "when: drift needs above"),
        ("{when: steps}", "when: steps needs every"),
        ("{when: epochs, every: 1, above: 2}", "no above"),
        ("{when: often}", "'regenerate.when'"),
    ):
        with pytest.raises(Exception, match=message):
            read_recipe(tmp_path / "recipe.yaml", [f"regenerate={wrong}"])
