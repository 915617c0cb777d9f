from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.runs import metrics_of, train_config, weights_of
from helpers.tiny import FAMILIES
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from dpkd_offline.common.errors import Interrupted, UnavailableError, UsageError
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.models.loading import load_model
from dpkd_offline.training import lora, trainer
from dpkd_offline.training.trainer import train


def lora_config(dataset: Path, student: Path, output: Path, **changes: object) -> TrainConfig:
    return train_config(dataset, student, output, **{"lora_rank": 4, "learning_rate": 1e-2, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_model_is_the_base_and_what_the_adapters_add(
    family: str, datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    for output in ("merged", "adapter"):
        config = lora_config(datasets_by_family[family], students[family], tmp_path / output, lora_output=output)
        train(config)
    assert metrics_of(tmp_path / "merged")[-1]["loss"] == metrics_of(tmp_path / "adapter")[-1]["loss"]

    adapter_config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert adapter_config["base_model_name_or_path"] == family
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert file.keys() and all("lora_" in name for name in file.keys())
    assert not (tmp_path / "adapter" / "config.json").exists()
    for path in (tmp_path / "adapter").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path
    for output in ("merged", "adapter"):
        assert "LoRA of rank 4" in (tmp_path / output / "README.md").read_text()

    before, after = weights_of(students[family]), weights_of(tmp_path / "merged")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(before[name].ndim == 2 for name in changed)
    embeddings = {"transformer.wte.weight", "model.decoder.embed_tokens.weight", "model.embed_tokens.weight"}
    assert not changed & (embeddings | {"lm_head.weight"})

    ids = torch.arange(5, 25)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    adapted = peft.PeftModel.from_pretrained(load_model(str(students[family]), "float32"), tmp_path / "adapter").eval()
    with torch.inference_mode():
        torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-3)


def test_a_merged_model_loads_without_peft(
    datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(lora_config(datasets_by_family["opt"], students["opt"], tmp_path / "out", max_steps=1))
    assert "adapter_config.json" not in {path.name for path in (tmp_path / "out").iterdir()}
    monkeypatch.setitem(sys.modules, "peft", None)
    load_model(str(tmp_path / "out"), "float32")
    with pytest.raises(UnavailableError, match="PEFT is not installed"):
        train(lora_config(datasets_by_family["opt"], students["opt"], tmp_path / "other"))


def test_checkpoints_hold_the_adapters_alone_and_resume_exactly(
    datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = datasets_by_family["llama"], students["llama"]
    train(lora_config(*where, tmp_path / "whole", dtype="bfloat16"))
    config = lora_config(*where, tmp_path / "stopped", dtype="bfloat16", save_every=2)
    with monkeypatch.context() as patch:

        def stop(*_: object) -> None:
            raise Interrupted("stopped")

        patch.setattr(trainer.Run, "step", _first_steps(trainer.Run.step, 2, stop))
        with pytest.raises(Interrupted):
            train(config)
    (checkpoint,) = (config.output / "checkpoints").iterdir()
    with safe_open(checkpoint / "state.safetensors", "pt") as file:
        assert all(name.startswith("random/") or "lora_" in name for name in file.keys())
    train(config)
    for name, weight in weights_of(tmp_path / "whole").items():
        assert torch.equal(weight, weights_of(config.output)[name]), name


def _first_steps(step, count, then):  # type: ignore[no-untyped-def]
    def limited(self, number, *more):  # type: ignore[no-untyped-def]
        return step(self, number, *more) if number < count else then()

    return limited


def test_targets_that_are_not_there_or_are_shared_with_the_head_are_refused(
    datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    for targets, message in (
        ("nothing", "--lora-targets nothing"),
        ("wte", "take no adapters"),
        ("lm_head", "no adapt"),
    ):
        with pytest.raises(UsageError, match=message):
            train(lora_config(datasets_by_family["gpt2"], students["gpt2"], tmp_path / "out", lora_targets=targets))
    assert not (tmp_path / "out").exists()
    config = lora_config(datasets_by_family["llama"], students["llama"], tmp_path / "out", lora_targets="q_proj,v_proj")
    train(config)
    before, after = weights_of(students["llama"]), weights_of(config.output)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("q_proj" in name or "v_proj" in name for name in changed)


def test_a_frozen_base_takes_the_precision_of_products_and_adapters_stay_float32(students: dict[str, Path]) -> None:
    config = train_config(Path("d"), students["llama"], Path("o"), lora_rank=4)
    model = load_model(str(students["llama"]), "float32")
    lora.adapt(model, config)
    lora.round_frozen(model, torch.bfloat16)
    kinds = {(parameter.requires_grad, parameter.dtype) for parameter in model.parameters()}
    assert kinds == {(False, torch.bfloat16), (True, torch.float32)}
    logits = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    logits.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
