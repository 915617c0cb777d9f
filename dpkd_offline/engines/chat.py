"""Chat endpoints as OpenAI's: a question goes out, text comes back, with the log-probs of its first token if there are.

Not an engine, since the model's tokens are not known. What cannot be an answer is asked again, as `server_pool.py` does
with everything that fails; text of whatever kind is an answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from pydantic import BaseModel, Field

from dpkd_offline.common import console
from dpkd_offline.common.errors import UsageError
from dpkd_offline.engines.server_pool import KEYS, Malformed, ServerPool, ServerRequest, parse

J = TypeVar("J")
CHAT_KEYS = ("OPENAI_API_KEY", *KEYS)
LIKELIEST = 20  # first tokens whose log-probs are asked for, the most that most servers give
ROUNDING = 1e-2  # by which the probabilities of the likeliest tokens may sum up to more than 1
TRIED_FIRST = 5  # questions, before a server that refuses all of them is taken to refuse every one
OTHER_NAMES = {"max_tokens": "max_completion_tokens"}  # of parameters that newer models know by that alone
OPTIONAL = {"top_logprobs": ("top_logprobs", "logprobs"), "logprobs": ("top_logprobs", "logprobs")} | {
    name: (name,) for name in ("temperature", "structured_outputs", "chat_template_kwargs")
}  # what is left out together where a server refuses it by name


class Message(BaseModel):
    content: str | None = None


class TokenLogp(BaseModel):
    token: str
    logprob: float


class Position(TokenLogp):
    top_logprobs: list[TokenLogp] = []


class Logps(BaseModel):
    content: list[Position] | None = None


class ChatChoice(BaseModel):
    message: Message
    finish_reason: str | None = None
    logprobs: Logps | None = None


class ChatCompletion(BaseModel):
    choices: list[ChatChoice] = Field(min_length=1, max_length=1)


@dataclass(frozen=True)
class ChatAnswer:
    """What a model says to a question."""

    text: str
    cut_off: bool = False  # by max_tokens
    first: Mapping[str, float] = field(default_factory=dict)  # the likeliest first tokens and their log-probs, if known
    refusal: str | None = None  # why the server did not ask the model; the text is empty then


class ChatClient:
    """One model behind chat endpoints.

    Args:
        urls: of endpoints that all have the model.
        concurrency: questions in flight at each; None: as many as it says that it runs, if it does.
        max_tokens: of an answer.
        words: what an answer can be. vLLM's servers hold the model to it; others ignore it, or refuse to be told.
        logps: whether the log-probs of first tokens are of use.
        template_args: what servers that take this, such as vLLM's, give to the chat template.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str,
        concurrency: int | None,
        max_tokens: int,
        words: Sequence[str],
        *,
        logps: bool = False,
        template_args: Mapping[str, Any] | None = None,
    ) -> None:
        self._pool = ServerPool(urls, concurrency, CHAT_KEYS)
        self._settings: dict[str, Any] = {"model": model, "temperature": 0.0, "max_tokens": max_tokens}
        self._settings |= {"structured_outputs": {"choice": list(words)}}
        self._settings |= {"logprobs": True, "top_logprobs": LIKELIEST} if logps else {}
        self._settings |= {"chat_template_kwargs": dict(template_args)} if template_args else {}

    def ask(self, questions: Iterable[tuple[J, str]], keep: Callable[[J, ChatAnswer], None]) -> Iterator[J]:
        """Ask all questions, and hand each answer to `keep` as soon as it has come, in another thread.

        A server may refuse a question, such as one that is too long for the model, if it has taken one before.

        Returns:
            The keys of the questions that are answered or refused, as they come.

        Raises:
            UsageError: the server refuses the first questions.
            UnavailableError: no endpoint answers any more, or one answers again and again what is no answer.
            Whatever `keep` raises.
        """
        waiting = iter(questions)
        for job in self._settle(list(islice(waiting, 1)), waiting, keep):
            yield job
        for job, _ in self._pool.stream((job, self._request(job, question, keep)) for job, question in waiting):
            yield job

    def _settle(
        self, first: list[tuple[J, str]], others: Iterator[tuple[J, str]], keep: Callable[[J, ChatAnswer], None]
    ) -> Iterator[J]:
        """Ask one question at a time until one is answered, without the parameters that the server does not take."""
        refused: dict[J, ChatAnswer] = {}

        def sort(job: J, answer: ChatAnswer) -> None:
            if answer.refusal is None:
                keep(job, answer)
            else:
                refused[job] = answer

        while first:
            ((job, question),) = first
            refused.pop(job, None)
            ((_, answer),) = self._pool.stream([(job, self._request(job, question, sort))])
            if answer.refusal is not None and self._do_without(answer.refusal):
                continue
            if answer.refusal is None:
                for other, refusal in refused.items():
                    keep(other, refusal)
                yield from (*refused, job)
                return
            first = list(islice(others, 1)) if len(refused) < TRIED_FIRST else []
        if refused:
            raise UsageError(f"{self._pool.all[0]} refuses the questions: {next(iter(refused.values())).refusal}")

    def _do_without(self, refusal: str) -> bool:
        """Leave out, or call by its other name, a parameter that a refusal names. Returns whether there was one."""
        for name in [name for name in self._settings if name in refusal]:
            if name in OTHER_NAMES:
                self._settings[OTHER_NAMES[name]] = self._settings.pop(name)
                return True
            if name in OPTIONAL:
                for left_out in OPTIONAL[name]:
                    self._settings.pop(left_out, None)
                console.info(f"judge: {self._pool.all[0]} does not take {name}, which is left out")
                return True
        return False

    def _request(self, job: J, question: str, keep: Callable[[J, ChatAnswer], None]) -> ServerRequest[ChatAnswer]:
        def answered(content: bytes) -> ChatAnswer:
            answer = _answer(parse(ChatCompletion, content).choices[0])
            keep(job, answer)
            return answer

        def refused(message: str) -> ChatAnswer:
            answer = ChatAnswer("", refusal=message)
            keep(job, answer)
            return answer

        body = {**self._settings, "messages": [{"role": "user", "content": question}]}
        return ServerRequest("POST", "/v1/chat/completions", answered, body, refused=refused)

    def close(self) -> None:
        self._pool.close()


def _answer(choice: ChatChoice) -> ChatAnswer:
    text, cut_off = choice.message.content or "", choice.finish_reason == "length"
    positions = choice.logprobs.content or [] if choice.logprobs else []
    first = next((position for position in positions if position.token.strip()), None)
    if first is None or not text.lstrip().startswith(first.token.strip()):
        return ChatAnswer(text, cut_off)  # none, or such as are not of this text
    logps = {entry.token: entry.logprob for entry in first.top_logprobs}
    if not sum(math.exp(min(logp, 1.0)) for logp in logps.values()) <= 1 + ROUNDING:  # nor NaN
        raise Malformed("the log-probs of its first token are none")
    return ChatAnswer(text, cut_off, logps)
