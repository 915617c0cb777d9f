"""Files and folders at URLs, through fsspec: s3://, gs://, hf://, https:// and whatever else it knows.

Everything but `put` only reads. A URL may carry a password or a token, and so may the environment. No path shows these
in its text, so that they are in no message.
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
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from dpkd_offline.common.errors import DpkdError, UnavailableError, UsageError
from dpkd_offline.common.secrets import redacted, remember_secrets

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

READ_AHEAD_BYTES = 1 << 20
USER = re.compile(r"(?<=://)[^/]*@")
QUERY = re.compile(r"[?#].*")
SLASH_IN_PASSWORD = re.compile(r"://[^/@]*:[^/@]*/.*@")
BYTES_ASKED = re.compile(r"bytes=(\d+)-(\d+)")
LONGEST_LISTING = 64 << 20  # bytes
LAST_SLASHES = re.compile(r"(?<![:/])/+$")


def without_secrets(url: str) -> str:
    """A URL, of which each part of a chain `a::b` may carry some, without user, password, query and fragment."""
    return "::".join(QUERY.sub("", USER.sub("", part)) for part in url.split("::"))


def reason(error: Exception) -> str:
    """What a library says of an error, in a line, or the error's kind where that says nothing or tells a secret."""
    text = " ".join(str(error).split())
    return type(error).__name__ if redacted(text) != text or not text else text[:300]


@dataclass(frozen=True, repr=False)
class RemotePath:
    """A file or folder at a URL: of `pathlib.Path` what reading needs, with the same meaning and errors.

    Raises, besides FileNotFoundError: UnavailableError where it cannot be reached, or only with a package that is not
    installed; UsageError for a URL that cannot be.
    """

    _url: str
    _below: str = field(default="")  # where this lies below the URL: "/pairs/round-000"

    def __post_init__(self) -> None:
        remember_secrets(self._url)
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

    def read_bytes(self, limit: int) -> bytes:
        """The first `limit` bytes of a file; all of it where it is shorter."""
        with self.reached():
            files, path = self._place()
            data: bytes = files.cat_file(path, start=0, end=limit)
        return data[:limit]

    def open(self, mode: str) -> io.BufferedReader:
        """A file to read bytes from, some at a time."""
        assert mode == "rb"
        with self.reached():
            files, path = self._place()
            return io.BufferedReader(_Bytes(self, files.open(path, "rb")), READ_AHEAD_BYTES)

    def iterdir(self) -> Iterator[RemotePath]:
        with self.reached():
            files, path = self._place()
            paths = files.ls(path, detail=False)
        return (self / name for name in sorted({PurePosixPath(child.rstrip("/")).name for child in paths}))

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """What lies in this folder, if there is one, under names of that form."""
        assert "/" not in pattern
        try:
            return (child for child in self.iterdir() if fnmatchcase(child.name, pattern))
        except FileNotFoundError:
            return iter(())

    def find(self) -> dict[str, int | None]:
        """Every file below this folder, by its name from here, and its bytes; nothing where there is no such folder."""
        try:
            with self.reached():
                files, path = self._place()
                files.invalidate_cache()
                infos: dict[str, dict[str, Any]] = files.find(path, detail=True)
        except FileNotFoundError:
            return {}
        return {name[len(path) :].lstrip("/"): info["size"] for name, info in infos.items()}

    def put(self, file: Path) -> None:
        """Store a file here, whole or not at all, in place of one that is here."""
        from fsspec.asyn import AsyncFileSystem

        with self.reached():
            files, path = self._place()
            if isinstance(files, AsyncFileSystem):  # object storage: what appears is whole, and folders are but names
                files.put_file(str(file), path)
                return
            files.makedirs(files._parent(path), exist_ok=True)
            files.put_file(str(file), f"{path}.tmp")
            if files.exists(path):
                files.rm_file(path)
            files.mv(f"{path}.tmp", path)

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
        options = {"client_kwargs": _bounded_client()} if self._url.startswith(("http://", "https://")) else {}
        files, path = fsspec.url_to_fs(self._url, **options)
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
        return type(error).__name__ if self.secret else reason(error)


@cache
def _bounded_client() -> dict[str, Any]:
    """Options of fsspec's HTTP: bodies are not unpacked, and no more of one is held than was asked for.

    By itself it holds whatever a server sends, however short the range that it asked for.
    """
    import aiohttp
    from fsspec.config import conf

    class Bounded(aiohttp.ClientResponse):
        async def read(self) -> bytes:
            if self._body is None:
                asked = BYTES_ASKED.fullmatch(self.request_info.headers.get("Range", ""))
                most, body = int(asked[2]) - int(asked[1]) + 1 if asked else LONGEST_LISTING, bytearray()
                while len(body) < most and (piece := await self.content.read(most - len(body))):
                    body += piece
                self._body = bytes(body)
                self.close()
            return self._body

    own = conf.get("http", {}).get("client_kwargs", {})
    headers = {"Accept-Encoding": "identity", **own.get("headers", {})}
    return {**own, "headers": headers, "auto_decompress": False, "response_class": Bounded}


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
