"""A step against the objective as it is written: L = L_DPKD + α NLL(y_t) + λ L_pt, by autograd in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fake_device import DEVICE, FakeDevice
from helpers.runs import log_prob, train_config
from helpers.tiny import FAMILIES
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

import dpkd_offline.training.optimizer as optimizer_module
import dpkd_offline.training.step as step_module
from dpkd_offline.common.errors import DataError
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.models.loading import load_model
from dpkd_offline.training.distributed import Processes
from dpkd_offline.training.examples import pair_stream
from dpkd_offline.training.objectives import Scored
from dpkd_offline.training.optimizer import MasterAdamW
from dpkd_offline.training.step import Run, Sums
from dpkd_offline.training.stream import Example
from dpkd_offline.training.student import load_student


def pair_loss(model: torch.nn.Module, example: Example, beta: float) -> Tensor:
    """Eq. 9, from sums of log-probs by the library."""
    rewards = []
    for response, logps in zip(example.responses, example.teacher_logps, strict=True):
        rewards.append(beta / len(response) * (log_prob(model, example.prompt_ids, response) - sum(logps)))
    return -logsigmoid(rewards[0] - rewards[1])


def run_of(config: TrainConfig, processes: Processes) -> Run:
    student = load_student(config, processes)
    return Run(config, student, MasterAdamW(student, torch.float32, config, processes), processes, None, 10)


def examples_of(config: TrainConfig) -> list[Example]:
    return next(pair_stream(Dataset.open(config.dataset), config, 10**6)[0].batches(config.batch_size))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_of_a_step_is_that_of_all_its_losses(
    family: str,
    datasets_by_family: dict[str, Path],
    students: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
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
    examples = examples_of(config)
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
        ready, clock = run.ready(examples), iter([50.0, 57.0])
        monkeypatch.setattr(step_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        metrics = run.step(3, ready, lambda: {"asked": 1.0, "failed": 0.0})

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
    assert metrics["logps_chosen"] == pytest.approx(-nll.mean().item(), rel=1e-5)
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

    assert student.shares and len(ready.micro_batches) > 1
    tokens = sum(len(part) for e in examples for part in (e.prompt_ids, *e.responses))
    laid_out = sum(micro.batch.input_ids.numel() for micro, _ in ready.micro_batches)
    expected_facts = {
        "asked": 1.0,
        "failed": 0.0,
        "learning_rate": pytest.approx(1e-3 * (1 + math.cos(math.pi * 2 / 9)) / 2),  # after one step of warm-up
        "tokens_per_s": round(tokens / 7, 1),
        "pairs_per_s": round(6 / 7, 2),
        "padding": round(1 - tokens / laid_out, 4),
    }
    assert {name: metrics[name] for name in expected_facts} == expected_facts
    losses = {"loss", "loss_kd", "loss_nll", "loss_lm", "grad_norm"}
    sides = {f"{name}_{side}" for name in ("logps", "reward") for side in ("chosen", "rejected")}
    assert metrics.keys() == expected_facts.keys() | losses | sides | {"margin", "accuracy", "drift"}


@pytest.mark.parametrize("objective", ["seqkd", "kd"])
def test_a_loss_of_tokens_is_the_mean_over_the_tokens_of_a_batch(
    objective: str, datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    """Of a teacher with three quarters of its probability on two tokens, spread over the others as it may be."""
    dataset, start = datasets_by_family["llama"], students["llama"]
    config = train_config(dataset, start, tmp_path, objective=objective, micro_batch_tokens=100)
    likeliest, logps = np.array([[7, 9]], dtype=np.int32), np.log(np.array([[0.5, 0.25]], dtype=np.float32))
    examples = [
        replace(e, top=tuple((likeliest.repeat(len(y), 0), logps.repeat(len(y), 0)) for y in e.responses))
        for e in examples_of(config)
    ]
    with Processes() as processes:
        run = run_of(config, processes)
        ready = run.ready(examples)
        assert len(ready.micro_batches) > 1
        metrics = run.step(0, ready)
    model, losses = load_model(str(start), "float64"), []
    for e in examples:
        y_t = e.responses[0]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*e.prompt_ids, *y_t]])).logits
        q = logits[0, len(e.prompt_ids) - 1 : -1].softmax(-1)
        if objective == "seqkd":
            losses += [-math.log(float(row[token])) for row, token in zip(q, y_t, strict=True)]
        else:
            of_all = [(float(row[7]), float(row[9])) for row in q]
            losses += [sum(p * math.log(p / r) for p, r in ((0.5, a), (0.25, b), (0.25, 1 - a - b))) for a, b in of_all]
    assert metrics["loss"] == metrics["loss_kd"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    if objective == "kd":
        assert metrics["forward_kl"] == pytest.approx(metrics["loss"], rel=1e-6)


def test_a_prompt_counts_once_for_both_responses_of_a_micro_batch(
    datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    config = train_config(datasets_by_family["llama"], students["llama"], tmp_path, micro_batch_tokens=100)
    pair = Example("x", [5] * 40, ([6] * 5, [7] * 5), ([-1.0] * 5, [-1.0] * 5), ([], [-1.0] * 5))
    with Processes() as processes:
        ready = run_of(config, processes).ready([pair] * 4)
    assert [len(micro.examples) for micro, _ in ready.micro_batches] == [2, 2]


@pytest.mark.parametrize(
    ("changes", "weight", "why"),
    [
        (
            {"beta": 1e38, "off_policy": "none"},
            None,
            "the loss is not finite on {ids}, although all log-probs are; take a smaller --beta or --tau",
        ),
        (
            {},
            "norm",
            "the student's weights are after step 4 not finite (model.norm.weight); take a lower --learning-rate",
        ),
    ],
    ids=["the loss", "the weights"],
)
def test_a_loss_that_is_not_finite_ends_a_run_in_one_line(
    changes: dict[str, Any],
    weight: str | None,
    why: str,
    datasets_by_family: dict[str, Path],
    students: dict[str, Path],
    tmp_path: Path,
) -> None:
    config = train_config(
        datasets_by_family["llama"], students["llama"], tmp_path, micro_batch_tokens=10_000, **changes
    )
    examples = examples_of(config)
    with Processes() as processes:
        run = run_of(config, processes)
        if weight is not None:
            run.student.model.get_submodule(f"model.{weight}").weight.data[0] = math.nan
        before = {name: tensor.clone() for name, tensor in run.optimizer.tensors()}
        ready = run.ready(examples)
        ((micro, _),) = ready.micro_batches
        with pytest.raises(DataError) as error:
            run.step(4, ready)
    ids = ", ".join(e.id for e in micro.examples)
    assert str(error.value) == f"{why.format(ids=ids)}; the last checkpoint is untouched"
    for name, tensor in run.optimizer.tensors():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("what", ["logps", "top_logps", "corpus"])
def test_log_probs_that_are_not_finite_are_placed(
    what: str,
    datasets_by_family: dict[str, Path],
    students: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a fault in one micro batch, which is one pair, or in all blocks of the corpus; the weights are finite."""
    corpus = {"lm_corpus": "corpus.jsonl", "lm_batch_size": 2} if what == "corpus" else {}
    config = train_config(datasets_by_family["llama"], students["llama"], tmp_path, micro_batch_tokens=4, **corpus)
    examples, nan = examples_of(config)[:3], math.nan
    score, lm_loss = step_module.score_collated, step_module.losses.lm_loss

    def score_with_fault(*given: Any) -> Scored:
        scored = score(*given)
        if what == "corpus" or scored.examples[0] != examples[1]:
            return scored
        wrong = scored.logps * nan if what == "logps" else torch.tensor([[nan]])
        return replace(scored, sums=scored.sums * nan, **{what: wrong})

    monkeypatch.setattr(step_module, "score_collated", score_with_fault)
    monkeypatch.setattr(step_module.losses, "lm_loss", lambda logps: lm_loss(logps) * nan)
    with Processes() as processes:
        run = run_of(config, processes)
        if what == "corpus":
            run.corpus = iter([[5, 6, 7]] * 2)
        before = {name: tensor.clone() for name, tensor in run.optimizer.tensors()}
        with pytest.raises(DataError) as error:
            run.step(4, run.ready(examples))
    place = "blocks of lm-corpus" if what == "corpus" else examples[1].id
    assert str(error.value) == (
        f"the student's log-probs on {place} are after step 4 not finite, although its weights are; take a lower "
        "--learning-rate; the last checkpoint is untouched"
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.optimizer.tensors())


def test_sums_are_those_of_all_processes_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensors and numbers; what is the same in each is not added up."""
    sums = Sums()
    for loss, tokens in ((1.5, 2**24), (2.25, 1.0)):  # whose sum float32 has not
        sums.add("loss", torch.tensor(loss))
        sums.add("tokens", tokens)
    alone: Any = SimpleNamespace(count=1)
    norm = torch.tensor(0.5)
    assert sums.read(alone, grad_norm=norm, nothing=None) == {"loss": 3.75, "tokens": 2**24 + 1, "grad_norm": 0.5}
    monkeypatch.setattr(step_module.distributed, "all_reduce", lambda tensor: tensor.mul_(2))  # of another as this one
    two: Any = SimpleNamespace(count=2, device=torch.device("cpu"))
    assert sums.read(two, grad_norm=norm) == {"loss": 7.5, "tokens": 2**25 + 2, "grad_norm": 0.5}


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


def test_a_micro_batch_that_stands_in_for_nothing_counts_nothing(
    datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where there are fewer rows than processes."""
    corpus = {"lm_corpus": "corpus.jsonl", "lm_batch_size": 2, "lm_weight": 0.5}
    config = train_config(datasets_by_family["llama"], students["llama"], tmp_path, micro_batch_tokens=150, **corpus)
    examples, metrics = examples_of(config), []
    for stand_in in ([], [([0], 0.0)]):
        with Processes() as processes:
            own = processes.own_micro_batches
            monkeypatch.setattr(processes, "own_micro_batches", lambda *given, own=own, s=stand_in: [*own(*given), *s])
            run = run_of(config, processes)
            run.corpus = iter([[5, 6, 7, 8], [9, 10, 11]])
            metrics.append(run.step(0, run.ready(examples)))
    facts = [{name: value for name, value in m.items() if not name.endswith("_per_s")} for m in metrics]
    assert facts[1] == pytest.approx(facts[0], rel=1e-6, abs=1e-7)
    assert "loss_lm" in facts[0] and "loss_nll" not in facts[0]  # which has no weight


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
    examples = examples_of(config)

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
