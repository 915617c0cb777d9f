"""`score-teacher` against a bare `LLM.generate(prompt_logprobs=0)` call on the same sequences, turn by turn.

usage: python tests/benchmarks/score_vs_vllm.py MODEL PAIRS.parquet [--pairs 60] [--turns 2]

PAIRS.parquet has the columns id, prompt, prompt_ids, chosen, chosen_ids, rejected, rejected_ids. Ours is the whole
stage but for loading the engine, once with vLLM and once with transformers. Prints tokens per second (of all sequences,
each a prompt and a response) and their ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from dpkd_offline.config.base import ModelOptions
from dpkd_offline.config.data import ScoreTeacherConfig
from dpkd_offline.dataset.dataset import Dataset, PromptSet
from dpkd_offline.dataset.schema import Prompt, Response
from dpkd_offline.dataset.writing import claim, write_shard
from dpkd_offline.engines.base import Engine
from dpkd_offline.engines.factory import load_engine
from dpkd_offline.generation import score_teacher
from dpkd_offline.models.info import ModelInfo

ENGINES = ("vllm", "transformers")
RESULT = "result: "


def make_dataset(root: Path, pairs: Sequence[dict[str, Any]], name: str) -> Dataset:
    """A dataset whose responses are those of the pairs."""
    model = ModelInfo(name)
    prompts = [Prompt(p["id"], [], p["prompt"], p["prompt_ids"], []) for p in pairs]
    longest = max(prompts, key=lambda p: len(p.prompt_ids))
    prompt_set = PromptSet(
        id="benchmark",
        source="benchmark",
        template="none",
        template_fingerprint="",
        tokenizer="benchmark",
        tokenizer_fingerprint=model.tokenizer_fingerprint,
        vocab_size=model.vocab_size,
        longest_prompt=longest.id,
        longest_prompt_tokens=len(longest.prompt_ids),
        rows={},
    )
    dataset = Dataset.create(root, prompt_set, prompts, shard_size=32)
    provenance = {
        "stage": "generate",
        "model": model.identity,
        "vocab_size": model.vocab_size,
        "tokenizer_fingerprint": model.tokenizer_fingerprint,
        "dtype": "bfloat16",
        "engine": "vllm",
        "eos_token_ids": model.eos_ids,
        "sampling": {"max_new_tokens": max(len(p[f"{s}_ids"]) for p in pairs for s in ("chosen", "rejected"))},
        "prompt_set": prompt_set.id,
    }
    for role, side in (("teacher", "chosen"), ("student", "rejected")):
        table = dataset.responses(role, 0)
        claim(table, {**provenance, "role": role, "round": 0})
        for shard in range(dataset.plan.count):
            start = shard * dataset.plan.shard_size
            some = pairs[start : start + dataset.plan.rows_of(shard)]
            rows = [
                Response(p["id"], p[side], p[f"{side}_ids"], "length", [-1.0] * len(p[f"{side}_ids"]), 0) for p in some
            ]
            write_shard(table, shard, rows)
    return dataset


def stage_rate(engine: Engine, name: str, model: str, pairs: Sequence[dict[str, Any]], tokens: int) -> float:
    """Tokens per second of score-teacher with an engine that is loaded already."""
    engine.close = lambda: None  # type: ignore[method-assign]
    score_teacher.load_engine = lambda *_: engine  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as root:
        dataset = make_dataset(Path(root) / "data", pairs, model)
        config = ScoreTeacherConfig(dataset=dataset.root, model=model, engine=name)  # type: ignore[arg-type]
        started = time.perf_counter()
        score_teacher.score_teacher(config)
        return tokens / (time.perf_counter() - started)


def measure(name: str, model: str, pairs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """One engine in this process; with vLLM also the bare call."""
    sequences = [p["prompt_ids"] + p[f"{side}_ids"] for side in ("chosen", "rejected") for p in pairs]
    tokens = sum(map(len, sequences))
    engine = load_engine(ModelInfo(model), ModelOptions(engine=name))  # type: ignore[arg-type]
    stage_rate(engine, name, model, pairs[:4], 1)  # warm
    rates = {}
    if name == "vllm":
        from vllm import SamplingParams, TokensPrompt

        bare = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        started = time.perf_counter()
        engine._llm.generate(  # type: ignore[attr-defined]
            [TokensPrompt(prompt_token_ids=ids) for ids in sequences], bare, use_tqdm=False
        )
        rates["bare"] = tokens / (time.perf_counter() - started)
    return {**rates, name: stage_rate(engine, name, model, pairs, tokens)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("pairs_file")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    if arguments.engine:
        pairs = pq.read_table(arguments.pairs_file).slice(0, arguments.pairs).to_pylist()
        print(RESULT + json.dumps(measure(arguments.engine, arguments.model, pairs)), flush=True)
        return
    turns: list[dict[str, float]] = []
    for turn in range(1, arguments.turns + 1):
        rates: dict[str, float] = {}
        for name in ENGINES:
            command = [sys.executable, __file__, *sys.argv[1:], "--engine", name]
            done = subprocess.run(command, capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
            if not lines:
                sys.exit(done.stderr)
            rates |= json.loads(lines[0].removeprefix(RESULT))
        turns.append(rates)
        print(f"turn {turn}: " + ", ".join(f"{name} {rate:.1f} tokens/s" for name, rate in rates.items()), flush=True)
    for name in ENGINES:
        ratio = statistics.median(rates[name] / rates["bare"] for rates in turns)
        print(f"score-teacher --engine {name} / bare vLLM prompt_logprobs: median {ratio:.3f} of {len(turns)} turns")


if __name__ == "__main__":
    main()
