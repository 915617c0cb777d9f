"""What in responses and pairs a person should hear about, in plain sentences.

All of it is read from tables that are complete, so that it is the same whoever made them, and however often they were
stopped. Of a table that is not complete nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dpkd_offline.common import console
from dpkd_offline.dataset.catalog import is_begun, responses_of
from dpkd_offline.dataset.columns import Lists
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.layout import STUDENT_RESPONSES
from dpkd_offline.dataset.table import Table

# Shares of the rows. A student that mostly sees responses without an end does not learn to end its own; what teaches
# nothing, an empty response or a pair of equal ones, is worth a word when it is a tenth of the work.
MOST, MANY = 0.5, 0.1
# How many times longer y_s are than y_t, or the other way round, in mean tokens, before they are told apart by length
# alone; and how many tokens that is at least, since an answer of a word has twice the tokens of another one.
TIMES, TOKENS = 2.0, 4.0


@dataclass
class _Side:
    """Sums over the responses of one side."""

    name: str
    rows: int = 0
    tokens: int = 0
    cut_off: int = 0
    empty: int = 0

    def add(self, texts: pa.ChunkedArray, token_ids: pa.ChunkedArray, reasons: pa.ChunkedArray) -> None:
        self.rows += len(texts)
        self.tokens += int(Lists(token_ids).lengths.sum())
        self.cut_off += _count(pc.equal(reasons, "length"))
        self.empty += _count(pc.equal(pc.utf8_trim_whitespace(texts), ""))

    def warnings(self, limit: int | None) -> Iterator[str]:
        """`limit`: the longest response, in tokens, where it is known."""
        if self.cut_off >= MOST * self.rows:
            at = f" at {limit} tokens" if limit else ""
            yield (
                f"{self.cut_off} of {self.rows} {self.name} are cut off{at}: a model that learns from them does not "
                f"learn to end; raise --max-new-tokens, or teach the model to end first"
            )
        if self.empty >= MANY * self.rows:
            yield f"{self.empty} of {self.rows} {self.name} are empty: see whether the template is that of the model"


def _count(mask: pa.ChunkedArray) -> int:
    return int(pc.sum(mask, min_count=0).as_py())


def response_warnings(dataset: Dataset, role: str, round: int) -> tuple[str, ...]:
    """Of the responses of a role, all samples together: many are cut off or empty; of a student's also how they go with
    y_t, if these are complete and in the same tokens."""
    samples = [of for of in dataset.samples() if not of.sample or is_begun(of.responses(role, round))]
    tables = [(of.responses(role, round), responses_of(of, "teacher", 0)) for of in samples]
    if not all(_is_complete(table) for table, _ in tables):
        return ()
    provenance = tables[0][0].require_provenance()
    beside = role == "student" and dataset.shares_tokenizer(provenance["tokenizer_fingerprint"])
    beside = beside and all(_is_complete(y_t) for _, y_t in tables)
    chosen, own, identical = _Side("y_t"), _Side(_name(role, round)), 0
    columns = ["response", "response_ids", "finish_reason"]
    for (table, y_t), shard in product(tables, range(dataset.plan.count)):
        rows = table.read_arrow(shard, columns)
        own.add(*(rows[name] for name in columns))
        if beside:
            others = y_t.read_arrow(shard, columns)
            chosen.add(*(others[name] for name in columns))
            identical += _count(pc.equal(rows["response"], others["response"]))
    limit = provenance.get("sampling", {}).get("max_new_tokens")
    return *own.warnings(limit), *(_of_pairs(chosen, own, identical) if beside else ())


def pair_warnings(dataset: Dataset, round: int) -> tuple[str, ...]:
    """Of pairs, all samples together: many responses of a side are cut off or empty, y_t and y_s are the same, or of
    very different length."""
    tables = [table for of in dataset.samples() if not (table := of.pairs(round)).sample or is_begun(table)]
    if not all(map(_is_complete, tables)):
        return ()
    chosen, rejected, identical = _Side("y_t"), _Side(_name("student", round)), 0
    sides = {"chosen": chosen, "rejected": rejected}
    columns = [f"{side}{what}" for side in sides for what in ("", "_ids", "_finish_reason")]
    for table, shard in product(tables, range(dataset.plan.count)):
        rows = table.read_arrow(shard, columns)
        for name, side in sides.items():
            side.add(*(rows[f"{name}{what}"] for what in ("", "_ids", "_finish_reason")))
        identical += _count(pc.equal(rows["chosen"], rows["rejected"]))
    limits = [_limit(dataset.responses("teacher", 0)), _limit(dataset.responses("student", round))]
    of_sides = (w for side, limit in zip(sides.values(), limits, strict=True) for w in side.warnings(limit))
    return *of_sides, *_of_pairs(chosen, rejected, identical)


def dataset_warnings(root: Path, student: str | None = None) -> list[str]:
    """Of all tables of a student, by default of the first: each sentence once. None where there is no dataset."""
    if not Dataset.exists(root):
        return []
    dataset = Dataset.open(root, student)
    warnings = list(response_warnings(dataset, "teacher", 0))
    for round in dataset.rounds(STUDENT_RESPONSES):
        warnings += [*response_warnings(dataset, "student", round), *pair_warnings(dataset, round)]
    return list(dict.fromkeys(warnings))


def say(warnings: Sequence[str]) -> None:
    for warning in warnings:
        console.info(f"warning: {warning}")


def _of_pairs(chosen: _Side, rejected: _Side, identical: int) -> Iterator[str]:
    means = [side.tokens / side.rows for side in (chosen, rejected)]
    if max(means) >= TIMES * min(means) and max(means) - min(means) >= TOKENS:
        yield (
            f"{rejected.name} have {means[1]:.0f} tokens on average, y_t {means[0]:.0f}: an objective of pairs may "
            f"learn their length and little else; sample both with the same --max-new-tokens, or teach the student y_t "
            f"first (--objective seqkd)"
        )
    if identical >= MANY * chosen.rows:
        yield (
            f"{identical} of {chosen.rows} {rejected.name} are the same text as y_t: nothing is learnt from such "
            f"pairs; `dpkd-offline subset --drop-identical` leaves them out"
        )


def _name(role: str, round: int) -> str:
    return "y_t" if role == "teacher" else f"y_s of round {round}" if round else "y_s"


def _limit(table: Table[Any]) -> int | None:
    """The longest response that was allowed, in tokens; imported ones had no limit."""
    limit: int | None = (table.provenance() or {}).get("sampling", {}).get("max_new_tokens")
    return limit


def _is_complete(table: Table[Any]) -> bool:
    return table.provenance() is not None and not table.pending()
