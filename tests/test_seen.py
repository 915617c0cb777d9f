from __future__ import annotations

from dpkd_offline.seen import Seen


def test_the_first_key_that_was_there_before_is_named_with_its_place() -> None:
    seen = Seen()
    assert seen.add(["a", "b", "c"], [0, 1, 2]) is None
    assert seen.add(["d", "b", "a"], [3, 4, 5]) == (1, 1)
    assert seen.add(["e", "f", "e"], [6, 7, 8]) == (2, 6)
    assert seen.add(["é\0", "日本", ""], ["x:1", "x:2", "x:3"]) is None
    assert seen.add([""], ["x:4"]) == (0, "x:3")


def test_two_of_them_know_nothing_of_each_other() -> None:
    one, other = Seen(), Seen()
    assert one.add(["a"], [0]) is None
    assert other.add(["a"], [0]) is None
