from __future__ import annotations

import io
import json
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tiny import rows, write_jsonl

from dpkd_offline.common.errors import DataError, DpkdError, UnavailableError, UsageError
from dpkd_offline.config.base import PromptOptions
from dpkd_offline.dataset.schema import Prompt
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.prompts import columns
from dpkd_offline.prompts.columns import Content, Layout
from dpkd_offline.prompts.reader import PromptReport, read_prompts
from dpkd_offline.prompts.sources import Row, _named, read_rows, read_texts

PLAIN = PromptOptions()


@pytest.fixture(scope="module")
def chat(teachers: dict[str, Path]) -> ModelInfo:
    return ModelInfo(str(teachers["llama"]))


@pytest.fixture(scope="module")
def bare(teachers: dict[str, Path]) -> ModelInfo:
    return ModelInfo(str(teachers["gpt2"]))


def prompts_of(source: str, options: PromptOptions, model: ModelInfo, need_reference: bool = False) -> list[Prompt]:
    return list(read_prompts(source, options, model, PromptReport(), need_reference=need_reference))


def test_every_kind_of_source_gives_the_same_prompts(tmp_path: Path, chat: ModelInfo) -> None:
    write_jsonl(tmp_path / "a.jsonl", rows(9))
    pq.write_table(pa.Table.from_pylist(rows(9)), tmp_path / "a.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "1.jsonl", rows(9)[:4])
    pq.write_table(pa.Table.from_pylist(rows(9)[4:]), folder / "2.parquet")
    readings = [prompts_of(str(tmp_path / s), PLAIN, chat) for s in ("a.jsonl", "a.parquet", "folder")]
    assert readings[0] == readings[1] == readings[2]
    assert [p.id for p in readings[0]] == [f"row-{n}" for n in range(9)]


def test_no_other_thread_touches_a_parquet_file_that_python_has_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of Arrow's that does so while the interpreter ends aborts the process."""
    path, threads = tmp_path / "a.parquet", set()
    pq.write_table(pa.Table.from_pylist(rows(9)), path, row_group_size=2)
    content = path.read_bytes()

    class Watched(io.BytesIO):
        def read(self, *args: Any) -> bytes:
            threads.add(threading.get_ident())
            return super().read(*args)

        def seek(self, *args: Any) -> int:
            threads.add(threading.get_ident())
            return super().seek(*args)

    monkeypatch.setattr(Path, "open", lambda path, mode: Watched(content))
    assert [row.columns["id"] for row in read_rows(path)] == [f"row-{n}" for n in range(9)]
    assert threads == {threading.get_ident()}


def test_a_named_dataset_is_read_with_the_datasets_library(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", rows(5))
    write_jsonl(tmp_path / "test.jsonl", rows(7)[5:])
    assert [r.columns["id"] for r in _named(f"{tmp_path}:test")] == ["row-5", "row-6"]
    assert [r.place.rsplit(":", 1)[1] for r in _named(str(tmp_path))] == ["1", "2", "3", "4", "5"]
    with pytest.raises(UnavailableError, match="neither a file nor a dataset"):
        list(read_rows("no/such-dataset"))


def test_chat_template(chat: ModelInfo, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", [{"instruction": "Say hi.", "input": "To Ann."}])
    prompt = prompts_of(str(source), PLAIN, chat)[0]
    assert prompt.prompt == "<|user|>Say hi.\n\nTo Ann.</s><|assistant|>"
    assert chat.tokenizer.decode(prompt.prompt_ids) == prompt.prompt
    assert prompt.messages == [{"role": "user", "content": "Say hi.\n\nTo Ann."}]
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    source = write_jsonl(tmp_path / "m.jsonl", [{"messages": talk}])
    assert prompts_of(str(source), PLAIN, chat)[0].prompt == "<|system|>Be kind.</s><|user|>Hi</s><|assistant|>"


def test_alpaca_template_where_there_is_no_chat_template(bare: ModelInfo, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", [{"instruction": "Add.", "input": "1 and 2"}, {"instruction": "Go."}])
    with_input, without = prompts_of(str(source), PLAIN, bare)
    assert with_input.prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n")
    assert without.prompt.endswith("appropriately completes the request.\n\n### Instruction:\nGo.\n\n### Response:\n")
    with pytest.raises(UsageError, match="no chat template"):
        prompts_of(str(source), PromptOptions(template="chat"), bare)


def test_raw_prompts_take_no_template(chat: ModelInfo, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Once upon a time "}])
    prompt = prompts_of(str(source), PLAIN, chat)[0]
    assert (prompt.prompt, prompt.messages) == ("Once upon a time ", [])
    assert chat.tokenizer.decode(prompt.prompt_ids) == "Once upon a time "


def test_filters_and_their_report(chat: ModelInfo, tmp_path: Path) -> None:
    long = {"instruction": "word " * 300, "reference": "ten words and one more: " + "a " * 20}
    short = {"instruction": "Short?", "reference": "Too short."}
    source = write_jsonl(tmp_path / "p.jsonl", [*rows(3), {**rows(3)[1], "id": "again"}, long, short])
    report = PromptReport()
    options = PromptOptions(min_reference_words=11, max_prompt_tokens=200)
    prompts = list(read_prompts(str(source), options, chat, report))
    assert [p.id for p in prompts] == ["row-0", "row-1", "row-2"]
    assert (report.rows, report.duplicates, report.too_long, report.short_reference) == (6, 1, 1, 1)
    assert str(report).startswith("3 of 6 rows (dropped: 1 longer than max-prompt-tokens, 1 with a reference")
    kept = prompts_of(str(source), PromptOptions(limit=2), chat)
    assert [p.id for p in kept] == ["row-0", "row-1"]


def test_the_filter_of_the_paper_keeps_references_of_more_than_ten_words(chat: ModelInfo, tmp_path: Path) -> None:
    values = [{"instruction": f"N{n}", "reference": "word " * n} for n in (9, 10, 11, 12)]
    source = write_jsonl(tmp_path / "p.jsonl", values)
    prompts = prompts_of(str(source), PromptOptions(min_reference_words=11), chat)
    assert [len(p.references[0].split()) for p in prompts] == [11, 12]


def test_ids_are_stable_wherever_the_row_stands(chat: ModelInfo, tmp_path: Path) -> None:
    values = [{k: v for k, v in row.items() if k != "id"} for row in rows(6)]
    forward = prompts_of(str(write_jsonl(tmp_path / "f.jsonl", values)), PLAIN, chat)
    backward = prompts_of(str(write_jsonl(tmp_path / "b.jsonl", values[::-1])), PLAIN, chat)
    assert forward == backward[::-1]
    assert len({p.id for p in forward}) == 6


def test_several_references(chat: ModelInfo, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", [{"instruction": "Name a colour.", "reference": ["red", "blue"]}])
    assert prompts_of(str(source), PLAIN, chat)[0].references == ["red", "blue"]


GOOD = json.dumps(rows(1)[0])
WRONG = {
    "invalid JSON": (GOOD + '\n{"instruction": "x",,}\n', r"p\.jsonl:2:21: invalid JSON"),
    "not UTF-8": (GOOD.encode() + b'\n{"instruction": "\xff"}\n', r"p\.jsonl:2:18: not UTF-8"),
    "not an object": (GOOD + "\n[1]\n", r"p\.jsonl:2:1: expected a JSON object"),
    "missing column": (GOOD + '\n\n{"title": "x"}\n', r"p\.jsonl:3: column 'instruction' is missing"),
    "empty instruction": (GOOD + '\n{"instruction": "  "}\n', r"p\.jsonl:2: column 'instruction' is empty"),
    "null instruction": ('{"instruction": null}\n', r"p\.jsonl:1: column 'instruction' is empty"),
    "wrong type": ('{"instruction": 5}\n', r"p\.jsonl:1: column 'instruction' must be a string, it is int"),
    "wrong input": ('{"instruction": "x", "input": []}\n', r"p\.jsonl:1: column 'input' must be a string"),
    "wrong reference": ('{"instruction": "x", "reference": 4}\n', r"p\.jsonl:1: column 'reference' must be"),
    "empty prompt": ('{"prompt": ""}\n', r"p\.jsonl:1: column 'prompt' is empty"),
    "no messages": ('{"messages": []}\n', r"p\.jsonl:1: column 'messages' must be a list"),
    "wrong role": ('{"messages": [{"role": "boss", "content": "x"}]}\n', r"p\.jsonl:1: column 'messages' needs a role"),
    "assistant last": (
        '{"messages": [{"role": "assistant", "content": "x"}]}\n',
        r"must end with what a user or a tool says",
    ),
    "id twice": ('{"id": 1, "instruction": "a"}\n{"id": 1, "instruction": "b"}\n', r"p\.jsonl:2: column 'id': '1'"),
    "half a character": ('{"instruction": "\\ud83d \\ude00"}\n', r"p\.jsonl:1: \\ud83d is half a character"),
    "nothing": ("\n", r"p\.jsonl: no prompt is left"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rows_are_placed(name: str, tmp_path: Path, chat: ModelInfo) -> None:
    content, message = WRONG[name]
    path = tmp_path / "p.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        prompts_of(str(path), PLAIN, chat)


def test_missing_references_matter_where_they_are_needed(chat: ModelInfo, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", [rows(1)[0], {"instruction": "x"}])
    assert len(prompts_of(str(source), PLAIN, chat)) == 2
    with pytest.raises(DataError, match=r"p\.jsonl:2: column 'reference' is missing"):
        prompts_of(str(source), PLAIN, chat, need_reference=True)


def test_sources_that_are_no_sources(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "p.zip").write_bytes(b"PK")
    (tmp_path / "p.parquet").write_bytes(b"PAR1 this is not Parquet PAR1")
    for name, error in (("empty", DataError), ("p.zip", UsageError), ("p.parquet", DataError), ("q.jsonl", DataError)):
        with pytest.raises(DpkdError) as caught:
            list(read_rows(str(tmp_path / name)))
        assert type(caught.value) is error
        assert name in str(caught.value)


def test_prompts_come_one_by_one_before_the_source_is_read(tmp_path: Path, chat: ModelInfo) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", [*rows(3), {"instruction": ""}])
    report = PromptReport()
    prompts = read_prompts(str(source), PLAIN, chat, report)
    assert [next(prompts).id, next(prompts).id, report.rows] == ["row-0", "row-1", 2]
    with pytest.raises(DataError, match=r"p\.jsonl:4: column 'instruction' is empty"):
        list(prompts)


def test_corpus_texts(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "c.jsonl", [{"text": "one"}, {"text": "two"}, {"body": "three"}])
    texts = read_texts(str(source))
    assert [next(texts), next(texts)] == ["one", "two"]
    with pytest.raises(DataError, match=r"c\.jsonl:3: column 'text' is missing"):
        next(texts)


def test_a_new_layout_of_columns_is_one_entry(tmp_path: Path, chat: ModelInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    def lines(row: Row, column: str) -> Content:
        return Content("messages", [{"role": "user", "content": line} for line in row.columns[column]])

    source = write_jsonl(tmp_path / "p.jsonl", [{"lines": ["Tea?"]}])
    same = write_jsonl(tmp_path / "q.jsonl", [{"messages": [{"role": "user", "content": "Tea?"}]}])
    with pytest.raises(DataError, match="column 'instruction' is missing"):
        prompts_of(str(source), PLAIN, chat)
    monkeypatch.setitem(columns.LAYOUTS, "lines", Layout("lines of text", lines))
    (prompt,) = prompts_of(str(source), PLAIN, chat)
    (expected,) = prompts_of(str(same), PLAIN, chat)
    assert (prompt.prompt, prompt.prompt_ids) == (expected.prompt, expected.prompt_ids)
