"""The prompts of a recipe, read once before any stage runs: how many, how long, with references or without."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError, UsageError
from dpkd_offline.common.hashing import fingerprint
from dpkd_offline.config.data import GenerateConfig
from dpkd_offline.config.evaluate import EvaluateConfig
from dpkd_offline.config.recipe import Recipe
from dpkd_offline.dataset.columns import draws_of
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import Prompt
from dpkd_offline.dataset.scratch import KeyIndex
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.pipeline.stages import Stage, section_of
from dpkd_offline.prompts.reader import PromptReport, read_prompts
from dpkd_offline.prompts.teacher_view import TeacherView


@dataclass(frozen=True)
class PromptSurvey:
    """Some prompts in the teacher's tokens."""

    rows: int
    tokens: int
    longest: int  # tokens, as a student with these tokens sees them
    longest_of_teacher: int  # tokens
    referenced: int  # prompts with a reference
    known: int  # prompts that were surveyed before these
    draws: npt.NDArray[np.float64]  # [rows], by which prompts are held out

    def held_out(self, share: float) -> int:
        """How many of the prompts `train --holdout` holds out."""
        return int((self.draws < share).sum())


def survey(recipe: Recipe, stages: list[Stage]) -> tuple[PromptSurvey, PromptSurvey | None]:
    """The prompts to train on, and those to evaluate on, if there are.

    Raises:
        DataError: a row is wrong, or has no reference and `evaluate` needs one.
        UsageError: there is no source of prompts.
        UnavailableError: the tokenizer or the prompts cannot be loaded.
    """
    seen = KeyIndex()
    training = _count(*_training_prompts(recipe, stages), seen, "train")
    evaluation = next((stage.config for stage in stages if isinstance(stage.config, EvaluateConfig)), None)
    if evaluation is None:
        return training, None
    prompts = _prompts("evaluate", evaluation, recipe.teacher, need_reference=True)
    return training, _count(prompts, None, seen, "evaluate")


def _training_prompts(recipe: Recipe, stages: list[Stage]) -> tuple[Iterable[Prompt], TeacherView | int]:
    """The prompts, and the longest as the teacher sees them, in tokens; the view knows it when they have been read."""
    config = next(stage.config for stage in stages if isinstance(stage.config, GenerateConfig))
    section = section_of(recipe, "teacher")
    if config.prompts is not None:
        view = TeacherView(config.dataset, config.teacher_system, lengths_only=True)
        return _prompts(section, config, recipe.teacher, teacher=view), view
    if not Dataset.exists(config.dataset):
        raise UsageError(f"{section}.prompts: {config.dataset} is no dataset yet; name a source of prompts")
    dataset = Dataset.open(config.dataset)
    prompts = (prompt for shard in range(dataset.plan.count) for prompt in dataset.prompts.read(shard))
    return prompts, dataset.longest_of_teacher[1]


def _prompts(
    section: str,
    config: GenerateConfig | EvaluateConfig,
    model_name: str,
    need_reference: bool = False,
    teacher: TeacherView | None = None,
) -> Iterator[Prompt]:
    """The prompts that a section names, with which `read_prompts` reports how many it dropped."""
    model = ModelInfo.load(model_name, config.trust_remote_code)
    for name, source in (config.prompt_sets if isinstance(config, EvaluateConfig) else {"": config.prompts}).items():
        assert source is not None
        place, report = f"{section}.prompts{f'.{name}' if name else ''}", PromptReport()
        try:
            yield from read_prompts(source, config, model, report, need_reference=need_reference, teacher=teacher)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        console.info(f"{place}: {report}")


def _count(prompts: Iterable[Prompt], teacher: TeacherView | int | None, seen: KeyIndex, place: str) -> PromptSurvey:
    rows = tokens = longest = referenced = known = 0
    draws = array("d")
    for prompt in prompts:
        rows += 1
        tokens += len(prompt.prompt_ids)
        longest = max(longest, len(prompt.prompt_ids))
        referenced += bool(prompt.references)
        draws.extend(draws_of(pa.chunked_array([[prompt.id]])))
        first = seen.add([fingerprint(prompt.messages or prompt.prompt)], [f"{place} {rows}"])
        known += first is not None and not str(first[1]).startswith(place)  # a prompt may stand twice in its own set
    of_teacher = teacher.longest if isinstance(teacher, TeacherView) else teacher or 0
    return PromptSurvey(rows, tokens, longest, max(longest, of_teacher), referenced, known, np.array(draws))
