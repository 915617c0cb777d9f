"""Does every command that is done end with 0, on a busy machine?

usage: python tests/benchmarks/exits.py FOLDER [--dataset tests/golden/v1] [--times 300] [--at-once 4] [--load 2]

Runs `inspect`, `verify`, `export` (as lines of JSON, and for TRL), `push` (to a folder) and `subset` on a copy of the
dataset, so many times each and so many at once, beside processes that only compute. A thread of a library that still
runs while the interpreter ends would abort a process after correct output, with 134 or 139, in a few of a hundred runs,
and only where the machine is busy.

Prints for each command how many runs ended with which code, and the stderr of the first that did not end with 0.
Ends with 1 where any did not.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

BUSY = "while True: sum(range(10000))"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dataset", type=Path, default=Path("tests/golden/v1"))
    parser.add_argument("--times", type=int, default=300)
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--load", type=int, default=2, help="processes that only compute")
    parser.add_argument("--commands", nargs="*", help="only these")
    return parser.parse_args()


def commands(dataset: Path, new: Path) -> dict[str, list[str]]:
    """What is run, by name; `new` is where it may write, and is not there yet."""
    source = str(dataset)
    return {
        "inspect": ["inspect", source],
        "verify": ["verify", source],
        "export": ["export", source, str(new / "pairs.jsonl"), "--format", "jsonl"],
        "export-trl": ["export", source, str(new / "trl"), "--format", "trl"],
        "push": ["push", source, str(new / "pushed")],
        "subset": ["subset", source, str(new / "subset"), "--share", "0.5"],
    }


def run(name: str, options: argparse.Namespace, number: int) -> tuple[int, str]:
    """Exit code and stderr of one run of a command."""
    new = options.folder / f"{name}-{number}"
    new.mkdir()
    command = [sys.executable, "-m", "dpkd_offline.cli", *commands(options.folder / "dataset", new)[name]]
    done = subprocess.run(command, capture_output=True, text=True)
    shutil.rmtree(new)
    return done.returncode, done.stderr


def main() -> None:
    options = arguments()
    shutil.copytree(options.dataset, options.folder / "dataset")
    load = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(options.load)]
    wrong = 0
    try:
        for name in options.commands or commands(options.dataset, options.folder):
            started = time.monotonic()
            with ThreadPoolExecutor(options.at_once) as threads:
                runs = list(threads.map(partial(run, name, options), range(options.times)))
            codes = Counter(code for code, _ in runs)
            failed = [(code, stderr) for code, stderr in runs if code]
            wrong += len(failed)
            for code, stderr in failed[:1]:
                print(f"{name}: {code}: {stderr[-2000:]}", flush=True)
            counts = ", ".join(f"{count} ended with {code}" for code, count in sorted(codes.items()))
            print(f"{name}: {counts} ({time.monotonic() - started:.0f} s)", flush=True)
    finally:
        for process in load:
            process.kill()
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
