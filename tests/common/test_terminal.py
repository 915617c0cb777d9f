from __future__ import annotations

import json

from dpkd_offline.common import console
from dpkd_offline.common.markdown import inline_code
from dpkd_offline.common.terminal import in_a_line, visible

NASTY = "a\x1b[31mb\x07\x9b\u202ec\x7f\udcff\u2028\U000e0041 日本 é 👩‍💻"
SEEN = "a\\u001b[31mb\\u0007\\u009b\\u202ec\\u007f\\udcff\\u2028\\udb40\\udc41 日本 é 👩‍💻"


def test_no_character_moves_the_cursor_or_turns_the_text(capsys) -> None:  # type: ignore[no-untyped-def]
    assert visible(NASTY) == SEEN
    assert visible("two lines\n\tof ours") == "two lines\n\tof ours"
    assert in_a_line("a\nwarning: b\r\x1b") == "a warning: b \\u001b"
    console.info(NASTY)
    console.result(NASTY)
    assert capsys.readouterr() == (SEEN + "\n", SEEN + "\n")


def test_json_stays_json() -> None:
    value = {"name": NASTY.replace("\udcff", "")}
    assert json.loads(visible(json.dumps(value))) == json.loads(visible(json.dumps(value, ensure_ascii=False))) == value


def test_text_of_others_is_code_in_markdown() -> None:
    assert inline_code("a|b`c`\n```\n<img src=x>\x1b\u202e[x](y)") == "`a¦b'c' ''' <img src=x> [x](y)`"
    assert inline_code("") == "`?`"
