from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from helpers.fake_server import serving
from helpers.judging import FakeJudge, write_evaluation
from helpers.runs import write_recipe
from helpers.tiny import command_line, files_of, rows, write_jsonl

from dpkd_offline.common.errors import MismatchError, OutputBusy, StageFailed, StorageError, UsageError
from dpkd_offline.common.ownership import output_folder
from dpkd_offline.config.data import GenerateConfig
from dpkd_offline.config.evaluate import EvaluateConfig
from dpkd_offline.config.judge import JudgeConfig
from dpkd_offline.config.recipe import read_recipe
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.evaluation.judge import judge
from dpkd_offline.evaluation.table import results_table, verdict_of
from dpkd_offline.pipeline import distill as distill_module
from dpkd_offline.pipeline.distill import distill, stage_failed
from dpkd_offline.pipeline.dry_run import plan_of_work, table_of_work
from dpkd_offline.pipeline.stages import plan
from dpkd_offline.pipeline.throughput import record_stage


def test_the_plan_has_the_stages_in_order(tmp_path: Path) -> None:
    recipe = read_recipe(write_recipe(tmp_path, Path("big")))
    stages = plan(recipe)
    assert [stage.title for stage in stages] == [
        "init-student",
        "generate: teacher",
        "train: sft",
        "generate: student",
        "score-teacher",
        "train",
        "evaluate: teacher",
        "evaluate: student before",
        "evaluate: student after",
    ]
    student = stages[3].config.model  # type: ignore[attr-defined]
    assert student.endswith("student-sft")
    assert stages[5].config.student == student  # type: ignore[attr-defined]
    small = recipe.model_copy(update={"init_student": None, "student": "small", "sft": None, "evaluate": None})
    assert [stage.title for stage in plan(small)] == [
        "generate: teacher",
        "generate: student",
        "score-teacher",
        "train",
    ]
    assert plan(small)[3].config.student == "small"  # type: ignore[attr-defined]


def test_a_warm_start_comes_before_the_student_answers(tmp_path: Path) -> None:
    recipe = read_recipe(write_recipe(tmp_path, Path("big")), ["warm_start={epochs: 1}"])
    stages = {stage.title: stage.config for stage in plan(recipe)}
    assert [*stages][2:5] == ["train: sft", "train: warm start", "generate: student"]
    warm = stages["train: warm start"]
    assert isinstance(warm, TrainConfig)
    assert (warm.objective, warm.responses, warm.epochs) == ("seqkd", "teacher", 1)
    assert warm.student.endswith("student-sft")
    assert stages["generate: student"].model == str(warm.output)  # type: ignore[attr-defined]
    assert stages["train"].student == str(warm.output)  # type: ignore[attr-defined]
    models = [(title, config.model) for title, config in stages.items() if isinstance(config, EvaluateConfig)]
    assert [Path(model).name for _, model in models] == ["big", "student-sft", "student-warm", "student"]


def test_a_student_that_gets_worse_stops_the_training_of_a_recipe_unless_it_says_no(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, Path("big"))
    for changes, stops in (([], True), (["train.stop_when_ruined=false"], False), (["train.holdout=0"], False)):
        stages = {stage.title: stage.config for stage in plan(read_recipe(path, changes))}
        train, sft = stages["train"], stages["train: sft"]
        assert isinstance(train, TrainConfig) and isinstance(sft, TrainConfig)
        assert (train.stop_when_ruined, sft.stop_when_ruined) == (stops, True), changes


@pytest.mark.slow
def test_a_ruined_student_is_told_and_its_best_evaluated(
    tmp_path: Path, teachers: dict[str, Path], run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    recipe = write_recipe(tmp_path, teachers["llama"])
    changes = {"max_steps": 8, "learning_rate": 0.3, "off_policy": "none", "holdout": 0.4, "validate_every": 1}
    ruin = [word for key, value in changes.items() for word in ("--set", f"train.{key}={value}")]
    for _ in range(2):
        done = run_cli("distill", recipe, *ruin)
        assert done.returncode == 5, done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith("dpkd-offline: stopped after step ") and "the student got worse" in last
        lines = done.stdout.splitlines()
        (verdict,) = (line for line in lines if line.startswith("The student after training is "))
        assert lines[lines.index(verdict) + 2].startswith("warning: ")
    assert json.loads((tmp_path / "run" / "student" / "training.json").read_text())["steps"] < 8


def test_the_table_says_worse_where_it_is() -> None:
    def of(rouge: float, nll: float, *verdicts: str, cut: float = 0.2) -> dict[str, Any]:
        means = {"rouge_l": rouge, "teacher_nll": nll}
        difference = {name: {"verdict": verdict} for name, verdict in zip(means, verdicts, strict=False)}
        measures = {name: {"mean": mean, "spread": 0.5, "by_seed": [mean] * 3} for name, mean in means.items()}
        return {**measures, "truncated": cut, "difference": difference}

    assert verdict_of(of(10, 5), of(2.5, 8, "worse", "worse")) == (
        "The student after training is worse in Rouge-L (10.00 → 2.50), worse in teacher NLL/token (5.000 → 8.000)."
    )
    after = of(10.3, 4, "cannot tell on 9 prompts", "better")
    after["difference"]["teacher_nll"]["gap_closed"] = 0.5
    assert verdict_of(of(10, 5), after) == (
        "The student after training is no different beyond noise on 9 prompts in Rouge-L (10.00 → 10.30), better in "
        "teacher NLL/token (5.000 → 4.000, 50% of the gap to the teacher)."
    )
    assert verdict_of(of(8.3, 8.5), of(13.8, 4.6, "better", "better", cut=1.0)).startswith(
        "The student after training is worse: its responses no longer end (20% → 100% cut off), better in Rouge-L"
    )
    before = {"prompts": 3, "seeds": [1, 2, 3], **of(10, 5)}
    del before["difference"]
    assert "after training" not in results_table({"student-before": before})
    table = results_table({"student-before": before, "student-after": {**before, "difference": {}}})
    assert table.endswith("(5.000 → 5.000).")


def test_teacher_and_student_may_sample_differently(tmp_path: Path) -> None:
    recipe = read_recipe(write_recipe(tmp_path, Path("big")), ["generate_teacher={prompts: p.jsonl, temperature: 0.5}"])
    stages = {stage.title: stage for stage in plan(recipe)}
    teacher, student = stages["generate: teacher"], stages["generate: student"]
    assert (teacher.section, student.section) == ("generate_teacher", "generate")
    assert isinstance(teacher.config, GenerateConfig) and isinstance(student.config, GenerateConfig)
    assert (teacher.config.temperature, student.config.temperature) == (0.5, 1.0)
    assert (teacher.config.prompts, student.config.prompts) == ("p.jsonl", None)


@pytest.mark.parametrize("form", ["pairwise", "score"])
def test_a_judge_has_the_last_word(
    form: str, tmp_path: Path, teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = FakeJudge(lambda first, second: "1" if first < second else "2")

    def run(command: list[str], *_: object) -> tuple[int, int]:
        """What a stage leaves for distill; the judge alone is run."""
        (values,) = yaml.safe_load(Path(command[command.index("--config") + 1]).read_text()).values()
        output = Path(values.get("output", tmp_path))
        if command[3] == "train":
            output.mkdir(parents=True)
            (output / "training.json").write_text(json.dumps({"run": "r", "steps": 3, "warnings": [], "ruined": None}))
        if command[3] == "evaluate":
            write_evaluation(output, [output.name] * 3)
        if command[3] == "judge":
            judge(JudgeConfig.model_validate(values))
        return 0, 3 << 20

    monkeypatch.setattr("dpkd_offline.pipeline.distill._run", run)
    path = write_recipe(tmp_path, teachers["llama"])
    with serving(server) as (url,):
        recipe = read_recipe(path, [f"judge={{judge_model: oracle, url: [{url}], form: {form}}}"])
        assert plan(recipe, path)[-1].title == "judge"
        assert "judge" in table_of_work(plan_of_work(recipe, path))
        result = distill(recipe, path)
    assert result.judgement == json.loads((tmp_path / "run" / "judge" / "results.json").read_text())
    text = (tmp_path / "run" / "results.md").read_text()
    if form == "pairwise":  # the letters decide
        assert result.judgement["win_rate"] == 100
        assert "By the judge `oracle`, A is better than B: A (`student-after`) against B (`student-before`)." in text
    else:
        assert "By the judge `oracle`, the responses of A (`student-after`) reach 200.0" in text
    assert result.warnings[-1:] == tuple(result.judgement["warnings"])[-1:]
    with pytest.raises(UsageError, match="judge needs the responses of evaluate"):
        read_recipe(path, ["judge={judge_model: oracle}", "evaluate=null"])


def test_distill_returns_the_student_and_how_it_went(
    tmp_path: Path, teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def run(command: list[str], *_: object) -> tuple[int, int]:
        """What a stage leaves for distill, without running it."""
        (values,) = yaml.safe_load(Path(command[command.index("--config") + 1]).read_text()).values()
        commands.append(command[3])
        output = Path(values.get("output", tmp_path))
        output.mkdir(parents=True, exist_ok=True)
        if command[3] == "train":
            warnings = [{"step": 3, "warning": "its responses repeat"}]
            record = {"run": "r", "steps": 3, "warnings": warnings, "ruined": "stopped after step 3"}
            (output / "training.json").write_text(json.dumps(record))
        if command[3] == "evaluate":
            nll = {"mean": float(len(commands)), "spread": 0.1, "by_seed": [1.0, 2.0]}
            results = {"prompts": 6, "seeds": [1, 2], "teacher_nll": nll, "truncated": 0.0, "made": {}}
            (output / "results.json").write_text(json.dumps(results))
            row = {"seed": 1, "prompt": "?", "references": ["a"], "response": "b", "teacher_nll": nll["mean"]}
            write_jsonl(output / "responses.jsonl", [{"id": str(n), **row} for n in range(6)])
        return 0, 3 << 20

    monkeypatch.setattr("dpkd_offline.pipeline.distill._run", run)
    recipe = write_recipe(tmp_path, teachers["llama"])
    write_jsonl(tmp_path / "test.jsonl", rows(18)[11:])
    result = distill(read_recipe(recipe), recipe)
    assert (str(result), os.fspath(result)) == (str(tmp_path / "run" / "student"),) * 2
    assert [*result.results] == ["teacher", "student-before", "student-after"]
    assert result.verdict == "The student after training is worse in teacher NLL/token (8.000 → 9.000)."
    assert result.warnings == (
        "evaluate.prompts: 1 of 7 are prompts that the student is trained on",
        "train: sft: step 3: its responses repeat",
        "step 3: its responses repeat",
    )
    assert result.results["student-after"]["warnings"] == list(result.warnings[1:])
    table = (tmp_path / "run" / "results.md").read_text()
    assert table.endswith(
        "\n\nwarning: train: sft: step 3: its responses repeat\nwarning: step 3: its responses repeat\n"
    )
    assert result.ruined == "stopped after step 3"
    assert [*result.seconds] == [stage.title for stage in plan(read_recipe(recipe))]
    lines = [json.loads(line) for line in (tmp_path / "run" / "stages.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines if "tokens" not in line] == ["init-student"]
    assert {line["peak_memory"] for line in lines} == {3 << 20}
    assert result.page == tmp_path / "run" / "report.html"
    page = result.page.read_text()
    assert "is worse in teacher NLL/token (8.000 → 9.000)." in page and "its responses repeat" in page
    assert "Time is what such stages took" in table_of_work(plan_of_work(read_recipe(recipe), recipe))

    settings = files_of(tmp_path / "run" / "stages")
    assert len(settings) == 9
    assert result.judgement is None
    monkeypatch.setattr("dpkd_offline.pipeline.distill._run", lambda *_: (MismatchError.exit_code, 0))
    with pytest.raises(StageFailed):  # the first stage refuses to go on with other settings than it had
        distill(read_recipe(recipe, ["init_student.layers=3"]), recipe)
    assert files_of(tmp_path / "run" / "stages") == settings
    with (
        output_folder(tmp_path / "run", "distillation", "distill"),
        pytest.raises(OutputBusy, match=r"run: `dpkd-offline distill`, process \d+ on .*, writes it now"),
    ):
        distill(read_recipe(recipe), recipe)
    with pytest.raises(UsageError, match="nothing says that it is a distillation of ours"):
        distill(read_recipe(recipe, [f"output={teachers['llama']}"]), recipe)


@pytest.mark.slow
def test_a_recipe_runs_from_end_to_end_and_again_does_nothing(
    tmp_path: Path, teachers: dict[str, Path], run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    recipe = write_recipe(tmp_path, teachers["llama"])
    first = run_cli("distill", recipe)
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert lines[0].startswith("| model ")
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["teacher", "student before", "student after"]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results.keys() == {"teacher", "student-before", "student-after"}
    assert results["teacher"]["reward"]["mean"] == pytest.approx(0, abs=1e-4)
    assert results["student-after"]["prompts"] == 6
    assert results["student-after"]["difference"]["rouge_l"]["interval"]
    before = files_of(tmp_path / "run")
    again = run_cli("distill", recipe)
    assert (again.returncode, again.stdout) == (0, first.stdout)
    after = files_of(tmp_path / "run")
    assert after.pop("stages.jsonl").startswith(before.pop("stages.jsonl"))  # which says when each ran
    for page in ("report.html", "report.md"):  # they do, too
        assert after.pop(page) and before.pop(page)
    assert after == before


@pytest.mark.slow
def test_a_failing_stage_ends_the_run_with_its_line_and_code(
    tmp_path: Path, teachers: dict[str, Path], run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    recipe = write_recipe(tmp_path, teachers["opt"])
    (tmp_path / "train.jsonl").write_text('{"instruction": ""}\n')
    done = run_cli("distill", recipe)
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].endswith("train.jsonl:1: column 'instruction' is empty")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "dataset").exists()


@pytest.mark.slow
def test_a_stage_ends_with_the_run_that_started_it(tmp_path: Path, teachers: dict[str, Path]) -> None:
    recipe = write_recipe(tmp_path, teachers["opt"])
    with subprocess.Popen(command_line("distill", recipe), stderr=subprocess.DEVNULL) as process:
        run = psutil.Process(process.pid)
        started: list[psutil.Process] = []
        while not any(child.name().startswith("dpkd ") for child in started):
            assert process.poll() is None
            time.sleep(0.01)
            started = run.children(recursive=True)
        process.kill()
    _, left = psutil.wait_procs(started, 20)
    for child in left:
        child.kill()
    assert not left, "the stage outlived its run"


def test_the_teacher_may_lie_in_the_output_as_that_of_the_demo_does(tmp_path: Path, teachers: dict[str, Path]) -> None:
    teacher = shutil.copytree(teachers["opt"], tmp_path / "run" / "teacher")
    path = write_recipe(tmp_path, teacher)
    with pytest.raises(UsageError, match=r"no-prompts\.jsonl"):  # and not that the folder is something else
        distill(read_recipe(path, ["generate.prompts=no-prompts.jsonl"]), path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"holds 'thesis\.tex'"):
        distill(read_recipe(path, [f"output={tmp_path / 'other'}"]), path)


def test_what_interrupts_a_run_is_handed_to_its_stage_and_waited_for(tmp_path: Path) -> None:
    stage = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(pathlib.Path('saved').touch()))\n"
        "pathlib.Path('ready').touch()\n"
        "time.sleep(60)"
    )
    run = (
        "import sys; from dpkd_offline.common import process; from dpkd_offline.pipeline import distill\n"
        "process.catch_signals()\n"
        "distill._run([sys.executable, '-c', sys.argv[1]], {})"
    )
    with subprocess.Popen(
        [sys.executable, "-c", run, stage], stderr=subprocess.PIPE, cwd=tmp_path, text=True
    ) as process:
        while not (tmp_path / "ready").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGUSR1)
        _, errors = process.communicate(timeout=60)
    assert "stopped by SIGUSR1" in errors.splitlines()[-1]
    assert (tmp_path / "saved").exists()


def test_the_most_memory_of_a_stage_is_known() -> None:
    code, peak = distill_module._run(
        [sys.executable, "-c", "import time; kept = b'1' * (200 << 20); time.sleep(2); raise SystemExit(3)"], {}
    )
    assert code == 3 and 200 << 20 < peak < 300 << 20


def test_what_ends_a_stage_without_a_word_is_said_by_the_run() -> None:
    for code, becomes, words in (
        (69, 69, ""),  # which it has said itself
        (-signal.SIGTERM, 75, "sft: stopped by SIGTERM"),
        (-signal.SIGKILL, 137, "sft: ended by SIGKILL (often by the system, because memory ran out)"),
        (-signal.SIGSEGV, 139, "sft: ended by SIGSEGV"),
    ):
        failed = stage_failed("sft", code)
        assert failed.exit_code == becomes and str(failed).startswith(words) and bool(words) == bool(str(failed))


def test_a_full_disk_under_the_record_of_stages_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "stages.jsonl").symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"stages\.jsonl: cannot be written: No space left"):
        record_stage(tmp_path, "train", 1.0, 0, 1, None)
