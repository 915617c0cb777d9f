"""How much memory `evaluate` takes, as the prompts grow.

    python tests/benchmarks/evaluate_memory.py [--prompts FEW MANY] [--seeds 3] [--kills 20] [--folder DIR]

Evaluates so many prompts (by default 1000 and 50000) under so many seeds, with a teacher, each in a fresh process, by
an engine that answers at once; prints the most memory that each had beyond the interpreter with its imports done.
With --kills the last of them is evaluated once more, killed so many times, and held against the undisturbed result.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from made_pairs import MIB

STEP = [sys.executable, __file__]
TOKENS = 64  # of a response


class InstantEngine:
    """Answers each request with the same tokens, cut off somewhere."""

    name, versions = "instant", {"instant": "1"}

    def generate(self, groups: Iterable[Sequence[Any]], _: object) -> Iterator[tuple[Any, Any]]:
        from dpkd_offline.engines.base import Completion

        for group in groups:
            for request in group:
                length = 1 + request.seed % TOKENS
                ids = [5 + (request.seed + n) % 200 for n in range(length)]
                yield request.key, Completion(ids, "length", [-1.5] * length)

    def score(self, groups: Iterable[Sequence[Any]], top_k: int = 0) -> Iterator[tuple[Any, Any]]:
        from dpkd_offline.engines.base import Score

        for group in groups:
            for request in group:
                yield request.key, [Score([-2.0] * len(response), [], []) for response in request.responses]

    def close(self) -> None:
        pass


def memory(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most. The kernel's ru_maxrss would be the parent's, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def evaluate_all(model: Path, source: Path, output: Path, seeds: int) -> None:
    """In a process of its own: evaluate, and print the most memory that it took."""
    from dpkd_offline.config.evaluate import EvaluateConfig
    from dpkd_offline.evaluation import evaluate as module
    from dpkd_offline.models.info import ModelInfo

    info = ModelInfo.load(str(model), False)
    assert info.identity and info.context_length and info.tokenizer("a")
    base = memory("VmRSS")
    module.load_engine = lambda *_: InstantEngine()  # type: ignore[assignment, return-value]
    config = EvaluateConfig(
        model=str(model),
        teacher=str(model),
        prompts=str(source),
        output=output,
        engine="transformers",
        seeds=tuple(range(seeds)),
        max_new_tokens=TOKENS,
        max_length=256,
    )
    module.evaluate(config)
    print(memory("VmHWM") - base)


def measured(root: Path, model: Path, prompts: int, seeds: int) -> tuple[int, float]:
    """Bytes and seconds."""
    from helpers.tiny import rows, write_jsonl

    source = write_jsonl(root / f"{prompts}.jsonl", rows(prompts))
    started = time.monotonic()
    arguments = [str(model), str(source), str(root / str(prompts)), str(seeds)]
    done = subprocess.run([*STEP, "--step", *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout), time.monotonic() - started


def killed(root: Path, model: Path, prompts: int, seeds: int, kills: int, seconds: float) -> None:
    """Kill an evaluation at random times, finish it, and compare its files with those of one that nobody killed."""
    output, draw, done, finished, same = root / "killed", random.Random(0), 0, 0, True
    arguments = [str(model), str(root / f"{prompts}.jsonl"), str(output), str(seeds)]
    while done < kills or output.exists():
        with subprocess.Popen([*STEP, "--step", *arguments], stdout=subprocess.DEVNULL) as process:
            try:
                process.wait(draw.uniform(0.1, 0.8) * seconds if done < kills else None)
            except subprocess.TimeoutExpired:
                process.kill()
                done += 1
                continue
        names = ("responses.jsonl", "results.json")
        same &= all((output / name).read_bytes() == (root / str(prompts) / name).read_bytes() for name in names)
        shutil.rmtree(output)
        finished += 1
    print(f"{kills} kills of {finished} evaluations: {'the same bytes' if same else 'OTHER BYTES'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1000, 50_000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--step", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        model, source, output, seeds = options.step
        evaluate_all(Path(model), Path(source), Path(output), int(seeds))
        return
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from helpers.tiny import build_model

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        model = build_model("llama", Path(folder) / "model")
        for count in options.prompts:
            taken, seconds = measured(Path(folder), model, count, options.seeds)
            print(f"{count:>7,} prompts x {options.seeds}: {taken / MIB:>7.1f} MiB, {seconds:.0f} s", flush=True)
        if options.kills:
            killed(Path(folder), model, count, options.seeds, options.kills, seconds)


if __name__ == "__main__":
    main()
