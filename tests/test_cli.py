"""What scripts rely on: one line on stderr, the right exit code, nothing written; and complete help."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import pytest
from helpers.tiny import TINY, files_of, rows, write_jsonl

from dpkd_offline import cli
from dpkd_offline.config.data import GenerateConfig, ScoreTeacherConfig
from dpkd_offline.config.evaluate import EvaluateConfig
from dpkd_offline.config.judge import JudgeConfig
from dpkd_offline.config.objectives import OBJECTIVES
from dpkd_offline.config.recipe import Recipe
from dpkd_offline.config.train import InitStudentConfig, TrainConfig
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.models.loading import load_model

ROOT = Path(__file__).parent.parent
Run = Callable[..., subprocess.CompletedProcess[str]]
COMMANDS = {
    "generate": GenerateConfig,
    "score-teacher": ScoreTeacherConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "init-student": InitStudentConfig,
    "judge": JudgeConfig,
}
CONTRACT = {
    "generate": "--dataset --role --model --prompts --engine --round --max-new-tokens --temperature --top-p --seed "
    "--limit --shard-size --shard-index --num-shards --config",
    "score-teacher": "--dataset --model --engine --round --config",
    "train": "--dataset --student --output --objective --beta --lm-corpus --lm-weight --epochs --max-steps "
    "--batch-size --learning-rate --dtype --seed resume --config",
    "evaluate": "--model --prompts --output --engine --seeds --config",
    "judge": "A B --output --form --url --judge-model --model --engine --limit --concurrency dry-run --json --config",
    "init-student": "--teacher --output --layers --config",
    "merge": "OUTPUT PARTS --shard-size",
    "subset": "DATASET OUTPUT --max-tokens drop-truncated drop-identical drop-inexact "
    "--min-margin --max-margin --share --seed --limit --pairs --scores --min-gap --min-score --max-repetition --script "
    "--known-to --student-name",
    "distill": "RECIPE --set --dry-run --init",
    "report": "FOLDER --output",
    "push": "DATASET TO private",
    "pull": "URL DATASET --table --round",
    "import": "SOURCE --dataset --model --template --max-prompt-tokens --max-length --limit --shard-size",
    "export": "DATASET OUTPUT --format --round --truncated",
}


def test_help_names_every_field_and_the_contract(run_cli: Run) -> None:
    for command, options in CONTRACT.items():
        shown = run_cli(command, "--help", env={"COLUMNS": "200", "PATH": ""})
        assert shown.returncode == 0
        assert not [option for option in options.split() if option not in shown.stdout]
        for name, field in COMMANDS[command].model_fields.items() if command in COMMANDS else ():
            assert name.replace("_", "-") in shown.stdout
            assert field.description, f"{command}: {name} has no help"


@pytest.mark.parametrize("columns", [80, 120])
def test_help_is_plain_text_that_fits(columns: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        for command in ([], *([name] for name in (*CONTRACT, "verify", "inspect"))):
            assert cli.app([*command, "--help"], prog_name="dpkd-offline", standalone_mode=False) == 0
            shown = capsys.readouterr().out
            assert "\x1b" not in shown and "…" not in shown
            assert max(map(len, shown.splitlines())) <= columns
    assert len(shown.splitlines()) > 5


def test_what_takes_several_values_takes_them_with_commas_or_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[EvaluateConfig] = []
    monkeypatch.setattr("dpkd_offline.evaluate", seen.append)
    shared = ["evaluate", "--model", "m", "--prompts", "p.jsonl", "--output", "o"]
    one_by_one = ["--seeds", "1", "--seeds", "2,3", "--columns", "instruction=q", "--columns", "reference=a"]
    for words in (["--seeds", "1,2,3", "--columns", "instruction=q,reference=a"], one_by_one):
        with suppress(AttributeError):  # there is no result to show
            cli.app([*shared, *words], standalone_mode=False)
    assert seen[0] == seen[1] and seen[1].seeds == (1, 2, 3)
    assert seen[1].columns == {"instruction": "q", "reference": "a"}
    only: list[Sequence[str]] = []
    monkeypatch.setattr(cli, "_run_study", lambda values, file, names, dry_run: only.append(names))
    cli.app(
        ["distill", str(ROOT / "pipelines" / "study.yaml"), "--only", "sft", "--only", "kd,dpkd"], standalone_mode=False
    )
    assert only == [["sft", "kd", "dpkd"]]


def test_options_stand_under_headings_and_what_is_required_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    cli.app(["train", "--help"], standalone_mode=False)
    shown = capsys.readouterr().out
    headings = [line[:-1] for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == [
        *("What it works on", "Objective", "Language modelling", "Optimisation", "Memory and speed", "LoRA"),
        *("Which pairs", "Validation", "Rounds", "Saving and logging", "Model", "Recipe", "Messages and help"),
        "Objectives",
    ]
    first = shown.split("What it works on:")[1].split("Objective:")[0]
    assert first.count("[required]") == 3 == shown.count("[required]")


def test_help_lists_the_objectives_and_the_keys_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "400")
        cli.app(["train", "--help"], standalone_mode=False)
        objectives = capsys.readouterr().out.split("\nObjectives:")[1]
        cli.app(["distill", "--help"], standalone_mode=False)
        keys = capsys.readouterr().out.split("\nKeys of a recipe:")[1]
    for name, info in OBJECTIVES.items():
        assert f"\n  {name} " in objectives and info.help[:40] in objectives
    listed = [line.split()[0] for line in keys.splitlines() if line[2:3].strip()]
    assert [key for key in listed if "." not in key] == list(Recipe.model_fields)
    assert "regenerate.above" in listed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("dpkd-offline sco", ["score-teacher"]),
        ("dpkd-offline train --objective dpkd-", ["dpkd-sum", "dpkd-token"]),
        ("dpkd-offline train --holdo", ["--holdout"]),
    ],
)
def test_the_shell_completes(words: str, expected: list[str], run_cli: Run) -> None:
    count = str(len(words.split()) - 1)
    environment = {**os.environ, "_DPKD_OFFLINE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": count}
    done = run_cli(env=environment)
    assert (done.returncode, done.stdout.split()) == (0, expected)


def test_version(run_cli: Run) -> None:
    done = run_cli("--version")
    assert (done.returncode, done.stdout) == (0, f"dpkd-offline {version('dpkd-offline')}\n")


def check_error(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("prompts:", "engine:", "check "))]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("dpkd-offline: ")
    for part in parts:
        assert part in lines[0]


WRONG_PROMPTS = {
    "missing column": ('{"title": "x"}', "p.jsonl:2: column 'instruction' is missing"),
    "empty instruction": ('{"instruction": ""}', "p.jsonl:2: column 'instruction' is empty"),
    "invalid JSON": ('{"instruction": "x"', "p.jsonl:2:20: invalid JSON"),
}


@pytest.mark.parametrize("name", WRONG_PROMPTS)
def test_wrong_prompts(name: str, run_cli: Run, tmp_path: Path, teachers: dict[str, Path]) -> None:
    line, message = WRONG_PROMPTS[name]
    source = write_jsonl(tmp_path / "p.jsonl", rows(1))
    source.write_text(source.read_text() + line + "\n")
    done = run_cli(
        "generate",
        "--dataset",
        tmp_path / "ds",
        "--role",
        "teacher",
        "--model",
        teachers["llama"],
        "--prompts",
        source,
        *TINY,
    )
    check_error(done, 3, message)
    assert [p.name for p in tmp_path.iterdir()] == ["p.jsonl"]


def test_unknown_model(run_cli: Run, tmp_path: Path, source: Path) -> None:
    done = run_cli(
        "generate",
        "--dataset",
        tmp_path / "ds",
        "--role",
        "teacher",
        "--model",
        tmp_path / "none",
        "--prompts",
        source,
        *TINY,
    )
    check_error(done, 69, f"model '{tmp_path / 'none'}'")
    assert list(tmp_path.iterdir()) == []


def test_dataset_scored_by_another_teacher(
    run_cli: Run, tmp_path: Path, datasets_by_family: dict[str, Path], students: dict[str, Path]
) -> None:
    shutil.copytree(datasets_by_family["llama"], tmp_path / "ds")
    before = files_of(tmp_path)
    done = run_cli("score-teacher", "--dataset", tmp_path / "ds", "--model", students["llama"], *TINY)
    check_error(done, 4, "_table.json", "score with the teacher that sampled")
    assert files_of(tmp_path) == before


def test_tokenizer_mismatch(
    run_cli: Run, tmp_path: Path, datasets_by_family: dict[str, Path], students: dict[str, Path]
) -> None:
    model = tmp_path / "other"
    load_model(str(students["llama"]), "float32").save_pretrained(model)
    tokenizer = ModelInfo(str(students["llama"])).tokenizer
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(model)
    shutil.copytree(datasets_by_family["llama"], tmp_path / "ds")
    before = files_of(tmp_path)
    done = run_cli("generate", "--dataset", tmp_path / "ds", "--role", "teacher", "--model", model, *TINY)
    check_error(done, 4, "dataset.json", "only students may have others")
    done = run_cli("train", "--dataset", tmp_path / "ds", "--student", model, "--output", tmp_path / "out")
    check_error(done, 4, "_table.json", "has another tokenizer")
    assert files_of(tmp_path) == before


def test_unknown_recipe_key(run_cli: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("teacher: t\nstudent: s\noutput: o\ngenerate:\n  prompts: p\n  temprature: 1\n")
    message = "r.yaml:6:3: generate: unknown key 'temprature'; did you mean 'temperature'?"
    check_error(run_cli("distill", recipe, cwd=tmp_path), 2, message)
    done = run_cli("generate", "--config", recipe, "--dataset", "d", "--role", "teacher", "--model", "m", cwd=tmp_path)
    check_error(done, 2, message)
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--foo"], "No such option"),
        (["train", "--datset", "d"], "No such option: --datset; did you mean '--dataset'?"),
        (["nothing"], "No such command"),
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["train", "--verbose", "--quiet"], "give --verbose or --quiet, not both"),
        (["train", "--beta", "x", "--dataset", "d"], "--beta"),
        (["train"], "dpkd-offline: train needs --dataset, --student and --output"),
        (["train", "--dataset", "d"], "dpkd-offline: train needs --student and --output"),
        (["score-teacher", "--model", "m"], "dpkd-offline: score-teacher needs --dataset"),
        (["import", "--dataset", "d"], "dpkd-offline: import needs SOURCE and --model"),
        (["push"], "dpkd-offline: push needs DATASET and TO"),
        (["distill"], "dpkd-offline: distill needs RECIPE"),
        (["judge", "--judge-model", "m"], "dpkd-offline: judge needs A"),
        (["judge", "a", "b"], "name the judge: either model (which an engine runs) or judge_model (with url)"),
        (
            ["train", "--objective", "dpkd-sm", "--dataset", "d", "--student", "s", "--output", "o"],
            "did you mean 'dpkd-sum'?",
        ),
        (
            ["train", "--gamma", "1", "--dataset", "d", "--student", "s", "--output", "o"],
            "objective 'dpkd' has no gamma; it belongs to simpo",
        ),
        (
            ["generate", "--role", "boss", "--dataset", "d", "--model", "m"],
            "'role': input should be 'teacher' or 'student'",
        ),
        (["evaluate", "--model", "m", "--prompts", "p", "--output", "o", "--seeds", "1,x"], "'seeds.1': "),
        (
            ["generate", "--role", "teacher", "--dataset", "d", "--model", "m", "--shard-index", "2"],
            "must be below num_shards",
        ),
        (["distill", "none.yaml"], "none.yaml: no such file"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, run_cli: Run, tmp_path: Path) -> None:
    check_error(run_cli(*arguments, cwd=tmp_path), 2, message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quiet", [False, True])
def test_results_go_to_stdout_and_the_rest_to_stderr(
    quiet: bool, run_cli: Run, tmp_path: Path, source: Path, teachers: dict[str, Path]
) -> None:
    done = run_cli(
        "generate",
        "--dataset",
        tmp_path / "ds",
        "--role",
        "teacher",
        "--model",
        teachers["opt"],
        "--prompts",
        source,
        "--max-new-tokens",
        4,
        "--limit",
        5,
        *TINY,
        *(["-q"] if quiet else []),
    )
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'ds' / 'responses' / 'teacher'}\n")
    assert ("prompts: 5 of 5 rows" in done.stderr) == (not quiet)
    assert ("generate teacher: 5/5 rows" in done.stderr) == (not quiet)
    lines = done.stderr.splitlines()  # in a quiet console warnings alone
    assert lines[-1].startswith("warning: 5 of 5 y_t are cut off at 4 tokens") and (len(lines) == 1) == quiet
