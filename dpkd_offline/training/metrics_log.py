"""`metrics.jsonl`, and the trackers that get all that is written to it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from dpkd_offline.common.errors import UnavailableError
from dpkd_offline.common.files import disk_errors, write_atomically
from dpkd_offline.common.hashing import fingerprint
from dpkd_offline.config.base import redacted_dict
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.training.record import read_metrics


class Tracker(Protocol):
    """What Accelerate's trackers do."""

    def log(self, values: dict[str, Any], step: int | None = None) -> None: ...


class MetricsFile:
    """`metrics.jsonl`: one JSON object a step, a validation (`val_…`), and a measure of the drift (`drift_…`).

    Opened by a run that resumes after `resume_step` steps, it drops what came later, and that step's own validation and
    drift, which are measured again. `trackers` get all that is written. Without a path nothing is: only the first
    process has one.

    Raises:
        StorageError: a line cannot be written.
    """

    def __init__(self, path: Path | None, resume_step: int, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers, self._path = trackers, path
        self.kept: list[dict[str, Any]] = []  # the lines that stood in the file, up to that step
        if path is None:
            return
        if resume_step:
            self.kept = [line for line in read_metrics(path) if _is_before(line, resume_step)]
        write_atomically(path, b"".join((json.dumps(line) + "\n").encode() for line in self.kept))
        self._file = path.open("ab", buffering=0)  # nothing stays behind that would be written later

    def write(self, **values: Any) -> None:
        if self._path is None:
            return
        line = (json.dumps(values) + "\n").encode()
        with disk_errors(self._path):
            while line:
                line = line[self._file.write(line) :]
        step = values.pop("step")
        for tracker in self._trackers:
            tracker.log(values, step)

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        assert self._path is not None
        with disk_errors(self._path):
            os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._path is not None:
            self._file.close()


def _is_before(values: Mapping[str, Any], step: int) -> bool:
    comes_again = any(key.startswith(("val_", "drift_")) for key in values)
    return bool(values["step"] < step or (values["step"] == step and not comes_again))


PROJECT = "dpkd-offline"  # where the tracker's own environment variable names none
PRIVATE = {  # for wandb: no paths, host name, code or console of this machine
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "disable_git": True,
    "save_code": False,
    "console": "off",
    "host": "-",
}


def check_trackers(names: Sequence[str]) -> None:
    """Raise UnavailableError for a tracker that is not installed."""
    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in available:
            raise UnavailableError(f"--track {name}: not installed; `pip install {name}`, or leave it out")


@contextmanager
def trackers(config: TrainConfig, run: str, start: int, first: bool) -> Iterator[list[GeneralTracker]]:
    """The trackers that the config names, started, in the `first` process of a run; none in the others.

    A run that resumes after step `start` goes on where the earlier one wrote.
    """
    settings = {name: value for name, value in redacted_dict(config).items() if not isinstance(value, list)}
    started: list[GeneralTracker] = []
    try:
        for name in config.track if first else ():
            tracker = LOGGER_TYPE_TO_CLASS[name](**_options(name, config, settings, run, start))
            tracker.start()
            started.append(tracker)
            if name == "tensorboard" and not start:
                tracker.store_init_configuration(settings)
        yield started
    finally:
        for tracker in started:
            tracker.finish()


def _options(name: str, config: TrainConfig, settings: dict[str, Any], run: str, start: int) -> dict[str, Any]:
    logs = config.output / "logs"
    if name == "tensorboard":
        # Older events of this folder from there on are not shown.
        return {"run_name": name, "logging_dir": logs, "purge_step": start + 1 if start else 0}
    project = os.environ.get(f"{name.upper()}_PROJECT", PROJECT)
    shared = {"run_name": project, "name": config.output.name, "config": settings}
    if name == "trackio":
        return {**shared, "resume": "allow" if start else "never"}
    logs.mkdir(parents=True, exist_ok=True)
    return {
        **shared,
        "id": fingerprint([run, config.output.name])[:16],
        "resume": "allow" if start else None,  # None: over what an earlier run of this id left
        "dir": str(logs),
        "settings": PRIVATE,
    }
