"""A process of a run, as a launcher starts it: a command line, and a note of the pairs that it was given.

python tests/helpers/rank.py NOTES SECONDS train --dataset …
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any


def note(folder: Path, seconds: float) -> None:
    """Write the ids of each micro batch of this process, a line per step, and sleep after each."""
    from dpkd_offline.training import step as steps

    step = steps.Run.step

    def noted_step(self: steps.Run, number: int, ready: steps.Ready, *more: Any) -> Any:
        facts = step(self, number, ready, *more)
        micro = [[example.id for example in part.examples] for part, _ in ready.micro_batches]
        with (folder / f"rank-{self.processes.rank}.jsonl").open("a") as file:
            line = {"step": number, "batch": [e.id for e in ready.examples], "micro": micro}
            file.write(json.dumps({**line, "count": self.processes.count}) + "\n")
        time.sleep(seconds)
        return facts

    steps.Run.step = noted_step  # type: ignore[method-assign]


def write_in_background(seconds: float) -> None:
    """Have a thread write checkpoints, as on a GPU, and take so many seconds for it."""
    from dpkd_offline.training import checkpoint, trainer

    write = checkpoint.write_tensors

    def slow_write(*arguments: Any) -> str:
        time.sleep(seconds)
        return write(*arguments)

    checkpoint.write_tensors = slow_write
    trainer.copies_fit = lambda *_: True


def sum_by_gloo() -> None:
    """Leave out DeepSpeed's sums by shared memory, which it would compile first, for about two minutes."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main(folder: Path, seconds: float, arguments: Sequence[str]) -> None:
    from dpkd_offline import cli
    from dpkd_offline.models.loading import tell_deepspeed_the_device

    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        tell_deepspeed_the_device()
        sum_by_gloo()
    folder.mkdir(parents=True, exist_ok=True)
    note(folder, seconds)
    if "WRITING_SECONDS" in os.environ:
        write_in_background(float(os.environ["WRITING_SECONDS"]))
    sys.argv = ["dpkd-offline", *arguments]
    cli.main()


def _forked(environment: Mapping[str, str], out: Path, folder: Path, seconds: float, arguments: Sequence[str]) -> None:
    """A child of the fork server, which has imported what takes time."""
    os.environ.update(environment)
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(out.with_suffix(f".{kind}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    import torch

    torch.set_num_threads(1)
    main(folder, seconds, arguments)


def fork(
    environment: Mapping[str, str], out: Path, folder: Path, seconds: float, arguments: Sequence[str]
) -> ForkServerProcess:
    """Start a process whose output goes to `out`.out and `out`.err."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dpkd_offline.training.trainer", "dpkd_offline.cli", "peft"])
    started = context.Process(target=_forked, args=(environment, out, folder, seconds, arguments))
    started.start()
    return started


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
