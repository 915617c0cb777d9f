"""The http engine: vLLM servers, asked for token ids and log-probs over /v1/completions.

Token ids go out and come back; text has no part in it. Every answer is checked against what was asked: the ids that the
server says it was given, one log-prob for each token, numbers that can be such, an end that is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import PurePath
from typing import Any, Literal, NoReturn

from pydantic import BaseModel, Field, StrictInt

from dpkd_offline.common import console
from dpkd_offline.common.errors import MismatchError, UnavailableError, UsageError
from dpkd_offline.config.base import ModelOptions, SamplingOptions
from dpkd_offline.config.engines import ENGINES
from dpkd_offline.engines.base import Completion, Engine, GenerateRequest, Key, Score, ScoreRequest, scores_by_request
from dpkd_offline.engines.server_pool import SHORT_ANSWER, Malformed, Server, ServerPool, ServerRequest, parse
from dpkd_offline.models.info import ModelInfo

ROUNDING = 1e-4  # nats by which a log-prob may lie above zero
TOKEN_BYTES = 512  # of an answer for each log-prob, at most: an id, a number, a rank, and the text
CLAMP = -9999.0  # what the server writes for minus infinity
PROBE = "Ünïcödé ≤ 東京 🙂\n\t two  spaces, 12345 don'ts{} and <tags> after it"
PROBE_GAP = 0.5  # nats a token, between a sampler's log-probs and those by prefill; in bfloat16 a tenth


class ModelCard(BaseModel):
    id: str
    root: str | None = None
    max_model_len: int | None = None


class ModelList(BaseModel):
    data: list[ModelCard]


class Version(BaseModel):
    version: str


class Tokens(BaseModel):
    tokens: list[StrictInt]


class TokenLogps(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]


class RankedLogp(BaseModel):
    logprob: float
    rank: int


class Choice(BaseModel):
    prompt_token_ids: list[StrictInt]
    token_ids: list[StrictInt]
    finish_reason: Literal["stop", "length"]
    logprobs: TokenLogps | None = None
    prompt_logprobs: list[dict[int, RankedLogp] | None] | None = None


class Answer(BaseModel):
    choices: list[Choice] = Field(min_length=1, max_length=1)


class HttpEngine(Engine):
    """One model on one or more vLLM servers."""

    name = "http"

    def __init__(self, model: ModelInfo, options: ModelOptions) -> None:
        self._eos, self._vocabulary = model.eos_ids, model.vocab_size
        self._pool = ServerPool(options.url, options.concurrency)
        try:
            self._served, self._version = self._agreed(model.name)
            self._check_length(model, options)
            self._check_probe(model)
        except BaseException:
            self.close()
            raise

    @property
    def versions(self) -> dict[str, str]:
        return {"vllm": self._version, "served": _last_name(self._served.root or self._served.id)}

    def close(self) -> None:
        self._pool.close()

    # --- what is checked before anything is asked -------------------------------------------------------------------

    def _agreed(self, model: str) -> tuple[ModelCard, str]:
        """The model and version that all servers have."""
        lists = self._pool.ask_each(ServerRequest("GET", "/v1/models", partial(parse, ModelList)))
        unknown = Version(version="unknown")
        versions = self._pool.ask_each(ServerRequest("GET", "/version", partial(parse, Version), absent=unknown))
        served: dict[Server, tuple[ModelCard, str]] = {}
        for server, models in lists.items():
            card, version = served[server] = _choose(server, models.data, model), versions[server].version
            root = PurePath(card.root or card.id).name
            doubt = "" if root == PurePath(model).name else f", taken to be {model}"
            console.info(f"engine: {server}: vLLM {version} serves {root}{doubt}")
        (first, (card, version)), *others = served.items()
        for server, (other, its_version) in others:
            if (other.id, its_version) != (card.id, version):
                raise MismatchError(
                    f"--url: {first} serves {card.id} (vLLM {version}), {server} serves {other.id} "
                    f"(vLLM {its_version}); give servers of one model and version"
                )
        limits = [c.max_model_len for c, _ in served.values() if c.max_model_len is not None]
        return card.model_copy(update={"max_model_len": min(limits, default=None)}), version

    def _check_length(self, model: ModelInfo, options: ModelOptions) -> None:
        limit = self._served.max_model_len
        needed = options.max_length + ENGINES["http"].score_extra
        if limit is not None and limit < min(needed, model.context_length):
            raise UsageError(
                f"{self._pool.all[0]}: the server takes {limit} tokens, and scoring asks for one more than "
                f"max-length {options.max_length}; give --max-length {limit - 1}, or start it with a larger "
                f"--max-model-len"
            )

    def _check_probe(self, model: ModelInfo) -> None:
        """The servers cut text as --model's tokenizer does, and their log-probs are such, at temperature 1."""
        text = PROBE.format(model.tokenizer.eos_token)
        ids: list[int] = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        body = {"model": self._served.id, "prompt": text, "add_special_tokens": False}
        absent = Tokens(tokens=[])
        tokens = ServerRequest("POST", "/tokenize", partial(parse, Tokens), body, absent=absent)
        for server, answer in self._pool.ask_each(tokens).items():
            if answer is absent:
                console.info(f"engine: {server}: has no /tokenize; its tokenizer is not compared with {model.name}'s")
            elif answer.tokens != ids:
                raise MismatchError(f"{server}: its tokenizer is not that of {model.name}; is it the same model?")
        hot = SamplingOptions(max_new_tokens=8, temperature=2.0, top_p=1.0)
        for sampler, drawn in self._pool.ask_each(self._sampling(ids, hot)).items():
            request = self._scoring(ids, drawn.response_ids, top_k=1)
            for scorer, score in self._pool.ask_each(request).items():
                gaps = [abs(p - q) for p, q in zip(drawn.logps, score.logps, strict=True)]
                if sum(gaps) > PROBE_GAP * len(gaps):
                    advice = "do both hold the same weights?"
                    if scorer is sampler:
                        advice = "start it with --logprobs-mode raw_logprobs"
                    raise MismatchError(
                        f"{scorer}: its log-probs by prefill are {sum(gaps) / len(gaps):.1f} nats a token from those "
                        f"of {sampler} while it samples; {advice}"
                    )

    # --- the two verbs ----------------------------------------------------------------------------------------------

    def generate(
        self, groups: Iterable[Sequence[GenerateRequest]], sampling: SamplingOptions
    ) -> Iterator[tuple[Key, Completion]]:
        jobs = (
            (request, self._sampling(request.prompt_ids, sampling, request.seed))
            for group in groups
            for request in group
        )
        # Log-probs are always asked for: they show that the tokens are of this answer.
        for request, completion in self._pool.stream(jobs):
            yield request.key, completion if request.logps else replace(completion, logps=[])

    def score(self, groups: Iterable[Sequence[ScoreRequest]], top_k: int = 0) -> Iterator[tuple[Key, list[Score]]]:
        jobs = (
            ((request, side), self._scoring(request.prompt_ids, response, top_k))
            for group in groups
            for request in group
            for side, response in enumerate(request.responses)
        )
        return scores_by_request(self._pool.stream(jobs))

    def _body(self, ids: Sequence[int]) -> dict[str, Any]:
        return {
            "model": self._served.id,
            "prompt": list(ids),
            "add_special_tokens": False,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
        }

    def _sampling(
        self, prompt: Sequence[int], sampling: SamplingOptions, seed: int | None = None
    ) -> ServerRequest[Completion]:
        body = {
            **self._body(prompt),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
            "stop_token_ids": self._eos,
            "logprobs": 0,  # of the sampled token only
            # Without these the server takes its own from the model's generation config.
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        }
        check = partial(self._completion, prompt=prompt, max_tokens=sampling.max_new_tokens)
        most = SHORT_ANSWER + TOKEN_BYTES * (len(prompt) + sampling.max_new_tokens)
        return ServerRequest("POST", "/v1/completions", check, body, most_bytes=most)

    def _completion(self, content: bytes, prompt: Sequence[int], max_tokens: int) -> Completion:
        choice = self._choice(content, prompt)
        ids, logps = choice.token_ids, choice.logprobs
        if not 1 <= len(ids) <= max_tokens:
            _wrong(f"{len(ids)} tokens, of at most {max_tokens}")
        if logps is None or logps.tokens != [f"token_id:{token}" for token in ids]:
            _wrong("the log-probs are not of its tokens")
        if len(logps.token_logprobs) != len(ids):
            _wrong(f"{len(logps.token_logprobs)} log-probs of {len(ids)} tokens")
        for token, logp in zip(ids, logps.token_logprobs, strict=True):
            self._check(token, logp)
        ended = ids[-1] in self._eos
        if not set(ids[:-1]).isdisjoint(self._eos) or choice.finish_reason != ("stop" if ended else "length"):
            _wrong(f"finish_reason '{choice.finish_reason}', but token {ids[-1]} is last and the EOS are {self._eos}")
        if not ended and len(ids) < max_tokens:
            _wrong(f"cut off after {len(ids)} tokens, of {max_tokens}")
        return Completion(ids, choice.finish_reason, logps.token_logprobs)

    def _scoring(self, prompt: Sequence[int], response: Sequence[int], top_k: int) -> ServerRequest[Score]:
        ids = [*prompt, *response]
        body = {**self._body(ids), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": top_k}
        check = partial(self._score, ids=ids, start=len(prompt), top_k=top_k)
        most = SHORT_ANSWER + TOKEN_BYTES * len(ids) * (top_k + 2)
        return ServerRequest("POST", "/v1/completions", check, body, most_bytes=most)

    def _score(self, content: bytes, ids: Sequence[int], start: int, top_k: int) -> Score:
        positions = self._choice(content, ids).prompt_logprobs
        if positions is None or len(positions) != len(ids):
            _wrong(f"{len(positions or ())} prompt log-probs of {len(ids)} tokens")
        logps, top_ids, top_logps = [], [], []
        for token, position in zip(ids[start:], positions[start:], strict=True):
            if position is None or token not in position:
                _wrong(f"no log-prob of token {token}")
            for other, entry in position.items():
                self._check(other, entry.logprob)
            logps.append(position[token].logprob)
            # The prompt's own token stands among the others, with the rank that it has.
            ranked = sorted((e.rank, other) for other, e in position.items() if other != token or e.rank <= top_k)
            if [rank for rank, _ in ranked] != list(range(1, top_k + 1)):
                _wrong(f"the log-probs of {len(ranked)} tokens, not of the {top_k} likeliest")
            if top_k:
                top_ids.append([other for _, other in ranked])
                top_logps.append([position[other].logprob for _, other in ranked])
                if top_logps[-1] != sorted(top_logps[-1], reverse=True):
                    _wrong("the likeliest tokens are out of order")
        return Score(logps, top_ids, top_logps)

    def _choice(self, content: bytes, prompt: Sequence[int]) -> Choice:
        (choice,) = parse(Answer, content).choices
        if choice.prompt_token_ids != list(prompt):
            _wrong("it is of another prompt")
        return choice

    def _check(self, token: int, logp: float) -> None:
        if not CLAMP < logp <= ROUNDING:  # nor NaN
            _wrong(f"log-prob {logp} of token {token}")
        if not 0 <= token < self._vocabulary:
            _wrong(f"token {token}, in a vocabulary of {self._vocabulary}")


def _wrong(what: str) -> NoReturn:
    raise Malformed(what)


def _last_name(path: str) -> str:
    """A Hub name as it is, of an absolute path the last name."""
    return PurePath(path).name if PurePath(path).is_absolute() else path


def _choose(server: Server, cards: Sequence[ModelCard], model: str) -> ModelCard:
    """The card of --model among what a server serves."""
    if len(cards) == 1:
        return cards[0]
    for card in cards:
        if model in (card.id, card.root):
            return card
    served = ", ".join(card.id for card in cards) or "nothing"
    raise UnavailableError(f"{server}: serves {served}, and none of them is --model {model}")
