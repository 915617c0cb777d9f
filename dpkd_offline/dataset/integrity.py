"""Whether a table has all its files, inside its dataset, and was made for it. No row is read."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

from dpkd_offline.common.errors import DataError, MismatchError
from dpkd_offline.common.locations import size_of
from dpkd_offline.dataset.catalog import related_table, samples_of_pairs
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.layout import STUDENT_PROMPTS, STUDENT_RESPONSES, TEACHER_PROMPTS, TEACHER_RESPONSES
from dpkd_offline.dataset.provenance import FOR_PEOPLE, flat, origins, pair_rules, several, teachers_of
from dpkd_offline.dataset.schema import Prompt, Response
from dpkd_offline.dataset.table import Table


def check_files(table: Table[Any]) -> None:
    """Raise unless the folder holds the shards of the plan and no others, all inside the dataset, as the manifest says.

    Contents are not read.
    """
    check_links(table)
    present = {path.name for path in table.folder.glob("*.parquet")}
    entries = table.entries()
    missing = [s for s in range(table.plan.count) if s not in entries or table.path(s).name not in present]
    if missing:
        _raise_missing(table, missing[0], len(missing))
    if unknown := sorted(present - {table.path(shard).name for shard in range(table.plan.count)}):
        raise DataError(f"{table.folder / unknown[0]}: no shard of this dataset, which has {table.plan.count} a table")
    for shard, entry in entries.items():
        path = table.path(shard)
        expected = {"file": path.name, "rows": table.plan.rows_of(shard), "bytes": size_of(path)}
        entry.check(table.entry_path(shard), expected)


def _raise_missing(table: Table[Any], first: int, count: int) -> NoReturn:
    path, command = table.path(first), table.kind.command
    if (provenance := table.provenance() or {}).get("stage") == "import" or provenance.get("parts"):
        command = provenance["stage"]
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


def check_provenance(table: Table[Any], provenances: Mapping[str, Mapping[str, Any]], dataset: Dataset) -> None:
    """Raise MismatchError where a table's provenance is not of this dataset, this folder, or its pairs' responses.

    Which command ran which model is asked of the parts, where a table was combined of some.

    Args:
        provenances: of this table and the others of the dataset, by name.
    """
    own, round = provenances[table.name], table.round
    teacher = provenances.get(TEACHER_RESPONSES.path(), {})
    expected: dict[str, Any] = {"prompt_set": dataset.prompt_set.id}
    origin = {key: value for key, value in flat(own).items() if key == "model.revision"}
    tokenizer = {"tokenizer_fingerprint": _tokenizer_of(table, provenances, dataset)}
    if not pair_rules(own):
        origin["sample"] = table.sample or None
    if table.record is Response:
        _check_sample(table, provenances)
        origin |= {"stage": "generate" if "model" in own else "import"}
        origin |= {"role": "teacher" if table.kind is TEACHER_RESPONSES else "student"}
        expected |= tokenizer
    elif table.record is Prompt:
        origin |= {"stage": "render"}
        if table.kind is TEACHER_PROMPTS:
            keys = ("template", "template_fingerprint", "tokenizer_fingerprint")
            expected |= {key: getattr(dataset.prompt_set, key) for key in keys}
    else:
        _check_samples_of_pairs(table, own)
        origin |= {"stage": "score-teacher"}
        expected |= tokenizer
        expected |= {"scored": "ids" if dataset.shares_tokenizer(own["tokenizer_fingerprint"]) else "text"}
        expected |= {"model": teacher["model"]} if "model" in teacher else {}
        y_s = provenances.get(STUDENT_RESPONSES.path(table.student, round, samples_of_pairs(own)[1]))
        expected |= {"student": y_s.get("model")} if y_s is not None else {}
    own_prompts = provenances.get(related_table(table, STUDENT_PROMPTS))
    if own_prompts is not None and table.kind.rounds and dataset.shares_tokenizer(own["tokenizer_fingerprint"]):
        expected |= {key: own_prompts.get(key) for key in ("template_fingerprint", "system")}
    if round is not None:
        origin["round"] = round
    if own.get("reused_from") is not None:  # in round 0 it is that of another student
        expected["reused_from"] = (round or 0) - 1 if own.get("reused_student") is None else 0
    if "teachers" in own:
        del origin["model.revision"]
        expected["model"] = several(teachers_of(own))
        _check_teachers(table, own)
    for stated, right in ((own, expected), *((flat(one), origin) for one in origins(own))):
        for key, value in right.items():
            if stated.get(key) != value:
                path = table.provenance_path
                raise MismatchError(f"{path}: {key} is {stated.get(key)!r}, that of the dataset is {value!r}")


def _check_teachers(table: Table[Any], own: Mapping[str, Any]) -> None:
    """Raise MismatchError unless the rows that `_table.json` gives to several teachers are those of its parts."""
    ends, path = list(accumulate(run["rows"] for run in own["teachers"])), table.provenance_path
    parts = list(accumulate((part["rows"] for part in own.get("parts", ())), initial=0))
    if not ends or ends[-1] != table.plan.rows or parts[-1] != table.plan.rows:
        raise MismatchError(f"{path}: teachers and parts are not of {table.plan.rows} rows")
    if "teacher" not in table.schema.names:
        raise MismatchError(f"{path}: there are several teachers, and columns.teacher is missing")
    for part, first, end in zip(own["parts"], parts[:-1], parts[1:], strict=True):
        known = teachers_of(part["made"])
        for run, run_end in zip(own["teachers"], ends, strict=True):
            if max(first, run_end - run["rows"]) < min(end, run_end) and run["revision"] not in known:
                raise MismatchError(
                    f"{path}: teachers gives rows {first} to {end - 1} to {run['name']} ({run['revision'][:19]}), "
                    f"which is no teacher of that part"
                )


def _check_sample(table: Table[Any], provenances: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise MismatchError where the responses of a sample are not made as those of the first one."""
    first = provenances.get(table.kind.path(table.student, table.round))
    if not table.sample or first is None:
        return
    own, others = (
        {key: value for key, value in flat(of).items() if not {*FOR_PEOPLE, "sample"} & set(key.split("."))}
        for of in (provenances[table.name], first)
    )
    for key in (key for key in {**others, **own} if own.get(key) != others.get(key)):
        raise MismatchError(
            f"{table.provenance_path}: {key} is {own.get(key)!r}, that of the first sample is {others.get(key)!r}; all "
            f"samples are of one model and the same settings"
        )


def _check_samples_of_pairs(table: Table[Any], own: Mapping[str, Any]) -> None:
    """Raise MismatchError unless y_t and y_s are of the table's sample, and one of the two of the first at most."""
    samples = samples_of_pairs(own)
    if not {table.sample} <= set(samples) <= {table.sample, 0}:
        raise MismatchError(
            f"{table.provenance_path}: teacher_sample and student_sample are {samples[0]} and {samples[1]}, of pairs "
            f"of sample {table.sample}"
        )


def _tokenizer_of(table: Table[Any], provenances: Mapping[str, Mapping[str, Any]], dataset: Dataset) -> str:
    """The tokenizer that the token ids of a table are of: the dataset's, or that of the prompts its student saw."""
    rendered = provenances.get(related_table(table, STUDENT_PROMPTS))
    shared = dataset.shares_tokenizer(provenances[table.name]["tokenizer_fingerprint"])
    if table.kind is TEACHER_RESPONSES or rendered is None or shared:
        return dataset.prompt_set.tokenizer_fingerprint
    return str(rendered["tokenizer_fingerprint"])
