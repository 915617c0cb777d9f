"""How far a measure may be off: its spread over seeds, and its 95 % interval over prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
import numpy.typing as npt

Numbers = Sequence[float] | npt.NDArray[np.float64]
LEVEL, RESAMPLES, SEED = 0.95, 2000, 0
AT_ONCE = 2**18  # numbers that are drawn at once


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def interval_of_mean(values: Numbers) -> tuple[float, float] | None:
    """The 95 % interval of the mean of values [N], one of each prompt; None for fewer than two.

    Percentiles of the means of 2,000 bootstrap samples. For small N they are taken further out, as far as Student's t
    is from a normal distribution (Hesterberg, "What Teachers Should Know About the Bootstrap", 2015): plain ones cover
    less than they say. The same values have the same interval.
    """
    from scipy import stats

    sample = np.asarray(values, dtype=np.float64)
    if (n := len(sample)) < 2:
        return None
    if np.ptp(sample) == 0:
        return float(sample[0]), float(sample[0])
    reach = math.sqrt(n / (n - 1)) * stats.t.ppf(0.5 + LEVEL / 2, n - 1)
    interval = stats.bootstrap(
        (sample,),
        np.mean,
        confidence_level=2 * stats.norm.cdf(reach) - 1,
        n_resamples=RESAMPLES,
        batch=max(AT_ONCE // n, 1),
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Difference:
    """By how much one model's measure is above another's on the same prompts."""

    mean: float
    interval: tuple[float, float] | None  # 95 %
    prompts: int

    @classmethod
    def of(cls, before: Numbers, after: Numbers) -> Difference:
        """From a number of each prompt, in the same order: after - before."""
        gains = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
        return cls(float(gains.mean()), interval_of_mean(gains), len(gains))

    @property
    def sign(self) -> int:
        """1 or -1 where the interval has zero outside, else 0."""
        if self.interval is None:
            return 0
        low, high = self.interval
        return (low > 0) - (high < 0)

    def word(self, better: int) -> str:
        """better, worse, or that these prompts cannot tell; `better` is 1 where more is better, -1 where less is."""
        if not self.sign:
            return f"cannot tell on {self.prompts} prompts"
        return "better" if self.sign == better else "worse"
