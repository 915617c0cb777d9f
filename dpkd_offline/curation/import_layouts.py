"""What a row says that is imported: a prompt with two responses, or with one, in the layouts that people have.

A new layout of pairs is a case of `_as_pair`. Where a prompt may stand is what prompt files know: `prompts/columns.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dpkd_offline.common.errors import DataError
from dpkd_offline.config.base import Template
from dpkd_offline.dataset.schema import SIDES, Side
from dpkd_offline.prompts.columns import LAYOUTS, REFERENCES, with_turns_listed
from dpkd_offline.prompts.conversations import Turn, conversation
from dpkd_offline.prompts.sources import Row

CHOSEN: tuple[Side, ...] = SIDES[:1]
CONVERSATIONS = ("messages", "prompt", "conversations", "conversation")  # columns that may hold one
ALIASES: dict[str, Side] = {
    "chosen_response": "chosen",
    "rejected_response": "rejected",
    "rejected_messages": "rejected",
}
# Columns with the one response of a row. What is called a reference may stand beside another's, and so comes last.
RESPONSES = ("chosen", "response", "completion", "output", "answer", "Output", "targets", "reference", "references")
LIKED = ("label", "kto_tag")  # columns that say whether the one response is a good one

Turns = list[Any]  # messages as a source has them


@dataclass
class Arrangement:
    """Rows as those of a prompt file, with their responses as text in `chosen` and `rejected`.

    Whether the rows are pairs or have one response each is said by the first of them.
    """

    asked: Template  # the option; what is not 'auto' is also for prompts that are text
    template: str  # what it stands for; a conversation of one message needs none of a chat
    sides: tuple[Side, ...] = ()  # that the rows have: both, or `chosen` alone; known from the first row on
    columns: dict[Side, dict[str, None]] = field(default_factory=lambda: {side: {} for side in SIDES})  # they are from
    prompts: dict[str, str] = field(default_factory=dict)  # by the column where a prompt is put, the one it is from

    def __call__(self, row: Row) -> Row:
        """One more row.

        Raises:
            DataError: a column is missing, is of another type, or holds more than a prompt and one answer; or the row
                is a pair, and those before it are not.
        """
        row, columns = _as_pair(row)
        sides = SIDES if row.columns.get("rejected") is not None else CHOSEN
        if self.sides == CHOSEN != sides:
            raise DataError(
                f"{row.place}: column '{columns['rejected']}': this row is a pair, and those before it have one "
                f"response each; import them into two datasets"
            )
        if SIDES in (self.sides, sides):
            arranged = self._pair(row)
        else:
            arranged, columns["chosen"] = self._single(row)
        self.sides = self.sides or sides
        for side in self.sides:
            self.columns[side][columns[side]] = None
        return arranged

    def _pair(self, row: Row) -> Row:
        for side in reversed(SIDES):
            if not isinstance(row.columns.get(side), str | list):
                raise DataError(f"{row.place}: column '{side}' must be a string or a list of messages")
        columns, prompt = dict(row.columns), row.columns.get("prompt")
        if all(isinstance(columns[side], str) for side in SIDES):
            if isinstance(prompt, list):
                return self._with_messages(row, columns, prompt, "prompt", "column 'prompt' must be")
            return replace(row, columns=self._with_text(columns))
        turns = {side: conversation(row, side) for side in SIDES}
        begun = 0 if isinstance(prompt, list) else _same(*turns.values())
        for side in SIDES:
            columns[side] = _one_answer(row, side, begun)
        if isinstance(prompt, list):
            return self._with_messages(row, columns, prompt, "prompt", "column 'prompt' must be")
        column, before = ("chosen", row.columns["chosen"][:begun]) if begun else _conversation_of(row)
        return self._with_messages(row, columns, before, column, "columns 'chosen' and 'rejected' must share")

    def _single(self, row: Row) -> tuple[Row, str]:
        """A row with one response, and the column that it is from."""
        if disliked := [name for name in LIKED if row.columns.get(name) is False]:
            raise DataError(
                f"{row.place}: column '{disliked[0]}' is false, so that this is no response to learn from; leave such "
                f"rows out with --on-bad-row skip"
            )
        column, response, place, messages = _response_of(row)
        columns, others = {**row.columns, "chosen": response, "rejected": None}, set(REFERENCES) - {column}
        has_reference = any(map(_says, map(row.columns.get, others)))
        if column in REFERENCES and has_reference:
            columns[column] = None
        if not messages:
            return replace(row, columns=self._with_text(columns)), column
        if column not in REFERENCES and not has_reference:
            columns["reference"], self.prompts["reference"] = response, column
        return self._with_messages(row, columns, messages, place, f"column '{column}' must answer"), column

    def _with_text(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """The columns of a row whose prompt is no conversation, or one that prompt files may have."""
        prompt = columns.get("prompt")
        changed: dict[str, Any] = {}
        if prompt is not None and self.template != "chat":
            changed["messages"] = None  # the same, where a program writes both
        if prompt is not None and self.asked not in ("auto", "none"):
            changed |= {"instruction": prompt, "prompt": None}
            self.prompts["instruction"] = "prompt"
        return {**columns, **changed}

    def _with_messages(self, row: Row, columns: Mapping[str, Any], messages: Turns, column: str, must: str) -> Row:
        """A row whose prompt is these messages of a column, whatever else it says.

        Args:
            must: begins what may be wrong with them.
        """
        turns = conversation(replace(row, columns={"messages": messages}), "messages") if messages else []
        if not turns or turns[-1]["role"] not in ("user", "tool") or not turns[-1]["content"].strip():
            raise DataError(f"{row.place}: {must} messages that end with what a user says")
        alone = self.template != "chat" and len(turns) == 1
        question = {"instruction": turns[0]["content"], "input": None} if alone else {"messages": messages}
        self.prompts["instruction" if alone else "messages"] = column
        return replace(row, columns={**columns, **dict.fromkeys(CONVERSATIONS), **question})


def _as_pair(row: Row) -> tuple[Row, dict[Side, str]]:
    """A row whose two responses stand in `chosen` and `rejected`, if it has two, and the columns that they are from."""
    columns = dict(row.columns)
    origin: dict[Side, str] = {side: side for side in SIDES}
    for name, side in ALIASES.items():
        if columns.get(side) is None and columns.get(name) is not None:
            columns[side], origin[side] = columns.pop(name), name
    ranked, rejected = columns.get("output"), columns.get("rejected")
    if rejected is None and isinstance(ranked, list) and len(ranked) == 2 and columns.get("chosen") is None:
        columns["chosen"], columns["rejected"] = ranked  # LLaMA-Factory's, the better one first
        del columns["output"]
        origin = dict.fromkeys(SIDES, "output")
    elif rejected is not None and columns.get("chosen") is None and isinstance(columns.get("messages"), list):
        answered = columns["messages"]  # ms-swift's, which end with the better one
        columns["chosen"], origin["chosen"] = answered, "messages"
        if isinstance(rejected, str):
            columns["rejected"] = [*answered[:-1], {"role": "assistant", "content": rejected}]
        elif isinstance(rejected, list) and len(rejected) == 1:
            columns["rejected"] = [*answered[:-1], *rejected]
    return with_turns_listed(replace(row, columns=columns), SIDES), origin


def _response_of(row: Row) -> tuple[str, str, str, Turns]:
    """The one response of a row: its column and its text; and what it answers: a column and messages, if any."""
    place, before = _conversation_of(row)
    if before and not _says(row.columns.get("chosen")) and conversation(row, place)[-1]["role"] == "assistant":
        return place, _one_answer(row, place, len(before) - 1), place, before[:-1]
    for column in RESPONSES:
        if not _says(value := row.columns.get(column)):
            continue
        row = with_turns_listed(row, [column])
        if isinstance(value, list) and all(isinstance(text, str) for text in value):
            if len(value) > 1:
                raise DataError(f"{row.place}: column '{column}' holds {len(value)} responses; write one a row")
            return column, value[0], place, before
        if isinstance(value, str):
            return column, value, place, before
        begun = len(conversation(row, column)) - 1
        answered = (place, before) if before else (column, row.columns[column][:begun])
        return column, _one_answer(row, column, begun), *answered
    names = ", ".join(f"'{name}'" for name in list(row.columns)[:10]) or "no column"
    raise DataError(
        f"{row.place}: no response: neither a column such as 'response' nor the assistant's last turn holds one; the "
        f"row has {names}; say which is what, as in --columns chosen=NAME"
    )


def _conversation_of(row: Row) -> tuple[str, Turns]:
    """The column that has the prompt, if it may hold messages, and the messages that it holds."""
    column = next((name for name in LAYOUTS if row.columns.get(name) not in (None, "", [])), "messages")
    value = row.columns.get(column) if column in CONVERSATIONS else None
    return column, value if isinstance(value, list) else []


def _one_answer(row: Row, column: str, begun: int) -> str:
    """The text of the one message of the assistant that a column holds behind the `begun` first ones."""
    turns = conversation(row, column)[begun:]
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise DataError(f"{row.place}: column '{column}' must hold one message of the assistant after the prompt")
    if "tool_calls" in turns[0]:
        raise DataError(f"{row.place}: column '{column}' calls a tool, and a response is text: write it as such")
    answer: str = turns[0]["content"]
    return answer


def _same(chosen: list[Turn], rejected: list[Turn]) -> int:
    """How many messages two conversations begin with alike, but for the last of either."""
    most = min(len(chosen), len(rejected)) - 1
    return next((n for n in range(most) if chosen[n] != rejected[n]), most)


def _says(value: object) -> bool:
    return (
        any(map(_says, value)) if isinstance(value, list) else bool(value.strip() if isinstance(value, str) else value)
    )
