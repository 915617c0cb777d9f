"""The rows of a dataset, described once: the name of every column, its Arrow type, and what its values are.

Token ids are the truth of every row; text is there for people. Log-probs are natural logarithms (nats), one
float32 per response token. A new column or a changed meaning raises SCHEMA_VERSION.

A column is described beside its name, as `prompt_ids: Annotated[list[int], token_ids("prompt")]`. From its kind and
its side follow the checks of its values, the sums in a manifest entry, and what `inspect`, the card, `verify`,
`subset`, `export` and `train` read. The files hold the Arrow schema alone, without kinds and sides.

A table may have a column that others do not have, or one of another type: its `_table.json` (of prompts dataset.json)
says so under `columns`, by the name and the type. Only what is described here as optional or alternative may be.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import pyarrow as pa
import pyarrow.compute as pc

SCHEMA_VERSION = 1
FinishReason = Literal["stop", "length"]  # "stop": the response ends with an EOS that was sampled
Side = Literal["prompt", "response", "chosen", "rejected"]
SIDES: tuple[Side, Side] = ("chosen", "rejected")  # of a pair: y_t and y_s
CHOSEN, REJECTED = range(2)  # places of y_t and y_s among an example's responses


def _lists_of(type_: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", type_, nullable=False))


TOKEN_IDS = _lists_of(pa.int32())
LOGPS = _lists_of(pa.float32())
TOP_IDS, SHORT_TOP_IDS = _lists_of(TOKEN_IDS), _lists_of(_lists_of(pa.uint16()))
TOP_LOGPS, HALF_TOP_LOGPS = _lists_of(LOGPS), _lists_of(_lists_of(pa.float16()))
STRINGS = _lists_of(pa.string())
MESSAGES = _lists_of(
    pa.struct([pa.field("role", pa.string(), nullable=False), pa.field("content", pa.string(), nullable=False)])
)


# --- what a column holds --------------------------------------------------------------------------------------------


class Kind(Enum):
    """What the values of a column are."""

    ID = auto()  # of the prompt, the same in row k of every table
    TEXT = auto()
    MESSAGES = auto()  # a conversation; empty where the source gave raw text
    REFERENCES = auto()  # good answers, or the first of them
    TOKEN_IDS = auto()
    FINISH_REASON = auto()
    LOGPS = auto()  # nats, one a token
    EXACT = auto()  # whether the tokens scored are those sampled, or both models' tokens give the text and it them
    ROUND = auto()  # in which the student's response was sampled
    TOP_IDS = auto()  # of the teacher's k likeliest tokens at each position
    TOP_LOGPS = auto()
    TOP_MASS = auto()  # the probability that these cover
    TEACHER = auto()  # the revision of the row's teacher, in a table of several


@dataclass(frozen=True)
class Column:
    """What a column holds."""

    kind: Kind
    type: pa.DataType
    side: Side | None = None  # the text of the row that it is about
    model: Literal["teacher", "behavior"] | None = None  # of log-probs: under the teacher, or under who sampled
    nullable: bool = False
    optional: bool = False  # whether a table may be without it; the record's field then has a default
    alternatives: tuple[pa.DataType, ...] = ()  # other types that it may have in a table

    @property
    def per_token(self) -> bool:
        """Whether a row has an entry for each token of its side."""
        return self.kind in (Kind.TOKEN_IDS, Kind.LOGPS, Kind.TOP_IDS, Kind.TOP_LOGPS, Kind.TOP_MASS)


ID, ROUND = Column(Kind.ID, pa.string()), Column(Kind.ROUND, pa.int32())
TEACHER = Column(Kind.TEACHER, pa.string(), optional=True)


def text(side: Side) -> Column:
    return Column(Kind.TEXT, pa.string(), side)


def token_ids(side: Side) -> Column:
    return Column(Kind.TOKEN_IDS, TOKEN_IDS, side)


def finish_reason(side: Side) -> Column:
    return Column(Kind.FINISH_REASON, pa.string(), side)


def logps(side: Side, model: Literal["teacher", "behavior"]) -> Column:
    return Column(Kind.LOGPS, LOGPS, side, model)


def exact(side: Side) -> Column:
    return Column(Kind.EXACT, pa.bool_(), side)


def top_ids(side: Side) -> Column:
    return Column(Kind.TOP_IDS, TOP_IDS, side, alternatives=(SHORT_TOP_IDS,))


def top_logps(side: Side) -> Column:
    return Column(Kind.TOP_LOGPS, TOP_LOGPS, side, alternatives=(HALF_TOP_LOGPS,))


def top_mass(side: Side) -> Column:
    return Column(Kind.TOP_MASS, LOGPS, side)


# --- the rows of each table -----------------------------------------------------------------------------------------


class _Described:
    """A row whose columns are described by the annotations of its fields."""

    columns: ClassVar[dict[str, Column]]
    schema: ClassVar[pa.Schema]  # of a table that says nothing else

    def __init_subclass__(cls) -> None:
        hints = get_type_hints(cls, include_extras=True).items()
        cls.columns = {name: get_args(hint)[1] for name, hint in hints if get_origin(hint) is Annotated}
        cls.schema = _schema({name: c.type for name, c in cls.columns.items() if not c.optional}, cls.columns)


def _schema(types: Mapping[str, pa.DataType], columns: Mapping[str, Column]) -> pa.Schema:
    return pa.schema([pa.field(name, types[name], nullable=c.nullable) for name, c in columns.items() if name in types])


@dataclass(frozen=True)
class Prompt(_Described):
    """One prompt x, rendered and tokenised once, before anything is sampled."""

    id: Annotated[str, ID]
    messages: Annotated[list[dict[str, str]], Column(Kind.MESSAGES, MESSAGES, "prompt")]
    prompt: Annotated[str, text("prompt")]  # after the template
    prompt_ids: Annotated[list[int], token_ids("prompt")]
    references: Annotated[list[str], Column(Kind.REFERENCES, STRINGS, "prompt")]  # train on the first; may be empty
    # JSON of what the template was given (messages, tools, answer), where roles and text do not say it all.
    conversation: Annotated[str | None, Column(Kind.MESSAGES, pa.string(), "prompt", nullable=True, optional=True)] = (
        None
    )


@dataclass(frozen=True)
class Response(_Described):
    """One sampled response y; of a student with its own log-probs at temperature 1, which drift is measured by."""

    id: Annotated[str, ID]
    response: Annotated[str, text("response")]
    response_ids: Annotated[list[int], token_ids("response")]  # with the EOS, if it was sampled
    finish_reason: Annotated[FinishReason, finish_reason("response")]
    logps: Annotated[list[float], logps("response", "behavior")]  # none of a teacher, which is scored by prefill
    round: Annotated[int, ROUND]  # 0 of a teacher; a later round may keep some responses of the round before
    teacher: Annotated[str | None, TEACHER] = None  # where a merge of several teachers says whose it is


@dataclass(frozen=True)
class PreferencePair(_Described):
    """All that training needs of one prompt: chosen is y_t, rejected is y_s, with the teacher's log-probs of both.

    Token ids are the student's. Where the teacher has another tokenizer, it scored the same text in its own tokens:
    then its log-probs are as many as those, and |y| is known in both, and in bytes by the text.
    """

    id: Annotated[str, ID]
    prompt: Annotated[str, text("prompt")]
    prompt_ids: Annotated[list[int], token_ids("prompt")]
    reference: Annotated[str | None, Column(Kind.REFERENCES, pa.string(), "prompt", nullable=True)]
    chosen: Annotated[str, text("chosen")]
    chosen_ids: Annotated[list[int], token_ids("chosen")]
    chosen_finish_reason: Annotated[FinishReason, finish_reason("chosen")]
    rejected: Annotated[str, text("rejected")]
    rejected_ids: Annotated[list[int], token_ids("rejected")]
    rejected_finish_reason: Annotated[FinishReason, finish_reason("rejected")]
    teacher_chosen_logps: Annotated[list[float], logps("chosen", "teacher")]  # log p(y_t | x)
    teacher_rejected_logps: Annotated[list[float], logps("rejected", "teacher")]  # log p(y_s | x)
    chosen_exact: Annotated[bool, exact("chosen")]
    rejected_exact: Annotated[bool, exact("rejected")]
    behavior_rejected_logps: Annotated[list[float], logps("rejected", "behavior")]  # log b(y_s | x)
    round: Annotated[int, ROUND]
    teacher: Annotated[str | None, TEACHER] = None  # whose y_t and log-probs these are, in a merge of several teachers


@dataclass(frozen=True)
class TopK(_Described):
    """The teacher's likeliest tokens at each of the T positions of both responses of a pair, likeliest first.

    They are k, or as few of these as cover a share of the probability.
    """

    id: Annotated[str, ID]
    chosen_top_ids: Annotated[list[list[int]], top_ids("chosen")]  # [T][k]
    chosen_top_logps: Annotated[list[list[float]], top_logps("chosen")]  # [T][k], nats
    chosen_top_mass: Annotated[list[float], top_mass("chosen")]  # [T]
    rejected_top_ids: Annotated[list[list[int]], top_ids("rejected")]
    rejected_top_logps: Annotated[list[list[float]], top_logps("rejected")]
    rejected_top_mass: Annotated[list[float], top_mass("rejected")]


Record = Prompt | Response | PreferencePair | TopK
R = TypeVar("R", Prompt, Response, PreferencePair, TopK)
# By name, which means the same in every table: so columns can be told apart wherever some of them are read.
COLUMNS: dict[str, Column] = {name: column for record in get_args(Record) for name, column in record.columns.items()}


def columns_of(names: Iterable[str], *kinds: Kind, sides: Collection[Side | None] | None = None) -> list[str]:
    """Those of some columns that are of one of these kinds, and of one of these sides, in their order."""
    return [n for n in names if COLUMNS[n].kind in kinds and (sides is None or COLUMNS[n].side in sides)]


def column_of(record: type[Record], kind: Kind, side: Side | None, model: str | None = None) -> str | None:
    """The one column of a record that holds this, or None where it has none."""
    sought = kind, side, model
    return next((name for name, c in record.columns.items() if (c.kind, c.side, c.model) == sought), None)


def schema_with(record: type[Record], own: Mapping[str, str]) -> pa.Schema:
    """The schema of a table of these records that has columns of its own.

    Args:
        own: the columns that are not in `record.schema`, or have another type there; with the type, as Arrow writes it.

    Raises:
        ValueError: a column that no such table may have, or not of this type.
    """
    types = {field.name: field.type for field in record.schema}
    for name, written in own.items():
        column = record.columns.get(name)
        allowed = () if column is None else (*column.alternatives, *([column.type] if column.optional else []))
        if (type_ := next((t for t in allowed if str(t) == written), None)) is None:
            raise ValueError(f"columns.{name} is '{written}', which no table of this kind has")
        types[name] = type_
    return _schema(types, record.columns)


def full_schema(record: type[Record]) -> pa.Schema:
    """The schema of a table that has every column that such a table may have."""
    return schema_with(record, {name: str(column.type) for name, column in record.columns.items() if column.optional})


def own_columns(schema: pa.Schema, record: type[Record]) -> dict[str, str]:
    """The inverse of `schema_with`."""
    base = record.schema
    return {f.name: str(f.type) for f in schema if f.name not in base.names or base.field(f.name).type != f.type}


# --- rows in Arrow --------------------------------------------------------------------------------------------------


def to_table(rows: Sequence[Record], schema: pa.Schema) -> pa.Table:
    """Rows of one record type as an Arrow table of exactly that schema."""
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in schema.names}
    return pa.table([pa.array(columns[f.name], f.type) for f in schema], schema=schema)


def from_table(table: pa.Table, record: type[R]) -> list[R]:
    """The inverse of `to_table`. A column that is optional and not there has the default of its field."""
    names = [name for name, column in record.columns.items() if not column.optional or name in table.column_names]
    return [record(**row) for row in table.select(names).to_pylist()]


def schema_fault(table: pa.Table, schema: pa.Schema) -> str | None:
    """Where the columns of a table that was read are not those of a record, for people; None if they are."""
    for field in schema:
        index = table.schema.get_field_index(field.name)
        if index < 0:
            times = table.column_names.count(field.name)
            return f"column '{field.name}' " + ("stands twice" if times else "is missing")
        actual = table.schema.field(index)
        if not field.nullable and (row := _first_null(table.column(index))) is not None:
            return f"row {row}: column '{field.name}' is null, or holds a null"
        if actual != field:
            return f"column '{field.name}' is {_shown(actual)}, the format has {_shown(field)}"
    if unknown := [name for name in table.column_names if name not in schema.names]:
        return f"column '{unknown[0]}' is unknown"
    return None if table.schema.equals(schema) else f"the columns are not in the order {', '.join(schema.names)}"


def _shown(field: pa.Field) -> str:
    return f"{field.type}{'' if field.nullable else ' not null'}"


def _first_null(column: pa.ChunkedArray) -> int | None:
    """The first row that is null, or a list that holds a null."""
    array = column.combine_chunks()
    nulls = array.is_null().to_numpy(zero_copy_only=False).copy()
    if pa.types.is_list(array.type):
        nulls[pc.list_parent_indices(array).filter(array.flatten().is_null()).to_numpy()] = True
    return int(nulls.argmax()) if nulls.any() else None
