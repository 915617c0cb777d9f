"""The vLLM engine, CPU and GPU build. The only file that names vLLM."""

from __future__ import annotations

import gc
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, count
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

from dpkd_offline.common import process
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
from dpkd_offline.engines.prefixes import ResponseTree, common_prefix
from dpkd_offline.models.info import ModelInfo

J = TypeVar("J")
Job: TypeAlias = tuple[J, list[int], SamplingParams]
Side: TypeAlias = tuple[ScoreRequest, int]  # which response of a request
OUTPUT: dict[str, Any] = {"detokenize": False, "flat_logprobs": True, "output_kind": RequestOutputKind.FINAL_ONLY}
TRAITS = ENGINES["vllm"]
LEAST_BLOCKS = 256  # of vLLM's cache, where it does not say how many it has
NEEDS_LESS = ("max_length", "tensor_parallel_size", "dtype")  # what vLLM's memory depends on, of a model's options


class VllmEngine(Engine):
    """Continuous batching over all groups: requests are fed as earlier ones finish, whatever shard they belong to."""

    name = "vllm"

    def __init__(self, model: ModelInfo, options: ModelOptions) -> None:
        arguments = llm_arguments(model, options)
        # One process imports vLLM once, not three times, and says itself what fails. Not a caller's: vLLM reads all
        # that a process has imported, which Flask's proxies do not bear, and binds its threads to cores.
        if process.is_program() and not torch.cuda.is_available():
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            self._llm = LLM(**arguments)
        except (OSError, TypeError, ValueError, RuntimeError) as error:
            raise cannot_load(model.name, error) from error
        self._eos = model.eos_ids

    @property
    def versions(self) -> dict[str, str]:
        return {"vllm": vllm.__version__, "torch": torch.__version__}

    @property
    def _in_flight(self) -> int:
        """Requests that the engine holds: twice what its scheduler runs at once, so that its batches never run dry."""
        return 2 * int(self._llm.llm_engine.vllm_config.scheduler_config.max_num_seqs)

    def _stream(self, groups: Iterable[list[Job[J]]]) -> Iterator[tuple[J, Any]]:
        """Outputs of the jobs as they end; the engine always holds as many as it has room for, if there are so many."""
        engine, room = self._llm.llm_engine, self._in_flight
        coming, waiting, numbers = iter(groups), deque[Job[J]](), count()
        running: dict[str, J] = {}
        while True:
            while len(running) + len(waiting) < room and (group := next(coming, None)):
                waiting.extend(group)
            while waiting and len(running) < room:
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
        """A prompt goes through the model once for all of its responses, where vLLM keeps what it computed."""
        if top_k == 0 and self._llm.llm_engine.vllm_config.use_v2_model_runner:
            return self._scores_by_id(groups)
        return scores_by_request(self._scores(groups, top_k))

    def _scores_by_id(self, groups: Iterable[Sequence[ScoreRequest]]) -> Iterator[tuple[Key, list[Score]]]:
        """vLLM's newer runner scores given ids from a given position on."""
        trees: dict[Key, ResponseTree] = {}
        answers: dict[Key, dict[int, Any]] = {}

        def questions(group: Sequence[ScoreRequest]) -> list[Question]:
            of_group = []
            for request in group:
                tree = trees[request.key] = ResponseTree(request.responses)
                of_group += [Question(request, side, first, ids) for side, (first, ids) in tree.asked.items()]
            return of_group

        for question, answer in self._ask(map(questions, groups)):
            key = question.request.key
            of_request = answers.setdefault(key, {})
            of_request[question.side] = answer
            if len(of_request) == len(trees[key].asked):
                yield key, [Score(logps, [], []) for logps in trees.pop(key).scores(answers.pop(key))]

    def _scores(self, groups: Iterable[Sequence[ScoreRequest]], top_k: int) -> Iterator[tuple[Side, Score]]:
        """Each response's score, from log-probs that vLLM gives of all positions of a sequence that it computes.

        So that these are few, and a prompt's not computed again with each response, the prompts go first, without.
        The older runner fills in nothing for what it did not compute, and cannot say so where it computes in parts.
        """
        block = self._reusable_block
        waves = ([wave] for wave in _waves(groups, self._cache_room, block)) if block else [groups]
        for wave in waves:
            if block:
                heads = [list(request.prompt_ids[:-1]) for request in chain.from_iterable(wave)]
                first = SamplingParams(max_tokens=1, temperature=0.0, **OUTPUT)
                for _ in self._stream([[(None, head, first) for head in heads if len(head) >= block]]):
                    pass
            questions = (
                [_question(r, side, top_k, block) for r in of for side in range(len(r.responses))] for of in wave
            )
            for question, score in self._ask(questions):
                yield (question.request, question.side), score

    @property
    def _reusable_block(self) -> int:
        """Tokens that vLLM caches, and finds again, together; 0 where log-probs of prompts must not meet its cache."""
        config = self._llm.llm_engine.vllm_config
        sure = config.use_v2_model_runner or not config.scheduler_config.enable_chunked_prefill
        return int(config.cache_config.block_size) if config.cache_config.enable_prefix_caching and sure else 0

    @property
    def _cache_room(self) -> int:
        """Tokens that vLLM's cache holds."""
        config = self._llm.llm_engine.vllm_config.cache_config
        return int(config.num_gpu_blocks or LEAST_BLOCKS) * int(config.block_size)

    def _ask(self, groups: Iterable[list[Question]]) -> Iterator[tuple[Question, Any]]:
        """The answer to each question. Where vLLM took more from its cache than a question allows, which others that
        begin alike may lead to, the answer lacks something, and the question is asked again, without the cache."""
        unanswered: list[Question] = []
        left = 0

        def jobs() -> Iterator[list[Job[Question]]]:
            nonlocal left
            for group in groups:
                left += len(group)
                yield [question.job() for question in group] + again()
            while left:
                yield again()

        def again() -> list[Job[Question]]:
            jobs = [replace(question, cached=False).job() for question in unanswered]
            unanswered.clear()
            return jobs

        for question, output in self._stream(jobs()):
            if (answer := question.answer(output)) is not None:
                left -= 1
                yield question, answer
            elif question.cached:
                unanswered.append(question)
            else:
                tokens = len(question.request.prompt_ids)
                raise UnavailableError(f"vLLM {vllm.__version__} gave no log-probs of a prompt of {tokens} tokens")

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
        "dtype": options.precision,
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


@dataclass(frozen=True)
class Question:
    """What is asked about one response, or from one of its tokens on: by id, or else about all that is computed."""

    request: ScoreRequest
    side: int  # which of its responses
    first: int = 0  # the first of the response's tokens that is asked about
    ids: list[list[int]] | None = None  # to score at each of them
    top_k: int = 0
    cached: bool = True  # whether vLLM may take what it has of the sequence from its cache

    def job(self) -> Job[Question]:
        prompt, response = self.request.prompt_ids, self.request.responses[self.side]
        asked: dict[str, Any] = {"prompt_logprobs": self.top_k}
        if self.ids is not None:
            start = len(prompt) + self.first - 1  # the position that predicts the first of them
            asked = {"prompt_logprob_token_ids": self.ids, "prompt_logprob_start": start}
        asked["skip_reading_prefix_cache"] = not self.cached
        return self, [*prompt, *response], SamplingParams(max_tokens=1, temperature=0.0, **asked, **OUTPUT)

    def answer(self, output: Any) -> Any:
        """By id the log-probs [T, ids], else a Score; None where some are missing."""
        if self.ids is None:
            return self._score(output)
        logps = output.prompt_token_id_logprobs
        return None if logps is None or len(logps) != len(self.ids) else logps

    def _score(self, output: Any) -> Score | None:
        response, first, flat = self.request.responses[self.side], len(self.request.prompt_ids), output.prompt_logprobs
        if flat is None:
            return None
        # The newer runner leaves out what was cached; the older one has numbers in its place that say nothing.
        missing = first + len(response) - len(flat.start_indices)
        if max(missing, output.num_cached_tokens or 0) >= first:
            return None
        logps, top_ids, top_logps = [], [], []
        for position, token in enumerate(response, start=first - missing):
            # Per position: the prompt's own token, and then the top k, likeliest first.
            start, end = flat.start_indices[position], flat.end_indices[position]
            assert flat.token_ids[start] == token, "vLLM's log-probs are not of the tokens that it was asked about"
            logps.append(flat.logprobs[start])
            if self.top_k:
                top_ids.append(flat.token_ids[start + 1 : end])
                top_logps.append(flat.logprobs[start + 1 : end])
        return Score(logps, top_ids, top_logps)


def _question(request: ScoreRequest, side: int, top_k: int, block: int) -> Question:
    """About all of a response. The cache, whose blocks have so many tokens, may be read where no earlier response to
    the prompt has left more there than the prompt without its last token."""
    response, prompt = request.responses[side], len(request.prompt_ids)
    shared = [prompt + common_prefix(response, other) for other in request.responses[:side]]
    cached = block > 0 and all(tokens // block * block < prompt for tokens in shared)
    return Question(request, side, top_k=top_k, cached=cached)


def _waves(groups: Iterable[Sequence[ScoreRequest]], room: int, block: int) -> Iterator[list[ScoreRequest]]:
    """The requests in parts that fit into the cache, with all blocks of prompts and responses, so that none of a prompt
    is lost before its responses come; fewer, where no more have come yet."""
    wave: list[ScoreRequest] = []
    left = room
    for group in groups:
        for request in group:
            tokens = len(request.prompt_ids) + sum(len(response) + block for response in request.responses)
            if wave and tokens > left:
                yield wave
                wave, left = [], room
            wave.append(request)
            left -= tokens
        if not group and wave:
            yield wave
            wave, left = [], room
    if wave:
        yield wave
