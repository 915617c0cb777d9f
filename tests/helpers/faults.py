"""Processes that die or fail where a test wants them to: forked from a server that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, BinaryIO

POINTS = ("before write", "half written", "before fsync", "before link", "before rename", "before folder fsync")
STATE_POINTS = (
    "before state",
    "half of the state written",
    "before state fsync",
    "half written",  # state.json
    "before commit",
    "after commit",
    "before an older checkpoint goes",
    "half of an older checkpoint gone",
)
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("dpkd_offline.cli", "dpkd_offline.generation.generate", "dpkd_offline.generation.score_teacher"),
        *("dpkd_offline.training.trainer", "datasets", "helpers.faults", "helpers.owners"),
        *("dpkd_offline.training.init_student", "dpkd_offline.evaluation.evaluate", "dpkd_offline.sharing.pull"),
        "dpkd_offline.evaluation.judge",
        *("dpkd_offline.curation.export_pairs", "dpkd_offline.curation.import_pairs", "dpkd_offline.curation.merge"),
        *("transformers.models.llama.modeling_llama", "transformers.models.gpt2.modeling_gpt2", "helpers.frozen"),
    ]
)


@contextmanager
def at_every_point(act: Callable[[str], None]) -> Iterator[None]:
    """Call `act` with the name of each point that a write passes, before what the name says happens."""
    opened, fsync, link, replace = Path.open, os.fsync, os.link, Path.replace

    class Torn:
        def __init__(self, file: BinaryIO) -> None:
            self._file = file

        def write(self, data: bytes) -> None:
            act("before write")
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            act("half written")
            self._file.write(data[len(data) // 2 :])

        def __enter__(self) -> Torn:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    def open_(path: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
        file = opened(path, mode, *rest, **named)
        return Torn(file) if mode == "xb" else file  # as files.write_atomically does

    def fsync_(descriptor: int) -> None:
        act("before folder fsync" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "before fsync")
        fsync(descriptor)

    def link_(*paths: Any) -> None:
        act("before link")
        link(*paths)

    def replace_(path: Path, target: Path) -> Path:
        act("before rename")
        return replace(path, target)

    Path.open, os.fsync, os.link, Path.replace = open_, fsync_, link_, replace_  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Path.open, os.fsync, os.link, Path.replace = opened, fsync, link, replace  # type: ignore[method-assign]


@contextmanager
def at_every_point_of_a_checkpoint(act: Callable[[str], None]) -> Iterator[None]:
    """The same for what training's checkpoints pass beside such writes, and for each backward pass."""
    from torch import Tensor

    from dpkd_offline.training import checkpoint

    rename, rmtree, backward, write = Path.rename, shutil.rmtree, Tensor.backward, checkpoint.write_tensors

    def write_(path: Path, tensors: Mapping[str, Tensor]) -> str:
        act("before state")
        digest = write(path, tensors)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        act("half of the state written")
        path.write_bytes(data)
        act("before state fsync")
        return digest

    def rename_(path: Path, target: Path) -> Path:
        act("before commit")
        moved = rename(path, target)
        act("after commit")
        return moved

    def rmtree_(path: Path, *rest: Any, **named: Any) -> None:
        if Path(path).name.startswith("step-"):
            act("before an older checkpoint goes")
            (path / "state.json").unlink(missing_ok=True)
            act("half of an older checkpoint gone")
        rmtree(path, *rest, **named)

    def backward_(tensor: Tensor, *rest: Any) -> None:
        act("before backward")
        backward(tensor, *rest)

    checkpoint.write_tensors, Path.rename, shutil.rmtree, Tensor.backward = write_, rename_, rmtree_, backward_  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        checkpoint.write_tensors, Path.rename, shutil.rmtree, Tensor.backward = write, rename, rmtree, backward  # type: ignore[method-assign]


def run_command(arguments: list[str], point: str | None, passes: int, errors: str, background: bool) -> None:
    """In a child: a command, SIGKILLed at the `passes`-th time that it comes to a point. Ends as the command does."""
    import torch

    from dpkd_offline.cli import main
    from dpkd_offline.training import trainer

    torch.set_num_threads(1)
    if background:
        trainer.copies_fit = lambda *_: True
    sys.stderr = sys.stdout = open(errors, "w", buffering=1)
    sys.argv = ["dpkd-offline", *arguments]
    left = passes

    def kill(passed: str) -> None:
        nonlocal left
        left -= passed == point
        if passed == point and left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    with at_every_point(kill), at_every_point_of_a_checkpoint(kill):
        main()


def start(
    arguments: list[object],
    point: str | None = None,
    passes: int = 0,
    errors: Path = Path(os.devnull),
    background: bool = False,
) -> BaseProcess:
    """Run a command; what it prints goes to the file `errors`. In the background a thread writes checkpoints."""
    words = [str(a) for a in arguments]
    process = FORKS.Process(target=run_command, args=(words, point, passes, str(errors), background))
    process.start()
    return process
