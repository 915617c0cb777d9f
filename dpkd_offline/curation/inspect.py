"""`inspect`: shows what a dataset holds, in numbers."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dpkd_offline.common.console import progress
from dpkd_offline.common.locations import Location
from dpkd_offline.common.terminal import in_a_line
from dpkd_offline.dataset.catalog import begun_tables
from dpkd_offline.dataset.columns import Lists, lists_of
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.layout import PAIRS
from dpkd_offline.dataset.row_checks import check_rows
from dpkd_offline.dataset.schema import COLUMNS, SIDES, Kind, columns_of
from dpkd_offline.dataset.table import Table

READ = (Kind.TOKEN_IDS, Kind.LOGPS, Kind.FINISH_REASON, Kind.EXACT, Kind.ROUND, Kind.TOP_MASS)
VALUES_AT_ONCE = 1 << 14
DECIMALS = 3  # of the values that quantiles are taken of


class Distribution:
    """Mean and quantiles of values that are added bit by bit. Keeps how often each value occurs, to three decimals."""

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
    return {
        "prompts": dataset.plan.rows,
        "shards": dataset.plan.count,
        "template": dataset.prompt_set.template,
        "tokenizer": dataset.prompt_set.tokenizer,
        "source": dataset.prompt_set.source,
        "tables": {table.name: _inspect_table(table) for table in begun_tables(dataset)},
    }


def _inspect_table(table: Table[Any]) -> dict[str, Any]:
    shards, provenance = list(table.entries()), table.provenance() or {}
    summary: dict[str, Any] = {"shards": len(shards)}
    summary |= {key: provenance[key] for key in ("source", "model", "engine", "dtype") if key in provenance}
    if (audit := table.audit()) is not None:
        summary["audit"] = audit.model_dump()
    distributions: dict[str, Distribution] = {}
    names = table.record.schema.names
    columns = [*columns_of(names, *READ), *columns_of(names, Kind.TEXT, sides=SIDES)]
    with progress(f"inspect {table.name}", sum(map(table.plan.rows_of, shards)), "row") as shown:
        for shard in shards:
            rows = table.read_arrow(shard, columns)
            check_rows(rows, table.path(shard), by_text=provenance.get("scored") == "text")
            for name, values in _measures(rows, table).items():
                distributions.setdefault(name, Distribution()).add(values)
            shown.advance(len(rows))
    return summary | {name: distribution.summary() for name, distribution in distributions.items()}


def _measures(rows: pa.Table, table: Table[Any]) -> dict[str, npt.NDArray[np.float64]]:
    """Per row: lengths in tokens, in a later round whether it is kept, and of pairs what the teacher makes of them."""
    names, lists, is_pairs = rows.column_names, lists_of(rows), table.kind is PAIRS
    measures = {}
    for name in columns_of(names, Kind.TOKEN_IDS):
        side = COLUMNS[name].side
        if not is_pairs or side != "prompt":
            measures[f"{side} tokens"] = lists[name].lengths.astype(float)
    for name in columns_of(names, Kind.FINISH_REASON):
        measures[f"{COLUMNS[name].side} truncated"] = pc.equal(rows[name], "length").to_numpy().astype(float)
    if table.round:
        for name in columns_of(names, Kind.ROUND):
            measures["of an earlier round"] = pc.less(rows[name], table.round).to_numpy().astype(float)
    for name in columns_of(names, Kind.TOP_MASS):
        mass = Lists(rows[name])
        measures[f"{COLUMNS[name].side} top mass per token"] = mass.sums() / mass.lengths
    for name in columns_of(names, Kind.EXACT):
        measures[f"{COLUMNS[name].side} not exact"] = pc.invert(rows[name]).to_numpy().astype(float)
    if is_pairs:
        measures["identical"] = pc.equal(rows["chosen"], rows["rejected"]).to_numpy().astype(float)
        logps = [lists[f"teacher_{side}_logps"] for side in SIDES]
        chosen, rejected = (of.sums() / of.lengths for of in logps)
        measures["teacher log p(y_t) per token"], measures["teacher log p(y_s) per token"] = chosen, rejected
        measures["teacher margin per token"] = chosen - rejected
    return measures


def inspection_table(inspection: dict[str, Any]) -> str:
    """What `inspect` returned, for people."""
    template, tokenizer, source = (in_a_line(inspection[key]) for key in ("template", "tokenizer", "source"))
    lines = [
        f"{inspection['prompts']} prompts in {inspection['shards']} shards, template {template}, "
        f"tokenizer {tokenizer}, from {source}"
    ]
    for name, table in inspection["tables"].items():
        model = f", {table['model']['name']} ({table['model']['revision'][:19]})" if "model" in table else ""
        engine = f", {table['engine']} {table['dtype']}" if "engine" in table else ""
        source = f", imported from {table['source']}" if "source" in table else ""
        made_by = in_a_line(f"{model}{engine}{source}")
        lines += ["", f"{name}: {table['shards']} of {inspection['shards']} shards{made_by}"]
        if audit := table.get("audit"):
            lines.append(
                f"  audit: {audit['rows']} rows against {in_a_line(audit['against']['engine'])} "
                f"{in_a_line(audit['against']['dtype'])}: "
                f"{audit['gap_abs_mean']:.4f} nats a token, {audit['margin_gap_abs_mean']:.4f} of the margin"
            )
        measures = {key: value for key, value in table.items() if isinstance(value, dict) and "median" in value}
        lines += [f"  {measure:<30} {_shown(measure, summary)}" for measure, summary in measures.items()]
    return "\n".join(lines)


def _shown(measure: str, summary: dict[str, float]) -> str:
    if measure in ("identical", "of an earlier round") or measure.endswith(("truncated", "not exact")):
        return f"{100 * summary['mean']:8.1f} %"
    spread = f"5 % {summary['p5']:.4g} · median {summary['median']:.4g} · 95 % {summary['p95']:.4g}"
    return f"{summary['mean']:8.4g}   {spread}"
