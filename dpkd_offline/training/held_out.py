"""What training never sees, opened before a model is loaded: held-out examples, and prompts for the student to answer.

Which prompts are held out is a function of their ids.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.dataset.columns import draws_of, draws_of_rows
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.prompts.retokenize import prompts_for
from dpkd_offline.training.stream import Example, HeldOutExamples, Stream


@dataclass(frozen=True)
class ReferencePrompt:
    """A prompt to answer, and good answers."""

    prompt_ids: list[int]
    references: list[str]


@dataclass(frozen=True)
class HeldOut:
    """What a validation reads."""

    examples: HeldOutExamples  # for losses and rewards
    reference_prompts: list[ReferencePrompt]  # for Rouge-L
    answered: list[Example]  # whose prompts are answered too, for the form of the responses
    max_new_tokens: int  # of these responses: as many as the longest that is stored


def read_held_out(stream: Stream, dataset: Dataset, student: ModelInfo, config: TrainConfig) -> HeldOut:
    """What a stream leaves for validation, with the prompts that the student is to answer.

    Prompts that leave no room for a response within the student's positions are not answered.

    Raises:
        DataError: Rouge-L is asked for, and no held-out prompt is of use for it.
    """
    if config.holdout and not stream.held_out.count:
        console.info(
            f"warning: --holdout {config.holdout} holds out none of {len(stream)} examples: nothing says whether "
            f"the student gets better"
        )
    answered = list(stream.held_out.read(config.validate_responses))
    longest = max((len(response) for e in answered for response in e.responses), default=0)
    max_new_tokens = min(config.validate_max_new_tokens, longest)
    room = student.context_length - max_new_tokens
    answered = [e for e in answered if len(e.prompt_ids) <= room]
    return HeldOut(stream.held_out, read_reference_prompts(dataset, student, config), answered, max_new_tokens)


def read_reference_prompts(dataset: Dataset, student: ModelInfo, config: TrainConfig) -> list[ReferencePrompt]:
    """The held-out prompts of the smallest draws, as many as Rouge-L is asked for, of those with a reference.

    Prompts that leave no room for an answer within `max_length` or the student's positions are left out.

    Raises:
        DataError: there is none.
    """
    if not config.validate_rouge:
        return []
    drawn = heapq.nsmallest(config.validate_rouge, _held_out_prompts(dataset, student, config), key=lambda d: d[0])
    if not drawn:
        raise DataError(
            f"{dataset.prompts.folder}: no held-out prompt has a reference and room for "
            f"{config.validate_max_new_tokens} tokens, for --validate-rouge"
        )
    return [prompt for _, prompt in drawn]


def _held_out_prompts(
    dataset: Dataset, student: ModelInfo, config: TrainConfig
) -> Iterator[tuple[float, ReferencePrompt]]:
    """The draws of all held-out prompts that have a reference and room for an answer, with the prompts."""
    longest = min(config.max_length, student.context_length) - config.validate_max_new_tokens
    prompts = prompts_for(dataset, student)
    for shard in range(dataset.plan.count):
        rows = prompts.read_arrow(shard, ["id", "prompt_ids", "references"])
        draws = draws_of_rows(rows["id"])
        for row in (draws_of(rows["id"]) < config.holdout).nonzero()[0].tolist():
            prompt = ReferencePrompt(rows["prompt_ids"][row].as_py(), rows["references"][row].as_py())
            if prompt.references and len(prompt.prompt_ids) <= longest:
                yield float(draws[row]), prompt
