"""Every container gives the rows that `datasets` reads from it: ours differs in the places of its errors alone."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from dpkd_offline.prompts.sources import read_rows

COUNT = 10_000
PIECES = [
    *(
        "tea",
        "Tee ☕",
        "naïve",
        "日本語",
        "עברית",
        "👩‍👩‍👧",
        "e\u0301",
        "\u2028",
        "\u0085",
        "\ufeff",
        "\u00a0",
        "\U0001f600",
    ),
    *('"', '""', "'", "\\", "\\n", "\n", "\n\n", "\t", ",", ";", "|", "{", "[]", "#", "0", "-1.5", "null", " "),
]
Rows = list[dict[str, Any]]
Files = dict[str, tuple[Callable[[Path, Rows], object], str, dict[str, Any]]]


def text(draw: random.Random) -> str:
    """Any text, also none; a number alone would be one to those that guess types."""
    return "".join(draw.choice(PIECES) for _ in range(draw.randrange(8))) + draw.choice(["", "x"])


def some_rows() -> tuple[Rows, Rows]:
    """Rows of text alone, which every container can hold, and rows with lists and numbers."""
    draw = random.Random(19)
    flat = [{"id": f"row-{n}", "instruction": f"x{text(draw)}", "output": text(draw)} for n in range(COUNT)]
    nested = [
        {
            **row,
            "n": draw.choice([None, draw.randrange(-(2**40), 2**40)]),
            "score": draw.choice([None, draw.randrange(10**6) / 2**10]),  # `datasets` reads ten digits of an array's
            "messages": [{"role": draw.choice("ab"), "content": text(draw)} for _ in range(draw.randrange(4))],
            "references": draw.choice([None, [], [text(draw)]]),
        }
        for row in flat
    ]
    return flat, nested


def lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=n % 2 == 0) + "\n" for n, row in enumerate(rows)).encode()


def table(path: Path, rows: Rows, comma: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=comma)
        writer.writeheader()
        writer.writerows(rows)


def packed(pack: Callable[[bytes], bytes]) -> Callable[[Path, Rows], object]:
    return lambda path, rows: path.write_bytes(pack(lines(rows)))


def stream(path: Path, rows: Rows) -> None:
    whole = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, whole.schema) as writer:
        writer.write_table(whole, max_chunksize=999)


def footed(path: Path, rows: Rows) -> None:
    feather.write_feather(pa.Table.from_pylist(rows), str(path))


AS_TEXT = {"keep_default_na": False, "na_values": [""]}  # else "null" and "NA" are none to `datasets`
# How a file is written, who reads it in `datasets`, and with what.
TEXT: Files = {
    "a.csv": (lambda path, rows: table(path, rows, ","), "csv", AS_TEXT),
    "a.tsv": (lambda path, rows: table(path, rows, "\t"), "csv", {"sep": "\t", **AS_TEXT}),
}
ANY: Files = {
    "a.jsonl": (packed(bytes), "json", {}),
    "a.json": (lambda path, rows: path.write_text(json.dumps(rows), encoding="utf-8"), "json", {}),
    "a.jsonl.gz": (packed(gzip.compress), "json", {}),
    "a.jsonl.bz2": (packed(bz2.compress), "json", {}),
    "a.jsonl.xz": (packed(lzma.compress), "json", {}),
    "a.jsonl.zst": (packed(lambda data: bytes(pa.compress(data, codec="zstd", asbytes=True))), "", {}),
    "a.parquet": (lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path), "parquet", {}),
    "stream.arrow": (stream, "arrow", {}),
    "file.arrow": (footed, "arrow", {}),
}


def ours(place: Path) -> Iterator[dict[str, Any]]:
    return (row.columns for row in read_rows(str(place)))


def said(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what says nothing: an empty cell of a table of text is none."""
    return {name: value or None for name, value in row.items()}


def test_ten_thousand_rows_are_the_same_in_every_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    flat, nested = some_rows()
    for files, rows, same in ((TEXT, flat, said), (ANY, nested, dict)):
        expected = [same(row) for row in rows]
        for name, (write, reader, options) in files.items():
            write(tmp_path / name, rows)
            assert [same(row) for row in ours(tmp_path / name)] == expected, name
            if not reader:  # `datasets` reads zstd with a package that this project does not need
                continue
            theirs = datasets.load_dataset(reader, data_files=str(tmp_path / name), split="train", **options)
            assert [same(row) for row in theirs] == expected, name
    whole = datasets.Dataset.from_list(nested)
    whole.save_to_disk(tmp_path / "saved", num_shards=3)
    datasets.DatasetDict(train=whole, test=whole.select([0])).save_to_disk(tmp_path / "saved-splits")
    for folder in ("saved", "saved-splits"):
        loaded = datasets.load_from_disk(str(tmp_path / folder))
        theirs = loaded["train"] if isinstance(loaded, datasets.DatasetDict) else loaded
        assert list(ours(tmp_path / folder)) == list(theirs) == nested, folder
