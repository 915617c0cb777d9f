"""Do the files of a table lie inside its dataset, all of them, and were they made for it? No row is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from dpkd_offline.common.errors import DataError, MismatchError
from dpkd_offline.common.locations import size_of
from dpkd_offline.dataset.catalog import COMMAND_OF, TEACHER, related_table, round_of
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.provenance import flat, origins
from dpkd_offline.dataset.schema import Prompt, Response
from dpkd_offline.dataset.table import Table


def check_files(table: Table[Any]) -> None:
    """Raise unless the folder holds the shards of the plan and no others, all inside the dataset, as the manifest says.

    Contents are not read.
    """
    check_links(table)
    there = {path.name for path in table.folder.glob("*.parquet")}
    committed = set(table.committed())
    missing = [s for s in range(table.plan.count) if s not in committed or table.path(s).name not in there]
    if missing:
        _say_missing(table, missing[0], len(missing))
    if unknown := sorted(there - {table.path(shard).name for shard in range(table.plan.count)}):
        raise DataError(f"{table.folder / unknown[0]}: no shard of this dataset, which has {table.plan.count} a table")
    for shard in range(table.plan.count):
        path, entry = table.path(shard), table.entry(shard)
        assert entry is not None
        expected = {"file": path.name, "rows": table.plan.rows_of(shard), "bytes": size_of(path)}
        for key, value in expected.items():
            if entry.get(key) != value:
                raise MismatchError(f"{table.entry_path(shard)}: {key} is {entry.get(key)!r}, there is {value!r}")


def _say_missing(table: Table[Any], first: int, count: int) -> NoReturn:
    path, command = table.path(first), COMMAND_OF.get(table.kind.split("/")[0], "generate")
    if (made := table.provenance() or {}).get("stage") == "import" or made.get("parts"):
        command = made["stage"]
    if table.entry_path(first).exists():
        raise DataError(f"{path}: no such file, though its manifest entry says that it was committed")
    raise DataError(
        f"{path}: not committed; {table.name} is only begun: {count} of {table.plan.count} shards are missing, "
        f"`dpkd-offline {command}` makes them"
    )


def check_links(table: Table[Any]) -> None:
    """Raise MismatchError where a link leads from a table on this machine out of its dataset."""
    if not isinstance(table.root, Path) or not isinstance(table.folder, Path):
        return
    for folder in (table.folder, table.folder / "_manifest"):
        check_inside(table.root, folder)
    for path in (*table.folder.glob("*"), *table.folder.glob("_manifest/*")):
        if path.is_symlink():
            check_inside(table.root, path)


def check_inside(root: Path, path: Path) -> None:
    """Raise MismatchError where a path is, or leads through, a link out of the folder `root`."""
    try:
        inside = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError) as error:  # links in a circle
        raise MismatchError(f"{path}: a link that leads nowhere") from error
    if not inside:
        raise MismatchError(f"{path}: a link that leads out of the dataset")


def check_provenance(table: Table[Any], made: dict[str, dict[str, Any]], dataset: Dataset) -> None:
    """Raise MismatchError where a table's provenance is not of this dataset, this folder, or its pairs' responses.

    Which command ran which model is asked of the parts, where a table was combined of some.
    """
    here, round = made[table.name], round_of(table)
    expected: dict[str, Any] = {"prompt_set": dataset.prompt_set.id}
    origin = {key: value for key, value in flat(here).items() if key == "model.revision"}
    spelled = {"tokenizer_fingerprint": _spelled(table, made, dataset)}
    if table.record is Response:
        origin |= {"stage": "generate" if "model" in here else "import"}
        origin |= {"role": "teacher" if table.name == TEACHER else "student"}
        expected |= spelled
    elif table.record is Prompt:
        origin |= {"stage": "render"}
    else:
        origin |= {"stage": "score-teacher"}
        expected |= spelled
        expected |= {"scored": "ids" if dataset.shares_tokenizer(here["tokenizer_fingerprint"]) else "text"}
        expected |= {"model": made[TEACHER]["model"]} if "model" in made.get(TEACHER, {}) else {}
        y_s = made.get(related_table(table, "responses/student"))
        expected |= {"student": y_s.get("model")} if y_s is not None else {}
    if round is not None:
        origin["round"] = round
    if here.get("reused_from") is not None:
        expected["reused_from"] = (round or 0) - 1
    for said, should in ((here, expected), *((flat(said), origin) for said in origins(here))):
        for key, value in should.items():
            if said.get(key) != value:
                path = table.folder / "_table.json"
                raise MismatchError(f"{path}: {key} is {said.get(key)!r}, that of the dataset is {value!r}")


def _spelled(table: Table[Any], made: dict[str, dict[str, Any]], dataset: Dataset) -> str:
    """The tokenizer that the token ids of a table are of: the dataset's, or that of the prompts its student saw."""
    own = made.get(related_table(table, "prompts/student"))
    if table.name == TEACHER or own is None or dataset.shares_tokenizer(made[table.name]["tokenizer_fingerprint"]):
        return dataset.prompt_set.tokenizer_fingerprint
    return str(own["tokenizer_fingerprint"])
