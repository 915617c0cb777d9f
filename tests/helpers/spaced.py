"""Tokenizers that put a space before a text, as Llama 2's does, and tiny models with them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from dpkd_offline.prompts.templates import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT
from helpers.tiny import rows

KINDS = ("normalizer", "metaspace always", "metaspace first")
SPECIAL = ["<unk>", "<s>", "</s>"]


def spaced_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """One of KINDS: a Unigram whose normalizer prepends the space, or a BPE whose pre-tokenizer does."""
    texts = [ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT, *(json.dumps(row) for row in rows(60))]
    strip = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    if kind == "normalizer":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = strip
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
    else:
        scheme = kind.split()[1]
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        tokenizer.decoder = strip
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


def spaced_model(folder: Path, kind: str, seed: int = 0) -> Path:
    tokenizer = spaced_tokenizer(kind)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # untrained weights are nearly uniform; spread them, so that mistakes show
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(6.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
