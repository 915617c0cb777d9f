"""`score-teacher`: the teacher's per-token log-probs of both responses of every pair."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError, MismatchError, UsageError
from dpkd_offline.common.files import write_json
from dpkd_offline.config.base import redacted_dict
from dpkd_offline.config.data import ScoreTeacherConfig
from dpkd_offline.dataset.card import write_card
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import PreferencePair, TopK
from dpkd_offline.dataset.writing import claim, commit_results, write_shard
from dpkd_offline.engines.base import Engine, Score, ScoreRequest
from dpkd_offline.engines.factory import choose_engine, load_engine, provenance_of
from dpkd_offline.generation.pairing import PairRow, PairSource
from dpkd_offline.generation.reuse import ReusableTable, ReusableTables, ask, check_taken_over
from dpkd_offline.models.info import (
    context_length,
    eos_ids,
    load_tokenizer,
    model_identity,
    model_license,
    tokenizer_fingerprint,
    vocab_size,
)


def score_teacher(config: ScoreTeacherConfig) -> Path:
    """Join prompts, y_t and y_s of a round, score both responses by prefill, and commit the pairs.

    Both sides go through the same engine, in the same requests; the log-probs of sampling time are not used. What the
    round before has scored is taken over and not scored again: y_t, which is the same in every round, and the y_s that
    `generate --share` kept. Both sides are of one code path then, too, since nothing is taken over but what the same
    teacher, engine, dtype and way of scoring has made of the same tokens: the path gave then what it would give now,
    within the engine's arithmetic, in which a response's numbers do not depend on what is scored beside it.
    Returns the folder of the pairs. The same call again goes on after the last committed shard.

    Raises:
        DataError: responses are missing or malformed, or log-probs that this round was begun with.
        MismatchError: the model is not the teacher that sampled y_t, or has another tokenizer.
        UnavailableError: the model or the engine cannot be loaded.
    """
    dataset = Dataset.open(config.dataset, config.student_name)
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    dataset.check_tokenizer(config.model, tokenizer_fingerprint(tokenizer))
    eos = eos_ids(config.model, tokenizer, config.trust_remote_code)
    join = PairSource(dataset, config, tokenizer, eos)
    teacher = _the_one_that_sampled(dataset, config.model)
    engine_name = choose_engine(config.engine, config.url)
    made_by = provenance_of(engine_name, config.dtype)
    provenance = {
        "stage": "score-teacher",
        "round": config.round,
        "model": teacher,
        "student": join.made_by.get("model"),
        **join.provenance(vocab_size(config.model, config.trust_remote_code)),
        **made_by,
        "prompt_set": dataset.prompt_set.id,
    }
    pairs, top_k = ReusableTable(dataset.pairs, provenance, config), None
    if config.top_k:
        top_k = ReusableTable(dataset.top_k, {**provenance, "top_k": config.top_k}, config)
    if pending := sorted(pairs.due | (top_k.due if top_k else set())):
        limit = _longest_allowed(config, engine_name)
        _check_lengths(dataset, join, config, limit)
        engine = load_engine(config.model, config.model_copy(update={"engine": engine_name}), eos)
        for_people = {"config": redacted_dict(config) | made_by, "versions": engine.versions}
        made = {**for_people, "license": model_license(config.model)}
        claim(pairs.table, pairs.provenance | made)
        if top_k:
            claim(top_k.table, top_k.provenance | made)
        write_card(dataset)  # before the first shard, since a card with the size of a table that grows would be wrong
        _score(config, engine, join, pending, (pairs, top_k))
        engine.close()
    else:
        console.info(f"{pairs.table.folder}: all is there already")
    write_card(dataset)
    if config.audit and pairs.table.pending():
        console.info("audit: not before every shard is there; the same command again will do it")
    elif config.audit:
        audit(dataset, config, join, teacher)
        write_card(dataset)
    return config.dataset / pairs.table.name


def _the_one_that_sampled(dataset: Dataset, model: str) -> dict[str, str]:
    """Who the teacher is, or a MismatchError where its responses are of another. Imported ones are nobody's."""
    teacher, chosen = model_identity(model), dataset.responses("teacher", 0)
    sampler = chosen.require_provenance().get("model")
    if sampler is not None and sampler["revision"] != teacher["revision"]:
        raise MismatchError(
            f"{chosen.folder / '_table.json'}: the teacher's responses are of {sampler['name']} "
            f"({sampler['revision'][:19]}), --model is {teacher['name']} ({teacher['revision'][:19]}); score with the "
            f"teacher that sampled"
        )
    return teacher


def _score(
    config: ScoreTeacherConfig, engine: Engine, join: PairSource, pending: list[int], renewals: ReusableTables
) -> None:
    """Score and commit the pending shards; the top-k of a shard before its pairs."""
    pairs, top_k = renewals
    asked = ask(config, join, pending, renewals)
    joined: dict[int, list[PairRow]] = {}
    lost = Counter[str]()

    def requests() -> Iterator[list[ScoreRequest]]:
        for shard, of in asked.items():
            if of.rows:  # an empty group has a meaning of its own
                rows = joined[shard] = join.rows(shard)
                yield [
                    ScoreRequest((shard, k), rows[k].asked_prompt_ids, rows[k].asked_response_ids[of.first_side :])
                    for k in of.rows
                ]

    def write(shard: int, scores: list[list[Score]]) -> None:
        rows = joined.pop(shard) if shard in joined else join.rows(shard)
        found = dict(zip(asked[shard].rows, scores, strict=True))
        if any(table is not None and table.takes_over(shard) for table in renewals):
            check_taken_over(pairs, rows, shard, config.round)
        if top_k is not None and shard in top_k.due:
            write_shard(top_k.table, shard, _likeliest(rows, found, top_k.taken_over(shard), config.round))
        if shard in pairs.due:
            write_shard(pairs.table, shard, _pairs(rows, found, pairs.taken_over(shard), config.round))
        for side, place in (("y_t", 0), ("y_s", 1)):
            lost[side] += sum(not row.exact[place] for row in rows)

    waited_for = {shard: len(of.rows) for shard, of in asked.items()}
    commit_results(pairs.table.plan, waited_for, engine.score(requests(), config.top_k), write, label="score-teacher")
    if join.by_text:
        scored = sum(map(pairs.table.plan.rows_of, pending))
        console.info(
            f"scored by text: of {scored} rows {lost['y_t']} y_t and {lost['y_s']} y_s are not quite the same text in "
            f"the tokens of both models (columns chosen_exact and rejected_exact)"
        )


def audit(dataset: Dataset, config: ScoreTeacherConfig, join: PairSource, teacher: Mapping[str, str]) -> dict[str, Any]:
    """Score some rows again with transformers in float32, and write how far the stored log-probs lie from those.

    The rows are drawn by a fixed seed. Gaps are stored minus float32, in nats: per token, and of the pair's margin
    log p(y_t|x)/|y_t| - log p(y_s|x)/|y_s|, which is what the loss sees.
    """
    pairs = dataset.pairs(config.round)
    rows = np.random.default_rng(0).permutation(dataset.plan.rows)[: config.audit]
    places: dict[int, list[int]] = {}
    for row in sorted(rows.tolist()):
        places.setdefault(row // dataset.plan.shard_size, []).append(row % dataset.plan.shard_size)
    stored: dict[tuple[int, int], PreferencePair] = {}
    asked: list[ScoreRequest] = []
    for shard, in_shard in places.items():
        rows_there, pairs_there = join.rows(shard), pairs.read(shard)
        for row in in_shard:
            stored[shard, row], there = pairs_there[row], rows_there[row]
            asked.append(ScoreRequest((shard, row), there.asked_prompt_ids, there.asked_response_ids))
    options = config.model_copy(
        update={"engine": "transformers", "dtype": "float32", "url": (), "cluster": "none", "tensor_parallel_size": 1}
    )
    engine = load_engine(config.model, options, [0])
    gaps: list[npt.NDArray[np.float64]] = []
    margins: list[float] = []
    with console.progress("audit", len(asked), "row") as shown:
        for key, scores in engine.score([asked]):
            before = stored[key].teacher_chosen_logps, stored[key].teacher_rejected_logps
            chosen, rejected = (np.subtract(old, new.logps) for old, new in zip(before, scores, strict=True))
            gaps += [chosen, rejected]
            margins.append(chosen.mean() - rejected.mean())
            shown.advance()
    engine.close()
    all_gaps = np.concatenate(gaps)
    found = {
        "model": teacher,
        "against": {"engine": "transformers", "dtype": "float32", "versions": engine.versions},
        "rows": len(asked),
        "tokens": len(all_gaps),
        "gap_mean": float(all_gaps.mean()),
        "gap_abs_mean": float(np.abs(all_gaps).mean()),
        "gap_abs_p99": float(np.quantile(np.abs(all_gaps), 0.99)),
        "gap_abs_max": float(np.abs(all_gaps).max()),
        "margin_gap_abs_mean": float(np.abs(margins).mean()),
    }
    write_json(pairs.folder / "_audit.json", found)
    console.info(
        f"audit: {len(asked)} rows, {len(all_gaps)} tokens against transformers in float32: a token's log-prob is off "
        f"by {found['gap_abs_mean']:.4f} nats (mean {found['gap_mean']:+.4f}, 99 % {found['gap_abs_p99']:.4f}), "
        f"a pair's margin by {found['margin_gap_abs_mean']:.4f}"
    )
    return found


def _longest_allowed(config: ScoreTeacherConfig, engine: str) -> int:
    """Tokens of prompt and response that the teacher takes."""
    context = context_length(config.model, config.trust_remote_code)
    return min(config.max_length, context - (engine in ("vllm", "http")))  # which ask for one token more


def _check_lengths(dataset: Dataset, join: PairSource, config: ScoreTeacherConfig, limit: int) -> None:
    """Raise UsageError unless every prompt with its responses fits into the teacher's context."""
    unknown = {"max_new_tokens": limit}  # of responses that were imported
    sampled = [
        table.require_provenance().get("sampling", unknown)["max_new_tokens"]
        for table in (dataset.responses("teacher", 0), dataset.responses("student", config.round))
    ]
    of_this_round = join.made_by.get("share") == 1  # those that are kept may be longer than this round allows
    if of_this_round and not join.by_text and dataset.prompt_set.longest_prompt_tokens + max(sampled) <= limit:
        return  # no need to look: nothing can be longer
    for shard in range(dataset.plan.count):
        for row in join.rows(shard):
            needed = len(row.asked_prompt_ids) + max(map(len, row.asked_response_ids))
            if needed > limit:
                raise UsageError(
                    f"prompt '{row.prompt.id}' with its responses has {needed} tokens, max-length and the context of "
                    f"{config.model} give {limit}; raise --max-length, or take another teacher"
                )


def _pairs(
    rows: Sequence[PairRow], found: Mapping[int, Sequence[Score]], before: Sequence[PreferencePair] | None, round: int
) -> list[PreferencePair]:
    """A shard's pairs; the last score of a row is that of y_s."""
    if before is None:
        return [_pair(row, *(score.logps for score in found[k])) for k, row in enumerate(rows)]
    return [
        old if row.y_s.round < round else _pair(row, old.teacher_chosen_logps, found[k][-1].logps)
        for k, (row, old) in enumerate(zip(rows, before, strict=True))
    ]


def _pair(row: PairRow, chosen_logps: list[float], rejected_logps: list[float]) -> PreferencePair:
    prompt, y_t, y_s = row.prompt, row.y_t, row.y_s
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
        chosen_exact=row.exact[0],
        rejected_exact=row.exact[1],
        behavior_rejected_logps=y_s.logps,
        round=y_s.round,
    )


def _likeliest(
    rows: Sequence[PairRow], found: Mapping[int, Sequence[Score]], before: Sequence[TopK] | None, round: int
) -> list[TopK]:
    """The likeliest tokens of a shard's pairs; the last score of a row is that of y_s."""

    def said(side: str, score: Score) -> dict[str, Any]:
        mass = [min(sum(map(math.exp, logps)), 1.0) for logps in score.top_logps]
        return {f"{side}_top_ids": score.top_ids, f"{side}_top_logps": score.top_logps, f"{side}_top_mass": mass}

    if before is None:
        return [
            TopK(row.prompt.id, **said("chosen", found[k][0]), **said("rejected", found[k][1]))
            for k, row in enumerate(rows)
        ]
    return [
        old if row.y_s.round < round else replace(old, **said("rejected", found[k][-1]))
        for k, (row, old) in enumerate(zip(rows, before, strict=True))
    ]
