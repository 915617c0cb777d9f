"""What a pair is made of: a prompt, y_t and y_s, in the tokens of the student and in those of the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dpkd_offline.common.errors import DataError, MismatchError, UsageError
from dpkd_offline.config.data import ScoreTeacherConfig
from dpkd_offline.dataset.catalog import is_begun, responses_of
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.layout import STUDENT_RESPONSES
from dpkd_offline.dataset.schema import Prompt, Response
from dpkd_offline.dataset.table import Table
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.prompts.reader import check_known
from dpkd_offline.prompts.retokenize import ResponseTokenizer, own_template


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
        student = student.with_chat_template(rendered.get("chat_template"))
        teacher = teacher.with_chat_template(own.chat_template)
        return cls(
            teacher=ResponseTokenizer(teacher.tokenizer, own.template, teacher.eos_ids, own.template_args),
            student=ResponseTokenizer(student.tokenizer, rendered["template"], eos, arguments),
            teacher_model=teacher,
            student_model=student,
            vocab_size=max(provenance["vocab_size"], len(student.tokenizer)),
        )


@dataclass(frozen=True)
class PairSource:
    """The rows of a round, whose token ids are used as they are where both models share a tokenizer.

    Where they do not, the teacher gets y_s by its text, and the student y_t. Each response is behind the prompt as the
    model sees it: the teacher's may say more, and the student's be in a template of its own.
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
        for role in ("teacher", "student"):
            dataset.prompts_seen_by(role).require_complete(f"dpkd-offline generate --role {role}")
        provenance = rejected.require_provenance()
        shared = dataset.shares_tokenizer(provenance["tokenizer_fingerprint"])
        retokenization = None if shared else Retokenization.open(dataset, config, teacher)
        return cls(dataset, chosen, rejected, provenance, retokenization)

    def of_sample(self, dataset: Dataset, round: int) -> PairSource:
        """The same rows with the responses of another sample, and those of the first of a role that has fewer.

        Raises:
            DataError: responses are missing.
        """
        if not dataset.sample:
            return self
        chosen, rejected = (responses_of(dataset, role, n) for role, n in (("teacher", 0), ("student", round)))
        chosen.require_complete(f"dpkd-offline generate --role teacher --samples {dataset.sample + 1}")
        rejected.require_complete(
            f"dpkd-offline generate --role student --round {round} --samples {dataset.sample + 1}"
        )
        provenance = rejected.require_provenance()
        return replace(self, dataset=dataset, chosen=chosen, rejected=rejected, rejected_provenance=provenance)

    @property
    def samples(self) -> dict[str, int]:
        """What `_table.json` says of the pairs' samples. Of those of the first it says nothing."""
        if not self.dataset.sample:
            return {}
        own = {"teacher_sample": self.chosen.sample, "student_sample": self.rejected.sample}
        return {"sample": self.dataset.sample, **own}

    def provenance(self, teacher: ModelInfo) -> dict[str, Any]:
        """What `_table.json` says of the pairs' student and tokens."""
        by_text, own = self.retokenization, self.dataset.student_prompts.provenance()
        return {
            "student": self.rejected_provenance.get("model"),
            **(own_template(own, self.dataset) if own else {}),
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
        tables = {role: self.dataset.prompts_seen_by(role) for role in ("teacher", "student")}
        read = {table.name: table.read(shard) for table in tables.values()}
        prompts, student_prompts = (read[table.name] for table in tables.values())
        chosen, rejected = (table.read(shard) for table in (self.chosen, self.rejected))
        for k, (seen, prompt, y_t, y_s) in enumerate(zip(student_prompts, prompts, chosen, rejected, strict=True)):
            if not seen.id == prompt.id == y_t.id == y_s.id:
                path = self.chosen.path(shard)
                raise DataError(f"{path}: row {k}: column 'id': {y_t.id}, the prompt is {prompt.id}")
        if self.retokenization is None:
            return [
                PairRow(seen, y_t, y_s, prompt.prompt_ids, [y_t.response_ids, y_s.response_ids], (True, True))
                for seen, prompt, y_t, y_s in zip(student_prompts, prompts, chosen, rejected, strict=True)
            ]
        both = self.retokenization
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
        longest = self.dataset.longest_of_teacher[1] + max(sampled)
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


def scored_samples(dataset: Dataset, round: int) -> list[Dataset]:
    """The dataset as each sample sees it of which a round has pairs: those that the student has, and in round 0, where
    y_t is scored, those that the teacher has."""
    return [
        of_sample
        for of_sample in dataset.samples()
        if not of_sample.sample
        or is_begun(of_sample.responses("student", round))
        or (not round and is_begun(of_sample.responses("teacher", 0)))
    ]


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
