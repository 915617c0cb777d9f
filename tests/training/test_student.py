from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import train_config
from helpers.tiny import FAMILIES
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from dpkd_offline.common.errors import UnavailableError
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.models.batch import response_batch
from dpkd_offline.models.loading import load_model
from dpkd_offline.models.logprobs import token_logps
from dpkd_offline.training import student
from dpkd_offline.training.distributed import Processes
from dpkd_offline.training.examples import pair_stream
from dpkd_offline.training.objectives import OBJECTIVES, score
from dpkd_offline.training.optimizer import MasterAdamW
from dpkd_offline.training.student import (
    COMPILED_STEPS,
    Student,
    compile_layers,
    layers_of,
    pays_to_compile,
    recompute_layers,
)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_made_again_or_compiled_give_the_same_loss_and_gradients(
    family: str, shared: bool, datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    config = train_config(datasets_by_family[family], students[family], tmp_path)
    pairs = pair_stream(Dataset.open(config.dataset), config, 10**6)[0].batches(4)
    batches = [next(pairs), next(pairs)[:1]]  # rows of other lengths
    objective = OBJECTIVES["dpkd"]

    def steps(*changes: Callable[[PreTrainedModel], None]) -> tuple[list[Tensor], dict[str, Tensor], int]:
        model = load_model(str(students[family]), "float32")
        own = model.config._attn_implementation
        student = Student(model)
        assert student.shares
        if not shared:
            student.shares = False
            model.set_attn_implementation(own)
        calls, losses = 0, []

        def count(*_: Any) -> None:
            nonlocal calls
            calls += 1

        for layer in [] if compile_layers in changes else layers_of(model):
            next(layer.children()).register_forward_hook(count)
        for change in changes:
            change(model)
        assert not model.training
        for examples in batches:
            loss = objective.loss(score(student, objective, examples, config)).sum()
            backward = threading.Thread(target=loss.backward)  # as on a GPU: not where the forward pass was
            backward.start()
            backward.join()
            losses.append(loss.detach())
        return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, calls

    losses, expected, once = steps()
    assert once == 8 and expected
    for changes in ([recompute_layers], [compile_layers], [compile_layers, recompute_layers]):
        torch.compiler.reset()
        counters.clear()
        new_losses, gradients, calls = steps(*changes)
        if compile_layers in changes:
            # Not one for each length of a row; padded ones with a mask, and without where none is needed.
            assert counters["stats"]["unique_graphs"] <= (1 if shared else 2)
        else:
            assert calls == 16
            assert all(map(torch.equal, new_losses, losses))
        torch.testing.assert_close(new_losses, losses, rtol=1e-5, atol=1e-6)
        assert gradients.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(gradients[name], expected[name], rtol=1e-5, atol=1e-6)


def test_a_student_trains_in_bfloat16_as_engines_load_it(teachers: dict[str, Path]) -> None:
    """Its rotary frequencies among it, which stay float32."""
    model = load_model(str(teachers["llama"]), "float32")
    config = TrainConfig(dataset=Path("d"), student="s", output=Path("o"))
    MasterAdamW(model, torch.bfloat16, config, Processes())
    loaded = load_model(str(teachers["llama"]), "bfloat16")
    for (name, ours), theirs in zip(model.named_buffers(), loaded.buffers(), strict=True):
        assert ours.dtype == theirs.dtype, name
    batch = response_batch([(list(range(5, 200)), list(range(5, 55)))])
    with torch.no_grad():
        assert torch.equal(token_logps(model, batch), token_logps(loaded, batch))


def test_layers_are_compiled_where_that_pays(teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, gpu = load_model(str(teachers["llama"]), "float32"), torch.device("cuda")
    monkeypatch.setattr(student, "find_spec", lambda name: name)
    monkeypatch.setenv("CC", sys.executable)
    assert pays_to_compile(model, gpu, COMPILED_STEPS)
    assert not pays_to_compile(model, gpu, COMPILED_STEPS - 1)
    assert not pays_to_compile(model, torch.device("cpu"), COMPILED_STEPS)
    assert not pays_to_compile(torch.nn.Linear(2, 2), gpu, COMPILED_STEPS)
    monkeypatch.setenv("CC", "no-such-c-compiler")
    assert not pays_to_compile(model, gpu, COMPILED_STEPS)


def test_compiling_needs_a_compiler(teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UnavailableError, match="no-such-compiler is not there"):
        compile_layers(load_model(str(teachers["llama"]), "float32"))
    monkeypatch.setenv("CC", "no-such-c-compiler")
    with pytest.raises(UnavailableError, match="a C compiler, and no-such-c-compiler is not there; CC names"):
        compile_layers(load_model(str(teachers["llama"]), "float32"), torch.device("cuda"))
