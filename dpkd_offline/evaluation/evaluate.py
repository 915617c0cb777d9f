"""`evaluate`: sample responses, compare with references, and ask the teacher how likely it finds them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dpkd_offline.common import console
from dpkd_offline.common.errors import UsageError
from dpkd_offline.common.files import read_json, write_atomically, write_json
from dpkd_offline.common.hashing import fingerprint
from dpkd_offline.common.results import Result
from dpkd_offline.config.base import redacted_dict, write_yaml
from dpkd_offline.config.engines import ENGINES
from dpkd_offline.config.evaluate import EvaluateConfig
from dpkd_offline.dataset.schema import Prompt
from dpkd_offline.engines.base import Completion, GenerateRequest, ScoreRequest, check_lengths, row_seed
from dpkd_offline.engines.factory import choose_engine, load_engine, provenance_of
from dpkd_offline.metrics.intervals import mean_and_spread
from dpkd_offline.metrics.text import MEASURES, compares_by_unicode
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.prompts.reader import PromptReport, check_known, read_prompts
from dpkd_offline.prompts.retokenize import ResponseTokenizer
from dpkd_offline.prompts.templates import render, template_name

Results = dict[str, Any]


@dataclass(frozen=True)
class EvaluateResult(Result):
    """The output folder, and what its results.json holds."""

    results: Results


def evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Sample one response per prompt and seed; write `responses.jsonl` and `results.json`.

    Rouge-L and exact match are means over prompts, then mean and spread over seeds. With a teacher: `teacher_nll`, the
    mean over responses of -log p(y|x)/|y| in nats per token, and `reward`, that of β/|y| log q(y|x)/p(y|x). A teacher
    with another tokenizer reads prompt and response in its own template and tokens: |y| are its tokens in the former
    and the model's in the latter.

    Raises:
        UsageError: the http engine is to ask another teacher than its servers hold.
        DataError: a prompt has no reference, or a row is malformed.
        UnavailableError: a model or the engine cannot be loaded.
    """
    engine_name = choose_engine(config.engine, config.url)
    if ENGINES[engine_name].served and config.teacher not in (None, config.model):
        raise UsageError(f"--teacher {config.teacher}: the servers of --url hold --model; evaluate without --teacher")
    options = config.model_copy(update={"engine": engine_name})
    model = ModelInfo.load(config.model, config.trust_remote_code)
    teacher = ModelInfo(config.teacher, config.trust_remote_code) if config.teacher else None
    prompts = _prompts(config, model)
    provenance = _provenance(options, model, teacher, prompts)
    path = config.output / "results.json"
    if path.exists() and (results := read_json(path)).get("made") == provenance:
        console.info(f"{path}: is there already")
        return EvaluateResult(config.output, results)

    completions = _sample(model, prompts, options)
    rows = _rows(config, model, prompts, completions)
    if teacher is not None:
        _add_teacher(rows, teacher, model, prompts, completions, options)
    results = {**summary(rows), **_beyond_ascii(prompts), "made": provenance}
    write_yaml(config.output / "evaluate.yaml", {"evaluate": redacted_dict(config)})
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(config.output / "responses.jsonl", lines.encode())
    write_json(path, results)
    return EvaluateResult(config.output, results)


def _prompts(config: EvaluateConfig, model: ModelInfo) -> list[Prompt]:
    """The prompts of the source, which all have a reference and fit into the model's context."""
    report = PromptReport()
    prompts = list(read_prompts(config.prompts, config, model, report, need_reference=True))
    console.info(f"prompts: {report}")
    longest = max(prompts, key=lambda p: len(p.prompt_ids))
    check_lengths(model, config, longest.id, len(longest.prompt_ids), config)
    return prompts


def _beyond_ascii(prompts: Sequence[Prompt]) -> Results:
    """How many prompts Rouge-L compares in another way than rouge_score does, if any: nothing of ASCII."""
    if not (count := sum(compares_by_unicode(prompt.references) for prompt in prompts)):
        return {}
    console.info(
        f"Rouge-L: {count} of {len(prompts)} prompts have references with letters beyond a-z, which rouge_score drops; "
        f"these are compared by words of Unicode, or characters where a script has no spaces"
    )
    return {"rouge_l_unicode": count}


def _provenance(
    config: EvaluateConfig, model: ModelInfo, teacher: ModelInfo | None, prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """What results.json says of the results: those of equal provenance are not made again."""
    settings = redacted_dict(config) | provenance_of(config.engine, config.dtype)
    return {
        "model": model.identity,
        "teacher": teacher.identity if teacher else None,
        "prompts": fingerprint([[p.id, p.prompt_ids, p.references] for p in prompts]),
        "settings": {k: v for k, v in settings.items() if k not in ("output", "model", "teacher", "prompts")},
    }


def _draws(config: EvaluateConfig, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Prompt]]:
    """Which prompt, under which seed, each response answers."""
    return ((seed, prompt) for seed in config.seeds for prompt in prompts)


def _sample(model: ModelInfo, prompts: Sequence[Prompt], config: EvaluateConfig) -> list[Completion]:
    """A response to each draw, in their order."""
    engine = load_engine(model, config)
    requests = [
        GenerateRequest((0, n), prompt.prompt_ids, row_seed(seed, "evaluate", prompt.id), config.teacher is not None)
        for n, (seed, prompt) in enumerate(_draws(config, prompts))
    ]
    completions = {}
    with console.progress("evaluate", len(requests), "response") as shown:
        for (_, n), completion in engine.generate([requests], config):
            completions[n] = completion
            shown.advance()
    engine.close()
    return [completions[n] for n in range(len(requests))]


def _rows(
    config: EvaluateConfig, model: ModelInfo, prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> list[dict[str, Any]]:
    """The lines of responses.jsonl, with what is compared with the references."""
    texts = model.tokenizer.batch_decode([c.response_ids for c in completions], skip_special_tokens=True)
    return [
        {
            "seed": seed,
            "id": prompt.id,
            "prompt": prompt.prompt,
            "response": text,
            "finish_reason": completion.finish_reason,
            "tokens": len(completion.response_ids),
            **{name: measure.of(text, prompt.references) for name, measure in MEASURES.items()},
        }
        for (seed, prompt), text, completion in zip(_draws(config, prompts), texts, completions, strict=True)
    ]


def _add_teacher(
    rows: list[dict[str, Any]],
    teacher: ModelInfo,
    model: ModelInfo,
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    config: EvaluateConfig,
) -> None:
    """Add the teacher's NLL and the implicit reward to the rows."""
    ids = [completion.response_ids for completion in completions]
    if teacher.tokenizer_fingerprint != model.tokenizer_fingerprint:
        prompts, ids = _retokenized(rows, teacher, model, prompts, config)
    requests = [
        ScoreRequest((0, n), prompt.prompt_ids, [response])
        for n, ((_, prompt), response) in enumerate(zip(_draws(config, prompts), ids, strict=True))
    ]
    engine = load_engine(teacher, config)
    with console.progress("evaluate: teacher", len(requests), "response") as shown:
        for (_, n), (score,) in engine.score([requests]):
            logps, own = score.logps, completions[n].logps
            rows[n]["teacher_nll"] = -sum(logps) / len(logps)
            rows[n]["reward"] = config.beta * (sum(own) - sum(logps)) / len(own)
            shown.advance()
    engine.close()


def _retokenized(
    rows: Sequence[dict[str, Any]],
    teacher: ModelInfo,
    model: ModelInfo,
    prompts: Sequence[Prompt],
    config: EvaluateConfig,
) -> tuple[list[Prompt], list[list[int]]]:
    """Prompts and responses in the template and the tokens of a teacher that has another tokenizer."""
    console.info(f"{teacher.name} has another tokenizer than {model.name}: it scores the text, in its own template")
    original, template = (template_name(config.template, m.tokenizer) for m in (model, teacher))
    arguments = config.template_args or {}
    responses = ResponseTokenizer(teacher.tokenizer, template, teacher.eos_ids, arguments)
    rendered = [render(prompt, original, template, teacher.tokenizer, arguments) for prompt in prompts]
    before = [prompt.prompt for _, prompt in _draws(config, rendered)]
    ids, exact = responses.encode(before, [row["response"] for row in rows], [row["finish_reason"] for row in rows])
    for row, prompt, tokens in zip(rows, (p for _, p in _draws(config, rendered)), ids, strict=True):
        check_known(f"prompt '{row['id']}'", prompt.prompt_ids, teacher)
        check_known(f"prompt '{row['id']}': its response", tokens, teacher)
    if lost := exact.count(False):
        console.info(f"{lost} of {len(exact)} responses are not quite the same text in the tokens of {teacher.name}")
    return rendered, ids


def summary(rows: Sequence[dict[str, Any]]) -> Results:
    """Per measure: the mean of each seed, their mean and their spread (sample standard deviation)."""
    seeds = sorted({row["seed"] for row in rows})
    results: Results = {"prompts": len(rows) // len(seeds), "seeds": seeds}
    for measure in (*MEASURES, "teacher_nll", "reward", "tokens"):
        if measure in rows[0]:
            by_seed = [mean_and_spread([r[measure] for r in rows if r["seed"] == seed])[0] for seed in seeds]
            mean, spread = mean_and_spread(by_seed)
            results[measure] = {"mean": mean, "spread": spread, "by_seed": by_seed}
    results["truncated"] = sum(row["finish_reason"] == "length" for row in rows) / len(rows)
    return results
