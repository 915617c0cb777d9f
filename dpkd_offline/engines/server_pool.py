"""Requests to servers of one model: a number in flight at each, asked again where they fail, answers checked.

Where the user names no number, vLLM's servers say in /metrics how many requests they run and how many wait: a server
gets more until some wait. Others keep the number that all begin with.

An event loop in a thread of its own talks to the servers; the caller's thread only waits for results, so that a signal
ends it at once.

Each request backs off by itself. A server with a streak of failures rests and is then tried with one request at a time,
while the others work on. When all have done nothing but fail for PATIENCE seconds, the run ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import resource
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from dpkd_offline.common import console
from dpkd_offline.common.errors import DpkdError, UnavailableError, UsageError, first_line
from dpkd_offline.common.secrets import redacted, remember_secrets
from dpkd_offline.common.terminal import in_a_line

KEYS = ("VLLM_API_KEY",)  # environment variables of the key, the first that is set; sent, and never written anywhere
PATIENCE = 60.0  # seconds of failures of every server, without one answer
TIMEOUT = 600.0  # seconds for one answer: a busy server takes minutes for long responses
CONNECT_TIMEOUT = 10.0
BACKOFF, LONGEST_BACKOFF = 0.5, 8.0  # seconds
ASIDE_AFTER = 5  # failures in a row
MALFORMED_TRIES = 4
SHORT_ANSWER = 4 << 20  # bytes of an answer that is not as long as what was asked
LONGEST_MESSAGE = 64 << 10  # bytes that are read of an error
PIECE = 64 << 10  # bytes that are unpacked at once
IN_FLIGHT, MORE = 64, 64  # requests at a server at first, and at a time more or fewer, by what it says
MOST_IN_FLIGHT = 4096
OTHER_FILES = 256  # of those that this process may have open, for other things than connections
WATCH = 1.0  # seconds between looks at what a server says that it runs
GAUGE = re.compile(rb"^vllm:num_requests_(running|waiting)(?:\{.*\})? ([0-9.e+]+)\s*$", re.MULTILINE)
POLL = 0.05  # seconds between looks for a free server, where there is none
RANDOM = random.Random()

J = TypeVar("J")
T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


class Malformed(Exception):
    """A good status, but not an answer to what was asked."""


def parse(model: type[M], content: bytes) -> M:
    """The JSON of an answer, or Malformed."""
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise Malformed(f"{place}: {first['msg']}" if place else first["msg"]) from error


class Failure(Exception):
    """A request that may be asked again; with the seconds that the server wants to be left alone."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Server:
    """One URL, how many requests it may have at once, and how it has been doing."""

    def __init__(self, url: str, limit: int = IN_FLIGHT) -> None:
        self.limit = limit
        remember_secrets(url)
        try:
            self.url = httpx2.URL(url.strip().rstrip("/").removesuffix("/v1"))
        except (httpx2.InvalidURL, UnicodeError) as error:  # which may quote a part of a password
            raise UsageError("--url: not a URL; expected http://HOST:PORT") from error
        if self.url.scheme not in ("http", "https") or not self.url.host or self.url.query or self.url.fragment:
            raise UsageError(f"--url {self}: expected http://HOST:PORT")
        self.in_flight = self.streak = self.rests = 0
        self.rest_until = 0.0
        self.failing_since = 0.0

    def __str__(self) -> str:
        return str(self.url.copy_with(userinfo=b"", query=None, fragment=None))

    def ready(self) -> bool:
        if time.monotonic() < self.rest_until:
            return False
        return self.in_flight < (1 if self.streak >= ASIDE_AFTER else self.limit)

    def adapt(self, running: float, waiting: float, most: int) -> None:
        """More requests where it has all that it may and lets none wait, fewer where many do: a few keep it busy."""
        if waiting > self.limit / 4:
            self.limit = max(IN_FLIGHT, self.limit - MORE)
        elif not waiting and self.in_flight >= self.limit and running >= self.limit / 2:  # the rest is on its way
            self.limit = min(self.limit + MORE, max(most, IN_FLIGHT))

    def succeeded(self) -> None:
        if self.rests:
            console.info(f"engine: {self}: answers again")
        self.streak = self.rests = 0

    def failed(self, failure: Failure, started: float) -> None:
        now = time.monotonic()
        if self.streak == 0:
            self.failing_since = started
        self.streak += 1
        if self.streak >= ASIDE_AFTER and now >= self.rest_until:
            if self.rests == 0:
                console.info(f"engine: {self}: {failure}; asking it less often")
            self.rest_until = now + backoff(self.rests)
            self.rests += 1
        self.rest_until = max(self.rest_until, now + min(failure.wait, PATIENCE))

    def hopeless(self) -> bool:
        failing = self.streak >= ASIDE_AFTER and time.monotonic() - self.failing_since >= PATIENCE
        return failing and self.in_flight == 0


@dataclass(frozen=True)
class ServerRequest(Generic[T]):
    """One request, and what makes a result of its answer or raises Malformed."""

    method: str
    path: str
    check: Callable[[bytes], T]
    body: Mapping[str, Any] | None = None
    server: Server | None = None  # the one that is asked; any by default
    absent: T | None = None  # the result where a server has no such route; by default that is an error
    refused: Callable[[str], T] | None = None  # the result where it finds the request wrong; that, too
    most_bytes: int = SHORT_ANSWER  # that an answer may have, uncompressed


class ServerPool:
    """Servers of one model: any of them may answer a request."""

    def __init__(self, urls: Sequence[str], concurrency: int | None, keys: Sequence[str] = KEYS) -> None:
        """Raises UsageError where a URL is none, or the key that is set in one of the variables `keys`.

        Args:
            concurrency: requests in flight at each; None: as many as it says that it runs.
        """
        self.all = [Server(url, concurrency or IN_FLIGHT) for url in dict.fromkeys(urls)]
        self._adapts, self._keys = concurrency is None, keys
        self._most = min(MOST_IN_FLIGHT, (_open_files() - OTHER_FILES) // len(self.all))
        name, key = next(((name, key) for name in keys if (key := os.environ.get(name, "").strip())), ("", ""))
        if not (key.isascii() and key.isprintable()):
            raise UsageError(f"{name}: a key of printable ASCII characters is needed")
        self._client = httpx2.AsyncClient(
            headers={"Accept-Encoding": "gzip, deflate"} | ({"Authorization": f"Bearer {key}"} if key else {}),
            follow_redirects=False,  # which would take the key along
            timeout=httpx2.Timeout(None, connect=CONNECT_TIMEOUT),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="servers", daemon=True)
        self._thread.start()

    def ask_each(self, request: ServerRequest[T]) -> dict[Server, T]:
        """What each server answers; raises as `stream` does."""
        return dict(self.stream((server, replace(request, server=server)) for server in self.all))

    def stream(self, jobs: Iterable[tuple[J, ServerRequest[T]]]) -> Iterator[tuple[J, T]]:
        """Results as they come; a job is taken when there is room for it.

        Raises:
            UnavailableError: no server answers any more, or one refuses.
            UsageError: a server finds the request wrong.
        """
        waiting, results = iter(jobs), SimpleQueue[tuple[J, Future[T]]]()
        running: set[Future[T]] = set()
        watched = self.all if self._adapts else []
        watches = [asyncio.run_coroutine_threadsafe(self._watch(server), self._loop) for server in watched]

        def done(job: J) -> Callable[[Future[T]], None]:
            return lambda future: results.put((job, future))

        try:
            while True:
                room = sum(server.limit for server in self.all) - len(running)
                for job, request in islice(waiting, max(room, 0)):
                    future = asyncio.run_coroutine_threadsafe(self._answer(request), self._loop)
                    running.add(future)
                    future.add_done_callback(done(job))
                if not running:
                    return
                for watch in watches:
                    if watch.done():
                        watch.result()  # nothing, or what it raised
                try:
                    job, future = results.get(timeout=WATCH)
                except Empty:
                    continue  # there may be room for more
                running.remove(future)
                yield job, future.result()
        finally:
            for future in running:
                future.cancel()
            for watch in watches:
                watch.cancel()

    async def _watch(self, server: Server) -> None:
        """Adapt how many requests a server may have to what it says of them, for as long as it says something."""
        while True:
            await asyncio.sleep(WATCH)
            try:
                async with (
                    asyncio.timeout(CONNECT_TIMEOUT),
                    self._client.stream("GET", f"{server.url}/metrics") as response,
                ):
                    if response.status_code != 200:
                        return
                    content = await _content(response, SHORT_ANSWER, whole=True)
            except (TimeoutError, httpx2.RequestError):
                continue  # whether the server is well shows in its answers
            except Malformed:
                return
            gauges: dict[bytes, float] = {}
            for name, value in GAUGE.findall(content):  # of each engine of the server
                gauges[name] = gauges.get(name, 0.0) + float(value)
            if len(gauges) < 2:
                return
            server.adapt(gauges[b"running"], gauges[b"waiting"], self._most)

    async def _answer(self, request: ServerRequest[T]) -> T:
        servers = [request.server] if request.server else self.all
        tries = malformed = 0
        last: Server | None = None
        while True:
            last = await self._free(servers, avoid=last)
            started = time.monotonic()
            last.in_flight += 1
            try:
                result = await self._ask(last, request)
                last.succeeded()
                return result
            except Failure as error:
                failure = error
                last.failed(failure, started)
            finally:
                last.in_flight -= 1
            malformed += isinstance(failure.__cause__, Malformed)
            if malformed == MALFORMED_TRIES:
                raise UnavailableError(f"{last}: {failure} ({malformed} times)")
            if all(server.hopeless() for server in servers):
                raise UnavailableError(f"{last}: no good answer for {PATIENCE:.0f} s: {failure}")
            await asyncio.sleep(backoff(tries))
            tries += 1

    async def _free(self, servers: Sequence[Server], avoid: Server | None) -> Server:
        """The server with the fewest requests, and after a failure rather another."""
        while True:
            ready = [server for server in servers if server.ready()]
            if ready:
                return min(ready, key=lambda server: (server is avoid, server.in_flight))
            await asyncio.sleep(POLL * RANDOM.uniform(0.5, 1.5))

    async def _ask(self, server: Server, request: ServerRequest[T]) -> T:
        try:
            async with (
                asyncio.timeout(TIMEOUT),
                self._client.stream(request.method, f"{server.url}{request.path}", json=request.body) as response,
            ):
                good = response.status_code == 200
                content = await _content(response, request.most_bytes if good else LONGEST_MESSAGE, whole=good)
        except (TimeoutError, httpx2.TimeoutException) as error:
            raise Failure("no answer in time") from error
        except httpx2.RequestError as error:
            raise Failure(first_line(error) or type(error).__name__) from error
        except Malformed as error:
            raise Failure(f"a wrong answer: {error}") from error
        status = response.status_code
        if status in (403, 404, 405, 501) and request.absent is not None:
            return request.absent
        if status in (408, 429) or status >= 500:
            raise Failure(f"HTTP {status}: {_message(response, content)}", retry_after(response))
        if status in (400, 413, 422) and request.refused is not None:
            return request.refused(f"HTTP {status}: {_message(response, content)}")
        if status != 200:
            raise self._refusal(server, response, content)
        try:
            return request.check(content)
        except Malformed as error:
            raise Failure(f"a wrong answer: {error}") from error

    def _refusal(self, server: Server, response: httpx2.Response, content: bytes) -> DpkdError:
        status, message = response.status_code, _message(response, content)
        if status in (400, 413, 422):
            return UsageError(f"{server} refuses the request: {message}")
        names = " or ".join(self._keys)
        key = f"; the key is read from the environment variable {names}" if status in (401, 403) else ""
        return UnavailableError(f"{server}: HTTP {status}: {message}{key}")

    def close(self) -> None:
        """Let go of the connections and the thread."""
        asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop).result(CONNECT_TIMEOUT)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _open_files() -> int:
    """How many files this process may have open, each connection among them."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_IN_FLIGHT + OTHER_FILES if soft == resource.RLIM_INFINITY else soft


async def _content(response: httpx2.Response, most: int, *, whole: bool) -> bytes:
    """The body of an answer, unpacked, of which no more than `most` bytes are ever held.

    Args:
        whole: whether a longer one is Malformed, and not cut off.
    """
    encoding = response.headers.get("content-encoding", "identity").strip().lower() or "identity"
    if encoding not in ("identity", "gzip", "deflate"):
        if whole:
            raise Malformed(f"content-encoding {encoding[:40]!r}, which was not asked for")
        return b""
    unpack = None if encoding == "identity" else zlib.decompressobj(wbits=47)  # either, by its header
    content = bytearray()
    async for piece in response.aiter_raw(PIECE):
        while piece and len(content) <= most:
            if unpack is None:
                content += piece[: most + 1 - len(content)]
                break
            try:
                content += unpack.decompress(piece, most + 1 - len(content))
            except zlib.error as error:
                raise Malformed("a damaged body") from error
            piece = unpack.unconsumed_tail
        if len(content) > most:
            break
    if whole and len(content) > most:
        raise Malformed(f"more than {most:,} bytes, which is longer than any answer to this")
    return bytes(content[:most])


def _message(response: httpx2.Response, content: bytes) -> str:
    """The server's own words, on one line and without secrets, which it may echo."""
    text = content.decode("utf-8", "replace")  # whatever charset it says, which may be none
    value: Any = None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        pass
    while isinstance(value, dict):
        value = next((value[key] for key in ("error", "message", "detail") if key in value), json.dumps(value))
    return in_a_line(redacted(value if isinstance(value, str) else text))[:300] or response.reason_phrase


def backoff(tries: int) -> float:
    """Seconds to wait after that many earlier failures, with jitter."""
    return min(LONGEST_BACKOFF, BACKOFF * 2.0 ** min(tries, 10)) * RANDOM.uniform(0.5, 1.0)


def retry_after(response: httpx2.Response) -> float:
    """The seconds of a Retry-After header, which may be a number or a date."""
    value = response.headers.get("retry-after", "")
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
