"""A preference set that was imported is a dataset like any other, but that nobody sampled it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.spaced import KINDS, spaced_model
from helpers.tiny import files_of, generate_config, score_config, write_jsonl

from dpkd_offline.common.errors import DataError, MismatchError
from dpkd_offline.config.data import ExportConfig, GenerateConfig, ImportConfig
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.curation.export_pairs import export_pairs
from dpkd_offline.curation.import_pairs import import_pairs
from dpkd_offline.curation.inspect import inspect, inspection_table
from dpkd_offline.curation.verify import verify
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.generation.generate import generate
from dpkd_offline.generation.score_teacher import score_teacher
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.training.trainer import train

Run = Callable[..., subprocess.CompletedProcess[str]]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def conversations(count: int) -> list[dict[str, Any]]:
    """The prompt is what both sides begin with."""
    return [
        {
            "chosen": [user(f"Describe tea in {n} words."), assistant(f"Tea is warm, {n} times over.")],
            "rejected": [user(f"Describe tea in {n} words."), assistant("Tea.")],
            "score": n,
        }
        for n in range(count)
    ]


def import_config(source: Path, dataset: Path, model: Path, **changes: Any) -> ImportConfig:
    return ImportConfig.model_validate({"source": str(source), "dataset": dataset, "model": str(model), **changes})


def test_import_score_verify_train_export(
    teachers: dict[str, Path], students: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way, with any teacher."""
    source, folder = write_jsonl(tmp_path / "prefs.jsonl", conversations(10)), tmp_path / "ds"
    import_pairs(import_config(source, folder, students["llama"], shard_size=4))
    assert "responses/teacher: 3 of 3 shards, imported from prefs.jsonl" in inspection_table(inspect(folder))
    score_teacher(score_config(folder, teachers["llama"], top_k=4))
    assert set(verify(folder).rows.values()) == {10}
    assert "`responses/teacher`: imported from `prefs.jsonl`, column `chosen`" in (folder / "README.md").read_text()

    def training(objective: str) -> Path:
        settings = {"max_steps": 2, "batch_size": 4, "dtype": "float32", "objective": objective, "holdout": 0.0}
        where = {"dataset": folder, "student": str(students["llama"]), "output": tmp_path / objective}
        return train(TrainConfig.model_validate({**where, **settings})).path

    lines = (training("dpkd") / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and not {"weight", "drift"} & json.loads(lines[0]).keys()
    assert "the off-policy correction is off, and drift cannot be known" in capsys.readouterr().err
    with pytest.raises(DataError) as error:
        training("minillm")
    assert str(error.value) == (
        f"{folder}/pairs/round-000: column 'behavior_rejected_logps' is empty, since no student sampled these "
        f"responses; objective 'minillm' needs it"
    )
    export_pairs(ExportConfig(dataset=folder, output=tmp_path / "trl"))
    description = json.loads((tmp_path / "trl" / "dpkd_offline.json").read_text())
    assert (description["rows"], description["cut_off"], description["student"]) == (10, 0, None)


def answers(count: int) -> list[dict[str, Any]]:
    """As an API gave them: one response a row, of which two are to one prompt."""
    rows = [{"instruction": f"Describe tea in {n} words.", "response": f"Tea is warm, {n}."} for n in range(count - 1)]
    return [*rows, {**rows[0], "response": "Tea, in no word at all, which is hard to say and to read."}]


def test_one_response_a_row_is_the_teachers(
    teachers: dict[str, Path], students: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way: imported, answered by a student, scored by any teacher, trained, verified."""
    source, folder = write_jsonl(tmp_path / "sft.jsonl", answers(10)), tmp_path / "ds"
    import_pairs(import_config(source, folder, students["llama"], shard_size=4))
    assert "one response a row, from column response, is taken as y_t, whoever wrote it" in capsys.readouterr().err
    whole = files_of(folder)
    import_pairs(import_config(source, folder, students["llama"], shard_size=4))
    assert files_of(folder) == whole and not (folder / "responses" / "student").exists()
    assert verify(folder).rows == dict.fromkeys(("prompts", "responses/teacher"), 10)
    dataset, eos = Dataset.open(folder), ModelInfo(str(students["llama"])).tokenizer.eos_token_id
    y_t = [row for shard in range(3) for row in dataset.responses("teacher", 0).read(shard)]
    prompts = [row for shard in range(3) for row in dataset.prompts.read(shard)]
    assert [row.response for row in y_t] == [row["response"] for row in answers(10)]
    assert {(row.response_ids[-1], row.finish_reason) for row in y_t} == {(eos, "stop")}
    assert [row.references for row in prompts] == [[row.response] for row in y_t]
    assert prompts[0].prompt_ids == prompts[9].prompt_ids and prompts[0].id != prompts[9].id
    assert prompts[0].id.split("::pair-")[0] == prompts[9].id.split("::pair-")[0]
    assert json.loads((folder / "dataset.json").read_text())["prompt_set"]["taken"] == {
        "files": ["sft.jsonl"],
        "columns": ["instruction", "response"],
    }

    assert generate(generate_config(folder, "teacher", teachers["llama"])).sampled == 0  # as a recipe would
    assert files_of(folder) == whole
    config = generate_config(folder, "student", students["llama"]).model_dump(exclude={"max_new_tokens", "max_length"})
    generate(GenerateConfig.model_validate(config))
    longest = max(len(row.response_ids) for row in y_t)
    assert dataset.responses("student", 0).require_provenance()["sampling"]["max_new_tokens"] == longest
    score_teacher(score_config(folder, teachers["llama"]))
    assert set(verify(folder).rows.values()) == {10}
    settings = {"max_steps": 2, "batch_size": 4, "dtype": "float32", "holdout": 0.0}
    where = {"dataset": folder, "student": str(students["llama"]), "output": tmp_path / "student"}
    run = train(TrainConfig.model_validate({**where, **settings})).path
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and "weight" in lines[0]  # how likely y_s was when it was sampled is known
    card = (folder / "README.md").read_text()
    assert "`responses/teacher`: imported from `sft.jsonl`, column `response`" in card


def test_the_command(run_cli: Run, teachers: dict[str, Path], tmp_path: Path) -> None:
    source, folder = write_jsonl(tmp_path / "prefs.jsonl", conversations(3)), tmp_path / "ds"
    done = run_cli("import", source, "--dataset", folder, "--model", teachers["llama"], "--limit", 2)
    assert (done.returncode, done.stdout) == (0, f"{folder}\n")
    assert Dataset.open(folder).plan.rows == 2
    assert str(tmp_path) not in "".join(path.read_text() for path in folder.rglob("*.json"))


def test_ids_are_of_the_text_closed_by_one_eos(teachers: dict[str, Path], tmp_path: Path) -> None:
    source_rows = conversations(3)
    source_rows[1]["rejected"][-1]["content"] = "Tea.</s>"  # it closes itself
    import_pairs(import_config(write_jsonl(tmp_path / "p.jsonl", source_rows), tmp_path / "ds", teachers["llama"]))
    dataset, tokenizer = Dataset.open(tmp_path / "ds"), ModelInfo(str(teachers["llama"])).tokenizer
    prompts, chosen, rejected = (
        table.read(0) for table in (dataset.prompts, dataset.responses("teacher", 0), dataset.responses("student", 0))
    )
    assert prompts[1].prompt == "<|user|>Describe tea in 1 words.</s><|assistant|>"
    assert prompts[1].messages == [user("Describe tea in 1 words.")]
    assert tokenizer.decode(chosen[1].response_ids) == "Tea is warm, 1 times over.</s>"
    assert [tokenizer.decode(row.response_ids) for row in rejected] == ["Tea.</s>"] * 3
    assert {(row.finish_reason, tuple(row.logps)) for row in chosen + rejected} == {("stop", ())}
    provenance = dataset.responses("teacher", 0).require_provenance()
    assert (provenance["stage"], provenance["source"], provenance["column"], provenance["rows"]["rows"]) == (
        "import",
        "p.jsonl",
        "chosen",
        3,
    )
    assert "model" not in provenance and "sampling" not in provenance
    assert verify(tmp_path / "ds").rows == dict.fromkeys(
        ("prompts", "responses/teacher", "responses/student/round-000"), 3
    )


def test_every_form_of_a_preference_set_is_the_same_dataset(teachers: dict[str, Path], tmp_path: Path) -> None:
    """Prompt implied or said; text or messages; a line of JSON or Parquet."""
    implied = conversations(5)
    explicit = [{"prompt": r["chosen"][:1], "chosen": r["chosen"][1:], "rejected": r["rejected"][1:]} for r in implied]
    text = [{**r, **{side: r[side][0]["content"] for side in ("chosen", "rejected")}} for r in explicit]
    asked = [{**r, "prompt": r["prompt"][0]["content"]} for r in text]
    unused = [{**r, "prompt": "the same, as text", "messages": r["chosen"]} for r in implied]
    turns = [{side: r[side][0] for side in ("prompt", "chosen", "rejected")} for r in explicit]
    shared = [
        {
            "conversations": [{"from": "human", "value": r["prompt"]["content"]}],
            **{side: {"from": "gpt", "value": r[side]["content"]} for side in ("chosen", "rejected")},
        }
        for r in turns
    ]
    forms = {"sharegpt": shared, "implied": implied, "said": explicit, "text": text, "asked": asked, "unused": unused}
    sources = {name: write_jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in forms.items()}
    sources["parquet"] = tmp_path / "p.parquet"
    pq.write_table(pa.Table.from_pylist(implied), sources["parquet"])
    contents = {}
    for name, source in sources.items():
        template = "chat" if name == "asked" else "auto"
        import_pairs(import_config(source, tmp_path / name, teachers["llama"], template=template))
        dataset = Dataset.open(tmp_path / name)
        tables = dataset.prompts, dataset.responses("teacher", 0), dataset.responses("student", 0)
        contents[name] = [[{**vars(row), "id": ""} for row in table.read(0)] for table in tables]
    assert all(rows == contents["implied"] for rows in contents.values())


def test_the_conversation_before_two_single_messages_is_the_prompt(
    teachers: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = {"chosen": {"from": "gpt", "value": "Yes."}, "rejected": {"from": "gpt", "value": "No."}}
    before = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Tea?"}]
    source = write_jsonl(tmp_path / "p.jsonl", [{"conversations": before, **turns}])
    import_pairs(import_config(source, tmp_path / "ds", teachers["llama"]))
    (prompt,) = Dataset.open(tmp_path / "ds").prompts.read(0)
    assert prompt.prompt == "<|system|>Be brief.</s><|user|>Tea?</s><|assistant|>"
    assert "not used" not in capsys.readouterr().err


def test_columns_are_mapped_and_malformed_rows_left_out(
    teachers: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"query": f"Tea {n}?", "good": "Yes.", "bad": "No.", "rejected": "unread", "note": "b"} for n in range(3)]
    source = write_jsonl(tmp_path / "p.jsonl", [*rows, {"query": "Tea?", "good": "Yes.", "bad": 4}, rows[0]])
    columns = {"instruction": "query", "chosen": "good", "rejected": "bad"}
    config = import_config(source, tmp_path / "ds", teachers["llama"], columns=columns, on_bad_row="skip")
    result = import_pairs(config)
    assert (result.rows, result.dropped["malformed"], result.dropped["duplicates"]) == (3, 1, 1)
    dataset = Dataset.open(tmp_path / "ds")
    assert [r.response for r in dataset.responses("student", 0).read(0)] == ["No."] * 3
    assert dataset.prompts.read(0)[0].prompt == "<|user|>Tea 0?</s><|assistant|>"
    assert dataset.prompt_set.rows["malformed"] == 1
    said = capsys.readouterr().err
    assert f"warning: {source}:4: column 'rejected' must be a string or a list of messages; left out\n" in said
    assert "from columns query, good, bad; columns not used: note\n" in said


def test_several_rows_of_one_prompt_are_several_pairs(
    teachers: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their ids begin alike, so that `train --holdout` takes all of them or none, whatever their order."""
    tea, coffee = ({"instruction": f"{drink}?", "chosen": "Yes."} for drink in ("Tea", "Coffee"))
    pairs = [{**tea, "rejected": "No."}, {**coffee, "rejected": "No."}, {**tea, "rejected": "Never."}]

    def ids(rows: list[dict[str, Any]], name: str) -> list[str]:
        source = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        import_pairs(import_config(source, tmp_path / name, teachers["llama"]))
        verify(tmp_path / name)
        return [prompt.id for prompt in Dataset.open(tmp_path / name).prompts.read(0)]

    first, other, again = ids([*pairs, pairs[0]], "hashes")
    assert first != again and first.split("::pair-")[0] == again.split("::pair-")[0] != other.split("::pair-")[0]
    assert ids(pairs[::-1], "turned") == [again, other, first]
    own = ids([{**pair, "id": pair["instruction"]} for pair in pairs], "own")
    assert own[:2] == ["Tea?", "Coffee?"] and own[2] == f"Tea?::pair-{again.split('::pair-')[1]}"
    assert "under another id" not in capsys.readouterr().err
    assert ids([{**pair, "id": n} for n, pair in enumerate(pairs)], "numbers") == ["0", "1", "2"]
    assert "warning: 1 rows have a prompt that an earlier row has under another id" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"wrong.jsonl:2: column 'id': 'a' stands on .*:1 too, with another prompt"):
        ids([{**pair, "id": "a"} for pair in pairs], "wrong")


def test_a_prompt_that_is_text_stays_as_it_is(teachers: dict[str, Path], tmp_path: Path) -> None:
    rows = [
        {"id": n, "prompt": "The sky is", "chosen": c, "rejected": " green."} for n, c in ((7, " blue."), (8, " b"))
    ]
    import_pairs(import_config(write_jsonl(tmp_path / "p.jsonl", rows), tmp_path / "ds", teachers["llama"]))
    prompts = Dataset.open(tmp_path / "ds").prompts.read(0)
    assert [(p.id, p.prompt, p.messages) for p in prompts] == [("7", "The sky is", []), ("8", "The sky is", [])]


def test_a_model_without_a_chat_template_takes_a_conversation_of_one_message(
    teachers: dict[str, Path], tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", conversations(2))
    import_pairs(import_config(source, tmp_path / "ds", teachers["gpt2"]))
    alpaca = "### Instruction:\nDescribe tea in 1 words.\n\n### Response:\n"
    assert Dataset.open(tmp_path / "ds").prompts.read(0)[1].prompt.endswith(alpaca)
    source = write_jsonl(tmp_path / "q.jsonl", [{"prompt": [*TEA, user("Really?")], "chosen": "a", "rejected": "b"}])
    with pytest.raises(DataError, match=r"q.jsonl:1: column 'prompt' needs a chat template, this run has 'alpaca'"):
        import_pairs(import_config(source, tmp_path / "none", teachers["gpt2"]))


def test_rows_that_are_left_out_are_counted(teachers: dict[str, Path], tmp_path: Path) -> None:
    rows = conversations(4)
    rows[1]["chosen"][-1]["content"] = "tea " * 100
    rows[2]["chosen"][0] = rows[2]["rejected"][0] = user("why " * 300)
    source = write_jsonl(tmp_path / "p.jsonl", [*rows, rows[0]])
    result = import_pairs(import_config(source, tmp_path / "ds", teachers["llama"], max_length=100))
    assert (result.path, result.rows, [n for n in result.dropped.values() if n]) == (tmp_path / "ds", 2, [1, 1, 1])
    dataset = Dataset.open(tmp_path / "ds")
    counted = {"rows": 5, "too_long": 1, "short_reference": 0, "duplicates": 1, "long_pairs": 1}
    assert (dataset.plan.rows, dataset.prompt_set.rows) == (2, counted)
    with pytest.raises(DataError, match=r"p.jsonl: no pair is left: 0 of 5 rows"):
        import_pairs(import_config(source, tmp_path / "none", teachers["llama"], max_length=2))
    assert not (tmp_path / "none").exists()


TEA = [user("Tea?"), assistant("Yes.")]
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no rejected": ({"chosen": TEA}, "column 'rejected' must be a string or a list of messages"),
    "a number": (
        {"prompt": "a", "chosen": 1, "rejected": "b"},
        "column 'chosen' must be a string or a list of messages",
    ),
    "no prompt": ({"chosen": "a", "rejected": "b"}, "column 'instruction' is missing"),
    "empty prompt": ({"prompt": "", "chosen": "a", "rejected": "b"}, "column 'prompt' is empty"),
    "prompt ends with the assistant": (
        {"prompt": TEA, "chosen": "a", "rejected": "b"},
        "column 'prompt' must be messages that end with what a user says",
    ),
    "one side is text": ({"chosen": TEA, "rejected": "b"}, "column 'rejected' must be a list of at least one message"),
    "nothing in common": (
        {"chosen": TEA, "rejected": [user("Coffee?"), assistant("No.")]},
        "column 'chosen' must hold one message of the assistant after the prompt",
    ),
    "answers alone": (
        {"chosen": [assistant("Yes.")], "rejected": [assistant("No.")]},
        "columns 'chosen' and 'rejected' must share messages that end with what a user says",
    ),
    "two answers": (
        {"chosen": TEA, "rejected": [*TEA, user("Really?"), assistant("No.")]},
        "column 'rejected' must hold one message of the assistant after the prompt",
    ),
    "NUL": ({"prompt": "a\0", "chosen": "b", "rejected": "c"}, "column 'prompt' holds the character NUL"),
    "no role": ({"chosen": [{"content": "a"}], "rejected": TEA}, "column 'chosen' needs a role of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rows(name: str, teachers: dict[str, Path], tmp_path: Path) -> None:
    row, message = WRONG[name]
    source = write_jsonl(tmp_path / "p.jsonl", [*conversations(1), row])
    with pytest.raises(DataError) as error:
        import_pairs(import_config(source, tmp_path / "ds", teachers["llama"]))
    assert str(error.value).startswith(f"{source}:2: {message}")
    assert not (tmp_path / "ds").exists()


def test_an_import_goes_on_and_refuses_what_is_not_the_same(teachers: dict[str, Path], tmp_path: Path) -> None:
    rows = [{**row, "id": n} for n, row in enumerate(conversations(9))]
    source, folder = write_jsonl(tmp_path / "p.jsonl", rows), tmp_path / "ds"
    config = import_config(source, folder, teachers["llama"], shard_size=4)
    import_pairs(config)
    whole = files_of(folder)
    table = Dataset.open(folder).responses("student", 0)
    table.entry_path(1).unlink()  # as a run leaves it that was killed
    table.path(2).unlink()
    table.entry_path(2).unlink()
    with pytest.raises(DataError, match="`dpkd-offline import` makes them"):
        verify(folder)
    import_pairs(config)
    assert files_of(folder) == whole

    rows[0]["rejected"] = [rows[0]["rejected"][0], assistant("Another.")]
    write_jsonl(source, rows)
    with pytest.raises(MismatchError, match=r"responses/student/round-000 was made with responses="):
        import_pairs(config)
    write_jsonl(source, rows[1:])
    with pytest.raises(MismatchError, match=r"dataset.json: its prompts are not those of .*p.jsonl"):
        import_pairs(config)
    assert files_of(folder) == whole


def test_what_goes_out_comes_in_again(
    datasets_by_family: dict[str, Path], teachers: dict[str, Path], tmp_path: Path
) -> None:
    """Prompts come back to the same tokens, with their ids and references."""
    for family in ("gpt2", "llama"):
        lines = tmp_path / f"{family}.jsonl"
        export_pairs(ExportConfig(dataset=datasets_by_family[family], output=lines, format="jsonl"))
        import_pairs(import_config(lines, tmp_path / family, teachers[family]))
        exported, imported = Dataset.open(datasets_by_family[family]), Dataset.open(tmp_path / family)
        old = [row for shard in range(exported.plan.count) for row in exported.prompts.read(shard)]
        assert [(p.id, p.prompt_ids, p.references) for p in imported.prompts.read(0)] == [
            (p.id, p.prompt_ids, p.references) for p in old
        ]


@pytest.mark.parametrize("kind", KINDS)
def test_imported_tokens_are_those_of_prompt_and_response_together(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a tokenizer that puts a space before every text: behind a prompt that would be one more than the text has."""
    model = spaced_model(tmp_path / "model", kind)
    answers = {"chosen": "people like it very much", "rejected": "a river on day 4."}
    pairs = [{"prompt": prompt, **answers} for prompt in ("Describe tea:", "Praise\nthe moon.\n")]
    source = write_jsonl(tmp_path / "p.jsonl", pairs)
    import_pairs(import_config(source, tmp_path / "ds", model))
    tokenizer, dataset = ModelInfo(str(model)).tokenizer, Dataset.open(tmp_path / "ds")
    for role, side in (("teacher", "chosen"), ("student", "rejected")):
        for prompt, response in zip(dataset.prompts.read(0), dataset.responses(role, 0).read(0), strict=True):
            ids = tokenizer(prompt.prompt + answers[side])["input_ids"]
            assert [*prompt.prompt_ids, *response.response_ids] == [*ids, 2]
            assert response.response_ids[:-1] != tokenizer(answers[side])["input_ids"]
            assert (response.response, response.finish_reason) == (answers[side], "stop")
    assert "not quite the same text" not in capsys.readouterr().err
    source = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "Tea:", "chosen": "a ☕", "rejected": "a river"}])
    import_pairs(import_config(source, tmp_path / "other", model))
    assert "1 responses are not quite the same text in the tokens of" in capsys.readouterr().err
