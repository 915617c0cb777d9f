"""What a training step reaches on this machine's GPU: random weights in real shapes, no network.

usage: python tests/benchmarks/gpu.py [--sizes 0.6B,1.7B] [--micro 640,4096,16384] [--pairs 32] [--steps 4] [--tiny]
           [--trl 4,8] [--profile] [--output FILE.json]

A step is `dpkd` on --pairs pairs with a prompt of 64 to 192 tokens and two responses of 128 to 384, in bfloat16, as
`train` takes it. Of each size, of micro batches of so many tokens, with and without compiled layers, a row:

- tokens/s: of what stands in the rows, padding not counted, over --steps steps after a first one; of TRL in the
  quickest
- MFU: the share of the rate of a product of two 8192 x 8192 bfloat16 matrices, measured here, that forward and backward
  of these tokens need, without what is computed again
- GiB: the most memory that torch had from the device
- reads: how often a step made the processor wait for the device, by torch's own count of such calls
- busy: the share of a step in which a kernel ran

Of each size also, where TRL is installed, its `DPOTrainer` with the same loss, pairs and pairs in a step, log-probs of
the teacher computed ahead, in bfloat16, with --trl pairs at once and as many gradient accumulations as a step needs;
its MFU is of the same useful products.

And a checkpoint of each size: the seconds that training waits, for a copy in the machine's memory, and those that a
thread then takes to write it, on the disk of the temporary files.

--tiny is for a machine without a GPU: a small model, to see that the benchmark runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
import warnings
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch.autograd.profiler_util import EventList
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from dpkd_offline.config.train import TrainConfig
from dpkd_offline.training.checkpoint import Position, Saving, copied_to_host, own_parts
from dpkd_offline.training.distributed import Processes
from dpkd_offline.training.optimizer import MasterAdamW
from dpkd_offline.training.speed import PRODUCT, cost_of, product_rate
from dpkd_offline.training.step import Run
from dpkd_offline.training.stream import Example, prefetch
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
    add("--trl", type=lambda text: list(map(int, text.split(","))), default=[4, 8], help="pairs at once")
    add("--pairs", type=int, default=32)
    add("--steps", type=int, default=4)
    add("--tiny", action="store_true")
    add("--profile", action="store_true", help="the kernels that take longest, of each row")
    add("--output", type=Path)
    options = parser.parse_args()
    if options.tiny:
        options.sizes, options.micro, options.pairs, options.steps, options.trl = ["tiny"], [640, 2048], 4, 2, [2]
    return options


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


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


def model_of(size: str, dtype: torch.dtype) -> PreTrainedModel:
    shape = Qwen3Config(
        vocab_size=151_936 if size != "tiny" else 500,
        num_key_value_heads=8 if size != "tiny" else 2,
        head_dim=128 if size != "tiny" else 16,
        tie_word_embeddings=True,
        **SIZES[size],
    )
    with torch.device(DEVICE):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(shape, dtype=dtype)
    return model


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
    model = model_of(size, torch.float32).eval()
    student = Student(model, DEVICE, None, torch.bfloat16, config.max_length)
    if compiled:
        compile_layers(model, DEVICE)
    model.get_input_embeddings().sparse = True
    processes = Processes()
    optimizer = MasterAdamW(student, torch.bfloat16, config, processes)
    return Run(config, student, optimizer, processes, None, 100)


def flops_of(model: PreTrainedModel, examples: list[Example]) -> float:
    """Of forward and backward, without what is computed again; each prompt counts once, however it is computed."""
    cost = cost_of(model)
    assert cost is not None
    return cost.of([(e.prompt_ids, e.responses) for e in examples], shares=True)


def reads_of(run: Run, examples: list[Example], show: bool) -> int:
    ready = run.ready(examples)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run.step(2, ready)
        torch.cuda.set_sync_debug_mode("default")
    reads = [w for w in caught if "called a synchronizing" in str(w.message)]
    for w in reads if show else ():
        print(f"  waits: {w.filename}:{w.lineno}", flush=True)
    return len(reads)


def busy_of(run: Run, examples: list[Example], show: bool) -> float:
    """Of a step of few micro batches: the profiler keeps every kernel."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        wait()
        started = time.perf_counter()
        run.step(3, run.ready(examples))
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
        run.step(0, run.ready(examples))
        wait()
        row["first step, s"] = time.perf_counter() - started
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        for step, ready in enumerate(prefetch(map(run.ready, repeat(examples, options.steps))), start=1):
            metrics = run.step(step, ready)
        wait()
        seconds = (time.perf_counter() - started) / options.steps
        row |= {
            "shared": run.student.shares,
            "pairs": len(examples),
            "tokens/s": tokens / seconds,
            "MFU": flops_of(run.student.model, examples) / seconds / rate,
            "padding": metrics["padding"],
        }
        if DEVICE.type == "cuda":
            row["GiB"] = torch.cuda.max_memory_allocated() / 2**30
            row["reads"] = reads_of(run, examples, options.profile)
            row["busy"] = busy_of(run, examples[: max(4, micro // 600)], options.profile)
    except torch.OutOfMemoryError:
        row["tokens/s"] = "out of memory"
    return row


def trl_row(size: str, at_once: int, options: argparse.Namespace, rate: float) -> dict[str, Any]:
    """TRL's step on the same pairs. Its tokens are words of a vocabulary of numbers."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    model = model_of(size, torch.bfloat16)
    vocabulary = {str(n): n for n in range(model.config.vocab_size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="2", unk_token="0")
    examples = examples_of(options.pairs, model.config.vocab_size)
    columns: dict[str, list[Any]] = {"prompt": [" ".join(map(str, e.prompt_ids)) for e in examples]}
    for n, side in enumerate(("chosen", "rejected")):
        columns[side] = ["".join(f" {token}" for token in e.responses[n]) for e in examples]
        columns[f"ref_{side}_logps"] = [-1.0 * len(e.responses[n]) for e in examples]
    times = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            wait()
            times.append(time.perf_counter())

        on_train_end = on_step_begin

    row: dict[str, Any] = {"size": size, "micro": f"TRL, {at_once} pairs"}
    with tempfile.TemporaryDirectory() as output:
        config = DPOConfig(
            output_dir=output,
            use_cpu=DEVICE.type == "cpu",
            bf16=False,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=options.pairs // at_once,
            max_steps=options.steps + 1,
            loss_type=["sigmoid_norm"],
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_steps=100,
            max_length=1024,
            disable_tqdm=True,
            learning_rate=1e-6,
            train_sampling_strategy="sequential",
        )
        data = Dataset.from_dict(columns)
        trainer = DPOTrainer(
            model=model,
            ref_model=model_of("tiny", torch.bfloat16),  # which nobody asks, but TRL would load one
            args=config,
            processing_class=tokenizer,
            train_dataset=data,
            callbacks=[Clock()],
        )
        trainer.precompute_ref_logps = True  # the columns are there
        try:
            trainer.train()
        except torch.OutOfMemoryError:
            return {**row, "tokens/s": "out of memory"}
    seconds = min(after - before for before, after in pairwise(times[1:]))
    tokens = sum(len(e.prompt_ids) + sum(map(len, e.responses)) for e in examples)
    row |= {"pairs": len(examples), "tokens/s": tokens / seconds, "MFU": flops_of(model, examples) / seconds / rate}
    if DEVICE.type == "cuda":
        row["GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def checkpoint_row(size: str) -> dict[str, Any]:
    run = run_of(size, 640, False)
    run.step(0, run.ready(examples_of(2, run.student.vocab_size)))  # makes the moments
    wait()
    started = time.perf_counter()
    copies = copied_to_host(own_parts(run.optimizer.tensors()))
    copied = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        Saving(Path(folder) / "checkpoints", Position(1), "run", copies).commit()
    written = time.perf_counter()
    row = {"copied, s": copied - started, "written, s": written - copied}
    return {"size": size, "micro": f"checkpoint, {sum(t.nbytes for t in copies.values()) / 2**30:.1f} GiB", **row}


def freed() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    options = arguments()
    rate = product_rate(DEVICE, torch.bfloat16, PRODUCT if DEVICE.type == "cuda" else 512)
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    print(f"{device}, torch {torch.__version__}, {rate / 1e12:.0f} TFLOP/s of bfloat16 products", flush=True)
    rows = []
    for size in options.sizes:
        for compiled in options.compile:
            for micro in options.micro:
                rows.append(measured(size, micro, compiled, options, rate))
                print(rows[-1], flush=True)
                freed()
        rows.append(checkpoint_row(size))
        print(rows[-1], flush=True)
        freed()
        for at_once in options.trl:
            rows.append(trl_row(size, at_once, options, rate))
            print(rows[-1], flush=True)
            freed()
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3g"))
    if options.output:
        options.output.write_text(json.dumps({"device": device, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
