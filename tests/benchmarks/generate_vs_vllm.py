"""`generate` with vLLM against a bare `LLM.generate` call: the same engine, prompts, seeds and lengths, turn by turn.

usage: python tests/benchmarks/generate_vs_vllm.py MODEL PROMPTS.jsonl [--max-new-tokens 128] [--turns 2]

Ours is the whole stage but for loading the engine: reading and tokenising prompts, sampling with log-probs, decoding,
Parquet. The bare call is given token ids and returns text. Prints sampled tokens per second and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from operator import eq
from pathlib import Path

from dpkd_offline.config.data import GenerateConfig
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.engines import base
from dpkd_offline.engines.base import Engine
from dpkd_offline.engines.factory import load_engine
from dpkd_offline.generation import generate
from dpkd_offline.models.info import ModelInfo


def stage(engine: Engine, config: GenerateConfig) -> tuple[float, list[list[int]]]:
    """Seconds of the stage, and the token ids of its responses."""
    engine._llm.reset_prefix_cache()  # type: ignore[attr-defined]
    started = time.perf_counter()
    generate.generate(config)
    seconds = time.perf_counter() - started
    dataset = Dataset.open(config.dataset)
    table = dataset.responses("teacher", 0)
    return seconds, [row.response_ids for shard in range(dataset.plan.count) for row in table.read(shard)]


def bare_call(engine: Engine, dataset: Path, config: GenerateConfig, eos: list[int]) -> tuple[float, list[list[int]]]:
    """Seconds of one call of the library for the prompts of a dataset, and the token ids."""
    from vllm import SamplingParams, TokensPrompt

    table = Dataset.open(dataset).prompts
    prompts = [prompt for shard in range(table.plan.count) for prompt in table.read(shard)]
    params = [
        SamplingParams(
            temperature=1.0,
            max_tokens=config.max_new_tokens,
            seed=base.row_seed(config.seed, "teacher", 0, prompt.id),
            stop_token_ids=eos,
        )
        for prompt in prompts
    ]
    engine._llm.reset_prefix_cache()  # type: ignore[attr-defined]
    started = time.perf_counter()
    outputs = engine._llm.generate(  # type: ignore[attr-defined]
        [TokensPrompt(prompt_token_ids=p.prompt_ids) for p in prompts], params, use_tqdm=False
    )
    return time.perf_counter() - started, [list(output.outputs[0].token_ids) for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompts")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=2)
    arguments = parser.parse_args()

    model = ModelInfo.load(arguments.model)
    ratios = []
    with tempfile.TemporaryDirectory() as root:
        config = GenerateConfig(
            dataset=Path(root) / "0",
            role="teacher",
            model=arguments.model,
            prompts=arguments.prompts,
            engine="vllm",
            max_prompt_tokens=1024 - arguments.max_new_tokens,
            max_new_tokens=arguments.max_new_tokens,
            shard_size=32,
        )
        engine = load_engine(model, config)
        close, engine.close = engine.close, lambda: None  # type: ignore[method-assign]
        generate.load_engine = lambda *_: engine  # type: ignore[assignment]
        generate.generate(config.model_copy(update={"limit": 16}))  # warm
        for turn in range(1, arguments.turns + 1):
            ours = config.model_copy(update={"dataset": Path(root) / str(turn)})
            if turn % 2:  # who comes first, alternately
                our_seconds, rows = stage(engine, ours)
                bare_seconds, outputs = bare_call(engine, ours.dataset, config, model.eos_ids)
            else:
                bare_seconds, outputs = bare_call(engine, Path(root) / "1", config, model.eos_ids)
                our_seconds, rows = stage(engine, ours)
            our_tokens, bare_tokens = sum(map(len, rows)), sum(map(len, outputs))
            ratios.append((our_tokens / our_seconds) / (bare_tokens / bare_seconds))
            print(
                f"turn {turn}: generate {our_tokens / our_seconds:.1f} tokens/s ({our_tokens} tokens), "
                f"LLM.generate {bare_tokens / bare_seconds:.1f} tokens/s ({bare_tokens} tokens), "
                f"ratio {ratios[-1]:.3f}; {sum(map(eq, rows, outputs))} of {len(rows)} responses are the same tokens",
                flush=True,
            )
        close()
    print(f"generate / LLM.generate: median {statistics.median(ratios):.3f} of {len(ratios)} turns")


if __name__ == "__main__":
    main()
