"""The same prompts and responses as another model sees them: in its template, and in its tokens, where teacher and
student do not share a tokenizer.

DPKD needs log p(y|x) and log q(y|x) of whole responses, not of tokens: each model may see the same conversation in its
own template and the same answer in its own tokens. A response that ended ends in both with the token that ends a turn
there, and so counts in |y| of both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa
from transformers import PreTrainedTokenizerFast

from dpkd_offline.common.locations import Location
from dpkd_offline.config.base import Template
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import Prompt, to_table
from dpkd_offline.dataset.table import ShardPlan, Table
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.prompts.templates import (
    ANSWER,
    NO_ARGUMENTS,
    Trial,
    render,
    template_fingerprint,
    template_name,
    try_template,
    with_template,
)

MARKS = ("\n", ":")  # which few tokenizers join with what follows


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
    """The prompts as a student sees them that has another tokenizer or template, rendered when they are read."""

    dataset: Dataset
    template: str
    model: ModelInfo  # with the chat template that is used
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of the template, if it is a chat's
    system: str | None = None  # in place of the system turn that the dataset has for prompts without one

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
            DataError: messages that the student's template does not take.
            UnavailableError: its chat template fails with any messages.
        """
        of, path = self.dataset.prompt_set, self.path(shard)
        system = None if self.system is None else (of.system, self.system)
        return [
            render(
                prompt, of.template, self.template, self.model.tokenizer, self.arguments, f"{path}: row {k}: ", system
            )
            for k, prompt in enumerate(self.dataset.prompts.read(shard))
        ]

    def read_arrow(self, shard: int, columns: list[str] | None = None) -> pa.Table:
        """The same as a table, of all columns or some."""
        rendered = to_table(self.read(shard), self.dataset.prompts.schema)
        return rendered if columns is None else rendered.select(columns)

    def provenance(self) -> dict[str, Any]:
        """What `_table.json` says of them, where they are stored."""
        model, columns = self.model, self.dataset.prompt_set.columns
        options = {"template_args": dict(self.arguments), "chat_template": model.chat_template, "system": self.system}
        return {
            "stage": "render",
            "template": self.template,
            "template_fingerprint": template_fingerprint(self.template, model.tokenizer, self.arguments),
            **{key: value for key, value in options.items() if value},
            **({"columns": columns} if columns else {}),
            "tokenizer": model.public_name,
            "tokenizer_fingerprint": model.tokenizer_fingerprint,
            "vocab_size": model.id_bound,
            "prompt_set": self.dataset.prompt_set.id,
        }


def template_for(dataset: Dataset, asked: Template, tokenizer: PreTrainedTokenizerFast) -> str:
    """The template of a student's own prompts: the one asked for, or the dataset's if that is no chat's."""
    original = dataset.prompt_set.template
    return original if asked == "auto" and original == "none" else template_name(asked, tokenizer)


def student_view(
    dataset: Dataset,
    student: ModelInfo,
    template: Template = "auto",
    arguments: Mapping[str, Any] | None = None,
    system: str | None = None,
) -> RenderedPrompts | None:
    """The prompts as a student sees them that has another tokenizer, template, arguments of it, or system turn.

    What is not asked for is as in the prompts that are stored for this student, else as in the dataset's. None where
    these are what the student sees.
    """
    own, shared = dataset.prompt_set, dataset.shares_tokenizer(student.tokenizer_fingerprint)
    stored = dataset.student_prompts.provenance() or {}
    like: Mapping[str, Any] = stored or (own.as_dict() if shared else {})
    if template == "auto" and like:
        name, student = like["template"], student.with_chat_template(like.get("chat_template"))
    else:
        student = with_template(student, template)
        name = template_for(dataset, template, student.tokenizer)
    told = stored.get("template_args", {}) if stored else own.template_args
    rendered = RenderedPrompts(
        dataset, name, student, told if arguments is None else arguments, system or stored.get("system")
    )
    if stored or not shared:
        return rendered
    if template == "auto" and arguments in (None, own.template_args) and system in (None, own.system):
        return None
    same = rendered.provenance()["template_fingerprint"] == own.template_fingerprint and system in (None, own.system)
    return None if same else rendered


OWN_TEMPLATE = ("template_fingerprint", "system")


def own_template(prompts: Mapping[str, Any], dataset: Dataset) -> dict[str, str]:
    """What `_table.json` says of responses and pairs whose prompts are the student's own, in tokens of the dataset.

    Of another tokenizer's their own fingerprint says it.

    Args:
        prompts: what it says of the prompts.
    """
    shared = dataset.shares_tokenizer(prompts["tokenizer_fingerprint"])
    return {key: prompts[key] for key in OWN_TEMPLATE if shared and key in prompts}


def prompts_for(dataset: Dataset, student: ModelInfo) -> PromptSource:
    """The prompts of a dataset as a student sees them.

    They are the dataset's own, those stored for this student, or rendered when they are read.
    """
    stored: Table[Prompt] = dataset.student_prompts
    provenance = stored.provenance()
    own = provenance is not None and provenance["tokenizer_fingerprint"] == student.tokenizer_fingerprint
    if own and not stored.pending():
        return stored
    if dataset.shares_tokenizer(student.tokenizer_fingerprint):
        return dataset.prompts
    return student_view(dataset, student) or dataset.prompts


class ResponseTokenizer:
    """One model's tokens of responses, as they follow their prompts."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        template: str,
        eos: Collection[int],
        arguments: Mapping[str, Any] = NO_ARGUMENTS,
    ) -> None:
        """`eos` are the tokens that end the model's responses, `template` and `arguments` those of its prompts."""
        self._tokenizer, self._eos = tokenizer, eos
        has_chat = template == "chat" and tokenizer.chat_template is not None  # or its prompts are of one that has
        trial = try_template(tokenizer, arguments) if has_chat else None
        self.end = _end_of_turn(tokenizer, eos, trial)
        self._space = " " if trial is not None and _leaves_space(tokenizer, trial) else ""

    def encode(
        self, prompts: Sequence[str], texts: Sequence[str], finish_reasons: Sequence[str]
    ) -> tuple[list[list[int]], list[bool]]:
        """The tokens of each response behind its prompt, and whether they give its text there.

        A response that stopped ends with the token that ends a turn. So does one without any token, since
        log p(y|x) of nothing says nothing; it counts as not exact.
        """
        ids, exact = [], []
        behind = self._behind(prompts, texts)
        for (tokens, is_exact), finish_reason in zip(behind, finish_reasons, strict=True):
            exact.append(is_exact and (bool(tokens) or finish_reason == "stop"))
            ids.append([*tokens, self.end] if finish_reason == "stop" or not tokens else tokens)
        return ids, exact

    def encodes_to(self, prompts: Sequence[str], texts: Sequence[str], sampled: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each text has, behind its prompt, the tokens that were sampled, but for the EOS at their end."""
        return [
            ids == list(tokens[:-1] if tokens[-1] in self._eos else tokens)
            for (ids, _), tokens in zip(self._behind(prompts, texts), sampled, strict=True)
        ]

    def continuations(self, prompts: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text behind its prompt."""
        return [ids for ids, _ in self._behind(prompts, texts)]

    def _behind(self, prompts: Sequence[str], texts: Sequence[str]) -> list[tuple[list[int], bool]]:
        """The tokens of each text behind its prompt, and whether they give the text there.

        A text alone has other tokens than behind a prompt where a tokenizer, such as Llama 2's, takes every beginning
        for that of a word and puts a space before it. What the tokenizer makes of prompt and text together tells, if
        the prompt has its own tokens there, too. Where a token would be of both, the text has those that it has alone
        or behind a mark, whichever give the text.
        """
        alone, before = self._ids(texts), self._ids(prompts)
        whole = self._ids([prompt + self._space + text for prompt, text in zip(prompts, texts, strict=True)])
        rows = []
        for prompt_ids, ids, both, text in zip(before, alone, whole, texts, strict=True):
            if (not ids or both == prompt_ids + ids) and self._decode(ids) == text:
                rows.append((ids, True))
                continue
            behind = [both[len(prompt_ids) :]] if both[: len(prompt_ids)] == prompt_ids else []
            candidates = [*behind, ids, *self._behind_marks(text)] if ids else [ids]
            wanted = self._decode(prompt_ids) + self._space + text
            exact = (tokens for tokens in candidates if self._decode(prompt_ids + tokens) == wanted)
            first = next(exact, None)
            rows.append((candidates[0], False) if first is None else (first, True))
        return rows

    def _behind_marks(self, text: str) -> Iterator[list[int]]:
        """The tokens of a text behind a mark that is no part of them, as far as there is such a mark."""
        for mark in MARKS:
            before, both = self._ids([mark, mark + self._space + text])
            if both[: len(before)] == before:
                yield both[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return ids


def _end_of_turn(tokenizer: PreTrainedTokenizerFast, eos: Collection[int], trial: Trial | None) -> int:
    """The token that a model was taught to end an answer with: what its chat template writes there, if it is an EOS.

    Gemma's, for one, is not what its tokenizer calls EOS.
    """
    if trial is not None:
        ids: list[int] = tokenizer(trial.after_answer, add_special_tokens=False)["input_ids"]
        if ids and ids[0] in eos:
            return ids[0]
    return tokenizer.eos_token_id if tokenizer.eos_token_id in eos else min(eos)


def _leaves_space(tokenizer: PreTrainedTokenizerFast, trial: Trial) -> bool:
    """Whether a chat template leaves the space before an answer to the tokenizer, which drops it from its text."""
    if trial.prompt is None or trial.before_answer != trial.after_question + " ":
        return False
    texts = [trial.prompt, ANSWER, f"{trial.prompt} {ANSWER}", trial.prompt + ANSWER]
    prompt, alone, with_space, without = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return bool(with_space == prompt + alone != without)
