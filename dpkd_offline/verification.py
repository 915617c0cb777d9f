"""`verify` and `inspect`: is a dataset whole, and what is in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dpkd_offline.dataset import Dataset
from dpkd_offline.errors import DataError
from dpkd_offline.log import progress
from dpkd_offline.shards import Table

ROUNDING = 1e-4  # nats by which a log-prob may lie above zero
FINISH_REASONS = ["stop", "length"]


class LogpsOf(NamedTuple):
    """A column of log-probs and the tokens that they are of."""

    logps: str
    ids: str


LOGPS = {
    "responses": [LogpsOf("logps", "response_ids")],
    "pairs": [
        LogpsOf("teacher_chosen_logps", "chosen_ids"),
        LogpsOf("teacher_rejected_logps", "rejected_ids"),
        LogpsOf("behavior_rejected_logps", "rejected_ids"),
    ],
}


def tables(dataset: Dataset) -> Iterator[Table[Any]]:
    """The tables that have been begun."""
    yield dataset.prompts
    if dataset.responses("teacher", 0).folder.exists():
        yield dataset.responses("teacher", 0)
    for round in dataset.rounds("responses/student"):
        yield dataset.responses("student", round)
    for round in dataset.rounds():
        yield dataset.pairs(round)


def verify(root: Path) -> dict[str, int]:
    """Check every shard of a dataset: hash, schema, rows, ids, lengths, and that each number can be what it is.

    Returns the rows of each table.

    Raises:
        DataError: a shard is missing, or a value in it is wrong; names file, row and column.
        MismatchError: a file is not the one that was committed.
    """
    dataset = Dataset.open(root)
    found = list(tables(dataset))
    for table in found:
        table.require_complete(f"the stage that makes {table.name}")
    seen: dict[str, int] = {}
    with progress("verify", dataset.plan.rows * len(found), "row") as shown:
        for shard in range(dataset.plan.count):
            ids: pa.ChunkedArray | None = None
            for table in found:
                rows, path = table.read_arrow(shard), table.path(shard)
                if ids is None:
                    ids = rows["id"]
                    _check_unique(ids, path, seen, shard * dataset.plan.shard_size)
                _expect(pc.equal(rows["id"], ids), path, "id", "is not the id of the prompt in this row")
                check_rows(rows, table.name.split("/")[0], path)
                shown.advance(len(rows))
    return {table.name: dataset.plan.rows for table in found}


def _check_unique(ids: pa.ChunkedArray, path: Path, seen: dict[str, int], first: int) -> None:
    for row, id_ in enumerate(ids.to_pylist()):
        if id_ in seen:
            raise DataError(f"{path}: row {row}: column 'id': '{id_}' stands in row {seen[id_]} of the dataset too")
        seen[id_] = first + row


def check_rows(rows: pa.Table, kind: str, path: Path) -> None:
    """Raise DataError, naming the first row and column whose value cannot be."""
    for column in (field.name for field in rows.schema if field.name.endswith("_ids")):
        lengths = pc.list_value_length(rows[column])
        _expect(pc.greater(lengths, 0), path, column, "is empty")
        _expect_elements(rows[column], path, column, lambda ids: ids >= 0, "holds a negative token id")
    for column in (field.name for field in rows.schema if field.name.endswith("finish_reason")):
        _expect(pc.is_in(rows[column], pa.array(FINISH_REASONS)), path, column, "is neither 'stop' nor 'length'")
    for logps, ids in LOGPS.get(kind, []):
        same = pc.equal(pc.list_value_length(rows[logps]), pc.list_value_length(rows[ids]))
        _expect(same, path, logps, f"has not one log-prob per token of {ids}")
        _expect_elements(rows[logps], path, logps, np.isfinite, "holds a log-prob that is not finite")
        _expect_elements(rows[logps], path, logps, lambda x: x <= ROUNDING, "holds a positive log-prob")


def _expect(good: pa.ChunkedArray, path: Path, column: str, message: str) -> None:
    wrong = np.flatnonzero(~np.asarray(good.to_numpy(), dtype=np.bool_))
    if len(wrong):
        raise DataError(f"{path}: row {wrong[0]}: column '{column}' {message}")


def _expect_elements(lists: pa.ChunkedArray, path: Path, column: str, good: Any, message: str) -> None:
    array = lists.combine_chunks()
    wrong = np.flatnonzero(~good(array.flatten().to_numpy()))
    if len(wrong):
        ends = np.cumsum(pc.list_value_length(array).to_numpy())
        row = int(np.searchsorted(ends, wrong[0], side="right"))
        raise DataError(f"{path}: row {row}: column '{column}' {message}")


# --- inspect --------------------------------------------------------------------------------------------------------


def inspect(root: Path) -> dict[str, Any]:
    """Counts, lengths in tokens, truncation, and what the teacher prefers; a shard in memory at a time.

    Raises:
        DataError, MismatchError: as when a shard is read.
    """
    dataset = Dataset.open(root)
    found: dict[str, Any] = {
        "prompts": dataset.plan.rows,
        "shards": dataset.plan.count,
        "template": dataset.prompt_set.template,
        "tokenizer": dataset.prompt_set.tokenizer,
        "source": dataset.prompt_set.source,
        "tables": {},
    }
    for table in tables(dataset):
        pending = table.pending()
        shards = [shard for shard in range(dataset.plan.count) if shard not in pending]
        made = table.provenance() or {}
        said: dict[str, Any] = {"shards": len(shards)}
        if made:
            said |= {"model": made["model"], "engine": made["engine"], "dtype": made["dtype"]}
        facts = [_facts(table.read_arrow(shard), table.name.split("/")[0]) for shard in shards]
        for name in facts[0] if facts else ():
            said[name] = _summary(np.concatenate([fact[name] for fact in facts]))
        found["tables"][table.name] = said
    return found


def _facts(rows: pa.Table, kind: str) -> dict[str, npt.NDArray[np.float64]]:
    """Per row: lengths in tokens and, of pairs, what the teacher makes of them."""
    facts = {
        f"{field.name.removesuffix('_ids')} tokens": pc.list_value_length(rows[field.name]).to_numpy().astype(float)
        for field in rows.schema
        if field.name.endswith("_ids") and (kind == "prompts" or field.name != "prompt_ids")
    }
    for field in rows.schema:
        if field.name.endswith("finish_reason"):
            side = field.name.removesuffix("finish_reason").removesuffix("_") or "response"
            facts[f"{side} truncated"] = pc.equal(rows[field.name], "length").to_numpy().astype(float)
    if kind == "pairs":
        facts["identical"] = pc.equal(rows["chosen"], rows["rejected"]).to_numpy().astype(float)
        chosen, rejected = _per_token(rows["teacher_chosen_logps"]), _per_token(rows["teacher_rejected_logps"])
        facts["teacher log p(y_t) per token"], facts["teacher log p(y_s) per token"] = chosen, rejected
        facts["teacher margin per token"] = chosen - rejected
    return facts


def _per_token(lists: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    array = lists.combine_chunks()
    lengths = pc.list_value_length(array).to_numpy()
    starts = np.cumsum(lengths) - lengths
    sums = np.add.reduceat(array.flatten().to_numpy().astype(np.float64), starts)
    return np.asarray(sums / lengths, dtype=np.float64)


def _summary(values: npt.NDArray[np.float64]) -> dict[str, float]:
    low, middle, high = np.quantile(values, (0.05, 0.5, 0.95))
    return {"mean": float(values.mean()), "p5": float(low), "median": float(middle), "p95": float(high)}


def inspection_table(found: dict[str, Any]) -> str:
    """What `inspect` found, for people."""
    lines = [
        f"{found['prompts']} prompts in {found['shards']} shards, template {found['template']}, tokenizer "
        f"{found['tokenizer']}, from {found['source']}"
    ]
    for name, said in found["tables"].items():
        model = f", {said['model']['name']} ({said['model']['revision'][:19]})" if "model" in said else ""
        engine = f", {said['engine']} {said['dtype']}" if "engine" in said else ""
        lines += ["", f"{name}: {said['shards']} of {found['shards']} shards{model}{engine}"]
        for fact, summary in said.items():
            if not isinstance(summary, dict) or "median" not in summary:
                continue
            if fact == "identical" or fact.endswith("truncated"):
                lines.append(f"  {fact:<30} {100 * summary['mean']:8.1f} %")
            else:
                spread = f"5 % {summary['p5']:.4g} · median {summary['median']:.4g} · 95 % {summary['p95']:.4g}"
                lines.append(f"  {fact:<30} {summary['mean']:8.4g}   {spread}")
    return "\n".join(lines)
