"""The text and the token ids that a model is given for a prompt: its chat template, Alpaca's, or none."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedTokenizerFast

from dpkd_offline.common.errors import DataError, UsageError
from dpkd_offline.common.hashing import fingerprint
from dpkd_offline.config.base import Template
from dpkd_offline.dataset.schema import Prompt
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


def template_name(asked: Template, tokenizer: PreTrainedTokenizerFast) -> str:
    """The template that `auto` stands for with this tokenizer; a UsageError where the chat template is missing."""
    if asked == "auto":
        return "chat" if tokenizer.chat_template else "alpaca"
    if asked == "chat" and not tokenizer.chat_template:
        raise UsageError("template 'chat': this model's tokenizer has no chat template; take --template alpaca")
    return asked


def template_fingerprint(name: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """Equal where the same row becomes the same text."""
    text = {"chat": tokenizer.chat_template, "alpaca": ALPACA_WITH_INPUT + ALPACA_WITHOUT_INPUT}.get(name, "")
    return fingerprint([name, text])


def render_content(
    row: Row, content: Content, template: str, tokenizer: PreTrainedTokenizerFast
) -> tuple[str, list[int]]:
    """The text of a prompt under a template, and its token ids; a DataError for messages that the template cannot take.

    Raw text gets no template, and no other template than 'chat' takes messages.
    """
    if content.kind == "prompt" or template == "none":
        if content.kind == "messages":
            raise DataError(f"{row.place}: column '{content.needs_chat}' needs a chat template; 'none' takes text only")
        text = content.instruction if content.kind == "prompt" else content.messages[0]["content"]
    elif template == "chat":
        text = str(tokenizer.apply_chat_template(content.messages, tokenize=False, add_generation_prompt=True))
        return text, tokenizer(text, add_special_tokens=False)["input_ids"]  # the template wrote the special tokens
    else:
        if content.kind == "messages":
            raise DataError(f"{row.place}: column '{content.needs_chat}' needs a chat template, this run has 'alpaca'")
        form = ALPACA_WITH_INPUT if content.input else ALPACA_WITHOUT_INPUT
        text = form.format(instruction=content.instruction, input=content.input)
    ids: list[int] = tokenizer(text)["input_ids"]
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # some tokenizers close every text; a prompt goes on
        ids = ids[:-1]
    return text, ids


def render(prompt: Prompt, original: str, template: str, tokenizer: PreTrainedTokenizerFast) -> Prompt:
    """A prompt in the tokens of another model: its messages under `template`, its text where a chat says no more.

    Args:
        original: the template that it was rendered with.

    Raises:
        DataError: messages of several turns, for a model without a chat template.
    """
    row = Row(f"prompt '{prompt.id}'", {})
    if not prompt.messages or original == template != "chat":
        content = Content("prompt", [], prompt.prompt)
    elif template != "chat" and len(prompt.messages) == 1:
        content = Content("instruction", prompt.messages, prompt.messages[0]["content"])
    else:
        content = Content("messages", prompt.messages)
    text, ids = render_content(row, content, template, tokenizer)
    return replace(prompt, prompt=text, prompt_ids=ids)
