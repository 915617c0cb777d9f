"""Shards of people who wish us ill: small files that hold far more than they say, refused before it is unpacked."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpkd_offline.common.errors import DataError
from dpkd_offline.common.files import LARGEST_JSON_BYTES
from dpkd_offline.common.hashing import file_sha256
from dpkd_offline.dataset import parquet
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.parquet import check_written, in_arrow, parse_shard
from dpkd_offline.dataset.schema import PreferencePair, Prompt, Response, to_table

PATH = Path("ds/prompts/prompts-00000-of-00001.parquet")
MANY = 20_000_000


def file_of(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", **{"write_page_checksum": True, **options})
    return buffer.getvalue()


def prompts(rows: int, text: str = "x", references: list[str] | None = None) -> pa.Table:
    messages = [{"role": "user", "content": text}]
    return to_table([Prompt(str(n), messages, text, [1], references or []) for n in range(rows)], Prompt.schema)


def with_column(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    index = table.schema.get_field_index(name)
    return table.set_column(index, table.schema.field(index), values)


def lists_of_ones(count: int) -> pa.Array:
    return pa.ListArray.from_arrays([0, count], pa.repeat(pa.scalar(1, pa.int32()), count), type=Prompt.schema[3].type)


def unplanned_rows() -> tuple[bytes, str]:
    many = pa.table({"id": pa.repeat(pa.scalar("x"), 1_000_000)})
    return file_of(many), "1000000 rows, the shard plan says 64"


def text_in_full() -> tuple[bytes, str]:
    return file_of(prompts(64, "x" * (2 << 20)), use_dictionary=False), "bytes or more when it is unpacked"


def one_text_many_times() -> tuple[bytes, str]:
    """The footer tells of 5 MiB: the text stands there once."""
    return file_of(prompts(64, "x" * (5 << 20)), dictionary_pagesize_limit=8 << 20), "bytes or more when it is unpacked"


def one_reference_many_times() -> tuple[bytes, str]:
    table = prompts(64, references=["x" * (1 << 20)] * 5)
    return file_of(table, dictionary_pagesize_limit=8 << 20), "bytes or more when it is unpacked"


def one_number_many_times() -> tuple[bytes, str]:
    one = with_column(prompts(1), "prompt_ids", lists_of_ones(MANY))
    return file_of(pa.concat_tables([one, prompts(63)])), "bytes or more when it is unpacked"


def footer_of_all() -> tuple[bytes, str]:
    data = bytearray(file_of(prompts(64)))
    data[-8:-4] = (1 << 31).to_bytes(4, "little")
    return bytes(data), "not a readable Parquet file: a footer of 2,147,483,648 bytes in a file of"


def many_row_groups() -> tuple[bytes, str]:
    """Each without a row, but for one."""
    buffer, table = io.BytesIO(), prompts(64)
    with pq.ParquetWriter(buffer, table.schema) as writer:
        writer.write_table(table)
        for _ in range(200):
            writer.write_table(table.slice(0, 0), row_group_size=1)
    return buffer.getvalue(), "201 row groups of 64 rows|not a readable Parquet file"


BOMBS: list[Callable[[], tuple[bytes, str]]] = [
    unplanned_rows,
    text_in_full,
    one_text_many_times,
    one_reference_many_times,
    one_number_many_times,
    footer_of_all,
    many_row_groups,
]


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb.__name__)
def test_what_holds_more_than_its_rows_can_is_refused_before_it_is_unpacked(
    bomb: Callable[[], tuple[bytes, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, message = bomb()
    assert len(data) < 1 << 20
    unpacked: list[int] = []
    real = parquet.arrow_bytes

    def noted(array: pa.Array) -> int:
        unpacked.append(array.nbytes)
        return real(array)

    monkeypatch.setattr(parquet, "arrow_bytes", noted)
    with pytest.raises(DataError, match=message) as caught:
        parse_shard(in_arrow(data), PATH, Prompt.schema, 64)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{PATH}: ")
    assert sum(unpacked) < parquet.ALWAYS_ALLOWED


def test_texts_that_stand_once_are_read_as_they_were_written() -> None:
    """Texts are read as numbers into a list of distinct ones; what comes of it is the table that was written."""
    prompt = [
        Prompt(str(n), [{"role": "user", "content": "é" * (n % 5)}] * (n % 3), "p" * n, [1, 2], ["a", "b"][: n % 3])
        for n in range(600)
    ]
    pair = [
        PreferencePair(str(n), "x", [1], [None, "r"][n % 2], "c", [1], "stop", f"{n}", [2], "length", [-1.0], [-2.0],
                       True, n % 2 == 0, [], 0)
        for n in range(300)
    ]  # fmt: skip
    response = [Response(str(n), "ab" * n, [1] * (n + 1), "stop", [], 0) for n in range(300)]
    for rows, record in ((prompt, Prompt), (pair, PreferencePair), (response, Response)):
        table = to_table(rows, record.schema)
        for options in ({}, {"dictionary_pagesize_limit": 100}, {"use_dictionary": False}, {"row_group_size": 70}):
            data = in_arrow(file_of(table, **options))
            assert parse_shard(data, PATH, record.schema, len(rows)).equals(table)
            some = parse_shard(data, PATH, record.schema, len(rows), ["id", record.schema.names[1]])
            assert some.equals(table.select(["id", record.schema.names[1]]))


def test_what_nobody_would_read_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "ALWAYS_ALLOWED", 1 << 10)
    monkeypatch.setattr(parquet, "LARGEST_RATIO", 2)
    data = in_arrow(file_of(prompts(8, "x" * 10_000)))
    with pytest.raises(DataError, match="take a smaller --shard-size"):
        check_written(data, 160_000, PATH, 8)


HOSTILE = """
import json, re, sys
from pathlib import Path
from dpkd_offline.common.errors import DpkdError
from dpkd_offline.curation.inspect import inspect
from dpkd_offline.curation.verify import verify


def most() -> int:  # KiB; of this process alone, unlike what getrusage says
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])


base = most()
for folder in map(Path, sys.argv[1:]):
    for command in (verify, inspect):
        try:
            command(folder)
        except DpkdError as error:
            print(json.dumps([folder.name, command.__name__, type(error).__name__, str(error)]))
print(json.dumps([most() - base]))
"""


def hostile_datasets(dataset: Path, folder: Path) -> Iterator[Path]:
    """Copies whose first shard of prompts, or whose dataset.json, is not what it should be."""
    rows, ones = Dataset.open(dataset).plan.rows_of(0), lists_of_ones(MANY)
    files = {
        "text": file_of(prompts(rows, "x" * ((160 << 20) // rows)), use_dictionary=False),
        "rows": unplanned_rows()[0],
        "repeated": file_of(prompts(rows, "x" * (24 << 20)), dictionary_pagesize_limit=1 << 30),
        "numbers": file_of(pa.concat_tables([with_column(prompts(1), "prompt_ids", ones), prompts(rows - 1)])),
        "sparse": b"",
    }
    for name, data in files.items():
        copy = shutil.copytree(dataset, folder / name)
        table = Dataset.open(copy).prompts
        table.path(0).write_bytes(data)
        if name == "sparse":
            os.truncate(table.path(0), 1 << 40)
            entry = json.loads(table.entry_path(0).read_text())
            table.entry_path(0).write_text(json.dumps({**entry, "bytes": 1 << 40}))
        else:
            entry = json.loads(table.entry_path(0).read_text())
            entry |= {"sha256": file_sha256(table.path(0)), "bytes": len(data)}
            table.entry_path(0).write_text(json.dumps(entry))
        yield copy
    for name, plan in {
        "plan": {"rows": 10**12, "shard_size": 1, "count": 10**12},
        "a row": {"rows": 2**53 - 1, "shard_size": 2**53 - 1, "count": 1},
    }.items():
        copy = shutil.copytree(dataset, folder / name)
        value = json.loads((copy / "dataset.json").read_text())
        (copy / "dataset.json").write_text(json.dumps({**value, "shards": plan}))
        yield copy
    copy = shutil.copytree(dataset, folder / "lists")
    (copy / "dataset.json").write_bytes(b'{"a": [' + b"[]," * (LARGEST_JSON_BYTES // 12) + b"[]]}")
    yield copy


@pytest.mark.slow
def test_hostile_datasets_take_little_memory(datasets_by_family: dict[str, Path], tmp_path: Path) -> None:
    """Less than 1 GiB above what the interpreter takes with its libraries."""
    folders = list(hostile_datasets(datasets_by_family["gpt2"], tmp_path))
    program = [sys.executable, "-c", HOSTILE, *map(str, folders)]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    *refused, (kib,) = map(json.loads, done.stdout.splitlines())
    print(f"\n{len(refused)} refusals, {kib / 1024:.0f} MiB above the interpreter's base")
    unread = {("repeated", "inspect")}  # which reads no texts of prompts
    asked = {(folder.name, command) for folder in folders for command in ("verify", "inspect")}
    assert {(name, command) for name, command, *_ in refused} == asked - unread
    assert {kind for _, _, kind, _ in refused} <= {"DataError", "MismatchError"}
    assert all("\n" not in message for *_, message in refused)
    assert kib < 1 << 20
