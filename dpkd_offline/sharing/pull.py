"""`pull`: fetch a dataset of another team, or some of its tables.

What is fetched follows from the shard plan and the names of the tables, never from a listing or from what a file says.
A shard appears whole, and before the manifest entry that commits it, so that the command may die at any time and goes
on when it is repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError, DpkdError, MismatchError, UsageError
from dpkd_offline.common.files import parse_json, read_json, write_atomically
from dpkd_offline.common.hashing import file_sha256
from dpkd_offline.common.locations import Location
from dpkd_offline.common.results import Result
from dpkd_offline.dataset.card import write_card
from dpkd_offline.dataset.catalog import begun_tables, related_table
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.integrity import check_inside, check_links, check_provenance
from dpkd_offline.dataset.layout import PAIRS, PROMPTS, STUDENT_PROMPTS, TEACHER_PROMPTS, TOP_K
from dpkd_offline.dataset.provenance import check_keys, flat
from dpkd_offline.dataset.table import Table
from dpkd_offline.dataset.writing import dataset_output
from dpkd_offline.sharing.destinations import SHARDS_AT_ONCE, in_threads, on_disk, remote_or_folder
from dpkd_offline.sharing.untrusted import check_shard_stats, check_whole, pieces, read_audit, read_entry, read_small


@dataclass(frozen=True)
class PullResult(Result):
    """The folder that the dataset is in now."""

    shards: int  # that were fetched; others were in the folder before
    bytes: int  # of these


def pull(url: str, root: Path, only: Sequence[str] = (), round: int | None = None) -> PullResult:
    """Fetch a dataset, or some of its tables with what they need, from a folder or a URL into a folder.

    It may have been made by somebody who wishes us ill. All of it is checked before it is written, shards as they come,
    and nothing is written outside `root`.

    Args:
        only: tables, or folders of tables such as `pairs`; by default all.
        round: of tables that have rounds, the one that is fetched; by default all.

    Raises:
        DataError: it is no dataset, not whole, or without such tables.
        MismatchError: a shard is not the one that was committed, or `root` holds something else.
        UnavailableError: the URL cannot be reached.
    """
    place = remote_or_folder(url)
    if isinstance(place, Path):
        check_inside(place, place / "dataset.json")
    dataset_json = read_small(place / "dataset.json")
    remote = Dataset.parse(place, parse_json(dataset_json, place / "dataset.json", finite=True))
    tables = chosen(remote, only, round)
    check_target(root, remote)
    small_files = {place / "dataset.json": dataset_json, **_checked_provenances(tables, root, remote)}
    with dataset_output(root, "pull"):
        sizes = _fetch_tables(tables, root, small_files)
        write_card(Dataset.open(root))
    new = [size for size in sizes if size]
    console.info(f"pull: {len(new)} shards, {sum(new)} bytes; {len(sizes) - len(new)} were there")
    return PullResult(root, len(new), sum(new))


def _checked_provenances(tables: Sequence[Table[Any]], root: Path, remote: Dataset) -> dict[Location, bytes]:
    """The `_table.json` of each table, checked: it is of this dataset, agrees with the tables in `root`, and is whole.

    Raises:
        DataError, MismatchError: a table is not whole, or its provenance cannot be.
    """
    local = begun_tables(Dataset.open(root)) if Dataset.exists(root) else ()
    provenances = {table.name: known for table in local if table.kind is not PROMPTS and (known := table.provenance())}
    files: dict[Location, bytes] = {}
    for table in tables:
        check_links(table.at(root))
        check_whole(table)
        if table.kind is not PROMPTS:
            path = table.provenance_path
            files[path] = read_small(path)
            provenances[table.name] = parse_json(files[path], path, finite=True)
            check_keys(table.record, provenances[table.name], path)
    for table in tables:
        if table.kind is not PROMPTS:
            check_provenance(table, provenances, remote)
    return files


def _fetch_tables(tables: Sequence[Table[Any]], root: Path, small_files: Mapping[Location, bytes]) -> list[int]:
    """Fetch the tables, the prompts first, and dataset.json after them: until then there is no dataset.

    Args:
        small_files: dataset.json and the `_table.json` of each table, as they were checked.

    Returns: the bytes of each shard that was fetched, 0 of one that was in `root` before.
    """
    sizes: list[int] = []
    with console.progress("pull", sum(table.plan.count for table in tables), "shard") as shown:

        def count(size: int) -> None:
            sizes.append(size)
            shown.advance()

        for table in tables:
            target = table.at(root)
            if (provenance := small_files.get(table.provenance_path)) is not None:
                write_immutable(on_disk(target.provenance_path), provenance, table.provenance_path)
            in_threads(partial(fetch_shard, table, target), range(table.plan.count), SHARDS_AT_ONCE, count)
            fetch_audit(table, target)
            if table.kind is PROMPTS:
                source = table.root / "dataset.json"
                write_immutable(root / "dataset.json", small_files[source], source)
    return sizes


def chosen(dataset: Dataset, only: Sequence[str], round: int | None) -> list[Table[Any]]:
    """The tables that are asked for and those that they need, the prompts first."""
    tables = {table.name: table for table in begun_tables(dataset)}
    asked = {folder: [name for name in tables if f"{name}/".startswith(f"{folder.strip('/')}/")] for folder in only}
    if absent := [folder for folder, names in asked.items() if not names]:
        raise DataError(f"{dataset.root}: no table {absent[0]!r}; there are {', '.join(tables)}")
    wanted = {name for names in asked.values() for name in names} if only else set(tables)
    if round is not None:
        if round not in {tables[name].round for name in wanted}:
            raise DataError(f"{dataset.root}: no table of round {round} among {', '.join(sorted(wanted))}")
        wanted = {name for name in wanted if tables[name].round in (None, round)}
    needed = {PROMPTS.path()} | {TEACHER_PROMPTS.path()} & tables.keys()
    for table in (tables[name] for name in wanted):
        needed |= {related_table(table, STUDENT_PROMPTS)} if table.kind.rounds else set()
        needed |= {related_table(table, PAIRS)} if table.kind is TOP_K else set()
    return [table for name, table in tables.items() if name in wanted | needed]


def check_target(root: Path, source: Dataset) -> None:
    """Raise unless a folder is free, or holds a part of the same dataset."""
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root}: not a folder")
    for name in ("dataset.json", "README.md"):
        check_inside(root, root / name)
    if not Dataset.exists(root):
        return
    own, other = (
        flat({"prompt_set": asdict(dataset.prompt_set), "shards": asdict(dataset.plan)})
        for dataset in (Dataset.parse(root, read_json(root / "dataset.json")), source)
    )
    if differing := [key for key in own if own[key] != other.get(key)]:
        key = differing[0]
        raise MismatchError(
            f"{root / 'dataset.json'}: another dataset than {source.root}: {key} is {own[key]!r}, there "
            f"{other.get(key)!r}; take another folder"
        )


def fetch_shard(table: Table[Any], target: Table[Any], shard: int) -> int:
    """Fetch a shard and its manifest entry. Returns its bytes; 0 where the target has it."""
    path, entry_path = on_disk(target.path(shard)), on_disk(target.entry_path(shard))
    data = read_small(table.entry_path(shard))
    entry = read_entry(table, shard, data)
    if entry_path.exists() and path.is_file() and path.stat().st_size == entry.bytes:
        write_immutable(entry_path, data, table.entry_path(shard))
        return 0
    if not write_atomically(path, pieces(table, shard, entry), exclusive=True):
        if not path.is_file() or file_sha256(path) != entry.sha256:
            raise MismatchError(f"{path}: not the one at {table.path(shard)}, and not committed; delete it and repeat")
    try:
        check_shard_stats(table, shard, target.read_bytes(shard), entry)
    except DpkdError:
        path.unlink()
        raise
    write_immutable(entry_path, data, table.entry_path(shard))
    return entry.bytes


def fetch_audit(table: Table[Any], target: Table[Any]) -> None:
    """Fetch how far a table's log-probs lie off, where somebody has measured it; a later audit replaces an earlier."""
    path = table.folder / "_audit.json"
    if path.exists():
        write_atomically(target.folder / "_audit.json", read_audit(path))


def write_immutable(path: Path, data: bytes, source: Location) -> None:
    """Write a file that never changes, or raise MismatchError where another one stands."""
    if not write_atomically(path, data, exclusive=True) and read_small(path) != data:
        raise MismatchError(f"{path}: not the one at {source}; take another folder")
