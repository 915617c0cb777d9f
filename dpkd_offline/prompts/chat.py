"""Chat templates, which are programs of strangers, run in a process of their own: bounded in time and in memory.

A template can loop for ever, ask for all memory or end the process that runs it. Nothing in Python stops `'a' * 10**10`
from inside, but the kernel does, and only a process can be given a limit. One is started when the first template is
rendered and stays until the command ends.

A template sees the same clock on every day and draws the same random numbers, so that one row gives one prompt.
"""

from __future__ import annotations

import atexit
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

SECONDS = 10.0  # for one prompt; an ordinary one takes less than a thousandth of a second
MEMORY = 512 * 2**20  # bytes beyond what the process has before the first template
LONGEST = 2**20  # characters that a template may add to what it is given, and it may repeat that:
REPEATS = 16
CLOCK = datetime(2025, 1, 1)  # what a template is told that it is


class RenderError(Exception):
    """Why a template made no text, in one line."""

    def __init__(self, reason: str, hopeless: bool) -> None:
        super().__init__(reason)
        self.hopeless = hopeless  # another row cannot change it, or would cost as much again


class _Renderer:
    """The other process, as this one sees it: a question a line, an answer a line."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "PYTHONHASHSEED": "0",
        }
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dpkd_offline.prompts.chat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # an interrupt is for the command, which ends this process in its own time
        )

    @property
    def usable(self) -> bool:
        return self._owner == os.getpid() and self._process.poll() is None

    def ask(self, question: bytes) -> dict[str, Any]:
        """The answer; a RenderError where the process ended instead."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            with suppress(BrokenPipeError):  # it has ended, as the answer that does not come will say
                self._process.stdin.write(question + b"\n")
                self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BaseException:  # an interrupt: what the process answers now is not for the next question
            self.end()
            raise
        if line.endswith(b"\n"):
            answer: dict[str, Any] = json.loads(line)
            return answer
        status = self._process.wait()
        if status == -signal.SIGALRM:
            raise RenderError(f"it takes more than {SECONDS:g} seconds", hopeless=True)
        raise RenderError(f"it ends the process that runs it (exit status {status})", hopeless=True)

    def end(self) -> None:
        """End the process, unless it is of the process that this one was forked from."""
        if self._owner == os.getpid():
            self._process.kill()
            self._process.wait()


_lock = threading.Lock()
_renderer: _Renderer | None = None


def render_chat(
    template: str,
    messages: list[dict[str, Any]],
    add_generation_prompt: bool,
    variables: dict[str, Any],
    tools: list[dict[str, Any]] | None = None,
) -> tuple[str, bool]:
    """The text that a chat template makes of messages, as transformers renders it, and whether it asked for the time.

    Args:
        tools: the definitions of what the model may call.
        variables: what the template may name besides: special tokens, and the user's arguments.

    Raises:
        RenderError: the template refuses these messages, fails, or takes too much time, memory or text.
    """
    global _renderer
    question = {
        "chat_template": template,
        "messages": messages,
        "add_generation_prompt": add_generation_prompt,
        "variables": variables,
        "tools": tools or None,
        "seconds": SECONDS,
    }
    with _lock:
        if _renderer is None or not _renderer.usable:
            _renderer = _Renderer()
            atexit.register(_renderer.end)
        answer = _renderer.ask(json.dumps(question, default=str).encode())
    if "error" in answer:
        raise RenderError(answer["error"], answer["hopeless"])
    return answer["text"], answer["asked_time"]


# --- the other process ------------------------------------------------------------------------------------------------


def _serve() -> None:
    """Answer until the command has ended; the kernel ends this process where a template takes too long."""
    from transformers.utils.chat_template_utils import render_jinja_template

    render_jinja_template([[]], chat_template="")  # what it imports is not the templates' memory
    _limit_memory()
    for line in sys.stdin.buffer:
        try:
            answer = _answer(line, render_jinja_template)
        except MemoryError:
            answer = {"error": f"it takes more than {MEMORY // 2**20} MiB of memory", "hopeless": True}
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _answer(line: bytes, render: Any) -> dict[str, Any]:
    from jinja2 import TemplateError, TemplateSyntaxError

    question, asked_time = json.loads(line), False
    signal.setitimer(signal.ITIMER_REAL, question["seconds"])  # whose signal, unhandled, ends the process in any C code

    def strftime_now(form: str) -> str:
        nonlocal asked_time
        asked_time = True
        return CLOCK.strftime(form)

    random.seed(0)
    try:
        (text,), _ = render(
            [question["messages"]],
            tools=question["tools"],
            chat_template=question["chat_template"],
            add_generation_prompt=question["add_generation_prompt"],
            **{"strftime_now": strftime_now, **question["variables"]},
        )
        text.encode()
    except TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {_in_one_line(error)}", "hopeless": True}
    except TemplateError as error:  # what raise_exception raises, too
        return {"error": _in_one_line(error), "hopeless": False}
    except MemoryError:
        raise
    except Exception as error:  # a template's code can raise anything
        return {"error": f"{type(error).__name__}: {_in_one_line(error)}", "hopeless": False}
    if len(text) > LONGEST + REPEATS * len(line):
        return {"error": f"it makes more than {REPEATS} times the text that it is given", "hopeless": False}
    return {"text": text, "asked_time": asked_time}


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _limit_memory() -> None:
    pages = Path("/proc/self/statm")
    if pages.exists():  # elsewhere time alone bounds it
        size = int(pages.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))


if __name__ == "__main__":
    _serve()
