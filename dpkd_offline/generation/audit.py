"""`score-teacher --audit`: some rows scored again in float32, and how far the stored log-probs lie from those.

It has no part in how log-probs are made elsewhere: a forward pass of the model as it is, one sequence at a time.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from transformers import PreTrainedModel

from dpkd_offline.common import console
from dpkd_offline.common.errors import UnavailableError
from dpkd_offline.common.files import write_json
from dpkd_offline.config.data import ScoreTeacherConfig
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import PreferencePair
from dpkd_offline.engines.base import Key, ScoreRequest
from dpkd_offline.generation.pairing import PairSource
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.models.loading import load_model

REFERENCE = {"engine": "transformers", "dtype": "float32"}


def audit(dataset: Dataset, config: ScoreTeacherConfig, source: PairSource, teacher: ModelInfo) -> dict[str, Any]:
    """Score some rows again with transformers in float32, and write how far the stored log-probs lie from those.

    The rows are drawn by a fixed seed. Gaps are stored minus float32, in nats: per token, and of the pair's margin
    log p(y_t|x)/|y_t| - log p(y_s|x)/|y_s|, which is what the loss sees. Returns what `_audit.json` says.
    """
    stored, requests = _drawn_rows(dataset, config, source)
    gaps, margins = _gaps(teacher, requests, stored)
    absolute = np.abs(gaps)
    summary = {
        "model": teacher.identity,
        "against": {**REFERENCE, "versions": {"transformers": transformers.__version__, "torch": torch.__version__}},
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
            "machine with more memory can audit it"
        ) from error


def _gaps_on(
    device: torch.device, teacher: ModelInfo, requests: Sequence[ScoreRequest], stored: Mapping[Key, PreferencePair]
) -> tuple[npt.NDArray[np.float64], list[float]]:
    model = load_model(teacher.name, "float32", teacher.trust_remote_code, device)
    gaps: list[npt.NDArray[np.float64]] = []
    margins: list[float] = []
    with console.progress("audit", len(requests), "row") as shown:
        for request in requests:
            old = stored[request.key].teacher_chosen_logps, stored[request.key].teacher_rejected_logps
            new = (_plain_logps(model, request.prompt_ids, response) for response in request.responses)
            chosen, rejected = (np.subtract(was, now) for was, now in zip(old, new, strict=True))
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
