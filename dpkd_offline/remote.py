"""What lies at a URL, read through fsspec and never written: s3://, gs://, hf://, https:// and whatever else it knows.

A URL may carry a password or a token. Neither is in anything that a path here shows of itself, and so in no message.
"""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from dpkd_offline.errors import DpkdError, UnavailableError, UsageError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

READ_AHEAD_BYTES = 1 << 20
USER = re.compile(r"(?<=://)[^/]*@")
QUERY = re.compile(r"[?#].*")
SLASH_IN_PASSWORD = re.compile(r"://[^/@]*:[^/@]*/.*@")
LAST_SLASHES = re.compile(r"(?<![:/])/+$")


def without_secrets(url: str) -> str:
    """A URL, of which each part of a chain `a::b` may carry some, without user, password, query and fragment."""
    return "::".join(QUERY.sub("", USER.sub("", part)) for part in url.split("::"))


@dataclass(frozen=True, repr=False)
class RemotePath:
    """A file or folder at a URL: of `pathlib.Path` what reading needs, with the same meaning and errors.

    Raises, besides FileNotFoundError: UnavailableError where it cannot be reached, or only with a package that is not
    installed; UsageError for a URL that cannot be.
    """

    _url: str
    _below: str = field(default="")  # where this lies below the URL: "/pairs/round-000"

    def __post_init__(self) -> None:
        if SLASH_IN_PASSWORD.search(self._url):
            raise UsageError("a URL whose password has a / in it; write it as %2F")

    def __str__(self) -> str:
        return LAST_SLASHES.sub("", without_secrets(self._url)) + self._below

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self._url, f"{self._below}/{name}")

    @property
    def name(self) -> str:
        return PurePosixPath(str(self)).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(str(self)).suffix

    @property
    def secret(self) -> bool:
        """Whether the URL holds more than is shown of it."""
        return without_secrets(self._url) != self._url

    def exists(self) -> bool:
        return self._info() is not None

    def is_dir(self) -> bool:
        info = self._info()
        return info is not None and info["type"] == "directory"

    def size(self) -> int | None:
        """In bytes, or None where a server does not say."""
        info = self._info()
        if info is None:
            raise self._missing()
        size: int | None = info["size"]
        return size

    def read_bytes(self) -> bytes:
        with self.reached():
            files, path = self._place()
            data: bytes = files.cat_file(path)
        return data

    def read_text(self, encoding: str) -> str:
        return self.read_bytes().decode(encoding)

    def open(self, mode: str) -> io.BufferedReader:
        """A file to read bytes from, some at a time."""
        assert mode == "rb"
        with self.reached():
            files, path = self._place()
            return io.BufferedReader(_Bytes(self, files.open(path, "rb")), READ_AHEAD_BYTES)

    def iterdir(self) -> Iterator[RemotePath]:
        with self.reached():
            files, path = self._place()
            found = files.ls(path, detail=False)
        return (self / name for name in sorted({PurePosixPath(there.rstrip("/")).name for there in found}))

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """What lies in this folder, if there is one, under names of that form."""
        assert "/" not in pattern
        try:
            return (there for there in self.iterdir() if fnmatchcase(there.name, pattern))
        except FileNotFoundError:
            return iter(())

    def _info(self) -> dict[str, Any] | None:
        try:
            with self.reached():
                files, path = self._place()
                info: dict[str, Any] = files.info(path)
        except FileNotFoundError:
            return None
        return info

    def _missing(self) -> FileNotFoundError:
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))

    def _place(self) -> tuple[AbstractFileSystem, str]:
        """The file system, and the path that it knows this by."""
        import fsspec

        for part in self._url.split("::"):
            protocol, _ = fsspec.core.split_protocol(part)
            if protocol is not None and protocol not in fsspec.available_protocols():
                raise UsageError(f"{self}: unknown protocol '{protocol}'")
        files, path = fsspec.url_to_fs(self._url)
        if not self._below:
            return files, path
        folder, mark, query = path.partition("?") if path.startswith("http") else (path, "", "")
        return files, folder.rstrip("/") + self._below + mark + query

    @contextmanager
    def reached(self) -> Iterator[None]:
        """What a storage library raises becomes an error of ours, without secrets."""
        try:
            yield
        except DpkdError:
            raise
        except ImportError as error:
            raise UnavailableError(f"{self}: a package is missing: {error}") from error
        except FileNotFoundError as error:
            cause = error.__cause__  # where a server does not answer, fsspec's HTTP says that there is no file
            if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
                raise UnavailableError(f"{self}: cannot be reached: {self._reason(cause)}") from error
            raise self._missing() from error
        except Exception as error:  # each kind of storage has its own
            raise UnavailableError(f"{self}: cannot be reached: {self._reason(error)}") from error

    def _reason(self, error: Exception) -> str:
        """What a library says, unless it may tell what the URL hides."""
        said = "" if self.secret else " ".join(str(error).split())[:300]
        return said or type(error).__name__


class _Bytes(io.RawIOBase):
    """An open remote file whose errors are those of its path."""

    def __init__(self, path: RemotePath, file: Any) -> None:
        self._path, self._file = path, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def readinto(self, buffer: Any) -> int:
        with self._path.reached():
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with self._path.reached():
            return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self._file.close()
        super().close()


Location = Path | RemotePath


def is_url(value: object) -> bool:
    return isinstance(value, str) and "://" in value


def located(place: str) -> Location:
    """What lies at a URL, or in a path on this machine."""
    return RemotePath(place) if is_url(place) else Path(place)


def size_of(path: Location) -> int | None:
    """In bytes, or None where a server does not say."""
    return path.size() if isinstance(path, RemotePath) else path.stat().st_size
