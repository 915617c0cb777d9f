"""The embedded engine: transformers, in this process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import TypeVar

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TopPLogitsWarper

from dpkd_offline.common import console
from dpkd_offline.config.base import ModelOptions, SamplingOptions
from dpkd_offline.engines.base import Completion, Engine, GenerateRequest, Key, Score, ScoreRequest
from dpkd_offline.models.batch import pad_sequences, pair_batch
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.models.loading import load_model
from dpkd_offline.models.logprobs import response_logps, top_logps
from dpkd_offline.models.shared_prompt import SHARED_PROMPT
from dpkd_offline.models.trial import RowLayout, SamplingLayout, check_model, row_layout, sampling_layout

BLOCK = 256  # tokens of the vocabulary
TOKENS = 1024  # of a row with shared prompts: enough for the products, few enough for the cache of a CPU
TOKENS_ON_GPU = 8192  # instead
R = TypeVar("R", GenerateRequest, ScoreRequest)
T = TypeVar("T")


def batches(group: Sequence[R], size: int, length: Callable[[R], int], tokens: int | None = None) -> Iterator[list[R]]:
    """A group's requests, longest first: at most `size` of them, of at most `tokens` tokens if there are several."""
    batch: list[R] = []
    for request in sorted(group, key=length, reverse=True):
        if len(batch) == size or (batch and tokens and sum(map(length, batch)) + length(request) > tokens):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def score_tokens(request: ScoreRequest) -> int:
    """Tokens of a prompt and all of its responses."""
    return len(request.prompt_ids) + sum(map(len, request.responses))


class Halving:
    """Runs batches, of which a GPU may hold no more than a part at once.

    What did not fit is run in halves, and so is all that is as large from then on; how a batch is cut changes bits of
    its numbers on a GPU. On a CPU nothing is cut.
    """

    def __init__(self) -> None:
        self._too_many: int | None = None  # tokens that did not fit

    def run(self, batch: Sequence[R], length: Callable[[R], int], run: Callable[[Sequence[R]], list[T]]) -> list[T]:
        """What `run` gives for the batch, its parts in order.

        Raises:
            OutOfMemoryError: a request by itself does not fit.
        """
        parts, results = [batch], list[T]()
        while parts:
            part = parts.pop()
            tokens = sum(map(length, part))
            if len(part) == 1 or self._too_many is None or tokens < self._too_many:
                try:
                    results += run(part)
                    continue
                except torch.OutOfMemoryError:
                    if len(part) == 1:
                        raise
                # Out of the handler, where the error no longer holds the tensors of what failed.
                self._too_many = tokens
                console.info(
                    f"engine: {len(part)} sequences of {tokens} tokens do not fit into memory; fewer at a time"
                )
                torch.cuda.empty_cache()
            middle = len(part) // 2
            parts += [part[middle:], part[:middle]]
        return results


class SeededSampler(LogitsProcessor):
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
        logits = scores.float()  # [B, V]
        tokens = self._draw(input_ids, logits)[:, None]  # [B, 1]
        self.logps.append((logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)).squeeze(-1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens, 0.0)

    def _draw(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        if not self._temperature:
            return logits.argmax(-1)
        warped = logits / self._temperature
        if self._top_p is not None:
            warped = self._top_p(input_ids, warped)
        return draw(warped.softmax(-1), self._uniforms[:, len(self.logps)].to(logits.device))


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The token of each row [B] at which its distribution function [B, V] passes the row's uniform number [B].

    The sums are float64, first over blocks of the vocabulary and then within one, which costs a tenth of summing
    all of it that way.
    """
    rows, vocabulary = probabilities.shape
    blocks = F.pad(probabilities, (0, -vocabulary % BLOCK)).view(rows, -1, BLOCK)
    ends = blocks.sum(-1).double().cumsum(-1)  # [B, blocks]
    goal = uniforms[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, goal, right=True).clamp_(max=ends.shape[1] - 1)  # [B, 1]
    within = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(-1)  # [B, BLOCK]
    rest = goal - (ends.gather(1, block) - within[:, -1:])
    # Rounding must not choose a token without probability: stay before the block's last sum.
    place = torch.searchsorted(within, rest.clamp(min=0).minimum(within[:, -1:] * (1 - 1e-12)), right=True)
    return (block * BLOCK + place).squeeze(-1)


class TransformersEngine(Engine):
    """Static batches within a group, longest first, so that a shard is always computed the same way.

    Raises:
        UnavailableError: the model cannot be loaded, or its log-probs cannot be made here: neither those of its samples
            nor those of any response, which is tried at once, since what it samples is to be scored and trained on.
    """

    name = "transformers"

    def __init__(self, model: ModelInfo, options: ModelOptions) -> None:
        self._model = load_model(model.name, options.precision, model.trust_remote_code)
        self._model.generation_config = GenerationConfig()  # only what this engine is told
        self._batch_size = options.batch_size
        self._eos, self._longest = model.eos_ids, options.max_length
        self._prefill = self._model.config._attn_implementation
        # On a CPU, torch's fused attention takes twice as long as plain products for one token at a time.
        self._decode = "eager" if self._model.device.type == "cpu" else self._prefill
        check_model(self._model)

    @property
    def versions(self) -> dict[str, str]:
        return {"transformers": transformers.__version__, "torch": torch.__version__}

    def generate(
        self, groups: Iterable[Sequence[GenerateRequest]], sampling: SamplingOptions
    ) -> Iterator[tuple[Key, Completion]]:
        self._model.set_attn_implementation(self._decode)
        layout = sampling_layout(self._model, self._longest)
        if layout != "padded":
            together = "prompts of one length go together" if layout == "equal" else "each prompt goes alone"
            console.info(f"engine: padding would change what this model samples; {together}")
        size, halving = 1 if layout == "alone" else self._batch_size, Halving()

        def length(request: GenerateRequest) -> int:
            return len(request.prompt_ids) + sampling.max_new_tokens

        for group in groups:
            for batch in self._sampling_batches(group, layout, size):
                completions = halving.run(batch, length, lambda part: self._sample(part, sampling))
                yield from zip((r.key for r in batch), completions, strict=True)

    def _sampling_batches(
        self, group: Sequence[GenerateRequest], layout: SamplingLayout, size: int
    ) -> Iterator[list[GenerateRequest]]:
        for batch in batches(group, size, lambda r: len(r.prompt_ids)):
            if layout == "padded":
                yield batch
            else:  # longest first, so that those of one length stand together
                for _, equal in groupby(batch, lambda r: len(r.prompt_ids)):
                    yield list(equal)

    @torch.inference_mode()
    def _sample(self, batch: Sequence[GenerateRequest], sampling: SamplingOptions) -> list[Completion]:
        input_ids, attention_mask = pad_sequences([r.prompt_ids for r in batch], side="left")
        sampler = SeededSampler([r.seed for r in batch], sampling)
        device = self._model.device
        output = self._model.generate(  # type: ignore[operator]
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
        rows = zip(tokens, logps, batch, strict=True)
        return [self._until_eos(ids, numbers if request.logps else []) for ids, numbers, request in rows]

    def _until_eos(self, tokens: list[int], logps: list[float]) -> Completion:
        end = next((i + 1 for i, token in enumerate(tokens) if token in self._eos), None)
        return Completion(tokens[:end], "length" if end is None else "stop", logps[:end])

    def score(self, groups: Iterable[Sequence[ScoreRequest]], top_k: int = 0) -> Iterator[tuple[Key, list[Score]]]:
        self._model.set_attn_implementation(self._prefill)
        layout = row_layout(self._model, self._longest)
        if layout == "shared":
            self._model.set_attn_implementation(SHARED_PROMPT)
        else:
            alone = ", by itself" if layout == "alone" else ""
            console.info(
                f"engine: this model cannot share prompts between responses; each one has a prompt of its own{alone}"
            )
        tokens, halving = TOKENS_ON_GPU if self._model.device.type == "cuda" else TOKENS, Halving()
        for group in groups:
            for batch in batches(group, self._batch_size, score_tokens, tokens if layout == "shared" else None):
                scores = iter(halving.run(batch, score_tokens, lambda part: self._score(part, layout, top_k)))
                yield from ((request.key, [next(scores) for _ in request.responses]) for request in batch)

    @torch.inference_mode()
    def _score(self, requests: Sequence[ScoreRequest], layout: RowLayout, top_k: int) -> list[Score]:
        batch = pair_batch([(r.prompt_ids, r.responses) for r in requests], layout == "shared")
        alone = layout == "alone"
        if not top_k:
            return [Score(logps, [], []) for logps in response_logps(self._model, batch, alone)]
        columns = (column.split(batch.lengths.tolist()) for column in top_logps(self._model, batch, top_k, alone))
        return [Score(*(part.tolist() for part in parts)) for parts in zip(*columns, strict=True)]

    def close(self) -> None:
        del self._model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
