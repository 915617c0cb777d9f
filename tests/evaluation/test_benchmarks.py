from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval.evaluator
import lm_eval.tasks
import lm_eval.utils
import pytest
import yaml
from helpers.tiny import write_jsonl

from dpkd_offline.common.errors import DataError, DpkdError, UnavailableError, UsageError
from dpkd_offline.config.evaluate import EvaluateConfig
from dpkd_offline.evaluation import benchmarks
from dpkd_offline.evaluation.evaluate import evaluate
from dpkd_offline.evaluation.table import results_table

QUESTIONS = [
    {"question": f"Is {n} more than {6 * n % 11}?", "options": ["yes", "no", "maybe so"], "label": n % 3, "answer": "a"}
    for n in range(12)
]
CHOICE = {
    "task": "tiny_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}\nAnswer:",
    "doc_to_choice": "options",
    "doc_to_target": "label",
    "num_fewshot": 2,
    "fewshot_split": "test",
    "metric_list": [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
    ],
    "metadata": {"version": 1.5},
}
TEXT = {
    "task": "tiny_text",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "answer",
    "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 12},
    "filter_list": [
        {"name": "strict", "filter": [{"function": "take_first"}]},
        {"name": "letters", "filter": [{"function": "regex", "regex_pattern": "([a-z])"}, {"function": "take_first"}]},
    ],
    "metric_list": [{"metric": "checksum", "aggregation": "mean", "higher_is_better": True}],
}
# A function of the user's that a task names: its numbers differ where one character of a response does.
FUNCTION = """
from zlib import crc32

def process(doc, results):
    return {"checksum": crc32(str(results[0]).encode()) / 2**32}
"""


def write_task(folder: Path, content: dict[str, Any], **changes: object) -> Path:
    """A task of twelve questions, with its data beside it and nothing in the user's caches."""
    data = write_jsonl(folder / "questions.jsonl", QUESTIONS)
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
    }
    content = {**source, **content, **changes}
    path = folder / f"{content['task']}.yaml"
    text = yaml.safe_dump(content)
    if content["output_type"] == "generate_until":
        (folder / "scoring.py").write_text(FUNCTION)
        text += "process_results: !function scoring.process\n"
    path.write_text(text)
    return path


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder of two tasks and a file that is part of others."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_task(folder, CHOICE)
    write_task(folder, TEXT)
    (folder / "_common.yaml").write_text("num_fewshot: 0\n")
    return folder


@pytest.fixture
def config(tmp_path: Path, source: Path, students: dict[str, Path]) -> EvaluateConfig:
    return EvaluateConfig.model_validate(
        {
            "model": str(students["llama"]),
            "prompts": str(source),
            "output": tmp_path / "evaluation",
            "engine": "transformers",
            "dtype": "float32",
            "max_new_tokens": 4,
            "max_length": 256,
            "seeds": [1],
            "limit": 2,
            "batch_size": 4,
        }
    )


def with_tasks(config: EvaluateConfig, *tasks: object, **changes: object) -> EvaluateConfig:
    return EvaluateConfig.model_validate({**config.model_dump(), "tasks": list(map(str, tasks)), **changes})


def numbers_of(task: dict[str, Any]) -> dict[str, float]:
    """The metrics of a task as lm-eval calls them."""
    numbers = {}
    for name, metric in task["metrics"].items():
        numbers[name] = metric["value"]
        numbers[name.replace(",", "_stderr,")] = metric["stderr"]
    return numbers


@pytest.fixture
def lm_eval_alone(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its own command's function; without its look at the machine, which takes seconds and has no part in numbers."""
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
    manager = lm_eval.tasks.TaskManager(include_defaults=False)  # which would take ten seconds to list

    def run(model: Path, task: Path, chat: bool, **arguments: Any) -> dict[str, Any]:
        model_args = {"pretrained": str(model), "dtype": "float32"}
        results = lm_eval.evaluator.simple_evaluate(
            model="hf",
            model_args=model_args,
            tasks=[str(task)],
            task_manager=manager,
            batch_size=4,
            device="cpu",
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            **arguments,
        )
        assert results is not None
        return dict(results)

    return run


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # with a chat template, and without
def test_benchmarks_are_what_lm_eval_says_alone(
    family: str,
    config: EvaluateConfig,
    tasks: Path,
    students: dict[str, Path],
    lm_eval_alone: Any,
    capfd: pytest.CaptureFixture[str],
) -> None:
    result = evaluate(with_tasks(config, tasks, model=str(students[family])))
    assert not capfd.readouterr().out
    chat = family == "llama"
    assert list(result.results["tasks"]) == ["tiny_choice", "tiny_text"]
    for name, task in result.results["tasks"].items():
        alone = lm_eval_alone(students[family], tasks / f"{name}.yaml", chat)
        ours, theirs = numbers_of(task), alone["results"][name]
        assert ours == {key: theirs[key] for key in ours}
        assert len(ours) == 4
        assert task["samples"] == alone["n-samples"][name]["effective"] == 12
        assert task["version"] == alone["versions"][name]
        assert task["fewshot"] == alone["n-shot"][name]
        questions = [q["doc_hash"] + q["prompt_hash"] + q["target_hash"] for q in alone["samples"][name]]
        assert task["hash"] == lm_eval.utils.hash_string("".join(questions))
        assert task["made"]["chat_template"] is chat
        assert task["made"]["lm_eval"] == lm_eval.__version__
        assert all(0 < metric["value"] < 1 and metric["stderr"] > 0 for metric in task["metrics"].values())
    written = (config.output / "evaluate.yaml").read_text() + (config.output / "results.json").read_text()
    assert str(tasks) not in written
    table = results_table({"student": result.results})
    assert "tiny_choice acc ↑" in table and "tiny_text checksum (letters) ↑" in table


def test_a_task_that_is_done_is_not_run_again(
    config: EvaluateConfig, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load, run = benchmarks.load_task, benchmarks._evaluate

    def counted(task: str) -> Any:
        loaded.append(Path(task).stem)
        return load(task)

    def killed(lm: Any, task: Any, *rest: Any) -> Any:
        if "tiny_text" in task["tasks"]:
            raise KeyboardInterrupt
        return run(lm, task, *rest)

    monkeypatch.setattr(benchmarks, "load_task", counted)
    monkeypatch.setattr(benchmarks, "_evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(with_tasks(config, tasks))
    monkeypatch.setattr(benchmarks, "_evaluate", run)
    loaded.clear()
    whole = evaluate(with_tasks(config, tasks))
    assert loaded == ["tiny_text"]
    assert evaluate(with_tasks(config, tasks)) == whole
    assert loaded == ["tiny_text"]
    assert evaluate(config) == whole  # without --tasks they stay
    few = evaluate(with_tasks(config, tasks / "tiny_choice.yaml", task_limit=3)).results
    assert {name: task["samples"] for name, task in few["tasks"].items()} == {"tiny_choice": 3}
    assert {**few, "tasks": None} == {**whole.results, "tasks": None}  # the responses are those that were there
    write_task(tasks, CHOICE, num_fewshot=0)
    changed = evaluate(with_tasks(config, tasks / "tiny_choice.yaml")).results["tasks"]["tiny_choice"]
    assert (changed["fewshot"], whole.results["tasks"]["tiny_choice"]["fewshot"]) == (0, 2)


def test_a_group_has_the_numbers_of_its_tasks(
    config: EvaluateConfig, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = benchmarks._manager  # which would take ten seconds to list the tasks of lm-eval
    monkeypatch.setattr(benchmarks, "_manager", lambda folder, of_lm_eval=True: manager(folder, False))
    group = tasks / "both.yaml"
    members = [write_task(tasks, CHOICE, task=name, num_fewshot=n) for n, name in enumerate(("first", "second"))]
    content: dict[str, Any] = {"group": "both", "task": [path.stem for path in members]}
    content["aggregate_metric_list"] = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    group.write_text(yaml.safe_dump(content))
    both = evaluate(with_tasks(config, group)).results["tasks"]["both"]
    value = both["metrics"]["acc,none"]["value"]
    assert list(both["subtasks"]) == ["first", "second"]
    assert value == pytest.approx(sum(t["metrics"]["acc,none"]["value"] for t in both["subtasks"].values()) / 2)
    assert both["metrics"]["acc,none"]["higher_is_better"] is True
    assert (both["samples"], both["subtasks"]["first"]["samples"]) == (24, 12)
    del content["aggregate_metric_list"]
    group.write_text(yaml.safe_dump(content))
    assert list(evaluate(with_tasks(config, group)).results["tasks"]) == ["first", "second"]


def test_what_cannot_be_run_is_said_before_anything_is_sampled(
    config: EvaluateConfig, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(kind: type[DpkdError], words: str, *names: object, **changes: object) -> None:
        with pytest.raises(kind, match=words) as error:
            evaluate(with_tasks(config, *names, **changes))
        assert "\n" not in str(error.value)
        assert not list(config.output.rglob("*.jsonl"))

    refused(UsageError, r"lm-eval has no task 'gsm8k_'; did you mean .*gsm8k", "gsm8k_")
    refused(UnavailableError, r"--tasks: gsm8k: its data cannot be had: .*openai/gsm8k", "gsm8k")
    refused(UsageError, r"nowhere/none.yaml: no such file", "nowhere/none.yaml")
    refused(UsageError, r"lm-eval loads the model itself; leave out --url", tasks, engine="http", url=["http://x"])
    refused(UsageError, r"leave out --cluster ray", tasks, cluster="ray")
    (tasks / "copy.yaml").write_text((tasks / "tiny_text.yaml").read_text())
    refused(UsageError, r"'tiny_text' is in .*copy.yaml and in .*tiny_text.yaml", tasks)
    wrong = write_task(tasks, TEXT, output_type="generate_untill")
    refused(DataError, r"tiny_text.yaml: lm-eval cannot load it", wrong)
    (tasks / "questions.jsonl").unlink()
    refused(UnavailableError, r"its data cannot be had: .*questions.jsonl", tasks / "tiny_choice.yaml")
    monkeypatch.setattr(benchmarks, "find_spec", lambda name: None)
    refused(UnavailableError, r"`pip install 'dpkd-offline\[lm-eval\]'`", "gsm8k")
    assert (UsageError.exit_code, UnavailableError.exit_code) == (2, 69)


def test_prompts_that_lm_eval_cuts_are_named(
    config: EvaluateConfig, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(with_tasks(config, tasks / "tiny_text.yaml", task_max_length=20))
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert any("tiny_text" in line and "runcat" in line for line in warnings)
