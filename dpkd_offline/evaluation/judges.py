"""Who judges: a model that an engine runs, or one behind a chat endpoint. Both turn questions into verdicts.

An engine is asked for the log-probs of the words that a verdict can be, so that it always gives one. Of an endpoint the
text is read, and where it gives the log-probs of all words, these make the verdict a probability.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

from dpkd_offline.common.errors import UsageError
from dpkd_offline.config.engines import ENGINES
from dpkd_offline.config.judge import Form, JudgeConfig
from dpkd_offline.engines.base import Key, ScoreRequest
from dpkd_offline.engines.chat import ChatAnswer, ChatClient
from dpkd_offline.engines.factory import choose_engine, load_engine, provenance_of
from dpkd_offline.evaluation.judge_prompts import VERSION, WORDS, read_word
from dpkd_offline.evaluation.verdicts import Verdict, VerdictKey, VerdictTable
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.prompts.columns import Content
from dpkd_offline.prompts.retokenize import ResponseTokenizer
from dpkd_offline.prompts.sources import Row
from dpkd_offline.prompts.templates import render_content, template_name

GROUP = 64  # questions that an engine may sort by length


@dataclass(frozen=True)
class Question:
    """One question to a judge."""

    key: VerdictKey
    text: str


class Judge(Protocol):
    """Both kinds of judge."""

    name: str
    counts: str  # what `tokens` counts

    @property
    def identity(self) -> dict[str, Any]:
        """What decides about its verdicts."""
        ...

    def tokens(self, question: Question) -> int:
        """How long a question is."""
        ...

    def judge(self, questions: Iterable[Question], table: VerdictTable) -> Iterator[VerdictKey]:
        """Add a verdict on each question to the table; the keys as they come."""
        ...


def judge_of(config: JudgeConfig) -> Judge:
    """The judge that a config names; nothing is loaded yet but a model's small files."""
    return ChatJudge(config) if config.model is None else ModelJudge(config, config.model)


def value_of(form: Form, key: VerdictKey, probabilities: Mapping[str, float]) -> float:
    """How much A is preferred; or the mean score.

    Args:
        probabilities: of the words; they sum up to 1.
    """
    if form == "score":
        return sum(int(word) * p for word, p in probabilities.items())
    return probabilities["1" if key[2] == "a-b" else "2"]


def verdict_of_words(form: Form, judge: str, key: VerdictKey, logps: Mapping[str, float], text: str = "") -> Verdict:
    """A verdict by the log-probs of all words, in nats; by default its text is the likeliest of them."""
    highest = max(logps.values())
    weights = {word: math.exp(logp - highest) for word, logp in logps.items()}
    probabilities = {word: weight / sum(weights.values()) for word, weight in weights.items()}
    likeliest = max(probabilities, key=lambda word: probabilities[word])
    seed, id_, order = key
    value = value_of(form, key, probabilities)
    return Verdict(judge, VERSION, seed, id_, order, text or likeliest, value, probabilities[likeliest])


class ModelJudge:
    """A model that an engine runs. What of a text would be a special token to it is spelled so that it is none."""

    counts = "tokens of the judge"

    def __init__(self, config: JudgeConfig, model: str) -> None:
        engine = choose_engine(config.engine, config.url)
        self._config, self._words = config.model_copy(update={"engine": engine}), WORDS[config.form]
        self._model = ModelInfo.load(model, config.trust_remote_code)
        self._arguments = config.template_args or {}
        self._template = template_name("auto", self._model.tokenizer)
        self._context = self._model.context_length - ENGINES[engine].score_extra
        self.name = self._model.public_name

    @property
    def identity(self) -> dict[str, Any]:
        engine = provenance_of(self._config.engine, self._config)
        return {**self._model.identity, **engine, "template_args": self._arguments}

    def _render(self, question: Question) -> tuple[str, list[int]]:
        text = question.text
        for special in self._model.special_tokens:
            text = text.replace(special, f"{special[0]} {special[1:]}")
        content = Content("instruction", [{"role": "user", "content": text}], text)
        row = Row(f"the question on prompt '{question.key[1]}'", {})
        return render_content(row, content, self._template, self._model.tokenizer, self._arguments)

    @cached_property
    def _word_ids(self) -> list[list[int]]:
        """The tokens of each word behind a question. A score ends its answer, or 1 would be the beginning of 10."""
        prompt, _ = self._render(Question((0, "", "a-b"), "?"))
        tokenizer = ResponseTokenizer(self._model.tokenizer, self._template, self._model.eos_ids, self._arguments)
        reason = "stop" if self._config.form == "score" else "length"
        count = len(self._words)
        return tokenizer.encode([prompt] * count, self._words, [reason] * count)[0]

    def tokens(self, question: Question) -> int:
        return len(self._render(question)[1]) + max(map(len, self._word_ids))

    def judge(self, questions: Iterable[Question], table: VerdictTable) -> Iterator[VerdictKey]:
        """As of `Judge`.

        Raises:
            UsageError: a question is longer than --max-length allows. One that is too long for the model is a failure.
        """
        waiting: dict[Key, VerdictKey] = {}
        unasked: list[VerdictKey] = []

        def groups() -> Iterator[list[ScoreRequest]]:
            remaining, number = iter(questions), 0
            while group := list(islice(remaining, GROUP)):
                requests = []
                for row, question in enumerate(group):
                    ids = self._render(question)[1]
                    if self._fits(question.key, len(ids)):
                        waiting[number, row] = question.key
                        requests.append(ScoreRequest((number, row), ids, self._word_ids))
                    else:
                        table.add(self._too_long(question.key))
                        unasked.append(question.key)
                yield requests
                number += 1

        engine = load_engine(self._model, self._config)
        try:
            for key, scores in engine.score(groups()):
                logps = {word: sum(score.logps) for word, score in zip(self._words, scores, strict=True)}
                verdict = verdict_of_words(self._config.form, self.name, waiting.pop(key), logps)
                table.add(verdict)
                yield verdict.key
        finally:
            engine.close()
        yield from unasked

    def _fits(self, key: VerdictKey, tokens: int) -> bool:
        """Whether the model's context holds a question; raises UsageError where --max-length alone does not."""
        needed = tokens + max(map(len, self._word_ids))
        if needed > self._context:
            return False
        if needed > self._config.max_length:
            raise UsageError(
                f"the question on prompt '{key[1]}' needs {needed} tokens, --max-length {self._config.max_length} is "
                f"less; raise it: the judge has a context of {self._context}"
            )
        return True

    def _too_long(self, key: VerdictKey) -> Verdict:
        seed, id_, order = key
        failure = f"longer than the judge's context of {self._context} tokens"
        return Verdict(self.name, VERSION, seed, id_, order, "", failure=failure)


class ChatJudge:
    """A model behind a chat endpoint."""

    counts = "words"

    def __init__(self, config: JudgeConfig) -> None:
        assert config.judge_model is not None
        self._config, self.name = config, config.judge_model

    @property
    def identity(self) -> dict[str, Any]:
        """Its name alone: where it is served is private, and may change."""
        config = self._config
        settings = {"max_new_tokens": config.max_new_tokens, "template_args": config.template_args or {}}
        return {"name": self.name, "engine": "chat", **settings}

    def tokens(self, question: Question) -> int:
        return len(question.text.split())

    def judge(self, questions: Iterable[Question], table: VerdictTable) -> Iterator[VerdictKey]:
        config = self._config
        client = ChatClient(
            config.url,
            self.name,
            config.concurrency,
            config.max_new_tokens,
            WORDS[config.form],
            logps=config.form == "pairwise",
            template_args=config.template_args,
        )
        try:
            jobs = ((question.key, question.text) for question in questions)
            yield from client.ask(jobs, lambda key, answer: table.add(self._verdict(key, answer)))
        finally:
            client.close()

    def _verdict(self, key: VerdictKey, answer: ChatAnswer) -> Verdict:
        form, (seed, id_, order) = self._config.form, key
        word = None if answer.cut_off else read_word(form, answer.text)
        logps = _logps_of_words(WORDS[form], answer.first)
        if word is not None and logps and logps[word] == max(logps.values()):  # else they are not of what is written
            return verdict_of_words(form, self.name, key, logps, answer.text)
        if word is not None:
            value = value_of(form, key, {other: float(other == word) for other in WORDS[form]})
            return Verdict(self.name, VERSION, seed, id_, order, answer.text, value)
        failure = answer.refusal or ("cut off" if answer.cut_off else f"neither {_either(WORDS[form])} alone")
        return Verdict(self.name, VERSION, seed, id_, order, answer.text, failure=failure)


def _either(words: Sequence[str]) -> str:
    return f"{words[0]} nor {words[1]}" if len(words) == 2 else f"of {words[0]} to {words[-1]}"


def _logps_of_words(words: Sequence[str], first: Mapping[str, float]) -> dict[str, float]:
    """The log-probs of all words as first tokens, with or without a space; none unless all are known."""
    masses = {word: sum(math.exp(logp) for token, logp in first.items() if token.strip() == word) for word in words}
    return {word: math.log(mass) for word, mass in masses.items()} if all(masses.values()) else {}
