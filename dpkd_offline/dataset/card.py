"""Cards: README.md of a dataset, for people, for the Hub and for `datasets.load_dataset`, and that of a student."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from dpkd_offline.common.files import find_json, sweep_folder, write_atomically
from dpkd_offline.common.hashing import fingerprint
from dpkd_offline.dataset.catalog import TableSummary, summarize_tables
from dpkd_offline.dataset.dataset import Dataset

MEANINGS = {  # of the kinds of tables: what a row is
    "pairs": "all that `train` reads: x, y_t, y_s, and the teacher's log p of each of their tokens",
    "prompts": "x: messages, the text after the template, its tokens, and good answers where known",
    "student_prompts": "x in the tokens of a student that has another tokenizer",
    "teacher_responses": "y_t, sampled from the teacher",
    "student_responses": "y_s, sampled from the student, with the student's log-probs",
    "top_k": "the teacher's likeliest tokens at each position of y_t and y_s",
}
NUMBERS = {  # of a column of tokens: what they are; finish reasons, log-probs of the teacher and of who sampled
    "prompt_ids": ("x", "", "", ""),
    "response_ids": ("y", "finish_reason", "", "logps"),
    "chosen_ids": ("y_t", "chosen_finish_reason", "teacher_chosen_logps", ""),
    "rejected_ids": ("y_s", "rejected_finish_reason", "teacher_rejected_logps", "behavior_rejected_logps"),
}
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
    """Say what the dataset holds now. A pure function of its other files, so that any worker may write it.

    Raises:
        DataError: one of these files is not what it should be.
    """
    root = dataset.root
    assert isinstance(root, Path), f"{root}: what is at a URL is read only"
    path, before = root / "README.md", None
    while True:  # again after writing, since that may have put an older card in place of another worker's
        tables = summarize_tables(dataset, root)
        text, whole = _card(dataset, tables).encode(), {table.name: table.complete for table in tables}
        if path.exists() and path.read_bytes() == text:
            break
        if whole == before and not all(whole.values()):
            break  # the card lacks some shards at most, and whoever commits the last one writes the next card
        write_atomically(path, text)
        before = whole
    sweep_folder(root)


def _card(dataset: Dataset, tables: Sequence[TableSummary]) -> str:
    teachers, students = (_models(tables, kind) for kind in ("teacher_responses", "student_responses"))
    licenses = _licenses(dataset, tables)
    further = any(table.config != table.kind for table in tables)
    notes = [line for table in tables for line in _notes(table)]
    who = (" and ".join(map(_code, names)) or a for names, a in ((teachers, "a teacher"), (students, "a student")))
    return CARD.format(
        front=_front(dataset, tables, teachers, students, [license for _, license in licenses]),
        title="Responses of {} and {}, with the teacher's log-probs".format(*who),
        rows=f"{dataset.plan.rows:,}",
        tables=_grid([("config", "folder", "rows", "shards", "size"), *map(_extent, tables)]),
        meanings="\n".join(
            [
                *(f"- `{kind}`: {MEANINGS[kind]}" for kind in dict.fromkeys(table.kind for table in tables)),
                *(["- with a name behind it: the same of a further student"] if further else []),
            ]
        ),
        numbers=_grid(
            [
                ("folder", "of", "tokens", "truncated", "teacher's log-prob", "sampler's log-prob"),
                *(line for table in tables for line in _numbers(table)),
            ]
        ),
        notes="\n".join(["", *notes, ""] if notes else [""]),
        makers="\n".join([_source(dataset), *(_maker(table) for table in tables if table.made)]),
        licenses=_grid([("of", "licence"), *((of, _code(name) if name else "not said") for of, name in licenses)]),
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

    rounds: dict[str, list[TableSummary]] = {}
    for table in tables:
        rounds.setdefault(table.config, []).append(table)
    configs, infos = [], DatasetInfosDict()
    for config, those in rounds.items():
        if any(table.entries for table in those):
            # `datasets` keeps what it has read under the folder's name and this, whatever the files hold: so that the
            # shards of another dataset are not taken for these, their hashes have a part in it.
            shards = fingerprint([entry.sha256 for table in those for entry in table.entries])[:16]
            files = [{"split": "train", "path": those[0].files}]
            configs.append({"config_name": config, "description": f"shards {shards}", "data_files": files})
        if all(table.complete for table in those):
            size = sum(table.facts.arrow_bytes for table in those)
            infos[config] = DatasetInfo(
                features=Features.from_arrow_schema(those[0].record.schema),
                splits=[{"name": "train", "num_bytes": size, "num_examples": sum(table.rows for table in those)}],
                download_size=sum(table.bytes for table in those),
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


def _models(tables: Sequence[TableSummary], kind: str) -> list[str]:
    made = [table.made for table in tables if table.config == kind]
    return list(dict.fromkeys(said["model"]["name"] for said in made if "model" in said))


def _licenses(dataset: Dataset, tables: Sequence[TableSummary]) -> list[tuple[str, str | None]]:
    """What is in the dataset that has a licence, and which."""
    found = [(f"prompts from {_code(dataset.prompt_set.source)}", dataset.prompt_set.license)]
    for table in tables:
        if "model" in table.made:
            found.append((f"responses of {_code(table.made['model']['name'])}", table.made.get("license")))
    return list(dict.fromkeys(found))


def _extent(table: TableSummary) -> tuple[str, ...]:
    from datasets.utils.py_utils import size_str

    shards = str(table.shards) if table.complete else f"{len(table.entries)} of {table.shards}, in progress"
    return (
        _code(table.config),
        _code(table.name),
        f"{table.rows:,}",
        shards,
        size_str(table.bytes) if table.bytes else "",
    )


def _numbers(table: TableSummary) -> Iterator[tuple[str, ...]]:
    facts = table.facts
    for column, tokens in facts.tokens.items():
        of, finish, *logps = NUMBERS.get(column, (_code(column), "", "", ""))
        if table.kind != "pairs" or of != "x":
            truncated = f"{facts.truncated[finish] / table.rows:.1%}" if finish else ""
            means = (f"{facts.row_means[name] / table.rows:.3f}" if name in facts.row_means else "" for name in logps)
            yield _code(table.name), of, f"{tokens / table.rows:.1f}", truncated, *means


def _notes(table: TableSummary) -> Iterator[str]:
    means = {name: total / table.rows for name, total in table.facts.row_means.items()}
    if "teacher_chosen_logps" in means:
        margin = means["teacher_chosen_logps"] - means["teacher_rejected_logps"]
        yield f"- {_code(table.name)}: the margin log p(y_t|x)/|y_t| - log p(y_s|x)/|y_s| is {margin:.3f} nats"
    if (share := table.made.get("share") or 1) < 1:
        yield f"- {_code(table.name)}: {share:.3g} of the prompts, by draw, are answered anew, the others as before"
    if (before := table.made.get("reused_from")) is not None:
        yield f"- {_code(table.name)}: what round {before} has scored is taken over from there"
    if table.made.get("scored") == "text" and table.rows:
        chosen, rejected = (f"{table.facts.exact[f'{side}_exact'] / table.rows:.1%}" for side in ("chosen", "rejected"))
        yield (
            f"- {_code(table.name)}: the teacher has other tokens than the student and scored the text, with nothing "
            f"lost on the way in {chosen} of y_t and {rejected} of y_s"
        )
    if "chosen_top_mass" in means:
        chosen, rejected = (f"{means[f'{side}_top_mass']:.1%}" for side in ("chosen", "rejected"))
        yield f"- {_code(table.name)}: has {chosen} of the probability at a position of y_t, {rejected} at one of y_s"
    if audit := find_json(table.folder / "_audit.json"):
        yield (
            f"- {_code(table.name)}, audit: {audit['rows']} rows scored again with {audit['against']['engine']} in "
            f"{audit['against']['dtype']}: a stored log-prob is off by {audit['gap_abs_mean']:.4f} nats, a margin by "
            f"{audit['margin_gap_abs_mean']:.4f}"
        )


def _source(dataset: Dataset) -> str:
    said = dataset.prompt_set
    taken = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in said.rows.items() if count)
    return (
        f"- `prompts`: from {_code(said.source)} ({taken}), template {_code(said.template)}, tokenizer "
        f"{_code(said.tokenizer)}"
    )


def _maker(table: TableSummary) -> str:
    made, said = table.made, [f"- {_code(table.name)}:"]
    if parts := made.get("parts"):
        said.append(f"{_code(made['stage'])} of {' and '.join(str(part['rows']) for part in parts)} rows,")
    if model := made.get("model"):
        said.append(f"model {_code(model['name'])}, revision {_code(model['revision'][:19])},")
        said.append(f"engine {_code(made['engine'])} in {_code(made['dtype'])},")
    if "column" in made:
        said.append(f"imported from {_code(made.get('source'))}, column {_code(made['column'])},")
    said += [f"{_code(f'{name} {version}')}," for name, version in made.get("versions", {}).items()]
    settings = {key: made[key] for key in ("template", "tokenizer", "scored", "seed", "top_k") if key in made}
    said += [f"{key} {_code(value)}," for key, value in {**made.get("sampling", {}), **settings}.items()]
    return " ".join(said).rstrip(",")


def _grid(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns stand below each other in plain text too."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *rows[1:]])


def _code(value: object) -> str:
    """Any text as inline code in a line or a table: what would end these is shown as something that looks like it."""
    shown = "".join(letter if letter.isprintable() else " " for letter in str(value))
    return f"`{' '.join(shown.translate(str.maketrans('`|', chr(39) + chr(166))).split()) or '?'}`"
