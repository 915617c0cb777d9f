"""`generate`: sample responses to the prompts from the teacher or the student, one per prompt or several."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from transformers import PreTrainedTokenizerFast

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError, MismatchError, UsageError
from dpkd_offline.config.base import SamplingOptions, redacted_dict
from dpkd_offline.config.data import GenerateConfig
from dpkd_offline.dataset.card import write_card
from dpkd_offline.dataset.catalog import require_one_teacher
from dpkd_offline.dataset.columns import Lists
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.layout import STUDENT_RESPONSES
from dpkd_offline.dataset.schema import Prompt, Response
from dpkd_offline.dataset.scratch import Spool
from dpkd_offline.dataset.table import Table
from dpkd_offline.dataset.writing import check_claim, claim, commit_results, write_shard
from dpkd_offline.engines.base import Completion, Engine, GenerateRequest, check_lengths, row_seed
from dpkd_offline.engines.factory import choose_engine, engine_and_dtype, load_engine, provenance_of, together
from dpkd_offline.generation.health import response_warnings, say
from dpkd_offline.generation.results import GenerateResult
from dpkd_offline.generation.reuse import kept_responses, responses_alike, rows_to_sample
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.prompts.reader import check_known, open_or_read
from dpkd_offline.prompts.retokenize import PromptSource, RenderedPrompts, own_template, student_view
from dpkd_offline.prompts.teacher_view import TeacherView
from dpkd_offline.prompts.templates import warn_of_template


def generate(config: GenerateConfig) -> GenerateResult:
    """Sample the pending shards of one role's responses; the first call reads --prompts into the dataset.

    With several samples each is a table of its own, drawn like the first with other seeds. With a share below 1, rows
    that are not drawn are those of the round before, and the engine never hears of them. What the same model has
    answered with the same settings under another student's name is copied.
    The same call again goes on after the last committed shard. Returns the folder of the responses, with its sums.

    Raises:
        DataError: a row of the prompt source is wrong, or responses that are to be kept are missing.
        MismatchError: the dataset has another tokenizer, or these responses were begun with other settings.
        UnavailableError: the model or the engine cannot be loaded.
    """
    model = ModelInfo.load(config.model, config.trust_remote_code)
    with Spool(config.dataset, Prompt) as new_prompts, TeacherView(config.dataset, config.teacher_system) as teacher:
        dataset = open_or_read(config, model, new_prompts, teacher)
        if not len(new_prompts):
            require_one_teacher(dataset)
        config = _with_limits_of_the_teacher(config, dataset)
        rendered = _rendered_prompts(dataset, config, model)
        check_lengths(model, config, *_longest_prompt(dataset, config, rendered, model), config)
        engine_name = choose_engine(config.engine, config.url)
        y_t = dataset.responses("teacher", 0)
        if config.role == "teacher" and (y_t.provenance() or {}).get("stage") == "import":
            y_t.require_complete("dpkd-offline import")
            if config.samples > 1:
                raise UsageError(
                    f"{y_t.folder}: imported, so that there is one response to each prompt; leave --samples out"
                )
            console.info(f"{y_t.folder}: imported, so that the teacher need not answer")
            return _result(config, dataset, sampled=0)
        samples = _samples(config, dataset, model, engine_name, rendered)
        if not len(new_prompts) and not any(sample.pending(config) for sample in samples):
            console.info(f"{samples[0].table.folder}: all is there already")
            write_card(dataset)
            return _result(config, dataset, sampled=0)
        samples = [sample.with_what_is_there(config, rendered) for sample in samples]
        engine = None
        if shards := max((len(sample.pending(config)) for sample in samples if sample.alike is None), default=0):
            engine = load_engine(model, config.model_copy(update={"engine": engine_name}), shards)
        if len(new_prompts):
            others = teacher if dataset.prompt_set.teacher_prompts else None
            Dataset.create(config.dataset, dataset.prompt_set, new_prompts, config.shard_size, others)
            dataset = Dataset.open(config.dataset, config.student_name)

    source = dataset.prompts_seen_by(config.role) if rendered is None else _store(rendered, dataset)
    for sample in samples:  # all before the first shard, so that nobody takes the first ones for all
        versions = sample.alike.require_provenance()["versions"] if sample.alike else engine.versions if engine else {}
        people = _for_people(config, versions, engine_name)
        claim(sample.table, {**sample.provenance, **people, "license": model.license})
    write_card(dataset)  # before the first shard, since a card with the size of a table that grows would be wrong
    sampled = _fill([_pending(sample, config, model, source) for sample in samples if sample.pending(config)], engine)
    if engine is not None:
        engine.close()
    write_card(dataset)
    return _result(config, dataset, sampled)


@dataclass(frozen=True)
class _Sample:
    """A response to each prompt: where they go, who makes them, and what is taken over from another table."""

    dataset: Dataset  # as the sample sees it
    table: Table[Response]
    provenance: Mapping[str, Any]
    kept: Table[Response] | None = None  # of the round before, for the rows that are not drawn
    alike: Table[Response] | None = None  # of another student that answered the same

    def pending(self, config: GenerateConfig) -> list[int]:
        """The shards that this worker has yet to make."""
        return self.table.pending(config.shard_index, config.num_shards)

    def with_what_is_there(self, config: GenerateConfig, rendered: RenderedPrompts | None) -> _Sample:
        """Raises what `kept_responses` does."""
        kept = kept_responses(self.dataset, config, self.provenance)
        prompts = rendered.provenance() if rendered else None
        return replace(self, kept=kept, alike=responses_alike(self.dataset, config, self.provenance, prompts))


def _samples(
    config: GenerateConfig, dataset: Dataset, model: ModelInfo, engine_name: str, rendered: RenderedPrompts | None
) -> list[_Sample]:
    """All samples that are asked for; a MismatchError where one of them, or its prompts, was begun otherwise."""
    samples = []
    if rendered is not None:
        check_claim(dataset.student_prompts, rendered.provenance())
    for of_sample in map(dataset.of_sample, range(config.samples)):
        provenance = _provenance(config, of_sample, model, engine_name, rendered)
        samples.append(_Sample(of_sample, of_sample.responses(config.role, config.round), provenance))
        check_claim(samples[-1].table, provenance)
    return samples


def _pending(sample: _Sample, config: GenerateConfig, model: ModelInfo, source: PromptSource) -> _PendingResponses:
    """What is to be made of a sample that has shards pending."""
    pending, alike = sample.pending(config), sample.alike
    if alike:
        console.info(f"{alike.folder}: the same model has answered with these settings; its responses are copied")
    rows = dict.fromkeys(pending, ()) if alike else rows_to_sample(source, sample.kept, config, pending)
    return _PendingResponses(config, model.tokenizer, source, sample.table, alike or sample.kept, rows)


def _fill(pending: Sequence[_PendingResponses], engine: Engine | None) -> int:
    """Write what is copied, and then what is sampled, of which it returns the number."""
    for copied in (sample for sample in pending if not any(sample.rows.values())):
        _sample([copied], None)
    asked = [sample for sample in pending if any(sample.rows.values())]
    return sum(_sample(of_samples, engine) for of_samples in together(asked, engine))


def _sample(samples: Sequence[_PendingResponses], engine: Engine | None) -> int:
    """Commit each shard of these samples as soon as the engine has given all of its responses, the samples of a row one
    after the other; where all are kept there is no engine. Returns how many responses were sampled."""
    shards = dict.fromkeys(shard for sample in samples for shard in sample.rows)
    of_shard = {shard: [sample for sample in samples if shard in sample.rows] for shard in shards}
    counts = {shard: sum(len(sample.rows[shard]) for sample in of) for shard, of in of_shard.items()}

    def requests() -> Iterator[list[GenerateRequest]]:
        for shard, of in of_shard.items():
            if counts[shard]:  # an empty group has a meaning of its own
                of_rows = zip(*(sample.requests(shard) for sample in of), strict=True)
                yield [replace(r, key=(shard, n)) for n, r in enumerate(chain.from_iterable(of_rows))]

    def write(shard: int, completions: list[Completion]) -> None:
        for n, sample in enumerate(of_shard[shard]):
            sample.write(shard, completions[n :: len(of_shard[shard])])

    table, config = samples[0].table, samples[0].config
    which = f", {len(samples)} samples" if len(samples) > 1 else f", sample {table.sample}" if table.sample else ""
    results = () if engine is None else engine.generate(requests(), config)
    label = f"generate {config.role}{which}"
    commit_results(table.plan, counts, results, write, label=label, tables=len(samples))
    return sum(counts.values())


def _result(config: GenerateConfig, dataset: Dataset, sampled: int) -> GenerateResult:
    """What there is now, and what a person should hear about it."""
    tables = [dataset.of_sample(k).responses(config.role, config.round) for k in range(config.samples)]
    warnings = response_warnings(dataset, config.role, config.round)
    say(warnings)
    return GenerateResult.of(config.dataset / tables[0].name, tables, sampled, warnings)


def _with_limits_of_the_teacher(config: GenerateConfig, dataset: Dataset) -> GenerateConfig:
    """The config of a student, whose responses may be as long as the teacher's unless the user says otherwise.

    Beside y_t that end by themselves, longer y_s teach length and little else.
    """
    y_t = dataset.responses("teacher", 0).provenance() or {}
    if config.role == "teacher" or not y_t:
        return config
    if "sampling" not in y_t:  # imported responses were not sampled
        return _with_limits_of_text(config, dataset)
    longest = y_t["sampling"]["max_new_tokens"]
    if "max_new_tokens" not in config.model_fields_set:
        room = y_t.get("config", {}).get("max_length")
        return config.with_limits(longest, room if isinstance(room, int) else 0)
    if config.max_new_tokens != longest:
        console.info(
            f"warning: y_s may have {config.max_new_tokens} tokens, as --max-new-tokens says; y_t could have {longest}"
        )
    return config


def _with_limits_of_text(config: GenerateConfig, dataset: Dataset) -> GenerateConfig:
    """The same beside y_t that were imported: as long as the longest of them, with room behind every prompt."""
    table = dataset.responses("teacher", 0)
    table.require_complete("dpkd-offline import")
    room = table.require_provenance().get("config", {}).get("max_length")
    room = max(config.max_length, room if isinstance(room, int) else 0)
    if "max_new_tokens" in config.model_fields_set:
        return config
    lengths = [
        int(Lists(table.read_arrow(shard, ["response_ids"])["response_ids"]).lengths.max())
        for shard in range(table.plan.count)
    ]
    return config.with_limits(max(min(max(lengths), room - dataset.prompt_set.longest_prompt_tokens), 1), room)


def _rendered_prompts(dataset: Dataset, config: GenerateConfig, model: ModelInfo) -> RenderedPrompts | None:
    """The prompts for a student that has another tokenizer than the dataset, or is given another template or other
    arguments of it; None for all other models, which see the dataset's.

    Raises:
        MismatchError: the student has answered the dataset's prompts already.
    """
    if config.role == "teacher":
        return None
    rendered = student_view(dataset, model, config.template, config.template_args, config.system)
    if rendered is None:
        return None
    if not dataset.shares_tokenizer(model.tokenizer_fingerprint):
        console.info(
            f"{config.model} has another tokenizer than the dataset: it sees the prompts in its own template and "
            f"tokens, and score-teacher will score the text of its responses"
        )
    else:
        if dataset.student_prompts.provenance() is None and (rounds := dataset.rounds(STUDENT_RESPONSES)):
            raise MismatchError(
                f"{dataset.responses('student', rounds[0]).folder}: this student answers the prompts as the dataset "
                f"has them; leave --template, --template-args and --system out, or take another --student-name"
            )
        console.info(
            f"{config.model} sees the prompts in a template, or with arguments or a system turn, of its own: they are "
            f"stored in {dataset.student_prompts.name}, and the teacher goes on to see those of the dataset"
        )
    warn_of_template(rendered.model, rendered.template, rendered.arguments)
    return rendered


def _longest_prompt(
    dataset: Dataset, config: GenerateConfig, rendered: RenderedPrompts | None, model: ModelInfo
) -> tuple[str, int]:
    """The id and the number of tokens of the longest prompt; a DataError where the model does not know a token."""
    if rendered is None:
        prompt_set = dataset.prompt_set
        own = prompt_set.longest_prompt, prompt_set.longest_prompt_tokens
        return dataset.longest_of_teacher if config.role == "teacher" else own
    longest = "", 0
    for prompt in (prompt for shard in range(rendered.plan.count) for prompt in rendered.read(shard)):
        check_known(f"prompt '{prompt.id}'", prompt.prompt_ids, model)
        longest = max(longest, (prompt.id, len(prompt.prompt_ids)), key=lambda prompt: prompt[1])
    return longest


def _provenance(
    config: GenerateConfig, dataset: Dataset, model: ModelInfo, engine_name: str, rendered: RenderedPrompts | None
) -> dict[str, Any]:
    """What `_table.json` says of the responses, and what all workers of the table have in common."""
    return {
        "stage": "generate",
        "role": config.role,
        "round": config.round,
        "model": model.identity,
        "vocab_size": model.vocab_size,
        "tokenizer_fingerprint": model.tokenizer_fingerprint,
        **provenance_of(engine_name, config, model),
        "eos_token_ids": model.eos_ids,
        "sampling": {k: v for k, v in redacted_dict(config).items() if k in SamplingOptions.model_fields},
        "seed": config.seed,
        "share": config.share,
        **(own_template(rendered.provenance(), dataset) if rendered else {}),
        "prompt_set": dataset.prompt_set.id,
        **({"sample": dataset.sample} if dataset.sample else {}),
    }


def _for_people(config: GenerateConfig, versions: Mapping[str, str], engine_name: str) -> dict[str, Any]:
    """What `_table.json` says besides, in which the workers of a table may differ. How many samples were asked for at
    once is not of any of them."""
    resolved = redacted_dict(config) | engine_and_dtype(engine_name, config)
    del resolved["samples"]
    return {"config": resolved, "versions": versions}


def _store(rendered: RenderedPrompts, dataset: Dataset) -> Table[Prompt]:
    """Keep the prompts as this student sees them; they are the truth about what its responses answer."""
    table = dataset.student_prompts
    claim(table, rendered.provenance())
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

    def requests(self, shard: int) -> list[GenerateRequest]:
        config, sample = self.config, self.table.sample
        drawn_as = f"{config.role} {sample}" if sample else config.role
        prompts, rows = self.source.read(shard), self.rows[shard]
        self._ids[shard] = [prompts[n].id for n in rows]
        return [
            GenerateRequest(
                (shard, n),
                prompts[n].prompt_ids,
                row_seed(config.seed, drawn_as, config.round, prompts[n].id),
                logps=config.role == "student",  # the teacher's are not used: score-teacher makes them by prefill
            )
            for n in rows
        ]

    def write(self, shard: int, completions: list[Completion]) -> None:
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
