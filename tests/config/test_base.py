from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dpkd_offline.common.errors import UsageError
from dpkd_offline.config.base import Config, redacted_dict
from dpkd_offline.config.data import ExportConfig, GenerateConfig, ScoreTeacherConfig, SubsetConfig
from dpkd_offline.config.evaluate import EvaluateConfig
from dpkd_offline.config.recipe import validated
from dpkd_offline.config.train import TrainConfig


def test_configs_are_frozen() -> None:
    config = validated(EvaluateConfig, {"model": "m", "prompts": "p", "output": "o", "seeds": "1,2"})
    assert config.seeds == (1, 2)
    for one in (7, "7", [7]):
        assert validated(EvaluateConfig, {"model": "m", "prompts": "p", "output": "o", "seeds": one}).seeds == (7,)
    with pytest.raises(Exception, match="frozen"):
        config.model = "other"  # type: ignore[misc]


def test_shared_settings_carry_no_absolute_path() -> None:
    config = GenerateConfig(dataset=Path("/home/ann/ds"), role="teacher", model="/models/big", prompts="data/p.jsonl")
    plain = redacted_dict(config)
    assert (plain["dataset"], plain["model"], plain["prompts"]) == ("ds", "big", "data/p.jsonl")
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain


PLACES: dict[type[Config], dict[str, object]] = {
    TrainConfig: {"dataset": "ds", "student": "s", "output": "o"},
    GenerateConfig: {"dataset": "ds", "role": "student", "model": "m"},
    ScoreTeacherConfig: {"dataset": "ds", "model": "m"},
    EvaluateConfig: {"model": "m", "prompts": "p", "output": "o"},
    SubsetConfig: {"dataset": "ds", "output": "o"},
    ExportConfig: {"dataset": "ds", "output": "o"},
}


@pytest.mark.parametrize(
    ("config", "values", "sentence"),
    [
        (TrainConfig, {"epochs": 0}, "'epochs': input should be greater than 0"),
        (TrainConfig, {"max_steps": 0}, "'max-steps': input should be greater than 0"),
        (TrainConfig, {"holdout": 1.0}, "'holdout': input should be less than 1"),
        (TrainConfig, {"warmup_ratio": 1.0}, "'warmup-ratio': input should be less than 1"),
        (TrainConfig, {"learning_rate": "inf"}, "'learning-rate': input should be a finite number"),
        (TrainConfig, {"beta": "nan"}, "'beta': input should be a finite number"),
        (TrainConfig, {"beta": 0}, "'beta': input should be greater than 0"),
        (TrainConfig, {"max_grad_norm": "inf"}, "'max-grad-norm': input should be a finite number"),
        (TrainConfig, {"objective": "kdd"}, "'objective': input should be 'dpkd', 'dpkd-sum', 'ipo'"),
        (TrainConfig, {"lm_weight": 0.7}, "lm_weight is that of lm_corpus, which is not given"),
        (TrainConfig, {"lora_output": "adapter"}, "lora_output 'adapter' needs adapters: set lora_rank, such as to 16"),
        (TrainConfig, {"replay": 0.3}, "replay is of earlier rounds; give one of regenerate_every, _epochs and _above"),
        (TrainConfig, {"regenerate_every": 5, "objective": "kd"}, "objective 'kd' reads y_t alone, so that new y_s"),
        (TrainConfig, {"regenerate_every": 5, "objective": "sft"}, "without y_s there is no drift and no round"),
        (TrainConfig, {"regenerate_every": 5, "regenerate_above": 0.1}, "give one of regenerate_every, regenerate_epo"),
        (TrainConfig, {"holdout": 0, "validate_rouge": 4}, "validation needs held-out prompts: set holdout, such as"),
        (TrainConfig, {"seed": -1}, "'seed': input should be greater than or equal to 0"),
        (GenerateConfig, {"temperature": 0}, "'temperature': input should be greater than 0"),
        (GenerateConfig, {"temperature": "inf"}, "'temperature': input should be a finite number"),
        (GenerateConfig, {"top_p": 0}, "'top-p': input should be greater than 0"),
        (GenerateConfig, {"top_p": 1.1}, "'top-p': input should be less than or equal to 1"),
        (GenerateConfig, {"limit": 0}, "'limit': input should be greater than 0"),
        (GenerateConfig, {"share": 0.5}, "share below 1 is for role 'student' from round 1 on"),
        (GenerateConfig, {"role": "teacher", "round": 2}, "round is for role 'student': the teacher answers once"),
        (
            GenerateConfig,
            {"engine": "vlm"},
            "'engine': input should be 'auto', 'vllm', 'transformers' or 'http'; did you",
        ),
        (GenerateConfig, {"engine": "http", "tensor_parallel_size": 2}, "tensor_parallel_size is for engine vllm"),
        (GenerateConfig, {"shard_index": 2, "num_shards": 2}, "shard_index 2 must be below num_shards 2"),
        (ScoreTeacherConfig, {"top_k": -1}, "'top-k': input should be greater than or equal to 0"),
        (EvaluateConfig, {"seeds": "1,2,1"}, "'seeds': 1 stands there twice: its responses would be counted twice"),
        (EvaluateConfig, {"seeds": ""}, "'seeds': "),
        (EvaluateConfig, {"seeds": "-3"}, "'seeds.0': input should be greater than or equal to 0"),
        (SubsetConfig, {}, "give a rule: --max-tokens, --drop-truncated"),
        (SubsetConfig, {"min_margin": 2, "max_margin": 1}, "min_margin 2.0 must not be above max_margin 1.0"),
        (SubsetConfig, {"share": 0.0}, "'share': input should be greater than 0"),
        (ExportConfig, {"output": "-"}, "format 'trl' is a folder; only 'jsonl' goes to standard output"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_out_of_range_or_against_each_other_are_refused(
    config: type[Config], values: dict[str, object], sentence: str
) -> None:
    with pytest.raises(UsageError) as raised:
        validated(config, {**PLACES[config], **values}, as_flags=True)
    assert str(raised.value).startswith(sentence)


def test_a_student_is_not_called_as_a_sample_is() -> None:
    with pytest.raises(UsageError, match="'sample-1' is what `load_dataset` calls the tables of a sample"):
        validated(ScoreTeacherConfig, {"dataset": "ds", "model": "m", "student_name": "sample-1"})
    assert validated(ScoreTeacherConfig, {"dataset": "ds", "model": "m", "student_name": "sample-a"}).student_name
