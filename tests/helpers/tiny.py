"""Tiny models and tokenizers of three families, built on the spot, and datasets made with them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from dpkd_offline.common.hashing import file_sha256
from dpkd_offline.config.data import GenerateConfig, ScoreTeacherConfig
from dpkd_offline.dataset.columns import ShardStats
from dpkd_offline.dataset.table import Table
from dpkd_offline.generation.generate import generate
from dpkd_offline.generation.score_teacher import score_teacher
from dpkd_offline.prompts.templates import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT

SMALL = {"vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 32}
OTHERS: dict[str, PreTrainedConfig] = {
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=1, intermediate_size=64),
    "gemma3, a window in one layer": Gemma3TextConfig(
        **SMALL,
        num_key_value_heads=1,
        intermediate_size=64,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "mistral, a window": MistralConfig(**SMALL, num_key_value_heads=1, intermediate_size=64, sliding_window=9),
}
FAMILIES = ("gpt2", "opt", "llama")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SUBJECTS = ("tea", "a river", "chess", "the moon", "bread", "a bicycle", "rain", "a library", "salt", "a violin")
TURNS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<end>{% endfor %}"
VERBS = ("Describe", "Explain", "Praise", "Sell", "Draw", "Define")
TINY = ["--engine", "transformers", "--dtype", "float32", "--max-length", "256"]


def rows(count: int) -> list[dict[str, str]]:
    """Prompt rows with references, all different."""
    return [
        {
            "id": f"row-{n}",
            "instruction": f"{VERBS[n % len(VERBS)]} {SUBJECTS[n // len(VERBS) % len(SUBJECTS)]} in {n + 2} words.",
            "input": "For a child." if n % 3 == 0 else "",
            "reference": f"{SUBJECTS[n % len(SUBJECTS)]} is a thing that people like very much on day {n}.",
        }
        for n in range(count)
    ]


def write_jsonl(path: Path, values: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def build_tokenizer(chat: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT] * 20 + [str(list(row.values())) for row in rows(60)]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def build_config(family: str, vocabulary: int) -> PreTrainedConfig:
    """Heads of 32 numbers: fewer than that vLLM's attention does not know."""
    shared = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    if family == "gpt2":
        return GPT2Config(n_positions=256, n_embd=64, n_layer=4, n_head=2, **shared)
    shared |= {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "max_position_embeddings": 256}
    if family == "opt":
        return OPTConfig(ffn_dim=64, word_embed_proj_dim=64, do_layer_norm_before=True, **shared)
    return LlamaConfig(intermediate_size=64, num_key_value_heads=1, tie_word_embeddings=False, **shared)


def build_model(family: str, folder: Path, seed: int = 0) -> Path:
    tokenizer = build_tokenizer(chat=family == "llama")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(build_config(family, len(tokenizer)), dtype=torch.float32)
    with torch.no_grad():  # untrained weights are nearly uniform; spread them, so that mistakes show
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(6.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def generate_config(dataset: Path, role: str, model: Path, **changes: object) -> GenerateConfig:
    """A small generation with the embedded engine."""
    values = {
        "dataset": dataset,
        "role": role,
        "model": str(model),
        "engine": "transformers",
        "dtype": "float32",
        "max_new_tokens": 12,
        "max_length": 256,
        "shard_size": 8,
        "batch_size": 5,
    }
    return GenerateConfig.model_validate({**values, **changes})


def score_config(dataset: Path, model: Path, **changes: object) -> ScoreTeacherConfig:
    values = {"dataset": dataset, "model": str(model), "engine": "transformers", "dtype": "float32", "batch_size": 5}
    return ScoreTeacherConfig.model_validate({**values, **changes})


def make_dataset(dataset: Path, source: Path, teacher: Path, student: Path, top_k: int = 0) -> Path:
    """Prompts, both responses and pairs, on request with the teacher's likeliest tokens."""
    generate(generate_config(dataset, "teacher", teacher, prompts=str(source)))
    generate(generate_config(dataset, "student", student))
    score_teacher(score_config(dataset, teacher, top_k=top_k))
    return dataset


def command_line(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "dpkd_offline.cli", *map(str, arguments)]


def replace_shard(table: Table[Any], shard: int, rows: pa.Table) -> None:
    """Another file in place of a shard, with a manifest entry that vouches for it."""
    path = table.path(shard)
    pq.write_table(rows, path)
    vouch(table, shard)


def vouch(table: Table[Any], shard: int) -> None:
    """A manifest entry for the file that lies there, whatever is in it; its facts, where it has the right columns."""
    path, entry = table.path(shard), table.entry_path(shard)
    values: dict[str, Any] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    with (
        suppress(pa.ArrowException, OSError, ValueError),
        pq.ParquetFile(path, page_checksum_verification=True) as file,
    ):
        if file.schema_arrow.equals(table.schema):
            rows = file.read()
            rows.validate(full=True)
            values["facts"] = ShardStats.of(rows).model_dump()
    entry.write_text(json.dumps({**json.loads(entry.read_text()), **values}))


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its relative name, for comparing runs."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
