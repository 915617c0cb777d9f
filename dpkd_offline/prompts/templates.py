"""The text and the token ids that a model is given for a prompt: its chat template, Alpaca's, or none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError, UnavailableError, UsageError, first_line
from dpkd_offline.config.base import TEMPLATES, Template
from dpkd_offline.dataset.provenance import fingerprint_of_template
from dpkd_offline.dataset.schema import Prompt
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.prompts.chat import CLOCK, RenderError, render_chat
from dpkd_offline.prompts.columns import Content, with_system, without_system
from dpkd_offline.prompts.conversations import Turn
from dpkd_offline.prompts.sources import Row

# The template of the authors' code (and of MiniLLM), Alpaca's, for models that have no chat template.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


NO_ARGUMENTS: Mapping[str, Any] = {}
NO_TEXT = "None"  # as Jinja writes it
QUESTION, ANSWER = "dpkdquestion", "dpkdanswer"  # words that no template changes
CALL_ID = "dpkd00000"  # of the length and the characters that Mistral's templates ask for
WITHOUT_IT = "take --template alpaca, or none"


def with_template(model: ModelInfo, asked: Template) -> ModelInfo:
    """A model with the chat template in the file that is asked for; the model itself where none is.

    Raises:
        UsageError: the file is no text.
    """
    if asked in TEMPLATES:
        return model
    try:
        return model.with_chat_template(Path(asked).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"template: {asked}: {first_line(error)}") from error


def file_template(model: ModelInfo) -> dict[str, str]:
    """What a dataset keeps of a chat template that the model does not have itself: its text."""
    return {} if model.chat_template is None else {"chat_template": model.chat_template}


def template_name(asked: Template, tokenizer: PreTrainedTokenizerFast) -> str:
    """The template that `auto`, or a file, stands for with this tokenizer, whose chat template is that of the file.

    Raises:
        UsageError: the chat template that is asked for is missing.
        UnavailableError: it is empty, or not one that can be chosen.
    """
    if asked in ("alpaca", "none"):
        return asked
    if tokenizer.chat_template is None:
        if asked == "chat":
            raise UsageError("template 'chat': this model's tokenizer has no chat template; take --template alpaca")
        return "alpaca"
    if not _chat_template(tokenizer).strip():
        raise UnavailableError(f"model '{tokenizer.name_or_path}': its chat template is empty; {WITHOUT_IT}")
    return "chat"


def template_fingerprint(
    name: str, tokenizer: PreTrainedTokenizerFast, arguments: Mapping[str, Any] = NO_ARGUMENTS
) -> str:
    """Equal where the same row becomes the same text."""
    text = {"chat": tokenizer.chat_template, "alpaca": ALPACA_WITH_INPUT + ALPACA_WITHOUT_INPUT}.get(name, "")
    return fingerprint_of_template(name, text, arguments)


def render_content(
    row: Row,
    content: Content,
    template: str,
    tokenizer: PreTrainedTokenizerFast,
    arguments: Mapping[str, Any] = NO_ARGUMENTS,
    column: str | None = None,
) -> tuple[str, list[int]]:
    """The text of a prompt under a template, and its token ids.

    Raw text gets no template, and no other template than 'chat' takes messages.

    Args:
        arguments: what the chat template is told besides.
        column: where the row has its prompt, if `content` does not say it.

    Raises:
        DataError: the template cannot take these messages, or makes nothing of them.
        UnavailableError: the chat template fails with any messages.
    """
    column = column or column_of(content)
    if content.kind == "prompt" or template == "none":
        if content.kind == "messages":
            raise DataError(f"{row.place}: column '{column}' needs a chat template; 'none' takes text only")
        text = content.instruction if content.kind == "prompt" else str(content.messages[0]["content"])
        ids = _text_ids(text, tokenizer)
    elif template == "chat":
        text = _chat_text(row, column, content, tokenizer, arguments)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template wrote the special tokens
    else:
        if content.kind == "messages":
            raise DataError(f"{row.place}: column '{column}' needs a chat template, this run has 'alpaca'")
        form = ALPACA_WITH_INPUT if content.input else ALPACA_WITHOUT_INPUT
        text = form.format(instruction=content.instruction, input=content.input)
        ids = _text_ids(text, tokenizer)
    if not ids:
        raise DataError(f"{row.place}: column '{column}' makes a prompt without any token, with template '{template}'")
    return text, ids


def column_of(content: Content) -> str:
    """The column of a row that is wrong where a template cannot take its prompt."""
    return content.needs_chat if content.kind == "messages" else next(iter(content.columns), content.kind)


def _text_ids(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The token ids of a text that no chat template made, with one BOS if the tokenizer adds it."""
    ids: list[int] = tokenizer(text)["input_ids"]
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # some tokenizers close every text; a prompt goes on
        ids = ids[:-1]
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos] and not text.startswith(2 * str(tokenizer.bos_token)):
        _warn(
            f"prompts begin with the text '{tokenizer.bos_token}', and the tokenizer of '{tokenizer.name_or_path}' "
            f"adds that token itself: it stands there once"
        )
        ids = ids[1:]
    return ids


def render(
    prompt: Prompt,
    original: str,
    template: str,
    tokenizer: PreTrainedTokenizerFast,
    arguments: Mapping[str, Any] = NO_ARGUMENTS,
    place: str = "",
    system: tuple[str | None, str] | None = None,
) -> Prompt:
    """A prompt in the tokens of another model: its messages under `template`, its text where a chat says no more.

    Args:
        original: the template that it was rendered with.
        arguments: as of `render_content`.
        place: where the prompt stands, for error messages, which name its id, too.
        system: the system turn of prompts that had none, and what is in its place; their `messages` stay as they are.

    Raises:
        DataError: messages of several turns, for a model without a chat template; else as of `render_content`.
        UnavailableError: the chat template fails with any messages.
    """
    row = Row(f"{place}prompt '{prompt.id}'", {})
    if not prompt.messages or original == template != "chat":
        content = Content("prompt", [], prompt.prompt)
    elif prompt.conversation is not None:
        content = Content.of_conversation(prompt.conversation)
    elif template != "chat" and len(prompt.messages) == 1:
        content = Content("instruction", [*prompt.messages], prompt.messages[0]["content"])
    else:
        content = Content("messages", [*prompt.messages])
    if system is not None and content.messages:
        content = with_system(without_system(content, system[0]), system[1], column_of(content))
    text, ids = render_content(row, content, template, tokenizer, arguments)
    references = references_of(row, replace(content, references=prompt.references), text, tokenizer, arguments)
    return replace(prompt, prompt=text, prompt_ids=ids, references=references)


# --- chat templates ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """What a chat template makes of one question, and of a question with its answer; None where it refuses it."""

    prompt: str | None
    unprompted: str | None  # the question, without the beginning of an answer
    answered: str | None
    reason: str  # why the question was refused
    asked_time: bool

    @property
    def after_question(self) -> str:
        """What a prompt has behind the question."""
        return (self.prompt or "").rpartition(QUESTION)[2]

    @property
    def before_answer(self) -> str | None:
        """What stands between the question and its answer, where both are found."""
        _, question, rest = (self.answered or "").partition(QUESTION)
        between, answer, _ = rest.partition(ANSWER)
        return between if question and answer else None

    @property
    def after_answer(self) -> str:
        return (self.answered or "").rpartition(ANSWER)[2] if self.before_answer is not None else ""


def try_template(tokenizer: PreTrainedTokenizerFast, arguments: Mapping[str, Any] = NO_ARGUMENTS) -> Trial:
    """A tokenizer's chat template, tried on a question and an answer, once in a process.

    Raises:
        UnavailableError: it is no template, or takes too much time or memory.
    """
    variables = json.dumps(_variables(tokenizer, arguments), default=str, sort_keys=True)
    return _trial(tokenizer.name_or_path, _chat_template(tokenizer), variables)


@cache
def _trial(name: str, template: str, variables: str) -> Trial:
    texts: list[str | None] = []
    reasons, asked_time = [], False
    question, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
    for messages, begin_answer in (([question], True), ([question], False), ([question, answer], False)):
        try:
            text, asked = render_chat(template, messages, begin_answer, json.loads(variables))
        except RenderError as error:
            if error.hopeless:
                raise UnavailableError(_template_fault(name, error)) from error
            texts.append(None)
            reasons.append(str(error))
        else:
            texts.append(text)
            reasons.append("")
            asked_time |= asked
    prompt, unprompted, answered = texts
    return Trial(prompt, unprompted, answered, reasons[0], asked_time)


def _chat_text(
    row: Row, column: str, content: Content, tokenizer: PreTrainedTokenizerFast, arguments: Mapping[str, Any]
) -> str:
    """A conversation as the chat template writes it, up to where the answer begins.

    Raises:
        DataError: the template refuses it, or leaves something of it out.
        UnavailableError: the template fails with any messages.
    """
    template, place = _chat_template(tokenizer, content.tools), f"{row.place}: column '{column}'"
    variables = _variables(tokenizer, arguments)
    trial = try_template(tokenizer, arguments)
    try:
        text, turns = _written(template, content.messages, True, variables, content.tools)
    except RenderError as error:
        if str(error) == trial.reason:  # the row has no part in it
            raise UnavailableError(f"{place}: {_template_fault(tokenizer.name_or_path, error)}") from error
        raise DataError(f"{place}: the chat template of '{tokenizer.name_or_path}' cannot take it: {error}") from error
    if left_out := _left_out(template, json.dumps(_marked(turns, content.tools)), json.dumps(variables, default=str)):
        raise DataError(
            f"{place}: the chat template of '{tokenizer.name_or_path}' leaves out {left_out}; take a model or a "
            f"--template that knows it, or leave such rows out with --on-bad-row skip"
        )
    return text


def references_of(
    row: Row,
    content: Content,
    prompt: str,
    tokenizer: PreTrainedTokenizerFast,
    arguments: Mapping[str, Any] = NO_ARGUMENTS,
) -> list[str]:
    """The references of a prompt; the answer of an assistant that calls tools as the chat template writes it behind it.

    Raises:
        DataError: it does not write it there, or refuses it.
    """
    if content.answer is None:
        return content.references
    turns, place = [*content.messages, content.answer], f"{row.place}: column '{column_of(content)}'"
    template, variables = _chat_template(tokenizer, content.tools), _variables(tokenizer, arguments)
    name = f"the chat template of '{tokenizer.name_or_path}'"
    try:
        whole, _ = _written(template, turns, False, variables, content.tools)
    except RenderError as error:
        raise DataError(f"{place}: {name} cannot take its answer: {error}") from error
    answer = whole.removeprefix(prompt).removesuffix(try_template(tokenizer, arguments).after_answer)
    if not whole.startswith(prompt) or not answer.strip():
        raise DataError(f"{place}: {name} does not write its answer, a call of a tool, where an answer begins")
    return [*content.references[:-1], answer]


def _written(
    template: str, turns: list[Turn], begin_answer: bool, variables: dict[str, Any], tools: list[dict[str, Any]]
) -> tuple[str, list[Turn]]:
    """What a template makes of turns, and these: one that cannot take a call without text, or writes its text as the
    word None, gets an empty text with it.

    Raises:
        RenderError: it cannot take them.
    """
    filled = [{**turn, "content": turn["content"] or ""} for turn in turns]
    try:
        text = render_chat(template, turns, begin_answer, variables, tools)[0]
    except RenderError as error:
        if error.hopeless or filled == turns:
            raise
        return render_chat(template, filled, begin_answer, variables, tools)[0], filled
    if filled != turns and NO_TEXT in text:
        other = render_chat(template, filled, begin_answer, variables, tools)[0]
        if other.count(NO_TEXT) < text.count(NO_TEXT):
            return other, filled
    return text, turns


def _marked(turns: list[Turn], tools: list[dict[str, Any]]) -> dict[str, Any]:
    """A conversation of the same shape, in which every text is a word of its own."""
    messages = [_marked_turn(turn, number) for number, turn in enumerate(turns, start=1)]
    return {"messages": messages, "tools": [_marked_tool()] if tools else []}


def _marked_tool() -> dict[str, Any]:
    word = _word("tool")
    properties = {word: {"type": "string", "description": word}}
    parameters = {"type": "object", "properties": properties, "required": [word]}
    return {"type": "function", "function": {"name": word, "description": word, "parameters": parameters}}


def _marked_turn(turn: Turn, number: int) -> Turn:
    marked = {**turn, "content": _word(number) if (turn["content"] or "").strip() else turn["content"]}
    marked |= {key: _word(key) for key in turn.keys() - {"role", "content", "tool_calls", "tool_call_id"}}
    if "tool_call_id" in turn:
        marked["tool_call_id"] = CALL_ID
    if calls := turn.get("tool_calls"):
        marked["tool_calls"] = [_marked_call(call, number, place) for place, call in enumerate(calls)]
    return marked


def _marked_call(call: Mapping[str, Any], number: int, place: int) -> dict[str, Any]:
    words = {"name": _word("name", number, place), "arguments": {"argument": _word("argument", number, place)}}
    return {"type": "function", "function": words, **({"id": CALL_ID} if "id" in call else {})}


def _word(*place: object) -> str:
    """A word that no template changes, and that is part of no other."""
    return f"dpkd{'x'.join(map(str, place))}end"


@lru_cache(4096)  # few shapes of conversations are many rows'
def _left_out(template: str, marked: str, variables: str) -> str | None:
    """What of a marked conversation a template does not write; None where it writes all but thoughts.

    A template that cannot take the words, and took the row, looks at what they say.
    """
    marks = json.loads(marked)
    try:
        text, _ = render_chat(template, marks["messages"], True, json.loads(variables), marks["tools"])
    except RenderError:
        return None
    if marks["tools"] and _word("tool") not in text:
        return "the tools"
    for number, turn in enumerate(marks["messages"], start=1):
        for call in turn.get("tool_calls", ()):
            function = call["function"]
            if function["name"] not in text or function["arguments"]["argument"] not in text:
                return f"what turn {number} calls"
        if turn["content"] == _word(number) and turn["content"] not in text:
            return f"what turn {number} ({turn['role']}) says"
    return None


def _template_fault(name: str, error: RenderError) -> str:
    return f"model '{name}': its chat template fails with any prompt: {error}; {WITHOUT_IT}"


def _chat_template(tokenizer: PreTrainedTokenizerFast, tools: Sequence[dict[str, Any]] = ()) -> str:
    """The template's text: of several that have names, the default one, or that for tools, where there are any."""
    try:
        template = tokenizer.get_chat_template(tools=list(tools) or None)
    except ValueError as error:
        reason = first_line(error)
        raise UnavailableError(f"model '{tokenizer.name_or_path}': no chat template to take: {reason}") from error
    if not isinstance(template, str):
        kind = type(template).__name__
        raise UnavailableError(f"model '{tokenizer.name_or_path}': its chat template is not text, it is {kind}")
    return template


def _variables(tokenizer: PreTrainedTokenizerFast, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {**tokenizer.special_tokens_map, **arguments}


def warn_of_template(model: ModelInfo, template: str, arguments: Mapping[str, Any] = NO_ARGUMENTS) -> None:
    """Say what a chat template does that spoils responses, or that people may not expect; each once.

    Raises:
        UnavailableError: it is no template, or takes too much time or memory.
    """
    if template != "chat":
        return
    tokenizer, name = model.tokenizer, f"the chat template of '{model.name}'"
    trial, bos = try_template(tokenizer, arguments), tokenizer.bos_token_id
    if trial.prompt and bos is not None:
        ids = tokenizer(trial.prompt, add_special_tokens=False)["input_ids"]
        if ids[:2] == [bos, bos]:
            _warn(f"{name} begins prompts with '{tokenizer.bos_token}' twice")
    between, after = trial.before_answer, trial.after_question
    if trial.prompt is not None and trial.prompt == trial.unprompted and between is not None:
        if between.strip() != after.strip() or not after.strip():
            _warn(
                f"{name} does not begin the answer (add_generation_prompt changes nothing): behind the question, "
                f"prompts have {after!r}, conversations with an answer {between!r}; the model may go on with the "
                f"question"
            )
    ids = tokenizer(trial.after_answer, add_special_tokens=False)["input_ids"] if trial.after_answer.strip() else []
    if ids and not set(ids) & set(model.eos_ids):
        ends = ", ".join(f"'{tokenizer.decode([token])}' ({token})" for token in model.eos_ids)
        _warn(
            f"{name} ends an answer with '{tokenizer.decode(ids[:1])}' ({ids[0]}), which is no EOS of the model; its "
            f"EOS: {ends}. Responses may go on until --max-new-tokens; add the token to eos_token_id in "
            f"generation_config.json"
        )
    if trial.asked_time:
        _warn(
            f"{name} writes the time: it is told {CLOCK:%d %B %Y} on every day, so that the same rows make the same "
            f"prompts"
        )


def knows_no_chat(text: str, model: ModelInfo, arguments: Mapping[str, Any] = NO_ARGUMENTS) -> bool:
    """Whether raw text has nothing in it of the chat template that the model has."""
    end = try_template(model.tokenizer, arguments).after_question.strip()
    begun = text.removeprefix(str(model.tokenizer.bos_token))
    return not (end and end in text) and special_token_in(begun, model) is None


def special_token_in(text: str, model: ModelInfo) -> str | None:
    return next((token for token in model.special_tokens if token in text), None)


@cache
def _warn(message: str) -> None:
    console.info(f"warning: {message}")
