from __future__ import annotations

from pathlib import Path

from dpkd_offline.records import Prompt, to_table
from dpkd_offline.spool import Spool


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
