"""`judge`: let a model judge the responses of evaluations, in pairs or beside their references.

Each verdict is on the disk as soon as it came (`verdicts.py`), so that none is asked for, or paid for, twice. Numbers
are made of all verdicts at the end, whenever they came.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpkd_offline.common import console
from dpkd_offline.common.errors import DataError, UnavailableError
from dpkd_offline.common.files import write_json
from dpkd_offline.common.hashing import fingerprint
from dpkd_offline.common.markdown import inline_code, markdown_table
from dpkd_offline.common.ownership import claim_of, output_folder
from dpkd_offline.common.results import Result
from dpkd_offline.config.base import redacted_dict, write_yaml
from dpkd_offline.config.judge import JudgeConfig
from dpkd_offline.evaluation.judge_prompts import VERSION, comparison, rating
from dpkd_offline.evaluation.judges import Judge, Question, judge_of
from dpkd_offline.evaluation.responses import Draw, ResponseRow, Responses, check_same_prompts
from dpkd_offline.evaluation.summary import RESULTS
from dpkd_offline.evaluation.verdicts import Order, Verdict, VerdictKey, VerdictTable
from dpkd_offline.metrics.preference import Comparison, score_means, warnings_of, win_rates

Results = dict[str, Any]
VERDICTS = "verdicts.jsonl"  # in the output folder, beside results.json
ORDERS: dict[str, tuple[Order, Order]] = {"pairwise": ("a-b", "b-a"), "score": ("response", "reference")}
SHOWN = 80  # characters of an answer that is no verdict


@dataclass(frozen=True)
class JudgeResult(Result):
    """The output folder, and what its results.json holds; of a dry run, what would be asked."""

    results: Results


def judge(config: JudgeConfig) -> JudgeResult:
    """Ask for the verdicts that are missing; write `verdicts.jsonl` and `results.json`.

    pairwise: each pair of responses is judged in both orders, and won where both agree. `win_rate` is of A, in percent,
    with a tie counting half; `controlled_win_rate` is that at equal lengths (`metrics/preference.py`). score: each
    response and its first reference, beside each other, from 1 to 10; `ratio_of_sums` is of their sums, in percent. An
    interval is of 95 %, over prompts. What has no verdict is counted in `failed` and is in no number.

    Raises:
        DataError: a folder is no finished evaluation, or has responses without a reference to score them beside.
        MismatchError: the evaluations are of different prompts, a file was changed, or the output is of another run.
        OutputBusy: another command writes the output now.
        StorageError: the disk is full or fails; the same call goes on.
        UnavailableError: the judge cannot be loaded or reached, or none of its answers is a verdict.
        UsageError: the judge's server refuses the questions, or these are longer than `max_length`.
    """
    work = _Work.of(config)
    if config.dry_run:
        return JudgeResult(config.folder, work.still_needed())
    with output_folder(config.folder, "judgement", "judge") as output:
        path = config.folder / VERDICTS
        output.claim(work.run, known=lambda: None, begun=path.exists())
        table = VerdictTable.read(path, work.judge.name, VERSION)
        work.ask(table)
        results = work.results(table)
        results["verdicts"] = table.put_in_order(list(work.keys()))
        write_yaml(config.folder / "judge.yaml", {"judge": redacted_dict(config)})
        write_json(config.folder / RESULTS, results)
    for warning in results["warnings"]:
        console.info(f"warning: {warning}")
    return JudgeResult(config.folder, results, warnings=tuple(results["warnings"]))


@dataclass(frozen=True)
class _Work:
    """What there is to judge, and who does."""

    config: JudgeConfig
    a: Responses
    b: Responses | None
    judge: Judge
    draws: list[Draw]

    @classmethod
    def of(cls, config: JudgeConfig) -> _Work:
        a, b = Responses.open(config.a), None if config.b is None else Responses.open(config.b)
        draws = a.first_prompts(config.limit)
        if b is not None:
            check_same_prompts(a, b)
        else:
            for draw, row in zip(draws, a.rows(draws), strict=True):
                if not row.references:
                    raise DataError(f"{a.place(draw)}: prompt '{row.id}' has no reference to score its response beside")
        return cls(config, a, b, judge_of(config), draws)

    @property
    def made(self) -> Results:
        """What results.json says of the results."""
        sides = {"a": self.a, **({} if self.b is None else {"b": self.b})}
        evaluations = {name: {"model": side.model, "responses": side.sha256} for name, side in sides.items()}
        return {"judge": self.judge.identity, "form": self.config.form, "prompt_version": VERSION, **evaluations}

    @property
    def run(self) -> str:
        """Equal where a verdict of one is a verdict of the other."""
        return fingerprint(self.made)

    def keys(self) -> Iterator[VerdictKey]:
        return ((*draw, order) for draw in self.draws for order in ORDERS[self.config.form])

    def _rows(self, draws: list[Draw]) -> Iterator[tuple[ResponseRow, str]]:
        """Lines of A, each with what stands beside its response: B's, or the first reference."""
        if self.b is None:
            yield from ((row, (row.references or [""])[0]) for row in self.a.rows(draws))
        else:
            rows = zip(self.a.rows(draws), self.b.rows(draws), strict=True)
            yield from ((row, other.text) for row, other in rows)

    def _questions(self, pending: set[VerdictKey]) -> Iterator[Question]:
        draws = list(dict.fromkeys(key[:2] for key in self.keys() if key in pending))
        for draw, (row, other) in zip(draws, self._rows(draws), strict=True):
            for order in ORDERS[self.config.form]:
                if (*draw, order) in pending:
                    ask = comparison if self.b is not None else rating
                    first, second = (row.text, other) if order in ("a-b", "response") else (other, row.text)
                    yield Question((*draw, order), ask(row.task, first, second))

    def ask(self, table: VerdictTable) -> None:
        """Add the verdicts that are missing."""
        keys = list(self.keys())
        pending = {key for key in keys if key not in table.verdicts}
        if pending:
            done = len(keys) - len(pending)
            with table.appending(), console.progress("judge", len(keys), "verdict", done) as progress:
                for _ in self.judge.judge(self._questions(pending), table):
                    progress.advance()

    def still_needed(self) -> Results:
        """The calls and tokens that `ask` would need now."""
        claim, table = claim_of(self.config.folder), None
        if claim is not None and claim.run == self.run:
            table = VerdictTable.read(self.config.folder / VERDICTS, self.judge.name, VERSION)
        pending = {key for key in self.keys() if table is None or key not in table.verdicts}
        answers = len(pending) * self.config.max_new_tokens if self.config.model is None else 0
        return {
            "form": self.config.form,
            "judge": self.judge.name,
            "calls": len(pending),
            "prompt_tokens": sum(map(self.judge.tokens, self._questions(pending))),
            "counted_in": self.judge.counts,
            "answer_tokens": answers,
        }

    def results(self, table: VerdictTable) -> Results:
        """What results.json holds, but for the hash of the verdicts.

        Raises:
            UnavailableError: there is no pair of verdicts to make numbers of.
        """
        numbers: dict[str, int] = {}  # of the prompts
        pairs: list[tuple[int, float, float, int, int]] = []
        failures: list[Verdict] = []
        for draw, (row, other) in zip(self.draws, self._rows(self.draws), strict=True):
            verdicts = [table.verdicts[*draw, order] for order in ORDERS[self.config.form]]
            failures += [verdict for verdict in verdicts if verdict.value is None]
            first, second = (verdict.value for verdict in verdicts)
            if first is not None and second is not None:
                number = numbers.setdefault(row.id, len(numbers))
                pairs.append((number, first, second, len(row.text), len(other)))
        if not pairs:
            raise UnavailableError(f"judge {self.judge.name}: no verdict could be read: {_example(failures)}")
        columns = [np.array(column) for column in zip(*pairs, strict=True)]
        warnings = [f"{len(failures)} verdicts failed and are in no number: {_example(failures)}"] if failures else []
        if self.b is None:
            measures = score_means(*columns[:3])
            measures["mean_length"] = {"response": float(columns[3].mean()), "reference": float(columns[4].mean())}
        else:
            comparison = Comparison(*columns)
            measures = win_rates(comparison)
            warnings += warnings_of(comparison, measures)
        probable = sum(table.verdicts[key].probability is not None for key in self.keys())
        return {
            "form": self.config.form,
            "judge": self.judge.name,
            "prompt_version": VERSION,
            "prompts": len(numbers),
            "pairs": len(pairs),
            "asked": 2 * len(self.draws),
            **measures,
            "failed": len(failures),
            "probabilities": probable,
            "warnings": warnings,
            "made": self.made,
        }


def _example(failures: Sequence[Verdict]) -> str:
    """Why the first verdict failed, and what the judge said."""
    first = failures[0]
    answer = f", as in {inline_code(first.text[:SHOWN])}" if first.text.strip() else ""
    return f"{inline_code(first.failure)[1:-1]}{answer} (prompt {inline_code(first.id)})"


# --- for people -------------------------------------------------------------------------------------------------------


def summary(results: Mapping[str, Any], a: str, b: str | None) -> str:
    """Results in words, and as a table with the direction that is good.

    Args:
        a, b: what the evaluations are called; B is None where A is scored beside its references.
    """
    judge, a = inline_code(results["judge"]), inline_code(a)
    if b is None:
        ratio = _with_interval(results, "ratio_of_sums", " %")
        sentence = f"By the judge {judge}, the responses of A ({a}) reach {ratio} of the scores of their references."
        rows = [
            ("mean score of A", _with_interval(results, "mean_score"), "1 to 10, more is better"),
            ("mean score of references", f"{results['mean_reference_score']:.2f}", ""),
            ("ratio of sums", ratio, "A / references, as MiniLLM reports it; more is better"),
        ]
    else:
        better = _better(results["win_rate_interval"])
        word = f"A is {better} than B" if better else f"it cannot tell on {results['prompts']} prompts"
        sentence = f"By the judge {judge}, {word}: A ({a}) against B ({inline_code(b)})."
        rows = [
            ("win rate of A", _with_interval(results, "win_rate", " %"), "above 50: A is better"),
            ("mean preference for A", f"{results['preference']:.1f} %", "the same with the judge's doubts"),
            (
                "the latter at equal lengths",
                _with_interval(results, "controlled_win_rate", " %"),
                "above 50: A is better",
            ),
            ("ties", f"{results['ties']:.1f} %", "the orders disagree, or neither is preferred"),
            ("order disagreement", f"{results['order_disagreement']:.1f} %", "less is better: a steadier judge"),
        ]
    lengths = ", ".join(f"{value:.0f} of {name}" for name, value in results["mean_length"].items())
    rows += [
        ("mean length in characters", lengths.replace("of a", "of A").replace("of b", "of B"), ""),
        ("failed verdicts", str(results["failed"]), f"of {results['asked']}; in no number"),
    ]
    count = f"{results['pairs']} pairs of {results['prompts']} prompts; in brackets 95 % intervals over prompts"
    return "\n".join([sentence, "", markdown_table(["measure", "value", "how to read it"], rows), "", count])


def _better(interval: Sequence[float] | None) -> str | None:
    """`better` or `worse` where the interval says so."""
    if interval is None or interval[0] <= 50 <= interval[1]:
        return None
    return "better" if interval[0] > 50 else "worse"


def _with_interval(results: Mapping[str, Any], name: str, unit: str = "") -> str:
    value, interval = results[name], results[f"{name}_interval"]
    if value is None:
        return "unknown"
    form = ".1f" if unit else ".2f"
    shown = "" if interval is None else f" [{interval[0]:{form}}, {interval[1]:{form}}]"
    return f"{value:{form}}{shown}{unit}"


def needs(results: Mapping[str, Any]) -> str:
    """A dry run in words."""
    answers = f", and at most {results['answer_tokens']:,} tokens of answers" if results["answer_tokens"] else ""
    return (
        f"{results['calls']:,} calls to the judge {inline_code(results['judge'])} are still needed: "
        f"{results['prompt_tokens']:,} {results['counted_in']} of questions{answers}"
    )
