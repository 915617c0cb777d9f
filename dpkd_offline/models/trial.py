"""What a model can do, tried on the model itself when it is loaded: how its rows may be laid out.

An architecture may hold a state, a convolution or a bias that runs along the row, or cap its scores. Whether one does
is not known ahead, so every layout is held against the plain one: a sequence by itself, without padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from dpkd_offline.common import console
from dpkd_offline.common.errors import UnavailableError
from dpkd_offline.common.machine import available_memory
from dpkd_offline.models.batch import (
    Batch,
    PromptAndResponse,
    PromptAndResponses,
    pad_sequences,
    response_batch,
    shared_prompt_batch,
)
from dpkd_offline.models.head import FAULTS, head_of, probe_ids
from dpkd_offline.models.logprobs import logps_of, response_hidden, token_logps
from dpkd_offline.models.shared_prompt import HALF, SHARED_PROMPT, Call, recorded_calls

RowLayout = Literal["shared", "padded", "alone"]
SamplingLayout = Literal["padded", "equal", "alone"]
REACHES = ("window", "chunk_size", "conv", "cache")  # settings of how far a layer looks back have one in their name
LONGEST_REACH = 64  # that is tried; what looks further back is known by its structure
GPU_TOKENS = 256  # more than a block of a GPU's kernel
ROOM_FOR_TRIALS = 0.8  # of the free memory
GPU_GRADIENTS = 0.1  # by how much of their norm those of two layouts may differ in half precision
STEPS = 6
ATTENTIONS = {"full_attention", "sliding_attention"}  # types of layers that may share prompts


def check_model(model: PreTrainedModel) -> None:
    """Raise UnavailableError for a model whose log-probs cannot be made here, or are not those of its next token."""
    items = flat(probe_items(model))[:1]
    ((prompt, response),) = items
    with torch.no_grad(), in_float32(model):
        head_of(model)
        logits = _plain_logits(model, [*prompt, *response])
        other = _plain_logits(model, [*prompt, *_other_ids(model, len(response))])
        expected = _logps_in(logits, prompt, response)
        actual = token_logps(model, response_batch(items).to(model.device), True)
        precision = model.dtype
    if not close(logits[: len(prompt)], other[: len(prompt)], precision):
        raise UnavailableError(f"{model.config.model_type}: what it says of a token depends on later ones")
    if not close(expected, actual, precision):
        raise UnavailableError(
            f"{model.config.model_type}: its log-probs piece by piece are not those of its forward pass "
            f"({gap(expected, actual):.1e} nats apart)"
        )


def row_layout(model: PreTrainedModel, longest: int | None = None, train_dtype: torch.dtype | None = None) -> RowLayout:
    """How prompts and responses may be laid out without changing a log-prob; says so where prompts are not shared.

    - shared: a prompt once, before all of its responses, in one row;
    - padded: a prompt with each response, in rows that are padded at their end;
    - alone: each by itself.

    The model keeps its attention; to share prompts it needs ours (models/shared_prompt.py). On a GPU they are shared in
    half precision alone, for which there is a kernel.

    Args:
        longest: tokens of the longest sequence that will come; by default all that the model takes.
        train_dtype: also try the backward pass, with parameters of this dtype.
    """
    items = probe_items(model)
    with torch.no_grad(), in_float32(model):
        head_of(model)  # while its attention is its own
        expected = plain_logps(model, flat(items))
        if _turns(model, longest):
            return "alone"
        shares, on_cpu = _shares_prompts(model, items, expected), model.device.type == "cpu"
        pads = (shares and on_cpu) or _same(model, flat(items), expected)  # not asked where it makes no difference
    if shares and (on_cpu or gpu_shares(model, train_dtype)):
        return "shared"
    return "padded" if pads else "alone"


def sampling_layout(model: PreTrainedModel, longest: int | None = None) -> SamplingLayout:
    """How prompts may go together through `generate` without changing a log-prob, with the attention that is set.

    - padded: of any length, padded at their start;
    - equal: of one length;
    - alone: one at a time.

    Args:
        longest: tokens of the longest sequence that will come; by default all that the model takes.

    Raises:
        UnavailableError: even one at a time its samples are not those of its forward pass.
    """
    if _turns(model, longest):
        point = _turning_point(model)
        raise UnavailableError(
            f"{model.config.model_type}: its positions change beyond {point} tokens, so that it samples from something "
            f"else than is scored; --max-length {point} keeps it below"
        )
    steps = min(STEPS, _room(model) // 2)
    ids, lengths = iter(probe_ids(model, 1000).tolist()), (_reach(model) + 24, 5, 5)
    prompts = [list(islice(ids, min(length, _room(model) - steps))) for length in lengths]
    forced = [list(islice(ids, steps)) for _ in prompts]
    groups: dict[SamplingLayout, list[list[int]]] = {
        "padded": [[0, 1, 2]],
        "equal": [[0], [1, 2]],
        "alone": [[0], [1], [2]],
    }
    if torch.finfo(model.dtype).bits < 32 and _convolves(model):
        del groups["padded"]
    with torch.no_grad(), in_float32(model):
        expected = plain_logps(model, list(zip(prompts, forced, strict=True)))
        for layout, parts in groups.items():
            try:
                sampled = [_sampled(model, [prompts[i] for i in p], [forced[i] for i in p]) for p in parts]
            except torch.OutOfMemoryError:
                raise
            except FAULTS as error:
                reason = _first_sentence(error)
                continue
            if close(expected, torch.cat(sampled), model.dtype):
                return layout
            reason = f"{gap(expected, torch.cat(sampled)):.1e} nats apart"
    raise UnavailableError(
        f"{model.config.model_type}: the log-probs of its samples are not those of its forward pass ({reason})"
    )


class _Forced(LogitsProcessor):
    """Leaves the given tokens [B, steps] possible, one at a step, and keeps their log-probs."""

    def __init__(self, tokens: Tensor) -> None:
        self._tokens = tokens
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = self._tokens[:, len(self.logps), None]
        self.logps.append(scores.float().log_softmax(-1).gather(-1, tokens).squeeze(-1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens, 0.0)


def _sampled(model: PreTrainedModel, prompts: Sequence[Sequence[int]], forced: Sequence[Sequence[int]]) -> Tensor:
    """Log-probs of the forced tokens as a batch of prompts samples them, one prompt after the other."""
    input_ids, attention_mask = pad_sequences(prompts, side="left")
    processor = _Forced(torch.tensor(forced, device=model.device))
    generation, model.generation_config = model.generation_config, GenerationConfig()
    try:
        model.generate(  # type: ignore[operator]
            input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            max_new_tokens=len(forced[0]),
            do_sample=False,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([processor]),
        )
    finally:
        model.generation_config = generation
    return torch.stack(processor.logps, dim=1).flatten()


def _shares_prompts(model: PreTrainedModel, items: Sequence[PromptAndResponses], expected: Tensor) -> bool:
    """By its structure first, which no weights can hide, and then by its log-probs."""
    own, kind = model.config._attn_implementation, model.config.model_type
    if _convolves(model):
        return False
    if model.device.type != "cpu" and getattr(model.config.get_text_config(), "sliding_window", None):
        return False  # a trial cannot be longer than every window, and no GPU's kernel was seen to keep to one
    try:
        model.set_attn_implementation(SHARED_PROMPT)
        batch = shared_prompt_batch(items).to(model.device)
        with recorded_calls() as calls:
            hidden = _all_hidden(model, items)
        shared = logps_of(model, hidden[batch.places], batch.targets[:, None])[:, 0]
        attends = _all_layers_attend(model, calls)
        return attends and close(expected, shared, model.dtype) and _is_isolated(model, items, hidden)
    except FAULTS as error:  # an attention that cannot be exchanged, or does what ours does not
        console.info(f"{kind}: {_first_sentence(error)}")
        return False
    finally:
        model.set_attn_implementation(own)


def _all_layers_attend(model: PreTrainedModel, calls: Sequence[Call]) -> bool:
    """Whether each layer has called our attention, once, with the window that the config gives it."""
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None)
    windows = [call.window for call in calls if call.window is not None]
    if types is not None:
        windowed = list(types).count("sliding_attention")
        known = set(types) <= ATTENTIONS
    else:
        windowed = len(calls) if getattr(config, "sliding_window", None) else len(windows)
        known = True
    layers = {id(call.layer) for call in calls}
    return known and len(windows) == windowed and len(calls) == len(layers) == config.num_hidden_layers


def _all_hidden(model: PreTrainedModel, items: Sequence[PromptAndResponses]) -> Tensor:
    """The last hidden states of all tokens [T, H] of a row in which each prompt stands once."""
    batch = shared_prompt_batch(items).to(model.device)
    return response_hidden(model, replace(batch, places=torch.arange(batch.tokens, device=model.device)))


def _is_isolated(model: PreTrainedModel, items: Sequence[PromptAndResponses], hidden: Tensor) -> bool:
    """Whether other tokens in one response leave all that may not see it as it was, to the last bit.

    Where tokens are sent to experts, products have other shapes then, and may be rounded in another way.

    Args:
        hidden: what `_all_hidden` gives of the items.
    """
    (prompt, (first, *others)), *rest = items
    other = _all_hidden(model, [(prompt, [_other_ids(model, len(first)), *others]), *rest])
    changed = len(prompt) + len(first)
    before, after = (torch.cat([states[: len(prompt)], states[changed:]]) for states in (hidden, other))
    if torch.equal(before, after):
        return True
    experts = any("expert" in name and isinstance(n, int) for name, n in vars(model.config.get_text_config()).items())
    allowed = 16 * torch.finfo(before.dtype).eps * float(before.abs().max())
    return experts and float((before - after).abs().max()) <= allowed


def _other_ids(model: PreTrainedModel, count: int) -> list[int]:
    """Ids that are not those of `probe_items`."""
    ids: list[int] = probe_ids(model, 4000)[-count:].tolist()
    return ids


def gpu_shares(model: PreTrainedModel, train_dtype: torch.dtype | None) -> bool:
    """Whether a GPU's kernel gives what padded rows give, in the dtype and with the passes that will be asked of it."""
    dtype, backward = train_dtype or model.dtype, train_dtype is not None
    if dtype not in HALF:
        return False
    items = probe_items(model, at_least=GPU_TOKENS)
    own = model.config._attn_implementation

    def passes(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad(set_to_none=True)
        logps = token_logps(model, batch.to(model.device))
        if backward:
            logps.sum().backward()
        return logps.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    try:
        with _parameters_in(model, dtype), torch.set_grad_enabled(backward):
            expected, gradients = passes(response_batch(flat(items)))
            model.set_attn_implementation(SHARED_PROMPT)
            logps, actual = passes(shared_prompt_batch(items))
            error = sum(float((actual[k] - v).float().square().sum()) for k, v in gradients.items())
            size = sum(float(v.float().square().sum()) for v in gradients.values())
            return close(expected, logps, dtype) and error <= GPU_GRADIENTS**2 * size  # neither, where one is no number
    except torch.OutOfMemoryError:
        raise
    except FAULTS as error:  # such as a head size that the kernel does not have
        console.info(f"{model.config.model_type}: the GPU's attention does not take it: {_first_sentence(error)}")
        return False
    finally:
        model.zero_grad(set_to_none=True)
        model.set_attn_implementation(own)


@contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
    """A context in which a model of half precision computes in float32, if there is memory for it.

    Its roundings add up to what a wrong layout would do to some models, a tenth of a nat and more.
    """
    halves = [t for t in (*model.parameters(), *model.buffers()) if t.dtype in HALF]
    needed = sum(4 * tensor.numel() for tensor in halves)
    room = torch.cuda.mem_get_info(model.device)[0] if model.device.type == "cuda" else available_memory()
    if not halves or needed > room * ROOM_FOR_TRIALS or getattr(model, "hf_quantizer", None) is not None:
        yield
        return
    kept = [(tensor, tensor.data) for tensor in halves]
    try:
        for tensor, data in kept:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


@contextmanager
def _parameters_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """A context in which the parameters of a model, and not its buffers, have another dtype."""
    kept = {parameter: parameter.data for parameter in model.parameters()}
    try:
        for parameter in kept:
            parameter.data = parameter.data.to(dtype)
        yield
    finally:
        for parameter, data in kept.items():
            parameter.grad, parameter.data = None, data


def _same(model: PreTrainedModel, items: Sequence[PromptAndResponse], expected: Tensor) -> bool:
    try:
        return close(expected, token_logps(model, response_batch(items).to(model.device)), model.dtype)
    except FAULTS as error:
        console.info(f"{model.config.model_type}: rows of several lengths: {_first_sentence(error)}")
        return False


def _turning_point(model: PreTrainedModel) -> int | None:
    """The tokens from which on a longer sequence has other positions from its first token on; None where none has.

    Such a model says something else of a token when it samples it than when the whole sequence is there.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type") in ("dynamic", "longrope"):
            return int(part.get("original_max_position_embeddings") or _room(model))
    return None


def _turns(model: PreTrainedModel, longest: int | None) -> bool:
    point = _turning_point(model)
    return point is not None and min(longest or _room(model), _room(model)) > point


def _convolves(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv1d) and module.kernel_size != (1,) for module in model.modules())


def _reach(model: PreTrainedModel) -> int:
    """How far back layers with a window or a kernel look, as far as it is tried."""
    settings = vars(model.config.get_text_config()).items()
    numbers = [value for k, value in settings if isinstance(value, int) and any(part in k for part in REACHES)]
    return max((n for n in numbers if n <= LONGEST_REACH), default=0)


def _room(model: PreTrainedModel) -> int:
    """The most tokens of a sequence."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31)


def probe_items(model: PreTrainedModel, at_least: int = 0) -> list[PromptAndResponses]:
    """Two prompts with two responses each, some of them longer than what a layer looks back on."""
    long, room = max(_reach(model), at_least), _room(model)
    lengths = [(long + 14, [long + 19, 11]), (5, [3, long + 22])]
    lengths = [(min(p, room // 2), [min(n, room - room // 2) for n in parts]) for p, parts in lengths]
    ids = iter(probe_ids(model, sum(n + sum(parts) for n, parts in lengths)).tolist())

    def take(count: int) -> list[int]:
        return [next(ids) for _ in range(count)]

    return [(take(prompt), [take(n) for n in responses]) for prompt, responses in lengths]


def flat(items: Sequence[PromptAndResponses]) -> list[PromptAndResponse]:
    """Each response with a prompt of its own."""
    return [(prompt, response) for prompt, responses in items for response in responses]


def plain_logps(model: PreTrainedModel, items: Sequence[PromptAndResponse]) -> Tensor:
    """Log-probs of the tokens of all responses by one forward pass for each sequence."""
    parts = []
    for prompt, response in items:
        parts.append(_logps_in(_plain_logits(model, [*prompt, *response]), prompt, response))
    return torch.cat(parts)


def _logps_in(logits: Tensor, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """Log-probs of the tokens of a response in the logits [T, V] of all T tokens."""
    logps = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(-1, torch.tensor(response, device=logps.device)[:, None])[:, 0]


def _plain_logits(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    logits: Tensor = model(input_ids=torch.tensor([list(ids)], device=model.device)).logits[0]
    return logits.float() if torch.finfo(logits.dtype).bits < 32 else logits


def close(expected: Tensor, actual: Tensor, dtype: torch.dtype) -> bool:
    """Whether log-probs or logits of a model of this dtype are the same but for rounding.

    That of half precision is large: 0.06 nats in the mean, 0.2 at most, between two right layouts of a model with 30
    layers. So layouts are tried in float32 wherever there is memory for it (`in_float32`).
    """
    expected, actual = expected.double(), actual.double()
    if torch.finfo(dtype).bits >= 32:
        return torch.allclose(actual, expected, rtol=1e-5, atol=1e-4, equal_nan=True)
    mean = float((expected - actual).abs().nanmean()) if bool(expected.isfinite().any()) else 0.0
    return mean < 0.15 and torch.allclose(actual, expected, rtol=0.05, atol=1.0, equal_nan=True)


def gap(expected: Tensor, actual: Tensor) -> float:
    """The largest difference, in nats."""
    return float((expected.double() - actual.double()).abs().max())


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0][:200] or type(error).__name__
