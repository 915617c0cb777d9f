"""How often one model's responses are preferred to another's: win rates, also at equal lengths, with their intervals.

A pair of responses is judged in both orders. All numbers are in percent, and of model A against model B. Intervals are
of the bootstrap over prompts: the responses to a prompt, of whatever seeds, are drawn together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
RESAMPLES, SEED = 1000, 0
AT_ONCE = 1 << 20  # numbers of resamples that are worked on together
# On the squares of θ and φ, beside the log-loss of all pairs. Both stay finite where one model always wins, and what
# length can explain is left to it: the more certain a judge is of lengths, the more a ridge on φ would leave to θ.
RIDGE = np.array([0.3, 1e-9])
STEPS, EXACT = 100, 1e-10  # of Newton's method
LOPSIDED = 0.95  # share of pairs in which the same model's response is the longer one
SWAYED = 50.0  # % of pairs in which the order decides, from which on it is said
SKEWED = 10.0  # points between raw and controlled win rate, from which on it is said


@dataclass(frozen=True)
class Comparison:
    """N pairs of responses that were judged in both orders, as arrays [N]."""

    prompts: Array  # number of the prompt that a pair answers, from 0
    first: Array  # how much A is preferred where its response stands first: a probability, or 0 or 1
    second: Array  # the same where it stands second
    length_a: Array  # characters
    length_b: Array

    @property
    def preference(self) -> Array:
        """How much A is preferred, averaged over the orders."""
        preference: Array = (self.first + self.second) / 2
        return preference

    @property
    def outcome(self) -> Array:
        """1 where A wins in both orders, 0 where B does, else 1/2."""
        wins = (self.first > 0.5) & (self.second > 0.5)
        losses = (self.first < 0.5) & (self.second < 0.5)
        outcome: Array = (1 + wins - losses) / 2
        return outcome

    @property
    def is_decided_by_length(self) -> bool:
        """Whether the longer response is always preferred, or always the shorter, without a doubt, of both models."""
        sign = np.sign(self.length_a - self.length_b)
        return any(
            bool((self.preference == (1 + direction * sign) / 2).all()) and {-1, 1} <= set(sign)
            for direction in (1, -1)
        )

    @property
    def length_difference(self) -> Array:
        """tanh of (length of A − length of B) / its standard deviation; zero where lengths are always equal.

        NaN where all lengths differ by the same: nothing can be said of equal lengths then.
        """
        difference = (self.length_a - self.length_b).astype(float)
        if not difference.any():
            return difference
        deviation = difference.std()
        return np.tanh(difference / deviation) if deviation > 0 else np.full_like(difference, np.nan)


def win_rates(pairs: Comparison) -> dict[str, Any]:
    """Win rates of A over at least one pair.

    `win_rate` counts a tie half. `ties` are pairs that neither wins in both orders, `order_disagreement` those in which
    each is preferred in one order. `preference` is how much A is preferred, which counts the judge's doubts where it
    gives probabilities. `controlled_win_rate` is what the regression makes of that at equal lengths, None where nothing
    can be said of these. It goes to 50 where length alone decides every pair.
    """
    outcome, x = pairs.outcome, pairs.length_difference
    opposite = (pairs.first - 0.5) * (pairs.second - 0.5) < 0
    draws = list(_resamples(pairs.prompts))
    controlled, of_controlled = None, None
    if not np.isnan(x).any():
        start = fit_length_regression(x, pairs.preference, np.ones((1, len(x))))
        controlled = float(100 * _sigmoid(start[0, 0]))
        fits = [fit_length_regression(x, pairs.preference, weights, start[0])[:, 0] for weights in draws]
        of_controlled = _interval([100 * _sigmoid(fit) for fit in fits])
    return {
        "win_rate": float(100 * outcome.mean()),
        "win_rate_interval": _interval([100 * (weights @ outcome) / weights.sum(1) for weights in draws]),
        "controlled_win_rate": controlled,
        "controlled_win_rate_interval": of_controlled,
        "preference": float(100 * pairs.preference.mean()),
        "wins": float(100 * (outcome == 1).mean()),
        "losses": float(100 * (outcome == 0).mean()),
        "ties": float(100 * (outcome == 0.5).mean()),
        "order_disagreement": float(100 * opposite.mean()),
        "mean_length": {"a": float(pairs.length_a.mean()), "b": float(pairs.length_b.mean())},
    }


def fit_length_regression(x: Array, y: Array, weights: Array, start: Array | None = None) -> Array:
    """θ and φ of y ~ σ(θ + φ x) by Newton's method: AlpacaEval 2 without its term of instruction difficulty.

    (Dubois et al., arXiv 2404.04475, eq. 1.) σ(θ) is the preference at equal lengths. The mean log-loss of a fit has
    RIDGE / 2 · (θ², φ²) over the number of pairs added: a normal prior of θ, and hardly any of φ.

    Args:
        x: differences in length [N].
        y: preferences in [0, 1], [N].
        weights: of the pairs, a row for each fit [R, N].
        start: θ and φ to begin with [2].

    Returns:
        θ and φ of each fit [R, 2].
    """
    features = np.stack([np.ones_like(x), x])  # [2, N]
    ridge, weights = RIDGE / weights.sum(1, keepdims=True), weights / weights.sum(1, keepdims=True)
    fits = np.zeros((len(weights), 2)) if start is None else np.tile(start, (len(weights), 1))
    losses = _loss(fits, features, y, weights, ridge)
    for _ in range(STEPS):
        p = _sigmoid(fits @ features)  # [R, N]
        gradient = (weights * (p - y)) @ features.T + ridge * fits  # [R, 2]
        hessian = np.einsum("rn,in,jn->rij", weights * p * (1 - p), features, features, optimize=True)
        hessian += ridge[..., None] * np.eye(2)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        size = np.ones((len(weights), 1))
        for _ in range(30):  # a whole step may go too far: the loss must fall
            tried = _loss(fits - size * step, features, y, weights, ridge)
            if (worse := tried > losses + 1e-12).any():
                size[worse] /= 2
            else:
                break
        fits, losses = fits - size * step, tried
        if np.abs(gradient).max() < EXACT:
            break
    return fits


def _loss(fits: Array, features: Array, y: Array, weights: Array, ridge: Array) -> Array:
    """The mean log-loss of each fit, with its ridge [R]."""
    z = fits @ features
    loss: Array = (weights * (np.logaddexp(0, z) - y * z)).sum(1) + (ridge * fits**2).sum(1) / 2
    return loss


def _sigmoid(z: Any) -> Any:
    return 0.5 * (1 + np.tanh(np.asarray(z) / 2))  # which does not overflow


def score_means(prompts: Array, responses: Array, references: Array) -> dict[str, Any]:
    """Means of scores beside each other, and the ratio of their sums in percent, as MiniLLM reports it.

    Args:
        prompts: as of `Comparison`.
        responses, references: scores of response and reference [N].
    """
    draws = list(_resamples(prompts))

    def interval(of: Callable[[Array], Array]) -> list[float] | None:
        return _interval([of(weights) for weights in draws])

    return {
        "ratio_of_sums": float(100 * responses.sum() / references.sum()),
        "ratio_of_sums_interval": interval(lambda w: 100 * (w @ responses) / (w @ references)),
        "mean_score": float(responses.mean()),
        "mean_score_interval": interval(lambda w: (w @ responses) / w.sum(1)),
        "mean_reference_score": float(references.mean()),
    }


def _resamples(prompts: Array) -> Iterator[Array]:
    """Weights of the pairs [R, N] in resamples of their prompts, R in all being RESAMPLES; none of a single prompt."""
    _, of_pair = np.unique(prompts, return_inverse=True)
    count = int(of_pair.max()) + 1
    if count < 2:
        return
    draw, at_once = np.random.default_rng(SEED), max(1, AT_ONCE // max(count, len(prompts)))
    shares = np.full(count, 1 / count)
    for begin in range(0, RESAMPLES, at_once):
        drawn = draw.multinomial(count, shares, size=min(at_once, RESAMPLES - begin))
        yield drawn[:, of_pair].astype(float)


def _interval(values: Sequence[Array]) -> list[float] | None:
    """The middle 95 % of the values of resamples; None where there are none."""
    if not values:
        return None
    low, high = np.quantile(np.concatenate(values), [0.025, 0.975])
    return [float(low), float(high)]


def warnings_of(pairs: Comparison, rates: dict[str, Any]) -> list[str]:
    """What a person should hear about win rates and lengths, a sentence each."""
    sentences = []
    if (swayed := rates["order_disagreement"]) >= SWAYED:
        sentences.append(
            f"the judge goes by the order: in {swayed:.0f} % of the pairs it prefers whichever response stands first, "
            f"or whichever stands second. They count as ties; a larger judge may do better"
        )
    if pairs.is_decided_by_length:
        sentences.append("length alone decides every pair: the judge says nothing of anything else")
    raw, soft, controlled = rates["win_rate"], rates["preference"], rates["controlled_win_rate"]
    if controlled is None:
        sentences.append("the lengths of A and B always differ by the same, so that nothing is said of equal lengths")
    elif abs(soft - controlled) > SKEWED:
        a, b = rates["mean_length"]["a"], rates["mean_length"]["b"]
        gains = "A" if soft > controlled else "B"
        sentences.append(
            f"length decides much here: A wins {raw:.1f} %, and {controlled:.1f} % where both are equally long; "
            f"{gains} gains by its lengths (mean {a:.0f} characters of A, {b:.0f} of B). Trust the second number"
        )
    elif abs(raw - controlled) > SKEWED:
        sentences.append(
            f"the judge is unsure: A wins {raw:.1f} %, which counts a verdict however likely it is, but the judge "
            f"prefers A by {soft:.1f} % on average, and by {controlled:.1f} % where both are equally long"
        )
    longer, shorter = (pairs.length_a > pairs.length_b).mean(), (pairs.length_a < pairs.length_b).mean()
    if controlled is not None and max(longer, shorter) >= LOPSIDED:
        sentences.append(
            f"the responses of {'A' if longer > shorter else 'B'} are longer in {max(longer, shorter):.0%} of all "
            f"pairs: what is said of equal lengths is hardly seen in them"
        )
    return sentences
