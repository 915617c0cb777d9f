"""What a page is made of: sections of text, tables, figures and examples, which HTML and Markdown both show.

In text, `backticks` mark code. All of it may hold text of others: whoever writes it out shows it as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar


@dataclass(frozen=True)
class Text:
    """A paragraph. `quiet`: how to read what stands beside it."""

    kind: ClassVar[str] = "text"
    text: str
    quiet: bool = False


@dataclass(frozen=True)
class Heading:
    """The title of a part of a section."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Items:
    """A list of sentences. `warn`: a person should look at them."""

    kind: ClassVar[str] = "items"
    items: Sequence[str]
    warn: bool = False


@dataclass(frozen=True)
class Table:
    """Cells below titles; the first column says what a row is of. `strong`: the rows that matter most.

    The caption is empty where what stands above says it.
    """

    kind: ClassVar[str] = "table"
    caption: str
    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: Sequence[int] = ()


@dataclass(frozen=True)
class Figure:
    """SVG, what stands below it, and what a person reads who does not see it."""

    svg: str
    caption: str
    alt: str


@dataclass(frozen=True)
class Figures:
    """Figures side by side, as many in a row as there is room for."""

    kind: ClassVar[str] = "figures"
    figures: Sequence[Figure]


@dataclass(frozen=True)
class Quote:
    """A text of others, as it is: a prompt, a reference, a response."""

    title: str
    text: str


@dataclass(frozen=True)
class Example:
    """A prompt and what was answered, below a line that is shown while they are folded, and a quiet one."""

    kind: ClassVar[str] = "example"
    summary: str
    detail: str
    question: Sequence[Quote]
    answers: Sequence[Quote]
    unfolded: bool = False


@dataclass(frozen=True)
class Fold:
    """Blocks below a line that is shown while they are folded."""

    kind: ClassVar[str] = "fold"
    summary: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Link:
    """A page beside this one."""

    text: str
    place: str  # a path from this page's folder


@dataclass(frozen=True)
class Links:
    """Pages beside this one, as a list."""

    kind: ClassVar[str] = "links"
    links: Sequence[Link]


Block = Text | Heading | Items | Table | Figures | Example | Fold | Links


@dataclass(frozen=True)
class Section:
    """A part of the page, with a title."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A page, with what matters most in a sentence or two below its title.

    Attributes:
        kind: what it is the page of, such as "distillation".
    """

    title: str
    kind: str
    lead: Sequence[str]
    sections: Sequence[Section] = field(default_factory=tuple)
