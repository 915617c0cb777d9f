"""The responses of an evaluation while it is made: a file a group of draws, in a folder that is gone at the end.

A draw is a prompt under a seed; all prompts come under the first seed, then under the next. A group is a shard of the
draws, committed as a whole: what has its name is done, whoever dies when.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError
from dpkd_offline.common.files import write_atomically
from dpkd_offline.config.evaluate import EvaluateConfig
from dpkd_offline.dataset.schema import Prompt
from dpkd_offline.dataset.scratch import Spool
from dpkd_offline.dataset.table import ShardPlan
from dpkd_offline.dataset.writing import commit_results
from dpkd_offline.engines.base import Completion, Engine, GenerateRequest, Score, ScoreRequest, row_seed
from dpkd_offline.metrics.text import MEASURES, REPEATING, acceptance, answer_of, repetition
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.prompts.reader import check_known
from dpkd_offline.prompts.retokenize import ResponseTokenizer
from dpkd_offline.prompts.templates import render, template_name

GROUP = 256  # draws: all that an engine may sort by length, and that is lost where a run is killed
Row = dict[str, Any]  # a line of responses.jsonl
IDS, LOGPS = "_ids", "_logps"  # of a response's tokens, for the teacher: ids, and the model's own log-probs in nats
Draw = tuple[int, Prompt]  # seed, prompt


@dataclass(frozen=True)
class Stage:
    """The groups of one step of the work."""

    folder: Path
    plan: ShardPlan

    def _path(self, group: int) -> Path:
        return self.folder / f"{group:06d}.jsonl"

    def pending(self) -> list[int]:
        """The groups that are still to be made."""
        return [group for group in range(self.plan.count) if not self._path(group).exists()]

    def write(self, group: int, rows: Sequence[Row]) -> None:
        write_atomically(
            self._path(group), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        )

    def read(self, group: int) -> list[Row]:
        path = self._path(group)
        try:
            rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: damaged: {error}; delete it, and the same command makes it again") from error
        if len(rows) != self.plan.rows_of(group):
            raise DataError(f"{path}: damaged: {len(rows)} lines; delete it, and the same command makes it again")
        return rows

    def rows(self) -> Iterator[Row]:
        """The lines of responses.jsonl, of all groups in order."""
        for group in range(self.plan.count):
            for row in self.read(group):
                yield {key: value for key, value in row.items() if key not in (IDS, LOGPS)}


class Parts:
    """The groups of an evaluation: sampled ones, and of these the ones that the teacher has scored."""

    def __init__(self, folder: Path, prompts: int, seeds: Sequence[int]) -> None:
        plan = ShardPlan(prompts * len(seeds), GROUP)
        self.sampled, self.scored = Stage(folder / "sampled", plan), Stage(folder / "scored", plan)
        self._seeds = seeds

    def draws(self, prompts: Spool[Prompt], groups: Sequence[int]) -> Iterator[tuple[int, list[Draw]]]:
        """Some groups, in rising order, with what each of their rows answers."""
        draws = ((seed, prompt) for seed in self._seeds for prompt in prompts)
        at = 0
        for group in groups:
            yield group, list(islice(draws, (group - at) * GROUP, (group - at + 1) * GROUP))
            at = group + 1


@dataclass(frozen=True)
class Sampling:
    """Samples groups from the model, and compares the responses with the references."""

    config: EvaluateConfig
    parts: Parts
    prompts: Spool[Prompt]
    model: ModelInfo
    _draws: dict[int, list[Draw]] = field(default_factory=dict)  # of the groups that are under way

    def run(self, engine: Engine, pending: Sequence[int]) -> None:
        plan = self.parts.sampled.plan
        results = engine.generate(self._requests(pending), self.config)
        commit_results(plan, {g: plan.rows_of(g) for g in pending}, results, self._write, label="evaluate")

    def _requests(self, pending: Sequence[int]) -> Iterator[list[GenerateRequest]]:
        for group, draws in self.parts.draws(self.prompts, pending):
            self._draws[group] = draws
            yield [
                GenerateRequest(
                    (group, n),
                    prompt.prompt_ids,
                    row_seed(seed, "evaluate", prompt.id),
                    self.config.teacher is not None,
                )
                for n, (seed, prompt) in enumerate(draws)
            ]

    def _write(self, group: int, completions: list[Completion]) -> None:
        texts, rows = self._texts([completion.response_ids for completion in completions]), []
        for (seed, prompt), text, completion in zip(self._draws.pop(group), texts, completions, strict=True):
            answer = answer_of(prompt.prompt, text, self.config.thinking_end)
            row: Row = {
                "seed": seed,
                "id": prompt.id,
                "messages": prompt.messages,
                "prompt": prompt.prompt,
                "references": prompt.references,
                "response": text,
                "finish_reason": completion.finish_reason,
                "tokens": len(completion.response_ids),
                "repeating": repetition(completion.response_ids) > REPEATING,
                **{name: measure.of(answer or "", prompt.references or []) for name, measure in MEASURES.items()},
            }
            if answer != text:
                row |= {"answer": answer or ""} | ({"unfinished_thoughts": True} if answer is None else {})
            if self.config.teacher is not None:
                row |= {IDS: completion.response_ids, LOGPS: completion.logps}
            rows.append(row)
        self.parts.sampled.write(group, rows)

    def _texts(self, responses: list[list[int]]) -> list[str]:
        """Responses as text, without special tokens but for what ends a thought."""
        tokenizer, end = self.model.tokenizer, self.config.thinking_end
        if end is None or end not in tokenizer.all_special_tokens:
            return tokenizer.batch_decode(responses, skip_special_tokens=True)
        mark, texts = tokenizer.convert_tokens_to_ids(end), []
        for ids in responses:
            ends = [place for place, token in enumerate(ids) if token == mark]
            parts = [ids[: ends[-1]], ids[ends[-1] + 1 :]] if ends else [ids]
            texts.append(end.join(tokenizer.batch_decode(parts, skip_special_tokens=True)))
        return texts


@dataclass
class Scoring:
    """Adds the teacher's NLL and the implicit reward to sampled groups."""

    config: EvaluateConfig
    parts: Parts
    prompts: Spool[Prompt]
    model: ModelInfo
    teacher: ModelInfo

    def __post_init__(self) -> None:
        self._rows: dict[int, list[Row]] = {}  # of the groups that are under way
        self._inexact = 0
        self._by_text = self.teacher.tokenizer_fingerprint != self.model.tokenizer_fingerprint
        if self._by_text:
            console.info(
                f"{self.teacher.name} has another tokenizer than {self.model.name}: it scores the text, in its own "
                f"template"
            )
            own = self.config.template  # of a file, which is for the model, the teacher knows nothing
            asked = own if self.model.chat_template is None else "auto"
            self._templates = [template_name(own, self.model.tokenizer), template_name(asked, self.teacher.tokenizer)]
            self._arguments = self.config.template_args or {}
            self._tokens = ResponseTokenizer(
                self.teacher.tokenizer, self._templates[1], self.teacher.eos_ids, self._arguments
            )

    def run(self, engine: Engine, pending: Sequence[int]) -> None:
        plan = self.parts.scored.plan
        counts = {group: plan.rows_of(group) for group in pending}
        commit_results(plan, counts, engine.score(self._requests(pending)), self._write, label="evaluate: teacher")
        if self._inexact:
            of = sum(counts.values())
            console.info(
                f"{self._inexact} of {of} responses are not quite the same text in the tokens of {self.teacher.name}"
            )

    def _requests(self, pending: Sequence[int]) -> Iterator[list[ScoreRequest]]:
        for group, draws in self.parts.draws(self.prompts, pending):
            self._rows[group] = rows = self.parts.sampled.read(group)
            prompts, ids = [prompt for _, prompt in draws], [row[IDS] for row in rows]
            if self._by_text:
                prompts, ids = self._retokenized(prompts, rows)
            yield [
                ScoreRequest((group, n), prompt.prompt_ids, [response])
                for n, (prompt, response) in enumerate(zip(prompts, ids, strict=True))
            ]

    def _retokenized(self, prompts: Sequence[Prompt], rows: Sequence[Row]) -> tuple[list[Prompt], list[list[int]]]:
        """Prompts and responses in the template and the tokens of the teacher."""
        original, template = self._templates
        rendered = [render(prompt, original, template, self.teacher.tokenizer, self._arguments) for prompt in prompts]
        texts, reasons = [row["response"] for row in rows], [row["finish_reason"] for row in rows]
        ids, exact = self._tokens.encode([prompt.prompt for prompt in rendered], texts, reasons)
        for row, prompt, tokens in zip(rows, rendered, ids, strict=True):
            check_known(f"prompt '{row['id']}'", prompt.prompt_ids, self.teacher)
            check_known(f"prompt '{row['id']}': its response", tokens, self.teacher)
        self._inexact += list(exact).count(False)
        return rendered, ids

    def _write(self, group: int, scores: list[list[Score]]) -> None:
        rows = self._rows.pop(group)
        sampled_as_they_are = self.config.temperature == self.config.top_p == 1
        for row, (score,) in zip(rows, scores, strict=True):
            total, own = sum(score.logps), row.pop(LOGPS)
            row["teacher_nll"] = -total / len(score.logps)
            row["reward"] = self.config.beta * (sum(own) - total) / len(row.pop(IDS))
            if not self._by_text and sampled_as_they_are:
                row["accepted"] = 100 * acceptance(own, score.logps)
        self.parts.scored.write(group, rows)
