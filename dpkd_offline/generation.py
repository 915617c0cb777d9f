"""`generate`: sample one response per prompt from the teacher or the student."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from dpkd_offline import log
from dpkd_offline.card import write_card
from dpkd_offline.checkpoint import (
    context_length,
    eos_ids,
    load_tokenizer,
    model_identity,
    model_license,
    model_name,
    tokenizer_fingerprint,
    vocab_size,
)
from dpkd_offline.checks import check_same, expect
from dpkd_offline.columns import Lists
from dpkd_offline.config import GenerateConfig, ImportConfig, ModelOptions, SamplingOptions, as_plain
from dpkd_offline.dataset import Dataset, PromptDigest, PromptSet
from dpkd_offline.engines import Completion, GenerateRequest, choose_engine, load_engine, provenance_of
from dpkd_offline.errors import DataError, MismatchError, UsageError
from dpkd_offline.prompts import PromptReport, read_prompts, source_name, template_fingerprint, template_name
from dpkd_offline.records import Prompt, Response, to_table
from dpkd_offline.remote import Location
from dpkd_offline.respelling import RenderedPrompts, template_for
from dpkd_offline.shards import ShardPlan, Table
from dpkd_offline.spool import Spool

ROWS_AT_ONCE = 1024


def row_seed(*parts: object) -> int:
    """A row's own seed, from the run's seed and the row's id, so that no other row has part in its draw."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:7], "big")


def check_lengths(
    model: str, options: ModelOptions, longest_prompt: str, prompt_tokens: int, sampling: SamplingOptions
) -> None:
    """Raise UsageError unless the longest prompt (its id and tokens) and its longest response fit into the context."""
    limit = min(options.max_length, context_length(model, options.trust_remote_code))
    needed = prompt_tokens + sampling.max_new_tokens
    if needed > limit:
        raise UsageError(
            f"prompt '{longest_prompt}' of {prompt_tokens} tokens and {sampling.max_new_tokens} new ones need "
            f"{needed} tokens, max-length and the context of {model} give {limit}; lower --max-prompt-tokens or "
            f"--max-new-tokens"
        )


def _prompt_set(config: GenerateConfig, tokenizer: PreTrainedTokenizerFast, spool: Spool[Prompt] | None) -> PromptSet:
    """What the source's prompts are together; each of them goes into the spool, if there is one."""
    assert config.prompts is not None
    report, digest = PromptReport(), PromptDigest()
    prompts = read_prompts(config.prompts, config, tokenizer, report)
    while some := list(islice(prompts, ROWS_AT_ONCE)):
        rows = to_table(some, Prompt.schema)
        digest.update(rows)
        if spool is not None:
            spool.add(rows)
    return describe_prompts(config, config.prompts, tokenizer, report, digest)


def describe_prompts(
    config: GenerateConfig | ImportConfig,
    source: str | Location,
    tokenizer: PreTrainedTokenizerFast,
    report: PromptReport,
    digest: PromptDigest,
) -> PromptSet:
    """What prompts are together, once all of them have gone by."""
    log.info(f"prompts: {report}")
    template = template_name(config.template, tokenizer)
    fingerprints = template_fingerprint(template, tokenizer), tokenizer_fingerprint(tokenizer)
    return PromptSet(
        id=digest.id(template, *fingerprints),
        source=source_name(source),
        template=template,
        template_fingerprint=fingerprints[0],
        tokenizer=model_name(config.model),
        tokenizer_fingerprint=fingerprints[1],
        vocab_size=max(len(tokenizer), vocab_size(config.model, config.trust_remote_code)),
        longest_prompt=digest.longest[0],
        longest_prompt_tokens=digest.longest[1],
        rows=asdict(report),
        license=config.license,
    )


def enter_prompts(config: GenerateConfig, tokenizer: PreTrainedTokenizerFast, spool: Spool[Prompt]) -> Dataset:
    """The dataset as it is; or as it would be with the source's prompts, which are in the spool then.

    Nothing that has a name is written.
    """
    if not Dataset.exists(config.dataset):
        if config.prompts is None:
            raise UsageError(f"{config.dataset} is no dataset yet; name a source of prompts with --prompts")
        prompt_set = _prompt_set(config, tokenizer, spool)
        return Dataset(config.dataset, prompt_set, ShardPlan(len(spool), config.shard_size), config.student_name)
    dataset = Dataset.open(config.dataset, config.student_name)
    if config.role == "teacher":
        dataset.check_tokenizer(config.model, tokenizer_fingerprint(tokenizer))
    if config.prompts is not None and _prompt_set(config, tokenizer, None).id != dataset.prompt_set.id:
        raise MismatchError(
            f"{config.dataset / 'dataset.json'}: its prompts are not those of {config.prompts} with these filters; "
            f"leave --prompts out to go on with its own, or take another --dataset"
        )
    if config.license not in (None, dataset.prompt_set.license):
        raise MismatchError(
            f"{config.dataset / 'dataset.json'}: prompt_set.license is {dataset.prompt_set.license!r}, --license is "
            f"{config.license!r}; what is right may be written there by hand, it changes nothing else"
        )
    return dataset


def _rendered(dataset: Dataset, config: GenerateConfig, tokenizer: PreTrainedTokenizerFast) -> RenderedPrompts:
    """The prompts for a student whose tokenizer is not the dataset's."""
    log.info(
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
    table.claim(
        {
            "stage": "render",
            "template": rendered.template,
            "template_fingerprint": template_fingerprint(rendered.template, tokenizer),
            "tokenizer": model_name(config.model),
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
            "vocab_size": max(len(tokenizer), vocab_size(config.model, config.trust_remote_code)),
            "prompt_set": dataset.prompt_set.id,
        }
    )
    for shard in table.pending():
        table.write(shard, rendered.read(shard))
    return table


def is_drawn(config: GenerateConfig, id_: str) -> bool:
    """Whether a prompt is answered anew in this round: whether its draw, of seed, round and id, is below the share.

    `train --holdout` draws by the id alone, so that of what it holds out the same share is renewed as of the rest.
    """
    return row_seed(config.seed, "share", config.round, id_) < config.share * 2**56


def _before(dataset: Dataset, config: GenerateConfig, provenance: Mapping[str, Any]) -> Table[Response] | None:
    """The responses of the round before, if some are kept: all there, and such as this round's model might give.

    Raises:
        DataError: they are not complete.
        MismatchError: they are of another tokenizer, or end otherwise.
    """
    if config.share == 1:
        return None
    table = dataset.responses("student", config.round - 1)
    table.require_complete(f"dpkd-offline generate --role student --round {config.round - 1}")
    made = table.require_provenance()
    differing = [key for key in ("tokenizer_fingerprint", "eos_token_ids") if made[key] != provenance[key]]
    if made["vocab_size"] > provenance["vocab_size"]:
        differing.append("vocab_size")
    if differing:
        raise MismatchError(
            f"{table.folder / '_table.json'}: {differing[0]} is not that of {config.model}, so that its responses "
            f"cannot be kept; take --share 1"
        )
    return table


def _asked(
    source: Table[Prompt], before: Table[Response] | None, config: GenerateConfig, pending: Sequence[int]
) -> dict[int, Sequence[int]]:
    """Of each pending shard the rows to sample: all, or those that are drawn, beside such as can be kept."""
    if before is None:
        return {shard: range(source.plan.rows_of(shard)) for shard in pending}
    asked: dict[int, Sequence[int]] = {}
    for shard in pending:
        ids, path = source.read_arrow(shard, ["id"])["id"], before.path(shard)
        there = before.read_arrow(shard, ["id", "logps"])
        check_same(there, "id", ids, path, "the prompt in this row")
        expect(Lists(there["logps"]).lengths > 0, path, "logps", "is empty: such responses are not kept, --share is 1")
        asked[shard] = [n for n, id_ in enumerate(ids.to_pylist()) if is_drawn(config, id_)]
    anew, rows = sum(map(len, asked.values())), sum(map(source.plan.rows_of, pending))
    log.info(
        f"share {config.share:g}: {anew} of {rows} prompts are answered anew, the others keep the response of "
        f"round {config.round - 1}"
    )
    return asked


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
            "sampling": {k: v for k, v in as_plain(config).items() if k in SamplingOptions.model_fields},
            "seed": config.seed,
            "share": config.share,
            "prompt_set": dataset.prompt_set.id,
        }
        table.check_claim(provenance)
        if not len(spool) and not table.pending(config.shard_index, config.num_shards):
            log.info(f"{table.folder}: all is there already")
            write_card(dataset)
            return config.dataset / table.name
        before = _before(dataset, config, provenance)
        engine = load_engine(config.model, config.model_copy(update={"engine": engine_name}), eos)
        if len(spool):
            dataset = Dataset.create(config.dataset, dataset.prompt_set, spool, config.shard_size)

    source = dataset.prompts if rendered is None else _store(rendered, dataset, config, tokenizer)
    for_people = {"config": as_plain(config) | made_by, "versions": engine.versions}
    table.claim({**provenance, **for_people, "license": model_license(config.model)})
    write_card(dataset)  # before the first shard, since a card with the size of a table that grows would be wrong
    pending = table.pending(config.shard_index, config.num_shards)
    asked = _asked(source, before, config, pending)
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
        table.write(shard, [rows[n] for n in range(len(rows))])

    waited_for = {shard: len(rows) for shard, rows in asked.items()}
    table.commit(waited_for, engine.generate(requests(), config), write, label=f"generate {config.role}")
    engine.close()
    write_card(dataset)
    return config.dataset / table.name


def response(id_: str, text: str, completion: Completion, round: int) -> Response:
    """A completion as a row, or a DataError where the model's log-probs are not numbers."""
    if not all(map(math.isfinite, completion.logps)):
        raise DataError(f"prompt '{id_}': the model gave a log-prob that is not finite; try --dtype float32")
    return Response(id_, text, completion.response_ids, completion.finish_reason, completion.logps, round)
