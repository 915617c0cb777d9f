"""`generate`: sample one response per prompt from the teacher or the student."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError
from dpkd_offline.config.base import SamplingOptions, redacted_dict
from dpkd_offline.config.data import GenerateConfig
from dpkd_offline.dataset.card import write_card
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import Prompt, Response
from dpkd_offline.dataset.scratch import Spool
from dpkd_offline.dataset.table import Table
from dpkd_offline.dataset.writing import check_claim, claim, commit_results, write_shard
from dpkd_offline.engines.base import Completion, GenerateRequest, check_lengths, row_seed
from dpkd_offline.engines.factory import choose_engine, load_engine, provenance_of
from dpkd_offline.generation.reuse import kept_responses, rows_to_sample
from dpkd_offline.models.info import (
    eos_ids,
    load_tokenizer,
    model_identity,
    model_license,
    model_name,
    tokenizer_fingerprint,
    vocab_size,
)
from dpkd_offline.prompts.reader import enter_prompts
from dpkd_offline.prompts.retokenize import RenderedPrompts, template_for
from dpkd_offline.prompts.templates import template_fingerprint


def _rendered(dataset: Dataset, config: GenerateConfig, tokenizer: PreTrainedTokenizerFast) -> RenderedPrompts:
    """The prompts for a student whose tokenizer is not the dataset's."""
    console.info(
        f"{config.model} has another tokenizer than the dataset: it sees the prompts in its own template and tokens, "
        f"and score-teacher will score the text of its responses"
    )
    return RenderedPrompts(dataset, template_for(dataset, config.template, tokenizer), tokenizer)


def _longest(dataset: Dataset, rendered: RenderedPrompts | None) -> tuple[str, int]:
    """The id and the number of tokens of the longest prompt."""
    if rendered is None:
        return dataset.prompt_set.longest_prompt, dataset.prompt_set.longest_prompt_tokens
    shards = (rendered.read(shard) for shard in range(rendered.plan.count))
    return max(((p.id, len(p.prompt_ids)) for prompts in shards for p in prompts), key=lambda found: found[1])


def _store(
    rendered: RenderedPrompts, dataset: Dataset, config: GenerateConfig, tokenizer: PreTrainedTokenizerFast
) -> Table[Prompt]:
    """Keep the prompts as this student sees them; they are the truth about what its responses answer."""
    table = dataset.student_prompts
    claim(
        table,
        {
            "stage": "render",
            "template": rendered.template,
            "template_fingerprint": template_fingerprint(rendered.template, tokenizer),
            "tokenizer": model_name(config.model),
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
            "vocab_size": max(len(tokenizer), vocab_size(config.model, config.trust_remote_code)),
            "prompt_set": dataset.prompt_set.id,
        },
    )
    for shard in table.pending():
        write_shard(table, shard, rendered.read(shard))
    return table


def generate(config: GenerateConfig) -> Path:
    """Sample the pending shards of one role's responses; the first call lets the prompts enter.

    With a share below 1, rows that are not drawn are those of the round before, and the engine never hears of them.
    Returns the folder of the responses. The same call again goes on after the last committed shard.

    Raises:
        DataError: a row of the prompt source is wrong, or responses that are to be kept are missing.
        MismatchError: the dataset has another tokenizer, or these responses were begun with other settings.
        UnavailableError: the model or the engine cannot be loaded.
    """
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    with Spool(config.dataset, Prompt) as spool:
        dataset = enter_prompts(config, tokenizer, spool)
        spelled = tokenizer_fingerprint(tokenizer)
        rendered = None if dataset.shares_tokenizer(spelled) else _rendered(dataset, config, tokenizer)
        longest, tokens = _longest(dataset, rendered)
        check_lengths(config.model, config, longest, tokens, config)
        table = dataset.responses(config.role, config.round)
        eos = eos_ids(config.model, tokenizer, config.trust_remote_code)
        engine_name = choose_engine(config.engine, config.url)
        made_by = provenance_of(engine_name, config.dtype)
        provenance = {
            "stage": "generate",
            "role": config.role,
            "round": config.round,
            "model": model_identity(config.model),
            "vocab_size": vocab_size(config.model, config.trust_remote_code),
            "tokenizer_fingerprint": spelled,
            **made_by,
            "eos_token_ids": eos,
            "sampling": {k: v for k, v in redacted_dict(config).items() if k in SamplingOptions.model_fields},
            "seed": config.seed,
            "share": config.share,
            "prompt_set": dataset.prompt_set.id,
        }
        check_claim(table, provenance)
        if not len(spool) and not table.pending(config.shard_index, config.num_shards):
            console.info(f"{table.folder}: all is there already")
            write_card(dataset)
            return config.dataset / table.name
        before = kept_responses(dataset, config, provenance)
        engine = load_engine(config.model, config.model_copy(update={"engine": engine_name}), eos)
        if len(spool):
            dataset = Dataset.create(config.dataset, dataset.prompt_set, spool, config.shard_size)

    source = dataset.prompts if rendered is None else _store(rendered, dataset, config, tokenizer)
    for_people = {"config": redacted_dict(config) | made_by, "versions": engine.versions}
    claim(table, {**provenance, **for_people, "license": model_license(config.model)})
    write_card(dataset)  # before the first shard, since a card with the size of a table that grows would be wrong
    pending = table.pending(config.shard_index, config.num_shards)
    asked = rows_to_sample(source, before, config, pending)
    ids: dict[int, list[str]] = {}
    round = config.round if config.role == "student" else 0

    def requests() -> Iterator[list[GenerateRequest]]:
        for shard in pending:
            if not asked[shard]:
                continue  # an empty group has a meaning of its own
            prompts = source.read(shard)
            ids[shard] = [prompts[n].id for n in asked[shard]]
            yield [
                GenerateRequest(
                    (shard, n),
                    prompts[n].prompt_ids,
                    row_seed(config.seed, config.role, config.round, prompts[n].id),
                    logps=config.role == "student",  # the teacher's are not used: score-teacher makes them by prefill
                )
                for n in asked[shard]
            ]

    def write(shard: int, completions: list[Completion]) -> None:
        rows = {} if before is None else dict(enumerate(before.read(shard)))
        tokens = [c.response_ids for c in completions]
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True) if tokens else []  # of none it makes one
        sampled = zip(asked[shard], ids.pop(shard, []), texts, completions, strict=True)
        rows |= {n: response(id_, text, completion, round) for n, id_, text, completion in sampled}
        write_shard(table, shard, [rows[n] for n in range(len(rows))])

    waited_for = {shard: len(rows) for shard, rows in asked.items()}
    commit_results(table.plan, waited_for, engine.generate(requests(), config), write, label=f"generate {config.role}")
    engine.close()
    write_card(dataset)
    return config.dataset / table.name


def response(id_: str, text: str, completion: Completion, round: int) -> Response:
    """A completion as a row, or a DataError where the model's log-probs are not numbers."""
    if not all(map(math.isfinite, completion.logps)):
        raise DataError(f"prompt '{id_}': the model gave a log-prob that is not finite; try --dtype float32")
    return Response(id_, text, completion.response_ids, completion.finish_reason, completion.logps, round)
