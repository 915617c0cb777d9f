"""A page as Markdown, for a terminal, a pull request or a wiki. Figures are in the HTML; here stand their alt texts."""

from __future__ import annotations

from collections.abc import Iterator

from dpkd_offline.common.markdown import code_block, markdown_table, plain_text
from dpkd_offline.pipeline.report.blocks import Block, Example, Figures, Fold, Heading, Items, Links, Page, Table, Text


def markdown_page(page: Page) -> str:
    """The page as Markdown, in which every text of others is text."""
    parts = [f"# {plain_text(page.title)}", plain_text(page.kind), *map(plain_text, page.lead)]
    for section in page.sections:
        parts.append(f"## {plain_text(section.title)}")
        for block in section.blocks:
            parts += _block(block)
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> Iterator[str]:
    match block:
        case Text(text):
            yield plain_text(text)
        case Heading(text):
            yield f"### {plain_text(text)}"
        case Items(items):
            yield "\n".join(f"- {plain_text(item)}" for item in items)
        case Table(caption, titles, rows):
            if caption:
                yield plain_text(caption)
            yield markdown_table([*map(plain_text, titles)], [[*map(plain_text, row)] for row in rows])
        case Figures(figures):
            yield "\n".join(f"- {plain_text(figure.alt)}" for figure in figures)
        case Example(summary, detail, question, answers):
            yield f"#### {plain_text(summary)}"
            yield plain_text(detail)
            for quote in (*question, *answers):
                yield f"{plain_text(quote.title)}:"
                yield code_block(quote.text)
        case Links(links):
            yield "\n".join(f"- [{plain_text(link.text)}]({link.place})" for link in links)
        case Fold(summary, blocks):
            yield f"#### {plain_text(summary)}"
            for inner in blocks:
                yield from _block(inner)
