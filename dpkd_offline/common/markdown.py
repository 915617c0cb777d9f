"""Tables in Markdown, for cards, the console and files."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows of cells below their titles; what a cell says is shown as it is, and breaks no table.

    Args:
        titles: of the columns.
        rows: as many cells each; numbers are shown as `str` shows them, so format them before.
    """
    shown = [[_cell(cell) for cell in row] for row in rows]
    return tabulate(shown, [_cell(title) for title in titles], tablefmt="github", disable_numparse=True)


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
