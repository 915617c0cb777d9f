"""What a command says: progress and messages for people on stderr, results on stdout.

How much it says is a variable of the environment, so that the processes that a command starts say as much.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from tqdm import tqdm

from dpkd_offline.common import process
from dpkd_offline.common.terminal import in_a_line, outgoing

LINE_EVERY_SECONDS = 15.0  # where stderr is a file or a pipe, progress is a line now and then
VERBOSITY = "DPKD_OFFLINE_VERBOSITY"  # quiet, normal or verbose
# What the libraries read when they are imported.
HIDDEN = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
SHOWN = {"TRANSFORMERS_VERBOSITY": "info", "DATASETS_VERBOSITY": "info", "VLLM_LOGGING_LEVEL": "INFO"}
_silent = False  # in all processes of a run but the first


def set_verbosity(level: Literal["quiet", "normal", "verbose"]) -> None:
    """Of this process and those that it starts. quiet: warnings and errors only; verbose: also what libraries say."""
    os.environ[VERBOSITY] = level


def prepare_libraries() -> None:
    """Hide what the libraries say, unless the console is verbose; what the user's environment says about it wins.

    Call it before they are imported.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it would warn at every fork
    # Whether there is a GPU, torch asks its driver's library and not CUDA, which a process cannot have and fork.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    for name, value in (SHOWN if is_verbose() else HIDDEN).items():
        os.environ.setdefault(name, value)
    if os.environ["VLLM_LOGGING_LEVEL"] == HIDDEN["VLLM_LOGGING_LEVEL"]:
        logging.getLogger("vllm").setLevel(logging.ERROR)  # as vLLM does, but not before its imports have spoken
    if process.is_program() and not is_verbose() and not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)  # it tells those who write a library's code


def only_first(first: bool) -> None:
    """Of several processes, let the first one speak."""
    global _silent
    _silent = not first


def _is_quiet() -> bool:
    return os.environ.get(VERBOSITY) == "quiet"


def is_verbose() -> bool:
    return os.environ.get(VERBOSITY) == "verbose"


def _in_notebook() -> bool:
    return "ipykernel" in sys.modules


def is_live() -> bool:
    """Whether progress is a bar that moves: on a terminal and in a notebook, where the console is not quiet."""
    return not _silent and not _is_quiet() and (_in_notebook() or (sys.stderr is not None and sys.stderr.isatty()))


def _line(text: str) -> None:
    """Write a line to stderr: every line for people leaves here. Where there is no stderr, nobody is told."""
    if sys.stderr is not None:  # tqdm would take stdout
        tqdm.write(outgoing(text), file=sys.stderr)


def info(message: str) -> None:
    """One line for people. One that begins with `warning: ` is shown in a quiet console, too."""
    if not _silent and (not _is_quiet() or message.startswith("warning: ")):
        _line(message)


def error(message: str) -> None:
    """Why the command ends, in one line whatever it quotes."""
    _line(f"dpkd-offline: {in_a_line(message)}")


def result(value: object) -> None:
    """What a command prints to stdout."""
    if not _silent:
        print(outgoing(str(value)))


class Progress:
    """A bar on a terminal and in a notebook, a line every so often in a file or a pipe."""

    def __init__(self, label: str, total: int, unit: str, done: int = 0) -> None:
        self._label, self._total, self._unit, self._done = label, total, unit, done
        self._live = is_live()
        bar = tqdm
        if self._live and _in_notebook():
            from tqdm.auto import tqdm as bar  # the notebook's own, where it has the widgets
        self._bar = bar(total=total, initial=done, desc=label, unit=unit, disable=not self._live, dynamic_ncols=True)
        self._started = self._last = time.monotonic()
        self._first = done

    def advance(self, n: int = 1, facts: Mapping[str, str] | None = None) -> None:
        """n more units are done; facts are shown beside them."""
        self._done += n
        if self._live:
            self._bar.update(n)
            self._bar.set_postfix(facts, refresh=False)
            return
        now = time.monotonic()
        if now - self._last >= LINE_EVERY_SECONDS or self._done >= self._total:
            self._last = now
            rate = (self._done - self._first) / max(now - self._started, 1e-9)
            left = (self._total - self._done) / rate if rate else 0.0
            shown = " ".join(f"{k}={v}" for k, v in (facts or {}).items())
            line = f"{self._label}: {self._done}/{self._total} {self._unit}s · {rate:.2f}/s · {left:.0f} s left"
            info(f"{line} · {shown}" if shown else line)

    def close(self) -> None:
        self._bar.close()


@contextmanager
def progress(label: str, total: int, unit: str, done: int = 0) -> Iterator[Progress]:
    """`with progress("score", rows, "row") as p: p.advance(8)`."""
    shown = Progress(label, total, unit, done)
    try:
        yield shown
    finally:
        shown.close()
