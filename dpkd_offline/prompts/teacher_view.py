"""The prompts of a source as a teacher sees them that is told more than its students: context distillation.

A row may have a conversation of the teacher's own, in the column `teacher_messages`; else the teacher sees what the
student sees. In front of either comes the text of `--teacher-system`, as the system turn, or as the beginning of the
one that is there, so that the teacher is told all that the student is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa

from dpkd_offline.common.errors import DataError
from dpkd_offline.dataset.dataset import PromptSet
from dpkd_offline.dataset.schema import Prompt, full_schema, own_columns, to_table
from dpkd_offline.dataset.scratch import Spool
from dpkd_offline.prompts.columns import TEACHER_MESSAGES, Content, teacher_content
from dpkd_offline.prompts.conversations import Turn
from dpkd_offline.prompts.sources import Row
from dpkd_offline.prompts.templates import column_of

Render = Callable[[Content, str], tuple[str, list[int]]]  # content and its column: text and token ids


def with_teacher_system(messages: Sequence[Turn], system: str) -> list[Turn]:
    """A conversation that begins with a system turn, which begins with this text."""
    if messages and messages[0]["role"] == "system":
        first, *rest = messages
        return [{**first, "content": f"{system}\n\n{first['content']}"}, *rest]
    return [{"role": "system", "content": system}, *messages]


class TeacherView:
    """The prompts that the teacher sees otherwise than the student, collected while a source is read.

    Only these are kept, in a file without a name; all others are the same for both.
    """

    def __init__(self, root: Path, system: str | None = None, *, lengths_only: bool = False) -> None:
        """`root` is the folder of the dataset. With `lengths_only` nothing is kept but the length of the longest."""
        self.system, self._lengths_only = system, lengths_only
        self.longest = 0  # tokens
        self._own = 0  # prompts whose row has a conversation of the teacher's own
        self._conversations = False  # whether roles and text do not say all of any of them
        self._spool = Spool(root, Prompt)
        self._noted: dict[str, Prompt] = {}  # by id, of the prompts that were read last
        self._stored: Iterator[Prompt] | None = None
        self._next: Prompt | None = None  # of those that are stored

    def prompt(self, row: Row, content: Content, prompt: Prompt, render: Render) -> Prompt | None:
        """A row's prompt as the teacher sees it; None where that is what the student sees.

        Raises:
            DataError: the column holds no conversation, raw text would need a system turn, or the template does not
                take what came of it.
        """
        own = teacher_content(row)
        if own is None and self.system is None:
            return None
        asked, column = content, column_of(content)
        if own is not None:
            asked, column = replace(own, tools=content.tools, answer=None), TEACHER_MESSAGES
        if asked.kind == "prompt":
            raise DataError(
                f"{row.place}: column '{column}' is raw text, and takes no system turn of --teacher-system; "
                f"--columns instruction={column} makes a conversation of it"
            )
        messages = asked.messages if self.system is None else with_teacher_system(asked.messages, self.system)
        asked = replace(asked, kind="messages", messages=messages)
        text, ids = render(asked, column)
        self._own += own is not None
        told = replace(prompt, messages=asked.text_messages, conversation=asked.conversation)
        return replace(told, prompt=text, prompt_ids=ids)

    def note(self, prompt: Prompt) -> None:
        """Remember how the teacher sees the prompt that is read next."""
        if not self._lengths_only:
            self._noted[prompt.id] = prompt
        self.longest = max(self.longest, len(prompt.prompt_ids))
        self._conversations |= prompt.conversation is not None

    def rows(self, prompts: Sequence[Prompt], keep: bool) -> pa.Table | None:
        """The prompts that were read last as the teacher sees them; None where all are those of the student.

        Args:
            keep: whether they will be written.
        """
        if not self._noted:
            return None
        noted, self._noted = self._noted, {}
        if keep:
            self._spool.add(to_table(list(noted.values()), full_schema(Prompt)))
        return to_table([noted.get(prompt.id, prompt) for prompt in prompts], full_schema(Prompt))

    def provenance(self, prompt_set: PromptSet) -> dict[str, Any]:
        """What `_table.json` says of the prompts as the teacher sees them."""
        own = prompt_set.as_dict()
        keys = (
            *("template", "template_fingerprint", "template_args", "chat_template"),
            *("tokenizer", "tokenizer_fingerprint", "vocab_size"),
        )
        columns = own_columns(full_schema(Prompt), Prompt) if self._conversations else prompt_set.columns
        return {
            "stage": "render",
            "role": "teacher",
            **({"system": self.system} if self.system is not None else {}),
            **({"own_conversations": self._own} if self._own else {}),
            **{key: own[key] for key in keys if key in own},
            **({"columns": columns} if columns else {}),
            "prompt_set": prompt_set.id,
        }

    def seen(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The next of the prompts that are written, each as the teacher sees it."""
        if self._stored is None:
            self._stored = iter(self._spool)
            self._next = next(self._stored, None)
        rows = []
        for prompt in prompts:
            if self._next is not None and self._next.id == prompt.id:
                prompt, self._next = self._next, next(self._stored, None)
            rows.append(prompt)
        return rows

    def __enter__(self) -> TeacherView:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._spool.__exit__(kind, error, tb)
