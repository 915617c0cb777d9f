from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import count, product
from pathlib import Path

import fsspec
import pytest
from helpers.fake_hub import TOKEN, FakeHub, fake_hub
from helpers.faults import FORKS, at_every_point
from helpers.tiny import command_line, files_of, generate_config, make_dataset, score_config
from moto.server import ThreadedMotoServer

from dpkd_offline import cli
from dpkd_offline.common.errors import DataError, DpkdError, MismatchError, UnavailableError, UsageError
from dpkd_offline.common.hashing import file_sha256
from dpkd_offline.common.locations import RemotePath
from dpkd_offline.curation.verify import verify
from dpkd_offline.generation.generate import generate
from dpkd_offline.generation.score_teacher import score_teacher
from dpkd_offline.sharing.pull import PullResult, pull
from dpkd_offline.sharing.push import PushResult, push

Run = Callable[..., subprocess.CompletedProcess[str]]
PAIRS = "pairs/round-000"
SHARD = f"{PAIRS}/pairs-00001-of-00003.parquet"
ENTRY = f"{PAIRS}/_manifest/pairs-00001-of-00003.json"
AUDIT = "students/other/pairs/round-000/_audit.json"
NO_FACTS = {"arrow_bytes": 0, "tokens": {}, "truncated": {}, "exact": {}, "row_means": {}}
CANARIES = {
    "HF_TOKEN": TOKEN,
    "AWS_SECRET_ACCESS_KEY": "canary/Of+The/Storage",
    "VLLM_API_KEY": "canary-of-the-servers",
    "WANDB_API_KEY": "canary-of-the-tracker",
}
PASSWORD = "canary-of-the-url"


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, source: Path, teachers: dict[str, Path], students: dict[str, Path]
) -> Path:
    """Every kind of table, with a further student and an audit."""
    teacher, student = teachers["gpt2"], students["gpt2"]
    dataset = make_dataset(tmp_path_factory.mktemp("mine") / "ds", source, teacher, student, top_k=3)
    generate(generate_config(dataset, "student", student, student_name="other", seed=1))
    score_teacher(score_config(dataset, teacher, student_name="other", audit=2))
    return dataset


@pytest.fixture
def mine(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(folder, tmp_path / "mine")


@pytest.fixture(scope="module")
def storage() -> Iterator[dict[str, str]]:
    """A server that speaks S3: what a process needs in its environment to reach it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "ann", "AWS_SECRET_ACCESS_KEY": CANARIES["AWS_SECRET_ACCESS_KEY"]}
    environment = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1", **keys}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield environment
    server.stop()


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as running:
        yield running


numbers = count()


def bucket() -> str:
    """The URL of a new one."""
    name = f"bucket-{next(numbers)}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


def stored(url: str) -> dict[str, bytes]:
    """Every file below a URL, by its name from there."""
    files, path = fsspec.url_to_fs(url)
    files.invalidate_cache()
    return {name[len(path) :].lstrip("/"): files.cat_file(name) for name in sorted(files.find(path))}


@pytest.fixture(params=["folder", "file", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A free place."""
    if request.param == "s3":
        request.getfixturevalue("storage")
        return f"{bucket()}/data/set"
    places = {"folder": str(tmp_path / "theirs"), "file": f"file://{tmp_path}/theirs/", "memory": "memory://theirs-"}
    return places[request.param] + ("" if request.param != "memory" else str(next(numbers)))


# --- there and back -------------------------------------------------------------------------------------------------


def test_what_is_pushed_and_pulled_is_the_same(folder: Path, url: str, tmp_path: Path) -> None:
    files = files_of(folder)
    assert push(folder, url) == PushResult(url, files=len(files), bytes=sum(map(len, files.values())))
    assert stored(url) == files
    shards = [data for name, data in files.items() if name.endswith(".parquet")]
    assert pull(url, tmp_path / "here") == PullResult(tmp_path / "here", len(shards), sum(map(len, shards)))
    assert pull(url, tmp_path / "here") == PullResult(tmp_path / "here", shards=0, bytes=0)
    assert files_of(tmp_path / "here") == files_of(folder)
    verify(tmp_path / "here")


def test_only_what_is_new_travels(mine: Path, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = tmp_path / "part"
    pull(str(mine), part, ["responses/teacher"])
    assert set(files_of(part)) == {
        name for name in files_of(mine) if name.startswith(("prompts/", "responses/teacher/")) or "/" not in name
    }
    push(part, url)
    pull(url, tmp_path / "here")
    capsys.readouterr()
    push(mine, url)
    messages = capsys.readouterr().err
    files, before = files_of(mine), files_of(part)
    new = [name for name in files if before.get(name) != files[name]]
    assert (
        f"push: {len(new)} files, {sum(len(files[name]) for name in new)} bytes; {len(before) - 1} were there"
        in messages
    )
    pull(url, tmp_path / "here")
    assert "pull: 15 shards, " in (messages := capsys.readouterr().err) and "; 6 were there" in messages
    assert files_of(tmp_path / "here") == stored(url) == files
    push(mine, url)
    assert f"push: 0 files, 0 bytes; {len(files)} were there" in capsys.readouterr().err


def test_only_the_dataset_travels(mine: Path, tmp_path: Path) -> None:
    own = set(files_of(mine))
    for name in (".git/config", ".env", "token", "pairs/.x.tmp", f"{PAIRS}/notes.json", f"{PAIRS}/_manifest/a.bak"):
        (mine / name).parent.mkdir(exist_ok=True)
        (mine / name).write_text(TOKEN)
    push(mine, str(tmp_path / "theirs"))
    assert set(files_of(tmp_path / "theirs")) == own


def test_tables_that_are_asked_for_come_with_what_they_need(folder: Path, tmp_path: Path) -> None:
    def brought(*only: str, round: int | None = None) -> set[str]:
        target = tmp_path / str(next(numbers))
        pull(str(folder), target, only, round)
        return set(verify(target).rows)

    assert brought(PAIRS) == brought("pairs") == brought("pairs/", round=0) == {"prompts", PAIRS}
    assert brought("top_k") == {"prompts", PAIRS, "top_k/round-000"}
    assert brought("students/other/pairs") == {"prompts", "students/other/pairs/round-000"}
    assert brought(round=0) == set(verify(folder).rows)
    for only, round, message in [
        (["pair"], None, "no table 'pair'; there are prompts, responses/teacher, "),
        (["pairs/../.."], None, "no table 'pairs/../..'; "),
        (["pairs"], 1, "no table of round 1 among pairs/round-000"),
    ]:
        with pytest.raises(DataError, match=message):
            pull(str(folder), tmp_path / "none", only, round)
    assert not (tmp_path / "none").exists()


def test_what_cannot_be_is_said(folder: Path, tmp_path: Path, storage: dict[str, str], run_cli: Run) -> None:
    for to, error, message in [
        ("https://host/data", UsageError, "https://host/data: nothing can be stored there"),
        ("hf://ann/model", UsageError, "nothing can be stored there"),
        ("simplecache::s3://b/data", UsageError, "nothing can be stored there"),
        ("s3://no-such-bucket/data", UnavailableError, "s3://no-such-bucket/data: there is no such place"),
        ("hf://datasets/x", UsageError, "hf://datasets/x: not hf://datasets/OWNER/NAME"),
        ("hf://datasets/x/y/z", UsageError, "a repository holds one dataset"),
    ]:
        with pytest.raises(error, match=message):
            push(folder, to)
    with pytest.raises(UsageError, match="--private is for"):
        push(folder, "s3://b/data", private=True)
    with pytest.raises(DataError, match=r"memory://nothing/dataset\.json: no such file"):
        pull("memory://nothing", tmp_path / "here")
    for command in (["push", "s3://b/data", "s3://c/data"], ["pull", "s3://b/data", "s3://c/data"]):
        done = run_cli(*command)
        assert (done.returncode, done.stdout) == (2, "") and "a folder on this machine is needed" in done.stderr


# --- push: what is refused before anything travels ------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def link_out(dataset: Path, name: str) -> None:
    """A file or folder as a link to it, beside the dataset."""
    outside = dataset.parent / f"outside-{next(numbers)}"
    (dataset / name).rename(outside)
    (dataset / name).symlink_to(outside)


def tell(path: Path, **changes: object) -> None:
    """Other values in a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2) + "\n")


UNSOUND: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "a byte": (lambda f: flip(f / SHARD), 4, f"{SHARD}: its sha256 is not the one in"),
    "no shard": (lambda f: (f / SHARD).unlink(), 3, f"{SHARD}: no such file"),
    "no entry": (lambda f: (f / ENTRY).unlink(), 3, f"{SHARD}: not committed"),
    "no provenance": (lambda f: (f / PAIRS / "_table.json").unlink(), 3, "_table.json: no such file"),
    "provenance": (lambda f: tell(f / PAIRS / "_table.json", prompt_set="x"), 4, "prompt_set is 'x'"),
    "size": (lambda f: tell(f / ENTRY, bytes=5), 4, "bytes is 5, there is"),
    "shard elsewhere": (lambda f: link_out(f, SHARD), 4, f"{SHARD}: a link that leads out of the dataset"),
    "table elsewhere": (lambda f: link_out(f, "pairs"), 4, f"{PAIRS}: a link that leads out"),
    "audit elsewhere": (
        lambda f: link_out(f, AUDIT),
        4,
        "_audit.json: a link that leads out",
    ),
    "dataset.json elsewhere": (lambda f: link_out(f, "dataset.json"), 4, "dataset.json: a link that leads out"),
    "path in a config": (
        lambda f: tell(f / PAIRS / "_table.json", config={"a": ["x", "/home/ann/x"]}),
        3,
        f"{PAIRS}/_table.json: config.a.1 holds an absolute path",
    ),
    "path in a key": (
        lambda f: tell(f / PAIRS / "_table.json", config={"C:\\ann": 1}),
        3,
        "a key of config holds an absolute path",
    ),
    "path of a home": (
        lambda f: tell(f / "top_k/round-000/_table.json", versions={"a": "at ~ann/x"}),
        3,
        "versions.a holds an absolute path",
    ),
    "a secret": (
        lambda f: tell(f / PAIRS / "_table.json", config={"url": f"http://h?{CANARIES['VLLM_API_KEY']}"}),
        3,
        "config.url tells the value of VLLM_API_KEY",
    ),
    "a secret of the audit": (
        lambda f: tell(f / AUDIT, a=CANARIES["WANDB_API_KEY"]),
        3,
        "_audit.json: a tells the value of WANDB_API_KEY",
    ),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_what_should_not_be_shared_stays_here(
    name: str, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in CANARIES.items():
        monkeypatch.setenv(variable, value)
    damage, code, message = UNSOUND[name]
    damage(mine)
    with pytest.raises(DpkdError) as error:
        push(mine, str(tmp_path / "theirs"))
    assert error.value.exit_code == code and message in str(error.value) and "\n" not in str(error.value)
    assert not any(value in str(error.value) for value in CANARIES.values())
    assert not (tmp_path / "theirs").exists()


def test_a_secret_that_only_the_url_holds_is_not_told(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell(mine / PAIRS / "_table.json", config={"a": PASSWORD})
    with pytest.raises(DataError, match=r"config\.a tells the value of the password in the URL"):
        push(mine, f"ftp://ann:{PASSWORD}@127.0.0.1/data")


CHANGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "dataset.json": (lambda f: tell(f / "dataset.json", more=1), "dataset.json: not the one in"),
    "provenance": (lambda f: tell(f / PAIRS / "_table.json", engine="x"), f"{PAIRS}/_table.json: not the one in"),
    "shard": (lambda f: tell(f / ENTRY, sha256="0" * 64), f"{ENTRY}: not the one in"),
    "another table": (
        lambda f: shutil.copytree(f / "pairs", f / "students/new/pairs"),
        "students/new/pairs/round-000/",
    ),
    "another round": (lambda f: shutil.copytree(f / PAIRS, f / "pairs/round-001"), "pairs/round-001/_manifest/"),
    "another plan": (lambda f: (f / ENTRY).rename(f / ENTRY.replace("00003", "00004")), "of-00004.json: committed"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_others_have_committed_stays(name: str, folder: Path, mine: Path) -> None:
    change, message = CHANGED[name]
    change(mine)
    place = f"memory://changed-{next(numbers)}"
    fsspec.filesystem("memory").put(str(mine), place, recursive=True)
    before = stored(place)
    with pytest.raises(MismatchError, match="`dpkd-offline pull`") as error:
        push(folder, place)
    assert f"{place}/{message.split(':')[0]}" in str(error.value) or message in str(error.value)
    assert stored(place) == before


def test_nobody_sees_a_shard_as_committed_before_it_is_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, order, put = threading.Lock(), [], RemotePath.put

    def noted(path: RemotePath, file: Path) -> None:
        put(path, file)
        with lock:
            order.append(file.relative_to(folder).as_posix())

    monkeypatch.setattr(RemotePath, "put", noted)
    push(folder, f"memory://order-{next(numbers)}")
    for name in order:
        if "/_manifest/" in name:
            assert order.index(name.replace("_manifest/", "").replace(".json", ".parquet")) < order.index(name)
    assert order[-2:] == ["dataset.json", "README.md"]
    others = [name for name in order if name.endswith(("_table.json", "_audit.json"))]
    assert order[-2 - len(others) : -2] == others


# --- the Hub --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_hub_gets_one_commit(mine: Path, hub: FakeHub, run_cli: Run, tmp_path: Path) -> None:
    environment = {**os.environ, **hub.environment}
    place = "hf://datasets/ann/data"
    part = tmp_path / "part"
    pull(str(mine), part, ["responses"])
    done = run_cli("push", part, place, "--private", env=environment)
    assert (done.returncode, done.stdout) == (0, f"{place}\n"), done.stderr
    repo = hub.repos["ann/data"]
    assert repo.private and len(repo.commits) == 2 and repo.files == files_of(part)
    first = repo.branches["main"]
    assert f"push: {place} is made" in done.stderr and f"push: commit {first}" in done.stderr

    done = run_cli("push", mine, place, env=environment)
    assert done.returncode == 0 and len(repo.commits) == 3 and repo.files == files_of(mine), done.stderr
    kept = len(files_of(part)) - 1
    assert f"push: {len(files_of(mine)) - kept} files, " in done.stderr and f"; {kept} were there" in done.stderr
    done = run_cli("push", mine, place, env=environment)
    assert done.returncode == 0 and "push: 0 files" in done.stderr and len(repo.commits) == 3

    for at, holds in (("", mine), (f"@{first}", part), ("@main", mine)):
        target = tmp_path / f"here{at}"
        done = run_cli("pull", f"{place}{at}", target, env=environment)
        assert (done.returncode, done.stdout) == (0, f"{target}\n"), done.stderr
        assert files_of(target) == files_of(holds)


@pytest.mark.slow
def test_the_hub_refuses_what_does_not_follow(mine: Path, hub: FakeHub, run_cli: Run) -> None:
    environment = {**os.environ, **hub.environment}

    def refused(code: int, message: str, *more: str, name: str = "ann/data") -> None:
        done = run_cli("push", mine, f"hf://datasets/{name}", *more, env=environment)
        assert (done.returncode, done.stdout) == (code, "") and message in done.stderr, done.stderr
        assert TOKEN not in done.stderr

    hub.create("ann/ignores").commit({".gitignore": b"*.parquet"})
    refused(4, "hf://datasets/ann/ignores/.gitignore: keeps files out", name="ann/ignores")
    repo = hub.create("ann/data")
    refused(4, "with --private, but the repository is there already, and public", "--private")
    refused(69, "hf://datasets/ann/data@none: cannot be reached: ", name="ann/data@none")

    def rival(method: str, path: str) -> None:
        if path.endswith("/preupload/main"):
            hub.before = lambda method, path: None
            repo.commit({"dataset.json": b"{}"})

    hub.before = rival
    refused(4, "hf://datasets/ann/data: somebody else has committed meanwhile; repeat the command")
    refused(4, "hf://datasets/ann/data/dataset.json: not the one in")
    assert repo.files == {"dataset.json": b"{}"}
    environment["HF_TOKEN"] = "hf_canaryOfSomebodyElse"
    refused(69, "hf://datasets/ann/data: cannot be reached: ")


@pytest.mark.slow
def test_a_push_to_the_hub_that_is_killed_is_not_seen_and_goes_on(folder: Path, hub: FakeHub, tmp_path: Path) -> None:
    repo, stored = hub.create("ann/data"), len(files_of(folder)) // 4
    running: list[subprocess.Popen[bytes]] = []

    def kill(method: str, path: str) -> None:
        if method == "PUT" and len(hub.stored) >= stored:
            running[0].kill()

    def push_it() -> int:
        arguments = command_line("push", folder, "hf://datasets/ann/data")
        running[:] = [subprocess.Popen(arguments, env={**os.environ, **hub.environment}, stderr=subprocess.DEVNULL)]
        return running[0].wait(120)

    hub.before = kill
    assert push_it() == -signal.SIGKILL and repo.files == {} and len(hub.stored) >= stored
    hub.before, before = lambda method, path: None, len(hub.stored)
    hub.asked.clear()
    assert push_it() == 0 and repo.files == files_of(folder) and len(repo.commits) == 2
    sent = [path for method, path in hub.asked if method == "PUT"]
    assert len(sent) == len([name for name in repo.files if name.endswith(".parquet")]) - before


def test_a_pull_sees_one_commit(folder: Path, hub: FakeHub, run_cli: Run, tmp_path: Path) -> None:
    repo = hub.create("ann/data")
    repo.commit(files_of(folder))

    def rival(method: str, path: str) -> None:
        if "/resolve/" in path:
            repo.commit({ENTRY: b"{}", "dataset.json": b"{}"})

    hub.before = rival
    done = run_cli("pull", "hf://datasets/ann/data", tmp_path / "here", env={**os.environ, **hub.environment})
    assert done.returncode == 0 and files_of(tmp_path / "here") == files_of(folder), done.stderr
    assert len(repo.commits) > 10


# --- pull: what is hostile, damaged or of something else ------------------------------------------------------------


def test_a_changed_byte_is_caught_and_nothing_of_it_stays(mine: Path, url: str, tmp_path: Path, run_cli: Run) -> None:
    push(mine, url)
    flip(mine / SHARD)
    files, path = fsspec.url_to_fs(url)
    files.put_file(str(mine / SHARD), f"{path}/{SHARD}")
    with pytest.raises(MismatchError) as error:
        pull(url, tmp_path / "here")
    assert f"/{SHARD}: its sha256 is not the one in " in str(error.value) and "\n" not in str(error.value)
    fetched = files_of(tmp_path / "here")
    assert SHARD not in fetched and ENTRY not in fetched and not [name for name in fetched if name.endswith(".tmp")]
    flip(mine / SHARD)
    files.put_file(str(mine / SHARD), f"{path}/{SHARD}")
    pull(url, tmp_path / "here")
    assert files_of(tmp_path / "here") == files_of(mine)


def test_another_dataset_stays_as_it_is(folder: Path, mine: Path, tmp_path: Path) -> None:
    changes: list[tuple[Callable[[], object], str]] = [
        (lambda: tell(mine / ENTRY, more=1), f"{mine / ENTRY}: not the one at {folder / ENTRY}"),
        (lambda: tell(mine / PAIRS / "_table.json", more=1), f"{mine / PAIRS / '_table.json'}: not the one at"),
        (lambda: ((mine / ENTRY).unlink(), flip(mine / SHARD)), f"{mine / SHARD}: not the one at {folder / SHARD}"),
        (
            lambda: tell(mine / "dataset.json", shards={"rows": 22, "shard_size": 11, "count": 2}),
            f"{mine / 'dataset.json'}: another dataset than {folder}: shards.shard_size is 11, there 8",
        ),
    ]
    for change, message in changes:
        shutil.rmtree(mine)
        shutil.copytree(folder, mine)
        change()
        before = files_of(mine)
        with pytest.raises(MismatchError) as error:
            pull(str(folder), mine)
        assert message in str(error.value)
        assert files_of(mine) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="not a folder"):
        pull(str(folder), tmp_path / "file")


def entry_of(**changes: object) -> Callable[[Path], None]:
    return lambda theirs: tell(theirs / ENTRY, **changes)


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    data = content.encode() if isinstance(content, str) else content
    return lambda theirs: (theirs / name).write_bytes(data)  # type: ignore[return-value]


def plan(**shards: object) -> Callable[[Path], None]:
    return lambda theirs: tell(theirs / "dataset.json", shards=shards)


def twice(name: str, key: str, value: object) -> Callable[[Path], None]:
    """A JSON object that says a key again, at its end."""

    def damage(theirs: Path) -> None:
        content = (theirs / name).read_text().rstrip().removesuffix("}").rstrip()
        (theirs / name).write_text(f"{content}, {json.dumps(key)}: {json.dumps(value)}}}")

    return damage


def moved(name: str, to: str) -> Callable[[Path], None]:
    return lambda theirs: shutil.move(theirs / name, theirs / to)  # type: ignore[return-value]


def linked(name: str) -> Callable[[Path], None]:
    return lambda theirs: link_out(theirs, name)


def fifo(name: str) -> Callable[[Path], None]:
    def damage(theirs: Path) -> None:
        (theirs / name).unlink()
        os.mkfifo(theirs / name)

    return damage


def vouched(theirs: Path) -> None:
    (theirs / SHARD).write_bytes(b"PAR1 evil PAR1")
    tell(theirs / ENTRY, sha256=file_sha256(theirs / SHARD), bytes=14)


def circle(theirs: Path) -> None:
    (theirs / ENTRY).unlink()
    (theirs / ENTRY).symlink_to(theirs / ENTRY)


HOSTILE: dict[str, Callable[[Path], None]] = {
    "file: above": entry_of(file="../../../../evil.parquet"),
    "file: absolute": entry_of(file="/tmp/evil.parquet"),
    "file: a URL": entry_of(file="https://127.0.0.1:9/evil.parquet"),
    "file: another scheme": entry_of(file="file:///etc/passwd"),
    "file: another shard": entry_of(file="pairs-00000-of-00003.parquet"),
    "file: two lines": entry_of(file="pairs-00001-of-00003.parquet\n../evil"),
    "file: a NUL": entry_of(file="pairs-00001-of-00003.parquet\0"),
    "file: a list": entry_of(file=["pairs-00001-of-00003.parquet"]),
    "bytes: huge": entry_of(bytes=10**30),
    "bytes: negative": entry_of(bytes=-1),
    "bytes: true": entry_of(bytes=True),
    "bytes: text": entry_of(bytes="12"),
    "bytes: too few": entry_of(bytes=1),
    "rows: another number": entry_of(rows=10**9),
    "sha256: upper case and short": entry_of(sha256="AB"),
    "sha256: null": entry_of(sha256=None),
    "schema: another": entry_of(schema_version=999),
    "entry: a key twice": twice(ENTRY, "file", "../evil"),
    "entry: a list": text(ENTRY, "[]"),
    "entry: deep": text(ENTRY, "[" * 100_000),
    "entry: a number of many digits": text(ENTRY, '{"bytes": ' + "9" * 5000 + "}"),
    "entry: not UTF-8": text(ENTRY, b"\xff\xfe{}"),
    "entry: huge": text(ENTRY, b" " * (1 << 25)),
    "entry: missing": lambda theirs: (theirs / ENTRY).unlink(),
    "entry: another name": moved(ENTRY, f"{PAIRS}/_manifest/a\n..%2f..json"),
    "entry: one more": lambda theirs: (theirs / PAIRS / "_manifest" / "\x1b[31mevil.json").write_text("{}"),  # type: ignore[dict-item, return-value]
    "shard: one more": lambda theirs: (theirs / PAIRS / "..evil.parquet").write_text(""),  # type: ignore[dict-item, return-value]
    "plan: 10**12 shards": plan(rows=10**12, shard_size=1, count=10**12),
    "plan: of another size": plan(rows=22, shard_size=10**12, count=1),
    "plan: negative": plan(rows=-22, shard_size=8, count=-2),
    "plan: none": plan(rows=22, shard_size=0, count=3),
    "plan: not a whole number": plan(rows=22.0, shard_size=8, count=3),
    "dataset.json: a key twice": twice("dataset.json", "shards", {"rows": 1, "shard_size": 1, "count": 1}),
    "dataset.json: the prompt set a list": lambda theirs: tell(theirs / "dataset.json", prompt_set=[]),
    "dataset.json: another format": lambda theirs: tell(theirs / "dataset.json", format="\x1b[2J"),
    "provenance: missing": lambda theirs: (theirs / PAIRS / "_table.json").unlink(),
    "provenance: another prompt set": lambda theirs: tell(theirs / PAIRS / "_table.json", prompt_set="../evil"),
    "provenance: a model without a name": lambda theirs: tell(theirs / PAIRS / "_table.json", model={"name": ["x"]}),
    "provenance: versions a list": lambda theirs: tell(theirs / PAIRS / "_table.json", versions=["x"]),
    "provenance: a licence as a list": lambda theirs: tell(theirs / PAIRS / "_table.json", license=[1]),
    "provenance: half a letter": lambda theirs: tell(theirs / PAIRS / "_table.json", engine="\ud800"),
    "facts: missing": entry_of(facts={}),
    "facts: huge": entry_of(facts={**NO_FACTS, "arrow_bytes": 10**400}),
    "facts: of other rows": entry_of(facts=NO_FACTS),
    "shard: no Parquet, and vouched for": vouched,
    "audit: without numbers": lambda theirs: tell(theirs / AUDIT, gap_abs_mean=None),
    "audit: no JSON": text(AUDIT, "#!/bin/sh"),
    "link: a shard": linked(SHARD),
    "link: an entry": linked(ENTRY),
    "link: a table": linked("pairs"),
    "link: dataset.json": linked("dataset.json"),
    "link: in a circle": circle,
    "fifo: a shard": fifo(SHARD),
    "fifo: an entry": fifo(ENTRY),
    "fifo: dataset.json": fifo("dataset.json"),
}


@pytest.mark.parametrize(
    ("protocol", "name"),
    [
        *(("folder", name) for name in HOSTILE),
        *(("memory", name) for name in HOSTILE if not name.startswith(("link", "fifo"))),  # which it has not
    ],
)
def test_hostile_datasets_are_refused_in_a_line(name: str, protocol: str, mine: Path, tmp_path: Path) -> None:
    HOSTILE[name](mine)
    place = str(mine)
    if protocol == "memory":
        place = f"memory://hostile-{next(numbers)}"
        fsspec.filesystem("memory").put(str(mine), place, recursive=True)
    target = tmp_path / "below" / "here"
    before = set(tmp_path.rglob("*"))
    with pytest.raises((DataError, MismatchError)) as error:
        pull(place, target)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert all(p.is_relative_to(target.parent) for p in set(tmp_path.rglob("*")) - before)
    written = files_of(target) if target.exists() else {}
    assert name.startswith("audit") or ENTRY not in written
    assert all(data == (mine / file).read_bytes() for file, data in written.items())


@pytest.mark.slow
def test_whatever_a_small_file_says_ends_in_a_line_or_does_no_harm(folder: Path, mine: Path, tmp_path: Path) -> None:
    refused, brought = 0, 0
    tables = [table for table in verify(folder).rows if table != "prompts"]
    for name in ("dataset.json", AUDIT, *(f"{table}/_table.json" for table in tables)):
        text = (folder / name).read_text()
        places = [(key,) for key in json.loads(text)]
        places += [("prompt_set", key) for key in json.loads(text)["prompt_set"]] if name == "dataset.json" else []
        for (*outer, key), value in product(places, (..., [1], {"a": [1]}, "x", -1)):
            content = json.loads(text)
            place = content[outer[0]] if outer else content
            place.pop(key) if value is ... else place.update({key: value})
            (mine / name).write_text(json.dumps(content))
            try:
                pull(str(mine), tmp_path / "here", ["prompts" if name == "dataset.json" else name.rpartition("/")[0]])
                brought += 1
            except (DataError, MismatchError) as error:
                assert "\n" not in str(error)
                refused += 1
            shutil.rmtree(tmp_path / "here", ignore_errors=True)
        (mine / name).write_text(text)
    assert refused > 200 and brought > 100


def test_what_a_hostile_dataset_says_does_not_paint_the_terminal(mine: Path, tmp_path: Path, run_cli: Run) -> None:
    content = json.loads((mine / "dataset.json").read_text())
    content["prompt_set"]["rows"] = {"\x1b[2J": "x"}
    (mine / "dataset.json").write_text(json.dumps(content))
    done = run_cli("pull", mine, tmp_path / "here")
    assert (done.returncode, done.stdout) == (3, "") and "\x1b" not in done.stderr
    assert "dataset.json: key 'prompt_set.rows.\\u001b[2J' is missing or wrong" in done.stderr


@pytest.mark.parametrize("name", ["pairs", "pairs/round-000", f"{PAIRS}/_manifest", "prompts", "dataset.json"])
def test_links_that_lead_out_of_the_target_are_not_followed(name: str, folder: Path, tmp_path: Path) -> None:
    target, outside = tmp_path / "here", tmp_path / "outside"
    (target / name).parent.mkdir(parents=True)
    outside.mkdir()
    (target / name).symlink_to(outside / "file" if name.endswith(".json") else outside)
    with pytest.raises(MismatchError, match="a link that leads out of the dataset"):
        pull(str(folder), target)
    assert files_of(outside) == {} and [p.name for p in target.iterdir()] == [name.split("/")[0]]
    with pytest.raises(MismatchError, match="a link that leads out of the dataset"):
        push(folder, str(target))
    assert files_of(outside) == {}


# --- secrets --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_secret_leaves_the_environment_or_the_url(
    folder: Path, tmp_path: Path, storage: dict[str, str], hub: FakeHub, run_cli: Run
) -> None:
    environment = {**os.environ, **storage, **hub.environment, **CANARIES}
    host = storage["AWS_ENDPOINT_URL"].removeprefix("http://")
    place = f"{bucket()}/data"
    output = []
    for n, to in enumerate([place, str(tmp_path / "theirs"), "hf://datasets/ann/data"]):
        for command in (["push", folder, to], ["pull", to, tmp_path / f"here-{n}"]):
            done = run_cli(*command, env=environment)
            assert done.returncode == 0, done.stderr
            output.append(done.stdout + done.stderr)
    for command, code in [
        (["push", folder, f"ftp://ann:{PASSWORD}@127.0.0.1:9/data"], 69),
        (["push", folder, f"hf://datasets/ann:{PASSWORD}@x/y"], 2),
        (["pull", f"http://ann:{PASSWORD}@127.0.0.1:9/data?token={PASSWORD}", tmp_path / "none"], 69),
        (["pull", f"http://ann:{PASSWORD}@{host}/data?token={PASSWORD}", tmp_path / "none"], 3),
    ]:
        done = run_cli(*command, env=environment)
        assert done.returncode == code, done.stderr
        output.append(done.stdout + done.stderr)
    written = [*files_of(tmp_path).values(), *stored(place).values(), *hub.repos["ann/data"].files.values()]
    written += [text.encode() for text in output]
    for canary in (*CANARIES.values(), PASSWORD):
        assert not [data for data in written if canary.encode() in data]


# --- killed at any time ---------------------------------------------------------------------------------------------


def exchange(arguments: list[str], environment: dict[str, str], point: str | None, passes: int) -> None:
    """In a child: a command, SIGKILLed at the `passes`-th time that it comes to a point."""
    os.environ.update(environment)
    lock, left, put = threading.Lock(), passes, RemotePath.put

    def act(reached: str) -> None:
        nonlocal left
        with lock:
            left -= reached == point
            if reached == point and left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def put_(path: RemotePath, file: Path) -> None:
        act("before put")
        put(path, file)
        act("after put")

    RemotePath.put = put_  # type: ignore[method-assign]
    sys.stderr = sys.stdout = open(os.devnull, "w")
    sys.argv = ["dpkd-offline", *arguments]
    with at_every_point(act):
        cli.main()


def run(arguments: list[object], environment: dict[str, str], point: str | None = None, passes: int = 0) -> int | None:
    process = FORKS.Process(target=exchange, args=([str(a) for a in arguments], environment, point, passes))
    process.start()
    process.join(120)
    return process.exitcode


INTO_FOLDER = [("half written", 0), ("before fsync", 9), ("before rename", 20), ("before folder fsync", 43)]
INTO_STORAGE = [("before put", 0), ("after put", 6), ("before put", 31), ("after put", 43)]
OUT_OF_EITHER = [("half written", 0), ("before link", 7), ("before fsync", 20), ("before rename", 0)]


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["folder", "s3"])
def test_what_is_killed_goes_on_to_the_same(
    protocol: str, folder: Path, tmp_path: Path, storage: dict[str, str]
) -> None:
    whole = files_of(folder)
    points = {"folder": INTO_FOLDER, "s3": INTO_STORAGE}[protocol]
    for n, (point, passes) in enumerate(points):
        place = f"{bucket()}/data" if protocol == "s3" else str(tmp_path / f"theirs-{n}")
        assert run(["push", folder, place], storage, point, passes) == -signal.SIGKILL, (point, passes)
        files = stored(place)
        for name in files:  # whatever is committed is there
            data = name.replace("_manifest/", "").replace(".json", ".parquet")
            assert "/_manifest/" not in name or name.endswith(".tmp") or files[data] == whole[data]
        assert "README.md" not in files
        assert run(["push", folder, place], storage) == 0
        assert stored(place) == whole
    for n, (point, passes) in enumerate(OUT_OF_EITHER):
        target = tmp_path / f"here-{n}"
        assert run(["pull", place, target], storage, point, passes) == -signal.SIGKILL, (point, passes)
        assert not (target / "README.md").exists()
        assert run(["pull", place, target], storage) == 0
        assert files_of(target) == whole
