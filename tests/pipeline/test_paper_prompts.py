"""The published layouts of the paper's sets, in small, as prompt files that the commands read."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from helpers.tiny import rows, write_jsonl

from dpkd_offline.prompts.columns import content_of
from dpkd_offline.prompts.sources import read_rows

PIPELINES = Path(__file__).parents[2] / "pipelines"
LONG = "one two three four five six seven eight nine ten eleven"
SHORT = LONG.removesuffix(" eleven")
Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(PIPELINES))
    return importlib.import_module("paper_prompts")


@pytest.fixture
def converted(script: ModuleType, tmp_path: Path) -> Run:
    """The rows of a file that the script writes, each of which the commands understand."""

    def run(name: str, source: Path, *options: str, file: str = "") -> list[dict[str, Any]]:
        assert script.main([name, str(source), str(tmp_path / "out"), *options]) == 0
        path = tmp_path / "out" / f"{file or name}.jsonl"
        for row in read_rows(path):
            content = content_of(row)
            assert content.kind == "instruction" and content.references and not content.unused
        return [json.loads(line) for line in path.read_text().splitlines()]

    return run


def dolly_row(row: dict[str, str]) -> dict[str, str]:
    """As databricks-dolly-15k.jsonl has it."""
    said = {"instruction": row["instruction"], "context": row["input"], "response": row["reference"]}
    return {**said, "category": "open_qa"}


def minillm_row(row: dict[str, str], output: str | list[str] = LONG) -> dict[str, Any]:
    """As MiniLLM's files have it, with Alpaca's template in `prompt`."""
    prompt = f"Below is an instruction.\n\n### Instruction:\n{row['instruction']}\n\n### Response:\n"
    return {"instruction": row["instruction"], "input": row["input"], "prompt": prompt, "output": output}


def test_dolly_is_split_by_its_prompts_in_the_sizes_asked_for(converted: Run, tmp_path: Path) -> None:
    said = [dolly_row(row) for row in rows(40)]
    said += [said[0] | {"response": "Another answer to what is asked twice."}, said[1] | {"response": " "}]
    source = write_jsonl(tmp_path / "databricks-dolly-15k.jsonl", said)
    train = converted("dolly", source, "--held-out", "6", file="train")
    sets = {"train": train} | {n: converted("dolly", source, "--held-out", "6", file=n) for n in ("validation", "test")}
    assert {name: len(tasks) for name, tasks in sets.items()} == {"train": 29, "validation": 6, "test": 6}
    prompts = {name: {(t["instruction"], t["input"]) for t in tasks} for name, tasks in sets.items()}
    assert not prompts["test"] & prompts["train"] and not prompts["test"] & prompts["validation"]
    assert len({t["id"] for tasks in sets.values() for t in tasks}) == 41
    assert (said[0]["instruction"], said[0]["context"]) in prompts["train"]  # with both of its answers
    backwards = write_jsonl(tmp_path / "backwards.jsonl", said[::-1])
    again = converted("dolly", backwards, "--held-out", "6", file="test")
    assert {(t["instruction"], t["input"]) for t in again} == prompts["test"]


def test_minillms_dolly_keeps_its_published_split(converted: Run, tmp_path: Path) -> None:
    said = [minillm_row(row) for row in rows(20)]
    write_jsonl(tmp_path / "raw.jsonl", said[:15])
    write_jsonl(tmp_path / "valid.jsonl", said[14:])  # the first of which is in raw.jsonl, too
    train = converted("dolly", tmp_path, "--held-out", "3", file="train")
    validation = converted("dolly", tmp_path, "--held-out", "3", file="validation")
    test = converted("dolly", tmp_path, "--held-out", "3", file="test")
    assert [t["instruction"] for t in validation] == [r["instruction"] for r in said[:3]]
    assert [t["instruction"] for t in train] == [r["instruction"] for r in said[3:14]]
    assert [t["instruction"] for t in test] == [r["instruction"] for r in said[14:]]


def test_self_instruct_in_both_layouts(converted: Run, tmp_path: Path) -> None:
    tasks = [
        {
            "id": f"user_oriented_task_{n}",
            "motivation_app": "Grammarly",
            "instruction": row["instruction"],
            "instances": [{"input": row["input"], "output": "Short."}] * (2 if n == 3 else 1),
        }
        for n, row in enumerate(rows(5))
    ]
    own = converted("selfinst", write_jsonl(tmp_path / "user_oriented_instructions.jsonl", tasks))
    assert [t["id"] for t in own][:5] == [*(f"user_oriented_task_{n}" for n in range(3)), *("user_oriented_task_3-0",
        "user_oriented_task_3-1")]  # fmt: skip
    assert own[0] == {
        "id": tasks[0]["id"],
        **{k: rows(1)[0][k] for k in ("instruction", "input")},
        "reference": "Short.",
    }
    others = converted("selfinst", write_jsonl(tmp_path / "valid.jsonl", [minillm_row(r, "Short.") for r in rows(5)]))
    assert [(t["instruction"], t["input"]) for t in others] == [(r["instruction"], r["input"]) for r in rows(5)]


def test_natural_instructions_are_the_listed_tasks_and_the_long_references(converted: Run, tmp_path: Path) -> None:
    clone = tmp_path / "natural-instructions"
    (clone / "tasks").mkdir(parents=True)
    (clone / "splits" / "default").mkdir(parents=True)
    (clone / "splits" / "default" / "test_tasks.txt").write_text("task002_b\ntask001_a\n")
    for name, count in (("task001_a", 130), ("task002_b", 3), ("task003_not_listed", 4)):
        instances = [{"id": f"{name}-{n}", "input": f"Sentence {n}.", "output": [LONG, SHORT]} for n in range(count)]
        instances[1]["output"] = [SHORT, LONG]  # the first reference counts
        task = {"Definition": ["Say it at", "length."], "Instances": instances, "Positive Examples": []}
        (clone / "tasks" / f"{name}.json").write_text(json.dumps(task))
    tasks = converted("sni", clone)
    assert len(tasks) == 2 + 99  # of task002_b, and of the first hundred of task001_a, without one each
    assert tasks[0] == {
        "id": "task002_b-0",
        "instruction": "Say it at\nlength.",
        "input": "Sentence 0.",
        "reference": [LONG, SHORT],
    }
    assert len(converted("sni", clone / "tasks")) == 129 + 2 + 3
    assert len(converted("sni", clone / "tasks" / "task003_not_listed.json")) == 3
    old = {"Definition": "Say it.", "Instances": [{"input": "", "output": LONG}]}  # without ids and lists
    (tmp_path / "task9.json").write_text(json.dumps(old))
    assert [t["id"] for t in converted("sni", tmp_path / "task9.json")] == ["task9-1"]
    published = write_jsonl(
        tmp_path / "valid.jsonl", [minillm_row(r, [LONG] if n else SHORT) for n, r in enumerate(rows(4))]
    )
    assert [t["reference"] for t in converted("sni", published)] == [LONG] * 3


PLAIN = {"instruction": "a", "context": "", "response": "b"}


@pytest.mark.parametrize(
    ("name", "file", "row", "message"),
    [
        ("dolly", "d.jsonl", {"instruction": "a", "context": ""}, "d.jsonl:1: column 'output' is missing; the row has"),
        ("dolly", "d.jsonl", PLAIN | {"instruction": " "}, "d.jsonl:1: column 'instruction' is empty"),
        ("dolly", "d.jsonl", PLAIN | {"response": [1]}, "d.jsonl:1: column 'response' must be a string or"),
        ("dolly", "d.jsonl", PLAIN, "1 different prompts; 500 for"),
        ("dolly", "elsewhere", None, "elsewhere"),
        ("selfinst", "s.jsonl", {"instruction": "a", "instances": []}, "s.jsonl:1: column 'instances' must be a list"),
        ("selfinst", "s.jsonl", {"instances": [{"output": "b"}]}, "s.jsonl:1: column 'input' is missing"),
        ("sni", "t.json", {"Definition": [1], "Instances": []}, "t.json: 'Definition' must be a string"),
        ("sni", "t.json", {"Definition": "a", "Instances": [{"input": "b"}]}, "t.json: instance 1: column 'output' is"),
        ("sni", "t.json", {"Definition": "a", "Instances": [{"input": "b", "output": SHORT}]}, "has no row for it"),
    ],
)
def test_what_is_wrong_in_a_source_is_named_with_its_row(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, file: str, row: Any, message: str
) -> None:
    if row:
        write_jsonl(tmp_path / file, [row])
    assert script.main([name, str(tmp_path / file), str(tmp_path / "out")]) == 3
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_an_id_that_two_tasks_have_is_refused(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = {"id": "same", "instruction": "a", "instances": [{"input": "", "output": "b"}]}
    source = write_jsonl(tmp_path / "s.jsonl", [task, task])
    assert script.main(["selfinst", str(source), str(tmp_path / "out")]) == 3
    assert "s.jsonl:2: the id 'same' is that of" in capsys.readouterr().err
