"""Where a dataset is pushed to: a folder, a storage that fsspec can write to, or a repository of the Hub."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from dpkd_offline.common import console
from dpkd_offline.common.errors import DpkdError, MismatchError, UnavailableError, UsageError
from dpkd_offline.common.files import LARGEST_JSON_BYTES, opened, read_bounded, write_atomically
from dpkd_offline.common.hashing import file_sha256
from dpkd_offline.common.locations import READ_AHEAD_BYTES, Location, RemotePath, located, reason, without_secrets
from dpkd_offline.dataset.integrity import check_inside

if TYPE_CHECKING:
    from huggingface_hub import HfUri, RepoFile


def on_disk(path: Location) -> Path:
    assert isinstance(path, Path), f"{path}: not on this machine"
    return path


T = TypeVar("T")
U = TypeVar("U")
HUB = "hf://datasets/"
SHARDS_AT_ONCE = 8
HUB_FILES_AT_ONCE = 64  # of one request for uploads; the library has 5 under way


def remote_or_folder(place: str) -> Location:
    """A folder on this machine, also as `file://`, or a URL; one of the Hub is read as of the commit it names now."""
    if place.startswith(HUB):
        return _pinned(place)
    if place.startswith(("file://", "local://")):
        from fsspec.implementations.local import LocalFileSystem

        return Path(LocalFileSystem._strip_protocol(place))
    return located(place)


def in_threads(act: Callable[[T], U], things: Iterable[T], at_once: int, done: Callable[[U], None]) -> None:
    """`done` is told what `act` returns of each thing, as it comes; after an error or a signal nothing more begins."""
    threads = ThreadPoolExecutor(at_once)
    try:
        for future in as_completed([threads.submit(act, thing) for thing in things]):
            done(future.result())
    finally:
        threads.shutdown(cancel_futures=True)


class Receiver(Protocol):
    """Names are those of files, from the dataset's folder on."""

    def files(self) -> Mapping[str, int | None]:
        """The files that are stored, and how many bytes each has, where that is known."""

    def same(self, name: str, file: Path) -> bool:
        """Whether a stored file holds what a small file on this machine holds."""

    def put(self, root: Path, shards: Sequence[Sequence[str]], rest: Sequence[str], shown: console.Progress) -> None:
        """Store files of the folder `root`: those of each shard in their order, and then the rest in its order."""


class Storage:
    """A folder on this machine, or a URL that fsspec can write to."""

    def __init__(self, place: Location) -> None:
        self._place = place

    def files(self) -> Mapping[str, int | None]:
        if isinstance(self._place, RemotePath):
            return self._place.find()
        files = (path for path in self._place.rglob("*") if path.is_file())
        return {path.relative_to(self._place).as_posix(): path.stat().st_size for path in files}

    def same(self, name: str, file: Path) -> bool:
        own, place = read_bounded(file, LARGEST_JSON_BYTES), self._place / name
        if isinstance(place, RemotePath):
            return place.read_bytes(len(own) + 1) == own
        with opened(place) as stored:
            return stored.read(len(own) + 1) == own

    def put(self, root: Path, shards: Sequence[Sequence[str]], rest: Sequence[str], shown: console.Progress) -> None:
        def in_order(names: Sequence[str]) -> int:
            for name in names:
                self._put(root / name, self._place / name)
            return len(names)

        in_threads(in_order, shards, SHARDS_AT_ONCE, shown.advance)
        for name in rest:
            shown.advance(in_order([name]))

    def _put(self, file: Path, target: Location) -> None:
        if isinstance(target, RemotePath):
            target.put(file)
            return
        assert isinstance(self._place, Path)
        check_inside(self._place, target)
        with opened(file) as source:
            write_atomically(target, iter(lambda: source.read(READ_AHEAD_BYTES), b""))


class Hub:
    """A dataset repository. All that is put becomes one commit, whose parent is the one that was compared with."""

    def __init__(self, url: str, private: bool) -> None:
        """Args: private: a repository that is made is private; otherwise it is what the Hub makes by default."""
        from huggingface_hub import HfApi

        uri = _parse(url)
        if uri.path_in_repo:
            raise UsageError(f"{without_secrets(url)}: a repository holds one dataset: {HUB}OWNER/NAME")
        self._api, self._url, self._private = HfApi(), without_secrets(url), private
        self._repo, self._branch = uri.id, uri.revision
        self._tree: dict[str, RepoFile] = {}  # at the head
        self._head = self._find_head()

    def _find_head(self) -> str | None:
        """The commit that the branch is at; None where there is no repository."""
        from huggingface_hub.errors import RepositoryNotFoundError

        with _reached(self._url):
            try:
                info = self._api.dataset_info(self._repo, revision=self._branch)
            except RepositoryNotFoundError:
                return None
        if self._private and not info.private:
            raise MismatchError(f"{self._url}: with --private, but the repository is there already, and public")
        return info.sha

    def files(self) -> Mapping[str, int | None]:
        from huggingface_hub import RepoFile

        if self._head is not None:
            with _reached(self._url):
                listed = self._api.list_repo_tree(self._repo, recursive=True, revision=self._head, repo_type="dataset")
                self._tree = {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}
        if ".gitignore" in self._tree:
            raise MismatchError(f"{self._url}/.gitignore: keeps files out that belong to a dataset; delete it there")
        return {name: entry.size for name, entry in self._tree.items()}

    def same(self, name: str, file: Path) -> bool:
        entry = self._tree[name]
        if entry.lfs is not None:
            return bool(entry.lfs.sha256 == file_sha256(file))
        data = read_bounded(file, LARGEST_JSON_BYTES)
        return bool(entry.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())  # as git names it

    def put(self, root: Path, shards: Sequence[Sequence[str]], rest: Sequence[str], shown: console.Progress) -> None:
        from huggingface_hub import CommitOperationAdd

        names = [*(name for shard in shards for name in shard), *rest]
        with _reached(self._url):
            if self._head is None:
                if self._branch not in (None, "main"):
                    raise UsageError(f"{self._url}: no such repository; what is first committed to it is on main")
                self._api.create_repo(self._repo, repo_type="dataset", private=self._private or None)
                self._head = self._find_head()
                console.info(f"push: {self._url} is made")
            added = [CommitOperationAdd(name, root / name) for name in names]
            for start in range(0, len(added), HUB_FILES_AT_ONCE):
                some = added[start : start + HUB_FILES_AT_ONCE]
                self._api.preupload_lfs_files(
                    self._repo, some, repo_type="dataset", revision=self._branch, free_memory=False
                )
                shown.advance(len(some))
            commit = self._api.create_commit(
                self._repo,
                added,
                commit_message=f"{len(added)} files of a dataset of dpkd-offline",
                repo_type="dataset",
                revision=self._branch,
                parent_commit=self._head,
            )
        console.info(f"push: commit {commit.oid}")


def _parse(url: str) -> HfUri:
    from huggingface_hub import parse_hf_uri
    from huggingface_hub.errors import HfUriError

    if ":" in url.removeprefix("hf:"):
        raise UsageError(f"a URL like {HUB}OWNER/NAME holds neither user nor password; huggingface_hub finds the token")
    try:
        return parse_hf_uri(url)
    except HfUriError as error:
        raise UsageError(f"{without_secrets(url)}: not {HUB}OWNER/NAME, or that with @REVISION") from error


def _pinned(url: str) -> RemotePath:
    """What lies at a URL of the Hub, at the commit that it names now, whatever is committed afterwards."""
    from huggingface_hub import HfApi

    uri, shown = _parse(url), without_secrets(url)
    with _reached(shown):
        commit = HfApi().dataset_info(uri.id, revision=uri.revision).sha
    return RemotePath("/".join([f"{HUB}{uri.id}@{commit}", *filter(None, [uri.path_in_repo])]))


@contextmanager
def _reached(url: str) -> Iterator[None]:
    """What the Hub's library raises becomes an error of ours, without secrets."""
    try:
        yield
    except DpkdError:
        raise
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 412:  # precondition failed
            raise MismatchError(f"{url}: somebody else has committed meanwhile; repeat the command") from error
        raise UnavailableError(f"{url}: cannot be reached: {reason(error)}") from error
