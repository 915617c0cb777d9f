"""`score-teacher`: the teacher's per-token log-probs of both responses of every pair."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dpkd_offline import log
from dpkd_offline.card import write_card
from dpkd_offline.checkpoint import (
    context_length,
    eos_ids,
    load_tokenizer,
    model_identity,
    tokenizer_fingerprint,
    vocab_size,
)
from dpkd_offline.columns import Lists
from dpkd_offline.config import ScoreTeacherConfig, as_plain
from dpkd_offline.dataset import Dataset
from dpkd_offline.engines import Score, ScoreRequest, choose_engine, load_engine
from dpkd_offline.errors import DataError, MismatchError, UsageError
from dpkd_offline.records import PreferencePair, Prompt, Response


def score_teacher(config: ScoreTeacherConfig) -> Path:
    """Join prompts, y_t and y_s of a round, score both responses by prefill, and commit the pairs.

    Both sides go through the same engine, in the same requests; the log-probs of sampling time are not used.
    Returns the folder of the pairs. The same call again goes on after the last committed shard.

    Raises:
        DataError: responses are missing or malformed.
        MismatchError: the model is not the teacher that sampled y_t, or has another tokenizer.
        UnavailableError: the model or the engine cannot be loaded.
    """
    dataset = Dataset.open(config.dataset)
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    dataset.check_tokenizer(config.model, tokenizer_fingerprint(tokenizer))
    chosen, rejected = dataset.responses("teacher", 0), dataset.responses("student", config.round)
    chosen.require_complete("dpkd-offline generate --role teacher")
    rejected.require_complete(f"dpkd-offline generate --role student --round {config.round}")
    teacher, student = model_identity(config.model), (rejected.provenance() or {}).get("model")
    sampler = (chosen.provenance() or {}).get("model")
    if sampler is None or sampler["revision"] != teacher["revision"]:
        raise MismatchError(
            f"{chosen.folder / '_table.json'}: the teacher's responses are of "
            f"{sampler and sampler['name']} ({sampler and sampler['revision'][:19]}), --model is {teacher['name']} "
            f"({teacher['revision'][:19]}); score with the teacher that sampled"
        )
    engine_name = choose_engine(config.engine)
    provenance = {
        "stage": "score-teacher",
        "round": config.round,
        "model": teacher,
        "student": student,
        "vocab_size": vocab_size(config.model, config.trust_remote_code),
        "dtype": config.dtype,
        "engine": engine_name,
        "prompt_set": dataset.prompt_set.id,
    }
    pairs = dataset.pairs(config.round)
    pairs.check_claim(provenance)
    pending = pairs.pending(config.shard_index, config.num_shards)
    if not pending:
        log.info(f"{pairs.folder}: all is there already")
        return pairs.folder

    _check_lengths(dataset, config, engine_name)
    eos = eos_ids(config.model, tokenizer, config.trust_remote_code)
    engine = load_engine(config.model, config.model_copy(update={"engine": engine_name}), eos)
    pairs.claim({**provenance, "config": as_plain(config), "versions": engine.versions})
    joined: dict[int, list[tuple[Prompt, Response, Response]]] = {}

    def requests() -> Iterator[list[ScoreRequest]]:
        for shard in pending:
            rows = list(zip(dataset.prompts.read(shard), chosen.read(shard), rejected.read(shard), strict=True))
            for k, (prompt, y_t, y_s) in enumerate(rows):
                if not prompt.id == y_t.id == y_s.id:
                    raise DataError(f"{chosen.path(shard)}: row {k}: column 'id': {y_t.id}, the prompt is {prompt.id}")
            joined[shard] = rows
            yield [
                ScoreRequest((shard, k), prompt.prompt_ids, [y_t.response_ids, y_s.response_ids])
                for k, (prompt, y_t, y_s) in enumerate(rows)
            ]

    def rows_of(shard: int, scores: list[list[Score]]) -> list[PreferencePair]:
        return [
            _pair(prompt, y_t, y_s, chosen.logps, rejected.logps, config.round)
            for (prompt, y_t, y_s), (chosen, rejected) in zip(joined.pop(shard), scores, strict=True)
        ]

    pairs.commit(pending, engine.score(requests(), config.top_k), rows_of, label="score-teacher")
    engine.close()
    write_card(dataset)
    return pairs.folder


def _check_lengths(dataset: Dataset, config: ScoreTeacherConfig, engine: str) -> None:
    """Raise UsageError unless every prompt with its responses fits into the teacher's context."""
    context = context_length(config.model, config.trust_remote_code)
    limit = min(config.max_length, context - (engine == "vllm"))  # which scores by asking for one token more
    chosen, rejected = dataset.responses("teacher", 0), dataset.responses("student", config.round)
    sampled = [table.require_provenance()["sampling"]["max_new_tokens"] for table in (chosen, rejected)]
    if dataset.prompt_set.longest_prompt_tokens + max(sampled) <= limit:
        return  # no need to look: nothing can be longer
    for shard in range(dataset.plan.count):
        rows = dataset.prompts.read_arrow(shard, ["id", "prompt_ids"])
        responses = [Lists(table.read_arrow(shard)["response_ids"]).lengths for table in (chosen, rejected)]
        needed = Lists(rows["prompt_ids"]).lengths + np.maximum(*responses)
        if len(long := np.flatnonzero(needed > limit)):
            raise UsageError(
                f"prompt '{rows['id'][long[0]]}' with its responses has {needed[long[0]]} tokens, max-length and the "
                f"context of {config.model} give {limit}; raise --max-length, or take another teacher"
            )


def _pair(
    prompt: Prompt, y_t: Response, y_s: Response, chosen_logps: list[float], rejected_logps: list[float], round: int
) -> PreferencePair:
    if not all(map(math.isfinite, (*chosen_logps, *rejected_logps))):
        raise DataError(f"prompt '{prompt.id}': the teacher gave a log-prob that is not finite; try --dtype float32")
    return PreferencePair(
        id=prompt.id,
        prompt=prompt.prompt,
        prompt_ids=prompt.prompt_ids,
        reference=prompt.references[0] if prompt.references else None,
        chosen=y_t.response,
        chosen_ids=y_t.response_ids,
        chosen_finish_reason=y_t.finish_reason,
        rejected=y_s.response,
        rejected_ids=y_s.response_ids,
        rejected_finish_reason=y_s.finish_reason,
        teacher_chosen_logps=chosen_logps,
        teacher_rejected_logps=rejected_logps,
        behavior_rejected_logps=y_s.logps,
        round=round,
    )
