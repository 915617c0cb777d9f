"""`train`'s step against TRL's `DPOTrainer` with the same loss and log-probs computed ahead, turn by turn.

usage: python tests/benchmarks/train_vs_trl.py MODEL PAIRS.parquet [--count 32] [--batch 4] [--turns 3] [--long]
           [--compile]

PAIRS.parquet has the columns id, prompt, prompt_ids, chosen, chosen_ids, rejected, rejected_ids. Both train the same
pairs in the same batches, in the precision that this machine multiplies fastest (`--dtype auto`), each in a process of
its own; the first two steps warm up and do not count. TRL's loss is `sigmoid_norm`, eq. 9. With --long prompts are
repeated until they are three times as long as the longer response.

Prints pairs per second, their ratio, the peak memory of both, and what share of the machine's own rate of such matrix
products (2048 x 2048 x 2048, some after each step: the mean rate, and that of the fastest) our step makes useful:
forward and backward of what is in the rows, without what is computed again.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from dpkd_offline.common.precision import fast_dtype

WARM_UP = 2
PRODUCT = 2048  # rows and columns of the matrices that the machine's own rate is measured with
RESULT = "result: "
LOGP = -1.0  # of every token under the teacher; no time depends on it


def read_pairs(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from dpkd_offline.models.info import ModelInfo

    pairs = pq.read_table(arguments.pairs).slice(0, arguments.count).to_pylist()
    if arguments.long:
        tokenizer = ModelInfo(arguments.model).tokenizer
        for pair in pairs:
            wanted = 3 * max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
            ids = pair["prompt_ids"]
            pair["prompt_ids"] = (ids * (wanted // len(ids) + 1))[:wanted]
            pair["prompt"] = tokenizer.decode(pair["prompt_ids"])
    return pairs


def products() -> list[float]:
    """Seconds of each of some products in the precision of both, the first left out."""
    import torch

    x = torch.randn(PRODUCT, PRODUCT, dtype=getattr(torch, fast_dtype()))
    times = []
    for _ in range(5):
        started = time.perf_counter()
        x @ x
        times.append(time.perf_counter() - started)
    return times[1:]


def ours(arguments: argparse.Namespace) -> dict[str, float]:
    import torch

    from dpkd_offline.config.train import TrainConfig
    from dpkd_offline.training.distributed import Processes
    from dpkd_offline.training.objectives import OBJECTIVES
    from dpkd_offline.training.optimizer import MasterAdamW
    from dpkd_offline.training.step import Run
    from dpkd_offline.training.stream import Example
    from dpkd_offline.training.student import load_student

    config = TrainConfig(
        dataset=Path("pairs"),
        student=arguments.model,
        output=Path("out"),
        learning_rate=1e-6,
        compile=arguments.compile,
    )
    processes = Processes()
    student = load_student(config, processes)
    optimiser = MasterAdamW(student, getattr(torch, config.precision), config, processes)
    examples = [
        Example(
            p["id"],
            p["prompt_ids"],
            (p["chosen_ids"], p["rejected_ids"]),
            ([LOGP] * len(p["chosen_ids"]), [LOGP] * len(p["rejected_ids"])),
            ([], [LOGP] * len(p["rejected_ids"])),
        )
        for p in read_pairs(arguments)
    ]
    size = arguments.batch
    run = Run(config, student, optimiser, processes, None, len(examples) // size)
    seconds, multiplying = 0.0, []
    for step in range(run.total_steps):
        started = time.perf_counter()
        run.step(step, run.ready(examples[step * size : (step + 1) * size]))
        if step >= WARM_UP:
            seconds += time.perf_counter() - started
            multiplying += products()
    counted = examples[WARM_UP * size : run.total_steps * size]
    assert OBJECTIVES["dpkd"].sides == (0, 1)
    head = student.model.get_output_embeddings().weight.numel()
    trunk = sum(p.numel() for p in student.model.parameters() if p.ndim == 2) - head
    c = student.model.config
    flops = 0.0
    for e in counted:
        prompt, lengths = len(e.prompt_ids), list(map(len, e.responses))
        seen = prompt**2 / 2 + sum(prompt * n + n**2 / 2 for n in lengths)  # keys of all queries
        flops += 6 * trunk * (prompt + sum(lengths)) + 6 * head * sum(lengths)
        flops += 12 * c.num_hidden_layers * c.hidden_size * seen
    product = 2.0 * PRODUCT**3
    return {
        "pairs_per_s": len(counted) / seconds,
        "flops_per_s": flops / seconds,
        "matmul": product / statistics.mean(multiplying),
        "best_matmul": product / min(multiplying),
    }


def trl(arguments: argparse.Namespace) -> dict[str, float]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    pairs = read_pairs(arguments)
    columns: dict[str, list[Any]] = {name: [p[name] for p in pairs] for name in ("prompt", "chosen", "rejected")}
    for side in ("chosen", "rejected"):
        columns[f"ref_{side}_logps"] = [LOGP * len(p[f"{side}_ids"]) for p in pairs]
    steps, times = len(pairs) // arguments.batch, []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as output:
        config = DPOConfig(
            output_dir=output,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            per_device_train_batch_size=arguments.batch,
            max_steps=steps,
            loss_type=["sigmoid_norm"],
            beta=0.1,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            max_length=1024,
            disable_tqdm=True,
            learning_rate=1e-6,
            train_sampling_strategy="sequential",
        )
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, fast_dtype())),
            args=config,
            processing_class=AutoTokenizer.from_pretrained(arguments.model),
            train_dataset=Dataset.from_dict(columns),
            callbacks=[Clock()],
        )
        trainer.precompute_ref_logps = True  # the columns are there
        trainer.train()
    return {"pairs_per_s": (steps - WARM_UP) * arguments.batch / (times[-1] - times[WARM_UP])}


def in_a_process(role: str) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--role", role]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    measures: dict[str, float] = json.loads(line.removeprefix(RESULT))
    return measures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--count", type=int, default=32, help="pairs")
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--long", action="store_true", help="prompts three times as long as the responses")
    parser.add_argument("--compile", action="store_true", help="our layers, with torch.compile; not TRL's")
    parser.add_argument("--role", choices=("ours", "trl"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        measures = (ours if arguments.role == "ours" else trl)(arguments)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(RESULT + json.dumps({**measures, "peak_gib": peak}))
        return
    ratios = []
    for turn in range(arguments.turns):
        a, b = in_a_process("ours"), in_a_process("trl")
        ratios.append(a["pairs_per_s"] / b["pairs_per_s"])
        print(
            f"turn {turn + 1}: ours {a['pairs_per_s']:.3f} pairs/s at {a['peak_gib']:.2f} GiB "
            f"({a['flops_per_s'] / 1e9:.0f} of {a['matmul'] / 1e9:.0f} GFLOP/s, {a['flops_per_s'] / a['matmul']:.0%}; "
            f"of the fastest product's {a['best_matmul'] / 1e9:.0f}, {a['flops_per_s'] / a['best_matmul']:.0%}), "
            f"TRL {b['pairs_per_s']:.3f} pairs/s at {b['peak_gib']:.2f} GiB; "
            f"ratio {ratios[-1]:.2f}, memory {a['peak_gib'] / b['peak_gib']:.2f}",
            flush=True,
        )
    print(f"ratio {statistics.median(ratios):.2f} (median of {len(ratios)})")


if __name__ == "__main__":
    main()
