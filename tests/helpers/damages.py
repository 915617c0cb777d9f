"""Ways to damage a dataset or a recipe: each takes the dataset's folder and leaves something wrong in it."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pyarrow as pa

from dpkd_offline.dataset.catalog import begun_tables
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.table import Table
from helpers.tiny import replace_shard, vouch

Damage = Callable[[Path], object]
SHARD = 1  # the one that is damaged


def table_of(folder: Path, name: str) -> Table[Any]:
    return next(table for table in begun_tables(Dataset.open(folder)) if table.name == name)


def cut(name: str, keep: float, vouched: bool = False) -> Damage:
    """Only the first part of a shard."""

    def damage(folder: Path) -> None:
        table = table_of(folder, name)
        data = table.path(SHARD).read_bytes()
        table.path(SHARD).write_bytes(data[: int(len(data) * keep)])
        if vouched:
            vouch(table, SHARD)

    return damage


def flip(name: str, place: float, vouched: bool = False) -> Damage:
    """Another byte at a place between 0 and 1 of a shard."""

    def damage(folder: Path) -> None:
        table = table_of(folder, name)
        data = bytearray(table.path(SHARD).read_bytes())
        data[int(len(data) * place)] ^= 0x55
        table.path(SHARD).write_bytes(data)
        if vouched:
            vouch(table, SHARD)

    return damage


def values(name: str, row: int, **new: object) -> Damage:
    """Other values in a row, in a shard that is vouched for."""

    def damage(folder: Path) -> None:
        table = table_of(folder, name)
        rows = table.read_arrow(SHARD).to_pylist()
        changed = {key: value(rows[row][key]) if callable(value) else value for key, value in new.items()}
        rows[row] |= changed
        replace_shard(table, SHARD, pa.Table.from_pylist(rows, schema=table.schema))

    return damage


def schema(name: str, change: Callable[[pa.Table], pa.Table]) -> Damage:
    def damage(folder: Path) -> None:
        table = table_of(folder, name)
        replace_shard(table, SHARD, change(table.read_arrow(SHARD)))

    return damage


def retyped(name: str, column: str, type_: pa.DataType) -> Damage:
    def change(table: pa.Table) -> pa.Table:
        index = table.schema.get_field_index(column)
        return table.set_column(index, pa.field(column, type_, nullable=False), table[column].cast(type_))

    return schema(name, change)


def null(name: str, row: int, column: str, within: bool = False) -> Damage:
    """A null, or a list that holds one, in a column that says that it may."""

    def change(table: pa.Table) -> pa.Table:
        index, type_ = table.schema.get_field_index(column), table.schema.field(column).type
        entries = table[column].to_pylist()
        entries[row] = [*entries[row][:-1], None] if within else None
        if within:
            type_ = pa.list_(type_.value_type)
        return table.set_column(index, pa.field(column, type_), pa.array(entries, type_))

    return schema(name, change)


def remove(*paths: str) -> Damage:
    """Files or folders of the dataset, by pattern."""

    def damage(folder: Path) -> None:
        for pattern in paths:
            matches = list(folder.glob(pattern))
            assert matches, pattern
            for path in matches:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def edited(path: str, **changes: object) -> Damage:
    """Other values in a JSON file; `a__b` is the key b of a; an Ellipsis takes a key away."""

    def damage(folder: Path) -> None:
        (file,) = folder.glob(path)
        value = json.loads(file.read_text())
        for key, new in changes.items():
            *outer, last = key.split("__")
            place = value
            for part in outer:
                place = place[part]
            if new is ...:
                del place[last]
            else:
                place[last] = new
        file.write_text(json.dumps(value))

    return damage


def other_kind(path: str, make: Callable[[Path], object]) -> Damage:
    """Something that is no regular file in place of one: `make` makes it under its name."""

    def damage(folder: Path) -> None:
        (file,) = folder.glob(path)
        file.unlink()
        make(file)

    return damage


def link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def socket_at(path: Path) -> None:
    with chdir(path.parent), socket.socket(socket.AF_UNIX) as server:  # a path in full may be too long
        server.bind(path.name)


def text(path: str, content: bytes) -> Damage:
    return lambda folder: (folder / path).write_bytes(content)


def link_out(path: str) -> Damage:
    """A file as a link to its copy beside the dataset."""

    def damage(folder: Path) -> None:
        (file,) = folder.glob(path)
        outside = folder.parent / "outside"
        file.rename(outside)
        file.symlink_to(outside)

    return damage


def both(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def without_pairs(damage: Damage) -> Damage:
    """What score-teacher meets."""
    return both(remove("pairs"), damage)


def same_id_everywhere(folder: Path) -> None:
    """The id of the dataset's first row in the second shard of every table: only its being there twice is wrong."""
    for table in begun_tables(Dataset.open(folder)):
        values(table.name, 2, id="row-0")(folder)


def source(content: str) -> Damage:
    return lambda folder: (folder.parent / "p.jsonl").write_text(content)


def recipe(content: str | bytes) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder.parent / "r.yaml").write_bytes(data)


# --- other values of a row ------------------------------------------------------------------------------------------


def half(values: list[float]) -> list[float]:
    return values[: len(values) // 2]


def put_first(value: int) -> Callable[[list[int]], list[int]]:
    return lambda values: [value, *values[1:]]


def put_last(value: float) -> Callable[[list[float]], list[float]]:
    return lambda values: [*values[:-1], value]
