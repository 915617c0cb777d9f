"""What a later round costs: the seconds of `generate` and `score-teacher` for all prompts, and for a share of them.

usage: python tests/benchmarks/regeneration.py PROMPTS.jsonl --model MODEL [--prompts 120] [--share 0.1]

One model is teacher and student, which changes nothing of the time. Stages are timed whole but for loading the engine,
which is the same for each: a first round, whose y_t are scored, too; a second one that answers all prompts anew; and a
third that answers a share of them. Ratios are to the first, of seconds and of seconds of CPU, which other work on the
machine disturbs less.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dpkd_offline.config.base import ModelOptions
from dpkd_offline.config.data import GenerateConfig, ScoreTeacherConfig
from dpkd_offline.curation.verify import verify
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.engines.factory import load_engine
from dpkd_offline.generation import generate as generating
from dpkd_offline.generation import score_teacher as scoring
from dpkd_offline.models.info import ModelInfo

Seconds = npt.NDArray[np.float64]  # by the clock, and of CPU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--shard-size", type=int, default=256)  # whose new rows the transformers engine batches
    parser.add_argument("--engine", default="transformers")
    options = parser.parse_args()
    engine = load_engine(ModelInfo(options.model), ModelOptions(engine=options.engine))
    engine.close = lambda: None  # type: ignore[method-assign]
    generating.load_engine = scoring.load_engine = lambda *_: engine  # type: ignore[assignment]

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        common = {"dataset": root, "model": options.model, "engine": options.engine}
        sample = {"max_new_tokens": options.max_new_tokens, "shard_size": options.shard_size, **common}

        def seconds_of(stage: Callable[[], object]) -> Seconds:
            started = np.array([time.perf_counter(), time.process_time()])
            stage()
            return np.array([time.perf_counter(), time.process_time()]) - started

        def generate(**values: Any) -> Seconds:
            config = GenerateConfig.model_validate({**sample, **values})
            return seconds_of(lambda: generating.generate(config))

        generate(role="teacher", prompts=str(options.source), limit=options.prompts)  # also warms the engine
        first = None
        for round, share in enumerate((1.0, 1.0, options.share)):
            sampled = generate(role="student", round=round, share=share)
            config = ScoreTeacherConfig.model_validate({**common, "round": round})
            scored = seconds_of(lambda config=config: scoring.score_teacher(config))  # type: ignore[misc]
            together = sampled + scored
            first = together if first is None else first
            table = Dataset.open(root).responses("student", round)
            new = sum(row.round == round for shard in range(table.plan.count) for row in table.read(shard))
            print(
                f"round {round}: {new:>4} of {options.prompts} prompts anew: generate {sampled[0]:6.1f} s, score "
                f"{scored[0]:6.1f} s, together {together[0]:6.1f} s ({together[1]:.1f} s of CPU), ratio "
                f"{together[0] / first[0]:.3f} ({together[1] / first[1]:.3f})",
                flush=True,
            )
        verify(root)


if __name__ == "__main__":
    main()
