"""`push` and `pull`: a dataset directory for other teams, at a URL or in a folder, and one of theirs here.

What travels follows from the shard plan and the names of the tables, never from a listing or from what a file says.
A shard appears whole, and before the manifest entry that commits it, so that both commands may die at any time and go
on when they are repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from dpkd_offline import log
from dpkd_offline.arrivals import check_rows, check_whole, pieces, read_audit, read_entry, read_small
from dpkd_offline.card import write_card
from dpkd_offline.dataset import Dataset
from dpkd_offline.disclosure import check_disclosure
from dpkd_offline.errors import DataError, DpkdError, MismatchError, UnavailableError, UsageError
from dpkd_offline.files import file_sha256, parse_json, write_atomically
from dpkd_offline.receivers import HUB, SHARDS_AT_ONCE, Hub, Receiver, Storage, elsewhere, in_threads
from dpkd_offline.records import TopK
from dpkd_offline.remote import Location, without_secrets
from dpkd_offline.shards import Table, flat
from dpkd_offline.verification import beside, check_files, check_inside, check_links, check_provenance, round_of, tables

COMPARED_AT_ONCE = 16  # small files, each a request


def push(root: Path, url: str, *, private: bool = False) -> str:
    """Bring a dataset to where a part of it is, or nothing.

    Args:
        url: `hf://datasets/OWNER/NAME[@BRANCH]`, where all of it becomes one commit; another URL, or a folder.
        private: should the Hub have no such repository, make one that only its owner sees.

    Returns: the URL, without what it hides.

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
        receiver: Receiver = Hub(url, private) if url.startswith(HUB) else Storage(elsewhere(url))
        new_shards, new_rest = missing(receiver, root, shards, rest, shown_url)
        new = [*(name for names in new_shards for name in names), *new_rest]
        if new:
            with log.progress("push", len(new), "file") as shown:
                receiver.put(root, new_shards, new_rest, shown)
    except FileNotFoundError as error:
        raise UnavailableError(f"{shown_url}: there is no such place") from error
    size, others = sum((root / name).stat().st_size for name in new), 2 * len(shards) + len(rest) - len(new)
    log.info(f"push: {len(new)} files, {size} bytes; {others} were there")
    return shown_url


def check_sound(dataset: Dataset) -> None:
    """Raise unless all files of a dataset are there, in it, and those that were committed. Values: see `verify`."""
    found = {table.name: table for table in tables(dataset)}
    made = {name: table.require_provenance() for name, table in found.items() if name != "prompts"}
    for name, table in found.items():
        check_files(table)
        if name in made:
            check_provenance(table, made, dataset)
    for name in ("dataset.json", "README.md"):
        check_inside(on_disk(dataset.root), on_disk(dataset.root / name))

    def check_hash(shard: tuple[Table[Any], int]) -> int:
        table, number = shard
        path, entry = on_disk(table.path(number)), table.entry(number)
        assert entry is not None
        if file_sha256(path) != entry.get("sha256"):
            raise MismatchError(f"{path}: its sha256 is not the one in {table.entry_path(number)}")
        return table.plan.rows_of(number)

    shards = [(table, number) for table in found.values() for number in range(dataset.plan.count)]
    with log.progress("check", dataset.plan.rows * len(found), "row") as shown:
        in_threads(check_hash, shards, SHARDS_AT_ONCE, shown.advance)


def contents(dataset: Dataset) -> tuple[list[tuple[str, str]], list[str]]:
    """The names of each shard and its manifest entry, and of all other files, in the order in which they are stored."""
    found = list(tables(dataset))
    shards = [
        (f"{table.name}/{table.path(shard).name}", f"{table.name}/_manifest/{table.entry_path(shard).name}")
        for table in found
        for shard in range(table.plan.count)
    ]
    others = [f"{table.name}/{name}" for table in found for name in ("_table.json", "_audit.json")]
    return shards, [*(name for name in others if (dataset.root / name).exists()), "dataset.json", "README.md"]


def missing(
    receiver: Receiver, root: Path, shards: Sequence[tuple[str, str]], rest: Sequence[str], url: str
) -> tuple[list[list[str]], list[str]]:
    """What of a dataset is not there yet, or not as it is here.

    Raises:
        MismatchError: something is committed there that is no part of this dataset.
    """
    there, small = receiver.files(), [*rest, *(entry for _, entry in shards)]

    def is_there(name: str) -> bool:
        return name in there and there[name] in (None, (root / name).stat().st_size)

    def compare(name: str) -> str | None:
        return name if is_there(name) and receiver.same(name, root / name) else None

    asked = [name for name in small if name in there]
    same: set[str | None] = set()
    in_threads(compare, asked, COMPARED_AT_ONCE, same.add)
    for name in ("dataset.json", *asked):  # where the former differs, all else does
        if name in there and name not in same and is_commitment(name):
            raise MismatchError(
                f"{url}/{name}: not the one in {root}; what was committed there stays, and `dpkd-offline pull` brings "
                f"it into a folder of its own"
            )
    for name in sorted(there.keys() - set(small)):
        if is_commitment(name):
            raise MismatchError(f"{url}/{name}: committed there, and not in {root}; `dpkd-offline pull` comes first")

    new = []
    for data, entry in shards:
        if entry not in same:  # the data may be there, but nobody has vouched for it
            new.append([data, entry])
        elif not is_there(data):
            new.append([data])
    return new, [name for name in rest if name not in same]


def is_commitment(name: str) -> bool:
    """Whether a file never changes once it is there: a manifest entry, a table's provenance, dataset.json."""
    path = PurePosixPath(name)
    return path.name in ("_table.json", "dataset.json") or (path.parent.name == "_manifest" and path.suffix == ".json")


# --- pull -----------------------------------------------------------------------------------------------------------


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
    place = elsewhere(url)
    if isinstance(place, Path):
        check_inside(place, place / "dataset.json")
    begins = read_small(place / "dataset.json")
    there = Dataset.parse(place, parse_json(begins, place / "dataset.json"))
    wanted = chosen(there, only, round)
    check_target(root, there)
    local = list(tables(Dataset.open(root))) if Dataset.exists(root) else []
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
    with log.progress("pull", len(wanted) * there.plan.count, "shard") as shown:

        def count(size: int) -> None:
            counts.append(size)
            shown.advance()

        for table in wanted:
            here = Table(root, table.name, table.record, there.plan)
            if table.name in texts:
                keep(on_disk(here.folder / "_table.json"), texts[table.name], table.folder / "_table.json")
            in_threads(partial(bring, table, here), range(there.plan.count), SHARDS_AT_ONCE, count)
            bring_audit(table, here)
            if table.name == "prompts":  # until they have entered there is no dataset
                keep(root / "dataset.json", begins, place / "dataset.json")
    write_card(Dataset.open(root))
    new = [size for size in counts if size]
    log.info(f"pull: {len(new)} shards, {sum(new)} bytes; {len(counts) - len(new)} were there")
    return root


def chosen(there: Dataset, only: Sequence[str], round: int | None) -> list[Table[Any]]:
    """The tables that are asked for and those that they need, the prompts first."""
    found = {table.name: table for table in tables(there)}
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
        needed |= {beside(found[name], "prompts/student")} if round_of(found[name]) is not None else set()
        needed |= {beside(found[name], "pairs")} if found[name].record is TopK else set()
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


def bring(table: Table[Any], here: Table[Any], shard: int) -> int:
    """Bring a shard and its manifest entry here. Returns its bytes; 0 where it was here."""
    path, entry_path = on_disk(here.path(shard)), on_disk(here.entry_path(shard))
    data = read_small(table.entry_path(shard))
    entry = read_entry(table, shard, data)
    if entry_path.exists() and path.is_file() and path.stat().st_size == entry.bytes:
        keep(entry_path, data, table.entry_path(shard))
        return 0
    if not write_atomically(path, pieces(table, shard, entry), exclusive=True):
        if not path.is_file() or file_sha256(path) != entry.sha256:
            raise MismatchError(f"{path}: not the one at {table.path(shard)}, and not committed; delete it and repeat")
    try:
        check_rows(table, shard, path.read_bytes(), entry)
    except DpkdError:
        path.unlink()
        raise
    keep(entry_path, data, table.entry_path(shard))
    return entry.bytes


def bring_audit(table: Table[Any], here: Table[Any]) -> None:
    """Bring how far a table's log-probs lie off, where somebody has measured it; a later audit replaces an earlier."""
    path = table.folder / "_audit.json"
    if path.exists():
        write_atomically(here.folder / "_audit.json", read_audit(path))


def keep(path: Path, data: bytes, source: Location) -> None:
    """Write a file that never changes, or raise MismatchError where another one stands."""
    if not write_atomically(path, data, exclusive=True) and read_small(path) != data:
        raise MismatchError(f"{path}: not the one at {source}; take another folder")


def on_disk(path: Location) -> Path:
    assert isinstance(path, Path), f"{path}: not on this machine"
    return path
