"""The embedded engine: transformers, in this process."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from dpkd_offline.batch import pad_sequences
from dpkd_offline.checkpoint import load_model
from dpkd_offline.config import ModelOptions, SamplingOptions
from dpkd_offline.engines import Completion, GenerateRequest, Key, ScoreRequest
from dpkd_offline.logps import response_logps

T = TypeVar("T")


def batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


class SeededSampler(LogitsProcessor):  # type: ignore[no-untyped-call, misc]
    """Draws each row's next token from that row's own random stream, and keeps its raw log-prob.

    It leaves one token per row possible, so that greedy search takes it. A draw inverts the distribution function at
    one uniform number per row and step; other rows of the batch have no part in it.
    """

    def __init__(self, seeds: Sequence[int], sampling: SamplingOptions) -> None:
        self._uniforms = torch.stack(  # [B, steps]
            [
                torch.rand(sampling.max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                for seed in seeds
            ]
        )
        self._temperature = sampling.temperature
        self._top_p = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None
        self.logps: list[Tensor] = []  # a step: [B], at temperature 1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        raw = scores.float().log_softmax(-1)  # [B, V]
        warped = scores.float() / self._temperature
        if self._top_p is not None:
            warped = self._top_p(input_ids, warped)
        cumulative = warped.softmax(-1).cumsum(-1, dtype=torch.float64)
        uniform = self._uniforms[:, len(self.logps), None].to(cumulative.device)
        token = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)  # [B, 1]
        self.logps.append(raw.gather(-1, token).squeeze(-1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)


class TransformersEngine:
    """Static batches within a group, longest first, so that a shard is always computed the same way."""

    name = "transformers"

    def __init__(self, model: str, options: ModelOptions, eos_token_ids: Sequence[int]) -> None:
        self._model = load_model(model, options.dtype, options.trust_remote_code)
        self._model.generation_config = GenerationConfig()  # only what this engine is told
        self._batch_size = options.batch_size
        self._eos = sorted(eos_token_ids)

    @property
    def versions(self) -> dict[str, str]:
        return {"transformers": transformers.__version__, "torch": torch.__version__}

    def generate(
        self, groups: Iterable[Sequence[GenerateRequest]], sampling: SamplingOptions
    ) -> Iterator[tuple[Key, Completion]]:
        for group in groups:
            for batch in batched(sorted(group, key=lambda r: -len(r.prompt_ids)), self._batch_size):
                yield from zip((r.key for r in batch), self._sample(batch, sampling), strict=True)

    @torch.inference_mode()
    def _sample(self, batch: Sequence[GenerateRequest], sampling: SamplingOptions) -> list[Completion]:
        input_ids, attention_mask = pad_sequences([r.prompt_ids for r in batch], side="left")
        sampler = SeededSampler([r.seed for r in batch], sampling)
        device = self._model.device
        output = self._model.generate(  # type: ignore[operator, misc]
            input_ids.to(device),
            attention_mask=attention_mask.to(device),
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            eos_token_id=self._eos,
            pad_token_id=self._eos[0],
            logits_processor=LogitsProcessorList([sampler]),
        )
        tokens = output[:, input_ids.shape[1] :].tolist()  # [B, steps]
        logps = torch.stack(sampler.logps, dim=1).tolist()  # [B, steps]
        return [self._until_eos(t, l) for t, l in zip(tokens, logps, strict=True)]

    def _until_eos(self, tokens: list[int], logps: list[float]) -> Completion:
        end = next((i + 1 for i, token in enumerate(tokens) if token in self._eos), None)
        return Completion(tokens[:end], "length" if end is None else "stop", logps[:end])

    def score(self, groups: Iterable[Sequence[ScoreRequest]]) -> Iterator[tuple[Key, list[float]]]:
        for group in groups:
            by_length = sorted(group, key=lambda r: -len(r.prompt_ids) - len(r.response_ids))
            for batch in batched(by_length, self._batch_size):
                with torch.inference_mode():
                    logps = response_logps(self._model, [(r.prompt_ids, r.response_ids) for r in batch])
                yield from zip((r.key for r in batch), logps, strict=True)

    def close(self) -> None:
        del self._model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
