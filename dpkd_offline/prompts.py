"""Prompts: a source of rows, filters, a template, token ids.

A source has the columns `instruction`, `input` and `reference`, or `messages`, or `prompt` (raw text, no template);
`id` is optional, and `reference` may be a string or a list of them. It is a JSONL or Parquet file, a directory of
these, the URL of either, or a `datasets` name. Every error names file, row (a line of JSONL, else counted from 1) and
column.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerFast

from dpkd_offline.config import PromptOptions, Template
from dpkd_offline.errors import DataError, UnavailableError, UsageError
from dpkd_offline.files import fingerprint
from dpkd_offline.records import Prompt
from dpkd_offline.remote import Location
from dpkd_offline.seen import Seen

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
ROLES = ("system", "user", "assistant")
HALF_CHARACTER = re.compile("[\\ud800-\\udfff]")  # JSON can say it, UTF-8 cannot


@dataclass(frozen=True)
class Row:
    """One row of a source, and where it stands."""

    place: str  # file:line
    columns: dict[str, Any]


# --- sources --------------------------------------------------------------------------------------------------------


def read_rows(source: str | Location) -> Iterator[Row]:
    """The rows of a JSONL or Parquet file, of a directory of these, or of a `datasets` NAME[@CONFIG][:SPLIT]."""
    path = Path(source) if isinstance(source, str) else source
    if path.is_dir():
        files = sorted((f for f in path.iterdir() if f.suffix in (".jsonl", ".parquet")), key=str)
        if not files:
            raise DataError(f"{source}: no .jsonl or .parquet file in this directory")
        for file in files:
            yield from read_rows(file)
    elif path.suffix == ".jsonl":
        yield from _jsonl(path)
    elif path.suffix == ".parquet":
        yield from _parquet(path)
    elif path.exists():
        raise UsageError(f"{source}: expected a .jsonl or .parquet file, a directory, or the name of a dataset")
    elif isinstance(source, str):
        yield from _named(source)
    else:
        raise DataError(f"{source}: no such file")


def source_name(source: str | Location) -> str:
    """What a source is called, without where it lies."""
    return source if isinstance(source, str) and not Path(source).exists() else Path(str(source)).name


def _jsonl(path: Location) -> Iterator[Row]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    columns = json.loads(line.rstrip())
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}:{number}:{error.colno}: invalid JSON: {error.msg}") from error
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}:{number}:{error.start + 1}: not UTF-8 text: {error.reason}") from error
                if not isinstance(columns, dict):
                    raise DataError(f"{path}:{number}:1: expected a JSON object")
                if b"\\u" in line and (half := HALF_CHARACTER.search(json.dumps(columns, ensure_ascii=False))):
                    raise DataError(f"{path}:{number}: \\u{ord(half[0]):x} is half a character")
                yield Row(f"{path}:{number}", columns)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def _parquet(path: Location) -> Iterator[Row]:
    number = 0
    try:
        # In this thread alone: one of Arrow's that still has to do with a file of Python's when the interpreter ends
        # takes the process down with it, and what comes first may be an error in a row.
        with path.open("rb") as opened, pq.ParquetFile(opened, pre_buffer=False) as file:
            for batch in file.iter_batches(1024, use_threads=False):
                for columns in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}:{number}", columns)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {' '.join(str(error).split())}") from error


def _named(source: str) -> Iterator[Row]:
    import datasets

    name, _, split = source.partition(":")
    name, _, config = name.partition("@")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UnavailableError(f"'{source}': neither a file nor a dataset that can be loaded: {reason}") from error
    for number, columns in enumerate(rows, start=1):
        yield Row(f"{source}:{number}", columns)


# --- columns --------------------------------------------------------------------------------------------------------


def _text(row: Row, column: str) -> str | None:
    value = row.columns.get(column)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{row.place}: column '{column}' must be a string, it is {type(value).__name__}")
    return value


def conversation(row: Row, column: str) -> list[dict[str, str]]:
    """The messages in a column, each with a role and a content, or a DataError."""
    messages = row.columns[column]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{row.place}: column '{column}' must be a list of at least one message")
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES or not isinstance(message.get("content"), str):
            raise DataError(f"{row.place}: column '{column}' needs a role of {', '.join(ROLES)} and a string content")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _messages(row: Row) -> list[dict[str, str]]:
    messages = conversation(row, "messages")
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise DataError(f"{row.place}: column 'messages' must end with what a user says")
    return messages


def _references(row: Row) -> list[str]:
    value = row.columns.get("reference")
    values = [value] if isinstance(value, str) else value or []
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise DataError(f"{row.place}: column 'reference' must be a string or a list of strings")
    return [v for v in values if v.strip()]


@dataclass(frozen=True)
class _Content:
    """What a row says, before any template: messages, instruction and input, or raw text."""

    kind: Literal["messages", "instruction", "prompt"]
    messages: list[dict[str, str]]
    instruction: str = ""
    input: str = ""


def _content(row: Row) -> _Content:
    if row.columns.get("messages") is not None:
        return _Content("messages", _messages(row))
    kind: Literal["instruction", "prompt"] = "prompt" if row.columns.get("prompt") is not None else "instruction"
    if kind not in row.columns:
        raise DataError(f"{row.place}: column 'instruction' is missing (or 'messages', or 'prompt')")
    text = _text(row, kind)
    if text is None or not text.strip():
        raise DataError(f"{row.place}: column '{kind}' is empty")
    if kind == "prompt":
        return _Content(kind, [], text)
    context = (_text(row, "input") or "").strip()
    said = f"{text.strip()}\n\n{context}" if context else text.strip()
    return _Content(kind, [{"role": "user", "content": said}], text.strip(), context)


# --- templates ------------------------------------------------------------------------------------------------------


def template_name(asked: Template, tokenizer: PreTrainedTokenizerFast) -> str:
    """The template that `auto` stands for with this tokenizer; a UsageError for a chat template that is not there."""
    if asked == "auto":
        return "chat" if tokenizer.chat_template else "alpaca"
    if asked == "chat" and not tokenizer.chat_template:
        raise UsageError("template 'chat': this model's tokenizer has no chat template; take --template alpaca")
    return asked


def template_fingerprint(name: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """Equal where the same row becomes the same text."""
    text = {"chat": tokenizer.chat_template, "alpaca": ALPACA_WITH_INPUT + ALPACA_WITHOUT_INPUT}.get(name, "")
    return fingerprint([name, text])


def _render(row: Row, content: _Content, template: str, tokenizer: PreTrainedTokenizerFast) -> tuple[str, list[int]]:
    if content.kind == "prompt" or template == "none":
        if content.kind == "messages":
            raise DataError(f"{row.place}: column 'messages' needs a chat template; 'none' takes text only")
        text = content.instruction if content.kind == "prompt" else content.messages[0]["content"]
    elif template == "chat":
        text = str(tokenizer.apply_chat_template(content.messages, tokenize=False, add_generation_prompt=True))
        return text, tokenizer(text, add_special_tokens=False)["input_ids"]  # the template wrote the special tokens
    else:
        if content.kind == "messages":
            raise DataError(f"{row.place}: column 'messages' needs a chat template, this run has 'alpaca'")
        form = ALPACA_WITH_INPUT if content.input else ALPACA_WITHOUT_INPUT
        text = form.format(instruction=content.instruction, input=content.input)
    ids: list[int] = tokenizer(text)["input_ids"]
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # some tokenizers close every text; a prompt goes on
        ids = ids[:-1]
    return text, ids


def render(prompt: Prompt, given: str, template: str, tokenizer: PreTrainedTokenizerFast) -> Prompt:
    """A prompt in the tokens of another model: its messages under `template`, its text where a chat says no more.

    Args:
        given: the template that it was rendered with.

    Raises:
        DataError: messages of several turns, for a model without a chat template.
    """
    row = Row(f"prompt '{prompt.id}'", {})
    if not prompt.messages or given == template != "chat":
        content = _Content("prompt", [], prompt.prompt)
    elif template != "chat" and len(prompt.messages) == 1:
        said = prompt.messages[0]["content"]
        content = _Content("instruction", prompt.messages, said)
    else:
        content = _Content("messages", prompt.messages)
    text, ids = _render(row, content, template, tokenizer)
    return replace(prompt, prompt=text, prompt_ids=ids)


# --- prompts --------------------------------------------------------------------------------------------------------


@dataclass
class PromptReport:
    """How many rows a source had, and why some are not prompts; it is counted up as prompts are read."""

    rows: int = 0
    too_long: int = 0
    short_reference: int = 0
    duplicates: int = 0

    @property
    def dropped(self) -> dict[str, int]:
        return {
            "longer than max-prompt-tokens": self.too_long,
            "with a reference below min-reference-words": self.short_reference,
            "duplicates": self.duplicates,
        }

    @property
    def kept(self) -> int:
        return self.rows - sum(self.dropped.values())

    def __str__(self) -> str:
        said = ", ".join(f"{count} {why}" for why, count in self.dropped.items() if count)
        return f"{self.kept} of {self.rows} rows" + (f" (dropped: {said})" if said else "")


def read_prompts(
    source: str | Location,
    options: PromptOptions,
    tokenizer: PreTrainedTokenizerFast,
    report: PromptReport,
    *,
    need_reference: bool = False,
) -> Iterator[Prompt]:
    """The prompts of a source, filtered, rendered and tokenised, in the order of the source.

    An id is the row's own, or a hash of what it says, the same wherever the row stands. A row that repeats an earlier
    one is dropped and counted; an id that stands on two different rows is an error.

    Args:
        report: counted up with every row; complete when the last prompt is out.

    Raises:
        DataError: a row is malformed, or (at the end) there was no prompt.
        UnavailableError: a named dataset cannot be loaded.
    """
    rows = islice(read_rows(source), options.limit)
    for _, prompt in prompts_of(rows, options, tokenizer, report, need_reference=need_reference):
        yield prompt
    if not report.kept:
        raise DataError(f"{source}: no prompt is left: {report}")


def prompts_of(
    rows: Iterable[Row],
    options: PromptOptions,
    tokenizer: PreTrainedTokenizerFast,
    report: PromptReport,
    *,
    need_reference: bool = False,
    beside: tuple[str, ...] = (),
) -> Iterator[tuple[Row, Prompt]]:
    """The prompts of some rows as `read_prompts` gives them, each with its row.

    Args:
        beside: further columns of what a row says: two rows with one prompt are others where these differ.
    """
    template = template_name(options.template, tokenizer)
    contents, ids = Seen(), Seen()
    for row in rows:
        report.rows += 1
        content, references = _content(row), _references(row)
        if need_reference and not references:
            why = "empty" if "reference" in row.columns else "missing"
            raise DataError(f"{row.place}: column 'reference' is {why}")
        said = [content.kind, content.messages, content.instruction, content.input]
        content_id = fingerprint([*said, *(row.columns[column] for column in beside)])[:16]
        if contents.add([content_id], [row.place]):
            report.duplicates += 1
            continue
        id_ = str(row.columns["id"]) if row.columns.get("id") is not None else content_id
        if twice := ids.add([id_], [row.place]):
            raise DataError(f"{row.place}: column 'id': '{id_}' stands on {twice[1]} too, with another prompt")
        if options.min_reference_words and (not references or len(references[0].split()) < options.min_reference_words):
            report.short_reference += 1
            continue
        text, token_ids = _render(row, content, template, tokenizer)
        if len(token_ids) > options.max_prompt_tokens:
            report.too_long += 1
            continue
        yield row, Prompt(id_, content.messages, text, token_ids, references)


def read_texts(source: str | Location, column: str = "text") -> Iterator[str]:
    """The texts of a corpus: the same kinds of source, one column."""
    for row in read_rows(source):
        text = _text(row, column)
        if text is None:
            raise DataError(f"{row.place}: column '{column}' is missing")
        yield text
