from __future__ import annotations

import base64
import json
import os
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.fake_server import BOMB
from helpers.memory import in_memory
from helpers.tiny import files_of

from dpkd_offline.common.errors import DataError, DpkdError, MismatchError, UnavailableError, UsageError
from dpkd_offline.common.locations import RemotePath, located
from dpkd_offline.config.base import redacted_dict
from dpkd_offline.config.data import GenerateConfig
from dpkd_offline.config.recipe import read_recipe, validated
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.curation.inspect import inspect
from dpkd_offline.curation.verify import verify
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.pipeline.stages import plan
from dpkd_offline.prompts.sources import read_rows, read_texts
from dpkd_offline.training.examples import pair_stream
from dpkd_offline.training.trainer import train

PASSWORD, TOKEN = "pa-55-word", "to-ken-7"


def train_config(dataset: object, **changes: object) -> TrainConfig:
    return TrainConfig.model_validate(
        {"dataset": dataset, "student": "s", "output": "o", "seed": 3, "holdout": 0.0, **changes}
    )


class Server(SimpleHTTPRequestHandler):
    """Files of a folder, for who knows the password, listed as a web server does."""

    def do_GET(self) -> None:
        known = base64.b64encode(f"ann:{PASSWORD}".encode()).decode()
        if self.headers.get("Authorization") == f"Basic {known}":
            super().do_GET()
        else:
            self.send_error(401)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Host and port of a server of a folder."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def folder(datasets_by_family: dict[str, Path]) -> Path:
    return datasets_by_family["gpt2"]


@pytest.mark.parametrize("protocol", ["memory", "file", "http", "chained"])
def test_a_dataset_at_a_url_is_the_one_in_the_folder(folder: Path, protocol: str) -> None:
    def contents(dataset: object) -> tuple[object, ...]:
        config = train_config(dataset)
        stream, round = pair_stream(Dataset.open(config.dataset), config, 10**6)
        return list(islice(stream.batches(5), 12)), round, verify(config.dataset).rows, inspect(config.dataset)

    with served(folder) as host:
        url = {
            "memory": in_memory(folder, "same"),
            "file": f"file://{folder}/",
            "http": f"http://ann:{PASSWORD}@{host}",
            "chained": f"simplecache::file://{folder}",
        }[protocol]
        assert contents(url) == contents(folder)


def test_a_shard_is_fetched_once_to_be_hashed_and_parsed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    read = RemotePath.read_bytes
    monkeypatch.setattr(RemotePath, "read_bytes", lambda path, limit: (fetched.append(path.name), read(path, limit))[1])
    pair_stream(Dataset.open(located(in_memory(folder, "once"))), train_config(folder), 10**6)
    assert sorted(fetched) == sorted(
        [
            "dataset.json",
            "_table.json",
            *(f"pairs-{n:05d}-of-00003.{kind}" for n in range(3) for kind in ("json", "parquet")),
        ]
    )


def test_a_changed_byte_of_a_remote_shard_is_named(folder: Path) -> None:
    url, name = in_memory(folder, "flipped"), "pairs/round-000/pairs-00001-of-00003.parquet"
    files = fsspec.filesystem("memory")
    data = bytearray(files.cat_file(f"/flipped/{name}"))
    data[len(data) // 2] ^= 1
    files.pipe_file(f"/flipped/{name}", bytes(data))
    with pytest.raises(MismatchError) as error:
        pair_stream(Dataset.open(located(url)), train_config(url), 10**6)
    assert str(error.value).startswith(f"{url}/{name}: its sha256 is not the one in {url}/")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("dataset.json", "memory://lacks/dataset.json: no such file"),
        ("pairs/round-000/pairs-00002-of-00003.parquet", "pairs-00002-of-00003.parquet: no such file"),
        ("pairs/round-000/_manifest/pairs-00000-of-00003.json", "pairs-00000-of-00003.parquet: not committed (1 of 3"),
        ("pairs", "memory://lacks/pairs: no pairs yet"),
    ],
)
def test_what_a_remote_dataset_lacks_is_named(folder: Path, lost: str, message: str) -> None:
    url = in_memory(folder, "lacks")
    fsspec.filesystem("memory").rm(f"/lacks/{lost}", recursive=True)
    with pytest.raises(DataError) as error:
        pair_stream(Dataset.open(located(url)), train_config(url), 10**6)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("abfs://box/data", UnavailableError, "abfs://box/data/dataset.json: a package is missing: Install adlfs"),
        ("nonsense://box/data", UsageError, "nonsense://box/data/dataset.json: unknown protocol 'nonsense'"),
        ("http://127.0.0.1:9/data", UnavailableError, "http://127.0.0.1:9/data/dataset.json: cannot be reached: "),
        ("memory://nowhere", DataError, "memory://nowhere/dataset.json: no such file"),
    ],
)
def test_what_cannot_be_reached_is_said_in_a_line(url: str, error: type[DpkdError], message: str) -> None:
    with pytest.raises(error) as caught:
        Dataset.open(located(url))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_server_that_does_not_answer_is_not_an_absent_file() -> None:
    for asked in (RemotePath.exists, RemotePath.is_dir, RemotePath.size, lambda path: next(path.iterdir())):
        with pytest.raises(UnavailableError, match="cannot be reached"):
            asked(RemotePath("http://127.0.0.1:9/data"))


class Endless(SimpleHTTPRequestHandler):
    """A file that never ends, or one that is unpacked into far more, whatever range is asked for."""

    def do_GET(self) -> None:
        self.send_response(206 if "endless" in self.path else 200)
        if "bomb" in self.path:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        with suppress(OSError):
            for _ in range(1 if "bomb" in self.path else 1 << 14):  # 1 GiB
                self.wfile.write(BOMB if "bomb" in self.path else b" " * 65536)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def test_no_more_of_a_server_is_held_than_was_asked_for() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, message in (("endless", "dataset.json: longer than"), ("bomb", "dataset.json: not UTF-8 text")):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with pytest.raises(DataError, match=message):
                Dataset.open(located(f"http://127.0.0.1:{server.server_port}/{name}"))
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB
        server.shutdown()


def test_a_refusing_server_is_no_absent_file_and_no_secret_is_said(folder: Path) -> None:
    with served(folder) as host:
        for url in (f"http://ann:wrong-{PASSWORD}@{host}", f"http://{host}/?token={TOKEN}"):
            with pytest.raises(UnavailableError) as error:
                Dataset.open(located(url))
            assert str(error.value) == f"http://{host}/dataset.json: cannot be reached: ClientResponseError"


@pytest.mark.parametrize(
    ("url", "shown", "name"),
    [
        ("s3://bucket/my-data", "s3://bucket/my-data", "my-data"),
        ("s3://bucket", "s3://bucket", "bucket"),
        (f"ftp://ann:{PASSWORD}@host/my-data/", "ftp://host/my-data", "my-data"),
        (f"ftp://ann:{PASSWORD}#?@host/my-data", "ftp://host/my-data", "my-data"),
        (f"https://host/x.jsonl?token={TOKEN}", "https://host/x.jsonl", "x.jsonl"),
        (f"simplecache::ftp://{TOKEN}@host/my-data", "simplecache::ftp://host/my-data", "my-data"),
        ("hf://datasets/team/my-data@main", "hf://datasets/team/my-data@main", "my-data@main"),
    ],
)
def test_a_url_shows_nothing_that_it_should_not(url: str, shown: str, name: str) -> None:
    path = RemotePath(url)
    assert (str(path), path.name, path.secret) == (shown, name, url.rstrip("/") != shown)
    assert str(path / "pairs") == f"{shown}/pairs" and repr(path) == f"RemotePath('{shown}')"
    config = train_config(url, lm_corpus=url)
    assert (redacted_dict(config)["dataset"], redacted_dict(config)["lm_corpus"]) == (name, name)
    assert config.model_dump(mode="json")["dataset"] == shown
    assert PASSWORD not in repr(config) + config.model_dump_json() and TOKEN not in repr(config)


def test_a_password_that_would_be_cut_in_two_is_refused_unsaid() -> None:
    with pytest.raises(UsageError, match="write it as %2F") as error:
        validated(TrainConfig, {"dataset": f"s3://key:a/{PASSWORD}@bucket/d", "student": "s", "output": "o"})
    assert PASSWORD not in str(error.value)


def test_what_is_written_lies_on_this_machine(run_cli: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    for place in ("s3://bucket/data", Path("s3://bucket/data"), "simplecache::s3://bucket/data"):
        with pytest.raises(UsageError, match="'dataset': a folder on this machine is needed"):
            validated(GenerateConfig, {"dataset": place, "role": "teacher", "model": "m"})
    shown = run_cli("score-teacher", "--dataset", f"s3://ann:{PASSWORD}@bucket/data", "--model", "m")
    assert shown.returncode == 2 and PASSWORD not in shown.stderr
    assert shown.stderr == (
        "dpkd-offline: 'dataset': a folder on this machine is needed; from URLs there is only reading\n"
    )


def test_distill_keeps_no_secret_in_its_settings(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    corpus = f"https://ann:{PASSWORD}@host/corpus.jsonl"
    values = {"teacher": "t", "student": "s", "output": str(tmp_path), "generate": {}, "train": {"lm_corpus": corpus}}
    recipe.write_text(json.dumps(values))
    with pytest.raises(UsageError, match=r"'train.lm_corpus': https://host/corpus.jsonl with a user") as error:
        plan(read_recipe(recipe), recipe)
    assert PASSWORD not in str(error.value)


def test_texts_at_a_url(tmp_path: Path) -> None:
    texts = [f"text {n} " * 500 for n in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:20]))
    pq.write_table(pa.table({"text": texts[20:]}), tmp_path / "b.parquet")
    url = in_memory(tmp_path, "texts")
    assert list(read_texts(located(url))) == texts
    assert list(read_texts(located(f"file://{tmp_path}/b.parquet"))) == texts[20:]
    (tmp_path / "c.jsonl").write_text('{"text": 1}\n{')
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    url = in_memory(tmp_path, "texts")
    for name, message in {
        "c.jsonl": r"c.jsonl:1: column 'text' must be a string",
        "d.parquet": "d.parquet: not a readable Parquet file",
        "e.jsonl": "e.jsonl: no such file",
        "e.parquet": "e.parquet: no such file",
        "e": "memory://texts/e: no such file",
    }.items():
        with pytest.raises(DataError, match=message):
            list(read_texts(located(f"{url}/{name}")))
    with pytest.raises(UnavailableError, match="cannot be reached"):
        list(read_rows(located("http://127.0.0.1:9/x.parquet")))


@pytest.mark.slow
def test_training_from_a_url_equals_training_from_the_folder(
    folder: Path, students: dict[str, Path], tmp_path: Path, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    settings = {"student": str(students["gpt2"]), "max_steps": 2, "batch_size": 4, "dtype": "float32"}
    train(TrainConfig.model_validate({"dataset": folder, "output": tmp_path / "local" / "out", **settings}))
    shutil.copytree(folder, tmp_path / "served" / "my-data")
    flags = [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", value)]
    with served(tmp_path / "served") as host:
        for name, url in {
            "file": f"file://{folder}",
            "http": f"http://ann:{PASSWORD}@{host}/my-data?token={TOKEN}",
        }.items():
            output = tmp_path / name / "out"
            shown = run_cli("train", "--dataset", url, "--output", output, *flags)
            assert shown.returncode == 0, shown.stderr
            assert files_of(output)["model.safetensors"] == files_of(tmp_path / "local" / "out")["model.safetensors"]
            written = b"".join(files_of(tmp_path / name).values()) + os.fsencode(shown.stdout + shown.stderr)
            assert PASSWORD.encode() not in written and TOKEN.encode() not in written and host.encode() not in written
