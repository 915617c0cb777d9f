"""The vLLM engine, CPU and GPU build. The only file that names vLLM."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

# On a CPU the key-value cache takes a share of the machine's memory unless told; 2 GiB hold about 50k tokens of a
# small model. vLLM reads this once, on import.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import vllm
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError

from dpkd_offline.checkpoint import context_length
from dpkd_offline.config import ModelOptions, SamplingOptions
from dpkd_offline.engines import Completion, GenerateRequest, Key, ScoreRequest
from dpkd_offline.errors import UnavailableError

R = TypeVar("R", GenerateRequest, ScoreRequest)
IN_FLIGHT = 512  # requests that the engine holds: enough that its batches never run dry, few enough for memory


class VllmEngine:
    """Continuous batching over all groups: requests are fed as earlier ones finish, whatever shard they belong to."""

    name = "vllm"

    def __init__(self, model: str, options: ModelOptions, eos_token_ids: Sequence[int]) -> None:
        self._eos = sorted(eos_token_ids)
        on_cpu = not torch.cuda.is_available()
        # Scoring asks for one token more than it scores.
        max_length = min(options.max_length + 1, context_length(model, options.trust_remote_code))
        arguments: dict[str, Any] = {}
        if on_cpu:
            # Per-request seeds crash the CPU build's chunked prefill, so a batch must hold the longest sequence.
            arguments = {
                "enforce_eager": True,
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(4096, max_length),
            }
        try:
            self._llm = LLM(
                model=model,
                dtype=options.dtype,
                max_model_len=max_length,
                trust_remote_code=options.trust_remote_code,
                generation_config="vllm",
                disable_log_stats=True,
                **arguments,
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UnavailableError(f"model '{model}': vLLM cannot load it: {reason}") from error

    @property
    def versions(self) -> dict[str, str]:
        return {"vllm": vllm.__version__, "torch": torch.__version__}

    def _stream(
        self, groups: Iterable[Sequence[R]], params: Callable[[R], tuple[TokensPrompt, SamplingParams]]
    ) -> Iterator[tuple[R, Any]]:
        engine = self._llm.llm_engine
        waiting = (request for group in groups for request in group)
        running: dict[str, R] = {}
        count = 0
        exhausted = False
        while running or not exhausted:
            while not exhausted and len(running) < IN_FLIGHT:
                request = next(waiting, None)
                if request is None:
                    exhausted = True
                    break
                prompt, sampling = params(request)
                engine.add_request(str(count), prompt, sampling)
                running[str(count)] = request
                count += 1
            if running:
                try:
                    outputs = engine.step()
                except EngineDeadError as error:
                    raise UnavailableError("vLLM's engine died; its own messages above say why") from error
                for output in outputs:
                    if output.finished:
                        yield running.pop(output.request_id), output

    def generate(
        self, groups: Iterable[Sequence[GenerateRequest]], sampling: SamplingOptions
    ) -> Iterator[tuple[Key, Completion]]:
        def params(request: GenerateRequest) -> tuple[TokensPrompt, SamplingParams]:
            return TokensPrompt(prompt_token_ids=list(request.prompt_ids)), SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                seed=request.seed,
                stop_token_ids=self._eos,
                logprobs=0,  # of the sampled token only
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )

        for request, output in self._stream(groups, params):
            answer = output.outputs[0]
            ids = list(answer.token_ids)
            logps = [entry[token].logprob for entry, token in zip(answer.logprobs, ids, strict=True)]
            yield request.key, Completion(ids, "stop" if ids[-1] in self._eos else "length", logps)

    def score(self, groups: Iterable[Sequence[ScoreRequest]]) -> Iterator[tuple[Key, list[float]]]:
        def params(request: ScoreRequest) -> tuple[TokensPrompt, SamplingParams]:
            ids = [*request.prompt_ids, *request.response_ids]
            return TokensPrompt(prompt_token_ids=ids), SamplingParams(
                max_tokens=1,
                temperature=0.0,
                prompt_logprobs=0,  # of the prompt's own token only
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )

        for request, output in self._stream(groups, params):
            entries = output.prompt_logprobs[len(request.prompt_ids) :]
            tokens = request.response_ids
            yield request.key, [entry[token].logprob for entry, token in zip(entries, tokens, strict=True)]

    def close(self) -> None:
        del self._llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
