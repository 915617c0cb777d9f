"""`export` and `import`: scored pairs for other programs, and preference sets of others as datasets."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import compress, islice
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerFast

from dpkd_offline import __version__, log
from dpkd_offline.card import trl_card, write_card
from dpkd_offline.checkpoint import eos_ids, load_tokenizer
from dpkd_offline.checks import check_rows, check_same
from dpkd_offline.columns import Lists
from dpkd_offline.config import ExportConfig, ImportConfig, Template, as_plain
from dpkd_offline.dataset import Dataset, PromptDigest, PromptSet
from dpkd_offline.errors import DataError, MismatchError, UsageError
from dpkd_offline.files import disk_errors, fsync, write_atomically, write_json
from dpkd_offline.generation import ROWS_AT_ONCE, describe_prompts
from dpkd_offline.pairs import SIDES
from dpkd_offline.prompts import PromptReport, Row, conversation, prompts_of, read_rows, source_name, template_name
from dpkd_offline.records import PreferencePair, Prompt, Response, to_table
from dpkd_offline.shards import ROW_GROUP_ROWS, ShardPlan, Table
from dpkd_offline.spool import Spool

# --- export ---------------------------------------------------------------------------------------------------------

TEXT_AND_IDS = ["id", "prompt", "chosen", "rejected", "prompt_ids", "chosen_ids", "rejected_ids"]
LINE = [
    *("id", "prompt", "messages", "chosen", "rejected", "reference", "chosen_finish_reason", "rejected_finish_reason"),
    *("teacher_chosen_logp", "teacher_rejected_logp", "chosen_tokens", "rejected_tokens"),
]


@dataclass
class _Exported:
    """What went out, counted up shard by shard."""

    rows: int = 0
    dropped: int = 0
    truncated: int = 0  # of the rows, those with a response that was cut off
    longest: int = 0  # tokens of prompt plus response


def export_pairs(config: ExportConfig) -> Path | None:
    """Write the pairs of a round for other programs, a shard in memory at a time; returns where, or None if to stdout.

    Raises:
        DataError: there are no such pairs, none is left, or a value of them is wrong.
        UsageError: the output is there already and is not ours to replace.
    """
    dataset = Dataset.open(config.dataset)
    rounds = dataset.rounds()
    if not rounds:
        raise DataError(f"{dataset.root / 'pairs'}: no pairs yet; run `dpkd-offline score-teacher` first")
    round = rounds[-1] if config.round is None else config.round
    table, done = dataset.pairs(round), _Exported()
    table.require_complete(f"dpkd-offline score-teacher --round {round}")
    shards = _wanted(dataset, table, config, done)
    to_stdout = config.format == "jsonl" and str(config.output) == "-"
    if to_stdout:
        _write_lines(sys.stdout.buffer, shards)
    elif config.format == "jsonl":
        if config.output.is_dir():
            raise UsageError(f"{config.output}: is a folder; name a file")
        with _appearing(config.output) as path, path.open("xb") as file:
            _write_lines(file, shards)
    else:
        if config.output.exists() and not (config.output.is_dir() and not any(config.output.iterdir())):
            raise UsageError(f"{config.output}: is there already; name a new folder")
        with _appearing(config.output) as folder:
            _write_for_trl(folder, shards)
            _describe(folder, dataset, table, config, done)
    dropped = f"; {done.dropped} with a response that was cut off are left out" if done.dropped else ""
    log.info(f"export: {done.rows} pairs of round {round}{dropped}")
    return None if to_stdout else config.output


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A place to make a file or folder at, which gets the name `path` when it is whole, and is gone otherwise."""
    making = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield making
            fsync(making)
            making.replace(path)
        finally:
            for left in path.parent.glob(f".{path.name}.*.tmp"):  # also by exports that were killed
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        fsync(path.parent)


def _wanted(
    dataset: Dataset, table: Table[PreferencePair], config: ExportConfig, done: _Exported
) -> Iterator[tuple[int, pa.Table]]:
    """Each shard's pairs that go out, with columns for sums, numbers of tokens and the prompts' messages."""
    with log.progress("export", table.plan.rows, "row") as shown:
        for shard in range(table.plan.count):
            rows, prompts = table.read_arrow(shard), dataset.prompts.read_arrow(shard)
            check_rows(rows, table.path(shard))
            check_same(rows, "id", prompts["id"], table.path(shard), "the prompt in this row")
            for side in SIDES:
                sums, tokens = Lists(rows[f"teacher_{side}_logps"]).sums(), Lists(rows[f"{side}_ids"]).lengths
                rows = rows.append_column(f"teacher_{side}_logp", pa.array(sums))
                rows = rows.append_column(f"{side}_tokens", pa.array(tokens))
            rows = rows.append_column("messages", prompts["messages"])
            cut = pc.or_(*(pc.equal(rows[f"{side}_finish_reason"], "length") for side in SIDES))
            shown.advance(len(rows))
            if config.truncated == "drop":
                done.dropped += pc.sum(cut).as_py()
                rows = rows.filter(pc.invert(cut))
            else:
                done.truncated += pc.sum(cut).as_py()
            if not len(rows):
                continue
            done.rows += len(rows)
            responses = pc.max_element_wise(*(rows[f"{side}_tokens"] for side in SIDES))
            prompt_tokens = pc.list_value_length(rows["prompt_ids"])
            done.longest = max(done.longest, pc.max(pc.add(responses, prompt_tokens)).as_py())
            yield shard, rows
    if not done.rows:
        raise DataError(f"{table.folder}: no pair is left: each has a response that was cut off")


def _write_lines(file: IO[bytes], shards: Iterable[tuple[int, pa.Table]]) -> None:
    for _, rows in shards:
        for row in rows.select(LINE).to_pylist():
            if not row["messages"]:
                del row["messages"]  # the source gave text
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    file.flush()


def _write_for_trl(folder: Path, shards: Iterable[tuple[int, pa.Table]]) -> None:
    for shard, rows in shards:
        out = rows.select(TEXT_AND_IDS)
        for side in SIDES:
            out = out.append_column(f"ref_{side}_logps", rows[f"teacher_{side}_logp"])
        buffer = pa.BufferOutputStream()
        pq.write_table(out, buffer, compression="zstd", row_group_size=ROW_GROUP_ROWS, write_page_checksum=True)
        write_atomically(folder / "data" / f"train-{shard:05d}.parquet", buffer.getvalue().to_pybytes())


def _describe(
    folder: Path, dataset: Dataset, table: Table[PreferencePair], config: ExportConfig, done: _Exported
) -> None:
    """dpkd_offline.json says who made the numbers, README.md what to do with them."""
    made, counts = table.require_provenance(), asdict(done)
    said = {key: made.get(key) for key in ("student", "engine", "dtype", "versions", "round")}
    said = {"version": __version__, "teacher": made["model"], **said, "prompt_set": asdict(dataset.prompt_set)}
    write_json(folder / "dpkd_offline.json", {**said, **counts, "config": as_plain(config)})
    write_atomically(folder / "README.md", trl_card(dataset, made, **counts).encode())


# --- import ---------------------------------------------------------------------------------------------------------

ROLES = {"chosen": "teacher", "rejected": "student"}  # whose responses these are, as far as a dataset knows


@dataclass
class PairReport(PromptReport):
    """As of prompts, and which pairs are too long as a whole."""

    long_pairs: int = 0

    @property
    def dropped(self) -> dict[str, int]:
        return {**super().dropped, "pairs longer than max-length": self.long_pairs}


def import_pairs(config: ImportConfig) -> Path:
    """Let a preference set enter as prompts, the teacher's responses (chosen) and the student's (rejected).

    Token ids are made from the text here, once. Nothing is known of who sampled it, so that any teacher may score it.
    Returns the dataset's folder. The same call again goes on after the last committed shard.

    Raises:
        DataError: a row of the source is wrong.
        MismatchError: the dataset is there with other prompts or responses.
    """
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    eos = eos_ids(config.model, tokenizer, config.trust_remote_code)
    with (
        Spool(config.dataset, Prompt) as prompts,
        Spool(config.dataset, Response) as chosen,
        Spool(config.dataset, Response) as rejected,
    ):
        spools = {"chosen": chosen, "rejected": rejected}
        prompt_set, digests = _enter(config, tokenizer, eos, prompts, spools)
        dataset = Dataset(config.dataset, prompt_set, ShardPlan(len(prompts), config.shard_size))
        new = not Dataset.exists(config.dataset)
        if not new and (dataset := Dataset.open(config.dataset)).prompt_set.id != prompt_set.id:
            raise MismatchError(
                f"{config.dataset / 'dataset.json'}: its prompts are not those of {config.source} with these options; "
                f"take another --dataset"
            )
        tables = {side: dataset.responses(role, 0) for side, role in ROLES.items()}
        made = {side: _provenance(config, prompt_set, eos, side, digests[side]) for side in SIDES}
        for side, table in tables.items():
            table.check_claim(made[side])
        if new:
            Dataset.create(config.dataset, prompt_set, prompts, config.shard_size)
        for side, table in tables.items():
            table.claim(made[side])
            _write_responses(table, spools[side])
    write_card(dataset)
    return config.dataset


def _enter(
    config: ImportConfig,
    tokenizer: PreTrainedTokenizerFast,
    eos: Sequence[int],
    prompts: Spool[Prompt],
    responses: dict[str, Spool[Response]],
) -> tuple[PromptSet, dict[str, str]]:
    """Fill the spools from the source; what the prompts are together, and a hash of the responses of each side."""
    report, digest, hashes = PairReport(), PromptDigest(), {side: hashlib.sha256() for side in SIDES}
    end = end_of_turn(tokenizer, template_name(config, tokenizer), eos)
    rows = map(partial(_as_prompt_source, template=config.template), islice(read_rows(config.source), config.limit))
    pairs = prompts_of(rows, config, tokenizer, report, beside=SIDES)
    while some := list(islice(pairs, ROWS_AT_ONCE)):
        texts = {side: [row.columns[side] for row, _ in some] for side in SIDES}
        ids = {side: _closed(texts[side], tokenizer, end) for side in SIDES}
        longest = (max(len(y_t), len(y_s)) for y_t, y_s in zip(*ids.values(), strict=True))
        fits = [len(p.prompt_ids) + n <= config.max_length for (_, p), n in zip(some, longest, strict=True)]
        report.long_pairs += fits.count(False)
        if not (kept := [prompt for _, prompt in compress(some, fits)]):
            continue
        entering = to_table(kept, Prompt.schema)
        digest.update(entering)
        prompts.add(entering)
        for side in SIDES:
            found = zip(kept, compress(texts[side], fits), compress(ids[side], fits), strict=True)
            answers = to_table([Response(p.id, text, y, "stop", []) for p, text, y in found], Response.schema)
            tokens = Lists(answers["response_ids"])
            hashes[side].update(tokens.lengths.tobytes() + tokens.values.tobytes())
            responses[side].add(answers)
    if not report.kept:
        raise DataError(f"{config.source}: no pair is left: {report}")
    prompt_set = describe_prompts(config, config.source, tokenizer, report, digest)
    return prompt_set, {side: hashes[side].hexdigest() for side in SIDES}


def _as_prompt_source(row: Row, template: Template) -> Row:
    """A row whose prompt stands in the columns of a prompt source, and whose responses are text.

    Raises:
        DataError: a column is missing, is of another type, or holds more than a prompt and one answer.
    """
    for side in SIDES:
        if not isinstance(row.columns.get(side), str | list):
            raise DataError(f"{row.place}: column '{side}' must be a string or a list of messages")
    columns, prompt = dict(row.columns), row.columns.get("prompt")
    as_text = isinstance(columns["chosen"], str) and isinstance(columns["rejected"], str)
    if as_text and not isinstance(prompt, list):
        if prompt is not None and template in ("chat", "alpaca"):
            columns |= {"instruction": prompt, "prompt": None}
        return Row(row.place, columns)
    messages = conversation(row, "prompt") if isinstance(prompt, list) else []
    if not as_text:
        turns = {side: conversation(row, side) for side in SIDES}
        begun = [] if messages else _common(*turns.values())
        messages = messages or begun
        for side, turn in turns.items():
            answer = turn[len(begun) :]
            if len(answer) != 1 or answer[0]["role"] != "assistant":
                raise DataError(f"{row.place}: column '{side}' must hold one message of the assistant after the prompt")
            columns[side] = answer[0]["content"]
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        where = (
            "column 'prompt' must" if isinstance(prompt, list) else "columns 'chosen' and 'rejected' must both begin"
        )
        raise DataError(f"{row.place}: {where} with messages that end with what a user says")
    return Row(row.place, columns | {"messages": messages, "prompt": None})


def _common(chosen: list[dict[str, str]], rejected: list[dict[str, str]]) -> list[dict[str, str]]:
    """What two conversations begin with, but for the last message of either."""
    most = min(len(chosen), len(rejected)) - 1
    same = next((n for n in range(most) if chosen[n] != rejected[n]), most)
    return chosen[:same]


def end_of_turn(tokenizer: PreTrainedTokenizerFast, template: str, eos: Sequence[int]) -> int:
    """The EOS that closes an answer: what the chat template writes behind one, else the tokenizer's own.

    Gemma's, for one, is not what its tokenizer calls EOS.
    """
    if template == "chat":
        turns = [{"role": "user", "content": "dpkd"}, {"role": "assistant", "content": "dpkd"}]
        _, _, behind = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition("dpkd")
        ids: list[int] = tokenizer(behind, add_special_tokens=False)["input_ids"]
        if ids and ids[0] in eos:
            return ids[0]
    return tokenizer.eos_token_id if tokenizer.eos_token_id in eos else eos[0]


def _closed(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, end: int) -> list[list[int]]:
    """The token ids of responses, each closed by one EOS, whether or not the text writes it."""
    written = str(tokenizer.convert_ids_to_tokens(end))
    ids: list[list[int]] = tokenizer([t.removesuffix(written) for t in texts], add_special_tokens=False)["input_ids"]
    return [[*tokens, end] for tokens in ids]


def _provenance(
    config: ImportConfig, prompt_set: PromptSet, eos: Sequence[int], side: str, digest: str
) -> dict[str, Any]:
    source = source_name(config.source)
    return {
        "stage": "import",
        "role": ROLES[side],
        "round": 0,
        "source": source,
        "column": side,
        "rows": prompt_set.rows,
        "responses": digest,
        "vocab_size": prompt_set.vocab_size,
        "tokenizer": prompt_set.tokenizer,
        "tokenizer_fingerprint": prompt_set.tokenizer_fingerprint,
        "eos_token_ids": list(eos),
        "prompt_set": prompt_set.id,
        "config": as_plain(config) | {"source": source},
        "versions": {name: version(name) for name in ("tokenizers", "transformers")},
    }


def _write_responses(table: Table[Response], spool: Spool[Response]) -> None:
    """Commit the shards that are not there yet."""
    pending, coming = set(table.pending()), iter(spool)
    with log.progress(f"import {table.name}", table.plan.rows, "row") as shown:
        for shard in range(table.plan.count):
            rows = list(islice(coming, table.plan.rows_of(shard)))
            if shard in pending:
                table.write(shard, rows)
            shown.advance(len(rows))
