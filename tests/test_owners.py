"""Killed at any change to a file, a command goes on to the same bytes; of two on one output, one wins."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.owners import Command, after_kill, together, undisturbed
from helpers.tiny import TINY

COMMANDS = ("init-student", "evaluate", "export")


@pytest.fixture
def commands(
    teachers: dict[str, Path], students: dict[str, Path], datasets_by_family: dict[str, Path], source: Path
) -> dict[str, Command]:
    evaluate = ["--model", students["llama"], "--prompts", source, *TINY, "--limit", 4, "--max-new-tokens", 4]
    return {
        "init-student": lambda o: ["init-student", "--teacher", teachers["llama"], "--layers", 2, "--output", o],
        "evaluate": lambda o: ["evaluate", *evaluate, "--teacher", teachers["llama"], "--seeds", "1", "--output", o],
        "export": lambda o: ["export", datasets_by_family["llama"], o, "--format", "trl"],
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_goes_on_to_the_same_bytes(name: str, commands: dict[str, Command], tmp_path: Path) -> None:
    """Some of the changes: `tests/benchmarks/owners.py` takes all of them."""
    calm, changes = undisturbed(commands[name], tmp_path)
    assert changes > 10
    for at in (changes // 2, changes - 3):
        assert after_kill(commands[name], at, tmp_path) == (-9, 0, calm), at


@pytest.mark.parametrize("name", COMMANDS)
def test_of_two_at_once_one_wins_and_the_other_says_so(name: str, commands: dict[str, Command], tmp_path: Path) -> None:
    calm, changes = undisturbed(commands[name], tmp_path)
    codes, left, lines = together([commands[name]] * 2, 0, tmp_path, changes // 2)
    assert left == calm
    assert sorted(codes) == [0, 75], lines
    assert any("writes it now; repeat this command when it has ended" in line for line in lines)
