"""What a pair is made of: a prompt, y_t and y_s, in the tokens of the student and in those of the teacher."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from dpkd_offline.common.errors import DataError, MismatchError, UsageError
from dpkd_offline.config.data import ScoreTeacherConfig
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import Prompt, Response
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.prompts.retokenize import ResponseTokenizer


@dataclass(frozen=True)
class PairRow:
    """One row of prompts and responses, in the student's tokens, and what the teacher scores."""

    prompt: Prompt
    y_t: Response
    y_s: Response
    asked_prompt_ids: list[int]
    asked_response_ids: list[list[int]]  # of y_t and y_s
    exact: tuple[bool, bool]  # of y_t and y_s: whether both models' tokens are of the same text


class PairSource:
    """The rows of a round, whose token ids are used as they are where both models share a tokenizer.

    Where they do not, the teacher gets y_s by its text, and the student y_t.
    """

    def __init__(self, dataset: Dataset, config: ScoreTeacherConfig, teacher: ModelInfo) -> None:
        """
        Raises:
            DataError: responses are missing.
            MismatchError: --student is not of the tokenizer that the student's responses have.
            UsageError: the tokenizers differ, and --student is missing, or the teacher's likeliest tokens are wanted.
        """
        self._dataset = dataset
        self._chosen, self._rejected = dataset.responses("teacher", 0), dataset.responses("student", config.round)
        self._chosen.require_complete("dpkd-offline generate --role teacher")
        self._rejected.require_complete(f"dpkd-offline generate --role student --round {config.round}")
        self.made_by = self._rejected.require_provenance()  # y_s
        self.by_text = not dataset.shares_tokenizer(self.made_by["tokenizer_fingerprint"])
        if self.by_text:
            self._teacher = ResponseTokenizer(teacher.tokenizer, dataset.prompt_set.template, teacher.eos_ids)
            self._student = self._load_student(config)

    def _load_student(self, config: ScoreTeacherConfig) -> ResponseTokenizer:
        path = self._rejected.folder / "_table.json"
        if config.student is None:
            raise UsageError(
                f"{path}: {self.made_by['model']['name']} has another tokenizer than the teacher; name it with "
                f"--student, since the pairs are in its tokens"
            )
        if config.top_k:
            raise UsageError(f"{path}: --top-k is for students that share the teacher's tokenizer, this one does not")
        student = ModelInfo.load(config.student, config.trust_remote_code)
        if student.tokenizer_fingerprint != self.made_by["tokenizer_fingerprint"]:
            raise MismatchError(f"{path}: sampled with another tokenizer than that of --student {config.student}")
        prompts = self._dataset.student_prompts
        prompts.require_complete("dpkd-offline generate --role student")
        template = prompts.require_provenance()["template"]
        self._largest = max(self.made_by["vocab_size"], len(student.tokenizer))
        return ResponseTokenizer(student.tokenizer, template, self.made_by["eos_token_ids"])

    def provenance(self, vocab_size: int) -> dict[str, Any]:
        """What `_table.json` says of the pairs' tokens; `vocab_size` is the teacher's."""
        return {
            "scored": "text" if self.by_text else "ids",
            "tokenizer_fingerprint": self.made_by["tokenizer_fingerprint"],
            "vocab_size": self._largest if self.by_text else vocab_size,
        }

    def sampled_in(self, shard: int, round: int) -> list[int]:
        """The rows of a shard whose y_s was sampled in a round, and not kept from one before."""
        rounds = self._rejected.read_arrow(shard, ["round"])["round"].to_pylist()
        return [row for row, of in enumerate(rounds) if of == round]

    def rows(self, shard: int) -> list[PairRow]:
        """One shard, or a DataError where its tables are not of each other."""
        prompts, chosen, rejected = (
            self._dataset.prompts.read(shard),
            self._chosen.read(shard),
            self._rejected.read(shard),
        )
        for k, (prompt, y_t, y_s) in enumerate(zip(prompts, chosen, rejected, strict=True)):
            if not prompt.id == y_t.id == y_s.id:
                path = self._chosen.path(shard)
                raise DataError(f"{path}: row {k}: column 'id': {y_t.id}, the prompt is {prompt.id}")
        if not self.by_text:
            return [
                PairRow(prompt, y_t, y_s, prompt.prompt_ids, [y_t.response_ids, y_s.response_ids], (True, True))
                for prompt, y_t, y_s in zip(prompts, chosen, rejected, strict=True)
            ]
        seen = self._dataset.student_prompts.read(shard)
        spelled, chosen_exact = _respell(chosen, self._teacher, self._student)
        asked, rejected_exact = _respell(rejected, self._student, self._teacher)
        return [
            PairRow(
                prompt=seen[k],
                y_t=replace(chosen[k], response_ids=spelled[k]),
                y_s=rejected[k],
                asked_prompt_ids=prompts[k].prompt_ids,
                asked_response_ids=[chosen[k].response_ids, asked[k]],
                exact=(chosen_exact[k], rejected_exact[k]),
            )
            for k in range(len(prompts))
        ]


def _respell(
    responses: list[Response], own: ResponseTokenizer, other: ResponseTokenizer
) -> tuple[list[list[int]], list[bool]]:
    """Responses in the tokens of the other model, and whether nothing is lost: see `PreferencePair`."""
    texts = [response.response for response in responses]
    ids, exact = other.spell(texts, [response.finish_reason for response in responses])
    repeated = own.repeats(texts, [response.response_ids for response in responses])
    return ids, [a and b for a, b in zip(exact, repeated, strict=True)]
