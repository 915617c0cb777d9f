"""`score-teacher --audit`: some rows scored again in float32, and how far the stored log-probs lie from those."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dpkd_offline.common import console
from dpkd_offline.common.files import write_json
from dpkd_offline.config.data import ScoreTeacherConfig
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import PreferencePair
from dpkd_offline.engines.base import Engine, Key, ScoreRequest
from dpkd_offline.engines.factory import load_engine
from dpkd_offline.generation.pairing import PairSource
from dpkd_offline.models.info import ModelInfo

REFERENCE = {"engine": "transformers", "dtype": "float32"}


def audit(dataset: Dataset, config: ScoreTeacherConfig, source: PairSource, teacher: ModelInfo) -> dict[str, Any]:
    """Score some rows again with transformers in float32, and write how far the stored log-probs lie from those.

    The rows are drawn by a fixed seed. Gaps are stored minus float32, in nats: per token, and of the pair's margin
    log p(y_t|x)/|y_t| - log p(y_s|x)/|y_s|, which is what the loss sees. Returns what `_audit.json` says.
    """
    stored, requests = _drawn_rows(dataset, config, source)
    alone = {"url": (), "cluster": "none", "tensor_parallel_size": 1}
    engine = load_engine(teacher, config.model_copy(update={**REFERENCE, **alone}))
    gaps, margins = _gaps(engine, requests, stored)
    engine.close()
    absolute = np.abs(gaps)
    summary = {
        "model": teacher.identity,
        "against": {**REFERENCE, "versions": engine.versions},
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
        f"audit: {len(requests)} rows, {len(gaps)} tokens against transformers in float32: a token's log-prob is off "
        f"by {summary['gap_abs_mean']:.4f} nats (mean {summary['gap_mean']:+.4f}, 99 % {summary['gap_abs_p99']:.4f}), "
        f"a pair's margin by {summary['margin_gap_abs_mean']:.4f}"
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


def _gaps(
    engine: Engine, requests: Sequence[ScoreRequest], stored: Mapping[Key, PreferencePair]
) -> tuple[npt.NDArray[np.float64], list[float]]:
    """Stored minus new log-probs: of every token, and of every pair's margin."""
    gaps: list[npt.NDArray[np.float64]] = []
    margins: list[float] = []
    with console.progress("audit", len(requests), "row") as shown:
        for key, scores in engine.score([requests]):
            old = stored[key].teacher_chosen_logps, stored[key].teacher_rejected_logps
            chosen, rejected = (np.subtract(logps, new.logps) for logps, new in zip(old, scores, strict=True))
            gaps += [chosen, rejected]
            margins.append(chosen.mean() - rejected.mean())
            shown.advance()
    return np.concatenate(gaps), margins
