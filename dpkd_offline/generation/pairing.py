"""What a pair is made of: a prompt, y_t and y_s, in the tokens of the student and in those of the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dpkd_offline.common.errors import DataError, MismatchError, UsageError
from dpkd_offline.config.data import ScoreTeacherConfig
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.layout import STUDENT_RESPONSES
from dpkd_offline.dataset.schema import Prompt, Response
from dpkd_offline.dataset.table import Table
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.prompts.reader import check_known
from dpkd_offline.prompts.retokenize import ResponseTokenizer


@dataclass(frozen=True)
class PairRow:
    """One row of prompts and responses, in the student's tokens, and what the teacher scores."""

    prompt: Prompt
    y_t: Response
    y_s: Response
    teacher_prompt_ids: list[int]
    teacher_response_ids: list[list[int]]  # of y_t and y_s
    exact: tuple[bool, bool]  # of y_t and y_s: whether both models' tokens are of the same text


@dataclass(frozen=True)
class Retokenization:
    """What it takes to say a pair in the tokens of two models that do not share a tokenizer."""

    student_prompts: Table[Prompt]
    teacher: ResponseTokenizer
    student: ResponseTokenizer
    teacher_model: ModelInfo
    student_model: ModelInfo
    vocab_size: int  # every id of the student's tokens is smaller

    @classmethod
    def open(cls, dataset: Dataset, config: ScoreTeacherConfig, teacher: ModelInfo) -> Retokenization:
        """Raises what `PairSource.open` does of tokenizers."""
        rejected = dataset.responses("student", config.round)
        path, provenance = rejected.folder / "_table.json", rejected.require_provenance()
        if config.student is None:
            raise UsageError(
                f"{path}: {provenance['model']['name']} has another tokenizer than the teacher; name it with "
                f"--student, since the pairs are in its tokens"
            )
        if config.top_k:
            raise UsageError(f"{path}: --top-k is for students that share the teacher's tokenizer, this one does not")
        student = ModelInfo.load(config.student, config.trust_remote_code)
        if student.tokenizer_fingerprint != provenance["tokenizer_fingerprint"]:
            raise MismatchError(f"{path}: sampled with another tokenizer than that of --student {config.student}")
        prompts = dataset.student_prompts
        prompts.require_complete("dpkd-offline generate --role student")
        rendered, own = prompts.require_provenance(), dataset.prompt_set
        eos, arguments = provenance["eos_token_ids"], rendered.get("template_args", {})
        return cls(
            student_prompts=prompts,
            teacher=ResponseTokenizer(teacher.tokenizer, own.template, teacher.eos_ids, own.template_args),
            student=ResponseTokenizer(student.tokenizer, rendered["template"], eos, arguments),
            teacher_model=teacher,
            student_model=student,
            vocab_size=max(provenance["vocab_size"], len(student.tokenizer)),
        )


@dataclass(frozen=True)
class PairSource:
    """The rows of a round, whose token ids are used as they are where both models share a tokenizer.

    Where they do not, the teacher gets y_s by its text, and the student y_t.
    """

    dataset: Dataset
    chosen: Table[Response]  # y_t
    rejected: Table[Response]  # y_s
    rejected_provenance: Mapping[str, Any]
    retokenization: Retokenization | None  # where the models do not share a tokenizer

    @classmethod
    def open(cls, dataset: Dataset, config: ScoreTeacherConfig, teacher: ModelInfo) -> PairSource:
        """The rows of the round that the config names.

        Raises:
            DataError: responses are missing.
            MismatchError: --student is not of the tokenizer that the student's responses have.
            UsageError: the tokenizers differ, and --student is missing, or the teacher's likeliest tokens are wanted.
        """
        chosen, rejected = dataset.responses("teacher", 0), dataset.responses("student", config.round)
        chosen.require_complete("dpkd-offline generate --role teacher")
        dataset.require_student()
        dataset.require_round(STUDENT_RESPONSES, config.round)
        rejected.require_complete(f"dpkd-offline generate --role student --round {config.round}")
        provenance = rejected.require_provenance()
        shared = dataset.shares_tokenizer(provenance["tokenizer_fingerprint"])
        retokenization = None if shared else Retokenization.open(dataset, config, teacher)
        return cls(dataset, chosen, rejected, provenance, retokenization)

    def provenance(self, teacher: ModelInfo) -> dict[str, Any]:
        """What `_table.json` says of the pairs' student and tokens."""
        by_text = self.retokenization
        return {
            "student": self.rejected_provenance.get("model"),
            "scored": "text" if by_text else "ids",
            "tokenizer_fingerprint": self.rejected_provenance["tokenizer_fingerprint"],
            "vocab_size": by_text.vocab_size if by_text else teacher.vocab_size,
        }

    def sampled_in(self, shard: int, round: int) -> list[int]:
        """The rows of a shard whose y_s was sampled in a round, and not kept from one before."""
        rounds = self.rejected.read_arrow(shard, ["round"])["round"].to_pylist()
        return [row for row, sampled_in in enumerate(rounds) if sampled_in == round]

    def rows(self, shard: int) -> list[PairRow]:
        """One shard, or a DataError where its tables are not of each other."""
        prompts = self.dataset.prompts.read(shard)
        chosen, rejected = (table.read(shard) for table in (self.chosen, self.rejected))
        for k, (prompt, y_t, y_s) in enumerate(zip(prompts, chosen, rejected, strict=True)):
            if not prompt.id == y_t.id == y_s.id:
                path = self.chosen.path(shard)
                raise DataError(f"{path}: row {k}: column 'id': {y_t.id}, the prompt is {prompt.id}")
        if self.retokenization is None:
            return [
                PairRow(prompt, y_t, y_s, prompt.prompt_ids, [y_t.response_ids, y_s.response_ids], (True, True))
                for prompt, y_t, y_s in zip(prompts, chosen, rejected, strict=True)
            ]
        both = self.retokenization
        student_prompts = both.student_prompts.read(shard)
        of_teacher, of_student = (prompts, both.teacher), (student_prompts, both.student)
        chosen_ids, chosen_exact = retokenized(chosen, of_teacher, of_student, both.student_model)
        rejected_ids, rejected_exact = retokenized(rejected, of_student, of_teacher, both.teacher_model)
        return [
            PairRow(
                prompt=student_prompts[k],
                y_t=replace(chosen[k], response_ids=chosen_ids[k]),
                y_s=rejected[k],
                teacher_prompt_ids=prompts[k].prompt_ids,
                teacher_response_ids=[chosen[k].response_ids, rejected_ids[k]],
                exact=(chosen_exact[k], rejected_exact[k]),
            )
            for k in range(len(prompts))
        ]

    def check_lengths(self, limit: int, model: str) -> None:
        """Raise UsageError unless every prompt with its responses has at most `limit` tokens, which `model` takes."""
        unknown = {"max_new_tokens": limit}  # of responses that were imported
        sampled = [
            table.require_provenance().get("sampling", unknown)["max_new_tokens"]
            for table in (self.chosen, self.rejected)
        ]
        all_sampled = self.rejected_provenance.get("share") == 1  # kept ones may be longer than this round allows
        longest = self.dataset.prompt_set.longest_prompt_tokens + max(sampled)
        if all_sampled and self.retokenization is None and longest <= limit:
            return  # no need to look: nothing can be longer
        for shard in range(self.dataset.plan.count):
            for row in self.rows(shard):
                needed = len(row.teacher_prompt_ids) + max(map(len, row.teacher_response_ids))
                if needed > limit:
                    raise UsageError(
                        f"prompt '{row.prompt.id}' with its responses has {needed} tokens, max-length and the context "
                        f"of {model} give {limit}; raise --max-length, or take another teacher"
                    )


Reader = tuple[list[Prompt], ResponseTokenizer]  # prompts as a model sees them, and its tokens of responses


def retokenized(
    responses: list[Response], own: Reader, other: Reader, model: ModelInfo
) -> tuple[list[list[int]], list[bool]]:
    """Responses in the tokens of the other model, and whether nothing is lost: see `PreferencePair`.

    Raises:
        DataError: `model`, which is the other one, does not know a token.
    """
    texts = [response.response for response in responses]
    before, after = ([prompt.prompt for prompt in prompts] for prompts, _ in (own, other))
    ids, exact = other[1].encode(after, texts, [response.finish_reason for response in responses])
    same = own[1].encodes_to(before, texts, [response.response_ids for response in responses])
    for response, tokens in zip(responses, ids, strict=True):
        check_known(f"prompt '{response.id}': column 'response'", tokens, model)
    return ids, [a and b for a, b in zip(exact, same, strict=True)]
