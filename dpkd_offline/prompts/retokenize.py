"""The same prompts and responses in the tokens of another model, where teacher and student do not share a tokenizer.

DPKD needs log p(y|x) and log q(y|x) of whole responses, not of tokens: each model may see the same conversation in its
own template and the same answer in its own tokens. A response that ended ends in both with the token that ends a turn
there, and so counts in |y| of both.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pyarrow as pa
from transformers import PreTrainedTokenizerFast

from dpkd_offline.config.base import Template
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.layout import PROMPTS
from dpkd_offline.dataset.schema import Prompt, from_table, to_table
from dpkd_offline.dataset.table import Table
from dpkd_offline.models.info import tokenizer_fingerprint
from dpkd_offline.prompts.templates import render, template_name

MARK = "dpkd"  # an answer that no template changes


class RenderedPrompts(Table[Prompt]):
    """The prompts of a dataset as a student with another tokenizer sees them, made when they are read."""

    def __init__(self, dataset: Dataset, template: str, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(dataset.root, PROMPTS, dataset.plan)
        self._given, self.template, self._tokenizer = dataset.prompt_set.template, template, tokenizer

    def read_arrow(self, shard: int, columns: list[str] | None = None) -> pa.Table:
        prompts = from_table(super().read_arrow(shard), Prompt)
        rows = [render(prompt, self._given, self.template, self._tokenizer) for prompt in prompts]
        rendered = to_table(rows, Prompt.schema)
        return rendered if columns is None else rendered.select(columns)


def template_for(dataset: Dataset, asked: Template, tokenizer: PreTrainedTokenizerFast) -> str:
    """The template of a student with another tokenizer: the one asked for, or the dataset's if that is no chat's."""
    given = dataset.prompt_set.template
    return given if asked == "auto" and given == "none" else template_name(asked, tokenizer)


def prompts_for(dataset: Dataset, tokenizer: PreTrainedTokenizerFast) -> Table[Prompt]:
    """The prompts of a dataset in the tokens of a student: its own, those stored for it, or made when they are read."""
    fingerprint = tokenizer_fingerprint(tokenizer)
    if dataset.shares_tokenizer(fingerprint):
        return dataset.prompts
    stored = dataset.student_prompts
    made = stored.provenance()
    if made is not None and made["tokenizer_fingerprint"] == fingerprint and not stored.pending():
        return stored
    return RenderedPrompts(dataset, template_for(dataset, "auto", tokenizer), tokenizer)


class ResponseTokenizer:
    """One model's tokens of responses."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str, eos: Collection[int]) -> None:
        self._tokenizer, self._eos = tokenizer, eos
        self.end = _end_of_turn(tokenizer, template, eos)

    def spell(self, texts: Sequence[str], finish_reasons: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """The tokens of each response, and whether they give its text again.

        A response that stopped ends with the token that ends a turn. So does one without any token, since
        log p(y|x) of nothing says nothing; it counts as not exact.
        """
        ids, exact = self._ids(texts), []
        for tokens, text, finish_reason in zip(ids, texts, finish_reasons, strict=True):
            again = self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
            exact.append(again == text and (bool(tokens) or finish_reason == "stop"))
            if finish_reason == "stop" or not tokens:
                tokens.append(self.end)
        return ids, exact

    def repeats(self, texts: Sequence[str], sampled: Sequence[Sequence[int]]) -> list[bool]:
        """Whether the tokens that were sampled are those that their text has."""
        return [
            ids == (list(there[:-1]) if there[-1] in self._eos else list(there))
            for ids, there in zip(self._ids(texts), sampled, strict=True)
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
