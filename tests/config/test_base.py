from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dpkd_offline.config.base import redacted_dict
from dpkd_offline.config.data import GenerateConfig
from dpkd_offline.config.evaluate import EvaluateConfig
from dpkd_offline.config.recipe import validated


def test_configs_are_frozen() -> None:
    config = validated(EvaluateConfig, {"model": "m", "prompts": "p", "output": "o", "seeds": "1,2"})
    assert config.seeds == (1, 2)
    with pytest.raises(Exception, match="frozen"):
        config.model = "other"  # type: ignore[misc]


def test_shared_settings_carry_no_absolute_path() -> None:
    config = GenerateConfig(dataset=Path("/home/ann/ds"), role="teacher", model="/models/big", prompts="data/p.jsonl")
    plain = redacted_dict(config)
    assert (plain["dataset"], plain["model"], plain["prompts"]) == ("ds", "big", "data/p.jsonl")
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
