"""Text that leaves for a terminal or a log: no character of it moves the cursor, hides or reorders what is read."""

from __future__ import annotations

import re

from dpkd_offline.common.secrets import redacted

# Control characters but for line ends and tabs, marks that turn the direction of text, halves of characters.
HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """Text with such characters as escapes, which JSON reads as the same: `\\u001b`."""
    return HARMFUL.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x10000:
        return f"\\u{code:04x}"
    high, low = divmod(code - 0x10000, 0x400)
    return f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"


def in_a_line(value: object) -> str:
    """Text of others within a message of ours: in one line, too, so that it cannot pass for a line of ours."""
    return visible(" ".join(str(value).split()))


def outgoing(text: str) -> str:
    """What is printed: without secrets, and visible."""
    return visible(redacted(text))
