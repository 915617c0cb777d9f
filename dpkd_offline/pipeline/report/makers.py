"""Who made what, with which settings, as the files beside it say; and what each stage took."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from dpkd_offline.common.markdown import inline_code
from dpkd_offline.config.base import in_words
from dpkd_offline.dataset.catalog import summarize_tables
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.provenance import flat
from dpkd_offline.pipeline.report.blocks import Block, Fold, Section, Table, Text
from dpkd_offline.pipeline.report.run import Run, StageLine

REVISION = 19  # letters that tell two revisions apart: `sha256:` and twelve
LONGEST_VALUE = 200


def stages_section(stages: list[StageLine]) -> Section:
    """Time, tokens and memory of each stage, over all calls."""
    by_title: dict[str, list[StageLine]] = defaultdict(list)
    for line in stages:
        by_title[line.stage].append(line)
    total = sum(line.seconds for line in stages)
    memory = any(line.peak_memory for line in stages)
    titles = ["stage", "time", "share", "sequences", "tokens, at most", "tokens/s"] + ["peak memory"] * memory
    rows = []
    for title, lines in by_title.items():
        seconds, counted = sum(line.seconds for line in lines), [line for line in lines if line.tokens]
        tokens, busy = sum(line.tokens or 0 for line in counted), sum(line.seconds for line in counted)
        ended = "" if lines[-1].exit_code == 0 else f", ended with exit code {lines[-1].exit_code}"
        calls = f" ({len(lines)} calls)" if len(lines) > 1 else ""
        peak = max((line.peak_memory or 0 for line in lines), default=0)
        rows.append(
            [
                f"{title}{calls}{ended}",
                duration(seconds),
                f"{seconds / total:.0%}" if total else "",
                f"{sum(line.sequences or 0 for line in counted):,}" if counted else "",
                f"{tokens:,}" if counted else "",
                f"{tokens / busy:,.0f}" if busy else "",
                *([f"{peak / 2**30:.2f} GiB" if peak else ""] if memory else []),
            ]
        )
    rows.append(["all", duration(total), *[""] * (len(titles) - 2)])
    note = (
        "Time is of the whole process, with its start and the loading of the model. Tokens are counted as `--dry-run` "
        "counts them, responses as long as they may become; a stage that went on from an earlier call has no count."
    )
    if memory:
        note += " Memory is the most that its processes were seen to hold, without that of a GPU."
    table = Table("Stages in the order in which they first ran", titles, rows, strong=(len(rows) - 1,))
    return Section("Time, tokens and memory", [table, Text(note, quiet=True)])


def duration(seconds: float) -> str:
    """`9.5 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def makers_section(run: Run) -> Section | None:
    """The models behind each part of a run, and all settings; None where nothing says so."""
    rows = []
    by_settings: dict[str, list[str]] = defaultdict(list)  # what was made with the same
    for what, provenance, settings in _parts(run):
        model = _mapping(provenance.get("model") or provenance.get("student"))
        revision = str(model.get("revision", ""))[:REVISION]
        versions = ", ".join(f"{name} {version}" for name, version in _mapping(provenance.get("versions")).items())
        engine = " ".join(str(provenance[key]) for key in ("engine", "dtype") if provenance.get(key))
        cells = (str(model.get("name", "")), revision, engine, versions)
        rows.append([what, *(inline_code(cell) if cell else "" for cell in cells)])
        if settings:
            by_settings[json.dumps(settings, ensure_ascii=False, default=str)].append(what)
    if not rows:
        return None
    table = Table("Models and engines", ["what", "model", "revision", "engine and precision", "versions"], rows)
    folds = []
    for text, parts in by_settings.items():
        pairs = [[inline_code(name), inline_code(_value(value))] for name, value in flat(json.loads(text)).items()]
        folds.append(Fold(f"Settings of {in_words(parts)}", [Table("", ["setting", "value"], pairs)]))
    blocks: list[Block] = [table, *folds]
    return Section("Who made what", blocks)


def _parts(run: Run) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Of each part what it is, its provenance, and its settings."""
    if run.dataset is not None:
        for summary in summarize_tables(Dataset.open(run.dataset)):
            if summary.provenance:
                provenance = summary.provenance
                seed = {} if provenance.get("seed") is None else {"seed": provenance["seed"]}
                yield inline_code(summary.name), provenance, {**_mapping(provenance.get("config")), **seed}
    for training in run.trainings:
        record = training.record
        provenance = {"model": record.student if record else None, "dtype": training.settings.get("dtype")}
        yield f"the training of {inline_code(training.name)}", provenance, training.settings
    for name, evaluations in run.sets.items():
        for evaluation in evaluations:
            provenance = _mapping(evaluation.results.get("made"))
            settings = _mapping(provenance.get("settings"))
            of_set = f" on {inline_code(name)}" if name else ""
            provenance = {**provenance, "engine": settings.get("engine"), "dtype": settings.get("dtype")}
            yield f"the evaluation of {inline_code(evaluation.model)}{of_set}", provenance, settings
    if run.judge is not None:
        judge = _mapping(run.judge.made.get("judge"))
        yield "the judge", {"model": {"name": run.judge.judge, **judge}}, judge


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _value(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"
