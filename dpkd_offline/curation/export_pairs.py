"""`export`: scored pairs for TRL, with the code that trains on them; or as JSON lines."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError, MismatchError, UsageError
from dpkd_offline.common.files import disk_errors, fsync, opened, read_model, write_atomically, write_json
from dpkd_offline.common.hashing import fingerprint
from dpkd_offline.common.markdown import inline_code
from dpkd_offline.common.ownership import CLAIM, Claim, claim_of, locked, require_ours
from dpkd_offline.common.results import Result
from dpkd_offline.config.data import ExportConfig
from dpkd_offline.dataset.catalog import only_the_first
from dpkd_offline.dataset.columns import Lists
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.layout import PAIRS
from dpkd_offline.dataset.row_checks import check_rows, check_same
from dpkd_offline.dataset.schema import SIDES, Kind, PreferencePair, columns_of
from dpkd_offline.dataset.table import Table
from dpkd_offline.dataset.writing import ROW_GROUP_ROWS

TRL_CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*-{id}.parquet
tags:
- dpkd-offline
- knowledge-distillation
- preference
---

# Preference pairs with a teacher's log-probs

{rows} pairs for TRL's `DPOTrainer` (1.16), exported by dpkd-offline {version}. Prompts come from {source}, template
{template}, tokenizer {tokenizer}. The log-probs are those of {teacher} ({revision}), by {engine} in {dtype}.

| column | what |
|---|---|
| `prompt`, `chosen`, `rejected` | text, for people |
| `prompt_ids`, `chosen_ids`, `rejected_ids` | the token ids to train on; a response that ended has its EOS |
| `ref_chosen_logps`, `ref_rejected_logps` | the teacher's log p(y\\|x) in nats: sums over the response |

```python
from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

pairs = load_dataset("THIS_FOLDER", split="train")
config = DPOConfig(
    output_dir="my-student",
    loss_type=["sigmoid_norm"],  # eq. 9 of DPKD, with the teacher as reference
    beta=0.1,
    max_length=None,  # the sums are over whole responses; the longest sequence has {longest} tokens
)
# TRL makes new token ids from the text of the dataset that it is built with: of one row here, which is not used.
trainer = DPOTrainer("MODEL", args=config, train_dataset=pairs.select([0]))
trainer.train_dataset = pairs
trainer.precompute_ref_logps = True  # they are in the columns
trainer.ref_model = None  # a second copy of the student, which is not needed
trainer.train()
trainer.save_model()
```

`MODEL` needs the tokenizer above. Trained on the text alone, TRL would see other tokens than these: it joins prompt and
response before it cuts them into tokens, and closes every response by an EOS, also one that was cut off, which
{cut_off} of these pairs hold.
"""
TEXT_AND_IDS = [
    name for kind in (Kind.ID, Kind.TEXT, Kind.TOKEN_IDS) for name in columns_of(PreferencePair.schema.names, kind)
]
LINE = [
    *("id", "prompt", "messages", "chosen", "rejected", "reference", "chosen_finish_reason", "rejected_finish_reason"),
    *("teacher_chosen_logp", "teacher_rejected_logp", "chosen_tokens", "rejected_tokens"),
]


KIND = "TRL export"  # what a folder is
DESCRIPTION = "dpkd_offline.json"  # in it: who made the numbers


@dataclass
class _Counts:
    """What goes out, counted up shard by shard."""

    rows: int = 0
    dropped: int = 0
    cut_off: int = 0  # of the rows, those with a response that was cut off by its length
    longest: int = 0  # tokens of prompt plus response


@dataclass(frozen=True)
class ExportResult(Result):
    """The file or folder of the pairs that went out; `-` where they went to stdout."""

    rows: int
    dropped: int  # since a response was cut off by its length
    cut_off: int  # of the rows, those with such a response
    to_stdout: bool


def export_pairs(config: ExportConfig) -> ExportResult:
    """Write the pairs of a round for other programs, a shard in memory at a time.

    A file or folder that holds just these pairs is left as it is.

    Raises:
        DataError: there are no such pairs, none is left, or a value of them is wrong.
        MismatchError: the folder holds the pairs of another export.
        OutputBusy: another command writes the output now.
        StorageError: the disk is full or fails; the same call goes on.
        UsageError: the output is there already and is not ours to replace.
    """
    dataset = Dataset.open(config.dataset, config.student_name)
    dataset.require_student()
    rounds = dataset.rounds()
    if not rounds:
        dataset.require_round(PAIRS, 0)
        raise DataError(f"{dataset.root / 'pairs'}: no pairs yet; run `dpkd-offline score-teacher` first")
    round = rounds[-1] if config.round is None else config.round
    dataset.require_round(PAIRS, round)
    if others := only_the_first(dataset):
        console.info(others)
    table, counts = dataset.pairs(round), _Counts()
    table.require_complete(f"dpkd-offline score-teacher --round {round}")
    lines = (line for _, rows in _wanted(dataset, table, config, counts) for line in _lines(rows))
    to_stdout = config.format == "jsonl" and str(config.output) == "-"
    if to_stdout:
        for line in lines:
            sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
    elif config.format == "jsonl":
        with _owned(config.output):
            _write_file(config.output, lines)
    else:
        with _owned(config.output):
            counts = _write_folder(dataset, table, config, counts)
    dropped = f"; {counts.dropped} with a response that was cut off are left out" if counts.dropped else ""
    console.info(f"export: {counts.rows} pairs of round {round}{dropped}")
    return ExportResult(config.output, counts.rows, counts.dropped, counts.cut_off, to_stdout)


def _owned(output: Path) -> AbstractContextManager[None]:
    """Keep a file or folder, which appears when it is whole, for this process."""
    return locked(output.with_name(f".{output.name}.lock"), output, "export")


def _write_file(path: Path, lines: Iterable[bytes]) -> None:
    """Write a new file, or make sure that one which is there already holds just these lines."""
    if path.is_dir():
        raise UsageError(f"{path}: is a folder; name a file")
    if not path.exists():
        with _appearing(path) as temporary, temporary.open("xb") as file:
            file.writelines(lines)
        return
    with opened(path) as there:
        if any(there.read(len(line)) != line for line in lines) or there.read(1):
            raise UsageError(f"{path}: is there already, and not this export; name a new file")
    console.info(f"{path}: is there already")


def _write_folder(dataset: Dataset, table: Table[PreferencePair], config: ExportConfig, counts: _Counts) -> _Counts:
    """Write a new folder for TRL, or make sure that one which is there already is of just these pairs."""
    id_, path = _id(table, config), config.output
    require_ours(path, KIND, known=())
    if (claim := claim_of(path)) is not None:
        if claim.run != id_:
            raise MismatchError(f"{path}: holds the export of other pairs; name a new folder")
        console.info(f"{path}: is there already")
        return read_model(path / DESCRIPTION, _Counts)
    with _appearing(path) as folder:
        write_json(folder / CLAIM, Claim(kind=KIND, run=id_).model_dump())
        _write_for_trl(folder, id_, _wanted(dataset, table, config, counts))
        _describe(folder, id_, dataset, table, config, counts)
    return counts


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A place to make a file or folder at, which gets the name `path` when it is whole, and is gone otherwise."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            fsync(temporary)
            temporary.replace(path)
        finally:
            for stale in path.parent.glob(f".{path.name}.*.tmp"):  # also of exports that were killed
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)
        fsync(path.parent)


def _wanted(
    dataset: Dataset, table: Table[PreferencePair], config: ExportConfig, counts: _Counts
) -> Iterator[tuple[int, pa.Table]]:
    """Each shard's pairs that go out, with columns for sums, numbers of tokens and the prompts' messages."""
    by_text = table.require_provenance()["scored"] == "text"
    with console.progress("export", table.plan.rows, "row") as shown:
        for shard in range(table.plan.count):
            rows, prompts = table.read_arrow(shard), dataset.prompts.read_arrow(shard)
            check_rows(rows, table.path(shard), by_text=by_text)
            check_same(rows, "id", prompts["id"], table.path(shard), "the prompt in this row")
            rows = _with_sums(rows).append_column("messages", prompts["messages"])
            cut = pc.or_(*(pc.equal(rows[f"{side}_finish_reason"], "length") for side in SIDES))
            shown.advance(len(rows))
            if config.truncated == "drop":
                counts.dropped += pc.sum(cut).as_py()
                rows = rows.filter(pc.invert(cut))
            else:
                counts.cut_off += pc.sum(cut).as_py()
            if not len(rows):
                continue
            counts.rows += len(rows)
            responses = pc.max_element_wise(*(rows[f"{side}_tokens"] for side in SIDES))
            prompt_tokens = pc.list_value_length(rows["prompt_ids"])
            counts.longest = max(counts.longest, pc.max(pc.add(responses, prompt_tokens)).as_py())
            yield shard, rows
    if not counts.rows:
        raise DataError(
            f"{table.folder}: no pair is left: {counts.dropped} of {table.plan.rows} dropped: cut off by length "
            f"(--truncated drop)"
        )


def _with_sums(rows: pa.Table) -> pa.Table:
    """Pairs with the teacher's log p(y|x) of each response, in nats, and its number of tokens."""
    for side in SIDES:
        sums, tokens = Lists(rows[f"teacher_{side}_logps"]).sums(), Lists(rows[f"{side}_ids"]).lengths
        rows = rows.append_column(f"teacher_{side}_logp", pa.array(sums))
        rows = rows.append_column(f"{side}_tokens", pa.array(tokens))
    return rows


def _lines(rows: pa.Table) -> Iterator[bytes]:
    for row in rows.select(LINE).to_pylist():
        if not row["messages"]:
            del row["messages"]  # the source gave text
        yield (json.dumps(row, ensure_ascii=False) + "\n").encode()


def _id(table: Table[PreferencePair], config: ExportConfig) -> str:
    """A name for exactly these rows. `datasets` takes files from its cache by the folder's name and the patterns in its
    card, whatever the files hold: so that no other export is taken for this one, the pattern has this in it."""
    return fingerprint([[entry.sha256 for entry in table.entries().values()], config.truncated])[:16]


def _write_for_trl(folder: Path, id_: str, shards: Iterable[tuple[int, pa.Table]]) -> None:
    for shard, rows in shards:
        out = rows.select(TEXT_AND_IDS)
        for side in SIDES:
            out = out.append_column(f"ref_{side}_logps", rows[f"teacher_{side}_logp"])
        buffer = pa.BufferOutputStream()
        pq.write_table(out, buffer, compression="zstd", row_group_size=ROW_GROUP_ROWS, write_page_checksum=True)
        write_atomically(folder / "data" / f"train-{shard:05d}-{id_}.parquet", buffer.getvalue().to_pybytes())


def _describe(
    folder: Path, id_: str, dataset: Dataset, table: Table[PreferencePair], config: ExportConfig, counts: _Counts
) -> None:
    """Write dpkd_offline.json, which says who made the numbers, and README.md, which says what to do with them."""
    provenance = table.require_provenance()
    description = {"version": version("dpkd-offline"), "teacher": provenance["model"]}
    description |= {key: provenance.get(key) for key in ("student", "engine", "dtype", "versions", "round")}
    description |= {"prompt_set": dataset.prompt_set.as_dict(), **asdict(counts), "truncated": config.truncated}
    write_json(folder / DESCRIPTION, description)
    write_atomically(folder / "README.md", _card(id_, dataset, provenance, counts).encode())


def _card(id_: str, dataset: Dataset, provenance: Mapping[str, Any], counts: _Counts) -> str:
    """The code that trains on the pairs, and where they are from; `provenance` is theirs."""
    tokens = dataset.student_prompts.provenance() or dataset.prompt_set.as_dict()  # as the student sees the prompts
    return TRL_CARD.format(
        id=id_,
        version=version("dpkd-offline"),
        rows=counts.rows,
        source=inline_code(dataset.prompt_set.source),
        template=inline_code(tokens["template"]),
        tokenizer=inline_code(tokens["tokenizer"]),
        teacher=inline_code(provenance["model"]["name"]),
        revision=inline_code(provenance["model"]["revision"][:19]),
        engine=inline_code(provenance["engine"]),
        dtype=inline_code(provenance["dtype"]),
        longest=counts.longest,
        cut_off=counts.cut_off,
    )
