"""The equations against formulas written again from the papers, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.fake_device import DEVICE, FakeDevice
from torch import Tensor

from dpkd_offline.training import losses
from dpkd_offline.training.losses import dpkd_loss, implicit_reward, lm_loss

BETA = 0.3


def random_pairs(seed: int, count: int = 64) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    lengths = {name: random.integers(1, 200, count).astype(float) for name in ("t", "s")}
    logps = {f"{model}_{side}": -random.gamma(2.0, 1.5, count) * lengths[side] for model in "qp" for side in "ts"}
    return {**logps, "len_t": lengths["t"], "len_s": lengths["s"]}


def written_formula(x: dict[str, np.ndarray]) -> np.ndarray:
    """Eq. 9, term by term: -log sigmoid(h) as log(1 + exp(-h))."""
    h = BETA / x["len_t"] * (x["q_t"] - x["p_t"]) - BETA / x["len_s"] * (x["q_s"] - x["p_s"])
    return np.logaddexp(0.0, -h)


def written_gradient(x: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Eq. 11 of eq. 9 by hand: the weight is the probability of preferring the wrong response."""
    h = BETA / x["len_t"] * (x["q_t"] - x["p_t"]) - BETA / x["len_s"] * (x["q_s"] - x["p_s"])
    weight = 1.0 / (1.0 + np.exp(h))
    return -weight * BETA / x["len_t"], weight * BETA / x["len_s"]


def ours(x: dict[str, np.ndarray], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    t = {name: torch.tensor(value, dtype=dtype) for name, value in x.items()}
    q_t, q_s = t["q_t"].requires_grad_(), t["q_s"].requires_grad_()
    return dpkd_loss(q_t, q_s, t["p_t"], t["p_s"], t["len_t"], t["len_s"], BETA), q_t, q_s


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_dpkd_equals_the_written_formula_and_its_gradient(seed: int, dtype: torch.dtype, tolerance: float) -> None:
    x = random_pairs(seed)
    losses, q_t, q_s = ours(x, dtype)
    losses.sum().backward()
    np.testing.assert_allclose(losses.detach(), written_formula(x), rtol=tolerance, atol=tolerance)
    for actual, expected in zip((q_t.grad, q_s.grad), written_gradient(x), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def test_gradient_equals_autograd_of_the_formula_in_float64() -> None:
    x = random_pairs(9)
    losses, q_t, q_s = ours(x, torch.float64)
    actual = torch.autograd.grad(losses.sum(), (q_t, q_s))
    t = {name: torch.tensor(value) for name, value in x.items()}
    a, b = t["q_t"].requires_grad_(), t["q_s"].requires_grad_()
    h = BETA / t["len_t"] * (a - t["p_t"]) - BETA / t["len_s"] * (b - t["p_s"])
    expected = torch.autograd.grad(torch.log1p(torch.exp(-h)).sum(), (a, b))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_teacher_equal_to_student_gives_ln_2() -> None:
    x = random_pairs(3)
    x["q_t"], x["q_s"] = x["p_t"], x["p_s"]
    losses, _, _ = ours(x, torch.float64)
    np.testing.assert_allclose(losses.detach(), math.log(2.0), rtol=1e-15)


def test_a_better_chosen_response_lowers_the_loss() -> None:
    x = random_pairs(4)
    before, _, _ = ours(x, torch.float64)
    after, _, _ = ours({**x, "q_t": x["q_t"] + 1.0}, torch.float64)
    assert (after < before).all()


def test_rewards_are_those_of_eq_29_by_length() -> None:
    x = random_pairs(5)
    t = {name: torch.tensor(value) for name, value in x.items()}
    actual = implicit_reward(t["q_t"], t["p_t"], t["len_t"], BETA)
    np.testing.assert_allclose(actual, BETA * (x["q_t"] - x["p_t"]) / x["len_t"], rtol=1e-12)


def test_lm_loss_is_the_mean_negative_log_prob() -> None:
    logps = torch.tensor([-1.0, -2.0, -6.0])
    assert lm_loss(logps).item() == pytest.approx(3.0)


# --- The other objectives of pairs: name, columns, settings, formula ---


def minus_log_sigmoid(x: Tensor) -> Tensor:
    return torch.logaddexp(torch.zeros_like(x), -x)


TAU, GAMMA = 0.2, 0.7
FOUR, SIX = ("q_t", "q_s", "p_t", "p_s"), ("q_t", "q_s", "p_t", "p_s", "len_t", "len_s")
PAIR_OBJECTIVES: dict[str, tuple[tuple[str, ...], dict[str, float], Callable[..., Tensor]]] = {
    "dpkd_loss": (
        SIX,
        {"beta": BETA},
        lambda a, b, c, d, m, n: minus_log_sigmoid(BETA / m * (a - c) - BETA / n * (b - d)),
    ),
    "dpkd_sum_loss": (FOUR, {"beta": BETA}, lambda a, b, c, d: minus_log_sigmoid(BETA * (a - c) - BETA * (b - d))),
    "ipo_loss": (FOUR, {"tau": TAU}, lambda a, b, c, d: ((a - c) - (b - d) - 1 / (2 * TAU)) ** 2),
    "cpo_loss": (("q_t", "q_s"), {"beta": BETA}, lambda a, b: minus_log_sigmoid(BETA * a - BETA * b) - a),
    "simpo_loss": (
        ("q_t", "q_s", "len_t", "len_s"),
        {"beta": 2.5, "gamma": GAMMA},
        lambda a, b, m, n: minus_log_sigmoid(2.5 * a / m - 2.5 * b / n - GAMMA),
    ),
}


def close_pairs(seed: int, dtype: torch.dtype, count: int = 64) -> dict[str, Tensor]:
    """Pairs whose log-probs are near each other, where no sigmoid is saturated."""
    random = np.random.default_rng(seed)
    q_t = random.uniform(-40, -20, count)
    q_s = q_t + random.normal(0, 3, count)
    p_t, p_s = q_t + random.normal(0, 2, count), q_s + random.normal(0, 2, count)
    lengths = {"len_t": random.integers(5, 60, count), "len_s": random.integers(5, 60, count)}
    values = {"q_t": q_t, "q_s": q_s, "p_t": p_t, "p_s": p_s, **lengths}
    return {name: torch.tensor(value, dtype=dtype) for name, value in values.items()}


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within `tolerance` of the largest number there."""
    assert actual.shape == expected.shape
    assert (actual.double() - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])


@pytest.mark.parametrize("name", PAIR_OBJECTIVES)
@PRECISIONS
def test_objectives_of_pairs_equal_their_formulas_and_gradients(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    columns, settings, formula = PAIR_OBJECTIVES[name]
    x = close_pairs(7, dtype)
    exact = {column: value.double() for column, value in x.items()}
    for values in (x, exact):
        values["q_t"].requires_grad_()
        values["q_s"].requires_grad_()
    actual = getattr(losses, name)(*(x[column] for column in columns), **settings)
    expected = formula(*(exact[column] for column in columns))
    assert actual.dtype == dtype
    assert_near(actual.detach(), expected.detach(), tolerance)
    gradients = torch.autograd.grad(actual.sum(), (x["q_t"], x["q_s"]))
    expected_gradients = torch.autograd.grad(expected.sum(), (exact["q_t"], exact["q_s"]))
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert b.abs().max() > 1e-3
        assert_near(a, b, tolerance)


@pytest.mark.parametrize(
    ("name", "value"), [("dpkd_loss", math.log(2)), ("dpkd_sum_loss", math.log(2)), ("ipo_loss", 1 / (4 * TAU**2))]
)
@PRECISIONS
def test_objectives_of_pairs_where_teacher_and_student_agree(
    name: str, value: float, dtype: torch.dtype, tolerance: float
) -> None:
    columns, settings, _ = PAIR_OBJECTIVES[name]
    x = close_pairs(8, dtype)
    x["p_t"], x["p_s"] = x["q_t"], x["q_s"]
    actual = getattr(losses, name)(*(x[column] for column in columns), **settings)
    torch.testing.assert_close(actual, torch.full_like(actual, value), rtol=tolerance, atol=0.0)


def test_no_objective_of_pairs_overflows_in_float32() -> None:
    far = {"q_t": -9000.0, "q_s": -3.0, "p_t": -5.0, "p_s": -8000.0, "len_t": 2.0, "len_s": 1.0}
    x = {name: torch.tensor([value], requires_grad=True) for name, value in far.items()}
    for name, (columns, settings, _) in PAIR_OBJECTIVES.items():
        loss = getattr(losses, name)(*(x[column] for column in columns), **settings)
        gradients = torch.autograd.grad(loss, [x["q_t"], x["q_s"]])
        assert all(torch.isfinite(value).all() for value in (loss, *gradients)), name


# --- Divergences over the stored top tokens, against softmaxes over the whole vocabulary ---

VOCABULARY, TOP, TOKENS = 40, 6, 32
KL = Callable[[Tensor, Tensor], Tensor]


def random_logits(seed: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Student's and teacher's [N, V], float64."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, TOKENS, VOCABULARY, generator=generator, dtype=torch.float64) * scale
    return student, teacher


def top_of(student: Tensor, teacher: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a training step has: the student's and the teacher's log-probs [N, K], and the ids."""
    top = teacher.log_softmax(-1).topk(k)
    return student.log_softmax(-1).gather(-1, top.indices), top.values, top.indices


def lumped(logits: Tensor, ids: Tensor) -> Tensor:
    """Probabilities [N, K + 1], the last that of all other tokens, summed one by one."""
    others = torch.ones_like(logits).scatter(-1, ids, 0.0)
    probs = logits.softmax(-1)
    return torch.cat((probs.gather(-1, ids), (probs * others).sum(-1, keepdim=True)), -1)


def written_kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def written_akl(p: Tensor, q: Tensor, mu: float) -> Tensor:
    """Position by position and token by token."""
    rows = []
    for p_row, q_row in zip(p, q, strict=True):
        head = tail = reached = 0.0
        for k in range(len(p_row)):
            gap = abs(p_row[k].item() - q_row[k].item())
            if reached < mu and k < len(p_row) - 1:
                head += gap
            else:
                tail += gap
            reached += p_row[k].item()
        forward, reverse = written_kl(p_row, q_row), written_kl(q_row, p_row)
        rows.append(head / (head + tail) * forward + tail / (head + tail) * reverse)
    return torch.stack(rows)


def written_skew(p: Tensor, q: Tensor, alpha: float) -> Tensor:
    """KL of the first from a mixture with `alpha` of itself."""
    return written_kl(p, alpha * p + (1 - alpha) * q)


def written_jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """By entropies: H(βp + (1 - β)q) - β H(p) - (1 - β) H(q)."""
    entropy, mixture, reverse_entropy = (
        -(x * x.clamp(min=1e-300).log()).sum(-1) for x in (p, beta * p + (1 - beta) * q, q)
    )
    return mixture - beta * entropy - (1 - beta) * reverse_entropy


DIVERGENCES: dict[str, tuple[KL, KL]] = {
    "forward": (losses.forward_kl, written_kl),
    "reverse": (losses.reverse_kl, lambda p, q: written_kl(q, p)),
    "adaptive": (losses.adaptive_kl, lambda p, q: written_akl(p, q, 0.5)),
    "adaptive 0.9": (lambda q, p: losses.adaptive_kl(q, p, mu=0.9), lambda p, q: written_akl(p, q, 0.9)),
    "skew": (lambda q, p: losses.skew_kl(q, p, 0.1), lambda p, q: written_skew(p, q, 0.1)),
    "skew 0": (lambda q, p: losses.skew_kl(q, p, 0.0), written_kl),
    "skew reverse": (lambda q, p: losses.skew_reverse_kl(q, p, 0.1), lambda p, q: written_skew(q, p, 0.1)),
    "skew reverse 0": (lambda q, p: losses.skew_reverse_kl(q, p, 0.0), lambda p, q: written_kl(q, p)),
    "jensen-shannon": (lambda q, p: losses.jensen_shannon(q, p, 0.5), lambda p, q: written_jsd(p, q, 0.5)),
    "jensen-shannon 0.1": (lambda q, p: losses.jensen_shannon(q, p, 0.1), lambda p, q: written_jsd(p, q, 0.1)),
}
WHOLE: dict[str, KL] = {  # over the whole vocabulary, of log-probs q and p, by torch
    "forward": lambda q, p: by_torch(q, p),
    "reverse": lambda q, p: by_torch(p, q),
    "skew": lambda q, p: by_torch((0.1 * p.exp() + 0.9 * q.exp()).log(), p),
    "skew reverse": lambda q, p: by_torch((0.1 * q.exp() + 0.9 * p.exp()).log(), q),
    "jensen-shannon 0.1": lambda q, p: (
        0.1 * by_torch((0.1 * p.exp() + 0.9 * q.exp()).log(), p)
        + 0.9 * by_torch((0.1 * p.exp() + 0.9 * q.exp()).log(), q)
    ),
}


def by_torch(q: Tensor, p: Tensor) -> Tensor:
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_divergences_equal_those_of_the_whole_vocabulary_with_its_tail_as_one(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    divergence, written = DIVERGENCES[name]
    student, teacher = random_logits(11)
    logits = student.to(dtype).requires_grad_()
    student_top, teacher_top, ids = top_of(logits, teacher.to(dtype), TOP)
    actual = divergence(student_top, teacher_top)
    student = logits.detach().double().requires_grad_()
    expected = written(lumped(teacher.to(dtype).double(), ids), lumped(student, ids))
    assert actual.dtype == dtype
    assert_near(actual.detach(), expected.detach(), tolerance)
    gradient, expected_gradient = (
        torch.autograd.grad(actual.sum(), logits),
        torch.autograd.grad(expected.sum(), student),
    )
    assert expected_gradient[0].abs().max() > 0.01
    assert_near(gradient[0], expected_gradient[0], tolerance)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_divergences_over_all_tokens_equal_torch(name: str, dtype: torch.dtype, tolerance: float) -> None:
    student, teacher = (logits.to(dtype) for logits in random_logits(12))
    student.requires_grad_()
    student_top, teacher_top, _ = top_of(student, teacher, VOCABULARY)
    actual = DIVERGENCES[name][0](student_top, teacher_top)
    exact = student.detach().double().requires_grad_()
    expected = WHOLE[name](exact.log_softmax(-1), teacher.double().log_softmax(-1))
    assert_near(actual.detach(), expected.detach(), tolerance)
    gradients = torch.autograd.grad(actual.sum(), student)[0], torch.autograd.grad(expected.sum(), exact)[0]
    assert_near(*gradients, tolerance)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("k", [1, TOP, VOCABULARY])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_divergences_are_0_where_teacher_and_student_agree(name: str, k: int, dtype: torch.dtype) -> None:
    """Exactly, but for those from a mixture, whose log is rounded."""
    _, teacher = random_logits(13)
    logits = teacher.to(dtype).requires_grad_()
    student_top, teacher_top, _ = top_of(logits, logits, k)
    actual = DIVERGENCES[name][0](student_top, teacher_top.detach())
    mixed = name.startswith(("skew", "jensen")) and not name.endswith(" 0")
    assert actual.abs().max() <= (8 * torch.finfo(dtype).eps if mixed else 0.0)
    assert torch.autograd.grad(actual.sum(), logits)[0].abs().max() < 1e-5


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("scale", [30.0, 300.0])
@pytest.mark.parametrize("k", [1, TOP, VOCABULARY])
def test_divergences_are_finite_where_nothing_is_left_for_the_other_tokens(name: str, scale: float, k: int) -> None:
    student, teacher = (logits.float() for logits in random_logits(14, scale))
    student.requires_grad_()
    for pair in ((student, teacher), (student, teacher / scale), (student / scale, teacher)):
        student_top, teacher_top, _ = top_of(*pair, k)
        for drift in (-1e-6, 0.0, 1e-6):  # a mass of a little more than 1, as rounding makes it
            actual = DIVERGENCES[name][0](student_top, teacher_top + drift)
            assert torch.isfinite(actual).all()
            assert (actual > -1e-4).all()
            assert torch.isfinite(torch.autograd.grad(actual.sum(), student, retain_graph=True)[0]).all()


def test_with_the_tail_as_one_two_models_are_no_farther_apart_than_over_the_whole_vocabulary() -> None:
    student, teacher = random_logits(15)
    whole = torch.minimum(student.softmax(-1), teacher.softmax(-1)).sum(-1)
    zero = torch.zeros(TOKENS, dtype=torch.float64)
    last = [zero, zero, zero - 1, zero, zero, zero]
    for k in (1, 3, TOP, 20, VOCABULARY):
        top = top_of(student, teacher, k)[:2]
        actual = [losses.forward_kl(*top), losses.reverse_kl(*top), -losses.acceptance(*top)]
        actual += [DIVERGENCES[name][0](*top) for name in ("skew", "skew reverse", "jensen-shannon 0.1")]
        for values, before in zip(actual, last, strict=True):
            assert (values >= before - 1e-12).all()
        last = actual
    assert_near(-last[2], whole, 1e-12)


def test_the_head_of_akl_ends_with_the_token_that_brings_it_to_mu() -> None:
    """Exactly to it: one half and one half of that are sums without rounding."""
    p = torch.tensor([[0.5, 0.25, 0.125]], dtype=torch.float64)
    q = torch.tensor([[0.25, 0.125, 0.5]], dtype=torch.float64)
    p, q = p.log(), q.log()
    assert (p.exp().cumsum(-1) == torch.tensor([[0.5, 0.75, 0.875]])).all()
    forward, reverse = losses.forward_kl(q, p), losses.reverse_kl(q, p)
    for mu, head in ((0.5, 0.25), (0.75, 0.375)):  # |p - q| is 1/4, 1/8, 3/8 and, of all others, 0
        share = head / 0.75
        assert_near(losses.adaptive_kl(q, p, mu), share * forward + (1 - share) * reverse, 1e-12)


def test_jensen_shannon_goes_to_either_kl() -> None:
    """The limits of the paper: D/β to KL(p‖q) as β goes to 0, and D/(1 - β) to KL(q‖p) as it goes to 1."""
    student, teacher = random_logits(19, 1.0)
    top = top_of(student, teacher, VOCABULARY)[:2]
    assert_near(losses.jensen_shannon(*top, 1e-6) / 1e-6, losses.forward_kl(*top), 1e-4)
    assert_near(losses.jensen_shannon(*top, 1 - 1e-6) / 1e-6, losses.reverse_kl(*top), 1e-4)


def test_divergences_from_a_mixture_have_the_bounds_that_they_are_chosen_for() -> None:
    student, teacher = random_logits(20, 60.0)
    top = top_of(student, teacher, VOCABULARY)[:2]
    assert losses.forward_kl(*top).max() > 50 and losses.reverse_kl(*top).max() > 30  # the rest ends those
    for skewed in (losses.skew_kl(*top, 0.1), losses.skew_reverse_kl(*top, 0.1)):
        assert 1.0 < skewed.max() <= math.log(10) + 1e-9
    for beta in (0.1, 0.5, 0.9):
        entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert 0.3 * entropy < losses.jensen_shannon(*top, beta).max() <= entropy + 1e-9 <= math.log(2) + 1e-8


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_losses_of_both_responses_are_means_of_each_weighed_by_the_share(share: float) -> None:
    """Response by response, in a Python loop; what belongs to y_s must not reach y_t."""
    student, teacher = random_logits(21)
    student.requires_grad_()
    q, p, _ = top_of(student, teacher, TOP)
    lengths = torch.tensor([3, 9, 1, 1, 12, 6])
    assert lengths.sum() == TOKENS
    both = {
        "gkd_loss": (DIVERGENCES["jensen-shannon 0.1"], DIVERGENCES["jensen-shannon 0.1"], 0.1),
        "skew_kl_loss": (DIVERGENCES["skew"], DIVERGENCES["skew"], 0.1),
        "skew_reverse_kl_loss": (DIVERGENCES["skew reverse"], DIVERGENCES["skew reverse"], 0.1),
        "distillm_2_loss": (DIVERGENCES["skew"], DIVERGENCES["skew reverse"], 0.1),
    }
    for name, (of_chosen, of_rejected, setting) in both.items():
        actual = getattr(losses, name)(q, p, lengths, setting, share)
        parts = list(zip(q.split(lengths.tolist()), p.split(lengths.tolist()), strict=True))
        expected = torch.stack(
            [
                (1 - share) * of_chosen[0](*chosen).mean() + share * of_rejected[0](*rejected).mean()
                for chosen, rejected in zip(parts[0::2], parts[1::2], strict=True)
            ]
        )
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (actual, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
        rows = gradients[0].abs().sum(-1).split(lengths.tolist())
        assert [bool(row.max() > 0) for row in rows] == [share < 1, share > 0] * 3, name


# --- The authors' code: the argmax tokens of a position ---


@PRECISIONS
def test_token_loss_equals_its_formula_and_gradient(dtype: torch.dtype, tolerance: float) -> None:
    student, teacher = (logits.to(dtype) for logits in random_logits(16))
    student.requires_grad_()
    exact = student.detach().double().requires_grad_()
    places = torch.stack((teacher.argmax(-1), student.argmax(-1)), -1)  # a_t, a_s
    (q_t, q_s), (p_t, p_s) = (logits.log_softmax(-1).gather(-1, places).T for logits in (student, teacher))
    actual = losses.dpkd_token_loss(q_t, q_s, p_t, p_s, BETA)
    q, p = (logits.softmax(-1).gather(-1, places) for logits in (exact, teacher.double()))
    expected = torch.log1p(torch.exp(-BETA * torch.log(q[:, 0] / q[:, 1] / (p[:, 0] / p[:, 1]))))
    assert_near(actual.detach(), expected.detach(), tolerance)
    gradients = torch.autograd.grad(actual.sum(), student)[0], torch.autograd.grad(expected.sum(), exact)[0]
    assert gradients[1].abs().max() > 1e-3
    assert_near(*gradients, tolerance)


def test_token_loss_is_ln_2_where_teacher_and_student_agree() -> None:
    a, b = torch.randn(2, TOKENS, generator=torch.Generator().manual_seed(17)) - 4
    torch.testing.assert_close(losses.dpkd_token_loss(a, b, a, b, BETA), torch.full((TOKENS,), math.log(2)))


@pytest.mark.parametrize("k", [1, TOP, VOCABULARY])
def test_log_probs_from_the_top_are_the_stored_ones_or_an_even_part_of_the_rest(k: int) -> None:
    _, teacher = random_logits(18)
    _, top_logps, top_ids = top_of(teacher, teacher, k)
    for token in range(VOCABULARY):
        actual = losses.logps_from_top(torch.full((TOKENS,), token), top_ids, top_logps, VOCABULARY)
        for n in range(TOKENS):
            stored = dict(zip(top_ids[n].tolist(), top_logps[n].tolist(), strict=True))
            rest = 1 - sum(map(math.exp, stored.values()))
            expected = stored[token] if token in stored else math.log(rest / (VOCABULARY - k))
            assert actual[n].item() == pytest.approx(expected, rel=1e-9)
        assert actual.dtype == top_logps.dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_token_that_alone_is_not_stored_has_all_that_is_left(dtype: torch.dtype) -> None:
    top_logps = torch.tensor([[0.5, 0.25]], dtype=dtype).log()
    actual = losses.logps_from_top(torch.tensor([2]), torch.tensor([[0, 1]]), top_logps, 3)
    assert actual.dtype == dtype
    assert_near(actual, torch.tensor([0.25], dtype=torch.float64).log(), 1e-6)


# --- On a device, for which nothing waits ---

BY_TOKEN: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {  # of q and p [N, K], and lengths
    "gkd": lambda q, p, lengths: losses.gkd_loss(q, p, lengths, 0.3, 0.4),
    "skl": lambda q, p, lengths: losses.skew_kl_loss(q, p, lengths, 0.1, 0.4),
    "distillm-2": lambda q, p, lengths: losses.distillm_2_loss(q, p, lengths, 0.1, 0.4),
    "minillm": lambda q, p, lengths: losses.minillm_loss(q[:, 0], q[:, 1], p[:, 0], losses.reverse_kl(q, p), lengths),
    "akl": lambda q, p, _: losses.adaptive_kl(q, p),
    "dpkd-token": lambda q, p, _: losses.logps_from_top(torch.full_like(q[:, 0], 3).long(), q.argsort(), p, VOCABULARY),
}


@pytest.mark.parametrize("name", BY_TOKEN)
def test_losses_of_tokens_stay_on_their_device_and_wait_for_nothing(name: str) -> None:
    student, teacher = random_logits(22)
    q, p, _ = top_of(student, teacher, TOP)
    lengths = torch.tensor([3, 9, 1, 1, 12, 6])
    expected = BY_TOKEN[name](q, p, lengths)
    with FakeDevice() as device:
        there = [tensor.to(DEVICE) for tensor in (q, p, lengths)]
        device.crossed.clear()
        actual = BY_TOKEN[name](*there)
        assert +device.crossed == {}
        torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=0)
