"""Every objective from tokens to loss and gradients: in both layouts of a batch, and against formulas written again.

The reference is the plain transformers model in float64, one sequence at a time, its full log-softmax, and autograd
through all of it.
"""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from inspect import Parameter, signature
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers.tiny import FAMILIES, OTHERS, build_config
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dpkd_offline.config import objectives as registry
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.dataset.schema import CHOSEN, REJECTED
from dpkd_offline.models.batch import response_batch
from dpkd_offline.models.logprobs import top_logps
from dpkd_offline.training import losses as equations
from dpkd_offline.training.objectives import OBJECTIVES, TENSORS, facts_of, objective_of, score, word_facts_of
from dpkd_offline.training.stream import Example
from dpkd_offline.training.student import Student

SURE = "llama, sure of its tokens"
MODELS = (*FAMILIES, "qwen3", "gemma3, a window in one layer", SURE)
VOCABULARY, K = 400, 8
SHAPES = ((3, 4, 2), (1, 1, 3), (25, 12, 7), (8, 5, 9))  # tokens of the prompt, of y_t, of y_s
# Strengths at which no sigmoid is saturated on these models: a saturated one has no gradient to compare.
SETTINGS: dict[str, dict[str, float]] = {
    "dpkd": {"beta": 0.7},
    "dpkd-sum": {"beta": 0.05},
    "ipo": {"tau": 0.05},
    "cpo": {"beta": 0.05},
    "simpo": {"beta": 0.7, "gamma": 0.4},
    "dpkd-token": {"beta": 0.5},
    "gkd": {"jsd_beta": 0.3, "student_share": 0.6},
    "skl": {"student_share": 0.4},
    "srkl": {"skew_alpha": 0.2},
    "distillm-2": {"student_share": 0.3},
}


@cache
def float32_model(name: str, seed: int) -> PreTrainedModel:
    config = copy.deepcopy(OTHERS[name]) if name in OTHERS else build_config(name.split(",")[0], VOCABULARY)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # untrained weights are nearly uniform; spread them, so that mistakes show
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(6.0)
        if name == SURE:
            model.get_output_embeddings().weight.mul_(4.0)
    assert isinstance(model, PreTrainedModel)
    return model


def model_of(name: str, seed: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same weights in every precision."""
    return copy.deepcopy(float32_model(name, seed)).to(dtype)  # type: ignore[arg-type]


@torch.no_grad()
def examples_of(teacher: PreTrainedModel, student: PreTrainedModel, drift: float = 0.3) -> list[Example]:
    """Examples of random tokens, with what a teacher and a student some steps ago (by `drift`) said of them."""
    random = np.random.default_rng(0)
    examples = []
    for number, (prompt, *lengths) in enumerate(SHAPES):
        x = random.integers(5, VOCABULARY, prompt).tolist()
        responses = [random.integers(5, VOCABULARY, length).tolist() for length in lengths]
        logps, tops, behavior = [], [], []
        for y in responses:
            stored, ids, values = top_logps(teacher, response_batch([(x, y)]), K)
            logps.append(stored.tolist())
            tops.append((ids.int().numpy(), values.numpy()))
            own = top_logps(student, response_batch([(x, y)]), 1)[0].numpy()
            behavior.append(np.minimum(own + random.normal(0, drift, len(y)), 0.0).tolist())
        examples.append(Example(str(number), x, tuple(responses), tuple(logps), ([], behavior[1]), tuple(tops)))
    return examples


def read_by(name: str, examples: list[Example]) -> list[Example]:
    """What the stream of an objective's data gives: pairs, or references without anything stored."""
    if OBJECTIVES[name].data == "pairs":
        return examples
    return [Example(e.id, e.prompt_ids, e.responses[:1]) for e in examples]


def config_of(name: str) -> TrainConfig:
    return TrainConfig.model_validate(
        {"dataset": "d", "student": "s", "output": "o", "objective": name, **SETTINGS.get(name, {})}
    )


Result = tuple[float, dict[str, Tensor]]


def ours(model: PreTrainedModel, name: str, examples: list[Example], shares: bool) -> Result:
    """Loss of a batch and gradients, on rows with shared prompts or on plain right-padded ones."""
    student = Student(model)
    if shares:
        assert student.shares
    else:
        model.set_attn_implementation("sdpa")
        student.shares = False
    loss = OBJECTIVES[name].loss(score(student, OBJECTIVES[name], read_by(name, examples), config_of(name))).mean()
    loss.backward()
    return loss.item(), gradients_of(model)


def gradients_of(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


# --- The formulas, written again ---


class Side(NamedTuple):
    """One response: the student's log-probs of the whole vocabulary, and what is stored. float64."""

    q: Tensor  # [n, V]
    tokens: Tensor  # [n]
    p: Tensor  # [n]
    b: Tensor  # [n]
    top_ids: Tensor  # [n, K]
    top_p: Tensor  # [n, K], probabilities
    corrected: bool = False  # whether the gradient of each token counts as much as the student still says it

    @property
    def log_q(self) -> Tensor:
        log_q = torch.stack([row[token] for row, token in zip(self.q, self.tokens, strict=True)])
        if not self.corrected:
            return log_q
        weights = (log_q.detach().exp() / self.b.exp()).clamp(max=5)
        return weights * log_q + (1 - weights) * log_q.detach()

    def lumped(self) -> tuple[Tensor, Tensor]:
        """Probabilities of teacher and student [n, K + 1], the last that of all other tokens, summed one by one."""
        others = torch.ones_like(self.q).scatter(-1, self.top_ids, 0.0)
        q = torch.cat([self.q.exp().gather(-1, self.top_ids), (self.q.exp() * others).sum(-1, keepdim=True)], -1)
        return torch.cat([self.top_p, 1 - self.top_p.sum(-1, keepdim=True)], -1), q


def sides_of(model: PreTrainedModel, example: Example, corrected: bool) -> list[Side]:
    sides = []
    for side, y in enumerate(example.responses):
        ids = torch.tensor([[*example.prompt_ids, *y]])
        q = model(input_ids=ids).logits.double().log_softmax(-1)[0, len(example.prompt_ids) - 1 : -1]
        top = example.top[side] if example.top else (np.zeros((len(y), 1), np.int32), np.zeros((len(y), 1)))
        stored = [s[side] if s else [] for s in (example.teacher_logps, example.behavior_logps)]
        p, b = (torch.tensor(values, dtype=torch.float64) for values in stored)
        ids, likely = torch.tensor(top[0]).long(), torch.tensor(top[1]).double().exp()
        sides.append(Side(q, torch.tensor(y), p, b, ids, likely, corrected and side == REJECTED))
    return sides


def softplus(x: Tensor) -> Tensor:
    """-log σ(-x)."""
    return torch.log(1 + torch.exp(x))


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * torch.log(p / q)).sum(-1)


def akl(side: Side) -> Tensor:
    rows = []
    for p, q in zip(*side.lumped(), strict=True):
        head = tail = reached = 0.0
        for k in range(K + 1):
            gap = abs(float(p[k] - q[k].detach()))
            head, tail = (head + gap, tail) if k < K and reached < 0.5 else (head, tail + gap)
            reached += float(p[k])
        rows.append((head * kl(p, q) + tail * kl(q, p)) / (head + tail))
    return torch.stack(rows)


def token_by_token(side: Side, beta: float) -> Tensor:
    rows = []
    for n, q in enumerate(side.q):
        stored = dict(zip(side.top_ids[n].tolist(), side.top_p[n].tolist(), strict=True))
        rest = (1 - sum(stored.values())) / (VOCABULARY - K)
        a_t, a_s = int(side.top_ids[n, 0]), int(q.argmax())
        rows.append(softplus(-beta * (q[a_t] - q[a_s] - math.log(stored[a_t] / stored.get(a_s, rest)))))
    return torch.stack(rows)


def minillm(side: Side) -> Tensor:
    log_q, (p, q) = side.log_q, side.lumped()
    rows = []
    for t in range(len(log_q)):
        ratio = torch.exp(log_q[t] - side.b[t]).clamp(max=1.2)
        later = (side.p - log_q.detach())[t + 1 :]
        rows.append(ratio.detach() * kl(q[t], p[t]) - (later.mean() if len(later) else 0.0) * ratio)
    return torch.stack(rows)


def skew(p: Tensor, q: Tensor, alpha: float) -> Tensor:
    """Mean over a response's tokens."""
    return kl(p, alpha * p + (1 - alpha) * q).mean()


def jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    mixture = beta * p + (1 - beta) * q
    return (beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)).mean()


def both(share: float, of_chosen: Tensor, of_rejected: Tensor) -> Tensor:
    return (1 - share) * of_chosen + share * of_rejected


def logratio(side: Side) -> Tensor:
    return (side.log_q - side.p).sum()


def mean_logratio(side: Side) -> Tensor:
    return (side.log_q - side.p).sum() / len(side.tokens)


FORMULAS: dict[str, Callable[[list[Side], TrainConfig], Tensor]] = {
    "dpkd": lambda s, c: softplus(-c.beta * (mean_logratio(s[0]) - mean_logratio(s[1]))),
    "dpkd-sum": lambda s, c: softplus(-c.beta * (logratio(s[0]) - logratio(s[1]))),
    "ipo": lambda s, c: (logratio(s[0]) - logratio(s[1]) - 1 / (2 * c.tau)) ** 2,
    "cpo": lambda s, c: softplus(-c.beta * (s[0].log_q.sum() - s[1].log_q.sum())) - s[0].log_q.sum(),
    "simpo": lambda s, c: softplus(c.gamma - c.beta * (s[0].log_q.mean() - s[1].log_q.mean())),
    "dpkd-token": lambda s, c: token_by_token(s[0], c.beta),
    "sft": lambda s, c: -s[0].log_q,
    "seqkd": lambda s, c: -s[0].log_q,
    "kd": lambda s, c: kl(*s[0].lumped()),
    "rkl": lambda s, c: kl(*s[0].lumped()[::-1]),
    "akl": lambda s, c: akl(s[0]),
    "minillm": lambda s, c: minillm(s[1]),
    "gkd": lambda s, c: both(c.student_share, *(jsd(*side.lumped(), c.jsd_beta) for side in s)),
    "skl": lambda s, c: both(c.student_share, *(skew(*side.lumped(), c.skew_alpha) for side in s)),
    "srkl": lambda s, c: both(c.student_share, *(skew(*side.lumped()[::-1], c.skew_alpha) for side in s)),
    "distillm-2": lambda s, c: both(
        c.student_share, skew(*s[0].lumped(), c.skew_alpha), skew(*s[1].lumped()[::-1], c.skew_alpha)
    ),
}


def reference(name: str, objective: str, examples: list[Example]) -> Result:
    model = model_of(name, 1, torch.float64)
    corrected, config = OBJECTIVES[objective].off_policy, config_of(objective)
    parts = [FORMULAS[objective](sides_of(model, e, corrected), config) for e in read_by(objective, examples)]
    loss = torch.cat([part.reshape(-1) for part in parts]).mean()
    loss.backward()
    return loss.item(), gradients_of(model)


@pytest.fixture(scope="module", params=MODELS)
def taught(request: pytest.FixtureRequest) -> tuple[str, list[Example]]:
    """A model's name, and examples whose teacher is another one of its kind."""
    return request.param, examples_of(model_of(request.param, 0), model_of(request.param, 1))


def assert_same(result: Result, expected: Result, tolerance: float) -> None:
    """The loss, relative to itself; gradients, relative to the largest of the model.

    Not to the largest of each tensor: that of a key's bias is zero but for rounding, softmax does not see it.
    """
    assert result[0] == pytest.approx(expected[0], rel=tolerance)
    assert result[1].keys() == expected[1].keys()
    largest = max(float(grad.abs().max()) for grad in expected[1].values())
    assert largest > 1e-3
    for name, grad in expected[1].items():
        assert float((result[1][name] - grad).abs().max()) <= tolerance * largest, name


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_both_layouts_equal_the_formula_in_float64(
    objective: str, dtype: torch.dtype, tolerance: float, taught: tuple[str, list[Example]]
) -> None:
    """Norms and rotations are float32 in a float64 model too, which is what its tolerance is for."""
    name, examples = taught
    expected = reference(name, objective, examples)
    shared = ours(model_of(name, 1, dtype), objective, examples, shares=True)
    padded = ours(model_of(name, 1, dtype), objective, examples, shares=False)
    assert_same(shared, expected, tolerance)
    assert_same(padded, expected, tolerance)
    assert_same(shared, padded, tolerance)


OWN_TEACHER = {
    "dpkd": math.log(2),
    "dpkd-sum": math.log(2),
    "ipo": 1 / (4 * SETTINGS["ipo"]["tau"] ** 2),
    "dpkd-token": math.log(2),
    "kd": 0.0,
    "rkl": 0.0,
    "akl": 0.0,
    "minillm": 0.0,
    "gkd": 0.0,
    "skl": 0.0,
    "srkl": 0.0,
    "distillm-2": 0.0,
}


@pytest.mark.parametrize("objective", OWN_TEACHER)
@pytest.mark.parametrize("name", MODELS)
def test_a_student_that_is_its_own_teacher(name: str, objective: str) -> None:
    examples = examples_of(model_of(name, 1), model_of(name, 1), drift=0.0)
    student = Student(model_of(name, 1))
    scored = score(student, OBJECTIVES[objective], examples, config_of(objective))
    losses = OBJECTIVES[objective].loss(scored)
    expected = torch.full_like(losses, OWN_TEACHER[objective])
    torch.testing.assert_close(losses.detach(), expected, rtol=1e-5, atol=2e-5)
    facts = {k: float(v) for k, v in {**facts_of(scored), **word_facts_of(scored)}.items()}
    zero = {"reward_chosen", "reward_rejected", "margin", "forward_kl", "reverse_kl", "clipped", "behavior_kl"}
    assert {key: value for key, value in facts.items() if key in zero} == pytest.approx(
        dict.fromkeys(facts.keys() & zero, 0.0), abs=2e-4
    )
    assert {facts[key] / len(losses) for key in ("argmax_same", "argmax_stored") if key in facts} <= {1.0}
    if objective == "minillm":
        assert facts["weight"] / len(losses) == pytest.approx(1.0, abs=1e-5)
    if objective not in ("dpkd", "dpkd-sum", "ipo"):  # those move even then, a half of the way
        losses.mean().backward()
        assert max(float(grad.abs().max()) for grad in gradients_of(student.model).values()) < 1e-4


@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        ("dpkd", {}),
        ("dpkd", {"off_policy": "none"}),
        ("dpkd", {"imported": True}),
        ("gkd", {}),
        ("kd", {}),
        ("minillm", {}),
        ("seqkd", {"stored": False}),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value) or "as it is",
)
def test_facts_of_examples_are_those_of_the_formulas(objective: str, changes: dict[str, Any]) -> None:
    """In float64, also where one y_s is imported, so that who sampled it is not known, or nothing is stored."""
    examples = examples_of(model_of("gpt2", 0), model_of("gpt2", 1), drift=1.5)
    if changes.get("imported"):
        examples[1] = replace(examples[1], behavior_logps=([], []))
    read = examples if changes.get("stored", True) else read_by("sft", examples)
    config = config_of(objective)
    if "off_policy" in changes:
        config = config.model_copy(update={"off_policy": changes["off_policy"]})
    model = model_of("gpt2", 1, torch.float64)
    scored = score(Student(copy.deepcopy(model)), OBJECTIVES[objective], read, config)

    with torch.no_grad():
        y_t, y_s = zip(*(sides_of(model, e, False) for e in examples), strict=True)
    of_sides = {"chosen": y_t, "rejected": y_s}
    if objective in ("kd", "seqkd"):
        del of_sides["rejected"]
    if objective == "minillm":
        del of_sides["chosen"]
    expected = {f"logps_{side}": sum(float(s.log_q.mean()) for s in of) for side, of in of_sides.items()}
    if changes.get("stored", True):
        rewards = {side: [config.beta * float(mean_logratio(s)) for s in of] for side, of in of_sides.items()}
        expected |= {f"reward_{side}": sum(values) for side, values in rewards.items()}
        if len(rewards) == 2:
            margins = [t - s for t, s in zip(rewards["chosen"], rewards["rejected"], strict=True)]
            expected |= {"margin": sum(margins), "accuracy": sum(margin > 0 for margin in margins)}
    if "rejected" in of_sides and "imported" not in changes:
        expected["drift"] = sum(float((s.b - s.log_q).mean()) for s in y_s)
        if objective == "dpkd" and "off_policy" not in changes:
            ratios = [torch.exp(s.log_q - s.b) for s in y_s]
            expected["weight"] = sum(float(r.clamp(max=5).mean()) for r in ratios)
            expected["clipped"] = sum(float((r > 5).double().mean()) for r in ratios)
            assert 0 < expected["clipped"]
    facts = {name: float(value) for name, value in facts_of(scored).items()}
    assert facts == pytest.approx(expected, rel=1e-9)
    if "margin" in facts:  # a tie is no win, and by a little is one
        assert float(facts_of(replace(scored, sums=scored.teacher_sums))["accuracy"]) == 0
        by_a_little = scored.teacher_sums + torch.tensor([0.01, 0.0])
        assert float(facts_of(replace(scored, sums=by_a_little))["accuracy"]) == len(examples)


def test_facts_of_tokens_are_those_of_the_formulas() -> None:
    name = "gpt2"
    examples = examples_of(model_of(name, 0), model_of(name, 1))
    model = model_of(name, 1, torch.float64)
    student = Student(copy.deepcopy(model))
    with torch.no_grad():
        sides = [sides_of(model, e, False) for e in examples]
        whose = {"kd": [CHOSEN], "minillm": [REJECTED], "dpkd-token": [CHOSEN], "gkd": [CHOSEN, REJECTED]}
        for objective, which in whose.items():
            scored = score(student, OBJECTIVES[objective], examples, config_of(objective))
            facts = word_facts_of(scored)
            read = [of_pair[side] for of_pair in sides for side in which]
            expected = {
                "forward_kl": sum(float(kl(*s.lumped()).sum()) for s in read),
                "reverse_kl": sum(float(kl(*s.lumped()[::-1]).sum()) for s in read),
            }
            if objective == "minillm":
                ratios = torch.cat([torch.exp(s.log_q - s.b) for s in read])
                expected["weight"] = float(ratios.clamp(max=1.2).sum())
                expected["clipped"] = float((ratios > 1.2).sum())
                expected["behavior_kl"] = -float(ratios.log().sum())
                assert 0 < expected["clipped"] < len(ratios)
            if objective == "dpkd-token":
                is_best = torch.cat([s.top_ids == s.q.argmax(-1, keepdim=True) for s in read])
                expected["argmax_same"] = float(is_best[:, 0].sum())
                expected["argmax_stored"] = float(is_best.sum())
            assert facts == pytest.approx(expected, rel=1e-9), objective
            torch.testing.assert_close(scored.top_masses(), torch.cat([s.top_p.sum(-1) for s in read]))
            accepted = torch.cat([torch.minimum(*s.lumped()).sum(-1) for s in read])
            torch.testing.assert_close(scored.acceptances(), accepted)


# --- The registry ---


def read_by_equation(name: str) -> set[str]:
    parameters = signature(getattr(equations, OBJECTIVES[name].equation)).parameters
    return {n for n, p in parameters.items() if p.default is Parameter.empty} - OBJECTIVES[name].settings.keys()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_entry_agrees_with_its_equation(name: str) -> None:
    objective, read = OBJECTIVES[name], read_by_equation(name)
    assert read <= TENSORS.keys()
    of_top_k = {"student_top_logps", "teacher_top_logps", "reverse_kls", "teacher_logps_of_teacher_token"}
    assert objective.top_k == bool(read & of_top_k)
    assert objective.best == ("student_logps_of_student_token" in read)
    assert objective.behavior == ("behavior_logps" in read)
    assert (objective.per == "pair") == (objective.sides == (CHOSEN, REJECTED))
    assert ("student_rejected_logps" in read) == (objective.per == "pair" and not objective.top_k)
    parameters = signature(getattr(equations, objective.equation)).parameters
    used = {n for n, p in parameters.items() if p.default is Parameter.empty} - TENSORS.keys()
    assert used == objective.settings.keys() - {"off_policy", "chosen_nll_weight"}
    assert objective.help.endswith(".") and objective.source


def test_the_responses_of_the_teacher_alone_are_other_data() -> None:
    assert objective_of(config_of("seqkd")) == OBJECTIVES["seqkd"]
    alone = config_of("seqkd").model_copy(update={"responses": "teacher"})
    assert objective_of(alone) == replace(OBJECTIVES["seqkd"], data="responses")


def test_an_objective_is_an_equation_and_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one adds for an objective of pairs: nothing else is to be touched."""

    def hinge_loss(student_chosen_logps: Tensor, student_rejected_logps: Tensor, gamma: float) -> Tensor:
        return (gamma - student_chosen_logps + student_rejected_logps).clamp(min=0)

    monkeypatch.setattr(equations, "hinge_loss", hinge_loss, raising=False)
    entry = replace(OBJECTIVES["simpo"], name="hinge", equation="hinge_loss", settings={"gamma": 0.5})
    examples = examples_of(model_of("llama", 0), model_of("llama", 1))
    scored = score(Student(model_of("llama", 1)), entry, examples, config_of("simpo"))
    expected = hinge_loss(*scored.sums.unbind(1), gamma=0.4)
    torch.testing.assert_close(entry.loss(scored), expected)


def test_the_registry_imports_no_torch() -> None:
    code = f"import sys, {registry.__name__}; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False False\n"
