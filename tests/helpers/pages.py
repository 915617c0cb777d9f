"""A run's folder as `distill` leaves it, made without a model, and its page read as a browser reads it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import html5lib

from helpers.tiny import write_jsonl

PROMPTS, SEEDS = 12, (10, 20)
HTML, SVG = "{http://www.w3.org/1999/xhtml}", "{http://www.w3.org/2000/svg}"


def write_metrics(folder: Path, steps: int, **more: float) -> None:
    """A line of each step, and a validation before the first and after every tenth."""
    lines: list[dict[str, float]] = []
    for step in range(steps + 1):
        done = step / max(steps, 1)
        if step:
            lines.append(
                {"step": step, "loss": 3 - done, "loss_kd": 2 - done, "loss_nll": 1.0, "grad_norm": 4.0, "margin": done}
            )
        if step % 10 == 0:
            rewards = {"val_reward_chosen": done - 1, "val_reward_rejected": 1 - done}
            lines.append({"step": step, "val_loss_kd": 2 - done, "val_logps_chosen": done - 3, **rewards, **more})
            lines.append({"step": step, "drift_round": step // 20, "drift_kl_token": 0.01 * (step % 20)})
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "metrics.jsonl", lines)


def write_training(folder: Path, steps: int, **changes: Any) -> None:
    write_metrics(folder, steps)
    record = {
        "run": "r",
        "steps": steps,
        "best": {"step": steps, "by": "val_logps_chosen", "val_logps_chosen": -2.0},
        "warnings": [],
        "student": {"name": "small", "revision": "sha256:0123456789abcdef"},
        "settings": {"objective": "dpkd", "epochs": 2, "learning_rate": 1e-4},
        **changes,
    }
    (folder / "training.json").write_text(json.dumps(record))


def write_scores(folder: Path, scores: Sequence[float], text: str = "A response.", name: str = "m") -> None:
    """An evaluation whose prompts have these Rouge-L, the same under each seed."""
    rows = [
        {
            "seed": seed,
            "id": f"row-{n}",
            "messages": [{"role": "user", "content": f"Question {n}? {text}"}],
            "prompt": f"<|user|>Question {n}?</s>",
            "references": [" ".join(["word"] * (5 if n % 2 else 40))],
            "response": f"{text} {n}",
            "finish_reason": "length" if n == 0 else "stop",
            "tokens": 3,
            "repeating": False,
            "rouge_l": score,
            "exact_match": 0.0,
        }
        for seed in SEEDS
        for n, score in enumerate(scores)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    lines = write_jsonl(folder / "responses.jsonl", rows).read_bytes()
    mean = sum(scores) / len(scores)
    halves = [[scores[n] for n in range(len(scores)) if n % 2 == odd] for odd in (1, 0)]
    buckets = [
        {"above": low, "to": high, "prompts": len(half), "rouge_l": sum(half) / len(half), "exact_match": 0.0}
        for half, low, high in zip(halves, (0, 30), (30, None), strict=True)
    ]
    exact = {"mean": 0.0, "spread": 0.0, "by_seed": [0.0, 0.0], "interval": [0.0, 0.0]}
    results = {
        "prompts": len(scores),
        "seeds": list(SEEDS),
        "rouge_l": {"mean": mean, "spread": 0.0, "by_seed": [mean] * 2, "interval": [mean - 1, mean + 1]},
        "exact_match": exact,
        "truncated": 0.1,
        "repeating": 0.0,
        "by_length": buckets,
        "made": {"model": {"name": name, "revision": "sha256:1"}, "settings": {"engine": "transformers", "seed": 10}},
        "responses": hashlib.sha256(lines).hexdigest(),
    }
    (folder / "results.json").write_text(json.dumps(results))


def write_judgement(folder: Path, name: str = "a judge") -> None:
    results = {
        **{"form": "pairwise", "judge": name, "prompts": PROMPTS, "pairs": 24, "asked": 48, "failed": 0},
        **{"win_rate": 61.0, "win_rate_interval": [52.0, 70.0], "preference": 58.0, "controlled_win_rate": None},
        **{"wins": 41.0, "ties": 40.0, "losses": 19.0, "order_disagreement": 30.0, "warnings": []},
        "made": {"a": {"model": {"name": name}}, "b": {"model": {"name": "before"}}, "judge": {"name": name}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))


def write_run(folder: Path, dataset: Path, text: str = "A response.", name: str = "m") -> Path:
    """What a recipe with sft, evaluations and a judge leaves. `text` and `name` are in all that others write."""
    shutil.copytree(dataset, folder / "dataset")
    settings = {"objective": "dpkd", "epochs": 2, name: name}
    write_training(folder / "student-sft", 10, student={"name": name, "revision": "1"})
    warnings = [{"step": 20, "warning": f"log q is worse than the best {name}"}]
    write_training(folder / "student", 40, settings=settings, warnings=warnings)
    better = [8.0 + n for n in range(PROMPTS)]
    write_scores(folder / "evaluation" / "teacher", [14.0 + n for n in range(PROMPTS)], text, name)
    write_scores(folder / "evaluation" / "student-before", [5.0 + n % 3 for n in range(PROMPTS)], text, name)
    write_scores(folder / "evaluation" / "student-after", better, text, name)
    write_judgement(folder / "judge", name)
    stages = [("generate: teacher", 80.0, 1000), ("train", 30.5, 2000), (name, 2.0, None)]
    lines = [{"stage": stage, "seconds": s, "exit_code": 0, "sequences": t, "tokens": t} for stage, s, t in stages]
    write_jsonl(folder / "stages.jsonl", lines)
    return folder


def parsed(page: Path) -> Element:
    """The page, which must be HTML 5 without an error."""
    document: Element = html5lib.HTMLParser(strict=True).parse(page.read_text(encoding="utf-8"))
    return document


def text_of(element: Element) -> str:
    return " ".join("".join(element.itertext()).split())


def elements(document: Element) -> Iterator[tuple[str, Element]]:
    """All elements with their names, those of SVG behind `svg:`."""
    for element in document.iter():
        if isinstance(element.tag, str):
            yield element.tag.replace(HTML, "").replace(SVG, "svg:"), element
