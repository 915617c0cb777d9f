"""`verify`: is a dataset whole, does what it says of itself hold, and do its tables belong together?"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpkd_offline.checks import check_ends, check_rows, check_same, check_top_k, expect
from dpkd_offline.dataset import Dataset, PromptDigest
from dpkd_offline.errors import DataError, MismatchError
from dpkd_offline.facts import Facts
from dpkd_offline.log import progress
from dpkd_offline.records import PreferencePair, Prompt, Response, TopK
from dpkd_offline.remote import Location, size_of
from dpkd_offline.seen import Seen
from dpkd_offline.shards import Table, flat, origins

TEACHER = "responses/teacher"
COMMAND_OF = {"responses": "generate", "pairs": "score-teacher", "top_k": "score-teacher --top-k"}


def tables(dataset: Dataset) -> Iterator[Table[Any]]:
    """The tables that have been begun."""
    yield dataset.prompts
    if dataset.responses("teacher", 0).folder.exists():
        yield dataset.responses("teacher", 0)
    for of_student in dataset.students():
        if (of_student.student_prompts.folder / "_table.json").exists():
            yield of_student.student_prompts
        for round in of_student.rounds("responses/student"):
            yield of_student.responses("student", round)
        for round in of_student.rounds():
            yield of_student.pairs(round)
        for round in of_student.rounds("top_k"):
            yield of_student.top_k(round)


def beside(table: Table[Any], kind: str) -> str:
    """The table of that kind of the same student and round: prompts/student, responses/student, pairs."""
    whose = table.name.split("/")[:2] if table.name.startswith("students/") else []
    return "/".join([*whose, kind, *([] if kind == "prompts/student" else [table.folder.name])])


def before(table: Table[Any]) -> str:
    """The table of the same kind and student in the round before."""
    return f"{table.name.rpartition('/')[0]}/round-{(round_of(table) or 0) - 1:03d}"


def round_of(table: Table[Any]) -> int | None:
    """The round that a table's folder names."""
    named = str(table.folder.name)
    return int(named.removeprefix("round-")) if named.startswith("round-") else None


def verify(root: Location) -> dict[str, int]:
    """Check all of a dataset: files, hashes, schemas, every value, and that the tables are of each other.

    Returns the rows of each table.

    Raises:
        DataError: a table is not complete, or a value in it is wrong; names file, row and column.
        MismatchError: a file is not the one that was committed, or a part belongs to something else.
    """
    dataset = Dataset.open(root)
    found = {table.name: table for table in tables(dataset)}
    made = {name: table.require_provenance() for name, table in found.items() if name != "prompts"}
    for table in found.values():
        check_files(table)
    for name in made:
        check_provenance(found[name], made, dataset)
    seen, digest = Seen(), PromptDigest()
    with progress("verify", dataset.plan.rows * len(found), "row") as shown, ThreadPoolExecutor() as threads:
        for shard in range(dataset.plan.count):
            rows: dict[str, pa.Table] = {}
            shards = threads.map(read, found.values(), repeat(shard))
            for table, here in zip(found.values(), shards, strict=True):
                rows[table.name] = here
                _check_values(table, shard, rows, made, dataset)
                _check_facts(table, shard, here)
                if table.name == "prompts":
                    _check_unique(here["id"], dataset, shard, seen)
                    digest.update(here)
                shown.advance(len(here))
    _check_digest(digest, dataset)
    return dict.fromkeys(found, dataset.plan.rows)


# --- files ----------------------------------------------------------------------------------------------------------


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
        y_s = made.get(beside(table, "responses/student"))
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
    own = made.get(beside(table, "prompts/student"))
    if table.name == TEACHER or own is None or dataset.shares_tokenizer(made[table.name]["tokenizer_fingerprint"]):
        return dataset.prompt_set.tokenizer_fingerprint
    return str(own["tokenizer_fingerprint"])


# --- values ---------------------------------------------------------------------------------------------------------


def read(table: Table[Any], shard: int) -> pa.Table:
    """A shard whose text is UTF-8 and whose lists lie within its data."""
    rows = table.read_arrow(shard)
    try:
        rows.validate(full=True)
    except pa.ArrowInvalid as error:
        raise DataError(f"{table.path(shard)}: {' '.join(str(error).split())}") from error
    return rows


def _check_values(
    table: Table[Any], shard: int, rows: dict[str, pa.Table], made: dict[str, dict[str, Any]], dataset: Dataset
) -> None:
    """Raise DataError for a value that cannot be, or that is not what the tables before this one say."""
    here, path, round = rows[table.name], table.path(shard), round_of(table)
    same = pc.equal(here["id"], rows["prompts"]["id"]).to_numpy()
    expect(same, path, "id", "is not the id of the prompt in this row")
    vocab_size = made[table.name]["vocab_size"] if table.name in made else dataset.prompt_set.vocab_size
    by_text = made.get(table.name, {}).get("scored") == "text"
    whole = table.name == TEACHER or made.get(table.name, {}).get("share") == 1  # nothing is of the round before
    check_rows(here, path, vocab_size, (round or 0 if whole else 0, round or 0), by_text)
    if table.record is Prompt and table.name != "prompts":
        for column in ("messages", "references"):
            check_same(here, column, rows["prompts"][column], path, "the prompt in this row")
    if table.record is Response:
        check_ends(here, path, made[table.name]["eos_token_ids"])
        if table.name != TEACHER and "model" in made[table.name]:
            expect(pc.list_value_length(here["logps"]).to_numpy() > 0, path, "logps", "is empty")
    if table.record is TopK:
        if (pairs := rows.get(beside(table, "pairs"))) is None:
            raise DataError(f"{path}: belongs to pairs of round {round} that are not there")
        check_top_k(here, pairs, path, vocab_size, made[table.name]["top_k"])
    if table.record is PreferencePair:
        seen, y_s = beside(table, "prompts/student") if by_text else "prompts", beside(table, "responses/student")
        if seen not in rows:
            raise DataError(f"{path}: belongs to prompts in the tokens of its student, {seen}, that are not there")
        for column in ("prompt", "prompt_ids"):
            check_same(here, column, rows[seen][column], path, "the prompt in this row")
        first = pc.list_slice(rows["prompts"]["references"], 0, 1, return_fixed_size_list=True).combine_chunks().values
        check_same(here, "reference", pa.chunked_array([first]), path, "the prompt in this row")
        same = {
            "chosen": (TEACHER, "response"),
            "chosen_ids": (TEACHER, "response_ids"),  # in whose tokens where these are not the student's
            "chosen_finish_reason": (TEACHER, "finish_reason"),
            "rejected": (y_s, "response"),
            "rejected_ids": (y_s, "response_ids"),
            "rejected_finish_reason": (y_s, "finish_reason"),
            "behavior_rejected_logps": (y_s, "logps"),
            "round": (y_s, "round"),
        }
        for column, (of, there) in same.items():
            if of in rows and not (by_text and column == "chosen_ids"):
                check_same(here, column, rows[of][there], path, of)
    if round:
        _check_kept(table, shard, rows, made)


def _check_kept(table: Table[Any], shard: int, rows: dict[str, pa.Table], made: dict[str, dict[str, Any]]) -> None:
    """Raise DataError where a row that was kept, or what the teacher says of y_t, is not that of the round before."""
    here, there, of = rows[table.name], rows.get(before(table)), before(table)
    if there is None or (table.record is not Response and made[table.name].get("reused_from") is None):
        return
    rounds = rows[beside(table, "pairs")]["round"] if table.record is TopK else here["round"]
    numbers = np.arange(len(here))
    kept = rounds.to_numpy() < round_of(table)
    expected = pa.concat_tables([here, there]).take(np.where(kept, numbers + len(here), numbers))
    for column in here.column_names:
        y_t = column in ("chosen_ids", "teacher_chosen_logps") or column.startswith("chosen_top")
        check_same(here, column, (there if y_t else expected)[column], table.path(shard), of)


def _check_facts(table: Table[Any], shard: int, rows: pa.Table) -> None:
    said, there = flat({"facts": (table.entry(shard) or {}).get("facts")}), flat({"facts": Facts.of(rows).model_dump()})
    for key in {**there, **said}:
        if said.get(key) != there.get(key):
            raise MismatchError(f"{table.entry_path(shard)}: {key} is {said.get(key)!r}, there is {there.get(key)!r}")


def _check_unique(ids: pa.ChunkedArray, dataset: Dataset, shard: int, seen: Seen) -> None:
    first, keys = shard * dataset.plan.shard_size, ids.to_pylist()
    if twice := seen.add(keys, range(first, first + len(keys))):
        row, before = twice
        there = dataset.prompts.path(int(before) // dataset.plan.shard_size)
        raise DataError(
            f"{dataset.prompts.path(shard)}: row {row}: column 'id': '{keys[row]}' stands in {there.name}, row "
            f"{int(before) % dataset.plan.shard_size}, too"
        )


def _check_digest(digest: PromptDigest, dataset: Dataset) -> None:
    """Raise MismatchError unless dataset.json says of the prompts what they are."""
    said, path = dataset.prompt_set, dataset.root / "dataset.json"
    if digest.id(said.template, said.template_fingerprint, said.tokenizer_fingerprint) != said.id:
        raise MismatchError(
            f"{path}: prompt_set.id is not that of these prompts, their tokenizer and their template; one of the four "
            f"was changed"
        )
    if digest.longest != (said.longest_prompt, said.longest_prompt_tokens):
        raise MismatchError(
            f"{path}: the longest prompt is '{digest.longest[0]}' of {digest.longest[1]} tokens, not "
            f"'{said.longest_prompt}' of {said.longest_prompt_tokens}"
        )
