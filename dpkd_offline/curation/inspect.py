"""`inspect`: shows what a dataset holds, in numbers."""

from __future__ import annotations

import math
import random
import textwrap
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate, groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dpkd_offline.common.console import progress
from dpkd_offline.common.errors import DataError
from dpkd_offline.common.locations import Location
from dpkd_offline.common.terminal import in_a_line, visible
from dpkd_offline.dataset.catalog import begun_tables
from dpkd_offline.dataset.columns import Lists, lists_of
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.layout import PAIRS
from dpkd_offline.dataset.row_checks import check_rows
from dpkd_offline.dataset.schema import COLUMNS, SIDES, Kind, columns_of
from dpkd_offline.dataset.table import Table

READ = (Kind.TOKEN_IDS, Kind.LOGPS, Kind.FINISH_REASON, Kind.EXACT, Kind.ROUND, Kind.TOP_MASS)
MADE_BY = ("source", "model", "teachers", "engine", "dtype", "quantization")  # of what `_table.json` says
VALUES_AT_ONCE = 1 << 14
SHOWN = ["id", "prompt", "reference", "chosen", "chosen_finish_reason", "rejected", "rejected_finish_reason"]
SEED = 0  # of the pairs that are shown
MOST_LETTERS = 1500  # of a text that is shown
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

    def counts(self) -> tuple[list[float], list[int]]:
        """The distinct values in ascending order, to three decimals, and how often each occurs."""
        if self._waiting:
            self._count()
        values = sorted(self._counts)
        return values, [self._counts[value] for value in values]

    def summary(self) -> dict[str, float]:
        """Quantiles as numpy's, by linear interpolation."""
        values, counts = map(np.array, self.counts())
        ends = np.cumsum(counts)
        places = np.array((0.05, 0.5, 0.95)) * (ends[-1] - 1)
        below, above = (values[np.searchsorted(ends, f(places), side="right")] for f in (np.floor, np.ceil))
        low, middle, high = below + (above - below) * (places - np.floor(places))
        mean = math.fsum(self._sums) / float(ends[-1])
        return {"mean": mean, "p5": float(low), "median": float(middle), "p95": float(high)}


def inspect(root: Location, samples: int = 0) -> dict[str, Any]:
    """Counts, lengths in tokens, truncation, and what the teacher prefers; a shard in memory at a time.

    Args:
        samples: how many of the latest pairs to show as well.

    Raises:
        DataError, MismatchError: as when a shard is read, and where a value cannot be; and where there are no pairs to
            show.
    """
    dataset = Dataset.open(root)
    inspection = {
        "prompts": dataset.plan.rows,
        "shards": dataset.plan.count,
        "template": dataset.prompt_set.template,
        "tokenizer": dataset.prompt_set.tokenizer,
        "source": dataset.prompt_set.source,
        "tables": {table.name: _inspect_table(table) for table in begun_tables(dataset)},
    }
    return inspection | ({"samples": _draw_pairs(dataset, samples)} if samples else {})


def _inspect_table(table: Table[Any]) -> dict[str, Any]:
    shards, provenance = list(table.entries()), table.provenance() or {}
    summary: dict[str, Any] = {"shards": len(shards)}
    summary |= {key: provenance[key] for key in MADE_BY if key in provenance}
    if (audit := table.audit()) is not None:
        summary["audit"] = audit.model_dump()
    return summary | {name: distribution.summary() for name, distribution in distributions_of(table).items()}


def distributions_of(table: Table[Any]) -> dict[str, Distribution]:
    """The measures of a table's rows by their names, over all shards that are committed; one in memory at a time.

    Raises:
        DataError, MismatchError: as when a shard is read, and where a value cannot be.
    """
    shards, by_text = list(table.entries()), (table.provenance() or {}).get("scored") == "text"
    distributions: dict[str, Distribution] = {}
    names = table.record.schema.names
    columns = [*columns_of(names, *READ), *columns_of(names, Kind.TEXT, sides=SIDES)]
    with progress(f"inspect {table.name}", sum(map(table.plan.rows_of, shards)), "row") as shown:
        for shard in shards:
            rows = table.read_arrow(shard, columns)
            check_rows(rows, table.path(shard), by_text=by_text)
            for name, values in _measures(rows, table).items():
                distributions.setdefault(name, Distribution()).add(values)
            shown.advance(len(rows))
    return distributions


def _draw_pairs(dataset: Dataset, count: int) -> list[dict[str, Any]]:
    """Some of the latest pairs that are committed, in their order."""
    table = next((of.pairs(rounds[-1]) for of in dataset.students() if (rounds := of.rounds())), None)
    if table is None or not (shards := list(table.entries())):
        raise DataError(f"{dataset.root}: has no pairs to show; `dpkd-offline {PAIRS.command}` makes them")
    ends = list(accumulate(map(table.plan.rows_of, shards)))
    drawn = sorted(random.Random(SEED).sample(range(ends[-1]), min(count, ends[-1])))
    samples = []
    for place, of_shard in groupby(drawn, key=lambda number: bisect_right(ends, number)):
        shard, first = shards[place], ends[place] - table.plan.rows_of(shards[place])
        pairs = table.read_arrow(shard, [*SHOWN, *columns_of(table.record.schema.names, Kind.LOGPS)])
        for row in (number - first for number in of_shard):
            pair = pairs.slice(row, 1).to_pylist()[0]
            sample = {"table": table.name, "shard": shard, "row": row, **{name: pair[name] for name in SHOWN}}
            for side in SIDES:
                logps = pair[f"teacher_{side}_logps"]
                sample |= {f"{side}_tokens": len(logps), f"teacher_{side}_logp": sum(logps) / len(logps)}
            samples.append(sample)
    return samples


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
        models = table.get("teachers") or ([table["model"]] if "model" in table else [])
        model = "".join(f", {_rows(one)}{one['name']} ({one['revision'][:19]})" for one in models)
        engine = f", {table['engine']} {table['dtype']}" if "engine" in table else ""
        engine += f", quantised in {table['quantization']}" if "quantization" in table else ""
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
    lines += [line for sample in inspection.get("samples", ()) for line in _sample_lines(sample)]
    return "\n".join(lines)


def _rows(teacher: dict[str, Any]) -> str:
    """How many rows are of one of several teachers."""
    return f"{teacher['rows']} rows of " if "rows" in teacher else ""


def _sample_lines(sample: dict[str, Any]) -> Iterator[str]:
    """A pair for a terminal, its texts further in than any line of ours."""
    yield ""
    yield f"{sample['table']}, shard {sample['shard']}, row {sample['row']}: {in_a_line(sample['id'])}"
    yield from _text_lines("x", sample["prompt"])
    if sample["reference"] is not None:
        yield from _text_lines("reference", sample["reference"])
    for side, symbol in zip(SIDES, ("y_t", "y_s"), strict=True):
        cut_off = ", cut off" if sample[f"{side}_finish_reason"] == "length" else ""
        about = f"{sample[f'{side}_tokens']} tokens{cut_off}, teacher {sample[f'teacher_{side}_logp']:.3f} nats a token"
        yield from _text_lines(f"{symbol} ({about})", sample[side])


def _text_lines(title: str, text: str) -> Iterator[str]:
    yield f"  {title}:"
    rest = len(text) - MOST_LETTERS
    shown = text if rest <= 0 else f"{text[:MOST_LETTERS]}… ({rest:,} more characters)"
    yield textwrap.indent("\n".join(visible(shown).splitlines()), "    ", lambda line: True)


def _shown(measure: str, summary: dict[str, float]) -> str:
    if measure in ("identical", "of an earlier round") or measure.endswith(("truncated", "not exact")):
        return f"{100 * summary['mean']:8.1f} %"
    spread = f"5 % {summary['p5']:.4g} · median {summary['median']:.4g} · 95 % {summary['p95']:.4g}"
    return f"{summary['mean']:8.4g}   {spread}"
