"""The same prompts and responses in the tokens of another model, where teacher and student do not share a tokenizer.

DPKD needs log p(y|x) and log q(y|x) of whole responses, not of tokens: each model may see the same conversation in its
own template and the same answer in its own tokens. A response that ended ends in both with the token that ends a turn
there, and so counts in |y| of both.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
from transformers import PreTrainedTokenizerFast

from dpkd_offline.common.locations import Location
from dpkd_offline.config.base import Template
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import Prompt, to_table
from dpkd_offline.dataset.table import ShardPlan, Table
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.prompts.templates import render, template_name

MARK = "dpkd"  # an answer that no template changes


class PromptSource(Protocol):
    """Prompts by shards: a table of them, or such as are rendered when they are read."""

    @property
    def name(self) -> str: ...

    @property
    def plan(self) -> ShardPlan: ...

    def path(self, shard: int) -> Location: ...

    def read(self, shard: int) -> list[Prompt]: ...

    def read_arrow(self, shard: int, columns: list[str] | None = None) -> pa.Table: ...


@dataclass(frozen=True)
class RenderedPrompts:
    """The prompts of a dataset as a student with another tokenizer sees them, rendered when they are read."""

    dataset: Dataset
    template: str
    tokenizer: PreTrainedTokenizerFast

    @property
    def name(self) -> str:
        return self.dataset.prompts.name

    @property
    def plan(self) -> ShardPlan:
        return self.dataset.plan

    def path(self, shard: int) -> Location:
        """Of the prompts that they are rendered from."""
        return self.dataset.prompts.path(shard)

    def read(self, shard: int) -> list[Prompt]:
        """The prompts of one shard.

        Raises:
            DataError, MismatchError: as when the dataset's own are read.
            DataError: messages of several turns, for a model without a chat template.
        """
        original = self.dataset.prompt_set.template
        return [render(p, original, self.template, self.tokenizer) for p in self.dataset.prompts.read(shard)]

    def read_arrow(self, shard: int, columns: list[str] | None = None) -> pa.Table:
        """The same as a table, of all columns or some."""
        rendered = to_table(self.read(shard), Prompt.schema)
        return rendered if columns is None else rendered.select(columns)


def template_for(dataset: Dataset, asked: Template, tokenizer: PreTrainedTokenizerFast) -> str:
    """The template of a student with another tokenizer: the one asked for, or the dataset's if that is no chat's."""
    original = dataset.prompt_set.template
    return original if asked == "auto" and original == "none" else template_name(asked, tokenizer)


def prompts_for(dataset: Dataset, student: ModelInfo) -> PromptSource:
    """The prompts of a dataset in the tokens of a student.

    They are the dataset's own, those stored for this student, or rendered when they are read.
    """
    if dataset.shares_tokenizer(student.tokenizer_fingerprint):
        return dataset.prompts
    stored: Table[Prompt] = dataset.student_prompts
    provenance = stored.provenance()
    own = provenance is not None and provenance["tokenizer_fingerprint"] == student.tokenizer_fingerprint
    if own and not stored.pending():
        return stored
    return RenderedPrompts(dataset, template_for(dataset, "auto", student.tokenizer), student.tokenizer)


class ResponseTokenizer:
    """One model's tokens of responses."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str, eos: Collection[int]) -> None:
        """`eos` are the tokens that end the model's responses, `template` the one of its prompts."""
        self._tokenizer, self._eos = tokenizer, eos
        self.end = _end_of_turn(tokenizer, template, eos)

    def encode(self, texts: Sequence[str], finish_reasons: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """The tokens of each response, and whether they decode to its text.

        A response that stopped ends with the token that ends a turn. So does one without any token, since
        log p(y|x) of nothing says nothing; it counts as not exact.
        """
        ids, exact = self._ids(texts), []
        for tokens, text, finish_reason in zip(ids, texts, finish_reasons, strict=True):
            decoded = self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
            exact.append(decoded == text and (bool(tokens) or finish_reason == "stop"))
            if finish_reason == "stop" or not tokens:
                tokens.append(self.end)
        return ids, exact

    def encodes_to(self, texts: Sequence[str], sampled: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each text has the tokens that were sampled, but for the EOS at their end."""
        return [
            ids == list(tokens[:-1] if tokens[-1] in self._eos else tokens)
            for ids, tokens in zip(self._ids(texts), sampled, strict=True)
        ]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return ids


def _end_of_turn(tokenizer: PreTrainedTokenizerFast, template: str, eos: Collection[int]) -> int:
    """The token that a model was taught to end an answer with: what its chat template writes there, if it is an EOS.

    Gemma's, for one, is not what its tokenizer calls EOS.
    """
    if template == "chat":
        turns: list[dict[str, Any]] = [{"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}]
        _, _, after = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(MARK)
        ids: list[int] = tokenizer(after, add_special_tokens=False)["input_ids"]
        if ids and ids[0] in eos:
            return ids[0]
    return tokenizer.eos_token_id if tokenizer.eos_token_id in eos else min(eos)
