"""`pull`: bring a dataset of another team here, or some of its tables.

What is fetched follows from the shard plan and the names of the tables, never from a listing or from what a file says.
A shard appears whole, and before the manifest entry that commits it, so that the command may die at any time and goes
on when it is repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError, DpkdError, MismatchError, UsageError
from dpkd_offline.common.files import parse_json, write_atomically
from dpkd_offline.common.hashing import file_sha256
from dpkd_offline.common.locations import Location
from dpkd_offline.dataset.card import write_card
from dpkd_offline.dataset.catalog import begun_tables, related_table, round_of
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.integrity import check_inside, check_links, check_provenance
from dpkd_offline.dataset.provenance import flat
from dpkd_offline.dataset.schema import TopK
from dpkd_offline.dataset.table import Table
from dpkd_offline.sharing.destinations import SHARDS_AT_ONCE, in_threads, on_disk, remote_or_folder
from dpkd_offline.sharing.untrusted import check_shard_stats, check_whole, pieces, read_audit, read_entry, read_small


def pull(url: str, root: Path, only: Sequence[str] = (), round: int | None = None) -> Path:
    """Bring a dataset, or some of its tables with what they need, from a folder or a URL into a folder.

    What comes from there may have been made by somebody who wishes us ill. All of it is checked before it is written,
    shards as they come, and nothing is written outside `root`.

    Args:
        only: tables, or folders of tables such as `pairs`; by default all.
        round: of tables that have rounds, the one that is brought; by default all.

    Raises:
        DataError: it is no dataset, not whole, or without such tables.
        MismatchError: a shard is not the one that was committed, or `root` holds something else.
        UnavailableError: the URL cannot be reached.
    """
    place = remote_or_folder(url)
    if isinstance(place, Path):
        check_inside(place, place / "dataset.json")
    begins = read_small(place / "dataset.json")
    there = Dataset.parse(place, parse_json(begins, place / "dataset.json"))
    wanted = chosen(there, only, round)
    check_target(root, there)
    local = list(begun_tables(Dataset.open(root))) if Dataset.exists(root) else []
    made = {table.name: said for table in local if table.name != "prompts" and (said := table.provenance())}
    texts = {}
    for table in wanted:
        check_links(Table(root, table.name, table.record, there.plan))
        check_whole(table)
        if table.name != "prompts":
            path = table.folder / "_table.json"
            texts[table.name] = read_small(path)
            made[table.name] = parse_json(texts[table.name], path)
            table.check_provenance(made[table.name])
    for table in wanted:
        if table.name in texts:
            check_provenance(table, made, there)

    counts: list[int] = []
    with console.progress("pull", len(wanted) * there.plan.count, "shard") as shown:

        def count(size: int) -> None:
            counts.append(size)
            shown.advance()

        for table in wanted:
            here = Table(root, table.name, table.record, there.plan)
            if table.name in texts:
                write_immutable(on_disk(here.folder / "_table.json"), texts[table.name], table.folder / "_table.json")
            in_threads(partial(fetch_shard, table, here), range(there.plan.count), SHARDS_AT_ONCE, count)
            fetch_audit(table, here)
            if table.name == "prompts":  # until they have entered there is no dataset
                write_immutable(root / "dataset.json", begins, place / "dataset.json")
    write_card(Dataset.open(root))
    new = [size for size in counts if size]
    console.info(f"pull: {len(new)} shards, {sum(new)} bytes; {len(counts) - len(new)} were there")
    return root


def chosen(there: Dataset, only: Sequence[str], round: int | None) -> list[Table[Any]]:
    """The tables that are asked for and those that they need, the prompts first."""
    found = {table.name: table for table in begun_tables(there)}
    asked = {folder: [name for name in found if f"{name}/".startswith(f"{folder.strip('/')}/")] for folder in only}
    if absent := [folder for folder, names in asked.items() if not names]:
        raise DataError(f"{there.root}: no table {absent[0]!r}; there are {', '.join(found)}")
    wanted = {name for names in asked.values() for name in names} if only else set(found)
    if round is not None:
        if round not in {round_of(found[name]) for name in wanted}:
            raise DataError(f"{there.root}: no table of round {round} among {', '.join(sorted(wanted))}")
        wanted = {name for name in wanted if round_of(found[name]) in (None, round)}
    needed = {"prompts"}
    for name in wanted:
        needed |= {related_table(found[name], "prompts/student")} if round_of(found[name]) is not None else set()
        needed |= {related_table(found[name], "pairs")} if found[name].record is TopK else set()
    return [table for name, table in found.items() if name in wanted | needed]


def check_target(root: Path, there: Dataset) -> None:
    """Raise unless a folder is free, or holds a part of the same dataset."""
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root}: not a folder")
    for name in ("dataset.json", "README.md"):
        check_inside(root, root / name)
    if not Dataset.exists(root):
        return
    here = Dataset.open(root)
    a, b = (flat({"prompt_set": asdict(d.prompt_set), "shards": asdict(d.plan)}) for d in (here, there))
    if differing := [key for key in a if a[key] != b.get(key)]:
        key = differing[0]
        raise MismatchError(
            f"{root / 'dataset.json'}: another dataset than {there.root}: {key} is {a[key]!r}, there {b.get(key)!r}; "
            f"take another folder"
        )


def fetch_shard(table: Table[Any], here: Table[Any], shard: int) -> int:
    """Bring a shard and its manifest entry here. Returns its bytes; 0 where it was here."""
    path, entry_path = on_disk(here.path(shard)), on_disk(here.entry_path(shard))
    data = read_small(table.entry_path(shard))
    entry = read_entry(table, shard, data)
    if entry_path.exists() and path.is_file() and path.stat().st_size == entry.bytes:
        write_immutable(entry_path, data, table.entry_path(shard))
        return 0
    if not write_atomically(path, pieces(table, shard, entry), exclusive=True):
        if not path.is_file() or file_sha256(path) != entry.sha256:
            raise MismatchError(f"{path}: not the one at {table.path(shard)}, and not committed; delete it and repeat")
    try:
        check_shard_stats(table, shard, path.read_bytes(), entry)
    except DpkdError:
        path.unlink()
        raise
    write_immutable(entry_path, data, table.entry_path(shard))
    return entry.bytes


def fetch_audit(table: Table[Any], here: Table[Any]) -> None:
    """Bring how far a table's log-probs lie off, where somebody has measured it; a later audit replaces an earlier."""
    path = table.folder / "_audit.json"
    if path.exists():
        write_atomically(here.folder / "_audit.json", read_audit(path))


def write_immutable(path: Path, data: bytes, source: Location) -> None:
    """Write a file that never changes, or raise MismatchError where another one stands."""
    if not write_atomically(path, data, exclusive=True) and read_small(path) != data:
        raise MismatchError(f"{path}: not the one at {source}; take another folder")
