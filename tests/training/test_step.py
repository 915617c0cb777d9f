"""A step against the objective as it is written: L = L_DPKD + α NLL(y_t) + λ L_pt, by autograd in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.fake_device import DEVICE, FakeDevice
from helpers.runs import log_prob, train_config
from helpers.tiny import FAMILIES
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

import dpkd_offline.training.optimizer as optimizer_module
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.models.loading import load_model
from dpkd_offline.training.distributed import Processes
from dpkd_offline.training.examples import pair_stream
from dpkd_offline.training.optimizer import MasterAdamW
from dpkd_offline.training.step import Run
from dpkd_offline.training.stream import Example
from dpkd_offline.training.student import load_student


def pair_loss(model: torch.nn.Module, example: Example, beta: float) -> Tensor:
    """Eq. 9, from sums of log-probs by the library."""
    rewards = []
    for response, logps in zip(example.responses, example.teacher_logps, strict=True):
        rewards.append(beta / len(response) * (log_prob(model, example.prompt_ids, response) - sum(logps)))
    return -logsigmoid(rewards[0] - rewards[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_of_a_step_is_that_of_all_its_losses(
    family: str, datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    """Micro batches of one row or a few, of unequal size, both of pairs and of the corpus."""
    beta, alpha, weight = 0.7, 0.3, 0.6
    config = train_config(
        datasets_by_family[family],
        students[family],
        tmp_path,
        beta=beta,
        chosen_nll_weight=alpha,
        lm_weight=weight,
        lm_corpus="corpus.jsonl",  # which nobody opens: its blocks are below
        lm_batch_size=4,
        off_policy="none",
        micro_batch_tokens=150,
        max_grad_norm=1e9,
    )
    examples = next(pair_stream(Dataset.open(config.dataset), config, 10**6)[0].batches(config.batch_size))
    corpus = [[(7 * n + 3 * t) % 300 + 5 for t in range(length)] for n, length in enumerate((90, 12, 33, 70, 41))]
    used, unused = corpus[: config.lm_batch_size], corpus[config.lm_batch_size :]

    with Processes() as processes:
        student = load_student(config, processes)
        optimizer = MasterAdamW(student, torch.float32, config, processes)
        blocks = iter(corpus)
        run = Run(config, student, optimizer, processes, blocks, 10)
        kept: dict[str, Tensor] = {}
        names = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
        original = optimizer.sum_gradients

        def keep() -> None:
            original()
            kept.update((name, gradient.clone()) for name, gradient in zip(names, optimizer.gradients(), strict=True))

        optimizer.sum_gradients = keep  # type: ignore[method-assign]
        metrics = run.step(3, run.ready(examples))

    assert list(blocks) == unused
    reference = load_model(str(students[family]), "float64")
    objective = torch.stack([pair_loss(reference, e, beta) for e in examples]).mean()
    nll = -torch.stack([log_prob(reference, e.prompt_ids, e.responses[0]) / len(e.responses[0]) for e in examples])
    words = -torch.stack([log_prob(reference, block[:1], block[1:]) for block in used]).sum()
    words = words / sum(len(block) - 1 for block in used)
    loss = objective + alpha * nll.mean() + weight * words
    loss.backward()

    assert metrics["loss_kd"] == pytest.approx(objective.item(), rel=1e-5)
    assert metrics["loss_nll"] == pytest.approx(nll.mean().item(), rel=1e-5)
    assert metrics["loss_lm"] == pytest.approx(words.item(), rel=1e-5)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    exact = {name: parameter.grad for name, parameter in reference.named_parameters()}
    squares = 0.0
    for name, gradient in kept.items():
        expected = exact[next(n for n in exact if name.endswith(n))]
        assert expected is not None
        squares += float(expected.square().sum())
        assert (gradient - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-7, name
    assert len(kept) == len(exact)
    assert metrics["grad_norm"] == pytest.approx(squares**0.5, rel=1e-4)


@pytest.mark.parametrize("blocks", [None, [[5, 6, 7]] * 3])
def test_the_last_backward_pass_of_a_step_is_told_so(
    blocks: list[list[int]] | None, datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    """Where gradients are added up over the processes as it makes them."""
    corpus = {"lm_corpus": "corpus.jsonl", "lm_batch_size": 3} if blocks else {}
    config = train_config(datasets_by_family["llama"], students["llama"], tmp_path, micro_batch_tokens=4, **corpus)
    examples = next(pair_stream(Dataset.open(config.dataset), config, 10**6)[0].batches(3))
    with Processes() as processes:
        student = load_student(config, processes)
        optimizer = MasterAdamW(student, torch.float32, config, processes)
        run = Run(config, student, optimizer, processes, iter(blocks) if blocks else None, 10)
        told: list[bool] = []
        original = optimizer.backward
        optimizer.backward = lambda loss, last: (told.append(last), original(loss, last))[1]  # type: ignore[method-assign]
        ready = run.ready(examples)
        run.step(0, ready)
    assert len(told) == len(ready.micro_batches) + len(blocks or []) > 1
    assert told == [False] * (len(told) - 1) + [True]


def test_a_device_is_waited_for_once_a_step_and_gets_a_batch_before_it(
    datasets_by_family: dict[str, Path],
    students: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = train_config(
        datasets_by_family["llama"],
        students["llama"],
        tmp_path,
        batch_size=6,
        dtype="bfloat16",
        micro_batch_tokens=150,
        chosen_nll_weight=0.5,
        max_grad_norm=1e-3,
    )
    examples = next(pair_stream(Dataset.open(config.dataset), config, 10**6)[0].batches(config.batch_size))

    def unfused(masters: dict[str, Tensor], config: object) -> torch.optim.AdamW:
        return torch.optim.AdamW(masters.values(), foreach=False)

    monkeypatch.setattr(optimizer_module, "adamw", unfused)  # its fused kernel asks which devices there are
    with Processes() as processes:
        student = load_student(config, processes)
        with FakeDevice() as device:
            for module in student.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(parameter.detach().to(torch.bfloat16).to(DEVICE)))
                for name, buffer in list(module.named_buffers(recurse=False)):
                    setattr(module, name, buffer.to(DEVICE))
            student.model.tie_weights()
            student.device = DEVICE
            run = Run(config, student, MasterAdamW(student, torch.bfloat16, config, processes), processes, None, 10)
            for step in range(3):
                device.crossed.clear()
                ready = run.ready(examples)
                assert len(ready.micro_batches) > 1 and device.crossed["reads"] == 0 < device.crossed["copies"]
                device.crossed.clear()
                metrics = run.step(step, ready)
                assert metrics["grad_norm"] > config.max_grad_norm
                assert +device.crossed == {"reads": 1}
