"""`score-teacher --audit`: some rows scored again in float32, and how far the stored log-probs lie from those.

It has no part in how log-probs are made elsewhere: a forward pass of the model as it is, one sequence at a time. A
teacher that is too large for that is scored again by another engine, in another precision, or on other servers: then
the gap is how far two of them differ, and whatever both do alike is not seen.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers import PreTrainedModel

from dpkd_offline.common import console
from dpkd_offline.common.errors import UnavailableError, UsageError
from dpkd_offline.common.files import write_json
from dpkd_offline.config.base import ModelOptions
from dpkd_offline.config.data import ScoreTeacherConfig
from dpkd_offline.config.engines import ENGINES
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import PreferencePair
from dpkd_offline.engines.base import Key, Score, ScoreRequest
from dpkd_offline.engines.factory import choose_engine, load_engine, provenance_of
from dpkd_offline.generation.pairing import PairSource
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.models.loading import load_model

REFERENCE = {"engine": "transformers", "dtype": "float32"}


def check_audit(config: ScoreTeacherConfig, engine: str, teacher: ModelInfo) -> None:
    """Raise UsageError where an audit would compare `engine`, which scores, with itself, or its engine cannot run."""
    if (options := _options_of_second(config)) is None:
        return
    name = choose_engine(options.engine, options.url)
    if ENGINES[name].served:
        itself = "--audit-url names a server of --url" if set(config.audit_url) & set(config.url) else None
    else:
        same = provenance_of(name, options, teacher) == provenance_of(engine, config, teacher)
        itself = f"--audit-engine {name} in {options.precision} is what scores" if same else None
    if itself:
        raise UsageError(f"{itself}: compared with itself nothing is ever off; name another, or another precision")


def audit(dataset: Dataset, config: ScoreTeacherConfig, source: PairSource, teacher: ModelInfo) -> dict[str, Any]:
    """Score some rows again, and write how far the stored log-probs lie from those.

    The rows are drawn by a fixed seed, and scored with transformers in float32, or by what the config names instead.
    Gaps are stored minus new, in nats: per token, and of the pair's margin log p(y_t|x)/|y_t| - log p(y_s|x)/|y_s|,
    which is what the loss sees. Returns what `_audit.json` says.
    """
    stored, requests = _drawn_rows(dataset, config, source)
    if (options := _options_of_second(config)) is None:
        gaps, margins = _gaps(teacher, requests, stored)
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        against: dict[str, Any] = {**REFERENCE, "versions": versions}
    else:
        gaps, margins, against = _gaps_to_second(options, teacher, requests, stored)
    absolute = np.abs(gaps)
    summary = {
        "model": teacher.identity,
        "against": against,
        "rows": len(requests),
        "tokens": len(gaps),
        "gap_mean": float(gaps.mean()),
        "gap_abs_mean": float(absolute.mean()),
        "gap_abs_p99": float(np.quantile(absolute, 0.99)),
        "gap_abs_max": float(absolute.max()),
        "margin_gap_abs_mean": float(np.abs(margins).mean()),
    }
    write_json(dataset.pairs(config.round).folder / "_audit.json", summary)
    console.info(
        f"audit: {len(requests)} rows, {len(gaps)} tokens against {against['engine']} in {against['dtype']}: a token's "
        f"log-prob is off by {summary['gap_abs_mean']:.4f} nats (mean {summary['gap_mean']:+.4f}, 99 % "
        f"{summary['gap_abs_p99']:.4f}), a pair's margin by {summary['margin_gap_abs_mean']:.4f}"
    )
    return summary


def _drawn_rows(
    dataset: Dataset, config: ScoreTeacherConfig, source: PairSource
) -> tuple[dict[Key, PreferencePair], list[ScoreRequest]]:
    """The pairs of the rows that are drawn, as they are stored and as the teacher is asked for them."""
    size = dataset.plan.shard_size
    drawn = np.random.default_rng(0).permutation(dataset.plan.rows)[: config.audit]
    by_shard: dict[int, list[int]] = {}
    for row in sorted(drawn.tolist()):
        by_shard.setdefault(row // size, []).append(row % size)
    stored: dict[Key, PreferencePair] = {}
    requests: list[ScoreRequest] = []
    for shard, rows in by_shard.items():
        sources, pairs = source.rows(shard), dataset.pairs(config.round).read(shard)
        for k in rows:
            stored[shard, k] = pairs[k]
            requests.append(ScoreRequest((shard, k), sources[k].teacher_prompt_ids, sources[k].teacher_response_ids))
    return stored, requests


def _options_of_second(config: ScoreTeacherConfig) -> ModelOptions | None:
    """The engine that an audit compares with, where it is not float32 by a plain forward pass.

    It has none of the scoring engine's own options: what these change is part of what is audited.
    """
    if not (config.audit_engine or config.audit_url):
        return None
    engine = "http" if config.audit_url else config.audit_engine
    own = {"engine": engine, "url": config.audit_url, "dtype": config.audit_dtype or "float32", "cluster": "none"}
    kept = {name: getattr(config, name) for name in ("concurrency", "batch_size", "max_length", "trust_remote_code")}
    splits = config.tensor_parallel_size if ENGINES[str(engine)].splits_model else 1
    return ModelOptions.model_validate({**kept, **own, "tensor_parallel_size": splits, "replicas": 1})


def _gaps_to_second(
    options: ModelOptions, teacher: ModelInfo, requests: Sequence[ScoreRequest], stored: Mapping[Key, PreferencePair]
) -> tuple[npt.NDArray[np.float64], list[float], dict[str, Any]]:
    """As `_gaps`, to another engine's log-probs; and what that is.

    Raises:
        UnavailableError: it cannot be loaded; what is scored is committed.
    """
    engine = load_engine(teacher, options)
    new: dict[Key, list[Score]] = {}
    with console.progress("audit", len(requests), "row") as shown:
        for key, scores in engine.score([requests]):
            new[key] = scores
            shown.advance()
    maker = {**provenance_of(options.engine, options, teacher), "versions": engine.versions}
    engine.close()
    pairs = [_gaps_of(stored[r.key], [score.logps for score in new[r.key]]) for r in requests]
    return (
        np.concatenate([gap for both in pairs for gap in both]),
        [y_t.mean() - y_s.mean() for y_t, y_s in pairs],
        maker,
    )


def _gaps_of(
    pair: PreferencePair, new: Iterable[Sequence[float] | npt.NDArray[np.float64]]
) -> list[npt.NDArray[np.float64]]:
    """Stored minus new log-probs of y_t and of y_s."""
    old = pair.teacher_chosen_logps, pair.teacher_rejected_logps
    return [np.subtract(was, now, dtype=np.float64) for was, now in zip(old, new, strict=True)]


def _gaps(
    teacher: ModelInfo, requests: Sequence[ScoreRequest], stored: Mapping[Key, PreferencePair]
) -> tuple[npt.NDArray[np.float64], list[float]]:
    """Stored minus new log-probs: of every token, and of every pair's margin.

    Raises:
        UnavailableError: there is too little memory for it; what is scored is committed.
    """
    if torch.cuda.is_available():
        try:
            return _gaps_on(torch.device("cuda"), teacher, requests, stored)
        except torch.OutOfMemoryError:
            console.info("audit: in float32 the teacher does not fit on the GPU; it goes on on the CPU")
        gc.collect()  # what the failed try held
        torch.cuda.empty_cache()
    try:
        return _gaps_on(torch.device("cpu"), teacher, requests, stored)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise UnavailableError(
            "--audit: in float32 the teacher does not fit into memory here; what is scored is committed, so that a "
            "machine with more memory can audit it, or another engine or server: --audit-engine, --audit-url"
        ) from error


def _gaps_on(
    device: torch.device, teacher: ModelInfo, requests: Sequence[ScoreRequest], stored: Mapping[Key, PreferencePair]
) -> tuple[npt.NDArray[np.float64], list[float]]:
    model = load_model(teacher.name, "float32", teacher.trust_remote_code, device)
    gaps: list[npt.NDArray[np.float64]] = []
    margins: list[float] = []
    with console.progress("audit", len(requests), "row") as shown:
        for request in requests:
            new = (_plain_logps(model, request.prompt_ids, response) for response in request.responses)
            chosen, rejected = _gaps_of(stored[request.key], new)
            gaps += [chosen, rejected]
            margins.append(chosen.mean() - rejected.mean())
            shown.advance()
    return np.concatenate(gaps), margins


@torch.inference_mode()
def _plain_logps(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int]) -> npt.NDArray[np.float64]:
    """log p of the tokens of a response."""
    input_ids = torch.tensor([[*prompt, *response]], device=model.device)
    logits = model(input_ids=input_ids).logits[0, len(prompt) - 1 : -1]
    logps = logits.double().log_softmax(-1).gather(-1, input_ids[0, len(prompt) :, None])[:, 0]
    return np.asarray(logps.cpu())
