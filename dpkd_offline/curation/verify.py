"""`verify`: checks hashes and values, and that the tables of a dataset belong together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpkd_offline.common.console import progress
from dpkd_offline.common.errors import DataError, MismatchError
from dpkd_offline.common.locations import Location
from dpkd_offline.dataset.catalog import begun_tables, previous_round, related_table, samples_of_pairs
from dpkd_offline.dataset.columns import ShardStats
from dpkd_offline.dataset.dataset import Dataset, PromptDigest
from dpkd_offline.dataset.integrity import check_files, check_provenance
from dpkd_offline.dataset.layout import (
    PAIRS,
    PROMPTS,
    STUDENT_PROMPTS,
    STUDENT_RESPONSES,
    TEACHER_PROMPTS,
    TEACHER_RESPONSES,
)
from dpkd_offline.dataset.provenance import fingerprint_of_template, flat
from dpkd_offline.dataset.row_checks import check_ends, check_rows, check_same, check_top_k, expect
from dpkd_offline.dataset.schema import SIDES, PreferencePair, Response, TopK, column_of
from dpkd_offline.dataset.scratch import KeyIndex
from dpkd_offline.dataset.table import Table

OF_PROMPT = "the prompt in this row"


@dataclass(frozen=True)
class VerifyResult:
    """A dataset that is whole."""

    path: Location
    rows: dict[str, int]  # of each table, by name


def verify(root: Location) -> VerifyResult:
    """Check all of a dataset: files, hashes, schemas, every value, and that the tables are of each other.

    Raises:
        DataError: a table is not complete, or a value in it is wrong; names file, row and column.
        MismatchError: a file is not the one that was committed, or a part belongs to something else.
    """
    dataset = Dataset.open(root)
    tables = {table.name: table for table in begun_tables(dataset)}
    provenances = {name: table.require_provenance() for name, table in tables.items() if table.kind is not PROMPTS}
    _check_chat_template(dataset.root / "dataset.json", asdict(dataset.prompt_set))
    for name, provenance in provenances.items():
        _check_chat_template(tables[name].provenance_path, provenance)
    _check_teacher_prompts(dataset, tables)
    for table in tables.values():
        check_files(table)
    for name in provenances:
        check_provenance(tables[name], provenances, dataset)
    ids, digest = KeyIndex(), PromptDigest()
    with progress("verify", dataset.plan.rows * len(tables), "row") as shown, ThreadPoolExecutor() as threads:
        for shard in range(dataset.plan.count):
            checks = _ShardChecks(dataset, shard, provenances)
            for table, rows in zip(tables.values(), threads.map(read, tables.values(), repeat(shard)), strict=True):
                checks.check(table, rows)
                _check_stats(table, shard, rows)
                if table.kind is PROMPTS:
                    _check_unique(rows["id"], dataset, shard, ids)
                shown.advance(len(rows))
            digest.update(*checks.prompts())
    _check_digest(digest, dataset)
    return VerifyResult(root, dict.fromkeys(tables, dataset.plan.rows))


def _check_teacher_prompts(dataset: Dataset, tables: Collection[str]) -> None:
    """Raise MismatchError unless there are prompts of the teacher's own exactly where dataset.json says so."""
    stated, there = dataset.prompt_set.teacher_prompts is not None, TEACHER_PROMPTS.path() in tables
    if stated != there:
        path, what = dataset.root / TEACHER_PROMPTS.path(), "is not there" if stated else "is not known to dataset.json"
        raise MismatchError(f"{path}: {what}: dataset.json says whether the teacher sees prompts of its own")


def read(table: Table[Any], shard: int) -> pa.Table:
    """A shard whose text is UTF-8 and whose lists lie within its data."""
    rows = table.read_arrow(shard)
    try:
        rows.validate(full=True)
    except pa.ArrowInvalid as error:
        raise DataError(f"{table.path(shard)}: {' '.join(str(error).split())}") from error
    return rows


def _check_chat_template(path: Location, record: Mapping[str, Any]) -> None:
    """Raise MismatchError where the text of a template is kept, and is not that of its fingerprint."""
    text, arguments = record.get("chat_template"), record.get("template_args") or {}
    if text is not None and record.get("template_fingerprint") != fingerprint_of_template("chat", text, arguments):
        raise MismatchError(f"{path}: template_fingerprint is not that of chat_template and template_args")


class _ShardChecks:
    """The same shard of table after table: whether its values can be, and are those of the tables before it."""

    def __init__(self, dataset: Dataset, shard: int, provenances: Mapping[str, Mapping[str, Any]]) -> None:
        self._dataset, self._shard, self._provenances = dataset, shard, provenances
        self._rows: dict[str, pa.Table] = {}  # of the tables so far

    def check(self, table: Table[Any], rows: pa.Table) -> None:
        """Raise DataError for a value that cannot be, or that is not what the tables before this one say."""
        self._rows[table.name] = rows
        path, last = table.path(self._shard), table.round or 0
        provenance = self._provenances.get(table.name, {})
        prompts = self._rows[PROMPTS.path()]
        same = pc.equal(rows["id"], prompts["id"]).to_numpy()
        expect(same, path, "id", "is not the id of the prompt in this row")
        new = table.kind is TEACHER_RESPONSES or provenance.get("share") == 1  # nothing is of the round before
        vocab_size = provenance.get("vocab_size", self._dataset.prompt_set.vocab_size)
        check_rows(rows, path, vocab_size, (last if new else 0, last), provenance.get("scored") == "text")
        if table.kind is TEACHER_PROMPTS:
            check_same(rows, "references", prompts["references"], path, OF_PROMPT)
            if (system := provenance.get("system")) is not None:
                turns = ({turn["role"]: turn["content"] for turn in turns} for turns in rows["messages"].to_pylist())
                begins = np.asarray([by_role.get("system", "").startswith(system) for by_role in turns])
                expect(begins, path, "messages", "does not begin with the system turn of _table.json")
        elif table.kind is STUDENT_PROMPTS:
            own = [name for name in ("messages", "conversation") if name in prompts.column_names]
            for column in own:
                check_same(rows, column, prompts[column], path, OF_PROMPT)
            self._check_references(rows, prompts, path)
        elif table.record is Response:
            check_ends(rows, path, provenance["eos_token_ids"])
            if table.kind is STUDENT_RESPONSES and "model" in provenance:
                expect(pc.list_value_length(rows["logps"]).to_numpy() > 0, path, "logps", "is empty")
        elif table.record is TopK:
            if (pairs := self._rows.get(related_table(table, PAIRS))) is None:
                raise DataError(f"{path}: belongs to pairs of round {last} that are not there")
            check_top_k(rows, pairs, path, vocab_size, provenance["top_k"], provenance.get("top_mass"))
        elif table.record is PreferencePair:
            self._check_pairs(table, by_text=provenance["scored"] == "text")
        if runs := provenance.get("teachers"):
            numbers = self._shard * self._dataset.plan.shard_size + np.arange(len(rows))
            of_run = np.searchsorted(np.cumsum([run["rows"] for run in runs]), numbers, side="right")
            right = np.array([run["revision"] for run in runs])[of_run] == np.array(rows["teacher"].to_pylist())
            expect(right, path, "teacher", "is not the teacher that _table.json names for this row")
        if last or provenance.get("reused_student") is not None:
            self._check_kept(table)
        if table.sample and table.record in (PreferencePair, TopK):
            self._check_first(table)

    def prompts(self) -> tuple[pa.Table, pa.Table | None]:
        """The prompts, and those of the teacher, if it sees others."""
        return self._rows[PROMPTS.path()], self._rows.get(TEACHER_PROMPTS.path())

    def _check_pairs(self, table: Table[PreferencePair], by_text: bool) -> None:
        """Raise DataError where a pair is not of its prompt, or not of the responses that are there."""
        rows, path = self._rows[table.name], table.path(self._shard)
        prompts = related_table(table, STUDENT_PROMPTS)
        if not by_text and "template_fingerprint" not in self._provenances[table.name]:
            prompts = PROMPTS.path()
        if prompts not in self._rows:
            raise DataError(f"{path}: belongs to prompts of its student's own, {prompts}, that are not there")
        for column in ("prompt", "prompt_ids"):
            check_same(rows, column, self._rows[prompts][column], path, OF_PROMPT)
        references = self._rows[prompts]["references"]
        first = pc.list_slice(references, 0, 1, return_fixed_size_list=True).combine_chunks().values
        check_same(rows, "reference", pa.chunked_array([first]), path, OF_PROMPT)
        of_y_t, of_y_s = samples_of_pairs(self._provenances[table.name])
        y_t = TEACHER_RESPONSES.path(sample=of_y_t)
        y_s = STUDENT_RESPONSES.path(table.student, table.round, of_y_s)
        for side, of in (("chosen", y_t), ("rejected", y_s)):
            for name, held in PreferencePair.columns.items():
                original = column_of(Response, held.kind, "response", held.model)
                translated = by_text and name == "chosen_ids"  # y_t in the tokens of the student, which are not its own
                if of in self._rows and held.side == side and original is not None and not translated:
                    check_same(rows, name, self._rows[of][original], path, of)
        if y_s in self._rows:
            check_same(rows, "round", self._rows[y_s]["round"], path, y_s)

    def _check_references(self, rows: pa.Table, prompts: pa.Table, path: Location) -> None:
        """Raise DataError where references are not the prompt's; what calls tools is as each template has it."""
        if "conversation" in prompts.column_names:
            plain = prompts["conversation"].is_null()
            rows, prompts = rows.filter(plain), prompts.filter(plain)
        check_same(rows, "references", prompts["references"], path, OF_PROMPT)

    def _check_kept(self, table: Table[Any]) -> None:
        """Raise DataError where a kept row, or what the teacher says of y_t, is not that of the round before, or of the
        other student that it was taken over from."""
        other = self._provenances[table.name].get("reused_student")
        of = previous_round(table) if other is None else table.kind.path(other or None, 0, table.sample)
        rows = self._rows[table.name]
        before = self._rows.get(of)
        reused = table.record is Response or self._provenances[table.name].get("reused_from") is not None
        if before is None or not reused:
            return
        rounds = self._rows[related_table(table, PAIRS)]["round"] if table.record is TopK else rows["round"]
        numbers = np.arange(len(rows))
        kept = rounds.to_numpy() < (table.round or 0)
        expected = pa.concat_tables([rows, before]).take(np.where(kept, numbers + len(rows), numbers))
        own_y_t = samples_of_pairs(self._provenances[table.name])[0] == table.sample  # else see _check_first
        for name, column in ((name, table.record.columns[name]) for name in rows.column_names):
            of_y_t = column.side == "chosen" and column.per_token and own_y_t
            check_same(rows, name, (before if of_y_t else expected)[name], table.path(self._shard), of)

    def _check_first(self, table: Table[Any]) -> None:
        """Raise DataError where a sample has y_t or y_s of the first one, and other numbers of the teacher."""
        of = table.kind.path(table.student, table.round)
        if of not in self._rows:
            return
        samples = dict(zip(SIDES, samples_of_pairs(self._provenances[table.name]), strict=True))
        for name, column in table.record.columns.items():
            if column.side in SIDES and not samples[column.side]:
                check_same(self._rows[table.name], name, self._rows[of][name], table.path(self._shard), of)


def _check_stats(table: Table[Any], shard: int, rows: pa.Table) -> None:
    """Raise MismatchError unless a shard's manifest entry says of its rows what they are."""
    entry = table.entry(shard)
    assert entry is not None
    stated, actual = (flat({"facts": stats.model_dump()}) for stats in (entry.facts, ShardStats.of(rows)))
    for key in {**actual, **stated}:
        if stated.get(key) != actual.get(key):
            raise MismatchError(
                f"{table.entry_path(shard)}: {key} is {stated.get(key)!r}, there is {actual.get(key)!r}"
            )


def _check_unique(ids: pa.ChunkedArray, dataset: Dataset, shard: int, index: KeyIndex) -> None:
    first, keys = shard * dataset.plan.shard_size, ids.to_pylist()
    if twice := index.add(keys, range(first, first + len(keys))):
        row, first_row = twice
        path = dataset.prompts.path(int(first_row) // dataset.plan.shard_size)
        raise DataError(
            f"{dataset.prompts.path(shard)}: row {row}: column 'id': '{keys[row]}' stands in {path.name}, row "
            f"{int(first_row) % dataset.plan.shard_size}, too"
        )


def _check_digest(digest: PromptDigest, dataset: Dataset) -> None:
    """Raise MismatchError unless dataset.json says of the prompts what they are."""
    stated, path = dataset.prompt_set, dataset.root / "dataset.json"
    identity = stated.template, stated.template_fingerprint, stated.tokenizer_fingerprint
    if digest.id(*identity) != stated.id:
        raise MismatchError(
            f"{path}: prompt_set.id is not that of these prompts, their tokenizer and their template; one of the four "
            f"was changed"
        )
    if digest.longest != (stated.longest_prompt, stated.longest_prompt_tokens):
        raise MismatchError(
            f"{path}: the longest prompt is '{digest.longest[0]}' of {digest.longest[1]} tokens, not "
            f"'{stated.longest_prompt}' of {stated.longest_prompt_tokens}"
        )
    if (of_teacher := digest.teacher_prompts(*identity)) != stated.teacher_prompts:
        raise MismatchError(
            f"{path}: prompt_set.teacher_prompts is {stated.teacher_prompts}, it should be {of_teacher}"
        )
