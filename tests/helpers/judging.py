"""Evaluations without a model, and a chat server that judges them: rigged, or unwell."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from helpers.fake_server import FakeServer, Json
from helpers.tiny import write_jsonl

Opinion = Callable[[str, str], str]  # from the two answers to what the judge writes


def write_evaluation(folder: Path, responses: Sequence[str], seeds: Sequence[int] = (10,), **changes: object) -> Path:
    """An output folder as `evaluate` leaves it: the responses are of prompts 0, 1, … under each seed in turn."""
    folder.mkdir(parents=True)
    prompts = len(responses) // len(seeds)
    rows = [
        {
            "seed": seeds[n // prompts],
            "id": f"row-{n % prompts}",
            "messages": [{"role": "user", "content": f"Question {n % prompts}?"}],
            "prompt": f"<|user|>Question {n % prompts}?</s>",
            "references": [f"Reference {n % prompts}."],
            "response": response,
            "finish_reason": "stop",
            "tokens": 3,
            **changes,
        }
        for n, response in enumerate(responses)
    ]
    lines = write_jsonl(folder / "responses.jsonl", rows).read_bytes()
    results = {"prompts": prompts, "seeds": list(seeds), "truncated": 0.0, "made": {"model": {"name": folder.name}}}
    results["responses"] = hashlib.sha256(lines).hexdigest()
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def parts_of(question: str) -> list[str]:
    """What stands between the marks of a question: the task, and two answers."""
    return re.findall(r"^\[begin of the .*?\]\n(.*?)\n\[end of the .*?\]$", question, re.MULTILINE | re.DOTALL)


class FakeJudge(FakeServer):
    """A chat endpoint whose model has an opinion of two answers, and never changes it."""

    def __init__(self, opinion: Opinion = lambda first, second: "1") -> None:
        super().__init__(range(400))  # type: ignore[arg-type] # of a tokenizer its length alone
        self.opinion = opinion
        self.asked: Counter[str] = Counter()  # questions that came
        self.answered: Counter[str] = Counter()  # and those that were answered
        self.gives_logps = True
        self.refuses: Callable[[Json], str | None] = lambda body: None
        self.on_question: Callable[[int], None] = lambda number: None

    def complete(self, body: Json) -> Json:
        (message,) = body["messages"]
        with self.lock:
            self.asked[message["content"]] += 1
            number = self.asked.total()
        self.on_question(number)
        if refusal := self.refuses(body):
            return {"error": {"message": refusal}}
        text = self.opinion(*parts_of(message["content"])[1:])
        choice: Json = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": "stop",
            "logprobs": None,
        }
        if self.gives_logps and body.get("logprobs"):
            entries = [{"token": token, "logprob": logp} for token, logp in logps_of(text).items()]
            choice["logprobs"] = {"content": [{**entries[0], "top_logprobs": entries}]}
        with self.lock:
            self.answered[message["content"]] += 1
        return {"id": "x", "object": "chat.completion", "model": body["model"], "choices": [choice]}


def logps_of(text: str) -> dict[str, float]:
    """The likeliest first tokens of a judge that writes this, the first of them first."""
    other = {"1": "2", "2": "1"}.get(text, "?")
    return {text[:1] or "?": math.log(0.8), other: math.log(0.15), " " + other: math.log(0.01), "The": math.log(0.02)}


def longer(first: str, second: str) -> str:
    return "1" if len(first) > len(second) else "2"


def _of_message(change: Callable[[Json], Any]) -> Callable[[FakeServer, Json, list[Json]], None]:
    return lambda _, body, choices: change(choices[0])


def _logps(change: Callable[[Json], Any]) -> Callable[[FakeServer, Json, list[Json]], None]:
    """Change the log-probs, where there are some."""
    return lambda _, body, choices: change(choices[0]["logprobs"]["content"][0]) if choices[0]["logprobs"] else None


def _say(text: str | None) -> Callable[[Json], None]:
    def change(choice: Json) -> None:
        choice["message"]["content"] = text
        choice["logprobs"] = None

    return change


NO_ANSWERS: dict[str, Callable[[FakeServer, Json, list[Json]], None]] = {  # a good status and no chat completion
    "no choice": lambda _, body, choices: choices.clear(),
    "two choices": lambda _, body, choices: choices.append(choices[0]),
    "no message": _of_message(lambda choice: choice.pop("message")),
    "text is a number": _of_message(lambda choice: choice["message"].update(content=1)),
    "text is half a character": _of_message(lambda choice: choice["message"].update(content="\ud83d")),
    "log-probs are text": _of_message(lambda choice: choice.update(logprobs="1")),
    "log-prob NaN": _logps(lambda first: first["top_logprobs"][0].update(logprob=float("nan"))),
    "log-prob +0.5": _logps(lambda first: first["top_logprobs"][0].update(logprob=0.5)),
    "log-prob null": _logps(lambda first: first["top_logprobs"][0].update(logprob=None)),
}
NO_VERDICTS: dict[str, Callable[[FakeServer, Json, list[Json]], None]] = {  # answers that are counted as failed
    "text is empty": _of_message(_say("")),
    "text is null": _of_message(_say(None)),
    "a sentence": _of_message(_say("I think that answer 1 is better.")),
    "both words": _of_message(_say("1 2")),
    "another number": _of_message(_say("3")),
    "a word of the other form": _of_message(_say("12")),
    "a negative number": _of_message(_say("-1")),
    "cut off": _of_message(lambda choice: (_say("1")(choice), choice.update(finish_reason="length"))),
}
GOOD: dict[str, Callable[[FakeServer, Json, list[Json]], None]] = {  # answers without log-probs that are of use
    "no log-probs": _of_message(lambda choice: choice.update(logprobs=None)),
    "no likeliest tokens": _logps(lambda first: first["top_logprobs"].clear()),
    "one word's log-prob": _logps(lambda first: first["top_logprobs"].__delitem__(slice(1, None))),
    "log-probs of another text": _logps(lambda first: first.update(token="The")),
    "log-probs of the other word": _logps(lambda first: first["top_logprobs"][0].update(logprob=-9.0)),
    "marks around it": _of_message(
        lambda choice: choice.update(message={"content": f" **{choice['message']['content']}**.\n"}, logprobs=None)
    ),
}
