"""The text and the token ids that a model is given for a prompt: its chat template, Alpaca's, or none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerFast

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError, UnavailableError, UsageError, first_line
from dpkd_offline.common.hashing import fingerprint
from dpkd_offline.config.base import Template
from dpkd_offline.dataset.schema import Prompt
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.prompts.chat import CLOCK, RenderError, render_chat
from dpkd_offline.prompts.columns import Content
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
QUESTION, ANSWER = "dpkdquestion", "dpkdanswer"  # words that no template changes
WITHOUT_IT = "take --template alpaca, or none"


def template_name(asked: Template, tokenizer: PreTrainedTokenizerFast) -> str:
    """The template that `auto` stands for with this tokenizer.

    Raises:
        UsageError: the chat template that is asked for is missing.
        UnavailableError: it is empty, or not one that can be chosen.
    """
    if asked not in ("auto", "chat"):
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
    return fingerprint([name, text, *([dict(arguments)] if arguments and name == "chat" else [])])


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
        text = content.instruction if content.kind == "prompt" else content.messages[0]["content"]
        ids = _text_ids(text, tokenizer)
    elif template == "chat":
        text = _chat_text(f"{row.place}: column '{column}'", content.messages, tokenizer, arguments)
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
) -> Prompt:
    """A prompt in the tokens of another model: its messages under `template`, its text where a chat says no more.

    Args:
        original: the template that it was rendered with.
        arguments: as of `render_content`.
        place: where the prompt stands, for error messages, which name its id, too.

    Raises:
        DataError: messages of several turns, for a model without a chat template; else as of `render_content`.
        UnavailableError: the chat template fails with any messages.
    """
    row = Row(f"{place}prompt '{prompt.id}'", {})
    if not prompt.messages or original == template != "chat":
        content = Content("prompt", [], prompt.prompt)
    elif template != "chat" and len(prompt.messages) == 1:
        content = Content("instruction", prompt.messages, prompt.messages[0]["content"])
    else:
        content = Content("messages", prompt.messages)
    text, ids = render_content(row, content, template, tokenizer, arguments)
    return replace(prompt, prompt=text, prompt_ids=ids)


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
    place: str, messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, arguments: Mapping[str, Any]
) -> str:
    """Messages as the chat template writes them, up to where the answer begins."""
    trial = try_template(tokenizer, arguments)
    try:
        return render_chat(_chat_template(tokenizer), messages, True, _variables(tokenizer, arguments))[0]
    except RenderError as error:
        if str(error) == trial.reason:  # the row has no part in it
            raise UnavailableError(f"{place}: {_template_fault(tokenizer.name_or_path, error)}") from error
        raise DataError(f"{place}: the chat template of '{tokenizer.name_or_path}' cannot take it: {error}") from error


def _template_fault(name: str, error: RenderError) -> str:
    return f"model '{name}': its chat template fails with any prompt: {error}; {WITHOUT_IT}"


def _chat_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """The template's text: of several that have names, the default one."""
    try:
        template = tokenizer.get_chat_template()
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


@cache
def _warn(message: str) -> None:
    console.info(f"warning: {message}")
