"""What a training step reaches on this machine's GPU: random weights in real shapes, no network.

usage: python tests/benchmarks/gpu.py [--sizes 0.6B,1.7B] [--micro 640,4096,16384] [--pairs 32] [--steps 4] [--tiny]
           [--profile] [--output FILE.json]

A step is `dpkd` on --pairs pairs with a prompt of 64 to 192 tokens and two responses of 128 to 384, in bfloat16, as
`train` takes it. Of each size, of micro batches of so many tokens, with and without compiled layers, a row:

- tokens/s: of what stands in the rows, padding not counted, of the quickest of --steps steps after a first one
- MFU: the share of the rate of a product of two 8192 x 8192 bfloat16 matrices, measured here, that forward and backward
  of these tokens need, without what is computed again
- GiB: the most memory that torch had from the device
- reads: how often a step made the processor wait for the device, by torch's own count of such calls
- busy: the share of a step in which a kernel ran

--tiny is for a machine without a GPU: a small model, to see that the benchmark runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch.autograd.profiler_util import EventList
from transformers import AutoModelForCausalLM, Qwen3Config

from dpkd_offline.config.train import TrainConfig
from dpkd_offline.training.distributed import Processes
from dpkd_offline.training.optimizer import MasterAdamW
from dpkd_offline.training.step import Run
from dpkd_offline.training.stream import Example
from dpkd_offline.training.student import Student, compile_layers

SIZES = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sizes", type=lambda text: text.split(","), default=["0.6B", "1.7B"])
    add("--micro", type=lambda text: list(map(int, text.split(","))), default=[640, 4096, 16384])
    add("--compile", type=lambda text: [word == "yes" for word in text.split(",")], default=[False, True])
    add("--pairs", type=int, default=32)
    add("--steps", type=int, default=4)
    add("--tiny", action="store_true")
    add("--profile", action="store_true", help="the kernels that take longest, of each row")
    add("--output", type=Path)
    options = parser.parse_args()
    if options.tiny:
        options.sizes, options.micro, options.pairs, options.steps = ["tiny"], [640, 2048], 4, 2
    return options


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def product_rate(size: int) -> float:
    """FLOP/s of bfloat16 products."""
    a, b = (torch.randn(size, size, device=DEVICE).bfloat16() for _ in range(2))
    seconds = []
    for _ in range(12):
        wait()
        started = time.perf_counter()
        a @ b
        wait()
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def examples_of(count: int, vocabulary: int) -> list[Example]:
    generator = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, (1,), generator=generator))
        values: list[int] = torch.randint(3, vocabulary, (size,), generator=generator).tolist()
        return values

    examples = []
    for n in range(count):
        prompt, chosen, rejected = ids(64, 192), ids(128, 384), ids(128, 384)
        logps = ([-1.0] * len(chosen), [-1.0] * len(rejected))
        examples.append(Example(str(n), prompt, (chosen, rejected), logps, ([], [-12.0] * len(rejected))))
    return examples


def run_of(size: str, micro: int, compiled: bool) -> Run:
    torch.manual_seed(0)
    config = TrainConfig(
        dataset=Path("none"),
        student="none",
        output=Path("none"),
        learning_rate=1e-6,
        micro_batch_tokens=micro,
        compile=compiled,
    )
    shape = Qwen3Config(
        vocab_size=151_936 if size != "tiny" else 500,
        num_key_value_heads=8 if size != "tiny" else 2,
        head_dim=128 if size != "tiny" else 16,
        tie_word_embeddings=True,
        **SIZES[size],
    )
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32).eval()
    student = Student(model, DEVICE, None, torch.bfloat16, config.max_length)
    if compiled:
        compile_layers(model, DEVICE)
    model.get_input_embeddings().sparse = True
    optimizer = MasterAdamW(student, torch.bfloat16, config)
    return Run(config, student, optimizer, Processes(), None, 100)


def flops_of(run: Run, examples: list[Example]) -> float:
    """Of forward and backward, without what is computed again: products with weights, and attention."""
    model = run.student.model
    head = model.get_output_embeddings().weight.numel()
    trunk = sum(p.numel() for p in model.parameters() if p.ndim == 2) - head
    c, flops = model.config, 0.0
    for e in examples:
        prompt, lengths = len(e.prompt_ids), list(map(len, e.responses))
        seen = prompt**2 / 2 + sum(prompt * n + n**2 / 2 for n in lengths)  # keys of all queries
        flops += 6 * trunk * (prompt + sum(lengths)) + 6 * head * sum(lengths)
        flops += 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * seen
    return flops


def reads_of(run: Run, examples: list[Example]) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run.step(2, examples)
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


def busy_of(run: Run, examples: list[Example], show: bool) -> float:
    """Of a step of few micro batches: the profiler keeps every kernel."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        wait()
        started = time.perf_counter()
        run.step(3, examples)
        wait()
        seconds = time.perf_counter() - started
    averages: EventList = profile.key_averages()
    kernels = sorted(averages, key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in kernels if e.device_type == torch.autograd.DeviceType.CUDA)
    if show:
        ops = [e for e in kernels if e.device_type == torch.autograd.DeviceType.CUDA][:16]
        for e in ops:
            print(f"  {e.self_device_time_total / total:6.1%} {e.count:6d} {e.key[:110]}", flush=True)
    return total / 1e6 / seconds


def measured(size: str, micro: int, compiled: bool, options: argparse.Namespace, rate: float) -> dict[str, Any]:
    row: dict[str, Any] = {"size": size, "micro": micro, "compile": compiled}
    try:
        run = run_of(size, micro, compiled)
        examples = examples_of(options.pairs, run.student.vocab_size)
        tokens = sum(len(e.prompt_ids) + sum(map(len, e.responses)) for e in examples)
        started = time.perf_counter()
        run.step(0, examples)
        wait()
        row["first step, s"] = time.perf_counter() - started
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for step in range(1, options.steps + 1):
            started = time.perf_counter()
            metrics = run.step(step, examples)
            wait()
            seconds.append(time.perf_counter() - started)
        row |= {
            "shared": run.student.shares,
            "pairs": len(examples),
            "tokens/s": tokens / min(seconds),
            "MFU": flops_of(run, examples) / min(seconds) / rate,
            "padding": metrics["padding"],
        }
        if DEVICE.type == "cuda":
            row["GiB"] = torch.cuda.max_memory_allocated() / 2**30
            row["reads"] = reads_of(run, examples)
            row["busy"] = busy_of(run, examples[: max(4, micro // 600)], options.profile)
    except torch.OutOfMemoryError:
        row["tokens/s"] = "out of memory"
    return row


def main() -> None:
    options = arguments()
    rate = product_rate(8192 if DEVICE.type == "cuda" else 512)
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    print(f"{device}, torch {torch.__version__}, {rate / 1e12:.0f} TFLOP/s of bfloat16 products", flush=True)
    rows = []
    for size in options.sizes:
        for compiled in options.compile:
            for micro in options.micro:
                rows.append(measured(size, micro, compiled, options, rate))
                print(rows[-1], flush=True)
                gc.collect()
                if DEVICE.type == "cuda":
                    torch.cuda.empty_cache()
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3g"))
    if options.output:
        options.output.write_text(json.dumps({"device": device, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
