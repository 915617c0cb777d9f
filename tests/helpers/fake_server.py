"""A server that speaks as vLLM's does: a deterministic model that is a pure function of token ids, and its faults.

Token t has rank r after a prefix if t = (h + 7(r - 1)) mod V, where h is a hash of the prefix; its log-prob falls with
its rank. A draw depends on prompt and seed alone.
"""

from __future__ import annotations

import gzip
import json
import random
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from typing import Any

from transformers import PreTrainedTokenizerFast

EOS = 1
Json = dict[str, Any]
Fault = Callable[["Handler", Json], None]


def hash_of(value: object) -> int:
    return zlib.crc32(repr(value).encode())


class FakeServer(ThreadingHTTPServer):
    """`faults` names the fault of a request, or None; they are counted by name. `gate` holds the answers back."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, tokenizer: PreTrainedTokenizerFast, name: str = "llama") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokenizer, self.vocabulary = tokenizer, len(tokenizer)
        assert self.vocabulary % 7
        self.models: list[Json] = [{"id": name, "root": f"/models/{name}", "max_model_len": 256}]
        self.version = "0.32.0"
        self.faults: Callable[[Json], str | None] = lambda body: None
        self.attempts: Counter[str] = Counter()
        self.fault_counts: Counter[str] = Counter()
        self.die_after: int | None = None
        self.alive = True
        self.gate = threading.Event()
        self.gate.set()
        self.lock = threading.Lock()
        self.completions = self.in_flight = self.peak = 0
        self.runs: int | None = None  # requests at once, of which /metrics tells; None: it has no such page
        self.headers: list[dict[str, str]] = []
        self.offset = 0.0  # nats that sampling adds to a log-prob
        self.wrong = WRONG  # by the name of a fault, what it does to the choices of an answer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that went away

    # --- the model

    def rank(self, prefix: Sequence[int], token: int) -> int:
        return (token - hash_of(list(prefix))) * pow(7, -1, self.vocabulary) % self.vocabulary + 1

    def logp(self, prefix: Sequence[int], rank: int) -> float:
        return -0.5 - 0.01 * rank - hash_of(list(prefix)) % 1000 / 1000

    def entry(self, prefix: Sequence[int], rank: int) -> tuple[str, Json]:
        token = (hash_of(list(prefix)) + 7 * (rank - 1)) % self.vocabulary
        return str(token), {"logprob": self.logp(prefix, rank), "rank": rank, "decoded_token": "x"}

    def sample(self, prompt: list[int], most: int, seed: int | None) -> tuple[list[int], list[float]]:
        draw = random.Random(hash_of([prompt, seed]))
        ids: list[int] = []
        logps: list[float] = []
        while len(ids) < most and (not ids or ids[-1] != EOS):
            token = EOS if draw.random() < 0.05 else draw.randrange(self.vocabulary)
            logps.append(self.logp([*prompt, *ids], self.rank([*prompt, *ids], token)) + self.offset)
            ids.append(token)
        return ids, logps

    def complete(self, body: Json) -> Json:
        prompt = body["prompt"]
        ids, logps = self.sample(prompt, body["max_tokens"], body.get("seed"))
        choice: Json = {
            "index": 0,
            "text": "",
            "finish_reason": "stop" if ids[-1] == EOS else "length",
            "prompt_token_ids": prompt,
            "token_ids": ids,
            "logprobs": None,
            "prompt_logprobs": None,
        }
        if "logprobs" in body:
            choice["logprobs"] = {"tokens": [f"token_id:{token}" for token in ids], "token_logprobs": logps}
        if "prompt_logprobs" in body:
            choice["prompt_logprobs"] = [None]
            for n, token in enumerate(prompt[1:], start=1):
                ranks = [self.rank(prompt[:n], token), *range(1, body["prompt_logprobs"] + 1)]
                choice["prompt_logprobs"].append(dict(self.entry(prompt[:n], rank) for rank in ranks))
        return {"id": "x", "object": "text_completion", "model": body["model"], "choices": [choice]}


class Handler(BaseHTTPRequestHandler):
    server: FakeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/metrics" and self.server.runs is not None:
            self.send(200, self.metrics())
            return
        answers = {"/v1/models": {"object": "list", "data": self.server.models}, "/version": self.version_body()}
        self.respond({"GET": self.path}, lambda: answers.get(self.path))

    def metrics(self) -> str:
        """Of two engines, of which one idles; as Prometheus has it."""
        running = min(self.server.in_flight, self.server.runs or 0)
        counts = {"running": running, "waiting": self.server.in_flight - running, "waiting_by_reason": 9}
        lines = [
            f'vllm:num_requests_{name}{{engine="{n}",model_name="{{x}}"}} {(1 - n) * count}.0'
            for n in (0, 1)
            for name, count in counts.items()
        ]
        return "\n".join(["# HELP vllm:num_requests_running 7", *lines])

    def version_body(self) -> Json:
        return {"version": self.server.version}

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            tokens = self.server.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
            self.respond(body, lambda: {"count": len(tokens), "max_model_len": 256, "tokens": tokens})
            return
        server = self.server
        with server.lock:
            server.headers.append(dict(self.headers))
            server.completions += 1
            server.in_flight += 1
            server.peak = max(server.peak, server.in_flight)
            if server.die_after is not None and server.completions > server.die_after:
                server.alive = False
        try:
            server.gate.wait()
            time.sleep(0.001)
            self.respond(body, lambda: server.complete(body))
        finally:
            with server.lock:
                server.in_flight -= 1

    def respond(self, body: Json, answer: Callable[[], Json | None]) -> None:
        if not self.server.alive:
            self.reset()
            return
        kind = self.server.faults(body)
        if kind is not None:
            with self.server.lock:
                self.server.fault_counts[kind] += 1
            if kind in BROKEN:
                BROKEN[kind](self)
                return
        value = answer()
        if value is None:
            self.send(404, {"detail": "Not Found"})
            return
        if kind is not None:
            self.server.wrong[kind](self.server, body, value["choices"])
        self.send(400 if "error" in value else 200, value)

    def send(self, status: int, value: Json | str, headers: Json | None = None, length: int | None = None) -> None:
        data = (value if isinstance(value, str) else json.dumps(value)).encode()
        self.send_response(status)
        for key, text in (headers or {}).items():
            self.send_header(key, text)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()
        if length is not None:
            self.close_connection = True

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def reset_in_body(self) -> None:
        self.send(200, '{"choices": [{"prompt_', length=5000)
        self.reset()


def error(status: int, **headers: str) -> Callable[[Handler], None]:
    body = {"error": {"message": "the server is not well", "code": status}}
    return lambda handler: handler.send(status, body, {k.replace("_", "-"): v for k, v in headers.items()})


def raw(status: int, headers: Json, pieces: Iterable[bytes]) -> Callable[[Handler], None]:
    """A body without an end that is known, which goes out until nobody reads it any more."""

    def send(handler: Handler) -> None:
        handler.send_response(status)
        for key, text in headers.items():
            handler.send_header(key, text)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.close_connection = True
        with suppress(OSError):
            for piece in pieces:
                handler.wfile.write(piece)

    return send


class Repeated:
    """A piece again and again, each time that it is gone through."""

    def __init__(self, piece: bytes, times: int | None) -> None:
        self._piece, self._times = piece, times

    def __iter__(self) -> Iterator[bytes]:
        return repeat(self._piece) if self._times is None else repeat(self._piece, self._times)


BOMB = gzip.compress(b"{" + b" " * (64 << 20))  # 64 KiB that are 64 MiB
BODIES: dict[str, Callable[[Handler], None]] = {  # as no server of models sends them
    "an error of brackets": lambda handler: handler.send(500, "[" * 100_000),
    "an answer of brackets": lambda handler: handler.send(200, "[" * 100_000),
    "an error in a charset that is none": lambda handler: handler.send(
        500, "not well", {"Content-Type": "text/plain; charset=idna"}
    ),
    "an error without an end": raw(500, {}, Repeated(b"x" * 65536, None)),
    "an answer without an end": raw(200, {}, Repeated(b" " * 65536, None)),
    "a bomb": raw(200, {"Content-Encoding": "gzip"}, Repeated(BOMB, 1)),
    "an error that is a bomb": raw(500, {"Content-Encoding": "gzip"}, Repeated(BOMB, 1)),
    "an encoding that nobody asked for": raw(200, {"Content-Encoding": "br"}, Repeated(b"x", 1)),
    "a damaged encoding": raw(200, {"Content-Encoding": "gzip"}, Repeated(b"x" * 100, 1)),
    "Retry-After that is no date": error(503, Retry_After="Mon, 99 Foo 99999 99:99:99 GMT"),
}

BROKEN: dict[str, Callable[[Handler], None]] = {  # whatever was asked
    "429": error(429),
    "429, Retry-After: 0": error(429, Retry_After="0"),
    "429, Retry-After: a date": error(429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"),
    "500": error(500),
    "502, HTML": lambda handler: handler.send(502, "<html>Bad Gateway</html>"),
    "503": error(503),
    "408": error(408),
    "no answer": lambda handler: time.sleep(1.5),
    "reset before the answer": Handler.reset,
    "reset in the body": Handler.reset_in_body,
    "body cut off": lambda handler: handler.send(200, '{"choices": [{"prom', length=5000),
    "JSON cut off": lambda handler: handler.send(200, '{"choices": [{"prompt_token_ids": [1, 2'),
    "empty body": lambda handler: handler.send(200, ""),
    "HTML with 200": lambda handler: handler.send(200, "<html>Welcome</html>"),
    "JSON of something else": lambda handler: handler.send(200, {"status": "ok"}),
}


def last_logp(value: object) -> Callable[[FakeServer, Json, list[Json]], None]:
    """Put a value in place of the last log-prob that counts."""

    def change(_: FakeServer, body: Json, choices: list[Json]) -> None:
        if "logprobs" in body:
            choices[0]["logprobs"]["token_logprobs"][-1] = value
        else:
            choices[0]["prompt_logprobs"][-1][str(body["prompt"][-1])]["logprob"] = value

    return change


def fewer_logps(_: FakeServer, body: Json, choices: list[Json]) -> None:
    (choices[0]["logprobs"]["token_logprobs"] if "logprobs" in body else choices[0]["prompt_logprobs"]).pop()


def more_logps(_: FakeServer, body: Json, choices: list[Json]) -> None:
    logps = choices[0]["logprobs"]["token_logprobs"] if "logprobs" in body else choices[0]["prompt_logprobs"]
    logps.append(logps[-1])


def missing_token(server: FakeServer, body: Json, choices: list[Json]) -> None:
    if "logprobs" in body:
        choices[0]["logprobs"]["tokens"][-1] = "token_id:399999"
    else:
        position = choices[0]["prompt_logprobs"][-1]
        position[str((body["prompt"][-1] + 1) % server.vocabulary)] = position.pop(str(body["prompt"][-1]))


def another_answer(server: FakeServer, body: Json, choices: list[Json]) -> None:
    choices[:] = server.complete({**body, "prompt": [*body["prompt"][:-1], 5, 6]})["choices"]


def wrong_echo(_: FakeServer, body: Json, choices: list[Json]) -> None:
    choices[0]["prompt_token_ids"] = [*body["prompt"][:-1], (body["prompt"][-1] + 1) % 300]


def no_echo(_: FakeServer, body: Json, choices: list[Json]) -> None:
    choices[0]["prompt_token_ids"] = None


def wrong_end(_: FakeServer, body: Json, choices: list[Json]) -> None:
    """The other finish reason; of a scoring request, where it means nothing, one that does not exist."""
    other = {"stop": "length", "length": "stop"}[choices[0]["finish_reason"]]
    choices[0]["finish_reason"] = other if "logprobs" in body else "abort"


def cut_short(_: FakeServer, body: Json, choices: list[Json]) -> None:
    """Fewer tokens than asked for, and yet no EOS; of a scoring request, fewer positions."""
    if "logprobs" in body:
        choices[0]["finish_reason"] = "length"
        choices[0]["token_ids"] = choices[0]["token_ids"][:-1]
        for values in choices[0]["logprobs"].values():
            values.pop()
    else:
        del choices[0]["prompt_logprobs"][1:]


def foreign_token(_: FakeServer, body: Json, choices: list[Json]) -> None:
    if "logprobs" in body:
        choices[0]["token_ids"][0] = 399_999
        choices[0]["logprobs"]["tokens"][0] = "token_id:399999"
    else:
        choices[0]["prompt_logprobs"][-1]["399999"] = {"logprob": -1.0, "rank": 3, "decoded_token": "x"}


WRONG: dict[str, Callable[[FakeServer, Json, list[Json]], None]] = {  # a good status and a wrong answer
    "fewer log-probs": fewer_logps,
    "more log-probs": more_logps,
    "log-prob of another token": missing_token,
    "another request's answer": another_answer,
    "wrong echo": wrong_echo,
    "no echo": no_echo,
    "log-prob NaN": last_logp(float("nan")),
    "log-prob null": last_logp(None),
    "log-prob +0.5": last_logp(0.5),
    "log-prob -9999": last_logp(-9999.0),
    "log-prob -inf": last_logp(float("-inf")),
    "log-prob is text": last_logp("much"),
    "wrong finish reason": wrong_end,
    "cut short": cut_short,
    "foreign token": foreign_token,
    "two choices": lambda _, body, choices: choices.append(choices[0]),
    "no choice": lambda _, body, choices: choices.clear(),
}


@contextmanager
def serving(*servers: FakeServer) -> Iterator[tuple[str, ...]]:
    """Run servers; the URLs."""
    for server in servers:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield tuple(server.url for server in servers)
    finally:
        for server in servers:
            server.gate.set()
            server.shutdown()
            server.server_close()
