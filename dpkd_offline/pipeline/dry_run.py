"""`distill --dry-run`: what the stages of a recipe are going to read and write, at most."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dpkd_offline.common import console
from dpkd_offline.common.locations import Location
from dpkd_offline.config.base import PromptOptions
from dpkd_offline.config.data import GenerateConfig, ScoreTeacherConfig
from dpkd_offline.config.evaluate import EvaluateConfig
from dpkd_offline.config.recipe import Recipe
from dpkd_offline.config.train import InitStudentConfig, TrainConfig
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.pipeline.stages import Stage, plan
from dpkd_offline.prompts.reader import PromptReport, read_prompts

TEXT_BYTES = 4  # of a token, about what tokenizers of today make of English
ID_BYTES = LOGP_BYTES = 4
STATE_BYTES = 12  # of a parameter in a checkpoint: master weight and two moments


class PromptCount(NamedTuple):
    """How many prompts, and their tokens."""

    rows: int
    tokens: int


class Work(NamedTuple):
    """What a stage does, at most: sequences, tokens that a model reads or writes, bytes on the disk, and of what."""

    stage: str
    rows: int | None
    tokens: int | None
    bytes: int | None
    note: str = ""


def plan_of_work(recipe: Recipe, file: Path | None = None) -> list[Work]:
    """The stages of a recipe with their rows, tokens and disk; only prompts and tokenizers are read.

    Responses count as long as they may become; bytes are those before compression, which halves most of them.

    Raises:
        DataError: a row of the prompts is wrong.
        UsageError: a section of the recipe is wrong.
        UnavailableError: a tokenizer or the prompts cannot be loaded.
    """
    stages = plan(recipe, file)
    enters = next(s.config for s in stages if isinstance(s.config, GenerateConfig))
    assert enters.prompts is not None
    prompts = _count(enters.prompts, enters, enters.model, enters.trust_remote_code)
    model = _bytes_of(recipe.student or recipe.teacher)
    new: dict[str, int] = {}
    for stage in stages:
        if isinstance(stage.config, GenerateConfig):
            new[stage.config.role] = stage.config.max_new_tokens
    return [work for stage in stages for work in _work(recipe, stage, prompts, new, model)]


def _count(source: str | Location, options: PromptOptions, model: str, trust_remote_code: bool) -> PromptCount:
    tokenizer, report, tokens = ModelInfo.load(model, trust_remote_code).tokenizer, PromptReport(), 0
    for prompt in read_prompts(source, options, tokenizer, report):
        tokens += len(prompt.prompt_ids)
    console.info(f"prompts: {report}")
    return PromptCount(report.kept, tokens)


def _bytes_of(model: str) -> int | None:
    """The weights of a model that lies here; of others nobody knows before they are loaded."""
    return sum(path.stat().st_size for path in Path(model).glob("*.safetensors")) or None


def _work(recipe: Recipe, stage: Stage, prompts: PromptCount, new: dict[str, int], model: int | None) -> Iterator[Work]:
    rows, config = prompts.rows, stage.config
    if isinstance(config, InitStudentConfig):
        yield Work(stage.title, None, None, model, "as large as the teacher at most")
    elif isinstance(config, GenerateConfig):
        yield _generate(stage.title, config.role, rows, config.max_new_tokens)
    elif isinstance(config, ScoreTeacherConfig):
        yield _score(stage.title, rows, prompts.tokens, new)
    elif isinstance(config, TrainConfig):
        seen = rows * (config.epochs if config.max_steps is None else 1)
        if config.max_steps is not None:
            seen = config.max_steps * config.batch_size
        roles = {"sft": [], "seqkd": ["teacher"]}.get(config.objective, list(new))
        of_row = prompts.tokens / rows + sum(new[role] for role in roles)
        state = None if model is None else model + model // 2 * STATE_BYTES
        yield Work(stage.title, seen, int(seen * of_row), state, "a student and a checkpoint")
        if recipe.regenerate is not None and config.regenerates:
            share, count = recipe.regenerate.share, recipe.regenerate.rounds
            for number in range(1, count + 1):
                anew, read = int(rows * share), int(prompts.tokens * share)
                whole = _generate("", "student", rows, new["student"]), _score("", rows, prompts.tokens, new)
                parts = (
                    _generate(f"generate: student, round {number}", "student", anew, new["student"]),
                    _score(f"score-teacher, round {number}", anew, read, {"student": new["student"]}),
                )  # y_t is scored once
                for part, written in zip(parts, whole, strict=True):
                    yield part._replace(bytes=written.bytes)  # kept rows are written, too
            yield Work("rounds", None, None, None if model is None else model * count, "the students that answered")
    elif isinstance(config, EvaluateConfig):
        asked = _count(config.prompts, config, recipe.teacher, config.trust_remote_code)
        times = len(config.seeds)
        yield Work(stage.title, asked.rows * times, (asked.tokens + asked.rows * config.max_new_tokens) * times, None)


def _generate(title: str, role: str, rows: int, new_tokens: int) -> Work:
    tokens = rows * new_tokens
    of_token = TEXT_BYTES + ID_BYTES + (LOGP_BYTES if role == "student" else 0)
    return Work(title, rows, tokens, tokens * of_token)


def _score(title: str, rows: int, prompt_tokens: int, new: dict[str, int]) -> Work:
    responses = rows * sum(new.values())
    size = (prompt_tokens + responses) * (TEXT_BYTES + ID_BYTES) + (responses + rows * max(new.values())) * LOGP_BYTES
    return Work(title, rows * len(new), prompt_tokens + responses, size)


def table_of_work(works: list[Work]) -> str:
    """The plan as a Markdown table."""
    shown = [("stage", "sequences", "tokens", "disk", "")]
    for work in works:
        numbers = ("" if n is None else f"{n:,}" for n in (work.rows, work.tokens))
        shown.append((work.stage, *numbers, "" if work.bytes is None else _size(work.bytes), work.note))  # type: ignore[arg-type]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in shown]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
