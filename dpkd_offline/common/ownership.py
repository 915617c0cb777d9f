"""One owner per output: a folder says what it is and by which run, and one command at a time writes it.

    .dpkd-offline.json      {"kind": "student", "run": …}, for good: the claim
    .dpkd-offline.lock      which command writes here now, gone when it ends

The claim is written before anything else, and what vouches for a result after all of it: so a folder that a killed
command left is known for its own, and the same command goes on. The lock is the kernel's (flock), which forgets it when
the process dies, however that happens; on a file system that has no such locks the command says so and goes on.

Processes that share an output (the workers of a study) hold the lock together, as long as they are of one run.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError, MismatchError, OutputBusy, UsageError
from dpkd_offline.common.files import disk_errors, find_model, write_json

CLAIM, LOCK = ".dpkd-offline.json", ".dpkd-offline.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
LONGEST_HOLDER = 300  # bytes of a lock that are read
JOINING_SECONDS = 10.0  # how long a process waits for one that has the lock alone, and may be about to share it


class Claim(BaseModel):
    """What a folder is, and by which run."""

    kind: str
    run: str


def claim_of(folder: Path) -> Claim | None:
    """What a folder says that it is; None where it says nothing.

    Raises:
        DataError: the claim is damaged.
    """
    try:
        return find_model(folder / CLAIM, Claim)
    except DataError as error:
        raise DataError(f"{error}; put back a whole copy of it, or delete the folder") from error


@dataclass
class OutputFolder:
    """A folder that this process alone writes, until its context ends."""

    path: Path
    kind: str

    def claim(self, run: str, *, known: Callable[[], str | None], begun: bool, afresh: bool = False) -> None:
        """Write that the folder is of a run, before anything else is written.

        Args:
            known: the run whose results stand in a folder without a claim, as older versions left them, if any.
            begun: whether anything in the folder counts. What another run left before that is removed.
            afresh: the folder may be of any run of this kind, and starts over.

        Raises:
            MismatchError: the folder is of another run.
        """
        claim = claim_of(self.path)
        owner = claim.run if claim else known()
        if owner not in (None, run) and begun and not afresh:
            start_over = ", or --no-resume to start over" if self.kind == "trained student" else ""
            raise MismatchError(
                f"{self.path}: holds {_with_article(self.kind)} of another command, config or model; repeat that "
                f"command, or take another --output{start_over}"
            )
        with disk_errors(self.path):
            if claim and claim.run != run and not begun:
                for path in self.path.iterdir():
                    if path.name not in (CLAIM, LOCK):
                        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if claim != Claim(kind=self.kind, run=run):
            write_json(self.path / CLAIM, Claim(kind=self.kind, run=run).model_dump())


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


@contextmanager
def output_folder(path: Path, kind: str, command: str, known: tuple[str, ...] = ()) -> Iterator[OutputFolder]:
    """Keep a folder for this process: refuse one that is something else, lock it, make it where there is none.

    Nothing is left of it where the command wrote nothing.

    Args:
        kind: what the folder is to be, such as "evaluation".
        command: who writes it, for the others.
        known: names by which a folder without a claim is taken for one of this kind all the same.

    Raises:
        MismatchError: the folder is of another kind.
        OutputBusy: another command writes it.
        StorageError: it cannot be made or written.
        UsageError: it is not a folder, or holds what is not ours.
    """
    require_ours(path, kind, known)
    new_folders = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        with locked(path / LOCK, path, command):
            require_ours(path, kind, known)
            try:
                yield OutputFolder(path, kind)
            finally:
                if _content(path) == [CLAIM]:
                    (path / CLAIM).unlink()
    finally:
        for folder in new_folders:
            try:
                folder.rmdir()
            except OSError:
                break  # something is in it


@contextmanager
def shared_output(path: Path, kind: str, command: str, run: str, prepare: Callable[[], None]) -> Iterator[None]:
    """Keep a folder for processes of one run, which share it.

    Args:
        kind: what the folder is to be.
        command: who writes it, for the others.
        run: what the processes must have in common while they run; a later one may be another.
        prepare: what the first of them does before any other may join.

    Raises:
        MismatchError: the folder is of another kind.
        OutputBusy: a process of another run, or one that does not share, writes it.
        StorageError, UsageError: as `output_folder`.
    """
    require_ours(path, kind, ())
    holder = f"`dpkd-offline {command}`, process {os.getpid()} on {socket.gethostname()}"
    with disk_errors(path):
        descriptor, alone = _join(path / LOCK, path)
    try:
        require_ours(path, kind, ())
        if alone:
            with disk_errors(path):
                os.truncate(descriptor, 0)
                os.pwrite(descriptor, holder.encode(), 0)
            OutputFolder(path, kind).claim(run, known=lambda: None, begun=True, afresh=True)
            prepare()
            _flock(descriptor, fcntl.LOCK_SH)
        claim = claim_of(path)  # also where it was alone: the lock is not kept while it becomes a shared one
        if claim is None or claim.run != run:
            raise OutputBusy(
                f"{path}: `dpkd-offline {command}` with another recipe writes it now; repeat this command when it has "
                f"ended, or take another output"
            )
        yield
    finally:
        with disk_errors(path):
            if _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):  # the last one
                (path / LOCK).unlink(missing_ok=True)
            os.close(descriptor)


def _join(file: Path, shown: Path) -> tuple[int, bool]:
    """The descriptor of a lock that is held alone or shared, and whether alone."""
    end = time.monotonic() + JOINING_SECONDS
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        alone = _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if alone or _flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB):
            try:
                if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                    return descriptor, alone
            except FileNotFoundError:
                pass  # the last one that held it has just ended, and removed it
        elif time.monotonic() > end:
            holder = os.pread(descriptor, LONGEST_HOLDER, 0).decode(errors="replace") or "another command"
            os.close(descriptor)
            raise OutputBusy(f"{shown}: {holder}, writes it now; repeat this command when it has ended")
        os.close(descriptor)
        time.sleep(0.05)


def _flock(descriptor: int, operation: int) -> bool:
    """Whether the lock is got. Where a file system has no locks it always is, with a warning from `_acquire`."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def is_held(folder: Path) -> bool:
    """Whether a command writes an output now."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return not _flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def require_ours(path: Path, kind: str, known: tuple[str, ...]) -> None:
    """Raise unless a folder is free, or of a kind: by its claim, or where it has none by one of the `known` names."""
    if not path.is_dir():
        if path.exists() or path.is_symlink():
            raise UsageError(f"{path}: not a folder; name another one")
        return
    others = _content(path)  # looked at first: whoever writes there now has claimed it before
    claim = claim_of(path)
    if claim is not None and others in ([CLAIM], []):
        return  # of a command that was killed before it wrote anything
    if claim is not None and claim.kind != kind:
        raise MismatchError(f"{path}: is {_with_article(claim.kind)}; take another folder for {_with_article(kind)}")
    if claim is None and not any((path / name).exists() for name in known) and others:
        raise UsageError(
            f"{path}: holds {others[0]!r}, and nothing says that it is {_with_article(kind)} of ours; name a new folder"
        )


def _content(folder: Path) -> list[str]:
    """What stands in a folder, but for locks and files that were never finished."""
    with disk_errors(folder):
        names = sorted(path.name for path in folder.iterdir())
    return [name for name in names if name != LOCK and not re.fullmatch(r"\..*\.tmp", name)]


@contextmanager
def locked(file: Path, shown: Path, command: str) -> Iterator[None]:
    """Hold the lock `file` of an output that messages call `shown`; the file is gone afterwards.

    Raises:
        OutputBusy: another process holds it; says which.
        StorageError: the file cannot be made.
    """
    with disk_errors(shown):
        descriptor = _acquire(file, shown)
        holder = f"`dpkd-offline {command}`, process {os.getpid()} on {socket.gethostname()}"
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, holder.encode(), 0)
    try:
        yield
    finally:
        with disk_errors(shown):
            file.unlink(missing_ok=True)  # while it is held: who waits for this very file sees that it is gone
            os.close(descriptor)


def _acquire(file: Path, shown: Path) -> int:
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            continue  # another command has just ended, and left nothing of the folder
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, LONGEST_HOLDER, 0).decode(errors="replace") or "another command"
            os.close(descriptor)
            raise OutputBusy(f"{shown}: {holder}, writes it now; repeat this command when it has ended") from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
            console.info(
                f"warning: {shown}: its file system has no locks ({error.strerror}): see to it that no other command "
                f"writes it now"
            )
            return descriptor
        try:
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                return descriptor
        except FileNotFoundError:
            pass  # the one that held it has just ended, and removed it
        os.close(descriptor)
