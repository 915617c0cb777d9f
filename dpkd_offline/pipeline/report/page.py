"""A page as one file of HTML: no script, nothing from elsewhere, every text of others escaped."""

from __future__ import annotations

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from dpkd_offline.common.terminal import outgoing
from dpkd_offline.pipeline.report.blocks import Page, Table

CODE = re.compile(r"`([^`]*)`")
NUMBER = re.compile(r"[+−-]?[\d.]|–$")  # or that there is none
WITH_INTERVAL = re.compile(r"(\S.*\S|\S) (\[[^\]]*\])")


def html_page(page: Page) -> str:
    """The page as HTML 5."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "prose": prose,
        "shown": shown,
        "cell": _cell,
        "title": _title,
        "numeric": _numeric,
        "anchor": anchor,
    }
    return environment.get_template("template.html.j2").render(page=page) + "\n"


def shown(text: str) -> Markup:
    """Text as it is, without secrets, and with characters that would move or hide others as escapes."""
    return escape(outgoing(text))


def prose(text: str) -> Markup:
    """As `shown`, with what stands in backticks as code."""
    parts = CODE.split(outgoing(text))
    marked = (Markup("<code>{}</code>").format(part) if n % 2 else escape(part) for n, part in enumerate(parts))
    return Markup("").join(marked)


def anchor(title: str) -> str:
    """What the address of a section ends with."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"


def _numeric(table: Table) -> list[bool]:
    """Of each column whether it holds numbers, which are aligned at the right."""
    columns = [[row[n] for row in table.rows if row[n]] for n in range(len(table.titles))]
    return [n > 0 and bool(cells) and all(map(NUMBER.match, cells)) for n, cells in enumerate(columns)]


def _title(text: str) -> Markup:
    """The title of a column, whose arrow stays with its last word."""
    return prose(text.replace(" ↑", "\u00a0↑").replace(" ↓", "\u00a0↓"))


def _cell(text: str) -> Markup:
    """A cell, with an interval below its number."""
    if (found := WITH_INTERVAL.fullmatch(text)) and NUMBER.match(text):
        return Markup('{} <span class="interval">{}</span>').format(prose(found[1]), prose(found[2]))
    return prose(text)
