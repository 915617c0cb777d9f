"""What `generate` and `score-teacher` give back to Python: a table, and numbers of it from its manifest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpkd_offline.common.results import Result
from dpkd_offline.dataset.columns import ShardStats
from dpkd_offline.dataset.schema import PreferencePair, Response
from dpkd_offline.dataset.table import Table


@dataclass(frozen=True)
class GenerateResult(Result):
    """The folder of responses, of several samples that of the first. Rows, tokens and cut off count all that is
    committed of all samples that were asked for, whoever sampled it."""

    samples: int  # responses per prompt
    rows: int
    sampled: int  # rows that this call sampled
    tokens: int
    cut_off: int  # responses without an end within max_new_tokens

    @classmethod
    def of(
        cls, path: Path, tables: Sequence[Table[Response]], sampled: int, warnings: tuple[str, ...] = ()
    ) -> GenerateResult:
        rows, stats = _sums(tables)
        tokens, cut_off = stats.tokens.get("response_ids", 0), stats.truncated.get("finish_reason", 0)
        return cls(path, len(tables), rows, sampled, tokens, cut_off, warnings=warnings)


@dataclass(frozen=True)
class ScoreResult(Result):
    """The folder of pairs, of several samples that of the first. Rows and means are of all pairs that are committed of
    all samples; means are NaN where there are none."""

    samples: int  # pairs per prompt
    rows: int
    scored: int  # responses that this call scored
    reused: int  # responses whose log-probs this call took from another table
    chosen_logp: float  # mean over pairs of log p(y_t|x)/|y_t|, in nats a token
    rejected_logp: float  # the same of y_s
    audit: Mapping[str, Any] | None  # what `_audit.json` says, where this call audited

    @property
    def margin(self) -> float:
        """Mean of log p(y_t|x)/|y_t| - log p(y_s|x)/|y_s|, in nats a token."""
        return self.chosen_logp - self.rejected_logp

    @classmethod
    def of(
        cls,
        path: Path,
        tables: Sequence[Table[PreferencePair]],
        scored: int,
        reused: int,
        audit: Mapping[str, Any] | None,
        warnings: tuple[str, ...] = (),
    ) -> ScoreResult:
        rows, stats = _sums(tables)
        chosen, rejected = (
            stats.row_means.get(f"teacher_{side}_logps", 0.0) / rows if rows else math.nan
            for side in ("chosen", "rejected")
        )
        return cls(path, len(tables), rows, scored, reused, chosen, rejected, audit, warnings=warnings)


def _sums(tables: Sequence[Table[Any]]) -> tuple[int, ShardStats]:
    """The rows that are committed, and the sums over them that the manifests hold."""
    entries = [entry for table in tables for entry in table.entries().values()]
    stats = ShardStats.together([entry.facts for entry in entries])
    return sum(entry.rows for entry in entries), stats
