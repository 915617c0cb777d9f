"""`evaluate`: sample responses, compare with references, and ask the teacher how likely it finds them.

Draws, a prompt under a seed each, go in groups of a bounded size, and each group is a file as soon as it is whole
(`parts.py`): memory does not grow with their number, and a run that was killed goes on with the groups that it lacks.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
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
from dpkd_offline.dataset.schema import Prompt, full_schema, to_table
from dpkd_offline.dataset.scratch import Spool
from dpkd_offline.engines.base import check_lengths
from dpkd_offline.engines.factory import choose_engine, load_engine, provenance_of
from dpkd_offline.evaluation.benchmarks import Benchmarks
from dpkd_offline.evaluation.parts import Parts, Row, Sampling, Scoring
from dpkd_offline.evaluation.summary import RESPONSES, RESULTS, Summary, difference_of
from dpkd_offline.evaluation.table import EvaluationRecord
from dpkd_offline.metrics.text import compares_by_unicode
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.prompts.reader import ROWS_AT_ONCE, PromptReport, read_prompts
from dpkd_offline.prompts.templates import with_template

Results = dict[str, Any]
PARTS = ".parts"  # in the output folder
THINKING_END = "</think>"  # of the models that have it among their tokens
OWN_OPTIONS = ("quantization", "engine_args")  # of an engine
# No number depends on how the work is shared out; that of arithmetic is in the engine's provenance.
WITHOUT_EFFECT = {
    *("output", "model", "teacher", "prompts", "thinking_end"),  # which the provenance names
    *(name for name in ModelOptions.model_fields if name not in ("engine", "dtype", "max_length", *OWN_OPTIONS)),
    *("teacher_tensor_parallel_size", "teacher_url", "against"),
    *TaskOptions.model_fields,  # each task says itself what it is of
}


@dataclass(frozen=True)
class EvaluateResult(Result):
    """The output folder, and what its results.json holds."""

    results: Results


@dataclass
class PromptSet:
    """The prompts of one source, and where what is made of them goes."""

    name: str  # empty where there is one set without a name
    folder: Path
    prompts: Spool[Prompt]
    parts: Parts
    identity: str = ""  # a hash of the prompts
    by_unicode: int = 0  # prompts whose references Rouge-L compares by words of Unicode
    provenance: Results = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether the responses of the results stand beside them. Results of older versions do not say which."""
        record = find_model(self.folder / RESULTS, EvaluationRecord)
        path = self.folder / RESPONSES
        return record is not None and path.is_file() and record.responses in (None, file_sha256(path))


def evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Sample one response per prompt and seed; write `responses.jsonl` and `results.json`.

    Each measure is a mean over prompts, then over seeds, with the spread over seeds and the 95 % interval over prompts.
    With a teacher: `teacher_nll`, the mean over responses of -log p(y|x)/|y| in nats per token; `reward`, that of
    β/|y| log q(y|x)/p(y|x); and where both have the same tokens `accepted`, the share of the model's tokens that the
    teacher would accept of it as a draft in speculative decoding. A teacher with another tokenizer reads prompt and
    response in its own template and tokens: |y| are its tokens in the former and the model's in the latter. Several
    prompt sets have a folder each, and `results.json` holds them all by name. The same call again goes on after the
    last group of responses.

    Raises:
        UsageError: the http engine is to ask another teacher than its servers hold; or the folder holds something else.
        DataError: a prompt has no reference, or a row is malformed.
        MismatchError: the folder is of another evaluation.
        OutputBusy: another command writes it now.
        StorageError: the disk is full or fails; the same call goes on.
        UnavailableError: a model or the engine cannot be loaded.
    """
    engine_name = choose_engine(config.engine, config.url)
    if ENGINES[engine_name].served and config.teacher not in (None, config.model) and not config.teacher_url:
        raise UsageError(
            f"--teacher {config.teacher}: the servers of --url hold --model; name the teacher's with --teacher-url, or "
            f"evaluate without --teacher"
        )
    options = config.model_copy(update={"engine": engine_name})
    with output_folder(config.output, "evaluation", "evaluate", known=(RESULTS,)) as output, ExitStack() as stack:
        model = with_template(ModelInfo.load(config.model, config.trust_remote_code), config.template)
        teacher = ModelInfo(config.teacher, config.trust_remote_code) if config.teacher else None
        options = options.model_copy(update={"thinking_end": _thinking_end(config, model)})
        sets = [_read_set(options, model, name) for name in config.prompt_sets]
        for one in sets:
            stack.enter_context(one.prompts)
            one.provenance = _provenance(options, model, teacher, one.identity)
        output.claim(_run(sets), known=lambda: _known_run(config, sets), begun=_has_begun(config, sets))
        benchmarks = Benchmarks(options, model)
        if pending := [one for one in sets if not one.is_whole]:
            _evaluate(options, model, teacher, pending)
        else:
            console.info(f"{config.output / RESULTS}: is there already")
        for one in sets:
            shutil.rmtree(one.folder / PARTS, ignore_errors=True)
        _join(config, sets)
        benchmarks.run(config.output / RESULTS)
        return EvaluateResult(config.output, read_json(config.output / RESULTS))


def _evaluate(config: EvaluateConfig, model: ModelInfo, teacher: ModelInfo | None, sets: Sequence[PromptSet]) -> None:
    """Make the groups that are missing, join them, and write the results, which vouch for the rest, after it.

    An engine is loaded once for all sets.
    """
    if groups := max(len(one.parts.sampled.pending()) for one in sets):
        engine = load_engine(model, config, groups)
        for one in sets:
            if pending := one.parts.sampled.pending():
                Sampling(config, one.parts, one.prompts, model).run(engine, pending)
        engine.close()
    if teacher is not None and (groups := max(len(one.parts.scored.pending()) for one in sets)):
        engine = load_engine(teacher, _options_of_teacher(config), groups)
        for one in sets:
            if pending := one.parts.scored.pending():
                Scoring(config, one.parts, one.prompts, model, teacher).run(engine, pending)
        engine.close()
    write_yaml(config.output / "evaluate.yaml", {"evaluate": redacted_dict(config)})
    for one in sets:
        summary, digest = Summary(config.length_borders), hashlib.sha256()
        rows = (one.parts.sampled if teacher is None else one.parts.scored).rows()
        write_atomically(one.folder / RESPONSES, _lines(rows, summary, digest))
        besides = {**_beyond_ascii(one.by_unicode, len(one.prompts)), "made": one.provenance}
        write_json(one.folder / RESULTS, {**summary.results(), **besides, "responses": digest.hexdigest()})


def _options_of_teacher(config: EvaluateConfig) -> EvaluateConfig:
    own: dict[str, Any] = {
        "tensor_parallel_size": config.teacher_tensor_parallel_size or config.tensor_parallel_size,
        **({"url": config.teacher_url, "engine": "http", **dict.fromkeys(OWN_OPTIONS)} if config.teacher_url else {}),
    }
    return config.model_copy(update=own)


def _lines(rows: Iterator[Row], summary: Summary, digest: Any) -> Iterator[bytes]:
    """The lines of responses.jsonl; what they say is summed up, and their bytes are hashed."""
    for row in rows:
        summary.add(row)
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        digest.update(line)
        yield line


def _join(config: EvaluateConfig, sets: Sequence[PromptSet]) -> None:
    """Add how far an earlier evaluation is to the results, if one is named, and put those of several sets together."""
    by_set: dict[str, Results] = {}
    for one in sets:
        results = read_json(one.folder / RESULTS)
        by_set[one.name] = {key: value for key, value in results.items() if key != "difference"}
        if config.against is not None:
            by_set[one.name]["difference"] = difference_of(config.against / one.name, one.folder)
        if by_set[one.name] != results:
            write_json(one.folder / RESULTS, by_set[one.name])
    if "" not in by_set:
        path = config.output / RESULTS
        before = read_json(path) if path.exists() else {}
        together = {"sets": by_set, **({"tasks": before["tasks"]} if "tasks" in before else {})}
        if together != before:
            write_json(path, together)


def _thinking_end(config: EvaluateConfig, model: ModelInfo) -> str | None:
    """What ends the thoughts of a model: what the config says, else the usual tag where it is a token."""
    if config.thinking_end is not None:
        return config.thinking_end or None
    return THINKING_END if THINKING_END in model.tokenizer.get_vocab() else None


def _read_set(config: EvaluateConfig, model: ModelInfo, name: str) -> PromptSet:
    """The prompts of a source, which all have a reference and fit into the model's context."""
    spool = Spool(config.output, Prompt)
    report, digest, longest = PromptReport(), hashlib.sha256(b"["), ("", 0)
    source = config.prompt_sets[name]
    prompts, by_unicode = read_prompts(source, config, model, report, need_reference=True), 0
    while chunk := list(islice(prompts, ROWS_AT_ONCE)):
        identities = json.dumps(
            [[p.id, p.prompt_ids, p.references] for p in chunk], ensure_ascii=False, separators=(",", ":")
        )
        digest.update(f"{',' if len(spool) else ''}{identities[1:-1]}".encode())  # the list of all, piece by piece
        spool.add(to_table(chunk, full_schema(Prompt)))
        by_unicode += sum(compares_by_unicode(prompt.references or []) for prompt in chunk)
        longest = max([longest, *((p.id, len(p.prompt_ids)) for p in chunk)], key=lambda prompt: prompt[1])
    digest.update(b"]")
    console.info(f"prompts{f' of {name}' if name else ''}: {report}")
    check_lengths(model, config, *longest, config)
    folder = config.output / name
    parts = Parts(folder / PARTS, len(spool), config.draw_seeds)
    return PromptSet(name, folder, spool, parts, digest.hexdigest(), by_unicode)


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
    settings = redacted_dict(config) | provenance_of(config.engine, config)
    return {
        "model": model.identity,
        "teacher": teacher.identity if teacher else None,
        "prompts": prompts,
        **({"chat_template": fingerprint(model.chat_template)} if model.chat_template else {}),
        **({"teacher_engine": "http"} if config.teacher_url else {}),
        **({"thinking_end": config.thinking_end} if config.thinking_end else {}),
        "settings": {k: v for k, v in settings.items() if k not in WITHOUT_EFFECT},
    }


def _run(sets: Sequence[PromptSet]) -> str:
    """Equal for evaluations of equal numbers."""
    return _fingerprint({one.name: one.provenance for one in sets})


def _fingerprint(provenances: dict[str, Results]) -> str:
    known = {
        name: {**made, "settings": {k: v for k, v in made.get("settings", {}).items() if k not in WITHOUT_EFFECT}}
        for name, made in provenances.items()
    }
    return fingerprint(known[""] if list(known) == [""] else known)


def _known_run(config: EvaluateConfig, sets: Sequence[PromptSet]) -> str | None:
    """Of which evaluation the results are that stand in the output folder; empty where they are of other sets."""
    records = {one.name: find_model(one.folder / RESULTS, EvaluationRecord) for one in sets}
    provenances = {name: record.made for name, record in records.items() if record is not None}
    if len(provenances) == len(sets):
        return _fingerprint(provenances)
    return "" if (config.output / RESULTS).exists() else None


def _has_begun(config: EvaluateConfig, sets: Sequence[PromptSet]) -> bool:
    folders = [config.output, *(one.folder for one in sets)]
    return any((folder / RESULTS).exists() or any((folder / PARTS).glob("*/*")) for folder in folders)
