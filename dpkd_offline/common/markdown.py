"""Tables in Markdown, for cards, the console and files, and text of others in Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tabulate import tabulate

from dpkd_offline.common.secrets import redacted
from dpkd_offline.common.terminal import in_a_line, outgoing

CODE = re.compile(r"`([^`]*)`")
MARKS = re.compile(r"[\\`*<~$]|(?<![^\W_])_|_(?![^\W_])|\](?=\()|&(?=#?\w+;)")  # what has a meaning in a line
STARTS = re.compile(r"^(\d+)([.)])(?=\s|$)|^([-+](?=[-\s]|$)|[#>\[=])")  # or where it begins


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows of cells below their titles; what a cell says is shown as it is, and breaks no table.

    Args:
        titles: of the columns.
        rows: as many cells each; numbers are shown as `str` shows them, so format them before.
    """
    shown = [[_cell(cell) for cell in row] for row in rows]
    return tabulate(shown, [_cell(title) for title in titles], tablefmt="github", disable_numparse=True)


def inline_code(value: object) -> str:
    """Text of others as inline code, in a line or a table: nothing in it is Markdown or HTML, and it ends nothing.

    What would is shown as something that looks like it.
    """
    shown = "".join(letter if letter.isprintable() else " " for letter in redacted(str(value)))
    return f"`{' '.join(shown.translate(str.maketrans('`|', chr(39) + chr(166))).split()) or '?'}`"


def plain_text(value: str) -> str:
    """Text of others as a line of text: nothing in it is Markdown or HTML, but that `backticks` make code of a part."""
    parts = CODE.split(redacted(in_a_line(value)))
    shown = (inline_code(part) if n % 2 else MARKS.sub(r"\\\g<0>", part) for n, part in enumerate(parts))
    return STARTS.sub(lambda found: f"{found[1]}\\{found[2]}" if found[1] else f"\\{found[3]}", "".join(shown))


def code_block(text: str) -> str:
    """Text of others as it is, with all its lines, in a fence that none of them ends."""
    shown = outgoing(text)
    longest = max((len(run) for run in re.findall(r"`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{shown}\n{fence}"


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
