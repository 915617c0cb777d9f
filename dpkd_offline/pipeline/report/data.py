"""What a page shows of a dataset: lengths, truncation, margins, duplicates. A shard is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpkd_offline.common.markdown import inline_code
from dpkd_offline.curation.inspect import Distribution, distributions_of
from dpkd_offline.dataset.catalog import begun_tables, summarize_tables
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.layout import PAIRS, PROMPTS, TOP_K
from dpkd_offline.dataset.table import Table as DatasetTable
from dpkd_offline.pipeline.report import figures
from dpkd_offline.pipeline.report.blocks import Block, Figure, Figures, Section, Table, Text

SIDES = {"prompt": "x", "response": "y", "chosen": "y_t", "rejected": "y_s"}
DROPPED = {
    "too_long": "too long",
    "short_reference": "with too short a reference",
    "duplicates": "duplicates",
    "malformed": "malformed",
}


def data_section(folder: Path) -> Section:
    """The tables of a dataset in numbers, and the latest pairs in figures.

    Raises:
        DataError, MismatchError: a file of the dataset is not what it should be.
    """
    dataset = Dataset.open(folder)
    tables = [table for table in begun_tables(dataset) if table.kind is not TOP_K]
    measures = {table.name: distributions_of(table) for table in tables}
    blocks: list[Block] = [Text(_prompts(dataset))]
    rows = [row for table in tables for row in _rows(table, measures[table.name])]
    titles = ["table", "of", "rows", "tokens, mean", "5 %", "median", "95 %", "cut off"]
    if rows:
        blocks.append(Table("Lengths in tokens", titles, rows))
    blocks += _pairs([table for table in tables if table.kind is PAIRS], measures)
    if shown := list(_figures(tables, measures)):
        blocks.append(Figures(shown))
    return Section("The data", blocks)


def data_lead(folder: Path) -> str:
    """What a dataset is, in a sentence, from the small files beside its shards.

    Raises:
        DataError, MismatchError: one of these files is not what it should be.
    """
    tables = [table for table in summarize_tables(Dataset.open(folder)) if table.entries]
    pairs = [table for table in tables if table.table.kind is PAIRS]
    latest = [table for table in pairs if table.table.student is None][-1:] or pairs[-1:]
    if not latest:
        rows = ", ".join(f"{inline_code(table.name)} {table.rows:,}" for table in tables)
        return f"No pairs are scored yet; rows that are there: {rows}."
    of = latest[0]
    means = [of.stats.row_means[f"teacher_{side}_logps"] / of.rows for side in ("chosen", "rejected")]
    cut_off = [of.stats.truncated[f"{side}_finish_reason"] / of.rows for side in ("chosen", "rejected")]
    count = f"{of.rows:,}" if of.complete else f"{of.rows:,} of {of.table.plan.rows:,}"
    return (
        f"{count} pairs. The teacher gives a token of its own responses y_t {means[0]:.2f} nats on average and one of "
        f"the student's y_s {means[1]:.2f}; {cut_off[0]:.0%} of y_t and {cut_off[1]:.0%} of y_s are cut off."
    )


def _prompts(dataset: Dataset) -> str:
    prompts = dataset.prompt_set
    dropped = [f"{prompts.rows[key]:,} {word}" for key, word in DROPPED.items() if prompts.rows.get(key)]
    read = f" Of {prompts.rows['rows']:,} rows" if "rows" in prompts.rows else " Of the rows that were read"
    left_out = f"{read}, these were left out: {', '.join(dropped)}." if dropped else f"{read}, none was left out."
    return (
        f"{dataset.plan.rows:,} prompts from {inline_code(prompts.source)}, rendered by template "
        f"{inline_code(prompts.template)} in the tokens of {inline_code(prompts.tokenizer)}.{left_out}"
    )


def _rows(table: DatasetTable[Any], measures: dict[str, Distribution]) -> Iterator[list[str]]:
    for side, symbol in SIDES.items():
        if (lengths := measures.get(f"{side} tokens")) is None:
            continue
        summary, cut_off = lengths.summary(), measures.get(f"{side} truncated")
        yield [
            inline_code(table.name),
            symbol,
            f"{sum(lengths.counts()[1]):,}",
            f"{summary['mean']:.1f}",
            *(f"{summary[name]:.0f}" for name in ("p5", "median", "p95")),
            "" if cut_off is None else f"{cut_off.summary()['mean']:.1%}",
        ]


def _pairs(tables: list[DatasetTable[Any]], measures: dict[str, dict[str, Distribution]]) -> Iterator[Block]:
    """What the teacher makes of the pairs, and which teach nothing."""
    rows = []
    for table in tables:
        if not (of := measures[table.name]):
            continue
        chosen, rejected, margin = (
            of[f"teacher {name} per token"].summary() for name in ("log p(y_t)", "log p(y_s)", "margin")
        )
        values, counts = of["teacher margin per token"].counts()
        against = sum(n for value, n in zip(values, counts, strict=True) if value < 0) / sum(counts)
        exact = [of[name].summary()["mean"] for name in ("chosen not exact", "rejected not exact") if name in of]
        rows.append(
            [
                inline_code(table.name),
                f"{chosen['mean']:.3f}",
                f"{rejected['mean']:.3f}",
                f"{margin['mean']:.3f}",
                f"{margin['p5']:.3f} to {margin['p95']:.3f}",
                f"{against:.1%}",
                f"{of['identical'].summary()['mean']:.1%}",
                f"{max(exact, default=0.0):.1%}",
            ]
        )
    if rows:
        titles = ["table", "log p(y_t)", "log p(y_s)", "margin", "margin, 5 % to 95 %", "y_s preferred", "y_t = y_s"]
        titles.append("not scored as sampled")
        yield Table("What the teacher makes of the pairs: means in nats a token, and shares of the pairs", titles, rows)


def _figures(tables: list[DatasetTable[Any]], measures: dict[str, dict[str, Distribution]]) -> Iterator[Figure]:
    prompts = next((measures[table.name] for table in tables if table.kind is PROMPTS), {})
    if (of := prompts.get("prompt tokens")) is not None:
        alt = f"Lengths of the prompts: {_spread(of)}"
        svg = figures.histogram_chart("prompt-lengths", alt, {"x": of.counts()}, x_label="tokens of a prompt")
        yield Figure(svg, "Lengths of the prompts", alt)
    pairs = [table for table in tables if table.kind is PAIRS and not table.sample and measures[table.name]]
    if not pairs:
        return
    of_first = [table for table in pairs if table.student is None]  # the others are of further students
    latest = measures[(of_first or pairs)[-1].name]
    lengths = {SIDES[side]: latest[f"{side} tokens"] for side in ("chosen", "rejected")}
    alt = "Lengths of the responses: " + "; ".join(f"{name} {_spread(of)}" for name, of in lengths.items())
    counts = {name: of.counts() for name, of in lengths.items()}
    svg = figures.histogram_chart("response-lengths", alt, counts, x_label="tokens of a response")
    yield Figure(svg, "Lengths of the teacher's responses y_t and the student's y_s", alt)
    margin = latest["teacher margin per token"]
    alt = f"The teacher's margin: {_spread(margin)}"
    svg = figures.histogram_chart("margins", alt, {"margin": margin.counts()}, x_label="nats a token")
    yield Figure(svg, "The teacher's margin, log p(y_t)/|y_t| − log p(y_s)/|y_s|: below 0 it prefers y_s", alt)


def _spread(of: Distribution) -> str:
    summary = of.summary()
    return f"mean {summary['mean']:.4g}, 5 % below {summary['p5']:.4g}, 5 % above {summary['p95']:.4g}"
