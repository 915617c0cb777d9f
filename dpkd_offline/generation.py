"""`generate`: sample one response per prompt from the teacher or the student."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from dpkd_offline import log
from dpkd_offline.card import write_card
from dpkd_offline.checkpoint import context_length, eos_ids, load_tokenizer, model_identity, tokenizer_fingerprint
from dpkd_offline.config import GenerateConfig, ModelOptions, SamplingOptions, as_plain
from dpkd_offline.dataset import Dataset, PromptSet
from dpkd_offline.engines import Completion, GenerateRequest, choose_engine, load_engine, provenance_of
from dpkd_offline.errors import DataError, MismatchError, UsageError
from dpkd_offline.files import fingerprint
from dpkd_offline.prompts import read_prompts, template_fingerprint, template_name
from dpkd_offline.records import Prompt, Response
from dpkd_offline.shards import ShardPlan


def row_seed(*parts: object) -> int:
    """A row's own seed, from the run's seed and the row's id, so that no other row has part in its draw."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:7], "big")


def check_lengths(model: str, options: ModelOptions, prompts: Iterable[Prompt], sampling: SamplingOptions) -> None:
    """Raise UsageError unless every prompt and its longest response fit into the model's context."""
    limit = min(options.max_length, context_length(model, options.trust_remote_code))
    longest = max(prompts, key=lambda p: len(p.prompt_ids))
    needed = len(longest.prompt_ids) + sampling.max_new_tokens
    if needed > limit:
        raise UsageError(
            f"prompt '{longest.id}' of {len(longest.prompt_ids)} tokens and {sampling.max_new_tokens} new ones need "
            f"{needed} tokens, max-length and the context of {model} give {limit}; lower --max-prompt-tokens or "
            f"--max-new-tokens"
        )


def _prompt_set(config: GenerateConfig, tokenizer: PreTrainedTokenizerFast) -> tuple[PromptSet, list[Prompt]]:
    assert config.prompts is not None
    prompts, report = read_prompts(config.prompts, config, tokenizer)
    log.info(f"prompts: {report}")
    template = template_name(config, tokenizer)
    prompt_set = PromptSet(
        id=fingerprint([[p.id, p.prompt_ids, p.references] for p in prompts]),
        source=Path(config.prompts).name if Path(config.prompts).exists() else config.prompts,
        template=template,
        template_fingerprint=template_fingerprint(template, tokenizer),
        tokenizer=model_identity(config.model)["name"],
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        rows=asdict(report),
    )
    return prompt_set, prompts


def enter_prompts(config: GenerateConfig, tokenizer: PreTrainedTokenizerFast) -> tuple[Dataset, list[Prompt] | None]:
    """The dataset as it is, or as it would be with the source's prompts (returned too); nothing is written."""
    if not Dataset.exists(config.dataset):
        if config.prompts is None:
            raise UsageError(f"{config.dataset} is no dataset yet; name a source of prompts with --prompts")
        prompt_set, prompts = _prompt_set(config, tokenizer)
        return Dataset(config.dataset, prompt_set, ShardPlan(len(prompts), config.shard_size)), prompts
    dataset = Dataset.open(config.dataset)
    dataset.check_tokenizer(config.model, tokenizer_fingerprint(tokenizer))
    if config.prompts is not None and _prompt_set(config, tokenizer)[0].id != dataset.prompt_set.id:
        raise MismatchError(
            f"{config.dataset / 'dataset.json'}: its prompts are not those of {config.prompts} with these filters; "
            f"leave --prompts out to go on with its own, or take another --dataset"
        )
    return dataset, None


def generate(config: GenerateConfig) -> Path:
    """Sample the pending shards of one role's responses; the first call lets the prompts enter.

    Returns the folder of the responses. The same call again goes on after the last committed shard.

    Raises:
        DataError: a row of the prompt source is wrong.
        MismatchError: the dataset has another tokenizer, or these responses were begun with other settings.
        UnavailableError: the model or the engine cannot be loaded.
    """
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    dataset, new_prompts = enter_prompts(config, tokenizer)
    check_lengths(config.model, config, new_prompts or _all_prompts(dataset), config)
    table = dataset.responses(config.role, config.round)
    eos = eos_ids(config.model, tokenizer, config.trust_remote_code)
    engine_name = choose_engine(config.engine, config.url)
    made_by = provenance_of(engine_name, config.dtype)
    provenance = {
        "stage": "generate",
        "role": config.role,
        "round": config.round,
        "model": model_identity(config.model),
        **made_by,
        "eos_token_ids": eos,
        "sampling": {k: v for k, v in as_plain(config).items() if k in SamplingOptions.model_fields},
        "seed": config.seed,
        "prompt_set": dataset.prompt_set.id,
    }
    table.check_claim(provenance)
    if new_prompts is None and not table.pending(config.shard_index, config.num_shards):
        log.info(f"{table.folder}: all is there already")
        write_card(dataset)
        return table.folder

    engine = load_engine(config.model, config.model_copy(update={"engine": engine_name}), eos)
    if new_prompts is not None:
        dataset = Dataset.create(config.dataset, dataset.prompt_set, new_prompts, config.shard_size)
    table.claim({**provenance, "config": as_plain(config) | made_by, "versions": engine.versions})
    pending = table.pending(config.shard_index, config.num_shards)
    ids: dict[int, list[str]] = {}

    def requests() -> Iterator[list[GenerateRequest]]:
        for shard in pending:
            prompts = dataset.prompts.read(shard)
            ids[shard] = [p.id for p in prompts]
            yield [
                GenerateRequest((shard, n), p.prompt_ids, row_seed(config.seed, config.role, config.round, p.id))
                for n, p in enumerate(prompts)
            ]

    def write(shard: int, completions: list[Completion]) -> None:
        texts = tokenizer.batch_decode([c.response_ids for c in completions], skip_special_tokens=True)
        rows = zip(ids.pop(shard), texts, completions, strict=True)
        table.write(shard, [response(id_, text, completion) for id_, text, completion in rows])

    table.commit(pending, engine.generate(requests(), config), write, label=f"generate {config.role}")
    engine.close()
    write_card(dataset)
    return table.folder


def _all_prompts(dataset: Dataset) -> Iterator[Prompt]:
    for shard in range(dataset.plan.count):
        yield from dataset.prompts.read(shard)


def response(id_: str, text: str, completion: Completion) -> Response:
    """A completion as a row, or a DataError where the model's log-probs are not numbers."""
    if not all(map(math.isfinite, completion.logps)):
        raise DataError(f"prompt '{id_}': the model gave a log-prob that is not finite; try --dtype float32")
    return Response(id_, text, completion.response_ids, completion.finish_reason, completion.logps)
