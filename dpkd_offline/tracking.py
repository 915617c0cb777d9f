"""Trackers of experiments, by Accelerate: they hear what metrics.jsonl says, line by line."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from dpkd_offline.config import TrainConfig, as_plain
from dpkd_offline.errors import UnavailableError
from dpkd_offline.files import fingerprint

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
    """Those that the config names, with its settings; of a run that goes on after step `start`, in the same place.

    In the `first` process of a run; in others none.
    """
    settings = {name: value for name, value in as_plain(config).items() if not isinstance(value, list)}
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
