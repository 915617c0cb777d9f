"""The vLLM engine, CPU and GPU build. The only file that names vLLM."""

from __future__ import annotations

import gc
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import count
from typing import Any, TypeAlias, TypeVar

import torch

# On a CPU the key-value cache takes a share of the machine's memory unless told; 2 GiB hold about 50k tokens of a
# small model. vLLM reads this once, on import.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for results
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# A fork of this process would have torch's threads without their locks, and CUDA not at all.
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")

import vllm
from vllm import LLM, EngineArgs, SamplingParams, TokensPrompt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError

from dpkd_offline.common.errors import (
    UnavailableError,
    UsageError,
    first_line,
    is_out_of_memory,
    less_memory,
    out_of_memory,
)
from dpkd_offline.config.base import ModelOptions, SamplingOptions
from dpkd_offline.config.engines import ENGINES
from dpkd_offline.engines.base import Completion, Engine, GenerateRequest, Key, Score, ScoreRequest, scores_by_request
from dpkd_offline.models.info import ModelInfo

J = TypeVar("J")
Job: TypeAlias = tuple[J, list[int], SamplingParams]
Side: TypeAlias = tuple[ScoreRequest, int]  # which response of a request
OUTPUT: dict[str, Any] = {"detokenize": False, "flat_logprobs": True, "output_kind": RequestOutputKind.FINAL_ONLY}
TRAITS = ENGINES["vllm"]
NEEDS_LESS = ("max_length", "tensor_parallel_size", "dtype")  # what vLLM's memory depends on, of a model's options


class VllmEngine(Engine):
    """Continuous batching over all groups: requests are fed as earlier ones finish, whatever shard they belong to."""

    name = "vllm"

    def __init__(self, model: ModelInfo, options: ModelOptions) -> None:
        arguments = llm_arguments(model, options)
        try:
            self._llm = LLM(**arguments)
        except (OSError, TypeError, ValueError, RuntimeError) as error:
            raise cannot_load(model.name, error) from error
        self._eos = model.eos_ids

    @property
    def versions(self) -> dict[str, str]:
        return {"vllm": vllm.__version__, "torch": torch.__version__}

    def _stream(self, groups: Iterable[list[Job[J]]]) -> Iterator[tuple[J, Any]]:
        """Outputs of the jobs as they end; the engine always holds as many as its traits say, if there are so many."""
        engine = self._llm.llm_engine
        coming, waiting, numbers = iter(groups), deque[Job[J]](), count()
        running: dict[str, J] = {}
        while True:
            while len(running) + len(waiting) < TRAITS.in_flight and (group := next(coming, None)):
                waiting.extend(group)
            while waiting and len(running) < TRAITS.in_flight:
                job, ids, params = waiting.popleft()
                number = str(next(numbers))
                engine.add_request(number, TokensPrompt(prompt_token_ids=ids), params)
                running[number] = job
            if not running:
                return
            try:
                outputs = engine.step()
            except EngineDeadError as error:
                reason = f"; where that is memory, it needs less with {less_memory(NEEDS_LESS)}"
                raise UnavailableError(f"vLLM's engine died; its own messages above say why{reason}") from error
            for output in outputs:
                if output.finished:
                    yield running.pop(output.request_id), output

    def generate(
        self, groups: Iterable[Sequence[GenerateRequest]], sampling: SamplingOptions
    ) -> Iterator[tuple[Key, Completion]]:
        jobs = (
            [
                (
                    request.key,
                    list(request.prompt_ids),
                    SamplingParams(
                        temperature=sampling.temperature,
                        top_p=sampling.top_p,
                        max_tokens=sampling.max_new_tokens,
                        seed=request.seed,
                        stop_token_ids=self._eos,
                        logprobs=0 if request.logps else None,  # of the sampled token only
                        **OUTPUT,
                    ),
                )
                for request in group
            ]
            for group in groups
        )
        for key, output in self._stream(jobs):
            answer = output.outputs[0]
            ids, flat = list(answer.token_ids), answer.logprobs
            assert flat is None or list(flat.token_ids) == ids, "vLLM's log-probs are not of the tokens it sampled"
            logps = [] if flat is None else list(flat.logprobs)
            yield key, Completion(ids, "stop" if ids[-1] in self._eos else "length", logps)

    def score(self, groups: Iterable[Sequence[ScoreRequest]], top_k: int = 0) -> Iterator[tuple[Key, list[Score]]]:
        by_id = top_k == 0 and self._llm.llm_engine.vllm_config.use_v2_model_runner
        return scores_by_request(self._scores(groups, top_k, by_id))

    def _scores(
        self, groups: Iterable[Sequence[ScoreRequest]], top_k: int, by_id: bool
    ) -> Iterator[tuple[Side, Score]]:
        """Each response's score. By id vLLM may leave one unanswered; it is asked for again, in the other way."""
        unanswered: list[Side] = []
        open_jobs = 0

        def jobs() -> Iterator[list[Job[Side]]]:
            nonlocal open_jobs
            for group in groups:
                sides = [(request, side) for request in group for side in range(len(request.responses))]
                open_jobs += len(sides)
                yield [_score_job(*side, top_k, by_id) for side in sides] + again()
            while open_jobs:
                yield again()

        def again() -> list[Job[Side]]:
            jobs = [_score_job(*side, top_k, by_id=False) for side in unanswered]
            unanswered.clear()
            return jobs

        for (request, side), output in self._stream(jobs()):
            asked_by_id = by_id and output.prompt_logprobs is None
            if asked_by_id and not _is_answered(output, request.responses[side]):
                unanswered.append((request, side))
                continue
            open_jobs -= 1
            yield (request, side), _score(output, request, side, top_k, asked_by_id)

    def close(self) -> None:
        del self._llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def llm_arguments(model: ModelInfo, options: ModelOptions) -> dict[str, Any]:
    """What vLLM's LLM is told: what the command says, and then the user's options of its own as they are.

    Raises:
        UsageError: this vLLM has no option of that name.
    """
    own = options.engine_args or {}
    known = {field.name for field in fields(EngineArgs)}
    if unknown := [name for name in own if name not in known]:
        raise UsageError(f"--engine-args: vLLM {vllm.__version__} has no option '{unknown[0]}'")
    max_length = min(options.max_length + TRAITS.score_extra, model.context_length)
    arguments: dict[str, Any] = {
        "model": model.name,
        "dtype": options.dtype,
        "quantization": options.quantization,  # None: as the model's config says
        "max_model_len": max_length,
        "trust_remote_code": model.trust_remote_code,
        "generation_config": "vllm",
        "tensor_parallel_size": options.tensor_parallel_size,
        "max_logprobs": -1,  # as many as top-k asks for
        "disable_log_stats": True,
    }
    if not torch.cuda.is_available():
        # Per-request seeds crash the CPU build's chunked prefill, so a batch must hold the longest sequence.
        batched = max(4096, max_length)
        arguments |= {"enforce_eager": True, "enable_chunked_prefill": False, "max_num_batched_tokens": batched}
    return {**arguments, **own}


def cannot_load(model: str, error: Exception) -> UnavailableError:
    """What to say of a model. What goes wrong in the process of the engine, vLLM prints, and tells no more of it."""
    if is_out_of_memory(error):
        return out_of_memory(error, NEEDS_LESS)
    reason = first_line(error)
    if "See root cause above" in reason:
        reason += f"; where that is memory, it needs less with {less_memory(NEEDS_LESS)}"
    return UnavailableError(f"model '{model}': vLLM cannot load it: {reason}")


def _score_job(request: ScoreRequest, side: int, top_k: int, by_id: bool) -> Job[Side]:
    response = request.responses[side]
    params = _score_params(request.prompt_ids, response, top_k, by_id)
    return (request, side), [*request.prompt_ids, *response], params


def _is_answered(output: Any, response: Sequence[int]) -> bool:
    """Whether there is a log-prob of each token. vLLM leaves them out where its prefill began behind the prompt."""
    logps = output.prompt_token_id_logprobs
    return logps is not None and len(logps) == len(response)


def _score_params(prompt: Sequence[int], response: Sequence[int], top_k: int, by_id: bool) -> SamplingParams:
    """The cheapest question for log p(response | prompt) that this vLLM answers.

    Its newer runner scores given tokens from a given row on; else it is asked about every position of the prompt.
    """
    if by_id:
        asked: dict[str, Any] = {
            "prompt_logprob_token_ids": [[token] for token in response],
            "prompt_logprob_start": len(prompt) - 1,
        }
        return SamplingParams(max_tokens=1, temperature=0.0, **asked, **OUTPUT)
    return SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=top_k, **OUTPUT)


def _score(output: Any, request: ScoreRequest, side: int, top_k: int, by_id: bool) -> Score:
    if by_id:
        return Score([float(logp) for (logp,) in output.prompt_token_id_logprobs], [], [])
    flat, first = output.prompt_logprobs, len(request.prompt_ids)
    if flat is None:
        raise UnavailableError(f"vLLM {vllm.__version__} gave no log-probs of a prompt of {first} tokens")
    logps, top_ids, top_logps = [], [], []
    for position, token in enumerate(request.responses[side], start=first):
        # Per position: the prompt's own token, and then the top k, likeliest first.
        start, end = flat.start_indices[position], flat.end_indices[position]
        assert flat.token_ids[start] == token, "vLLM's log-probs are not of the tokens that it was asked about"
        logps.append(flat.logprobs[start])
        if top_k:
            top_ids.append(flat.token_ids[start + 1 : end])
            top_logps.append(flat.logprobs[start + 1 : end])
    return Score(logps, top_ids, top_logps)
