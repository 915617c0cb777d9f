"""The http engine against servers that misbehave: the result of a calm run, or one line that says what is wrong."""

from __future__ import annotations

import base64
import json
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_server import BODIES, BROKEN, EOS, WRONG, FakeServer, serving
from helpers.tiny import command_line, files_of, generate_config, rows, score_config, write_jsonl

from dpkd_offline.common.errors import DpkdError, MismatchError, UnavailableError, UsageError
from dpkd_offline.config.base import ModelOptions, SamplingOptions
from dpkd_offline.config.evaluate import EvaluateConfig
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.engines import server_pool
from dpkd_offline.engines.base import GenerateRequest, ScoreRequest
from dpkd_offline.engines.factory import choose_engine, load_engine
from dpkd_offline.engines.http import HttpEngine
from dpkd_offline.evaluation.evaluate import evaluate
from dpkd_offline.generation.generate import generate
from dpkd_offline.generation.score_teacher import score_teacher
from dpkd_offline.models.info import ModelInfo

FAST = {"PATIENCE": 0.5, "BACKOFF": 0.005, "LONGEST_BACKOFF": 0.02, "POLL": 0.005}
MALFORMED = [*WRONG, "JSON cut off", "empty body", "HTML with 200", "JSON of something else"]
SAMPLING = SamplingOptions(max_new_tokens=12)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FAST.items():
        monkeypatch.setattr(server_pool, name, value)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


@pytest.fixture
def model(teachers: dict[str, Path]) -> Path:
    return teachers["llama"]


@pytest.fixture
def fake(model: Path) -> Callable[[], FakeServer]:
    tokenizer = ModelInfo(str(model)).tokenizer
    return lambda: FakeServer(tokenizer)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", rows(60))


def stages(dataset: Path, source: Path, model: Path, url: Sequence[str]) -> None:
    shared = {"engine": "http", "url": tuple(url), "concurrency": 8}
    generate(generate_config(dataset, "teacher", model, prompts=str(source), **shared))
    generate(generate_config(dataset, "student", model, **shared))
    score_teacher(score_config(dataset, model, top_k=2, max_length=255, **shared))


def parquet(dataset: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_of(dataset).items() if name.endswith(".parquet")}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, many: Path, teachers: dict[str, Path]) -> dict[str, bytes]:
    """The tables of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("calm") / "ds"
    with serving(FakeServer(ModelInfo(str(teachers["llama"])).tokenizer)) as url:
        stages(folder, many, teachers["llama"], url)
    return parquet(folder)


def plan_of_faults(body: dict[str, Any]) -> Iterator[str]:
    """A few faults for each request, the same on every run; fewer wrong answers than the engine bears."""
    draw = random.Random(json.dumps(body))
    wrong = 0
    for _ in range(draw.randint(2, 6)):
        kinds = list(BROKEN) if "GET" in body or ("prompt" in body and "max_tokens" not in body) else [*BROKEN, *WRONG]
        kind = draw.choice(kinds)
        wrong += kind in MALFORMED
        if kind not in MALFORMED or wrong < server_pool.MALFORMED_TRIES:
            yield kind


def make_faulty(*servers_of_a_model: FakeServer) -> None:
    plans: dict[str, Iterator[str]] = {}
    lock = threading.Lock()

    def next_fault(body: dict[str, Any]) -> str | None:
        with lock:
            return next(plans.setdefault(json.dumps(body), plan_of_faults(body)), None)

    for server in servers_of_a_model:
        server.faults = next_fault


@pytest.mark.slow
def test_no_fault_of_a_server_changes_a_result(
    tmp_path: Path,
    calm: dict[str, bytes],
    many: Path,
    model: Path,
    fake: Callable[[], FakeServer],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(server_pool, "TIMEOUT", 0.5)
    monkeypatch.setattr(server_pool, "PATIENCE", 60.0)
    two = [fake(), fake()]
    make_faulty(*two)
    with serving(*two) as url:
        stages(tmp_path / "ds", many, model, url)
    counts: Counter[str] = sum((server.fault_counts for server in two), Counter())
    with capsys.disabled():
        print(f"\n{counts.total()} faults of {len(counts)} kinds, and every table as without them:")
        print("\n".join(f"{count:6} {kind}" for kind, count in sorted(counts.items())))
    assert counts.total() >= 500
    assert counts.keys() == BROKEN.keys() | WRONG.keys()
    assert parquet(tmp_path / "ds") == calm


# --- ends -------------------------------------------------------------------------------------------------------------


def options(url: Sequence[str], **changes: object) -> ModelOptions:
    return ModelOptions.model_validate({"engine": "http", "url": tuple(url), "max_length": 200, **changes})


def requests(count: int = 20, shard: int = 0) -> list[GenerateRequest]:
    return [GenerateRequest((shard, n), [7, 8, 9 + n], seed=n) for n in range(count)]


def closed_port() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{taken.getsockname()[1]}"


def check_end(error: DpkdError, code: int, *parts: str) -> None:
    assert error.exit_code == code
    assert "\n" not in str(error)
    for part in parts:
        assert part in str(error)


def test_a_dead_server(model: Path) -> None:
    port = closed_port()
    with pytest.raises(UnavailableError) as caught:
        load_engine(ModelInfo(str(model)), options([f"http://me:secret@{port}/v1"]))
    check_end(caught.value, 69, f"http://{port}: no good answer for 0 s: All connection attempts failed")
    assert "secret" not in str(caught.value)


def patched_command(*arguments: object) -> list[str]:
    """A command in a process of its own, with the impatience of these tests."""
    patches = ";".join(f"server_pool.{name} = {value}" for name, value in FAST.items())
    code = f"from dpkd_offline.engines import server_pool; from dpkd_offline.cli import main; {patches}; main()"
    return [sys.executable, "-c", code, *map(str, arguments)]


def test_a_command_ends_with_one_line(tmp_path: Path, many: Path, model: Path) -> None:
    arguments = ["generate", "--dataset", tmp_path / "ds", "--role", "teacher", "--model", model, "--prompts", many]
    end = ["--url", f"http://{closed_port()}", "--max-length", 255, "--max-new-tokens", 12]
    done = subprocess.run(patched_command(*arguments, *end), capture_output=True, text=True, timeout=300)
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("prompts:", "engine:"))]
    assert (done.returncode, done.stdout, len(lines)) == (69, "", 1), done.stderr
    assert "no good answer" in lines[0]
    assert not (tmp_path / "ds").exists()


def test_a_server_that_dies_leaves_whole_shards_and_another_goes_on(
    tmp_path: Path, calm: dict[str, bytes], many: Path, model: Path, fake: Callable[[], FakeServer]
) -> None:
    config = generate_config(
        tmp_path / "ds", "teacher", model, prompts=str(many), engine="http", url=("http://x",), concurrency=4
    )
    dying = fake()
    dying.die_after = 35
    with serving(dying) as url, pytest.raises(UnavailableError) as caught:
        generate(config.model_copy(update={"url": url}))
    check_end(caught.value, 69, dying.url, "no good answer for")
    committed = Dataset.open(tmp_path / "ds").responses("teacher", 0).entries()
    assert 2 <= len(committed) <= 4
    with serving(fake()) as url:
        stages(tmp_path / "ds", many, model, url)
    assert parquet(tmp_path / "ds") == calm


def test_one_of_two_servers_dies_and_the_other_finishes(
    tmp_path: Path,
    calm: dict[str, bytes],
    many: Path,
    model: Path,
    fake: Callable[[], FakeServer],
    capsys: pytest.CaptureFixture[str],
) -> None:
    dying, other = fake(), fake()
    dying.die_after = 30
    with serving(dying, other) as url:
        generate(
            generate_config(tmp_path / "ds", "teacher", model, prompts=str(many), engine="http", url=url, concurrency=4)
        )
    assert parquet(tmp_path / "ds/responses/teacher").items() <= {Path(k).name: v for k, v in calm.items()}.items()
    assert f"engine: {dying.url}: " in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["wrong echo", "log-prob -9999", "HTML with 200"])
def test_an_answer_that_stays_wrong(
    kind: str, model: Path, fake: Callable[[], FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_pool, "PATIENCE", 1e9)
    server = fake()
    with serving(server) as url:
        engine = load_engine(ModelInfo(str(model)), options(url))
        server.faults = lambda body: kind
        with pytest.raises(UnavailableError) as caught:
            list(engine.generate([requests()], SAMPLING))
        engine.close()
    why = {"wrong echo": "it is of another prompt", "log-prob -9999": "log-prob -9999.0 of", "HTML with 200": "JSON"}
    check_end(caught.value, 69, server.url, "a wrong answer: ", why[kind], "(4 times)")


@pytest.mark.parametrize(
    ("status", "code", "parts"),
    [
        (400, 2, ["refuses the request: the server is not well"]),
        (401, 69, ["HTTP 401", "VLLM_API_KEY"]),
        (404, 69, ["HTTP 404: the server is not well"]),
    ],
)
def test_refusals_end_at_once(
    status: int,
    code: int,
    parts: list[str],
    model: Path,
    fake: Callable[[], FakeServer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from helpers.fake_server import error

    monkeypatch.setitem(BROKEN, "refusal", error(status))
    monkeypatch.setattr(server_pool, "PATIENCE", 1e9)
    server = fake()
    with serving(server) as url:
        engine = load_engine(ModelInfo(str(model)), options(url))
        server.faults = lambda body: "refusal"
        with pytest.raises(DpkdError) as caught:
            list(engine.generate([requests()], SAMPLING))
        engine.close()
    check_end(caught.value, code, server.url, *parts)


@pytest.mark.parametrize("body", BODIES)
def test_no_body_is_held_beyond_a_bound(
    body: str, model: Path, fake: Callable[[], FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BROKEN, body, BODIES[body])
    monkeypatch.setattr(server_pool, "SHORT_ANSWER", 1 << 20)
    server, held = fake(), Counter[str]()
    content = server_pool._content

    async def counted(*arguments: Any, **options: Any) -> bytes:
        data = await content(*arguments, **options)
        held["most"] = max(held["most"], len(data))
        return data

    monkeypatch.setattr(server_pool, "_content", counted)
    with serving(server) as url:
        engine = load_engine(ModelInfo(str(model)), options(url))
        server.faults = lambda asked: body
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(UnavailableError) as caught:
            list(engine.generate([requests()[:2]], SAMPLING))
        engine.close()
    check_end(caught.value, 69, server.url)
    assert len(str(caught.value)) < 500
    assert held["most"] <= 8 << 20 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


def test_a_server_that_echoes_what_it_was_sent_tells_no_secret(
    model: Path, fake: Callable[[], FakeServer], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def echo(handler: Any) -> None:
        sent = handler.headers["Authorization"]
        handler.send(400, {"error": f"who sends {sent} {'x' * 400} \x1b[31m?"})

    monkeypatch.setitem(BROKEN, "echo", echo)
    for key in ("", "a-key-of-mine-77"):
        monkeypatch.setenv("VLLM_API_KEY", key)
        server = fake()
        with serving(server) as (url,):
            host = url.removeprefix("http://")
            engine = load_engine(ModelInfo(str(model)), options([f"http://ann:pa%20ss-w0rd@{host}"]))
            server.faults = lambda asked: "echo"
            with pytest.raises(UsageError) as caught:
                list(engine.generate([requests()[:2]], SAMPLING))
            engine.close()
        said = str(caught.value) + capsys.readouterr().err
        assert "who sends B" in said and "***" in said and "\x1b" not in said
        for secret in ("pa ss-w0rd", "pa%20ss-w0rd", base64.b64encode(b"ann:pa ss-w0rd").decode(), "a-key-of-mine-77"):
            assert secret not in said


def test_no_request_follows_to_another_place(
    model: Path, fake: Callable[[], FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, other = fake(), fake()
    with serving(server, other) as (url, elsewhere):
        engine = load_engine(ModelInfo(str(model)), options([url]))
        move = {"Location": f"{elsewhere}/v1/completions"}
        monkeypatch.setitem(BROKEN, "moved", lambda handler: handler.send(307, "", move))
        server.faults = lambda asked: "moved"
        with pytest.raises(UnavailableError, match="HTTP 307"):
            list(engine.generate([requests()[:2]], SAMPLING))
        engine.close()
    assert not other.completions


def test_a_key_that_no_header_can_hold_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "schlüssel")
    with pytest.raises(UsageError, match="VLLM_API_KEY: a key of printable ASCII"):
        server_pool.ServerPool(["http://127.0.0.1:9"], 1)


def test_sigterm_ends_a_run_that_waits(tmp_path: Path, many: Path, model: Path, fake: Callable[[], FakeServer]) -> None:
    server = fake()
    asked = threading.Event()

    def hold(body: dict[str, Any]) -> None:
        if server.completions > 20:
            asked.set()
            server.gate.clear()

    server.faults = hold
    with serving(server) as url:
        where = ["--dataset", tmp_path / "ds", "--role", "teacher", "--model", model, "--prompts", many]
        how = ["--url", *url, "--max-length", 255, "--max-new-tokens", 12, "--shard-size", 4, "--concurrency", 4]
        with subprocess.Popen(command_line("generate", *where, *how), stderr=subprocess.PIPE, text=True) as process:
            assert asked.wait(120)
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)  # a request would wait for minutes
    lines = [line for line in errors.splitlines() if not line.startswith(("prompts:", "engine:", "generate"))]
    assert process.returncode == 75
    assert lines == ["dpkd-offline: stopped by SIGTERM; the same command goes on from what is committed"]
    assert Dataset.open(tmp_path / "ds").responses("teacher", 0).entries()


# --- the start --------------------------------------------------------------------------------------------------------


def start(model: Path, *servers: FakeServer, **changes: object) -> HttpEngine:
    with serving(*servers) as url:
        engine = load_engine(ModelInfo(str(model)), options(url, **changes))
        engine.close()
    assert isinstance(engine, HttpEngine)
    return engine


def test_servers_must_agree_and_hold_the_model(model: Path, fake: Callable[[], FakeServer]) -> None:
    one, other = fake(), fake()
    other.version = "0.33.0"
    with pytest.raises(MismatchError, match="give servers of one model and version") as caught:
        start(model, one, other)
    check_end(caught.value, 4, one.url, "vLLM 0.33.0")

    other = fake()
    other.models[0]["id"] = "another"
    with pytest.raises(MismatchError, match="serves another"):
        start(model, fake(), other)

    other = fake()
    other.tokenizer.add_tokens(["two  spaces"])
    with pytest.raises(MismatchError, match="its tokenizer is not that of"):
        start(model, other)


def test_log_probs_must_be_those_at_temperature_1(model: Path, fake: Callable[[], FakeServer]) -> None:
    other = fake()
    other.offset = -2.0
    with pytest.raises(MismatchError, match=r"2\.0 nats a token .*--logprobs-mode raw_logprobs"):
        start(model, other)


def test_the_model_is_found_among_several(model: Path, fake: Callable[[], FakeServer]) -> None:
    server = fake()
    server.models = [{"id": "a", "root": "/models/a"}, {"id": "b", "root": str(model), "max_model_len": 256}]
    assert start(model, server).versions == {"vllm": "0.32.0", "served": "llama"}
    server = fake()
    server.models = [{"id": "a", "root": "/models/a"}, {"id": "b", "root": "/models/b"}]
    with pytest.raises(UnavailableError, match=r"serves a, b, and none of them is --model"):
        start(model, server)


def test_sequences_that_a_server_cannot_take_are_refused(model: Path, fake: Callable[[], FakeServer]) -> None:
    server = fake()
    server.models[0]["max_model_len"] = 200
    with pytest.raises(UsageError, match=r"takes 200 tokens.*give --max-length 199"):
        start(model, server, max_length=200)
    server = fake()
    server.models[0]["max_model_len"] = 200
    start(model, server, max_length=199)


def test_a_server_without_tokenize_or_version_says_so(
    model: Path, fake: Callable[[], FakeServer], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from helpers.fake_server import error

    monkeypatch.setitem(BROKEN, "absent", error(404))
    server = fake()
    server.faults = lambda body: None if "max_tokens" in body or body.get("GET") == "/v1/models" else "absent"
    assert start(model, server).versions["vllm"] == "unknown"
    assert "has no /tokenize" in capsys.readouterr().err


def test_choosing_the_engine() -> None:
    assert choose_engine("auto", ("http://x",)) == choose_engine("http", ("http://x",)) == "http"
    with pytest.raises(UsageError, match="needs --url"):
        choose_engine("http")
    with pytest.raises(UsageError, match="--url is for engine 'http', not 'vllm'"):
        choose_engine("vllm", ("http://x",))


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://x:y"])
def test_what_is_no_url(url: str, model: Path) -> None:
    with pytest.raises(UsageError, match="--url"):
        load_engine(ModelInfo(str(model)), options([url]))


def test_a_folder_without_weights_is_the_same_model_every_time(tmp_path: Path, model: Path) -> None:
    assert ModelInfo(str(model)).identity["revision"].startswith("sha256:")
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    assert ModelInfo(str(tmp_path)).identity == ModelInfo(str(tmp_path)).identity
    assert ModelInfo(str(tmp_path)).identity["revision"].startswith("config:")


# --- the work ---------------------------------------------------------------------------------------------------------


def test_requests_are_shared_evenly_and_groups_taken_as_there_is_room(
    model: Path, fake: Callable[[], FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "the-key")
    two, taken = [fake(), fake()], []

    def groups() -> Iterator[list[GenerateRequest]]:
        for shard in range(20):
            taken.append(shard)
            yield requests(10, shard)

    def open_gates_when_all_are_busy() -> None:
        deadline = time.monotonic() + 60
        while min(server.in_flight for server in two) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        for server in two:
            server.gate.set()

    with serving(*two) as url:
        engine = load_engine(ModelInfo(str(model)), options(url, concurrency=3))
        results = engine.generate(groups(), SAMPLING)
        for server in two:
            server.gate.clear()
        threading.Thread(target=open_gates_when_all_are_busy).start()
        first, _ = next(results)
        assert taken == [0]
        keys = [first, *(key for key, _ in results)]
        engine.close()
    assert sorted(keys) == [(shard, row) for shard in range(20) for row in range(10)]
    assert [server.peak for server in two] == [3, 3]
    assert min(server.completions for server in two) > 60
    assert {header["Authorization"] for server in two for header in server.headers} == {"Bearer the-key"}


def test_a_server_gets_as_many_requests_as_it_says_that_it_runs(
    model: Path, fake: Callable[[], FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that runs 150 and one that does not say; with a number of the user's neither is asked."""
    monkeypatch.setattr(server_pool, "WATCH", 0.05)
    monkeypatch.setattr(server_pool, "IN_FLIGHT", 16)
    monkeypatch.setattr(server_pool, "MORE", 16)
    for concurrency, at_least, at_most in ((None, 150, 182), (20, 20, 20)):
        telling, silent = fake(), fake()
        telling.runs = 150

        def open_gates(telling: FakeServer = telling, silent: FakeServer = silent, at_least: int = at_least) -> None:
            deadline = time.monotonic() + 60
            while telling.in_flight < at_least and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.3)  # in which it would get more, if what waits did not count
            for server in (telling, silent):
                server.gate.set()

        with serving(telling, silent) as url:
            engine = load_engine(ModelInfo(str(model)), options(url, concurrency=concurrency))
            results = engine.generate([requests(400)], SAMPLING)
            for server in (telling, silent):
                server.gate.clear()
            threading.Thread(target=open_gates).start()
            assert len(dict(results)) == 400
            engine.close()
        assert at_least <= telling.peak <= at_most
        assert silent.peak == (concurrency or 16)


def test_the_limit_follows_what_runs_and_waits() -> None:
    server = server_pool.Server("http://x")
    server.in_flight = 64
    for running, waiting, most, limit in (
        (30, 0, 4096, 64),  # most of them are on their way
        (64, 0, 4096, 128),
        (64, 0, 4096, 128),  # it does not have 128 yet
        (100, 10, 4096, 128),
        (100, 33, 4096, 64),
        (10, 54, 4096, 64),  # no fewer than at first
        (64, 0, 100, 100),  # files that may be open
    ):
        server.adapt(running, waiting, most)
        assert server.limit == limit, (running, waiting)


def test_a_closed_generator_leaves_the_engine_usable(model: Path, fake: Callable[[], FakeServer]) -> None:
    server = fake()
    with serving(server) as url:
        engine = load_engine(ModelInfo(str(model)), options(url))
        results = engine.generate([requests()], SAMPLING)
        next(results)
        results.close()  # type: ignore[attr-defined]
        whole = dict(engine.generate([requests()], SAMPLING))
        engine.close()
    assert len(whole) == 20


def test_the_likeliest_tokens_come_in_their_order(model: Path, fake: Callable[[], FakeServer]) -> None:
    server = fake()
    with serving(server) as url:
        engine = load_engine(ModelInfo(str(model)), options(url))
        ((key, scores),) = engine.score([[ScoreRequest((0, 0), [7, 8], [[5, 6, EOS], [9]])]], top_k=3)
        engine.close()
    assert (key, [len(score.logps) for score in scores]) == ((0, 0), [3, 1])
    expected = [server.entry([7, 8, 5], rank) for rank in (1, 2, 3)]
    assert scores[0].top_ids[1] == [int(token) for token, _ in expected]
    assert scores[0].top_logps[1] == [entry["logprob"] for _, entry in expected]
    assert scores[0].logps[1] == server.logp([7, 8, 5], server.rank([7, 8, 5], 6))


def test_retry_after_keeps_a_server_alone() -> None:
    import httpx2

    for value, seconds in (("7", 7.0), ("", 0.0), ("soon", 0.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0)):
        assert server_pool.retry_after(httpx2.Response(429, headers={"Retry-After": value})) == seconds
    server = server_pool.Server("http://x")
    assert server.ready()
    server.failed(server_pool.Failure("busy", wait=100.0), started=0.0)
    assert not server.ready()


def test_evaluate_asks_the_servers_of_its_model(
    tmp_path: Path, many: Path, model: Path, students: dict[str, Path], fake: Callable[[], FakeServer]
) -> None:
    def config(url: Sequence[str], teacher: Path) -> EvaluateConfig:
        values = {"model": str(model), "teacher": str(teacher), "prompts": str(many), "output": tmp_path / "out"}
        how = {"url": tuple(url), "max_length": 255, "max_new_tokens": 12, "seeds": (1, 2)}
        return EvaluateConfig.model_validate({**values, **how})

    with serving(fake()) as url:
        with pytest.raises(UsageError, match="the servers of --url hold --model; name the teacher's with"):
            evaluate(config(url, students["llama"]))
        results = evaluate(config(url, model)).results
    assert results["reward"]["mean"] == pytest.approx(0, abs=1e-6)
    settings = results["made"]["settings"]
    assert (settings["engine"], settings["dtype"]) == ("http", "server")
    assert "url" not in settings


def test_what_a_table_says_of_its_making(
    tmp_path: Path, many: Path, model: Path, fake: Callable[[], FakeServer]
) -> None:
    with serving(fake()) as url:
        stages(tmp_path / "ds", many, model, url)
    for table in ("responses/teacher", "pairs/round-000"):
        provenance = json.loads((tmp_path / "ds" / table / "_table.json").read_text())
        assert (provenance["engine"], provenance["dtype"]) == ("http", "server")
        assert provenance["config"]["dtype"] == "server"
        assert provenance["versions"] == {"vllm": "0.32.0", "served": "llama"}
        assert "127.0.0.1" not in json.dumps(provenance)
    with pytest.raises(MismatchError, match="dtype=server, this command has dtype=float32"):
        score_teacher(score_config(tmp_path / "ds", model))
