"""`import`: turns responses that exist as text, one or two a prompt, into a dataset that a teacher can score."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import compress, islice
from typing import Any

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError, MismatchError
from dpkd_offline.common.results import Result
from dpkd_offline.config.base import redacted_dict
from dpkd_offline.config.data import ImportConfig
from dpkd_offline.curation.import_layouts import Arrangement
from dpkd_offline.dataset.card import write_card
from dpkd_offline.dataset.columns import Lists
from dpkd_offline.dataset.dataset import Dataset, PromptDigest, PromptSet
from dpkd_offline.dataset.schema import SIDES, Prompt, Response, Side, full_schema, to_table
from dpkd_offline.dataset.scratch import Spool
from dpkd_offline.dataset.table import ShardPlan, Table
from dpkd_offline.dataset.writing import check_claim, claim, dataset_output, write_shard
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.prompts.reader import ROWS_AT_ONCE, PromptReport, check_known, describe_prompts, prompts_of
from dpkd_offline.prompts.retokenize import ResponseTokenizer
from dpkd_offline.prompts.sources import Row, read_rows, source_name
from dpkd_offline.prompts.templates import template_name, with_template

# Whose responses these are, as far as a dataset knows.
ROLES: dict[Side, str] = {"chosen": "teacher", "rejected": "student"}


@dataclass
class PairReport(PromptReport):
    """As of prompts, and which pairs are too long as a whole."""

    long_pairs: int = 0

    @property
    def dropped(self) -> dict[str, int]:
        return {**super().dropped, "pairs longer than max-length": self.long_pairs}


@dataclass(frozen=True)
class ImportResult(Result):
    """The folder of the dataset."""

    rows: int
    dropped: dict[str, int]  # pairs of the source, by the reason why they are left out


def import_pairs(config: ImportConfig) -> ImportResult:
    """Write a source as prompts, the teacher's responses (chosen) and the student's (rejected).

    Of rows with one response each that is the teacher's, and `generate` makes the student's. The text becomes token ids
    once, in this command. Nobody knows who sampled it, so that any teacher may score it. The same call again goes on
    after the last committed shard.

    Raises:
        DataError: a row of the source is wrong.
        MismatchError: the dataset is there with other prompts or responses.
    """
    model = with_template(ModelInfo.load(config.model, config.trust_remote_code), config.template)
    with (
        dataset_output(config.dataset, "import"),
        Spool(config.dataset, Prompt) as prompts,
        Spool(config.dataset, Response) as chosen,
        Spool(config.dataset, Response) as rejected,
    ):
        spools = {"chosen": chosen, "rejected": rejected}
        report, rows = PairReport(), Arrangement(config.template, template_name(config.template, model.tokenizer))
        prompt_set, digests = _enter(config, model, rows, prompts, spools, report)
        dataset = Dataset(config.dataset, prompt_set, ShardPlan(len(prompts), config.shard_size))
        new = not Dataset.exists(config.dataset)
        if not new and (dataset := Dataset.open(config.dataset)).prompt_set.id != prompt_set.id:
            raise MismatchError(
                f"{config.dataset / 'dataset.json'}: its prompts are not those of {config.source} with these options; "
                f"take another --dataset"
            )
        tables = {side: dataset.responses(ROLES[side], 0) for side in rows.sides}
        provenances = {
            side: _provenance(config, prompt_set, model.eos_ids, side, rows.columns[side], digests[side])
            for side in tables
        }
        for side, table in tables.items():
            check_claim(table, provenances[side])
        if new:
            Dataset.create(config.dataset, prompt_set, prompts, config.shard_size)
        for side, table in tables.items():
            claim(table, provenances[side])
            _write_responses(table, spools[side])
    write_card(dataset)
    return ImportResult(config.dataset, report.kept, report.dropped)


def _enter(
    config: ImportConfig,
    model: ModelInfo,
    arrangement: Arrangement,
    prompts: Spool[Prompt],
    responses: dict[str, Spool[Response]],
    report: PairReport,
) -> tuple[PromptSet, dict[str, str]]:
    """Fill the spools from the source, and count the report up.

    Returns what the prompts are together, and a hash of the responses of each side.
    """
    digest, hashes = PromptDigest(), {side: hashlib.sha256() for side in SIDES}
    tokenizer = ResponseTokenizer(model.tokenizer, arrangement.template, model.eos_ids, config.template_args or {})
    inexact = 0
    rows = islice(read_rows(config.source, keep_wrong=True), config.limit)
    pairs = prompts_of(rows, config, model, report, beside=SIDES, arranged=arrangement, column=_prompt_column)
    while some := list(islice(pairs, ROWS_AT_ONCE)):
        sides = arrangement.sides
        texts = {side: [row.columns[side] for row, _ in some] for side in sides}
        closed = {side: _closed(some, texts[side], side, tokenizer, model) for side in sides}
        ids = {side: tokens for side, (tokens, _) in closed.items()}
        inexact += sum(exact.count(False) for _, exact in closed.values())
        longest = (max(map(len, answers)) for answers in zip(*ids.values(), strict=True))
        fits = [len(p.prompt_ids) + n <= config.max_length for (_, p), n in zip(some, longest, strict=True)]
        report.long_pairs += fits.count(False)
        if not (kept := [prompt for _, prompt in compress(some, fits)]):
            continue
        new = to_table(kept, full_schema(Prompt))
        digest.update(new)
        prompts.add(new)
        for side in sides:
            rows_kept = zip(kept, compress(texts[side], fits), compress(ids[side], fits), strict=True)
            answers = to_table([Response(p.id, text, y, "stop", [], 0) for p, text, y in rows_kept], Response.schema)
            tokens = Lists(answers["response_ids"])
            hashes[side].update(tokens.lengths.tobytes() + tokens.values.tobytes())
            responses[side].add(answers)
    if not report.kept:
        raise DataError(f"{config.source}: no pair is left: {report}")
    _say(config, arrangement, report, inexact)
    report.call_columns(arrangement.prompts)
    report.columns |= {name: None for names in arrangement.columns.values() for name in names}
    prompt_set = describe_prompts(config, config.source, model, report, digest)
    return prompt_set, {side: hashes[side].hexdigest() for side in SIDES}


def _say(config: ImportConfig, arrangement: Arrangement, report: PairReport, inexact: int) -> None:
    """What a person should know of the rows before they are written."""
    if len(arrangement.sides) == 1:
        columns = ", ".join(arrangement.columns["chosen"])
        console.info(
            f"{config.source}: one response a row, from column {columns}, is taken as y_t, whoever wrote it; `generate "
            f"--role student` makes y_s, and any teacher with this tokenizer may score both"
        )
    if report.other_ids:
        console.info(
            f"warning: {report.other_ids} rows have a prompt that an earlier row has under another id; `train "
            f"--holdout` goes by ids and may train on one and hold out the other: take column 'id' out to prevent that"
        )
    if inexact:
        console.info(f"{inexact} responses are not quite the same text in the tokens of {config.model}")


def _closed(
    some: Sequence[tuple[Row, Prompt]], texts: Sequence[str], side: str, tokenizer: ResponseTokenizer, model: ModelInfo
) -> tuple[list[list[int]], list[bool]]:
    """The token ids of responses behind their prompts, and whether they give the text; `ResponseTokenizer.encode`'s.

    Each is closed by one EOS, whether or not the text writes it.

    Raises:
        DataError: the model's embedding does not know one of them.
    """
    written = str(model.tokenizer.convert_ids_to_tokens(tokenizer.end))
    unclosed = [text.removesuffix(written) for text in texts]
    ids, exact = tokenizer.encode([prompt.prompt for _, prompt in some], unclosed, ["stop"] * len(texts))
    for (row, _), tokens in zip(some, ids, strict=True):
        check_known(f"{row.place}: column '{side}'", tokens, model)
    return ids, exact


def _prompt_column(row: Row) -> str | None:
    """Where a row has its prompt, if not in a column that only prompt files have."""
    if row.columns.get("prompt") is not None:
        return "prompt"
    chosen = row.columns.get("chosen")
    return "chosen" if isinstance(chosen, list) and len(chosen) > 1 else None


def _provenance(
    config: ImportConfig, prompt_set: PromptSet, eos: Sequence[int], side: Side, columns: Iterable[str], digest: str
) -> dict[str, Any]:
    source = source_name(config.source)
    return {
        "stage": "import",
        "role": ROLES[side],
        "round": 0,
        "source": source,
        "column": ", ".join(columns),
        "rows": prompt_set.rows,
        "responses": digest,
        "vocab_size": prompt_set.vocab_size,
        "tokenizer": prompt_set.tokenizer,
        "tokenizer_fingerprint": prompt_set.tokenizer_fingerprint,
        "eos_token_ids": list(eos),
        "prompt_set": prompt_set.id,
        "config": redacted_dict(config) | {"source": source},
        "versions": {name: version(name) for name in ("tokenizers", "transformers")},
    }


def _write_responses(table: Table[Response], spool: Spool[Response]) -> None:
    """Commit the shards that are not there yet."""
    pending, coming = set(table.pending()), iter(spool)
    with console.progress(f"import {table.name}", table.plan.rows, "row") as shown:
        for shard in range(table.plan.count):
            rows = list(islice(coming, table.plan.rows_of(shard)))
            if shard in pending:
                write_shard(table, shard, rows)
            shown.advance(len(rows))
