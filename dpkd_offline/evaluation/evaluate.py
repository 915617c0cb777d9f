"""`evaluate`: sample responses, compare with references, and ask the teacher how likely it finds them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from dpkd_offline.common import console
from dpkd_offline.common.errors import UsageError
from dpkd_offline.common.files import read_json, write_atomically, write_json
from dpkd_offline.common.hashing import fingerprint
from dpkd_offline.config.base import ModelOptions, redacted_dict, write_yaml
from dpkd_offline.config.engines import ENGINES
from dpkd_offline.config.evaluate import EvaluateConfig
from dpkd_offline.dataset.schema import Prompt
from dpkd_offline.engines.base import Completion, Engine, GenerateRequest, ScoreRequest, check_lengths, row_seed
from dpkd_offline.engines.factory import choose_engine, load_engine, provenance_of
from dpkd_offline.metrics.intervals import mean_and_spread
from dpkd_offline.metrics.text import exact_match, rouge_l
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.prompts.reader import PromptReport, read_prompts
from dpkd_offline.prompts.retokenize import ResponseTokenizer
from dpkd_offline.prompts.templates import render, template_name

Results = dict[str, Any]


def evaluate(config: EvaluateConfig) -> Results:
    """Sample one response per prompt and seed; write `responses.jsonl` and `results.json`; return the results.

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
    model = ModelInfo.load(config.model, config.trust_remote_code)
    teacher = ModelInfo(config.teacher, config.trust_remote_code) if config.teacher else None
    report = PromptReport()
    prompts = list(read_prompts(config.prompts, config, model.tokenizer, report, need_reference=True))
    console.info(f"prompts: {report}")
    longest = max(prompts, key=lambda p: len(p.prompt_ids))
    check_lengths(model, config, longest.id, len(longest.prompt_ids), config)
    options = config.model_copy(update={"engine": engine_name})
    settings = redacted_dict(options) | provenance_of(engine_name, config.dtype)
    made = {
        "model": model.identity,
        "teacher": teacher.identity if teacher else None,
        "prompts": fingerprint([[p.id, p.prompt_ids, p.references] for p in prompts]),
        "settings": {k: v for k, v in settings.items() if k not in ("output", "model", "teacher", "prompts")},
    }
    done = config.output / "results.json"
    if done.exists() and (results := read_json(done)).get("made") == made:
        console.info(f"{done}: is there already")
        return results

    engine = load_engine(model, options)
    completions = _sample(engine, prompts, config)
    engine.close()
    texts = model.tokenizer.batch_decode([c.response_ids for c in completions], skip_special_tokens=True)
    rows = [
        {
            "seed": seed,
            "id": prompt.id,
            "prompt": prompt.prompt,
            "response": text,
            "finish_reason": completion.finish_reason,
            "tokens": len(completion.response_ids),
            "rouge_l": rouge_l(text, prompt.references),
            "exact_match": exact_match(text, prompt.references),
        }
        for (seed, prompt), text, completion in zip(_draws(config, prompts), texts, completions, strict=True)
    ]
    if teacher is not None:
        asked = list(_asked(teacher, rows, prompts, completions, model, config))
        _score(rows, asked, completions, teacher, options, config)
    results = {**summary(rows), "made": made}
    write_yaml(config.output / "evaluate.yaml", {"evaluate": redacted_dict(config)})
    write_atomically(
        config.output / "responses.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
    )
    write_json(done, results)
    return results


def _draws(config: EvaluateConfig, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Prompt]]:
    return ((seed, prompt) for seed in config.seeds for prompt in prompts)


def _sample(engine: Engine, prompts: Sequence[Prompt], config: EvaluateConfig) -> list[Completion]:
    requests = [
        GenerateRequest((0, n), prompt.prompt_ids, row_seed(seed, "evaluate", prompt.id), config.teacher is not None)
        for n, (seed, prompt) in enumerate(_draws(config, prompts))
    ]
    found = {}
    with console.progress("evaluate", len(requests), "response") as shown:
        for (_, n), completion in engine.generate([requests], config):
            found[n] = completion
            shown.advance()
    return [found[n] for n in range(len(requests))]


def _asked(
    teacher: ModelInfo,
    rows: Sequence[dict[str, Any]],
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    model: ModelInfo,
    config: EvaluateConfig,
) -> Iterator[ScoreRequest]:
    """What the teacher is to score: token ids as they are, or the same text in its own tokens."""
    ids = [completion.response_ids for completion in completions]
    if teacher.tokenizer_fingerprint != model.tokenizer_fingerprint:
        console.info(f"{teacher.name} has another tokenizer than {model.name}: it scores the text, in its own template")
        given, template = (template_name(config.template, m.tokenizer) for m in (model, teacher))
        prompts = [render(prompt, given, template, teacher.tokenizer) for prompt in prompts]
        speller = ResponseTokenizer(teacher.tokenizer, template, teacher.eos_ids)
        ids, exact = speller.spell([row["response"] for row in rows], [row["finish_reason"] for row in rows])
        if lost := exact.count(False):
            console.info(f"{lost} of {len(exact)} responses are not quite the same text in {teacher.name}'s tokens")
    for n, ((_, prompt), response) in enumerate(zip(_draws(config, prompts), ids, strict=True)):
        yield ScoreRequest((0, n), prompt.prompt_ids, [response])


def _score(
    rows: list[dict[str, Any]],
    requests: Sequence[ScoreRequest],
    completions: Sequence[Completion],
    teacher: ModelInfo,
    options: ModelOptions,
    config: EvaluateConfig,
) -> None:
    """Add the teacher's NLL and the implicit reward to the rows."""
    engine = load_engine(teacher, options)
    with console.progress("evaluate: teacher", len(requests), "response") as shown:
        for (_, n), (score,) in engine.score([requests]):
            logps, own = score.logps, completions[n].logps
            rows[n]["teacher_nll"] = -sum(logps) / len(logps)
            rows[n]["reward"] = config.beta * (sum(own) - sum(logps)) / len(own)
            shown.advance()
    engine.close()


def summary(rows: Sequence[dict[str, Any]]) -> Results:
    """Per measure: the mean of each seed, their mean and their spread (sample standard deviation)."""
    seeds = sorted({row["seed"] for row in rows})
    results: Results = {"prompts": len(rows) // len(seeds), "seeds": seeds}
    for measure in ("rouge_l", "exact_match", "teacher_nll", "reward", "tokens"):
        if measure in rows[0]:
            by_seed = [mean_and_spread([r[measure] for r in rows if r["seed"] == seed])[0] for seed in seeds]
            mean, spread = mean_and_spread(by_seed)
            results[measure] = {"mean": mean, "spread": spread, "by_seed": by_seed}
    results["truncated"] = sum(row["finish_reason"] == "length" for row in rows) / len(rows)
    return results
