from __future__ import annotations

import re

import pytest
from markdown_it import MarkdownIt

from dpkd_offline.common.markdown import code_block, markdown_table, plain_text

TEXTS = [
    "a_b_c *d* **e** ~~f~~ <b>g</b> [h](http://i) ![j](k) \\* &lt; $l$",
    "# m",
    "1. n",
    "- o",
    "> p",
    "+ q",
    "---",
    "=== r",
    "[s]: http://t",
    "-1.5 [-2, +3]",
    "u | v \\| w",
    "x ` y",
    "_z_ __a__",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_of_others_is_what_it_was_when_markdown_is_read(text: str) -> None:
    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    for source, tags in (
        (plain_text(text), {"p"}),
        (f"- {plain_text(text)}", {"ul", "li", "p"}),
        (markdown_table(["t"], [[plain_text(text)]]), {"table", "thead", "tbody", "tr", "th", "td"}),
    ):
        html = reader.render(source)
        assert set(re.findall(r"<([a-z0-9]+)", html)) <= tags, html
        words = re.sub(r"<[^>]*>", "", html).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&").split()
        assert [word for word in words if word != "t"] == text.replace("&quot;", '"').split()


def test_backticks_make_code_and_a_fence_holds_any_text() -> None:
    assert plain_text("see `--a_b <c>` or *d*") == "see `--a_b <c>` or \\*d\\*"
    block = code_block("a\n```\n# b\n````\x1b")
    assert block == "`````text\na\n```\n# b\n````\\u001b\n`````"
