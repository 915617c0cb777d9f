"""What an engine is: the requests that it takes, what it answers, and its two verbs, generate and score.

Requests come in groups (one a shard) and results go out as they are ready, each with its request's key. An engine may
mix groups or not, and may work ahead. A request's result depends on the request alone, within the arithmetic of the
engine; `transformers` keeps to a group, so that the same shard is computed the same way on every run. An empty group
says that no other has come yet; it comes only while requests are under way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from dpkd_offline.common.errors import UsageError
from dpkd_offline.config.base import ModelOptions, SamplingOptions
from dpkd_offline.dataset.schema import FinishReason
from dpkd_offline.models.info import ModelInfo

Key = tuple[int, int]  # shard, row


@dataclass(frozen=True)
class GenerateRequest:
    """Sample one response to a prompt; the seed alone decides the draw."""

    key: Key
    prompt_ids: Sequence[int]
    seed: int
    logps: bool = True  # whether the response's log-probs are wanted; vLLM samples faster without


@dataclass(frozen=True)
class Completion:
    """A sampled response with the model's own log-probs of it at temperature 1, in nats."""

    response_ids: list[int]  # with the EOS, if it was sampled
    finish_reason: FinishReason
    logps: list[float]  # none where they were not asked for


@dataclass(frozen=True)
class ScoreRequest:
    """Ask for log p(y | x), token by token, of each response y to one prompt x."""

    key: Key
    prompt_ids: Sequence[int]
    responses: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Score:
    """What a model makes of one response of T tokens, in nats; and the k likeliest tokens at each of its positions."""

    logps: list[float]  # [T]
    top_ids: list[list[int]]  # [T][k], likeliest first
    top_logps: list[list[float]]  # [T][k]


class Engine(Protocol):
    """What runs a model. Engines inherit from it only so that the type checker compares them with it."""

    @property
    def name(self) -> str: ...

    @property
    def versions(self) -> dict[str, str]:
        """Packages whose version may change the numbers."""
        ...

    def generate(
        self, groups: Iterable[Sequence[GenerateRequest]], sampling: SamplingOptions
    ) -> Iterator[tuple[Key, Completion]]:
        """One response per request, in any order."""
        ...

    def score(self, groups: Iterable[Sequence[ScoreRequest]], top_k: int = 0) -> Iterator[tuple[Key, list[Score]]]:
        """Per request the scores of its responses, by prefill, in any order."""
        ...

    def close(self) -> None:
        """Give the model's memory back."""
        ...


def scores_by_request(
    scores: Iterable[tuple[tuple[ScoreRequest, int], Score]],
) -> Iterator[tuple[Key, list[Score]]]:
    """The scores of each request, once those of all its responses have come, which they do one by one in any order.

    Args:
        scores: ((request, which of its responses), score).
    """
    waiting: dict[Key, dict[int, Score]] = {}
    for (request, side), score in scores:
        by_side = waiting.setdefault(request.key, {})
        by_side[side] = score
        if len(by_side) == len(request.responses):
            del waiting[request.key]
            yield request.key, [by_side[n] for n in range(len(by_side))]


LoadEngine: TypeAlias = Callable[[ModelInfo, ModelOptions], Engine]


def row_seed(*parts: object) -> int:
    """A row's own seed, from the run's seed and the row's id, so that no other row has part in its draw."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:7], "big")


def check_lengths(
    model: ModelInfo, options: ModelOptions, longest_prompt: str, prompt_tokens: int, sampling: SamplingOptions
) -> None:
    """Raise UsageError unless the longest prompt (its id and tokens) and its longest response fit into the context."""
    limit = min(options.max_length, model.context_length)
    needed = prompt_tokens + sampling.max_new_tokens
    if needed > limit:
        raise UsageError(
            f"prompt '{longest_prompt}' of {prompt_tokens} tokens and {sampling.max_new_tokens} new ones need "
            f"{needed} tokens, max-length and the context of {model.name} give {limit}; lower --max-prompt-tokens or "
            f"--max-new-tokens"
        )
