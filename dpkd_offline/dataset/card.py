"""The card: README.md of a dataset, for people, for the Hub and for `datasets.load_dataset`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpkd_offline.common.files import read_bounded, sweep_folder, write_atomically
from dpkd_offline.common.hashing import fingerprint
from dpkd_offline.common.markdown import inline_code, markdown_table
from dpkd_offline.dataset.catalog import TableSummary, related_table, samples_of_pairs, summarize_tables
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.layout import KINDS, PAIRS, STUDENT_RESPONSES, TEACHER_RESPONSES, TOP_K, TableKind
from dpkd_offline.dataset.provenance import teachers_of
from dpkd_offline.dataset.schema import SIDES, Kind, Side, column_of, columns_of

SYMBOLS: dict[Side | None, str] = {"prompt": "x", "response": "y", "chosen": "y_t", "rejected": "y_s"}
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")
HUB_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
CARD = """---
{front}
---

# {title}

Data for Direct Preference Knowledge Distillation ([DPKD, arXiv 2406.19774](https://arxiv.org/abs/2406.19774)): for each
of {rows} prompts x a response y_t of a teacher and a response y_s of a student, and the teacher's log-probs log p of
both, token by token. That is all that the training of a student needs of the teacher, computed once. Token ids are the
truth, text is there for people; log-probs are natural logarithms. Row k of every table's shard i is the same prompt.

Load a table, all rounds of it: `datasets.load_dataset("THIS_FOLDER", "pairs", split="train")`

Train a student on it: `dpkd-offline train --dataset THIS_FOLDER --student MODEL --output FOLDER`

## Tables

{tables}

{meanings}

## Numbers

Means over rows. Log-probs are means over a response's tokens in the model's own spelling, in nats; the sampler's are at
temperature 1.

{numbers}
{notes}
## Who made what

{makers}

All settings are in `_table.json` of each folder and in `dataset.json`.

## Licences

{licenses}

What a model wrote, and what it says of other responses, is under the terms of that model, which may also say what may
be trained on it. These are the licences that the models' own cards named when the tables were begun.
"""


def write_card(dataset: Dataset) -> None:
    """Write what the dataset holds now. A pure function of its other files, so that any worker may write it.

    Raises:
        DataError, MismatchError: one of these files is not what it should be.
    """
    root = dataset.root
    assert isinstance(root, Path), f"{root}: what is at a URL is read only"
    path, before = root / "README.md", None
    while True:  # again after writing, since that may have put an older card in place of another worker's
        tables = _in_order(summarize_tables(dataset))
        text, whole = _card(dataset, tables).encode(), {summary.name: summary.complete for summary in tables}
        if path.is_file() and path.stat().st_size == len(text) and read_bounded(path, len(text)) == text:
            break
        if whole == before and not all(whole.values()):
            break  # the card lacks some shards at most, and whoever commits the last one writes the next card
        write_atomically(path, text)
        before = whole
    sweep_folder(root)


def _in_order(tables: Iterable[TableSummary]) -> list[TableSummary]:
    """One sample after another, and of each one student; the pairs first, since the first table is what `load_dataset`
    takes by default."""

    def place(summary: TableSummary) -> tuple[int, str, bool, int]:
        table = summary.table
        return table.sample, table.student or "", table.kind is not PAIRS, KINDS.index(table.kind)

    return sorted(tables, key=place)


def _card(dataset: Dataset, tables: Sequence[TableSummary]) -> str:
    teachers, students = (_models(tables, kind) for kind in (TEACHER_RESPONSES, STUDENT_RESPONSES))
    licenses = _licenses(dataset, tables)
    kinds = dict.fromkeys(summary.table.kind for summary in tables)
    further, samples = (any(getattr(of.table, of_what) for of in tables) for of_what in ("student", "sample"))
    notes = [line for summary in tables for line in (*_notes(summary), *_bytes_of_top_k(summary, tables))]
    who = (
        " and ".join(map(inline_code, names)) or a for names, a in ((teachers, "a teacher"), (students, "a student"))
    )
    return CARD.format(
        front=_front(dataset, tables, teachers, students, [license for _, license in licenses]),
        title="Responses of {} and {}, with the teacher's log-probs".format(*who),
        rows=f"{dataset.plan.rows:,}",
        tables=markdown_table(("config", "folder", "rows", "shards", "size"), list(map(_extent, tables))),
        meanings="\n".join(
            [
                *(f"- `{kind.name}`: {kind.meaning}" for kind in kinds),
                *(["- with a name behind it: the same of a further student"] if further else []),
                *(["- with `sample-1` and so on behind it: other responses to the same prompts"] if samples else []),
            ]
        ),
        numbers=markdown_table(
            ("folder", "of", "tokens", "truncated", "teacher's log-prob", "sampler's log-prob"),
            [line for summary in tables for line in _numbers(summary)],
        ),
        notes="\n".join(["", *notes, ""] if notes else [""]),
        makers="\n".join([_source(dataset), *(_maker(summary) for summary in tables if summary.provenance)]),
        licenses=markdown_table(
            ("of", "licence"), [(of, inline_code(name) if name else "not said") for of, name in licenses]
        ),
    )


def _front(
    dataset: Dataset,
    tables: Sequence[TableSummary],
    teachers: Sequence[str],
    students: Sequence[str],
    licenses: Sequence[str | None],
) -> str:
    """Metadata for the Hub and `datasets`, which compares the rows that it finds with those that it is told of: so of a
    table in progress it is told nothing but where the files are."""
    from datasets import DatasetInfo, Features
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCardData

    by_config: dict[str, list[TableSummary]] = {}
    for summary in tables:
        by_config.setdefault(summary.config, []).append(summary)
    configs, infos = [], DatasetInfosDict()
    for config, rounds in by_config.items():
        kind, student = rounds[0].table.kind, rounds[0].table.student
        if any(summary.entries for summary in rounds):
            # `datasets` keeps what it has read under the folder's name and this, whatever the files hold: so that the
            # shards of another dataset are not taken for these, their hashes have a part in it.
            shards = fingerprint([entry.sha256 for summary in rounds for entry in summary.entries])[:16]
            pattern = kind.home(student, rounds[0].table.sample) + ("/*/*.parquet" if kind.rounds else "/*.parquet")
            files = [{"split": "train", "path": pattern}]
            configs.append({"config_name": config, "description": f"shards {shards}", "data_files": files})
        if all(summary.complete for summary in rounds):
            size = sum(summary.stats.arrow_bytes for summary in rounds)
            infos[config] = DatasetInfo(
                features=Features.from_arrow_schema(rounds[0].table.schema),
                splits=[{"name": "train", "num_bytes": size, "num_examples": sum(summary.rows for summary in rounds)}],
                download_size=sum(summary.bytes for summary in rounds),
                dataset_size=size,
            )
    known = sorted({name if HUB_LICENSE.fullmatch(name) else "other" for name in licenses if name})
    data = DatasetCardData(
        pretty_name=f"Responses of {' and '.join(teachers) or 'a teacher'} and {' and '.join(students) or 'a student'}",
        license=None if None in licenses else known[0] if len(known) == 1 else known,
        task_categories=["text-generation"],
        size_categories=[SIZES[min(max(0, len(str(dataset.plan.rows)) - 3), len(SIZES) - 1)]],
        tags=["dpkd-offline", "knowledge-distillation", "preference", "synthetic"],
        teacher=teachers or None,
        student=students or None,
        configs=configs,
    )
    infos.to_dataset_card_data(data)
    return data.to_yaml()


def _models(tables: Sequence[TableSummary], kind: TableKind[Any]) -> list[str]:
    """The names of the models that made the dataset's own tables of a kind."""
    provenances = [
        summary.provenance for summary in tables if summary.table.kind is kind and summary.table.student is None
    ]
    return list(dict.fromkeys(name for provenance in provenances for name in teachers_of(provenance).values()))


def _licenses(dataset: Dataset, tables: Sequence[TableSummary]) -> list[tuple[str, str | None]]:
    """What is in the dataset that has a licence, and which."""
    licenses = [(f"prompts from {inline_code(dataset.prompt_set.source)}", dataset.prompt_set.license)]
    for summary in tables:
        if "model" in summary.provenance:
            of = f"responses of {inline_code(summary.provenance['model']['name'])}"
            licenses.append((of, summary.provenance.get("license")))
    return list(dict.fromkeys(licenses))


def _extent(summary: TableSummary) -> tuple[str, ...]:
    from datasets.utils.py_utils import size_str

    planned = summary.table.plan.count
    return (
        inline_code(summary.config),
        inline_code(summary.name),
        f"{summary.rows:,}",
        str(planned) if summary.complete else f"{len(summary.entries)} of {planned}, in progress",
        size_str(summary.bytes) if summary.bytes else "",
    )


def _numbers(summary: TableSummary) -> Iterator[tuple[str, ...]]:
    """A line for each text of a row: tokens, how many are cut off, log-probs of the teacher and of who sampled."""
    record, stats, rows = summary.table.record, summary.stats, summary.rows
    for column in columns_of(record.schema.names, Kind.TOKEN_IDS):
        side = record.columns[column].side
        if column not in stats.tokens or (side == "prompt" and summary.table.kind is PAIRS):
            continue  # no shard is committed; or they are those of the table of prompts
        finish = column_of(record, Kind.FINISH_REASON, side)
        logps = [column_of(record, Kind.LOGPS, side, model) for model in ("teacher", "behavior")]
        yield (
            inline_code(summary.name),
            SYMBOLS[side],
            f"{stats.tokens[column] / rows:.1f}",
            f"{stats.truncated[finish] / rows:.1%}" if finish else "",
            *(f"{stats.row_means[name] / rows:.3f}" if name in stats.row_means else "" for name in logps),
        )


def _notes(summary: TableSummary) -> Iterator[str]:
    name, provenance = inline_code(summary.name), summary.provenance
    means = {column: total / summary.rows for column, total in summary.stats.row_means.items()}
    if {"teacher_chosen_logps", "teacher_rejected_logps"} <= means.keys():
        margin = means["teacher_chosen_logps"] - means["teacher_rejected_logps"]
        yield f"- {name}: the margin log p(y_t|x)/|y_t| - log p(y_s|x)/|y_s| is {margin:.3f} nats"
    if (share := provenance.get("share") or 1) < 1:
        yield f"- {name}: {share:.3g} of the prompts, by draw, are answered anew, the others as before"
    if (before := provenance.get("reused_from")) is not None:
        whose = provenance.get("reused_student")
        of = "" if whose is None else f" of the student {inline_code(whose)}" if whose else " of the first student"
        yield f"- {name}: what round {before}{of} has scored is taken over from there"
    for symbol, sample in zip(("y_t", "y_s"), samples_of_pairs(provenance), strict=True):
        if summary.table.kind is PAIRS and summary.table.sample and not sample:
            yield f"- {name}: {symbol} is that of the first sample, and scored there"
    if provenance.get("scored") == "text" and summary.rows:
        chosen, rejected = (f"{summary.stats.exact[f'{side}_exact'] / summary.rows:.1%}" for side in SIDES)
        yield (
            f"- {name}: the teacher has other tokens than the student and scored the text, with nothing lost on the "
            f"way in {chosen} of y_t and {rejected} of y_s"
        )
    if {"chosen_top_mass", "rejected_top_mass"} <= means.keys():
        chosen, rejected = (f"{means[f'{side}_top_mass']:.1%}" for side in SIDES)
        yield f"- {name}: has {chosen} of the probability at a position of y_t, {rejected} at one of y_s"
    if audit := summary.table.audit():
        yield (
            f"- {name}, audit: {audit.rows} rows scored again with {inline_code(audit.against.engine)} in "
            f"{inline_code(audit.against.dtype)}: a stored log-prob is off by {audit.gap_abs_mean:.4f} nats, a margin "
            f"by {audit.margin_gap_abs_mean:.4f}"
        )


def _bytes_of_top_k(summary: TableSummary, tables: Sequence[TableSummary]) -> Iterator[str]:
    """What the likeliest tokens take for each token of a response, and what half precision may have moved them by."""
    if summary.table.kind is not TOP_K or not summary.complete:
        return
    pairs, stats = related_table(summary.table, PAIRS), summary.stats
    if not (tokens := next((of.stats.tokens for of in tables if of.name == pairs and of.complete), {})):
        return
    words = f"{summary.bytes / sum(tokens[f'{side}_ids'] for side in SIDES):.1f} bytes for each token of a response"
    if count := sum(stats.halves.values()):
        most, mean = max(stats.rounding_max.values()), sum(stats.rounding_sum.values()) / count
        words += f"; log-probs are in half precision, off by {most:.2g} nats at most, {mean:.2g} on average at most"
    yield f"- {inline_code(summary.name)}: {words}"


def _source(dataset: Dataset) -> str:
    prompts = dataset.prompt_set
    counts = ", ".join(f"{_words(name)} {count}" for name, count in prompts.rows.items() if count)
    return (
        f"- `prompts`: from {inline_code(prompts.source)} ({counts}), template {inline_code(prompts.template)}"
        f"{template_options(prompts.as_dict())}, "
        f"tokenizer {inline_code(prompts.tokenizer)}"
    )


def template_options(made: Mapping[str, Any]) -> str:
    """What a template was given besides the prompts' rows."""
    words = [" of a file"] if made.get("chat_template") else []
    words += [f" with {inline_code(json.dumps(made['template_args']))}"] if made.get("template_args") else []
    words += [f", system turn {inline_code(made['system'])}"] if made.get("system") else []
    return "".join(words)


def _words(name: str) -> str:
    """What is counted, by the name that it has in a report of ours; another name as it is."""
    return name.replace("_", " ") if re.fullmatch("[a-z_]+", name) else inline_code(name)


def _maker(summary: TableSummary) -> str:
    provenance, words = summary.provenance, [f"- {inline_code(summary.name)}:"]
    if (rule := provenance.get("rule", {})).get("pairs"):
        y_t, y_s = (rule["samples"].get(role, 1) for role in ("teacher", "student"))
        by = f"the scores in {inline_code(rule['scores']['file'])}" if rule.get("scores") else "the teacher's log-prob"
        words.append(f"`subset`: pairs {inline_code(rule['pairs'])} of {y_t} y_t and {y_s} y_s of each prompt by {by},")
    elif parts := provenance.get("parts"):
        rows = " and ".join(str(part["rows"]) for part in parts)
        words.append(f"{inline_code(provenance['stage'])} of {rows} rows,")
    if model := provenance.get("model"):
        for one in provenance.get("teachers") or [model]:
            words.append(f"model {inline_code(one['name'])}, revision {inline_code(one['revision'][:19])},")
            words += [f"{one['rows']} rows,"] if "rows" in one else []
        words.append(f"engine {inline_code(provenance['engine'])} in {inline_code(provenance['dtype'])},")
    if "column" in provenance:
        words.append(
            f"imported from {inline_code(provenance.get('source'))}, column {inline_code(provenance['column'])}, "
            f"whoever wrote it,"
        )
    words += [f"{inline_code(f'{name} {version}')}," for name, version in provenance.get("versions", {}).items()]
    keys = ("template", "tokenizer", "scored", "seed", "top_k", "top_mass", "quantization")
    settings = {**(provenance.get("sampling") or {}), **{key: provenance[key] for key in keys if key in provenance}}
    for key, value in settings.items():
        words.append(f"{key} {inline_code(value)}{template_options(provenance) if key == 'template' else ''},")
    return " ".join(words).rstrip(",")
