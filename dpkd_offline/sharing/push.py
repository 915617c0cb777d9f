"""`push`: store a dataset at a URL or in a folder, where other teams take it from.

A shard appears whole, and before the manifest entry that commits it, so that the command may die at any time and goes
on when it is repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dpkd_offline.common import console
from dpkd_offline.common.errors import MismatchError, UnavailableError, UsageError
from dpkd_offline.common.hashing import file_sha256
from dpkd_offline.common.locations import without_secrets
from dpkd_offline.dataset.card import write_card
from dpkd_offline.dataset.catalog import begun_tables
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.integrity import check_files, check_inside, check_provenance
from dpkd_offline.dataset.layout import PROMPTS
from dpkd_offline.dataset.table import Table
from dpkd_offline.sharing.destinations import (
    HUB,
    SHARDS_AT_ONCE,
    Hub,
    Receiver,
    Storage,
    in_threads,
    on_disk,
    remote_or_folder,
)
from dpkd_offline.sharing.disclosure import check_disclosure

COMPARED_AT_ONCE = 16  # small files, each a request


@dataclass(frozen=True)
class PushResult:
    """Where a dataset is now. Printed, it is the URL, without what that hides."""

    url: str
    files: int  # that were stored; others were there before
    bytes: int  # of these

    def __str__(self) -> str:
        return self.url


def push(root: Path, url: str, *, private: bool = False) -> PushResult:
    """Store a dataset where a part of it is, or nothing.

    Args:
        url: `hf://datasets/OWNER/NAME[@BRANCH]`, where all of it becomes one commit; another URL, or a folder.
        private: should the Hub have no such repository, make one that only its owner sees.

    Raises:
        DataError: a table is not complete, or a text tells a secret or an absolute path.
        MismatchError: a file is not the one that was committed, or something else is committed there.
        UnavailableError: nothing can be stored there.
    """
    shown_url = without_secrets(url)
    if private and not url.startswith(HUB):
        raise UsageError(f"--private is for {HUB}OWNER/NAME")
    other_on_hub = url.startswith("hf://") and not url.startswith(HUB)
    if other_on_hub or url.startswith(("http://", "https://")) or "::" in url:
        raise UsageError(f"{shown_url}: nothing can be stored there")
    dataset = Dataset.open(root)
    check_sound(dataset)
    write_card(dataset)
    shards, rest = contents(dataset)
    check_disclosure(root, [*(entry for _, entry in shards), *rest], url)

    try:
        receiver: Receiver = Hub(url, private) if url.startswith(HUB) else Storage(remote_or_folder(url))
        new_shards, new_rest = missing(receiver, root, shards, rest, shown_url)
        new = [*(name for names in new_shards for name in names), *new_rest]
        if new:
            with console.progress("push", len(new), "file") as shown:
                receiver.put(root, new_shards, new_rest, shown)
    except FileNotFoundError as error:
        raise UnavailableError(f"{shown_url}: there is no such place") from error
    size, others = sum((root / name).stat().st_size for name in new), 2 * len(shards) + len(rest) - len(new)
    console.info(f"push: {len(new)} files, {size} bytes; {others} were there")
    return PushResult(shown_url, len(new), size)


def check_sound(dataset: Dataset) -> None:
    """Raise unless all files of a dataset are in its folder and are those that were committed. Reads no values."""
    tables = {table.name: table for table in begun_tables(dataset)}
    provenances = {name: table.require_provenance() for name, table in tables.items() if table.kind is not PROMPTS}
    for name, table in tables.items():
        check_files(table)
        if name in provenances:
            check_provenance(table, provenances, dataset)
    for name in ("dataset.json", "README.md"):
        check_inside(on_disk(dataset.root), on_disk(dataset.root / name))

    def check_hash(shard: tuple[Table[Any], int]) -> int:
        table, number = shard
        path, entry = on_disk(table.path(number)), table.entry(number)
        assert entry is not None
        if file_sha256(path) != entry.sha256:
            raise MismatchError(f"{path}: its sha256 is not the one in {table.entry_path(number)}")
        return table.plan.rows_of(number)

    shards = [(table, number) for table in tables.values() for number in range(dataset.plan.count)]
    with console.progress("check", dataset.plan.rows * len(tables), "row") as shown:
        in_threads(check_hash, shards, SHARDS_AT_ONCE, shown.advance)


def contents(dataset: Dataset) -> tuple[list[tuple[str, str]], list[str]]:
    """The names of each shard with its manifest entry, and of all other files, in the order in which they go."""
    tables = list(begun_tables(dataset))
    shards = [
        (f"{table.name}/{table.path(shard).name}", f"{table.name}/_manifest/{table.entry_path(shard).name}")
        for table in tables
        for shard in range(table.plan.count)
    ]
    others = [f"{table.name}/{name}" for table in tables for name in ("_table.json", "_audit.json")]
    return shards, [*(name for name in others if (dataset.root / name).exists()), "dataset.json", "README.md"]


def missing(
    receiver: Receiver, root: Path, shards: Sequence[tuple[str, str]], rest: Sequence[str], url: str
) -> tuple[list[list[str]], list[str]]:
    """What of a dataset the receiver lacks, or has otherwise.

    Raises:
        MismatchError: something is committed there that is no part of this dataset.
    """
    stored, small = receiver.files(), [*rest, *(entry for _, entry in shards)]

    def is_stored(name: str) -> bool:
        return name in stored and stored[name] in (None, (root / name).stat().st_size)

    def compare(name: str) -> str | None:
        return name if is_stored(name) and receiver.same(name, root / name) else None

    asked = [name for name in small if name in stored]
    same: set[str | None] = set()
    in_threads(compare, asked, COMPARED_AT_ONCE, same.add)
    for name in ("dataset.json", *asked):  # where the former differs, all else does
        if name in stored and name not in same and is_commitment(name):
            raise MismatchError(
                f"{url}/{name}: not the one in {root}; what was committed there stays, and `dpkd-offline pull` brings "
                f"it into a folder of its own"
            )
    for name in sorted(stored.keys() - set(small)):
        if is_commitment(name):
            raise MismatchError(f"{url}/{name}: committed there, and not in {root}; `dpkd-offline pull` comes first")

    new = []
    for data, entry in shards:
        if entry not in same:  # the data may be there, but nobody has vouched for it
            new.append([data, entry])
        elif not is_stored(data):
            new.append([data])
    return new, [name for name in rest if name not in same]


def is_commitment(name: str) -> bool:
    """Whether a file never changes once it is there: a manifest entry, a table's provenance, dataset.json."""
    path = PurePosixPath(name)
    return path.name in ("_table.json", "dataset.json") or (path.parent.name == "_manifest" and path.suffix == ".json")
