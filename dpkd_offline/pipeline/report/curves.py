"""A `metrics.jsonl` as curves, of which only as many points are kept as a figure can show."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dpkd_offline.training.record import metrics_lines

MOST_POINTS = 400  # of a curve; each is then the mean over neighbouring steps


@dataclass(frozen=True)
class Curve:
    """Values over steps; a step is the last of those that its value is the mean over."""

    steps: list[float]
    values: list[float]

    def __bool__(self) -> bool:
        return bool(self.steps)


@dataclass(frozen=True)
class Curves:
    """The curves of a run by the names of their numbers, and the steps at which each round began."""

    steps: int  # the last step
    by_name: Mapping[str, Curve]
    rounds: Mapping[float, str]

    def __getitem__(self, name: str) -> Curve:
        return self.by_name.get(name, Curve([], []))

    def some(self, *names: str) -> dict[str, Curve]:
        """Those of some names that there are."""
        return {name: self.by_name[name] for name in names if name in self.by_name}


def read_curves(path: Path) -> Curves:
    """The curves of a `metrics.jsonl`, which may be under way; its length is no matter.

    Raises:
        DataError: a line is not what a run writes.
    """
    counts: dict[str, int] = defaultdict(int)
    for line in metrics_lines(path):
        for name in line:
            counts[name] += 1
    sizes = {name: -(-count // MOST_POINTS) for name, count in counts.items()}
    sums: dict[str, list[float]] = {}
    curves: dict[str, Curve] = {name: Curve([], []) for name in counts if name != "step"}
    rounds: dict[float, str] = {}
    last, round = 0, None
    for line in metrics_lines(path):
        step = line.pop("step")
        last = max(last, step)
        if (found := line.pop("drift_round", None)) is not None and found != round:
            if round is not None:
                rounds[step] = f"round {found:g}"
            round = found
        for name, value in line.items():
            if name not in curves:  # written since the lines were counted
                continue
            waiting = sums.setdefault(name, [])
            waiting.append(value)
            if len(waiting) >= sizes[name]:
                _put(curves[name], step, sums.pop(name))
    for name, waiting in sums.items():
        _put(curves[name], last, waiting)
    return Curves(last, {name: curve for name, curve in curves.items() if curve}, rounds)


def _put(curve: Curve, step: float, values: Iterable[float]) -> None:
    values = list(values)
    curve.steps.append(step)
    curve.values.append(sum(values) / len(values))
