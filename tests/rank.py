"""One process of a run, as a launcher starts it: the command line, and a note of the pairs that it was given.

    python tests/rank.py NOTES train --dataset …
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from dpkd_offline import cli, training


def note(folder: Path, seconds: float) -> None:
    """Write the ids of each micro batch of this process, a line per step."""
    score, step = training.score, training.Run.step
    seen: list[list[str]] = []

    def noted_score(student: Any, objective: Any, examples: Any, config: Any) -> Any:
        seen.append([example.id for example in examples])
        return score(student, objective, examples, config)

    def noted_step(self: training.Run, number: int, examples: Any, *more: Any) -> Any:
        seen.clear()
        facts = step(self, number, examples, *more)
        with (folder / f"rank-{self.processes.rank}.jsonl").open("a") as file:
            line = {"step": number, "batch": [e.id for e in examples], "micro": seen, "world": self.processes.count}
            file.write(json.dumps(line) + "\n")
        time.sleep(seconds)
        return facts

    training.score = noted_score  # type: ignore[attr-defined]
    training.Run.step = noted_step  # type: ignore[method-assign]


if __name__ == "__main__":
    folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    note(folder, seconds)
    sys.argv = [sys.argv[0], *sys.argv[3:]]
    cli.main()
