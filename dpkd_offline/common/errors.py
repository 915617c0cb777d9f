"""What can go wrong, and the exit code that a script sees for it.

Every error that a user can cause is one of these. The command line prints it as one line and never as a
traceback; anything else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable

from dpkd_offline.common.secrets import redacted


class DpkdError(Exception):
    """Base of the errors that end a command with one line on stderr."""

    exit_code = 1


class UsageError(DpkdError, ValueError):
    """A flag, a recipe key or a combination of them is wrong."""

    exit_code = 2


class DataError(DpkdError, ValueError):
    """A file's content is wrong: the message names file, row and column."""

    exit_code = 3


class MismatchError(DpkdError, ValueError):
    """Parts that do not belong together: another teacher, another tokenizer, a changed shard."""

    exit_code = 4


class StudentRuined(DpkdError):
    """Training stopped because the student got worse; the best one so far is the run's result."""

    exit_code = 5


class UnavailableError(DpkdError, RuntimeError):
    """An engine is not installed, a model cannot be found or loaded, memory does not hold it, or a URL cannot be
    reached."""

    exit_code = 69


class Interrupted(DpkdError):
    """Stopped before the end; the same command goes on from what is committed."""

    exit_code = 75


class StorageError(DpkdError):
    """The disk is full, or fails. What is committed is whole; once there is room the same command goes on."""

    exit_code = 75


class OutputBusy(DpkdError):
    """Another command writes this output now; the same command goes on when that one has ended."""

    exit_code = 75


class ReaderGone(DpkdError):
    """Nobody reads the pipe that stdout or stderr is. It ends the command without a word."""

    exit_code = 141  # a shell's code for SIGPIPE


class StageFailed(DpkdError):
    """A stage of `distill` ended with an error that it has printed itself, unless there is a message."""

    def __init__(self, exit_code: int, message: str = "") -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Stopped(BaseException):
    """A signal asks the command to end. No Exception: libraries take those for failures of theirs, and go on."""


def first_line(error: BaseException) -> str:
    return redacted(" ".join(str(error).split()))[:300]


# --- Memory ---

# What torch on a CPU, CUDA's libraries and vLLM say; torch on a GPU, Python and Arrow have errors of their own.
NO_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "_ALLOC_FAILED",
    "No available memory for the cache blocks",
    "larger than the available KV cache memory",
    "less than desired GPU memory utilization",
)
LESS_MEMORY = {  # what makes a command need less, by the setting that it has; what helps most comes first
    "micro_batch_tokens": "a lower --micro-batch-tokens",
    "gradient_checkpointing": "--gradient-checkpointing",
    "moments_dtype": "--moments-dtype int8",
    "lora_rank": "--lora-rank 16",
    "batch_size": "a lower --batch-size",
    "max_length": "a lower --max-length",
    "max_new_tokens": "a lower --max-new-tokens",
    "top_k": "a lower --top-k",
    "tensor_parallel_size": "a higher --tensor-parallel-size",
    "dtype": "--dtype bfloat16",
}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out, on a GPU or not."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError | ValueError) and any(words in str(error) for words in NO_MEMORY)


def less_memory(settings: Iterable[str]) -> str:
    """What makes a command with these settings need less memory."""
    return ", or ".join(option for setting, option in LESS_MEMORY.items() if setting in settings)


def out_of_memory(error: BaseException, settings: Iterable[str]) -> UnavailableError:
    """One line for it, which names what makes a command with these settings need less."""
    options = less_memory(settings)
    needs_less = f"; it needs less with {options}" if options else ""
    reason = first_line(error)[:160].rstrip(" .")
    return UnavailableError(f"memory ran out{f' ({reason})' if reason else ''}{needs_less}")
