"""Log-probs by chunks of response positions against the full log-softmax of the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import FAMILIES, OTHERS, SMALL
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

import dpkd_offline.models.logprobs
import dpkd_offline.models.shared_prompt
from dpkd_offline.common.errors import UnavailableError
from dpkd_offline.models.batch import response_batch, shared_prompt_batch
from dpkd_offline.models.head import Transform, head_of
from dpkd_offline.models.loading import load_model
from dpkd_offline.models.logprobs import (
    ChunkedLogps,
    KeptLogps,
    likeliest,
    logps_of,
    response_hidden,
    response_logps,
    token_logps,
    top_logps,
)
from dpkd_offline.models.shared_prompt import SHARED_PROMPT, pack
from dpkd_offline.models.trial import check_model, row_layout

SHAPE = {**SMALL, "num_key_value_heads": 1, "intermediate_size": 64}
CHANGED: dict[str, PreTrainedConfig] = {  # what they do to the product of hidden states and head
    "cohere": CohereConfig(**SHAPE, logit_scale=0.25),
    "granite": GraniteConfig(**SHAPE, logits_scaling=4.0),
    "gemma2": Gemma2Config(**SHAPE, final_logit_softcapping=3.0),
    "phi": PhiConfig(**SHAPE),  # a bias
}
ITEMS = [([7, 8, 9], [10, 11, 12, 1]), ([5], [6]), (list(range(20, 60)), list(range(100, 125))), ([9, 9], [9, 1])]


def full_logps(model: torch.nn.Module, prompt: list[int], response: list[int]) -> Tensor:
    """One sequence at a time, without padding, all logits, float64 reduction."""
    ids = torch.tensor([[*prompt, *response]])
    logps = model(input_ids=ids).logits.double().log_softmax(-1)
    return torch.stack([logps[0, len(prompt) - 1 + n, token] for n, token in enumerate(response)])


@pytest.mark.parametrize("family", FAMILIES)
def test_logps_equal_the_full_log_softmax(family: str, teachers: dict[str, Path]) -> None:
    model = load_model(str(teachers[family]), "float32")
    with torch.no_grad():
        scored = response_logps(model, response_batch(ITEMS))
        for logps, (prompt, response) in zip(scored, ITEMS, strict=True):
            torch.testing.assert_close(
                torch.tensor(logps).double(), full_logps(model, prompt, response), rtol=0, atol=2e-5
            )


@pytest.mark.parametrize("family", [*FAMILIES, *CHANGED])
def test_gradients_equal_those_of_the_full_log_softmax(
    family: str, teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpkd_offline.models.logprobs, "TOKENS", 7)
    model = small_model(family, teachers, "float64")
    weights = torch.linspace(-1, 2, len(ITEMS), dtype=torch.float64)
    batch = response_batch(ITEMS)
    (batch.sum_by_response(token_logps(model, batch)) * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    largest = max(grad.abs().max().item() for grad in gradients.values())
    model.zero_grad()
    sum(w * full_logps(model, *item).sum() for w, item in zip(weights, ITEMS, strict=True)).backward()
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            # Some of them normalise in float32 in any model.
            near = {"rtol": 1e-6, "atol": 1e-9} if family in FAMILIES else {"rtol": 1e-4, "atol": 1e-5 * largest}
            torch.testing.assert_close(gradients[name], parameter.grad, **near, msg=name)


def test_logits_that_are_kept_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 16, generator=generator).bfloat16().requires_grad_() for n in (150, 40))
    ids = torch.randint(40, (150, 2), generator=generator)
    monkeypatch.setattr(dpkd_offline.models.logprobs, "TOKENS", 100)
    monkeypatch.setattr(dpkd_offline.models.logprobs, "WIDTH", 32)
    results = []
    for most, saved in ((0, 0), (150 * 40 * 2 - 1, 0), (150 * 40 * 2, 4)):
        monkeypatch.setattr(dpkd_offline.models.logprobs, "KEPT", most)
        logps: Tensor = ChunkedLogps.apply(hidden, head, ids)  # type: ignore[no-untyped-call]
        assert logps.grad_fn is not None and len(logps.grad_fn.saved_tensors) == 5 + saved
        results.append((logps, *torch.autograd.grad(logps.square().sum(), (hidden, head))))
    for made_again, again, kept in zip(*results, strict=True):
        assert torch.equal(made_again, again) and torch.equal(made_again, kept)


SHARED = [
    ([7, 8, 9], [[10, 11, 12, 1], [5, 6]]),
    ([5], [[6], [6, 7, 8]]),
    (list(range(20, 60)), [list(range(100, 125)), list(range(200, 230)), [9, 1]]),
]


def small_model(name: str, teachers: dict[str, Path], dtype: str) -> PreTrainedModel:
    if name in teachers:
        return load_model(str(teachers[name]), dtype)
    torch.manual_seed(0)
    config = copy.deepcopy({**OTHERS, **CHANGED}[name])
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(6.0)
            elif key.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    assert isinstance(model, PreTrainedModel)
    return model


def assert_same(expected: tuple[Tensor, dict[str, Tensor]], actual: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Log-probs and gradients."""
    (logps, grads), (actual_logps, actual_grads) = expected, actual
    # Norms and rotations are float32 in any model; and the gradient of a key's bias is zero but for rounding.
    torch.testing.assert_close(actual_logps, logps, rtol=1e-5, atol=1e-5)
    largest = max(grad.abs().max().item() for grad in grads.values())
    assert actual_grads.keys() == grads.keys()
    for key, grad in grads.items():
        torch.testing.assert_close(actual_grads[key], grad, rtol=1e-5, atol=1e-6 * largest, msg=key)


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_a_shared_prompt_changes_neither_log_probs_nor_gradients(name: str, teachers: dict[str, Path]) -> None:
    model = small_model(name, teachers, "float64")
    padded = response_batch([(prompt, y) for prompt, responses in SHARED for y in responses])
    weights = torch.linspace(-1, 2, len(padded.lengths), dtype=torch.float64)
    results = []
    for batch in (padded, shared_prompt_batch(SHARED)):
        if batch.segments is not None:
            assert row_layout(model) == "shared"
            model.set_attn_implementation(SHARED_PROMPT)
        logps = token_logps(model, batch)
        (batch.sum_by_response(logps) * weights).sum().backward()
        grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        results.append((logps.detach(), grads))
        model.zero_grad()
    assert_same(*results)


def plain_varlen(
    query: Tensor,  # [T, H, D]
    key: Tensor,  # [U, K, D]
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    most_queries: int,
    most_keys: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What torch says that its kernel of this name computes, sequence by sequence."""
    assert enable_gqa and query_ends.dtype == key_ends.dtype == torch.int32
    assert window_size[0] >= -1 and window_size[1] == 0  # -1: without a bound
    assert most_queries == int(query_ends.diff().max()) and most_keys == int(key_ends.diff().max())
    parts = []
    for (start, end), (first, last) in zip(query_ends.unfold(0, 2, 1), key_ends.unfold(0, 2, 1), strict=True):
        own, before = query[start:end].transpose(0, 1), int(last - first) - int(end - start)
        keys, values = (
            t[first:last].transpose(0, 1).repeat_interleave(len(own) // t.shape[1], dim=0) for t in (key, value)
        )
        age = before + torch.arange(own.shape[1])[:, None] - torch.arange(keys.shape[1])[None, :]
        seen = (age >= 0) & ((window_size[0] < 0) | (age <= window_size[0]))
        scores = (own @ keys.mT * scale).masked_fill(~seen, -torch.inf)
        parts.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_what_a_gpu_is_handed_changes_neither_log_probs_nor_gradients(
    name: str, teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's part done by plain products."""
    monkeypatch.setattr(dpkd_offline.models.shared_prompt, "varlen_attn", plain_varlen)
    monkeypatch.setattr(dpkd_offline.models.shared_prompt, "HALF", (torch.float64,))
    model = small_model(name, teachers, "float64")
    padded, shared = response_batch([(x, y) for x, both in SHARED for y in both]), shared_prompt_batch(SHARED)
    assert isinstance(shared.segments, torch.Tensor)
    row = pack(shared.segments, shared.input_ids.shape[1])
    results = []
    for batch in (padded, replace(shared, segments=row)):
        model.set_attn_implementation(SHARED_PROMPT if batch is not padded else "sdpa")
        logps = token_logps(model, batch)
        logps.sum().backward()
        results.append((logps.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad()
    assert_same(*results)


def test_a_model_with_an_attention_of_its_own_does_not_share_prompts(teachers: dict[str, Path]) -> None:
    model = load_model(str(teachers["llama"]), "float32")
    exchange = model.set_attn_implementation
    model.set_attn_implementation = lambda name: None if name == SHARED_PROMPT else exchange(name)  # type: ignore[method-assign]
    assert row_layout(model) == "padded"
    torch.testing.assert_close(
        torch.tensor(response_logps(model, response_batch(ITEMS[:1]))[0]).double(),
        full_logps(model, *ITEMS[0]),
        rtol=0,
        atol=2e-5,
    )


def test_scores_that_a_model_caps_do_not_share_prompts() -> None:
    config = Gemma2Config(**SMALL, num_key_value_heads=1, intermediate_size=64, final_logit_softcapping=None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert row_layout(model) == "padded"


@pytest.mark.parametrize("family", [*FAMILIES, *CHANGED])
def test_the_likeliest_tokens_are_those_of_the_full_log_softmax(
    family: str, teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpkd_offline.models.logprobs, "CHUNK", 7)
    model = small_model(family, teachers, "float32")
    batch = response_batch(ITEMS)
    with torch.no_grad():
        logps, ids, top = top_logps(model, batch, 5)
        expected = [
            model(input_ids=torch.tensor([[*prompt, *y]])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            for prompt, y in ITEMS
        ]
    values, order = torch.cat(expected).topk(5)
    assert ids.tolist() == order.tolist()
    torch.testing.assert_close(top.double(), values.double(), rtol=0, atol=2e-5)
    torch.testing.assert_close(logps, token_logps(model, batch).detach(), rtol=0, atol=1e-5)
    assert likeliest(model, response_hidden(model, batch)).tolist() == ids[:, 0].tolist()


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_the_chunked_backward_is_exact(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpkd_offline.models.logprobs, "TOKENS", chunk)
    monkeypatch.setattr(dpkd_offline.models.logprobs, "WIDTH", chunk + 1)
    torch.manual_seed(0)
    hidden, head = torch.randn(10, 4, dtype=torch.float64), torch.randn(12, 4, dtype=torch.float64)
    bias, ids = torch.randn(12, dtype=torch.float64), torch.randint(0, 12, (10, 3))
    inputs = (hidden.requires_grad_(), head.requires_grad_(), bias.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w, _: ChunkedLogps.apply(h, w, ids), inputs)
    for transform in (Transform(), Transform(0.5), Transform(cap=2.0), Transform(3.0, 1.5)):
        logits = transform.scale * (hidden @ head.T + bias)
        logits = logits if transform.cap is None else transform.cap * torch.tanh(logits / transform.cap)
        chunked = ChunkedLogps.apply(hidden, head, ids, bias, transform)
        torch.testing.assert_close(chunked, logits.log_softmax(-1).gather(1, ids))
        assert torch.autograd.gradcheck(lambda h, w, b, t=transform: ChunkedLogps.apply(h, w, ids, b, t), inputs)


def test_reductions_are_float32_for_a_bfloat16_model() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(64, 32).bfloat16(), torch.randn(500, 32).bfloat16()
    targets = torch.randint(0, 500, (64,))
    logps = ChunkedLogps.apply(hidden, head, targets[:, None])[:, 0]
    assert logps.dtype == torch.float32
    logits = (hidden @ head.T).double()
    expected = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(logps.double(), expected, rtol=1e-6, atol=1e-5)


def test_each_token_is_shifted_by_its_own_largest_logit() -> None:
    """Beside a token of logits around 1000 those of another do not vanish."""
    hidden, head = torch.tensor([[1000.0], [1.0]]), torch.tensor([[1.0], [0.5]])
    logps = ChunkedLogps.apply(hidden, head, torch.tensor([[0], [1]]))
    torch.testing.assert_close(
        logps.double(), (hidden.double() @ head.double().T).log_softmax(-1)[[0, 1], [0, 1], None]
    )


@pytest.mark.parametrize("bias", [None, torch.zeros(600).bfloat16()], ids=["plain", "a bias"])
def test_gradients_of_a_bfloat16_model_add_up_in_float32(bias: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 600 equal parts, where bfloat16 adds nothing to a sum from its 257th part on."""
    monkeypatch.setattr(dpkd_offline.models.logprobs, "TOKENS", 1)
    monkeypatch.setattr(dpkd_offline.models.logprobs, "WIDTH", 1)
    head, other = torch.ones(600, 1).bfloat16().requires_grad_(), torch.ones(2, 1).bfloat16().requires_grad_()
    hidden, many = (torch.ones(count, 1).bfloat16().requires_grad_() for count in (2, 600))
    bias = None if bias is None else bias.requires_grad_()
    # d logp / d hidden is head of the id, less its mean: 1 - 1.
    ChunkedLogps.apply(hidden, head, torch.zeros(2, 1, dtype=torch.long), bias)[1].sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    assert hidden.grad.abs().max() < 0.01
    # d logp / d head of 600 tokens is 600 · (1 - 1/2) for the id, and less than nothing by as much for the other.
    of_two = None if bias is None else bias.detach()[:2].requires_grad_()
    ChunkedLogps.apply(many, other, torch.zeros(600, 1, dtype=torch.long), of_two).sum().backward()
    for grad in (other.grad, None if of_two is None else of_two.grad[:, None]):
        if grad is not None:
            assert grad.dtype == torch.bfloat16
            assert grad.flatten().tolist() == pytest.approx([300, -300], rel=0.01)


@pytest.mark.parametrize("function", [ChunkedLogps, KeptLogps])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_the_gradient_of_a_head_goes_to_its_main_grad_alone(function: type[ChunkedLogps], trained: bool) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(9, 4).requires_grad_(), torch.randn(12, 4).requires_grad_(trained)
    ids, total = torch.randint(12, (9, 1)), torch.ones(12, 4)
    head.main_grad = total  # type: ignore[attr-defined]
    function.apply(hidden, head, ids).sum().backward()  # type: ignore[no-untyped-call]
    exact = head.detach().requires_grad_()
    (hidden.detach() @ exact.T).log_softmax(-1).gather(-1, ids).sum().backward()
    assert head.grad is None
    torch.testing.assert_close(total - 1, exact.grad if trained else torch.zeros(12, 4), rtol=1e-5, atol=1e-5)


def test_rows_go_through_the_model_alone_where_that_is_asked_for(teachers: dict[str, Path]) -> None:
    model, batch = load_model(str(teachers["llama"]), "float32"), response_batch(ITEMS)
    shapes: list[tuple[int, ...]] = []
    caches: list[object] = []

    def note(_module: object, _inputs: object, keywords: dict[str, Tensor], output: object) -> None:
        shapes.append(tuple(keywords["input_ids"].shape))
        caches.append(getattr(output, "past_key_values", None))

    head_of(model).decoder.register_forward_hook(note, with_kwargs=True)
    each = [(1, len(prompt) + len(response)) for prompt, response in ITEMS]
    for scored in (lambda *a: response_logps(model, batch, *a), lambda *a: top_logps(model, batch, 3, *a)[0].tolist()):
        with torch.no_grad():
            shapes.clear()
            together = scored()
            assert shapes == [(len(ITEMS), max(length for _, length in each))]
            shapes.clear()
            alone = scored(True)
            assert shapes == each
        flat = [
            torch.tensor([x for row in r for x in (row if isinstance(row, list) else [row])]) for r in (together, alone)
        ]
        torch.testing.assert_close(*flat, rtol=0, atol=2e-5)
    assert caches == [None] * len(caches)


@pytest.mark.parametrize("name", CHANGED)
def test_what_a_model_does_to_its_logits_is_read_from_its_config(name: str, teachers: dict[str, Path]) -> None:
    expected = {"cohere": Transform(0.25), "granite": Transform(0.25), "gemma2": Transform(cap=3.0), "phi": Transform()}
    assert head_of(small_model(name, teachers, "float32")).transform == expected[name]
    assert head_of(small_model(name, teachers, "bfloat16")).transform == expected[name]


def test_a_model_that_changes_its_logits_as_no_config_says_is_refused(teachers: dict[str, Path]) -> None:
    check_model(load_model(str(teachers["llama"]), "float32"))
    model = load_model(str(teachers["llama"]), "float32")
    forward = model.forward

    def capped(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        output.logits = 5 * torch.tanh(output.logits / 5)
        return output

    model.forward = capped  # type: ignore[method-assign]
    with pytest.raises(UnavailableError, match="llama: its logits are not"):
        check_model(model)


@pytest.mark.parametrize("added_up", [False, True], ids=["gradient of the head", "its main_grad"])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_kept_probabilities_give_what_a_log_softmax_gives(
    dtype: torch.dtype, near: float, added_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of blocks of tokens, of ids that are asked for twice, and of some that are nearly certain."""
    monkeypatch.setattr(dpkd_offline.models.logprobs, "CHUNK", 7)
    torch.manual_seed(0)
    hidden, head = (torch.randn(count, 16).to(dtype).requires_grad_() for count in (40, 300))
    ids = torch.randint(300, (40, 5))
    ids[:, 3] = ids[:, 0]
    with torch.no_grad():
        hidden[:9] += head[ids[:9, 1]]
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, head)]
    expected = (exact[0] @ exact[1].T).log_softmax(-1).gather(-1, ids)
    weights = torch.randn(40, 5, dtype=torch.float64)
    (expected * weights).sum().backward()
    total = torch.ones(300, 16, dtype=torch.promote_types(dtype, torch.float32))
    if added_up:
        head.main_grad = total  # type: ignore[attr-defined]
    logps = KeptLogps.apply(hidden, head, ids)  # type: ignore[no-untyped-call]
    (logps * weights).sum().backward()
    of_head = total - 1 if added_up else head.grad
    assert (head.grad is None) == added_up
    for ours, theirs in ((logps, expected), (hidden.grad, exact[0].grad), (of_head, exact[1].grad)):
        assert ours is not None and theirs is not None
        assert float((ours.detach().double() - theirs.detach()).norm() / theirs.detach().norm()) < near


@pytest.mark.parametrize("likely", [0.5, 0.999, 0.9999])
def test_the_gradient_of_what_is_nearly_certain_is_not_rounded_away(likely: float) -> None:
    """1 - p of the token, which bfloat16 has not where p is near one."""
    head = torch.eye(2, dtype=torch.bfloat16)
    hidden = torch.tensor([[float(torch.logit(torch.tensor(likely, dtype=torch.float64))), 0.0]], dtype=torch.bfloat16)
    expected = 1 - float(hidden.double().softmax(-1)[0, 0])
    KeptLogps.apply(hidden.requires_grad_(), head, torch.tensor([[0]])).sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert float(hidden.grad[0, 0]) == pytest.approx(expected, rel=1e-2)


class Noted(Tensor):
    """A tensor that notes the shapes of its products, and how many numbers the largest has that is made of it."""

    products: list[tuple[int, ...]] = []  # noqa: RUF012 (of all of them)
    largest = 0

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        answer = super().__torch_function__(func, types, args, kwargs)
        if func.__name__ in ("mm", "matmul", "__matmul__"):
            Noted.products.append(tuple(answer.shape))
        if isinstance(answer, Tensor):
            Noted.largest = max(Noted.largest, answer.numel())
        return answer


class OnGpu(Noted):
    """One that says that it is on a GPU, with the products into another dtype that torch has there alone."""

    is_cuda = True
    device = torch.device("cuda")

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        precise = kwargs.pop("out_dtype", None)
        if precise is not None:
            args = [arg.to(precise) for arg in args]
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["llama", *CHANGED])
def test_a_gpu_computes_the_full_log_softmax_too(
    name: str, dtype: torch.dtype, teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks; from logits that are not rounded to bfloat16, of which it keeps probabilities if they are products."""
    for size, much in {"CHUNK": 7, "TOKENS": 8, "WIDTH": 100}.items():
        monkeypatch.setattr(dpkd_offline.models.logprobs, size, much)
    model = small_model(name, teachers, str(dtype).removeprefix("torch."))
    layer = model.get_output_embeddings()
    count, width = layer.weight.shape
    torch.manual_seed(0)
    hidden = torch.randn(20, width).to(dtype).as_subclass(OnGpu).requires_grad_()
    ids, weights = torch.randint(count, (20, 3)), torch.randn(20, 3, dtype=torch.float64)
    ids[0] = torch.tensor([99, 100, 200])  # where blocks of words end and begin
    logps = logps_of(model, hidden, ids)
    assert (type(logps.grad_fn).__name__ == "KeptLogpsBackward") == (name == "llama" and dtype == torch.bfloat16)
    (logps * weights).sum().as_subclass(Tensor).backward()  # of a subclass it would be a pass of plain tensors

    exact = [t.detach().as_subclass(Tensor).double().requires_grad_() for t in (hidden, layer.weight)]
    logits = exact[0] @ exact[1].T
    if name == "phi":
        logits = logits + layer.bias.detach().double()
    if name in ("cohere", "granite"):
        logits = logits / 4
    if name == "gemma2":
        logits = 3 * torch.tanh(logits / 3)
    expected = logits.log_softmax(-1).gather(-1, ids)
    torch.testing.assert_close(logps.detach().as_subclass(Tensor).double(), expected.detach(), rtol=1e-5, atol=1e-5)
    (expected * weights).sum().backward()
    for ours, theirs in zip((hidden, layer.weight), exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        near = 2e-2 if dtype == torch.bfloat16 else 1e-5
        assert float((ours.grad.double() - theirs.grad).norm() / theirs.grad.norm()) < near


def test_a_gpu_adds_to_main_grad_what_it_has_not_rounded() -> None:
    """257 times a half, of which bfloat16 has the nearest whole number."""
    hidden, head = torch.ones(257, 1).bfloat16().as_subclass(OnGpu), torch.zeros(2, 1).bfloat16().requires_grad_()
    head.main_grad = total = torch.zeros(2, 1)  # type: ignore[attr-defined]
    ids = torch.zeros(257, 1, dtype=torch.long)
    logps = KeptLogps.apply(hidden.requires_grad_(), head, ids)  # type: ignore[no-untyped-call]
    logps.as_subclass(Tensor).sum().backward()
    assert total.tolist() == [[128.5], [-128.5]]


@pytest.mark.parametrize(
    ("where", "dtype", "shapes"),
    [
        (Noted, torch.float32, [(2048, 4096), (2048, 104), (52, 4096), (52, 104)]),
        (OnGpu, torch.float32, [(2100, 4200)]),
        (OnGpu, torch.bfloat16, [(1024, 4200), (1024, 4200), (52, 4200)]),
    ],
    ids=["cpu", "gpu", "gpu, kept"],
)
def test_the_logits_of_all_tokens_do_not_exist_at_once(
    where: type[Noted], dtype: torch.dtype, shapes: list[tuple[int, int]], teachers: dict[str, Path]
) -> None:
    """Of 2,100 tokens on 4,200 words, where no gradient is asked for."""
    model = load_model(str(teachers["llama"]), "float32")
    head_of(model)
    model.set_output_embeddings(torch.nn.Linear(1, 4200, bias=False, dtype=dtype))
    hidden = torch.ones(2100, 1).to(dtype).as_subclass(where)
    Noted.products.clear()
    Noted.largest = 0
    with torch.no_grad():
        logps_of(model, hidden, torch.zeros(2100, 1, dtype=torch.long))
    assert Noted.products == shapes
    assert Noted.largest == shapes[0][0] * shapes[0][1]
    Noted.products.clear()
    likeliest(model, hidden)
    size = 1024 if where is OnGpu else 128
    assert [rows for rows, _ in Noted.products] == [size] * (2100 // size) + [2100 % size]
