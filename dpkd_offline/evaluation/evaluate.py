"""`evaluate`: sample responses, compare with references, and ask the teacher how likely it finds them.

Draws, a prompt under a seed each, go in groups of a bounded size, and each group is a file as soon as it is whole
(`parts.py`): memory does not grow with their number, and a run that was killed goes on with the groups that it lacks.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from dpkd_offline.common import console
from dpkd_offline.common.errors import UsageError
from dpkd_offline.common.files import find_model, read_json, write_atomically, write_json
from dpkd_offline.common.hashing import file_sha256, fingerprint
from dpkd_offline.common.ownership import output_folder
from dpkd_offline.common.results import Result
from dpkd_offline.config.base import ModelOptions, redacted_dict, write_yaml
from dpkd_offline.config.engines import ENGINES
from dpkd_offline.config.evaluate import EvaluateConfig, TaskOptions
from dpkd_offline.dataset.schema import Prompt, to_table
from dpkd_offline.dataset.scratch import Spool
from dpkd_offline.engines.base import check_lengths
from dpkd_offline.engines.factory import choose_engine, load_engine, provenance_of
from dpkd_offline.evaluation.benchmarks import Benchmarks
from dpkd_offline.evaluation.parts import Parts, Row, Sampling, Scoring
from dpkd_offline.evaluation.table import EvaluationRecord
from dpkd_offline.metrics.intervals import mean_and_spread
from dpkd_offline.metrics.text import MEASURES, compares_by_unicode
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.prompts.reader import ROWS_AT_ONCE, PromptReport, read_prompts

Results = dict[str, Any]
RESULTS, RESPONSES, PARTS = "results.json", "responses.jsonl", ".parts"  # in the output folder
# No number depends on how the work is shared out; that of arithmetic is in the engine's provenance.
WITHOUT_EFFECT = {
    *("output", "model", "teacher", "prompts"),  # which the provenance names
    *(name for name in ModelOptions.model_fields if name not in ("engine", "dtype", "max_length")),
    "teacher_tensor_parallel_size",
    *TaskOptions.model_fields,  # each task says itself what it is of
}


@dataclass(frozen=True)
class EvaluateResult(Result):
    """The output folder, and what its results.json holds."""

    results: Results


def evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Sample one response per prompt and seed; write `responses.jsonl` and `results.json`.

    Rouge-L and exact match are means over prompts, then mean and spread over seeds. With a teacher: `teacher_nll`, the
    mean over responses of -log p(y|x)/|y| in nats per token, and `reward`, that of β/|y| log q(y|x)/p(y|x). A teacher
    with another tokenizer reads prompt and response in its own template and tokens: |y| are its tokens in the former
    and the model's in the latter. The same call again goes on after the last group of responses.

    Raises:
        UsageError: the http engine is to ask another teacher than its servers hold; or the folder holds something else.
        DataError: a prompt has no reference, or a row is malformed.
        MismatchError: the folder is of another evaluation.
        OutputBusy: another command writes it now.
        StorageError: the disk is full or fails; the same call goes on.
        UnavailableError: a model or the engine cannot be loaded.
    """
    engine_name = choose_engine(config.engine, config.url)
    if ENGINES[engine_name].served and config.teacher not in (None, config.model):
        raise UsageError(f"--teacher {config.teacher}: the servers of --url hold --model; evaluate without --teacher")
    options = config.model_copy(update={"engine": engine_name})
    with (
        output_folder(config.output, "evaluation", "evaluate", known=(RESULTS,)) as output,
        Spool(config.output, Prompt) as prompts,
    ):
        model = ModelInfo.load(config.model, config.trust_remote_code)
        teacher = ModelInfo(config.teacher, config.trust_remote_code) if config.teacher else None
        identity, by_unicode = _read_prompts(config, model, prompts)
        provenance = _provenance(options, model, teacher, identity)
        record, parts = find_model(config.output / RESULTS, EvaluationRecord), config.output / PARTS
        begun = record is not None or any(parts.glob("*/*"))
        output.claim(_run(provenance), known=lambda: _run(record.made) if record else None, begun=begun)
        benchmarks = Benchmarks(options, model)
        if record is not None and _is_whole(config, record):
            console.info(f"{config.output / RESULTS}: is there already")
        else:
            _evaluate(options, model, teacher, prompts, {**_beyond_ascii(by_unicode, len(prompts)), "made": provenance})
        benchmarks.run(config.output / RESULTS)
        shutil.rmtree(parts, ignore_errors=True)
        return EvaluateResult(config.output, read_json(config.output / RESULTS))


def _evaluate(
    config: EvaluateConfig, model: ModelInfo, teacher: ModelInfo | None, prompts: Spool[Prompt], besides: Results
) -> None:
    """Make the groups that are missing, join them, and write the results, which vouch for the rest, after it.

    `besides` stands in the results, too.
    """
    parts = Parts(config.output / PARTS, len(prompts), config.seeds)
    if pending := parts.sampled.pending():
        engine = load_engine(model, config)
        Sampling(config, parts, prompts, model).run(engine, pending)
        engine.close()
    if teacher is not None and (pending := parts.scored.pending()):
        own_size = config.teacher_tensor_parallel_size or config.tensor_parallel_size
        engine = load_engine(teacher, config.model_copy(update={"tensor_parallel_size": own_size}))
        Scoring(config, parts, prompts, model, teacher).run(engine, pending)
        engine.close()
    summary, digest = Summary(), hashlib.sha256()
    rows = (parts.sampled if teacher is None else parts.scored).rows()
    write_atomically(config.output / RESPONSES, _lines(rows, summary, digest))
    write_yaml(config.output / "evaluate.yaml", {"evaluate": redacted_dict(config)})
    write_json(config.output / RESULTS, {**summary.results(), **besides, "responses": digest.hexdigest()})


def _lines(rows: Iterator[Row], summary: Summary, digest: Any) -> Iterator[bytes]:
    """The lines of responses.jsonl; what they say is summed up, and their bytes are hashed."""
    for row in rows:
        summary.add(row)
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        digest.update(line)
        yield line


def _read_prompts(config: EvaluateConfig, model: ModelInfo, spool: Spool[Prompt]) -> tuple[str, int]:
    """Put the prompts of the source, which all have a reference and fit into the model's context, into the spool.

    Returns a hash of them all, and how many have references that Rouge-L compares by words of Unicode.
    """
    report, digest, longest = PromptReport(), hashlib.sha256(b"["), ("", 0)
    prompts, by_unicode = read_prompts(config.prompts, config, model, report, need_reference=True), 0
    while chunk := list(islice(prompts, ROWS_AT_ONCE)):
        identities = json.dumps(
            [[p.id, p.prompt_ids, p.references] for p in chunk], ensure_ascii=False, separators=(",", ":")
        )
        digest.update(f"{',' if len(spool) else ''}{identities[1:-1]}".encode())  # the list of all, piece by piece
        spool.add(to_table(chunk, Prompt.schema))
        by_unicode += sum(compares_by_unicode(prompt.references or []) for prompt in chunk)
        longest = max([longest, *((p.id, len(p.prompt_ids)) for p in chunk)], key=lambda prompt: prompt[1])
    digest.update(b"]")
    console.info(f"prompts: {report}")
    check_lengths(model, config, *longest, config)
    return digest.hexdigest(), by_unicode


def _beyond_ascii(count: int, prompts: int) -> Results:
    """How many prompts Rouge-L compares in another way than rouge_score does, if any: nothing of ASCII."""
    if not count:
        return {}
    console.info(
        f"Rouge-L: {count} of {prompts} prompts have references with letters beyond a-z, which rouge_score drops; "
        f"these are compared by words of Unicode, or characters where a script has no spaces"
    )
    return {"rouge_l_unicode": count}


def _provenance(config: EvaluateConfig, model: ModelInfo, teacher: ModelInfo | None, prompts: str) -> Results:
    """What results.json says of the results: those of equal provenance are not made again."""
    settings = redacted_dict(config) | provenance_of(config.engine, config.dtype)
    return {
        "model": model.identity,
        "teacher": teacher.identity if teacher else None,
        "prompts": prompts,
        "settings": {k: v for k, v in settings.items() if k not in WITHOUT_EFFECT},
    }


def _run(provenance: Results) -> str:
    """Equal for evaluations of equal numbers."""
    settings = {k: v for k, v in provenance.get("settings", {}).items() if k not in WITHOUT_EFFECT}
    return fingerprint({**provenance, "settings": settings})


def _is_whole(config: EvaluateConfig, record: EvaluationRecord) -> bool:
    """Whether the responses of the results stand beside them. Results of older versions do not say which these are."""
    path = config.output / RESPONSES
    return path.is_file() and record.responses in (None, file_sha256(path))


class Summary:
    """The numbers of results.json, from rows that go by.

    Per measure: the mean of each seed, their mean and their spread (sample standard deviation).
    """

    def __init__(self) -> None:
        self._by_seed: dict[int, dict[str, array[float]]] = {}
        self._rows = self._cut_off = 0

    def add(self, row: Row) -> None:
        values = self._by_seed.setdefault(row["seed"], {})
        for measure in (*MEASURES, "teacher_nll", "reward", "tokens"):
            if measure in row:
                values.setdefault(measure, array("d")).append(row[measure])
        self._rows += 1
        self._cut_off += row["finish_reason"] == "length"

    def results(self) -> Results:
        seeds = sorted(self._by_seed)
        results: Results = {"prompts": self._rows // len(seeds), "seeds": seeds}
        for measure in self._by_seed[seeds[0]]:
            by_seed = [mean_and_spread(self._by_seed[seed][measure])[0] for seed in seeds]
            mean, spread = mean_and_spread(by_seed)
            results[measure] = {"mean": mean, "spread": spread, "by_seed": by_seed}
        results["truncated"] = self._cut_off / self._rows
        return results
