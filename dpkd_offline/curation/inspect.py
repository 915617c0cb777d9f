"""`inspect`: what is in a dataset, in numbers."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dpkd_offline.common.console import progress
from dpkd_offline.common.files import find_json
from dpkd_offline.common.locations import Location
from dpkd_offline.dataset.catalog import begun_tables, round_of
from dpkd_offline.dataset.columns import Lists, lists_of
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.row_checks import check_rows
from dpkd_offline.dataset.table import Table

COLUMNS = (
    "_ids",
    "logps",
    "finish_reason",
    "chosen",
    "rejected",
    "mass",
    "exact",
    "round",
)  # and what they end with, of those that are read
VALUES_AT_ONCE = 1 << 14
DECIMALS = 3  # of the values that quantiles are taken of


class Distribution:
    """Mean and quantiles of values that go by, without keeping them: how often each occurs, to three decimals."""

    def __init__(self) -> None:
        self._counts: Counter[float] = Counter()
        self._sums: list[float] = []
        self._waiting: list[npt.NDArray[np.float64]] = []  # to be counted some thousands at once

    def add(self, values: npt.NDArray[np.float64]) -> None:
        self._waiting.append(values)
        if sum(map(len, self._waiting)) >= VALUES_AT_ONCE:
            self._count()

    def _count(self) -> None:
        values, self._waiting = np.concatenate(self._waiting), []
        distinct, counts = np.unique(np.round(values, DECIMALS), return_counts=True)
        for value, count in zip(distinct.tolist(), counts.tolist(), strict=True):
            self._counts[value] += count
        self._sums.append(float(values.sum()))

    def summary(self) -> dict[str, float]:
        """Quantiles as numpy's, by linear interpolation."""
        if self._waiting:
            self._count()
        values, counts = np.array(sorted(self._counts.items())).T
        ends = np.cumsum(counts)
        places = np.array((0.05, 0.5, 0.95)) * (ends[-1] - 1)
        below, above = (values[np.searchsorted(ends, f(places), side="right")] for f in (np.floor, np.ceil))
        low, middle, high = below + (above - below) * (places - np.floor(places))
        mean = math.fsum(self._sums) / float(ends[-1])
        return {"mean": mean, "p5": float(low), "median": float(middle), "p95": float(high)}


def inspect(root: Location) -> dict[str, Any]:
    """Counts, lengths in tokens, truncation, and what the teacher prefers; a shard in memory at a time.

    Raises:
        DataError, MismatchError: as when a shard is read, and where a value cannot be.
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
    for table in begun_tables(dataset):
        found["tables"][table.name] = _inspect_table(table)
    return found


def _inspect_table(table: Table[Any]) -> dict[str, Any]:
    shards = table.committed()
    made = table.provenance() or {}
    said: dict[str, Any] = {"shards": len(shards)}
    said |= {key: made[key] for key in ("source", "model", "engine", "dtype") if key in made}
    distributions: dict[str, Distribution] = {}
    if (audit := find_json(table.folder / "_audit.json")) is not None:
        said["audit"] = audit
    columns = [name for name in table.record.schema.names if name.endswith(COLUMNS)]
    with progress(f"inspect {table.name}", sum(map(table.plan.rows_of, shards)), "row") as shown:
        for shard in shards:
            rows = table.read_arrow(shard, columns)
            check_rows(rows, table.path(shard), by_text=made.get("scored") == "text")
            for name, values in _facts(rows, round_of(table)).items():
                distributions.setdefault(name, Distribution()).add(values)
            shown.advance(len(rows))
    return said | {name: distribution.summary() for name, distribution in distributions.items()}


def _facts(rows: pa.Table, round: int | None) -> dict[str, npt.NDArray[np.float64]]:
    """Per row: lengths in tokens, in a later round whether it is kept, and of pairs what the teacher makes of them."""
    pairs = "chosen_ids" in rows.column_names
    lists = lists_of(rows)
    facts = {
        f"{name.removesuffix('_ids')} tokens": tokens.lengths.astype(float)
        for name, tokens in lists.items()
        if name.endswith("_ids") and not (pairs and name == "prompt_ids")
    }
    for name in rows.column_names:
        if name.endswith("finish_reason"):
            side = name.removesuffix("finish_reason").removesuffix("_") or "response"
            facts[f"{side} truncated"] = pc.equal(rows[name], "length").to_numpy().astype(float)
    if round and "round" in rows.column_names:
        facts["of an earlier round"] = pc.less(rows["round"], round).to_numpy().astype(float)
    for name in rows.column_names:
        if name.endswith("_top_mass"):
            mass = Lists(rows[name])
            facts[f"{name.removesuffix('_mass').replace('_', ' ')} mass per token"] = mass.sums() / mass.lengths
    if pairs:
        for side in ("chosen", "rejected"):
            facts[f"{side} not exact"] = pc.invert(rows[f"{side}_exact"]).to_numpy().astype(float)
        facts["identical"] = pc.equal(rows["chosen"], rows["rejected"]).to_numpy().astype(float)
        chosen, rejected = (
            logps.sums() / logps.lengths for logps in (lists["teacher_chosen_logps"], lists["teacher_rejected_logps"])
        )
        facts["teacher log p(y_t) per token"], facts["teacher log p(y_s) per token"] = chosen, rejected
        facts["teacher margin per token"] = chosen - rejected
    return facts


def inspection_table(found: dict[str, Any]) -> str:
    """What `inspect` found, for people."""
    lines = [
        f"{found['prompts']} prompts in {found['shards']} shards, template {found['template']}, tokenizer "
        f"{found['tokenizer']}, from {found['source']}"
    ]
    for name, said in found["tables"].items():
        model = f", {said['model']['name']} ({said['model']['revision'][:19]})" if "model" in said else ""
        engine = f", {said['engine']} {said['dtype']}" if "engine" in said else ""
        source = f", imported from {said['source']}" if "source" in said else ""
        lines += ["", f"{name}: {said['shards']} of {found['shards']} shards{model}{engine}{source}"]
        if audit := said.get("audit"):
            lines.append(
                f"  audit: {audit['rows']} rows against {audit['against']['engine']} {audit['against']['dtype']}: "
                f"{audit['gap_abs_mean']:.4f} nats a token, {audit['margin_gap_abs_mean']:.4f} of the margin"
            )
        for fact, summary in said.items():
            if not isinstance(summary, dict) or "median" not in summary:
                continue
            if fact in ("identical", "of an earlier round") or fact.endswith(("truncated", "not exact")):
                lines.append(f"  {fact:<30} {100 * summary['mean']:8.1f} %")
            else:
                spread = f"5 % {summary['p5']:.4g} · median {summary['median']:.4g} · 95 % {summary['p95']:.4g}"
                lines.append(f"  {fact:<30} {summary['mean']:8.4g}   {spread}")
    return "\n".join(lines)
