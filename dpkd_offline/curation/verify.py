"""`verify`: hashes, values, and that the tables of a dataset belong together."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpkd_offline.common.console import progress
from dpkd_offline.common.errors import DataError, MismatchError
from dpkd_offline.common.locations import Location
from dpkd_offline.dataset.catalog import TEACHER, begun_tables, previous_round, related_table, round_of
from dpkd_offline.dataset.columns import ShardStats
from dpkd_offline.dataset.dataset import Dataset, PromptDigest
from dpkd_offline.dataset.integrity import check_files, check_provenance
from dpkd_offline.dataset.provenance import flat
from dpkd_offline.dataset.row_checks import check_ends, check_rows, check_same, check_top_k, expect
from dpkd_offline.dataset.schema import PreferencePair, Prompt, Response, TopK
from dpkd_offline.dataset.scratch import KeyIndex
from dpkd_offline.dataset.table import Table


def verify(root: Location) -> dict[str, int]:
    """Check all of a dataset: files, hashes, schemas, every value, and that the tables are of each other.

    Returns the rows of each table.

    Raises:
        DataError: a table is not complete, or a value in it is wrong; names file, row and column.
        MismatchError: a file is not the one that was committed, or a part belongs to something else.
    """
    dataset = Dataset.open(root)
    found = {table.name: table for table in begun_tables(dataset)}
    made = {name: table.require_provenance() for name, table in found.items() if name != "prompts"}
    for table in found.values():
        check_files(table)
    for name in made:
        check_provenance(found[name], made, dataset)
    seen, digest = KeyIndex(), PromptDigest()
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
        if (pairs := rows.get(related_table(table, "pairs"))) is None:
            raise DataError(f"{path}: belongs to pairs of round {round} that are not there")
        check_top_k(here, pairs, path, vocab_size, made[table.name]["top_k"])
    if table.record is PreferencePair:
        seen, y_s = (
            related_table(table, "prompts/student") if by_text else "prompts",
            related_table(table, "responses/student"),
        )
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
    here, there, of = rows[table.name], rows.get(previous_round(table)), previous_round(table)
    if there is None or (table.record is not Response and made[table.name].get("reused_from") is None):
        return
    rounds = rows[related_table(table, "pairs")]["round"] if table.record is TopK else here["round"]
    numbers = np.arange(len(here))
    kept = rounds.to_numpy() < round_of(table)
    expected = pa.concat_tables([here, there]).take(np.where(kept, numbers + len(here), numbers))
    for column in here.column_names:
        y_t = column in ("chosen_ids", "teacher_chosen_logps") or column.startswith("chosen_top")
        check_same(here, column, (there if y_t else expected)[column], table.path(shard), of)


def _check_facts(table: Table[Any], shard: int, rows: pa.Table) -> None:
    said, there = (
        flat({"facts": (table.entry(shard) or {}).get("facts")}),
        flat({"facts": ShardStats.of(rows).model_dump()}),
    )
    for key in {**there, **said}:
        if said.get(key) != there.get(key):
            raise MismatchError(f"{table.entry_path(shard)}: {key} is {said.get(key)!r}, there is {there.get(key)!r}")


def _check_unique(ids: pa.ChunkedArray, dataset: Dataset, shard: int, seen: KeyIndex) -> None:
    first, keys = shard * dataset.plan.shard_size, ids.to_pylist()
    if twice := seen.add(keys, range(first, first + len(keys))):
        row, first_row = twice
        there = dataset.prompts.path(int(first_row) // dataset.plan.shard_size)
        raise DataError(
            f"{dataset.prompts.path(shard)}: row {row}: column 'id': '{keys[row]}' stands in {there.name}, row "
            f"{int(first_row) % dataset.plan.shard_size}, too"
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
