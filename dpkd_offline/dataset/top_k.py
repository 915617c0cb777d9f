"""The teacher's likeliest tokens in few bytes: which types their columns have, and what is read of them.

A new table holds log-probs in half precision, and ids of 16 bits where these name every token of the vocabulary. Half
precision keeps 11 bits of a log-prob, and so moves it by less than 2⁻¹¹ of itself. What that may be of the numbers that
are stored follows from them alone, and stands in the manifest entry of each shard. The mass stays in float32, and a
reader shifts the log-probs of a position so that they give it again: what is left to all other tokens is then known as
well as from float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dpkd_offline.dataset.schema import HALF_TOP_LOGPS, SHORT_TOP_IDS, SIDES, Side

LEAST_HALF = -65504.0  # nats; what is less is minus infinity in half precision
NOT_STORED = -1e4  # the log-prob that stands for a token that is not stored: it has no probability, and is a number

Floats = npt.NDArray[np.floating[Any]]


def compact_columns(vocab_size: int) -> dict[str, str]:
    """The columns of a new table that are not as its record has them, by name and Arrow type."""
    types = {f"{side}_top_logps": HALF_TOP_LOGPS for side in SIDES}
    if vocab_size <= 1 << 16:
        types |= {f"{side}_top_ids": SHORT_TOP_IDS for side in SIDES}
    return {name: str(type_) for name, type_ in types.items()}


def covering(logps: Sequence[float], share: float) -> int:
    """How many of a position's tokens, likeliest first, are needed to cover that share of all probability."""
    return min(len(logps), int(np.searchsorted(np.cumsum(np.exp(logps)), share)) + 1)


def rounding(halves: npt.NDArray[np.float16]) -> npt.NDArray[np.float64]:
    """The most that each number may have been moved by when it was rounded to half precision: half a step there."""
    sizes = np.minimum(np.abs(halves), np.float16(-LEAST_HALF - 32))  # behind the largest number stands infinity
    with np.errstate(invalid="ignore"):  # of what is no number, which is refused elsewhere
        steps: npt.NDArray[np.float16] = np.spacing(sizes)
    return steps.astype(np.float64) / 2


@dataclass(frozen=True)
class Likeliest:
    """One side of a shard: the tokens of P positions, those of all rows after one another, K or fewer at each."""

    ends: npt.NDArray[np.int64]  # of each row, in positions
    ids: npt.NDArray[np.int32]  # [P, K], -1 behind the last of a position
    logps: Floats  # [P, K] as they are stored, NOT_STORED behind the last
    mass: npt.NDArray[np.float32]  # [P]
    is_stored: npt.NDArray[np.bool_]  # [P, K]

    @classmethod
    def of(cls, rows: pa.Table, side: Side, k: int) -> Likeliest:
        """Of columns that have the same number of entries, and 1 to `k` at each position."""
        ids, logps, mass = (rows[f"{side}_top_{name}"].combine_chunks() for name in ("ids", "logps", "mass"))
        ends = np.cumsum(pc.list_value_length(ids).to_numpy(), dtype=np.int64)
        counts = pc.list_value_length(ids.flatten()).to_numpy()
        is_stored = np.arange(k) < counts[:, None]
        matrices = []
        for column, rest in ((ids, -1), (logps, NOT_STORED)):
            values = column.flatten().flatten().to_numpy()
            if is_stored.all():
                matrices.append(values.reshape(-1, k))
            else:
                matrices.append(np.full(is_stored.shape, rest, values.dtype if rest != -1 else np.int32))
                matrices[-1][is_stored] = values
        return cls(ends, matrices[0].astype(np.int32), matrices[1], mass.flatten().to_numpy(), is_stored)

    @property
    def read_logps(self) -> npt.NDArray[np.float32]:
        """[P, K] as training reads them: those in half precision shifted, so that their probabilities give the mass."""
        if self.logps.dtype != np.float16:
            return self.logps.astype(np.float32, copy=False)
        logps = self.logps.astype(np.float64)
        logps += np.log(self.mass / np.exp(logps).sum(-1))[:, None]
        return np.where(self.is_stored, logps, NOT_STORED).astype(np.float32)
