"""`generate`: sample one response per prompt from the teacher or the student."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
from dpkd_offline.engines.base import Completion, Engine, GenerateRequest, check_lengths, row_seed
from dpkd_offline.engines.factory import choose_engine, load_engine, provenance_of
from dpkd_offline.generation.health import response_warnings, say
from dpkd_offline.generation.results import GenerateResult
from dpkd_offline.generation.reuse import kept_responses, responses_alike, rows_to_sample
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.prompts.reader import check_known, open_or_read
from dpkd_offline.prompts.retokenize import PromptSource, RenderedPrompts, template_for
from dpkd_offline.prompts.templates import template_fingerprint, warn_of_template


def generate(config: GenerateConfig) -> GenerateResult:
    """Sample the pending shards of one role's responses; the first call reads --prompts into the dataset.

    With a share below 1, rows that are not drawn are those of the round before, and the engine never hears of them.
    What the same model has answered with the same settings under another student's name is copied.
    The same call again goes on after the last committed shard. Returns the folder of the responses, with its sums.

    Raises:
        DataError: a row of the prompt source is wrong, or responses that are to be kept are missing.
        MismatchError: the dataset has another tokenizer, or these responses were begun with other settings.
        UnavailableError: the model or the engine cannot be loaded.
    """
    model = ModelInfo.load(config.model, config.trust_remote_code)
    with Spool(config.dataset, Prompt) as new_prompts:
        dataset = open_or_read(config, model, new_prompts)
        config = _with_limits_of_the_teacher(config, dataset)
        rendered = _rendered_prompts(dataset, config, model)
        longest, tokens = _longest_prompt(dataset, rendered, model)
        check_lengths(model, config, longest, tokens, config)
        table, engine_name = dataset.responses(config.role, config.round), choose_engine(config.engine, config.url)
        provenance = _provenance(config, dataset, model, engine_name)
        check_claim(table, provenance)
        if not len(new_prompts) and not table.pending(config.shard_index, config.num_shards):
            console.info(f"{table.folder}: all is there already")
            write_card(dataset)
            return _result(config, dataset, sampled=0)
        kept, alike = kept_responses(dataset, config, provenance), responses_alike(dataset, config, provenance)
        engine = None if alike else load_engine(model, config.model_copy(update={"engine": engine_name}))
        if len(new_prompts):
            Dataset.create(config.dataset, dataset.prompt_set, new_prompts, config.shard_size)
            dataset = Dataset.open(config.dataset, config.student_name)

    source = dataset.prompts if rendered is None else _store(rendered, dataset, model)
    versions = alike.require_provenance()["versions"] if alike else engine.versions if engine else {}
    claim(table, {**provenance, **_for_people(config, versions, engine_name), "license": model.license})
    write_card(dataset)  # before the first shard, since a card with the size of a table that grows would be wrong
    pending = table.pending(config.shard_index, config.num_shards)
    if alike:
        console.info(f"{alike.folder}: the same model has answered with these settings; its responses are copied")
    rows = dict.fromkeys(pending, ()) if alike else rows_to_sample(source, kept, config, pending)
    _PendingResponses(config, model.tokenizer, source, table, alike or kept, rows).sample(engine)
    if engine is not None:
        engine.close()
    write_card(dataset)
    return _result(config, dataset, sampled=sum(map(len, rows.values())))


def _result(config: GenerateConfig, dataset: Dataset, sampled: int) -> GenerateResult:
    """What there is now, and what a person should hear about it."""
    table, warnings = (
        dataset.responses(config.role, config.round),
        response_warnings(dataset, config.role, config.round),
    )
    say(warnings)
    return GenerateResult.of(config.dataset / table.name, table, sampled, warnings)


def _with_limits_of_the_teacher(config: GenerateConfig, dataset: Dataset) -> GenerateConfig:
    """The config of a student, whose responses may be as long as the teacher's unless the user says otherwise.

    Beside y_t that end by themselves, longer y_s teach length and little else.
    """
    y_t = dataset.responses("teacher", 0).provenance() or {}
    if config.role == "teacher" or "sampling" not in y_t:  # imported responses were not sampled
        return config
    longest = y_t["sampling"]["max_new_tokens"]
    if "max_new_tokens" not in config.model_fields_set:
        room = y_t.get("config", {}).get("max_length")
        return config.with_limits(longest, room if isinstance(room, int) else 0)
    if config.max_new_tokens != longest:
        console.info(
            f"warning: y_s may have {config.max_new_tokens} tokens, as --max-new-tokens says; y_t could have {longest}"
        )
    return config


def _rendered_prompts(dataset: Dataset, config: GenerateConfig, model: ModelInfo) -> RenderedPrompts | None:
    """The prompts for a student whose tokenizer is not the dataset's; None for all other models."""
    if dataset.shares_tokenizer(model.tokenizer_fingerprint):
        return None
    console.info(
        f"{config.model} has another tokenizer than the dataset: it sees the prompts in its own template and tokens, "
        f"and score-teacher will score the text of its responses"
    )
    template = template_for(dataset, config.template, model.tokenizer)
    arguments = dataset.prompt_set.template_args if config.template_args is None else config.template_args
    warn_of_template(model, template, arguments)
    return RenderedPrompts(dataset, template, model.tokenizer, arguments)


def _longest_prompt(dataset: Dataset, rendered: RenderedPrompts | None, model: ModelInfo) -> tuple[str, int]:
    """The id and the number of tokens of the longest prompt; a DataError where the model does not know a token."""
    if rendered is None:
        return dataset.prompt_set.longest_prompt, dataset.prompt_set.longest_prompt_tokens
    longest = "", 0
    for prompt in (prompt for shard in range(rendered.plan.count) for prompt in rendered.read(shard)):
        check_known(f"prompt '{prompt.id}'", prompt.prompt_ids, model)
        longest = max(longest, (prompt.id, len(prompt.prompt_ids)), key=lambda prompt: prompt[1])
    return longest


def _provenance(config: GenerateConfig, dataset: Dataset, model: ModelInfo, engine_name: str) -> dict[str, Any]:
    """What `_table.json` says of the responses, and what all workers of the table have in common."""
    return {
        "stage": "generate",
        "role": config.role,
        "round": config.round,
        "model": model.identity,
        "vocab_size": model.vocab_size,
        "tokenizer_fingerprint": model.tokenizer_fingerprint,
        **provenance_of(engine_name, config.dtype),
        "eos_token_ids": model.eos_ids,
        "sampling": {k: v for k, v in redacted_dict(config).items() if k in SamplingOptions.model_fields},
        "seed": config.seed,
        "share": config.share,
        "prompt_set": dataset.prompt_set.id,
    }


def _for_people(config: GenerateConfig, versions: Mapping[str, str], engine_name: str) -> dict[str, Any]:
    """What `_table.json` says besides, in which the workers of a table may differ."""
    resolved = redacted_dict(config) | provenance_of(engine_name, config.dtype)
    return {"config": resolved, "versions": versions}


def _store(rendered: RenderedPrompts, dataset: Dataset, model: ModelInfo) -> Table[Prompt]:
    """Keep the prompts as this student sees them; they are the truth about what its responses answer."""
    table = dataset.student_prompts
    claim(
        table,
        {
            "stage": "render",
            "template": rendered.template,
            "template_fingerprint": template_fingerprint(rendered.template, model.tokenizer, rendered.arguments),
            **({"template_args": rendered.arguments} if rendered.arguments else {}),
            "tokenizer": model.public_name,
            "tokenizer_fingerprint": model.tokenizer_fingerprint,
            "vocab_size": model.id_bound,
            "prompt_set": dataset.prompt_set.id,
        },
    )
    for shard in table.pending():
        write_shard(table, shard, rendered.read(shard))
    return table


@dataclass(frozen=True)
class _PendingResponses:
    """The shards of responses that this call samples: what it asks the engine for, and what it writes."""

    config: GenerateConfig
    tokenizer: PreTrainedTokenizerFast
    source: PromptSource
    table: Table[Response]
    kept: Table[Response] | None  # responses of the round before, for the rows that are not sampled
    rows: Mapping[int, Sequence[int]]  # of each pending shard, those to sample
    _ids: dict[int, list[str]] = field(default_factory=dict)  # prompt ids of the shards that are under way

    def sample(self, engine: Engine | None) -> None:
        """Commit each shard as soon as the engine has given all of its responses; where all are kept there is none."""
        counts = {shard: len(rows) for shard, rows in self.rows.items()}
        results = () if engine is None else engine.generate(self._requests(), self.config)
        commit_results(self.table.plan, counts, results, self._write, label=f"generate {self.config.role}")

    def _requests(self) -> Iterator[list[GenerateRequest]]:
        config = self.config
        for shard, rows in self.rows.items():
            if not rows:
                continue  # an empty group has a meaning of its own
            prompts = self.source.read(shard)
            self._ids[shard] = [prompts[n].id for n in rows]
            yield [
                GenerateRequest(
                    (shard, n),
                    prompts[n].prompt_ids,
                    row_seed(config.seed, config.role, config.round, prompts[n].id),
                    logps=config.role == "student",  # the teacher's are not used: score-teacher makes them by prefill
                )
                for n in rows
            ]

    def _write(self, shard: int, completions: list[Completion]) -> None:
        rows = {} if self.kept is None else dict(enumerate(self.kept.read(shard)))
        tokens = [c.response_ids for c in completions]
        # Of no tokens at all the tokenizer would make one text.
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True) if tokens else []
        round = self.config.round if self.config.role == "student" else 0
        sampled = zip(self.rows[shard], self._ids.pop(shard, []), texts, completions, strict=True)
        rows |= {n: response(id_, text, completion, round) for n, id_, text, completion in sampled}
        write_shard(self.table, shard, [rows[n] for n in range(len(rows))])


def response(id_: str, text: str, completion: Completion, round: int) -> Response:
    """A completion as a row, or a DataError where the model's log-probs are not numbers."""
    if not all(map(math.isfinite, completion.logps)):
        raise DataError(f"prompt '{id_}': the model gave a log-prob that is not finite; try --dtype float32")
    return Response(id_, text, completion.response_ids, completion.finish_reason, completion.logps, round)
