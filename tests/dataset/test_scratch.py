from __future__ import annotations

from pathlib import Path

from dpkd_offline.dataset.schema import Prompt, to_table
from dpkd_offline.dataset.scratch import KeyIndex, Spool


def test_the_first_key_that_was_there_before_is_named_with_its_place() -> None:
    seen = KeyIndex()
    assert seen.add(["a", "b", "c"], [0, 1, 2]) is None
    assert seen.add(["d", "b", "a"], [3, 4, 5]) == (1, 1)
    assert seen.add(["e", "f", "e"], [6, 7, 8]) == (2, 6)
    assert seen.add(["é\0", "日本", ""], ["x:1", "x:2", "x:3"]) is None
    assert seen.add([""], ["x:4"]) == (0, "x:3")


def test_two_of_them_know_nothing_of_each_other() -> None:
    one, other = KeyIndex(), KeyIndex()
    assert one.add(["a"], [0]) is None
    assert other.add(["a"], [0]) is None


def prompts(count: int) -> list[Prompt]:
    return [
        Prompt(f"p{n}", [{"role": "user", "content": "é" * n}], "x" * n, [n] * (n + 1), ["ref"] * (n % 3))
        for n in range(count)
    ]


def test_what_goes_in_comes_out_in_order_and_no_file_has_a_name(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "not" / "yet"):
        with Spool(root, Prompt) as spool:
            assert len(spool) == 0
            assert list(spool) == []
            for start in (0, 10, 17):
                spool.add(to_table(prompts(20)[start : start + 10][: 7 if start == 10 else 10], Prompt.schema))
            assert (len(spool), list(spool)) == (20, prompts(20))
            assert list(tmp_path.iterdir()) == []
    assert list(tmp_path.iterdir()) == []
