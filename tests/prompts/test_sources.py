"""Files and folders as people have them: each gives the rows of the plain file, or one line that says what to do."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import random
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from helpers.memory import in_memory
from helpers.tiny import rows, write_jsonl

from dpkd_offline.common.errors import DataError, DpkdError, UnavailableError, UsageError
from dpkd_offline.common.locations import located
from dpkd_offline.config.base import PromptOptions
from dpkd_offline.dataset.schema import Prompt
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.prompts import containers, sources
from dpkd_offline.prompts.reader import PromptReport, read_prompts
from dpkd_offline.prompts.sources import is_missing, read_rows, read_texts, source_name

ROWS = [{"instruction": f"Nenne {n} Flüsse, “bitte”.", "input": "" if n % 2 else "Kurz.", "n": n} for n in range(1, 6)]
TEXT = "".join(json.dumps(row, ensure_ascii=n > 2) + "\n" for n, row in enumerate(ROWS)).encode()
GOOD = '{"instruction": "a"}\n'


@pytest.fixture(scope="module")
def chat(teachers: dict[str, Path]) -> ModelInfo:
    return ModelInfo(str(teachers["llama"]))


@pytest.fixture(autouse=True)
def _said_anew() -> None:
    sources._say.cache_clear()


def prompts_of(source: object, model: ModelInfo, report: PromptReport | None = None, **options: Any) -> list[Prompt]:
    return list(read_prompts(str(source), PromptOptions(**options), model, report or PromptReport()))


def texts_of(source: object) -> list[str]:
    return [row.columns["instruction"] for row in read_rows(str(source))]


def table_of(path: Path, comma: str) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=comma)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def packed_by(pack: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(pack(TEXT))


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


def odd_types() -> pa.Table:
    """As other programs write them: long text, times, ids and inputs that are numbers where rows have none."""
    text = {"instruction": pa.array([row["instruction"] for row in ROWS], pa.large_string())}
    inputs = pa.array([row["input"] for row in ROWS]).dictionary_encode()
    nothing = pa.array([float("nan")] * len(ROWS))
    times = pa.array([None, *range(1, len(ROWS))], pa.timestamp("ns"))
    return pa.table({**text, "input": inputs, "id": nothing, "system": nothing, "when": times, "n": nothing})


FILES: dict[str, Callable[[Path], object]] = {
    "lines.json": lambda path: path.write_bytes(TEXT),
    "UPPER.JSONL": lambda path: path.write_bytes(TEXT),
    "lines.ndjson": lambda path: path.write_bytes(TEXT),
    "array.json": lambda path: path.write_text(json.dumps(ROWS)),
    "array.jsonl": lambda path: path.write_text("\n " + json.dumps(ROWS, indent=2) + "\n\n"),
    "bom.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + TEXT),
    "bom-array.json": lambda path: path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
    "crlf.jsonl": lambda path: path.write_bytes(TEXT.replace(b"\n", b"\r\n") + b"\r\n \r\n\n"),
    "packed.jsonl.gz": packed_by(gzip.compress),
    "packed.JSONL.GZ": packed_by(lambda data: gzip.compress(data[:99]) + gzip.compress(data[99:])),
    "packed.json.zst": packed_by(zstd),
    "packed.jsonl.zst": packed_by(lambda data: zstd(data[:99]) + zstd(data[99:])),
    "packed.jsonl.bz2": packed_by(bz2.compress),
    "packed.jsonl.xz": packed_by(lzma.compress),
    "table.csv": lambda path: table_of(path, ","),
    "table.tsv": lambda path: table_of(path, "\t"),
    "table.csv.gz": lambda path: path.write_bytes(gzip.compress(table_of(path, ",").read_bytes())),
    "table.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "dictionary.parquet": lambda path: pq.write_table(
        pa.table({name: pa.array([row[name] for row in ROWS]).dictionary_encode() for name in ROWS[0]}), path
    ),
    "table.feather": lambda path: feather.write_feather(pa.Table.from_pylist(ROWS), str(path)),
    "types.parquet": lambda path: pq.write_table(odd_types(), path),
    "feather.arrow": lambda path: feather.write_feather(pa.Table.from_pylist(ROWS), str(path)),
}


def test_every_kind_of_file_gives_the_same_prompts(
    tmp_path: Path, chat: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plain.jsonl").write_bytes(TEXT)
    expected = prompts_of(tmp_path / "plain.jsonl", chat)
    assert len(expected) == 5
    for name, write in FILES.items():
        write(tmp_path / name)
        assert prompts_of(tmp_path / name, chat) == expected, name
    monkeypatch.setattr(containers, "PIECE", 7)  # an array that comes in pieces smaller than a row
    for name in ("array.json", "array.jsonl", "bom-array.json"):
        assert prompts_of(tmp_path / name, chat) == expected, name


def test_every_kind_of_folder_gives_the_same_prompts(
    tmp_path: Path, chat: ModelInfo, capsys: pytest.CaptureFixture[str]
) -> None:
    """Saved by `datasets`, with splits or without; a clone of a repository of the Hub; files of two kinds."""
    (tmp_path / "plain.jsonl").write_bytes(TEXT)
    expected = prompts_of(tmp_path / "plain.jsonl", chat)
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "saved", num_shards=2)
    shutil.copy(tmp_path / "saved" / "data-00000-of-00002.arrow", tmp_path / "saved" / "data-00000-of-00001.arrow")
    datasets.DatasetDict(train=table, test=table.select([3])).save_to_disk(tmp_path / "splits")
    (tmp_path / "clone" / "data").mkdir(parents=True)
    (tmp_path / "clone" / "README.md").write_text("# rivers")
    table.to_parquet(tmp_path / "clone" / "data" / "train-00000-of-00001.parquet")
    table.select([3]).to_parquet(tmp_path / "clone" / "data" / "test-00000-of-00001.parquet")
    (tmp_path / "mixed").mkdir()
    write_jsonl(tmp_path / "mixed" / "a.jsonl", ROWS[:3])
    (tmp_path / "mixed" / "b.json").write_text(json.dumps(ROWS[3:]))
    for other in (".hidden.jsonl", "_metadata.json", "dataset_infos.json"):
        (tmp_path / "mixed" / other).write_text("no rows")
    (tmp_path / "mixed" / "notes.txt").write_text("no rows")
    for name in ("saved", "splits", "splits:train", "clone", "clone:train", "mixed"):
        assert prompts_of(tmp_path / name, chat) == expected, name
    for name, files in {"splits": ["train/data-00000-of-00001.arrow"], "mixed": ["a.jsonl", "b.json"]}.items():
        report = PromptReport()
        prompts_of(tmp_path / name, chat, report)
        assert report.taken == {"files": files, "columns": ["instruction", "input"]}, name
    for name in ("splits:test", "clone:test"):
        assert prompts_of(tmp_path / name, chat) == expected[3:4], name
    said = capsys.readouterr().err.replace(f"{tmp_path}/", "").splitlines()
    assert "saved: data-00000-of-00002.arrow, data-00001-of-00002.arrow; not read: data-00000-of-00001.arrow" in said
    assert "splits: the split 'train' is taken, of train, test; splits:test would take another" in said
    assert "clone: the split 'train' is taken, of train, test; clone:test would take another" in said
    assert "clone: data/train-00000-of-00001.parquet" in said
    assert "mixed: a.jsonl, b.json; not read: notes.txt" in said


def test_files_of_two_splits_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "train.jsonl", rows(3))
    write_jsonl(tmp_path / "test.jsonl", rows(5)[3:])
    assert len(texts_of(tmp_path)) == 5
    assert f"warning: {tmp_path}: the splits test and train are read as one" in capsys.readouterr().err
    assert (len(texts_of(f"{tmp_path}:train")), len(texts_of(f"{tmp_path}:test"))) == (3, 2)
    with pytest.raises(UsageError, match=r"no split 'dev'; there are train, test: take .*:train, say"):
        texts_of(f"{tmp_path}:dev")
    with pytest.raises(UsageError, match=r"only a folder, .* has configs and splits"):
        texts_of(f"{tmp_path}/train.jsonl:train")


def test_what_is_taken_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    for _ in range(3):
        assert list(read_texts(str(tmp_path))) == ["one"]
    assert capsys.readouterr().err == f"{tmp_path}: a.jsonl\n"


def test_ids_are_text_or_numbers(tmp_path: Path, chat: ModelInfo) -> None:
    texts = [{"instruction": f"Tea {n}?"} for n in range(5)]
    given = [{**row, "id": id_} for row, id_ in zip(texts, ("a", 7, None, 1.5, ""), strict=True)]
    without = prompts_of(write_jsonl(tmp_path / "p.jsonl", texts), chat)
    expected = ["a", "7", without[2].id, "1.5", without[4].id]
    assert [prompt.id for prompt in prompts_of(write_jsonl(tmp_path / "q.jsonl", given), chat)] == expected
    numbers = pa.table({"instruction": ["a", "b", "c"], "id": [3.0, float("nan"), 2.0**40]})  # as pandas makes them
    pq.write_table(numbers, tmp_path / "p.parquet")
    assert [prompt.id for prompt in prompts_of(tmp_path / "p.parquet", chat)][::2] == ["3", str(2**40)]
    for id_ in (True, {"a": 1}, [1]):
        with pytest.raises(DataError, match=r"p\.jsonl:1: column 'id' must be text or a number, it is "):
            prompts_of(write_jsonl(tmp_path / "p.jsonl", [{**texts[0], "id": id_}]), chat)


def test_conversations_in_a_table_of_text_are_json(tmp_path: Path, chat: ModelInfo) -> None:
    turns = [{"role": "user", "content": 'Tea,\n"hot"?'}, {"role": "assistant", "content": "Yes."}]
    for name, text in {"json.csv": json.dumps(turns), "python.csv": str(turns), "none.csv": ""}.items():
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file).writerows([["messages", "instruction"], [text, "Coffee?"]])
    (prompt,) = prompts_of(tmp_path / "json.csv", chat)
    assert (prompt.messages, prompt.references) == (turns[:1], ["Yes."])
    with pytest.raises(DataError, match=r"python\.csv:2: column 'messages' is text, and no JSON of a list of messages"):
        prompts_of(tmp_path / "python.csv", chat)
    assert prompts_of(tmp_path / "none.csv", chat)[0].messages[0]["content"] == "Coffee?"


def test_a_card_in_a_folder_says_which_of_its_own_files_are_a_split(tmp_path: Path) -> None:
    """Whose names need not say it."""
    for name, part in {"one": rows(5)[:3], "two": rows(5)[3:]}.items():
        write_jsonl(tmp_path / f"{name}.jsonl", part)
    card = "---", "configs:", "- config_name: default", "  data_files:", "  - split: train", "    path: one.jsonl"
    (tmp_path / "README.md").write_text("\n".join((*card, "  - split: test", "    path: two.jsonl", "---", "# Tea")))
    assert (len(texts_of(tmp_path)), len(texts_of(f"{tmp_path}:test"))) == (3, 2)
    (tmp_path / "README.md").write_text("# Tea\n\n---\nconfigs: none of a card\n---\n")
    assert len(texts_of(tmp_path)) == 5


def test_files_and_splits_at_a_url(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    for name in ("lines.json", "array.json", "packed.jsonl.gz", "packed.jsonl.zst", "table.csv", "feather.arrow"):
        FILES[name](tmp_path / "files" / name)
    expected = [row["instruction"] for row in ROWS]
    at_url = read_rows(located(in_memory(tmp_path / "files", "files")))
    assert [row.columns["instruction"] for row in at_url] == expected * 6
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(tmp_path / "saved")
    assert len(list(read_rows(located(in_memory(tmp_path / "saved", "saved"))))) == 5
    (tmp_path / "clone" / "data").mkdir(parents=True)
    with pytest.raises(DataError, match=r"memory://clone: no file of rows in this folder, .*; name one of data"):
        list(read_rows(located(in_memory(tmp_path / "clone", "clone"))))


def test_a_card_chooses_files_within_its_folder_only(tmp_path: Path) -> None:
    def card(name: str, *lines: str) -> Path:
        (tmp_path / name / "one").mkdir(parents=True)
        write_jsonl(tmp_path / name / "one" / "x.jsonl", rows(2))
        (tmp_path / name / "README.md").write_text("\n".join(("---", *lines, "---")))
        return tmp_path / name

    two = "configs:", "- config_name: a", "  data_files: one/*.jsonl", "- config_name: b", "  data_files: one/x.jsonl"
    assert len(texts_of(f"{card('two', *two)}@b:train")) == 2
    with pytest.raises(DataError, match=r"Please pick one among the available configs: \['a', 'b'\]"):
        texts_of(tmp_path / "two")
    secret = write_jsonl(tmp_path / "secret.jsonl", rows(1))
    for number, files in enumerate((str(secret), "../secret.jsonl")):
        strange = card(f"strange{number}", "configs:", "- config_name: a", f"  data_files: {files}")
        with pytest.raises(DataError, match=r"its card names .*secret\.jsonl, which does not lie in it"):
            texts_of(strange)
    with pytest.raises(DataError, match="no file of rows in this folder"):
        texts_of(card("broken", "configs: ["))


def test_a_dataset_in_the_cache_is_read_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the name that it has on the Hub, and by the folder."""
    (tmp_path / "rivers" / "data").mkdir(parents=True)
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rivers" / "data" / "train-00000-of-00001.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.load_dataset(str(tmp_path / "rivers"), cache_dir=str(tmp_path / "cache"))
    (tmp_path / "cache" / "rivers").rename(tmp_path / "cache" / "ann___rivers")
    expected = [row["instruction"] for row in ROWS]
    assert texts_of("ann/rivers:train") == expected
    (file,) = (tmp_path / "cache").rglob("*.arrow")
    assert texts_of(file.parent) == texts_of(f"{file.parent}:train") == expected
    with pytest.raises(UnavailableError, match="'ann/lakes:train': neither a file nor a dataset"):
        texts_of("ann/lakes:train")


def test_a_mistyped_path_asks_no_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts").mkdir()
    monkeypatch.setattr(sources, "_named", lambda source: pytest.fail(f"{source} was looked for on the Hub"))
    for name in (
        "train.jsonl",
        "train.json.gz",
        "./prompt",
        "prompts/trian",
        f"{tmp_path}/x",
        "~/x",
        "a/b/c",
        "p.csv:x",
    ):
        assert is_missing(name), name
        with pytest.raises(DpkdError, match=r"no such file|only a folder"):
            list(read_rows(name))
    assert not any(map(is_missing, ("squad", "ann/rivers", "ann/rivers@de:train", "prompts", "prompts:train")))


def test_the_name_of_a_source_says_not_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    assert source_name(str(tmp_path / "a.jsonl")) == source_name(tmp_path / "a.jsonl") == "a.jsonl"
    assert source_name(f"{tmp_path}:train") == f"{tmp_path.name}:train"
    assert source_name("ann/rivers@de:train[:10]") == "ann/rivers@de:train[:10]"


ROWS_THAT_ARE_WRONG = {
    "twice.jsonl": (GOOD + '{"instruction": "a", "instruction": "b"}', r":2: invalid JSON: key 'instruction' stands"),
    "nan.jsonl": (GOOD + '{"instruction": "b", "score": NaN}', r":2: invalid JSON: NaN is no JSON"),
    "infinite.jsonl": (GOOD + '{"instruction": "b", "score": -Infinity}', r":2: invalid JSON: -Infinity is no JSON"),
    "list.jsonl": (GOOD + '["b"]', r":2:1: expected a JSON object, this is a list"),
    "half.jsonl": (GOOD.encode() + b'{"instruction": "\xed\xa0\xbd"}', r":2:18: not UTF-8 text"),
    "latin.jsonl": (GOOD.encode() + '{"instruction": "é"}'.encode("latin-1"), r":2:18: not UTF-8 text: .*as UTF-8"),
    "escaped.jsonl": (GOOD + '{"instruction": "\\ud83d"}', r":2: \\ud83d is half a character"),
    "nul.jsonl": (GOOD + '{"instruction": "b\\u0000"}', r":2: column 'instruction' holds the character NUL"),
    "control.jsonl": (GOOD + '{"instruction": "b\0"}', r":2:19: invalid JSON: Invalid control character"),
    "digits.jsonl": (GOOD + '{"instruction": "b", "n": ' + "9" * 5000 + "}", r":2: invalid JSON: .*limit.*digits$"),
    "deep.jsonl": (GOOD + '{"m": ' + "[" * 100_000 + "]" * 100_000 + "}", r":2: invalid JSON: lists .* too deep"),
    "list.json": (f"[{GOOD}, [1]]", r":2: expected a JSON object, this is a list"),
    "escaped.json": (f'[{GOOD}, {{"instruction": "\\ud83d"}}]', r":2: \\ud83d is half a character"),
    "short.csv": ("instruction,input\na,b\nc\n", r":3: 1 cells, and the first line has 2"),
    "quote.csv": ('instruction,input\na,b\n"c"d,e\n', r":3: invalid CSV: ',' expected"),
    "nul.csv": ("instruction\na\nb\0\n", r":3: column 'instruction' holds the character NUL"),
    "lines.csv": ('instruction,input\n"a\nb",c\n" ",d\n', r":4: column 'instruction' is empty"),
    "empty.parquet": (pa.table({"instruction": ["a", None]}), r":2: column 'instruction' is empty"),
}


@pytest.mark.parametrize("name", ROWS_THAT_ARE_WRONG)
def test_a_wrong_row_is_placed_or_left_out(
    name: str, tmp_path: Path, chat: ModelInfo, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = ROWS_THAT_ARE_WRONG[name]
    if isinstance(content, pa.Table):
        pq.write_table(content, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=name + message) as caught:
        prompts_of(tmp_path / name, chat)
    assert "\n" not in str(caught.value)
    report = PromptReport()
    assert len(prompts_of(tmp_path / name, chat, report, on_bad_row="skip")) == 1
    assert (report.rows, report.malformed, report.counts["malformed"]) == (2, 1, 1)
    assert capsys.readouterr().err == f"warning: {caught.value}; left out\n"


def test_of_rows_that_are_left_out_three_are_shown_and_all_are_counted(
    tmp_path: Path, chat: ModelInfo, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", [*rows(4), *[{"instruction": " "}] * 5, {"id": "row-0", "prompt": "b"}])
    report = PromptReport()
    assert len(prompts_of(source, chat, report, on_bad_row="skip", limit=10)) == 4
    assert str(report).startswith("4 of 10 rows (dropped: 6 malformed), from columns instruction, input, reference")
    assert [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()] == [
        f"{source}:{n}" for n in (5, 6, 7)
    ]
    assert "malformed" not in PromptReport().counts


FILES_THAT_ARE_WRONG = {
    "cut.json": (f'[{GOOD}, {{"instru', r":2: invalid JSON: Unterminated string"),
    "comma.json": (f"[{GOOD},]", r":2: invalid JSON: Expecting value"),
    "no-comma.json": (f"[{GOOD}{GOOD}]", r":1: invalid JSON: expected ',' or '\]' behind this row"),
    "more.json": (f"[{GOOD}] {GOOD}", r": more text behind the array"),
    "latin.json": ('[{"instruction": "é"}]'.encode("latin-1"), r": byte 19: not UTF-8 text"),
    "deep.json": ('[{"m": ' + "[" * 100_000, r":1: invalid JSON: lists or objects too deep"),
    "two.csv": ("instruction,instruction\na,b\n", r":1: column 'instruction' stands there twice"),
    "utf16.csv": ("instruction\na\n".encode("utf-16"), r":1:1: not UTF-8 text"),
    "unclosed.csv": ('instruction\n"a\nb\n', r":2: invalid CSV: unexpected end of data"),
    "cut.jsonl.gz": (gzip.compress(TEXT)[:-9], r": cannot be unpacked: Compressed file ended"),
    "cut.jsonl.zst": (zstd(TEXT)[:-9], r": Truncated compressed stream"),
    "not.jsonl.gz": (b"not packed", r": Not a gzipped file"),
    "not.jsonl.zst": (b"not packed", r": ZSTD decompress failed"),
    "not.jsonl.xz": (b"not packed", r": cannot be unpacked"),
    "not.arrow": (b"not of Arrow" * 9, r": not a readable Arrow file"),
    "pointer.parquet": (b"version https://git-lfs.github.com/spec/v1\n", r": a pointer of Git LFS.*git lfs pull"),
    "empty.jsonl": (b"", r": no prompt is left: 0 of 0 rows"),
    "empty.json": (b"[]", r": no prompt is left: 0 of 0 rows"),
    "empty.csv": (b"", r": no prompt is left: 0 of 0 rows"),
    "empty.parquet": (b"", r": not a readable Parquet file"),
    "empty.arrow": (b"", r": not a readable Arrow file"),
    "semicolons.csv": ("instruction;output\na;b\n", r":1: columns are parted by ';'; save it with commas"),
    "pretty.json": (json.dumps(ROWS[0], indent=1), r":1: an object on several lines; write each on one line, or all"),
    "packed.zip": (b"PK", r": an archive; unpack it, and name the file or the folder that comes out"),
    "packed.tar.gz": (b"", r": an archive; unpack it"),
    "table.xlsx": (b"PK", r": its name must end with \.jsonl, \.json, \.csv"),
    "table.parquet.gz": (b"", r": its name must end with"),
}


@pytest.mark.parametrize("name", FILES_THAT_ARE_WRONG)
def test_a_file_that_cannot_be_read_is_one_line(name: str, tmp_path: Path, chat: ModelInfo) -> None:
    content, message = FILES_THAT_ARE_WRONG[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DpkdError, match=name + message) as caught:
        prompts_of(tmp_path / name, chat)
    assert "\n" not in str(caught.value) and caught.value.exit_code in (2, 3)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "pipe.csv")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "nowhere")
    for name in ("pipe.jsonl", "folder", "loop", "dangling.jsonl", "/dev/zero"):
        with pytest.raises(UsageError, match=r"no regular file|a link to nothing"):
            texts_of(tmp_path / name)
    for name in ("n" * 5000, "n" * 5000 + ".jsonl", "a\0b", "a\0b.jsonl"):
        with pytest.raises(DataError):
            texts_of(name)
    (tmp_path / "around" / "data").mkdir(parents=True)
    (tmp_path / "around" / "again").symlink_to(tmp_path / "around")
    write_jsonl(tmp_path / "around" / "data" / "train.jsonl", rows(2))
    assert len(texts_of(tmp_path / "around")) == 2


def test_files_of_a_saved_dataset_stay_in_its_folder(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for files in (5, [{"filename": "../saved/data-00000-of-00001.arrow"}], [{"filename": []}], None):
        (tmp_path / "saved" / "state.json").write_text(json.dumps({"_data_files": files}))
        with pytest.raises(DataError, match=r"state\.json: '_data_files' does not name files of this folder"):
            texts_of(tmp_path / "saved")
    (tmp_path / "dict").mkdir()
    for splits, message in ((5, "is no list of names"), ([1], "is no list of names"), (["../saved"], "no such folder")):
        (tmp_path / "dict" / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
        with pytest.raises(DataError, match=message):
            texts_of(tmp_path / "dict")


def test_damaged_arrow_files_are_data_errors(tmp_path: Path) -> None:
    """Offsets that point anywhere are found before anything is read there."""
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    whole = (tmp_path / "saved" / "data-00000-of-00001.arrow").read_bytes()
    damage, refused, path = random.Random(0), 0, tmp_path / "damaged.arrow"
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(3):
            data[damage.randrange(len(data))] = damage.randrange(256)
        path.write_bytes(data)
        try:
            list(read_rows(path))
        except DataError:
            refused += 1
    assert refused > 100


def test_a_name_that_is_not_utf8_can_be_read_and_shown(tmp_path: Path, chat: ModelInfo) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/n\xff.jsonl")
    Path(name).write_text(GOOD + GOOD + "{x")
    with pytest.raises(DataError) as caught:
        prompts_of(name, chat)
    assert str(caught.value).startswith(f"{tmp_path}/n\\udcff.jsonl:3:2: invalid JSON")
    assert source_name(name) == "n\\udcff.jsonl"
    assert len(prompts_of(name, chat, on_bad_row="skip")) == 1
    feather.write_feather(pa.Table.from_pylist(ROWS), str(tmp_path / "a.arrow"))
    (tmp_path / "a.arrow").rename(name.replace("jsonl", "arrow"))
    assert len(texts_of(name.replace("jsonl", "arrow"))) == 5


def test_memory_does_not_grow_with_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, row = 500, {"instruction": "a" * 30_000}
    text = json.dumps(row)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((text + "\n").encode() * count))
    (tmp_path / "b.jsonl.zst").write_bytes(zstd((text + "\n").encode() * count))
    (tmp_path / "c.json").write_text(f"[{','.join([text] * count)}]")
    (tmp_path / "d.csv.gz").write_bytes(gzip.compress(b"instruction\n" + (row["instruction"] + "\n").encode() * count))
    for name in ("a.jsonl.gz", "b.jsonl.zst", "c.json", "d.csv.gz"):
        tracemalloc.start()
        assert sum(1 for _ in read_rows(str(tmp_path / name))) == count
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10 << 20, f"{name}: {peak} bytes for {30_000 * count} of text"
    monkeypatch.setattr(containers, "LARGEST_ROW", 9_000)
    monkeypatch.setattr(containers, "PIECE", 1 << 10)
    for name, message in {
        "a.jsonl.gz": ":1: a line of more than",
        "c.json": ":1: invalid JSON, or more than",
        "d.csv.gz": ":2: a line of more than",
    }.items():
        with pytest.raises(DataError, match=name + message):
            list(read_rows(str(tmp_path / name)))
