"""Students in parts: loaded by one process, held by all."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.launched import free_port
from helpers.sharded import load_in_parts
from helpers.tiny import OTHERS, SMALL
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PreTrainedConfig

from dpkd_offline.models.loading import load_model
from dpkd_offline.models.trial import row_layout
from dpkd_offline.training.sharding import few_layers

CONFIGS: dict[str, PreTrainedConfig] = {
    **OTHERS,
    "gemma2, a cap and a bias of its scores": Gemma2Config(**SMALL, num_key_value_heads=1, intermediate_size=64),
    "llama, scaled positions": LlamaConfig(
        **SMALL,
        intermediate_size=64,
        max_position_embeddings=256,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
}


def saved(folder: Path, config: PreTrainedConfig, untie: bool = False) -> str:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if untie:  # although its config says that they are one
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    model.save_pretrained(folder)
    return str(folder)


def test_only_the_first_process_loads_and_all_hold_their_parts_of_the_same_model(
    students: dict[str, Path], tmp_path: Path
) -> None:
    """In three processes, so that rows do not divide; with buffers that no file holds, such as rotary frequencies."""
    folders: list[tuple[str, dict[str, Any]]] = [(str(students[family]), {}) for family in ("gpt2", "opt", "llama")]
    folders.append((str(students["llama"]), {"lora_rank": 3}))
    folders.extend((saved(tmp_path / name.split(",")[0], config), {}) for name, config in CONFIGS.items())
    folders.append((saved(tmp_path / "untied", LlamaConfig(**SMALL, tie_word_embeddings=True), untie=True), {}))
    context, port = multiprocessing.get_context("forkserver"), free_port()
    context.set_forkserver_preload(["dpkd_offline.training.trainer", "helpers.sharded", "peft"])
    ranks = [context.Process(target=load_in_parts, args=(rank, 3, port, folders)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_few_layers_stand_for_a_model_that_does_not_fit(name: str, tmp_path: Path) -> None:
    model = load_model(saved(tmp_path, CONFIGS[name]), "float32")
    small = few_layers(model)
    assert small.config.num_hidden_layers <= 2
    assert set(getattr(small.config, "layer_types", [])) == set(getattr(model.config, "layer_types", []))
    assert row_layout(small) == row_layout(model)
