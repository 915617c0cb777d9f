"""What is said of a column once: everything else follows from it, and the files know nothing of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpkd_offline.common.errors import DataError
from dpkd_offline.curation.export_pairs import TEXT_AND_IDS
from dpkd_offline.dataset.catalog import begun_tables, previous_round, related_table
from dpkd_offline.dataset.columns import ShardStats
from dpkd_offline.dataset.dataset import Dataset, PromptDigest, PromptSet
from dpkd_offline.dataset.layout import (
    KINDS,
    PAIRS,
    STUDENT_PROMPTS,
    STUDENT_RESPONSES,
    TEACHER_RESPONSES,
    TOP_K,
    TableKind,
)
from dpkd_offline.dataset.row_checks import check_rows
from dpkd_offline.dataset.schema import (
    COLUMNS,
    ID,
    LOGPS,
    TOKEN_IDS,
    Column,
    Kind,
    PreferencePair,
    Record,
    Response,
    _Described,
    column_of,
    columns_of,
    from_table,
    own_columns,
    schema_with,
    to_table,
)
from dpkd_offline.dataset.table import ShardPlan, Table
from dpkd_offline.training.examples import PAIR_COLUMNS, TOP_COLUMNS

GOLDEN = Path(__file__).parents[1] / "golden" / "v1"


def test_a_column_means_the_same_in_every_table() -> None:
    for record in get_args(Record):
        assert record.columns == {name: COLUMNS[name] for name in record.columns}
        assert record.schema.names == [name for name, column in record.columns.items() if not column.optional]


def test_the_files_hold_the_arrow_schema_and_nothing_of_kinds_and_sides() -> None:
    for table in begun_tables(Dataset.open(GOLDEN)):
        stored = pq.read_schema(table.path(0))
        assert stored.metadata is None and all(field.metadata is None for field in table.record.schema)
        assert table.record.schema.equals(stored, check_metadata=True)


def test_what_is_read_of_pairs_follows() -> None:
    assert PAIR_COLUMNS == [
        *("id", "prompt_ids", "chosen_ids", "chosen_finish_reason", "rejected_ids", "rejected_finish_reason"),
        *("teacher_chosen_logps", "teacher_rejected_logps", "behavior_rejected_logps"),
    ]
    assert TOP_COLUMNS == [
        "id",
        *(f"{side}_top_{n}" for side in ("chosen", "rejected") for n in ("ids", "logps", "mass")),
    ]
    assert TEXT_AND_IDS == ["id", "prompt", "chosen", "rejected", "prompt_ids", "chosen_ids", "rejected_ids"]
    assert columns_of(PreferencePair.schema.names, Kind.EXACT, sides=("chosen",)) == ["chosen_exact"]
    assert column_of(Response, Kind.LOGPS, "response", "behavior") == "logps"
    assert column_of(Response, Kind.LOGPS, "response", "teacher") is None


def test_checks_and_sums_go_by_the_kind_and_not_by_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COLUMNS, "words", Column(Kind.TOKEN_IDS, TOKEN_IDS, "response"))
    monkeypatch.setitem(COLUMNS, "surprise", Column(Kind.LOGPS, LOGPS, "chosen", "teacher"))
    monkeypatch.setitem(COLUMNS, "why", Column(Kind.FINISH_REASON, pa.string(), "response"))
    rows = pa.table(
        {
            "words": [[1, 2], [3]],
            "chosen_ids": [[1], [2, 3]],
            "surprise": [[-1.0], [-1.0, -2.0]],
            "why": ["stop", "length"],
        }
    )
    check_rows(rows, Path("file"), vocab_size=4)
    stats = ShardStats.of(rows)
    assert (stats.tokens, stats.truncated) == ({"words": 3, "chosen_ids": 3}, {"why": 1})
    assert stats.row_means == {"surprise": -2.5}
    for column, values, message in (
        ("words", [[1, 2], [4]], "row 1: column 'words' holds a token id that a vocabulary of 4 has not"),
        ("surprise", [[-1.0], [-1.0]], "row 1: column 'surprise' has not one log-prob per token of chosen_ids"),
        ("why", ["stop", "tired"], "row 1: column 'why' is neither 'stop' nor 'length'"),
    ):
        with pytest.raises(DataError) as error:
            check_rows(rows.set_column(rows.column_names.index(column), column, pa.array(values)), Path("file"), 4)
        assert message in str(error.value)


def test_where_tables_lie() -> None:
    assert [kind.path(None, 2) for kind in KINDS] == [
        *("prompts", "prompts/teacher", "prompts/student", "responses/teacher", "responses/student/round-002"),
        *("pairs/round-002", "top_k/round-002"),
    ]
    assert [kind.path("small", 0) for kind in KINDS] == [
        *("prompts", "prompts/teacher", "students/small/prompts/student", "responses/teacher"),
        *(f"students/small/{name}/round-000" for name in ("responses/student", "pairs", "top_k")),
    ]


def test_tables_belong_together_by_student_and_round(tmp_path: Path) -> None:
    golden = Dataset.open(GOLDEN)
    first, further = golden.top_k(1), Dataset.open(GOLDEN, "bytes").pairs(1)
    assert related_table(first, PAIRS) == "pairs/round-001"
    assert related_table(first, STUDENT_PROMPTS) == "prompts/student"
    assert related_table(further, STUDENT_RESPONSES) == "students/bytes/responses/student/round-001"
    assert related_table(further, STUDENT_PROMPTS) == "students/bytes/prompts/student"
    assert related_table(further, TEACHER_RESPONSES) == "responses/teacher"
    assert previous_round(further) == "students/bytes/pairs/round-000"
    assert (first.kind, first.round, first.student) == (TOP_K, 1, None)
    assert [table.name for table in begun_tables(golden)] == [
        *("prompts", "responses/teacher", "responses/student/round-000", "responses/student/round-001"),
        *("pairs/round-000", "pairs/round-001", "top_k/round-000", "students/bytes/prompts/student"),
        *("students/bytes/responses/student/round-000", "students/bytes/pairs/round-000"),
    ]


def test_a_table_has_columns_of_its_own_where_its_provenance_says_so(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Row(_Described):
        id: Annotated[str, ID]
        numbers: Annotated[list[int], Column(Kind.TOP_IDS, TOKEN_IDS, "chosen", alternatives=(pa.list_(pa.uint16()),))]
        note: Annotated[str | None, Column(Kind.TEXT, pa.string(), "chosen", nullable=True, optional=True)] = None

    record: Any = Row
    kind: TableKind[Any] = replace(PAIRS, record=record, rounds=False)
    columns = {"numbers": "list<item: uint16>", "note": "string"}
    plain, own = (Table(tmp_path, kind, ShardPlan(2, 2), columns=of) for of in ({}, columns))
    rows: list[Any] = [Row("a", [1, 65535], "why"), Row("b", [2], None)]
    assert plain.schema == Row.schema and plain.schema.names == ["id", "numbers"]
    assert own_columns(own.schema, record) == columns and own.schema.names == ["id", "numbers", "note"]
    assert from_table(to_table(rows, own.schema), record) == rows
    assert from_table(to_table(rows, plain.schema), record) == [replace(row, note=None) for row in rows]
    with pytest.raises(DataError, match=r"dataset.json: columns.note is 'int32', which no table"):
        _ = Table(tmp_path, kind, ShardPlan(2, 2), columns={"note": "int32"}).schema
    for wrong in ({"note": "int32"}, {"id": "string"}, {"numbers": "list<item: uint8>"}, {"other": "string"}):
        with pytest.raises(ValueError, match="which no table of this kind has"):
            schema_with(record, wrong)


def test_each_sample_has_tables_of_its_own_and_the_first_has_those_without_a_number(tmp_path: Path) -> None:
    dataset = Dataset(tmp_path, PROMPT_SET, ShardPlan(2, 2), "small", 12)
    assert dataset.responses("teacher", 0).name == "samples/012/responses/teacher"
    assert dataset.responses("student", 3).name == "samples/012/students/small/responses/student/round-003"
    assert dataset.prompts.name == "prompts" and dataset.student_prompts.name == "students/small/prompts/student"
    pairs = dataset.pairs(3)
    assert related_table(pairs, TOP_K) == "samples/012/students/small/top_k/round-003"
    assert previous_round(pairs) == "samples/012/students/small/pairs/round-002"
    assert dataset.of_sample(0).pairs(0).name == "students/small/pairs/round-000"
    assert pairs.at(tmp_path / "other").name == pairs.name
    for name in ("002", "012", "000", "x"):
        (tmp_path / "samples" / name).mkdir(parents=True)
    assert [of.sample for of in dataset.samples()] == [0, 2, 12]
    assert [of.student for of in dataset.samples()] == ["small"] * 3


PROMPT_SET = PromptSet("id", "s", "none", "f", "t", "u", 9, "a", 1, {})


def test_nulls_have_a_part_in_what_identifies_prompts_wherever_they_are_cut() -> None:
    needed = [pa.field("id", pa.string(), nullable=False), pa.field("prompt_ids", TOKEN_IDS, nullable=False)]
    schema = pa.schema([*needed, pa.field("note", pa.string())])

    def digest(*cuts: list[str | None]) -> str:
        digest = PromptDigest()
        for cut in cuts:
            digest.update(pa.table({"id": ["a"] * len(cut), "prompt_ids": [[1]] * len(cut), "note": cut}, schema))
        return digest.id("", "", "")

    assert digest(["a", None, ""]) == digest(["a"], [None, ""]) != digest(["a", "", None])
