"""The folder of a study, written by hand: without models, so that it takes no time."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

from dpkd_offline.common.hashing import file_sha256
from dpkd_offline.evaluation.summary import Summary
from dpkd_offline.metrics.text import exact_match, rouge_l
from helpers.tiny import write_jsonl

WORDS = "tea is a hot drink that people in many lands like to take with milk in the late afternoon".split()
ATTACK = '<script>alert("1")</script> & <b>bold</b> `code` | $x$ [a](b) \x1b[31mred \u202eback'
OBJECTIVES = {
    "sft": "sft", "kd": "kd", "seqkd": "seqkd", "akl": "akl", "minillm": "minillm", "dpkd": "dpkd", "ipo": "ipo",
    "cpo": "cpo", "simpo": "simpo", "dpkd-without-lm": "dpkd", "dpkd-without-length": "dpkd-sum",
    "dpkd-token": "dpkd-token",
}  # fmt: skip


def write_study(
    folder: Path,
    students: Sequence[str] = tuple(OBJECTIVES),
    seeds: Sequence[int] = (40, 41),
    sets: Sequence[str] = ("dolly", "selfinst"),
    baseline: str | None = "sft",
    paper: str | None = "gpt2",
) -> Path:
    """A study whose later students are better, cost more, and repeat more of the reference.

    With several seeds the last student failed with the last one, the one before that is ruined, and the one before that
    is in training.
    """
    layout = {
        "version": 1,
        "baseline": baseline,
        "seeds": list(seeds),
        "teacher": "evaluation/teacher",
        "paper": paper,
        "starts": {"start-1": {"folder": "starts/start-1", "before": "evaluation/start-1"}},
        "students": {
            name: {"start": "start-1", "runs": [{"seed": s, "folder": f"students/{name}/seed-{s}"} for s in seeds]}
            for name in students
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps(layout))
    _write_stages(folder, [("generate: teacher", 60.0, 4000)])
    _write_stages(folder / "starts" / "start-1", [("train: sft", 12.0, 2000)])
    _write_training(folder / "starts" / "start-1" / "student-sft", "sft", 0.3, 0)
    write_evaluation(folder / "evaluation" / "teacher", sets, 0.75, seed=0)
    write_evaluation(folder / "evaluation" / "start-1", sets, 0.25, seed=1)
    for n, name in enumerate(students):
        for seed in seeds:
            place, last = folder / "students" / name / f"seed-{seed}", len(seeds) > 1 and seed == seeds[-1]
            skill = 0.3 + 0.4 * n / len(students)
            if last and n == len(students) - 1:
                place.mkdir(parents=True)
                (place / "failed.json").write_text('{"stage": "train", "exit_code": 69}')
                continue
            state = {len(students) - 2: "ruined", len(students) - 3: "training"}.get(n, "done") if last else "done"
            _write_stages(place, [("train", 20.0 + 9 * n + seed % 7, 3000 + 500 * n)])
            _write_training(place / "student", OBJECTIVES.get(name, "dpkd"), skill, seed, state)
            if state != "training":
                write_evaluation(place / "evaluation", sets, skill, seed=100 * n + seed)
    return folder


def write_evaluation(folder: Path, sets: Sequence[str], skill: float, seed: int, prompts: int = 18) -> None:
    """responses.jsonl and results.json of each set; `skill` is the share of a reference that a response has."""
    results = {}
    for name in sets:
        numbers, draw = Summary((30, 70)), random.Random(f"{seed} {name}")
        place = folder / name
        place.mkdir(parents=True)
        lines = [_response(name, n, s, skill, draw) for s in (10, 20) for n in range(prompts)]
        for line in lines:
            numbers.add(line)
        write_jsonl(place / "responses.jsonl", lines)
        model = {"name": "student <i>", "revision": "sha256:0"}
        of_set = numbers.results() | {"made": {"model": model}, "responses": file_sha256(place / "responses.jsonl")}
        (place / "results.json").write_text(json.dumps(of_set))
        results[name] = of_set
    if list(sets) != [""]:
        (folder / "results.json").write_text(json.dumps({"sets": results}))


def _response(name: str, n: int, seed: int, skill: float, draw: random.Random) -> dict[str, object]:
    reference = [WORDS[(n + k) % len(WORDS)] for k in range((12, 40, 90)[n % 3])]
    said = [word if draw.random() < skill else draw.choice(("blue", "stone", "river")) for word in reference]
    response = " ".join(said) + (f" {ATTACK}" if n % 5 == 0 else "")
    question = f"Describe tea, number {n}." + (f" {ATTACK}" if n % 4 == 0 else "")
    return {
        "seed": seed,
        "id": f"{name}-{n}",
        "messages": [{"role": "user", "content": question}],
        "prompt": question,
        "references": [" ".join(reference)],
        "response": response,
        "finish_reason": "length" if n % 7 == 0 else "stop",
        "tokens": len(said),
        "repeating": n % 9 == 0,
        "rouge_l": rouge_l(response, [" ".join(reference)]),
        "exact_match": exact_match(response, [" ".join(reference)]),
        "teacher_nll": 4.0 - 2 * skill + draw.random(),
        "reward": 0.5 * skill + draw.random() / 10,
        "accepted": 100 * skill * draw.random(),
    }


def _write_stages(folder: Path, stages: Sequence[tuple[str, float, int]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"stage": stage, "seconds": seconds, "exit_code": 0, "engine": "transformers", "tokens": tokens}
        | {"peak_memory": 400 << 20}
        for stage, seconds, tokens in stages
    ]
    write_jsonl(folder / "stages.jsonl", lines)


def _write_training(folder: Path, objective: str, skill: float, seed: int, state: str = "done") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draw, steps = random.Random(f"{seed} {objective} {skill}"), 24
    lines: list[dict[str, float]] = []
    for step in range(steps + 1):
        done = 1 - math.exp(-4 * skill * step / steps)
        if step:
            lines.append({"step": step, "loss": 2 - done + draw.random() / 5, "grad_norm": 1 + draw.random()})
        if step % 4 == 0:
            noise = draw.random() / 20
            lines.append(
                {
                    "step": step,
                    "val_loss_dpkd": 0.9 - 0.5 * done + noise,
                    "val_margin": 0.8 * done - noise,
                    "val_logps_chosen": -3 + done - noise,
                    "val_reward_chosen": done - noise,
                    "val_rouge_l": 12 + 10 * done + 10 * noise,
                    "val_reverse_kl_first": 0.5 - 0.4 * done + noise,
                }
            )
    write_jsonl(folder / "metrics.jsonl", lines)
    if state == "training":
        return
    record = {
        "run": "0" * 64,
        "steps": steps,
        "ruined": "log q of held-out responses is <b>0.6</b> nats a token worse" if state == "ruined" else None,
        "warnings": [{"step": 8, "warning": "40 % of the responses no longer end"}] if draw.random() < 0.2 else [],
        "settings": {"objective": objective, "epochs": 2, "seed": seed},
    }
    (folder / "training.json").write_text(json.dumps(record))
