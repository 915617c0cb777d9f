"""How much memory `train` takes, as the pairs grow and as the vocabulary does.

    python tests/benchmarks/train_memory.py [--rows FEW MANY] [--vocabularies SMALL LARGE] [--folder DIR]

Makes datasets of both sizes (by default 1000 and 1000000 pairs; the latter takes 2 GB of disk while it runs) and prints
for each, in fresh processes: the most memory that the training stream had (its check of every shard, then 2000 batches
of 8), and that of a `train` of 5 steps with a tiny model. Then, for a tiny model of each vocabulary (by default 49152
and 262144 tokens), what a `train` of 3 steps took beyond the model's own: weights, float32 masters, gradients and two
moments. All of it is memory beyond the interpreter with its imports done.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from made_pairs import MIB, VOCABULARY, build, peak

PAIRS = "pairs/round-000"
BATCHES, BATCH_SIZE = 2000, 8
BYTES_PER_PARAMETER = 2 + 4 + 4 + 4 + 4  # bfloat16 weight; float32 master, gradient, two moments
STEP = [sys.executable, __file__]


def build_model(folder: Path, vocabulary: int) -> None:
    """An untrained Llama of two layers, whose embedding is its head too."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=vocabulary - 1,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def make(root: Path, rows: int, vocabulary: int) -> None:
    """A model, root/model, and pairs for it, root/data."""
    from dpkd_offline.models.info import ModelInfo

    build_model(root / "model", vocabulary)
    build(root / "data", rows, vocabulary, ModelInfo(str(root / "model")).tokenizer_fingerprint, PAIRS)


def measure(what: str, root: Path, steps: int) -> None:
    """Stream or train in this process, and print the most bytes that it had beyond its imports."""
    from dpkd_offline.config.train import TrainConfig
    from dpkd_offline.dataset.dataset import Dataset
    from dpkd_offline.training.examples import pair_stream
    from dpkd_offline.training.trainer import train

    config = TrainConfig(
        dataset=root / "data",
        student=str(root / "model"),
        output=root / "out",
        max_steps=steps,
        batch_size=BATCH_SIZE,
        resume=False,
        holdout=0.0,
    )
    base = peak()
    if what == "stream":
        stream, _ = pair_stream(Dataset.open(config.dataset), config, 2**31)
        assert sum(1 for _ in islice(stream.batches(BATCH_SIZE), BATCHES)) == BATCHES
    else:
        train(config)
    print(peak() - base)


def measured(what: str, root: Path, steps: int) -> int:
    command = [*STEP, "measure", what, str(root), str(steps)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)


def parameters(root: Path) -> int:
    from safetensors import safe_open

    with safe_open(root / "model" / "model.safetensors", "pt") as weights:
        return sum(weights.get_tensor(name).numel() for name in weights.keys())


def compare_rows(folder: Path, rows: list[int]) -> None:
    took: dict[str, list[int]] = {"stream": [], "train": []}
    for count in rows:
        root, started = folder / f"{count}-pairs", time.monotonic()
        subprocess.run([*STEP, "make", str(root), str(count), str(VOCABULARY)], check=True)
        print(f"made {count:,} pairs in {time.monotonic() - started:.0f} s", flush=True)
        for what, peaks in took.items():
            peaks.append(measured(what, root, 5))
            print(f"{what:<6} {count:>9,} pairs  {peaks[-1] / MIB:>7.1f} MiB", flush=True)
    for what, (few, many) in took.items():
        print(f"{what}: {many / few:.2f} times the memory for {rows[1] / rows[0]:,.0f} times the pairs", flush=True)


def compare_vocabularies(folder: Path, vocabularies: list[int]) -> None:
    beyond = []
    for vocabulary in vocabularies:
        root = folder / f"{vocabulary}-tokens"
        subprocess.run([*STEP, "make", str(root), "256", str(vocabulary)], check=True)
        took, own = measured("train", root, 3), BYTES_PER_PARAMETER * parameters(root)
        beyond.append(took - own)
        print(
            f"train  {vocabulary:>9,} tokens {took / MIB:>7.1f} MiB, of which the model's own {own / MIB:.1f} MiB, "
            f"the rest {beyond[-1] / MIB:.1f} MiB",
            flush=True,
        )
    print(f"the larger vocabulary takes {(beyond[1] - beyond[0]) / MIB:.1f} MiB beyond its model's own")


def main() -> None:
    if sys.argv[1:2] == ["make"]:
        return make(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    if sys.argv[1:2] == ["measure"]:
        return measure(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs=2, default=[1_000, 1_000_000])
    parser.add_argument("--vocabularies", type=int, nargs=2, default=[49_152, 262_144])
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        compare_vocabularies(Path(folder), options.vocabularies)
        compare_rows(Path(folder), options.rows)


if __name__ == "__main__":
    main()
