"""Is an experiment in rounds the same, whenever it is killed?

usage: python tests/benchmarks/kills.py FOLDER --teacher MODEL [--kills 20] [--steps 12] [--limit 48] [--seed 0]

The demo's recipe with three rounds, by `distill` with the transformers engine: once without a disturbance, once killed
(SIGKILL; by turns the whole process group, and `distill` alone) at random times, in each of its stages at least once
where there are as many kills, and started again each time. Run it from the root of a clone.

Prints a line for each kill, and then which files of the two differ: every byte counts, but for `stages.jsonl` and the
speeds in `metrics.jsonl`. Ends with 1 where any does. The times of the kills follow those of the undisturbed run, so
what else the machine does should be the same in both; the number of threads must.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rounds import DEMO, lines_of

TITLE = re.compile(r"\[\d+/\d+\] (.+)$")
SPEEDS = ("tokens_per_s", "pairs_per_s", "waiting")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=12, help="of training")
    parser.add_argument("--limit", type=int, default=48, help="prompts to distil on")
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    return parser.parse_args()


def recipe(options: argparse.Namespace, output: Path) -> Path:
    values = yaml.safe_load(DEMO.read_text())
    values |= {"teacher": options.teacher, "output": str(output)}
    for section in ("generate", "generate_teacher"):
        values[section] |= {"limit": options.limit, "shard_size": 16, "batch_size": 16, "max_new_tokens": 32}
    values["sft"] |= {"max_steps": 4, "batch_size": 8, "save_every": 1}
    del values["train"]["epochs"]
    values["train"] |= {"max_steps": options.steps, "batch_size": 8, "save_every": 2}
    values["evaluate"] |= {"limit": 8, "seeds": [10], "max_new_tokens": 32}
    values["regenerate"] = {"when": "steps", "every": options.steps // 4, "rounds": 3}
    path = options.folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


class Distill:
    """A run of `distill`, and the stage that it is in."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-m", "dpkd_offline.cli", "distill", str(path)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        self.seen: list[str] = []
        self.last = ""
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.last = line
            if title := TITLE.search(line.strip()):
                self.seen.append(title[1])

    def wait_for(self, titles: Sequence[str]) -> None:
        """Until one of these stages begins, or the run ends."""
        while self.process.poll() is None and not set(titles) & set(self.seen):
            time.sleep(0.02)

    def ended(self) -> int:
        code = self.process.wait()
        self.reader.join()
        return code


def killed(path: Path, whole: Sequence[dict[str, Any]], kills: int, draw: random.Random) -> None:
    """Kill runs in the stages of the undisturbed one, in order, and let the last one end."""
    places = sorted(list(range(len(whole)))[:kills] + [draw.randrange(len(whole)) for _ in range(kills - len(whole))])
    for number, place in enumerate(places):
        run, stage = Distill(path), whole[place]
        again = number > 0 and places[number - 1] == place  # it may be over, and what makes a round not start again
        run.wait_for([later["stage"] for later in whole[place : place + 1 + again]])
        began, at = time.monotonic(), run.seen[-1:]
        delay = draw.uniform(0, stage["seconds"] - 1)
        while time.monotonic() < began + delay and run.seen[-1:] == at:  # at the latest when the next stage begins
            time.sleep(0.02)
        if run.process.poll() is not None:
            sys.exit(f"it ended with {run.ended()} before it was killed: {run.last}")
        everything, seconds = number % 2 == 0, time.monotonic() - began
        (os.killpg if everything else os.kill)(run.process.pid, signal.SIGKILL)
        run.ended()
        whom = "all of its processes" if everything else "distill"
        when = f"{seconds:.1f} s after {stage['stage']!r} began"
        print(f"kill {number + 1}: {whom}, {when}, in {run.seen[-1]!r}", flush=True)
    last = Distill(path)
    if code := last.ended():
        sys.exit(f"it ended with {code}: {last.last}")


def content(path: Path) -> Any:
    """The bytes of a file; of metrics all but how fast it was."""
    if path.name != "metrics.jsonl":
        return path.read_bytes()
    return [{key: value for key, value in line.items() if key not in SPEEDS} for line in lines_of(path)]


def main() -> None:
    options = arguments()
    options.folder.mkdir(parents=True, exist_ok=True)
    run, whole = options.folder / "run", options.folder / "whole"
    path = recipe(options, run)
    if not whole.exists():
        shutil.rmtree(run, ignore_errors=True)
        undisturbed = Distill(path)
        if code := undisturbed.ended():
            sys.exit(f"it ended with {code}: {undisturbed.last}")
        run.rename(whole)
    stages = lines_of(whole / "stages.jsonl")
    for stage in stages:
        print(f"{stage['seconds']:6.1f} s  {stage['stage']}", flush=True)
    shutil.rmtree(run, ignore_errors=True)
    killed(path, stages, options.kills, random.Random(options.seed))
    names = [{str(p.relative_to(r)) for p in r.rglob("*") if p.is_file()} - {"stages.jsonl"} for r in (whole, run)]
    both = sorted(names[0] & names[1])
    different = [name for name in both if content(whole / name) != content(run / name)]
    print(f"{len(both)} files in both, {len(different)} of them different: {', '.join(different) or 'none'}")
    print(f"in one of them alone: {', '.join(sorted(names[0] ^ names[1])) or 'none'}")
    sys.exit(1 if different or names[0] != names[1] else 0)


if __name__ == "__main__":
    main()
