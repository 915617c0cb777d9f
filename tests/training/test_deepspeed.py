"""The config of DeepSpeed; training with it is in test_distributed.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dpkd_offline.config.train import TrainConfig
from dpkd_offline.training.deepspeed import engine_settings

CONFIG = TrainConfig(dataset=Path("d"), student="s", output=Path("o"), max_grad_norm=0.5)


def test_a_config_file_keeps_what_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "zero.json"
    zero = {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": False, "offload_optimizer": {"device": "cpu"}}
    decided = {
        "train_batch_size": "auto",
        "gradient_clipping": 7.0,
        "fp16": {"enabled": "auto"},
        "bf16": {"enabled": "auto"},
    }
    path.write_text(json.dumps({"zero_optimization": zero, "optimizer": {"type": "SGD"}, **decided}))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    settings = engine_settings(torch.bfloat16, CONFIG)
    assert settings["zero_optimization"].items() >= {"stage": 2, "overlap_comm": False}.items()
    assert settings["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert "reduce_bucket_size" not in settings["zero_optimization"]
    assert not {"train_batch_size", "optimizer", "fp16"} & settings.keys()
    assert settings["gradient_clipping"] == 0.5 and settings["bf16"] == {"enabled": True}


def test_a_stage_by_a_flag_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    settings = engine_settings(torch.float32, CONFIG)
    assert settings["zero_optimization"]["stage"] == 3 and settings["bf16"] == {"enabled": False}
