"""Tables in Markdown, for cards, the console and files, and text of others in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from dpkd_offline.common.secrets import redacted


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


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
