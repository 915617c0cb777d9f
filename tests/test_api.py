"""The package in Python: a command is a function of keywords or of one config."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers.runs import write_recipe
from helpers.tiny import files_of, rows, write_jsonl

import dpkd_offline as d
from dpkd_offline.common.errors import UsageError

SMALL = {"engine": "transformers", "dtype": "float32", "max_length": 256}
FUNCTIONS = (
    *("distill", "evaluate", "export_pairs", "generate", "import_pairs", "init_student", "inspect", "judge"),
    *("merge", "pull", "push", "report", "score_teacher", "subset", "train", "verify"),
)


def test_a_whole_flow_by_keywords(teachers: dict[str, Path], tmp_path: Path) -> None:
    """Paths may be text, results can be taken as paths, and a config does the same as its fields as keywords."""
    dataset, prompts = str(tmp_path / "data"), str(write_jsonl(tmp_path / "p.jsonl", rows(6)))
    teacher, cut = str(teachers["llama"]), tmp_path / "cut"
    assert Path(d.init_student(teacher=teacher, output=str(cut), layers=2)) == cut
    sampled = {"dataset": dataset, "max_new_tokens": 6, "shard_size": 4, **SMALL}
    d.generate(role="teacher", model=teacher, prompts=prompts, **sampled)
    d.generate(d.GenerateConfig.model_validate({"role": "student", "model": str(cut), **sampled}))
    d.score_teacher(dataset=dataset, model=teacher, **SMALL)
    settings = {"max_steps": 1, "batch_size": 4, "dtype": "float32", "holdout": 0}
    student = d.train(dataset=dataset, student=str(cut), output=tmp_path / "student", **settings)
    assert (Path(student) / "model.safetensors").exists()
    held_out = write_jsonl(tmp_path / "t.jsonl", rows(8)[6:])
    places = {"model": str(student), "prompts": str(held_out), "output": tmp_path / "results"}
    assert d.evaluate(seeds=(1,), max_new_tokens=4, **places, **SMALL)
    assert "pairs/round-000" in str(d.verify(dataset=dataset))
    assert len(d.inspect(dataset=dataset, samples=2)["samples"]) == 2
    assert Path(d.report(folder=tmp_path / "results", output=tmp_path / "page")) == tmp_path / "page" / "report.html"
    d.subset(dataset=dataset, output=str(tmp_path / "some"), limit=2)
    d.merge(output=tmp_path / "all", parts=[dataset])
    d.export_pairs(dataset=dataset, output=str(tmp_path / "trl"))
    d.push(dataset=tmp_path / "some", to=str(tmp_path / "shared"))
    d.pull(url=str(tmp_path / "shared"), dataset=str(tmp_path / "copy"), table=["pairs"])
    copied = files_of(tmp_path / "copy")
    assert any(name.startswith("pairs/") for name in copied) and not any(n.startswith("responses/") for n in copied)
    preferences = [{"prompt": "Say a word.", "chosen": "tea", "rejected": "salt"}]
    source = str(write_jsonl(tmp_path / "prefs.jsonl", preferences))
    imported = d.import_pairs(source=source, dataset=tmp_path / "imported", model=teacher)
    assert Path(imported) == tmp_path / "imported"


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("generate", {"temprature": 1}, "unknown key 'temprature'; did you mean 'temperature'\\?"),
        ("generate", {"dataset": "d"}, "generate needs role and model"),
        ("train", {}, "train needs dataset, student and output"),
        ("verify", {}, "verify needs dataset"),
        ("distill", {"teacher": "t"}, "'output' is required, and so is 'generate'"),
        ("distill", {"techer": "t"}, "unknown key 'techer'; did you mean 'teacher'\\?"),
    ],
)
def test_wrong_keywords_are_usage_errors(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}$") as error:
        getattr(d, name)(**settings)
    assert isinstance(error.value, ValueError)


def test_a_setting_is_named_as_in_python() -> None:
    with pytest.raises(UsageError, match=r"^'shard_size': input should be greater than 0$"):
        d.generate(dataset="d", role="teacher", model="m", shard_size=0)


def test_a_command_takes_its_own_config_or_keywords() -> None:
    config = d.VerifyConfig(dataset=Path("d"))
    for wrong in (lambda: d.verify(config, dataset="d"), lambda: d.inspect(config), lambda: d.verify("d")):  # type: ignore
        with pytest.raises(UsageError, match=r"^(verify|inspect) takes keywords, or one \w+Config$"):
            wrong()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_editor_sees_names_defaults_and_help(name: str) -> None:
    function = getattr(d, name)
    assert function is getattr(d, name)
    assert function.__name__ == name and name in d.__all__ and name in dir(d)
    assert "Args:" in (function.__doc__ or "")
    parameters = inspect.signature(function).parameters
    if name == "generate":
        assert parameters["temperature"].default == 1.0
        assert parameters["role"].default is inspect.Parameter.empty
        assert "temperature: Sampling temperature." in (function.__doc__ or "")


def test_distill_takes_a_file_a_recipe_or_keywords(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_recipe(tmp_path, Path("big"))
    values = yaml.safe_load(path.read_text())
    calls: list[tuple[d.Recipe, Path | None]] = []
    monkeypatch.setattr("dpkd_offline.pipeline.distill.distill", lambda recipe, file=None: calls.append((recipe, file)))
    d.distill(str(path), set=["train.beta=0.5"])
    d.distill(d.Recipe.model_validate(values))
    d.distill(**values)
    assert [file for _, file in calls] == [path, None, None]
    assert calls[0][0].train["beta"] == 0.5
    assert calls[1][0] == calls[2][0] == d.Recipe.model_validate(values)
    for wrong in (lambda: d.distill(path, teacher="t"), lambda: d.distill(set=["a.b=1"], **values)):
        with pytest.raises(UsageError, match=r"^distill: give a file"):
            wrong()


def test_the_first_call_hides_what_libraries_say_and_importing_changes_nothing() -> None:
    code = (
        "import os; before = dict(os.environ)\n"
        "import dpkd_offline as d; d.generate; assert dict(os.environ) == before\n"
        "try: d.generate()\n"
        "except ValueError: pass\n"
        "print(os.environ['TRANSFORMERS_VERBOSITY'], os.environ['VLLM_LOGGING_LEVEL'])"
    )
    environment = {name: value for name, value in os.environ.items() if "VERBOSITY" not in name}
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**environment, "VLLM_LOGGING_LEVEL": "INFO"}
    )
    assert shown.stdout == "error INFO\n", shown.stderr
