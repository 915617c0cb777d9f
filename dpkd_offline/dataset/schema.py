"""The rows of a dataset, each beside its Arrow schema.

Token ids are the truth of every row; text is there for people. Log-probs are natural logarithms (nats), one
float32 per response token. A new column or a changed meaning raises SCHEMA_VERSION.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

SCHEMA_VERSION = 1
FinishReason = Literal["stop", "length"]  # "stop": the response ends with an EOS that was sampled
TOKEN_IDS = pa.list_(pa.field("element", pa.int32(), nullable=False))
LOGPS = pa.list_(pa.field("element", pa.float32(), nullable=False))
STRINGS = pa.list_(pa.field("element", pa.string(), nullable=False))
MESSAGES = pa.list_(
    pa.field(
        "element",
        pa.struct([pa.field("role", pa.string(), nullable=False), pa.field("content", pa.string(), nullable=False)]),
        nullable=False,
    )
)


def _lists_of(type_: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", type_, nullable=False))


def _required(**columns: pa.DataType) -> list[pa.Field]:
    return [pa.field(name, type_, nullable=False) for name, type_ in columns.items()]


@dataclass(frozen=True)
class Prompt:
    """One prompt x, rendered and tokenised once, before anything is sampled."""

    id: str
    messages: list[dict[str, str]]  # empty where the source gave raw text
    prompt: str  # the text after the template
    prompt_ids: list[int]
    references: list[str]  # good answers, the first is the one to train on; may be empty

    schema = pa.schema(
        _required(id=pa.string(), messages=MESSAGES, prompt=pa.string(), prompt_ids=TOKEN_IDS, references=STRINGS)
    )


@dataclass(frozen=True)
class Response:
    """One sampled response y; of a student with its own log-probs at temperature 1, which drift is measured by."""

    id: str
    response: str
    response_ids: list[int]  # with the EOS, if it was sampled
    finish_reason: FinishReason
    logps: list[float]  # nats, one per token of response_ids; none of a teacher, which score-teacher scores by prefill
    round: int  # in which it was sampled: 0 of a teacher; a later round may keep some of the round before

    schema = pa.schema(
        _required(
            id=pa.string(),
            response=pa.string(),
            response_ids=TOKEN_IDS,
            finish_reason=pa.string(),
            logps=LOGPS,
            round=pa.int32(),
        )
    )


@dataclass(frozen=True)
class PreferencePair:
    """All that training needs of one prompt: chosen is y_t, rejected is y_s, with the teacher's log-probs of both.

    Token ids are the student's. Where the teacher has another tokenizer, it scored the same text in its own tokens:
    then its log-probs are as many as those, and |y| is known in both, and in bytes by the text.
    """

    id: str
    prompt: str
    prompt_ids: list[int]
    reference: str | None
    chosen: str
    chosen_ids: list[int]
    chosen_finish_reason: FinishReason
    rejected: str
    rejected_ids: list[int]
    rejected_finish_reason: FinishReason
    teacher_chosen_logps: list[float]  # log p(y_t | x), per token of the teacher
    teacher_rejected_logps: list[float]  # log p(y_s | x), per token of the teacher
    chosen_exact: bool  # the tokens scored are those sampled, or both models' tokens give the text and it gives them
    rejected_exact: bool
    behavior_rejected_logps: list[float]  # log-probs of y_s under the student that sampled it
    round: int  # in which y_s was sampled

    schema = pa.schema(
        [
            *_required(id=pa.string(), prompt=pa.string(), prompt_ids=TOKEN_IDS),
            pa.field("reference", pa.string()),
            *_required(
                chosen=pa.string(),
                chosen_ids=TOKEN_IDS,
                chosen_finish_reason=pa.string(),
                rejected=pa.string(),
                rejected_ids=TOKEN_IDS,
                rejected_finish_reason=pa.string(),
                teacher_chosen_logps=LOGPS,
                teacher_rejected_logps=LOGPS,
                chosen_exact=pa.bool_(),
                rejected_exact=pa.bool_(),
                behavior_rejected_logps=LOGPS,
                round=pa.int32(),
            ),
        ]
    )


@dataclass(frozen=True)
class TopK:
    """The teacher's k likeliest tokens at each of the T positions of both responses of a pair, likeliest first."""

    id: str
    chosen_top_ids: list[list[int]]  # [T][k]
    chosen_top_logps: list[list[float]]  # [T][k], nats
    chosen_top_mass: list[float]  # [T], the probability that they cover
    rejected_top_ids: list[list[int]]
    rejected_top_logps: list[list[float]]
    rejected_top_mass: list[float]

    schema = pa.schema(
        _required(
            id=pa.string(),
            chosen_top_ids=_lists_of(TOKEN_IDS),
            chosen_top_logps=_lists_of(LOGPS),
            chosen_top_mass=LOGPS,
            rejected_top_ids=_lists_of(TOKEN_IDS),
            rejected_top_logps=_lists_of(LOGPS),
            rejected_top_mass=LOGPS,
        )
    )


Record = Prompt | Response | PreferencePair | TopK
R = TypeVar("R", Prompt, Response, PreferencePair, TopK)


def to_table(rows: Sequence[Record], schema: pa.Schema) -> pa.Table:
    """Rows of one record type as an Arrow table of exactly that schema."""
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in schema.names}
    return pa.table([pa.array(columns[f.name], f.type) for f in schema], schema=schema)


def from_table(table: pa.Table, record: type[R]) -> list[R]:
    """The inverse of `to_table`."""
    names = [f.name for f in fields(record)]
    return [record(**row) for row in table.select(names).to_pylist()]


def schema_fault(table: pa.Table, schema: pa.Schema) -> str | None:
    """Where the columns of a table that was read are not those of a record, for people; None if they are."""
    for field in schema:
        index = table.schema.get_field_index(field.name)
        if index < 0:
            times = table.column_names.count(field.name)
            return f"column '{field.name}' " + ("stands twice" if times else "is missing")
        found = table.schema.field(index)
        if not field.nullable and (row := _first_null(table.column(index))) is not None:
            return f"row {row}: column '{field.name}' is null, or holds a null"
        if found != field:
            return f"column '{field.name}' is {_said(found)}, the format has {_said(field)}"
    if unknown := [name for name in table.column_names if name not in schema.names]:
        return f"column '{unknown[0]}' is unknown"
    return None if table.schema.equals(schema) else f"the columns are not in the order {', '.join(schema.names)}"


def _said(field: pa.Field) -> str:
    return f"{field.type}{'' if field.nullable else ' not null'}"


def _first_null(column: pa.ChunkedArray) -> int | None:
    """The first row that is null, or a list that holds a null."""
    array = column.combine_chunks()
    nulls = array.is_null().to_numpy(zero_copy_only=False).copy()
    if pa.types.is_list(array.type):
        nulls[pc.list_parent_indices(array).filter(array.flatten().is_null()).to_numpy()] = True
    return int(nulls.argmax()) if nulls.any() else None


SIDES = ("chosen", "rejected")
CHOSEN, REJECTED = range(2)  # places of y_t and y_s among an example's responses
