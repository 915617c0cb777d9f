"""What can go wrong, and the exit code that a script sees for it.

Every error that a user can cause is one of these. The command line prints it as one line and never as a
traceback; anything else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

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
    """An engine is not installed, a model cannot be found or loaded, or a URL cannot be reached."""

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


class StageFailed(DpkdError):
    """A stage of `distill` ended with an error that it has printed itself."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code


def first_line(error: Exception) -> str:
    return redacted(" ".join(str(error).split()))[:300]
