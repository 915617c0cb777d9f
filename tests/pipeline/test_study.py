"""Studies: what is done once, who does it, what comes of a student that fails, and the table."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.fake_server import serving
from helpers.judging import FakeJudge, write_evaluation
from helpers.studies import contents, start_worker, write_study
from helpers.tiny import write_jsonl

from dpkd_offline.common.errors import Interrupted, MismatchError, OutputBusy, StageFailed, StudentRuined, UsageError
from dpkd_offline.common.ownership import LOCK, shared_output
from dpkd_offline.config.judge import JudgeConfig
from dpkd_offline.config.recipe import Recipe, read_recipe
from dpkd_offline.curation.verify import verify
from dpkd_offline.evaluation.judge import judge
from dpkd_offline.pipeline import distill
from dpkd_offline.pipeline.report import report
from dpkd_offline.pipeline.report.report import ReportResult
from dpkd_offline.pipeline.study import Study, run_study, study_of
from dpkd_offline.pipeline.study_layout import read_study
from dpkd_offline.pipeline.study_plan import plan_of_study, table_of_study

THREE = {"sft": {"train": {"objective": "sft"}}, "kd": {"train": {"objective": "kd"}}, "raw": {"sft": None}}
ROUNDS = {"regenerate": {"when": "steps", "every": 2, "rounds": 1}}


class Stages:
    """Plays the stages: leaves what they would, notes which ran, and ends with the codes that a test sets."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.codes: dict[str, int] = {}  # by the end of a stage's output
        self.seconds = 0.0
        self.evaluated: Callable[[Path], None] = self._evaluate
        self.judged: Callable[[str, dict[str, Any]], None] = lambda output, values: None

    def __call__(self, command: list[str], *_: object) -> tuple[int, int]:
        (values,) = yaml.safe_load(Path(command[command.index("--config") + 1]).read_text()).values()
        output = values.get("output") or "/".join(filter(None, [values["dataset"], values.get("student_name")]))
        name = f"{command[3]} {output.partition('/study/')[2]}".strip()
        self.ran.append(name)
        time.sleep(self.seconds)
        code = next((code for end, code in self.codes.items() if name.endswith(end)), 0)
        if code not in (0, 5):
            return code, 0
        if command[3] == "train":
            warnings = [{"step": 1, "warning": "its responses repeat"}]
            why = "stopped after step 2" if code else None
            record = {"run": "r", "steps": 3, "warnings": warnings, "ruined": why}
            Path(output).mkdir(parents=True, exist_ok=True)
            (Path(output) / "training.json").write_text(json.dumps(record))
        if command[3] == "evaluate":
            self.evaluated(Path(output))
        if command[3] == "judge":
            self.judged(output, values)
        return code, 0

    def _evaluate(self, output: Path) -> None:
        """NLL of 40 prompts: that of the teacher 1, before 3, and of kd a bit better than of the others."""
        draw = random.Random(str(output).partition("/study/")[2])
        level = (
            1.0 if output.name == "teacher" else 1.9 if "/kd/" in str(output) else 2.5 if "seed" in str(output) else 3.0
        )
        values = [level + draw.uniform(-0.2, 0.2) for _ in range(40)]
        output.mkdir(parents=True, exist_ok=True)
        mean = {"mean": sum(values) / 40, "spread": 0.0, "by_seed": [sum(values) / 40], "interval": [0.0, 9.0]}
        numbers = {"prompts": 40, "seeds": [1], "teacher_nll": mean, "truncated": 0.25, "made": {}}
        (output / "results.json").write_text(json.dumps(numbers))
        write_jsonl(
            output / "responses.jsonl",
            [{"id": str(n), "references": ["a"], "teacher_nll": value} for n, value in enumerate(values)],
        )


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    played = Stages()
    monkeypatch.setattr(distill, "_run", played)
    monkeypatch.setattr(distill, "_has_begun", lambda stage: True)
    # What these stages leave is not all that a page shows: tests/pipeline/report/test_study_page.py.
    page = ReportResult(Path("report.html"), Path("report.md"))
    monkeypatch.setattr(report, "report_study", lambda folder, layout: page)
    return played


Write = Callable[..., tuple[Recipe, Path]]


@pytest.fixture
def study(tmp_path: Path, teachers: dict[str, Path]) -> Write:
    def write(**changes: Any) -> tuple[Recipe, Path]:
        path = write_study(tmp_path, teachers["llama"], **{"students": THREE, "baseline": "sft", **changes})
        return read_recipe(path), path

    return write


def test_what_students_share_is_done_once_and_the_table_compares_them(study: Write, stages: Stages) -> None:
    recipe, path = study()
    result = run_study(recipe, path)
    assert stages.ran == [
        *("generate dataset", "evaluate evaluation/teacher"),
        *("init-student starts/start-1/student-init", "train starts/start-1/student-sft", "generate dataset"),
        *("score-teacher dataset", "evaluate evaluation/start-1"),
        *("init-student starts/start-2/student-init", "generate dataset/start-2", "score-teacher dataset/start-2"),
        "evaluate evaluation/start-2",
        *(
            f"{command} students/{name}/seed-{seed}/{what}"
            for seed in (1, 2)
            for name in THREE
            for command, what in (("train", "student"), ("evaluate", "evaluation"))
        ),
    ]
    layout = read_study(recipe.output)
    assert layout is not None and layout.students["raw"].start == "start-2"
    for unit in ("starts/start-1", "students/kd/seed-2"):
        assert (recipe.output / unit / "stages.jsonl").exists()
    students = result.results["students"]
    kd = students["kd"]
    assert kd["state"] == "done" and len(kd["teacher_nll"]["by_seed"]) == 2
    assert (
        kd["difference"]["teacher_nll"]["verdict"] == kd["difference_to_before"]["teacher_nll"]["verdict"] == "better"
    )
    assert kd["difference_to_before"]["teacher_nll"]["gap_closed"] == pytest.approx(0.55, abs=0.05)
    assert students["raw"]["difference"]["teacher_nll"]["verdict"] == "cannot tell on 40 prompts"
    low, high = kd["teacher_nll"]["interval"]
    assert low < kd["teacher_nll"]["mean"] < high
    table = (recipe.output / "results.md").read_text()
    rows = [line.split("|")[1].strip() for line in table.splitlines()[2:8]]
    assert rows == ["teacher", "start-1, before", "start-2, before", *THREE]
    assert "40 held-out prompts, 2 seeds of training: mean [95 % interval over seeds and prompts]" in table
    assert "kd, seed 2: step 1: its responses repeat" in result.warnings

    stages.ran.clear()
    again = run_study(recipe, path)
    assert not stages.ran and again.results == result.results

    more, _ = study(students={"raw": THREE["raw"], **THREE, "ipo": {"train": {"objective": "ipo"}}})  # in another order
    run_study(more, path)
    assert stages.ran == [
        f"{command} students/ipo/seed-{seed}/{what}"
        for seed in (1, 2)
        for command, what in (("train", "student"), ("evaluate", "evaluation"))
    ]
    alone, _ = study(seeds=[1], baseline=None)
    assert "1 seed of training: mean [95 % interval over prompts], which says nothing" in _table(alone, path)


@pytest.mark.parametrize("form", ["pairwise", "score"])
def test_each_student_is_judged_beside_its_start(form: str, study: Write, stages: Stages) -> None:
    """kd is preferred to its start under one seed and not under the other, sft always; 'raw' starts elsewhere."""

    def evaluated(output: Path) -> None:
        shutil.rmtree(output, ignore_errors=True)
        letter = "a" if "/sft/" in str(output) or output.match("kd/seed-1/*") else "c" if "seed" in str(output) else "b"
        write_evaluation(output, [letter * 3] * 4, teacher_nll=1.0)

    def judged(output: str, values: dict[str, Any]) -> None:
        judge(JudgeConfig.model_validate(values))

    stages.evaluated, stages.judged = evaluated, judged
    with serving(FakeJudge(lambda first, second: "1" if first < second else "2")) as (url,):
        recipe, path = study(judge={"judge_model": "oracle", "url": [url], "form": form})
        result = run_study(recipe, path)
    assert [name for name in stages.ran if name.startswith("judge")] == [
        f"judge students/{name}/seed-{seed}/judge" for seed in (1, 2) for name in THREE
    ]
    found = {name: of["judge"] for name, of in result.results["students"].items()}
    assert {of["judge"] for of in found.values()} == {"oracle"}
    table = (recipe.output / "results.md").read_text()
    if form == "pairwise":
        wins = {name: of["win_rate"]["by_seed"] for name, of in found.items()}
        assert wins == {"sft": [100, 100], "kd": [100, 0], "raw": [0, 0]}
        low, high = found["kd"]["win_rate"]["interval"]
        assert 0 <= low < 50 < high <= 100 and found["kd"]["win_rate"]["mean"] == 50
        assert "judge: win rate against the start, %" in table
    else:
        assert found["kd"]["ratio_of_sums"]["by_seed"] == [pytest.approx(n) for n in (200.0, 200.0)]
    ran = len(stages.ran)
    assert run_study(recipe, path).results == result.results and len(stages.ran) == ran


def _table(recipe: Recipe, path: Path) -> str:
    return (run_study(recipe, path).path / "results.md").read_text()


def test_a_student_that_fails_or_is_ruined_does_not_stop_the_others(study: Write, stages: Stages) -> None:
    recipe, path = study()
    stages.codes = {"sft/seed-2/student": 3, "kd/seed-1/student": 5, "start-2/student-init": 69}
    result = run_study(recipe, path)
    states = {name: student["state"] for name, student in result.results["students"].items()}
    assert states == {"sft": "failed with seed 2", "kd": "ruined with seed 1", "raw": "failed"}
    assert not any("/raw/" in name for name in stages.ran)
    assert result.results["students"]["kd"]["difference"]["seeds"] == [1]  # those that both have
    with pytest.raises(
        StageFailed, match=r"failed: start-2 \(init-student.*69\) and sft, seed 2 \(train.*3\)"
    ) as failed:
        result.raise_failure()
    assert failed.value.exit_code == 69
    table = (recipe.output / "results.md").read_text()
    assert "| failed with seed 2 |" in table and "warning: sft, seed 2: failed: train ended with exit code 3" in table

    stages.ran.clear()
    stages.codes = {"kd/seed-1/student": 5}
    result = run_study(recipe, path)  # tries again what failed, and nothing else
    assert stages.ran[0] == "init-student starts/start-2/student-init"
    assert [name for name in stages.ran if "/kd/" in name or "/sft/seed-1" in name or "start-1" in name] == []
    assert not list(recipe.output.rglob("failed.json"))
    with pytest.raises(StudentRuined, match="got worse and stopped early: kd, seed 1"):
        result.raise_failure()


def test_killed_anywhere_it_goes_on_with_the_next_stage(study: Write, stages: Stages, monkeypatch: Any) -> None:
    recipe, path = study(seeds=[1])
    seen: list[str] = []

    def dies(*arguments: Any) -> tuple[int, int]:
        ended = stages(*arguments)
        if len(stages.ran) % 4 == 3:  # before it is known that the stage has ended
            raise KeyboardInterrupt
        return ended

    monkeypatch.setattr(distill, "_run", dies)
    for _ in range(9):
        try:
            result = run_study(recipe, path)
            break
        except KeyboardInterrupt:
            seen.append(stages.ran[-1])
    assert len(seen) >= 4
    repeated = [name for name in set(stages.ran) - {"generate dataset"} if stages.ran.count(name) > 1]
    assert set(repeated) <= set(seen)  # only what was under way
    assert {student["state"] for student in result.results["students"].values()} == {"done"}
    monkeypatch.setattr(distill, "_run", lambda *_: (Interrupted.exit_code, 0))
    more, _ = study(seeds=[1], students={**THREE, "ipo": {"train": {"objective": "ipo"}}})
    with pytest.raises(StageFailed) as stopped:  # and is not taken for a student that fails
        run_study(more, path)
    assert stopped.value.exit_code == 75 and not list(recipe.output.rglob("failed.json"))


def test_two_workers_share_the_students_and_have_the_same_table(study: Write, stages: Stages) -> None:
    recipe, path = study()
    stages.seconds = 0.05
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(run_study(recipe, path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    while not (recipe.output / "study.json").exists():
        time.sleep(0.01)
    other, _ = study(seeds=[1, 2, 3])
    with pytest.raises(OutputBusy, match=r"study: `dpkd-offline distill` with another recipe writes it now"):
        run_study(other, path)
    for thread in threads:
        thread.join()
    assert len(stages.ran) == 23 and len({*stages.ran} - {"generate dataset"}) == 21  # each of them once
    assert len(results) == 2 and results[0].results == results[1].results
    assert not list(recipe.output.rglob(".dpkd-offline*lock"))


def test_a_study_and_a_single_recipe_do_not_share_a_folder(study: Write, stages: Stages) -> None:
    recipe, path = study()
    plain = recipe.model_copy(update={"students": None, "seeds": None, "baseline": None})
    with shared_output(recipe.output, "study", "distill", "run", (recipe.output / "study.json").touch):
        with pytest.raises(MismatchError, match=r"study: is a study; take another folder for a distillation"):
            distill.distill(plain, path)
        assert (recipe.output / LOCK).exists()
        with shared_output(recipe.output, "study", "distill", "run", lambda: pytest.fail("is not the first")):
            pass
        assert (recipe.output / LOCK).exists()
    assert not (recipe.output / LOCK).exists()


def test_only_some_students(study: Write, stages: Stages) -> None:
    recipe, path = study()
    with pytest.raises(
        UsageError, match=r"--only kdd: no such student; did you mean 'kd'\?; there is: sft, kd and raw"
    ):
        run_study(recipe, path, ["kdd"])
    assert not recipe.output.exists() and not stages.ran
    result = run_study(recipe, path, ["raw"])
    assert not any("/kd/" in name or "/sft/" in name for name in stages.ran)
    states = {name: student["state"] for name, student in result.results["students"].items()}
    assert states == {"sft": "not trained", "kd": "not trained", "raw": "done"}


def test_the_dry_run_has_every_student_and_what_it_costs(study: Write) -> None:
    recipe, path = study(students={**THREE, "rounds": ROUNDS})
    one: Study = study_of(recipe, path)
    lines = [
        [cell.strip() for cell in line.split("|")] for line in table_of_study(one, plan_of_study(one)).splitlines()
    ]
    rows = {cells[1]: cells for cells in lines if len(cells) > 3}
    assert [*rows][2:] == [
        *("data: generate: teacher", "data: evaluate: teacher"),
        *(f"start-1: {t}" for t in ("init-student", "train: sft", "generate: student", "score-teacher")),
        "start-1: evaluate: student before",
        *(f"start-2: {t}" for t in ("init-student", "generate: student", "score-teacher", "evaluate: student before")),
        *("sft", "kd", "raw", "rounds", "in all"),
    ]
    assert rows["start-1: score-teacher"][2] == "48" and rows["start-2: score-teacher"][2] == "24"
    assert rows["kd"][7].startswith("2 seeds, from start-1: train, evaluate")
    assert rows["kd"][2] == str(2 * (18 + 24))  # steps of 6 pairs, and 12 prompts with 2 seeds of sampling
    assert rows["rounds"][2] == str(2 * (18 + 24 + 24 + 24))  # and a round of 24 responses, which are scored
    with pytest.raises(UsageError, match=r"students\.kd: train\.objective: 'kd' reads the teacher's likeliest tokens"):
        plan_of_study(study_of(recipe.model_copy(update={"score_teacher": {"engine": "transformers"}}), path))


@pytest.fixture
def undisturbed(tmp_path: Path, teachers: dict[str, Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    students = {
        "kd": {"train": {"objective": "kd"}},
        "rounds": ROUNDS,
        "raw": {"sft": None, "init_student": {"layers": 1}},
    }
    path = write_study(tmp_path, teachers["llama"], students=students, baseline="kd", seeds=[3])
    worker = start_worker(path, printed=tmp_path / "whole")
    worker.join()
    assert worker.exitcode == 0, (tmp_path / "whole.err").read_text()
    whole = (tmp_path / "study").rename(tmp_path / "kept")
    yield path, contents(whole)


@pytest.mark.slow
def test_killed_at_random_a_study_is_the_same_and_two_workers_share_it(
    undisturbed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path, expected = undisturbed
    draw, kills = random.Random(0), 0
    while kills < 4:
        worker = start_worker(path, printed=tmp_path / "killed")
        worker.join(draw.uniform(3, 9))
        if worker.exitcode is not None:
            break
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        kills += 1
    workers = [start_worker(path, printed=tmp_path / f"worker-{n}") for n in range(2)]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0, (tmp_path / "worker-0.err").read_text()
    study = tmp_path / "study"
    assert contents(study) == expected
    tables = [(tmp_path / f"worker-{n}.out").read_text().splitlines()[-10:] for n in range(2)]
    assert tables[0] == tables[1] and kills
    rows = verify(study / "dataset").rows
    assert rows["students/rounds.seed-3/pairs/round-001"] == 24 and set(rows.values()) == {24}
    lines = [json.loads(line) for line in (study / "stages.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines if line["exit_code"] == 0] == ["generate: teacher", "evaluate: teacher"]
