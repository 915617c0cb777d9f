"""Runs of several processes, started as a launcher starts them."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from helpers.rank import fork

RANK = Path(__file__).parent / "rank.py"
# As Accelerate's launcher says it.
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO = {n: {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(n)} for n in (1, 2, 3)}
WAYS: dict[str, dict[str, str]] = {"plain": {}, "fsdp": FSDP, "zero-2": ZERO[2], "zero-3": ZERO[3]}


def options(dataset: Path, student: Path, output: Path, **changes: object) -> list[str]:
    values = {
        "dataset": dataset,
        "student": student,
        "output": output,
        "dtype": "float32",
        "batch-size": 6,
        "micro-batch-tokens": 300,
        "learning-rate": 1e-3,
        "max-grad-norm": 0.2,  # below those here, so that they are clipped
        "max-steps": 4,
        "holdout": 0,
    }
    return [f"--{name}={value}" for name, value in {**values, **changes}.items()]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@dataclass
class Started:
    process: ForkServerProcess
    out: Path  # without the endings

    def ended(self) -> tuple[int | None, str, str]:
        """Exit code, stdout and stderr."""
        self.process.join(150)
        if self.process.exitcode is None:
            self.process.kill()
        return self.process.exitcode, self.out.with_suffix(".out").read_text(), self.out.with_suffix(".err").read_text()


def start(notes: Path, arguments: Sequence[str], count: int, seconds: float = 0.0, **more: str) -> list[Started]:
    notes.mkdir(parents=True, exist_ok=True)
    several = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(count):
        environment = {**several, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
        environment |= {"OMP_NUM_THREADS": "1", **more}
        out = notes / f"{rank}.of-{count}"
        processes.append(Started(fork(environment, out, notes, seconds, ["train", *arguments]), out))
    return processes


def ended(started: Sequence[Started]) -> list[tuple[int | None, str, str]]:
    return [one.ended() for one in started]
