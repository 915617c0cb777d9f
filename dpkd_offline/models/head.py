"""How a model makes logits of its last hidden states: read from its config, and held against what it does.

    logits = cap · tanh(scale · (hidden · Wᵀ + bias) / cap)       without a cap, scale · (hidden · Wᵀ + bias)

Legend: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpkd_offline.common.errors import UnavailableError, first_line

# What the code of an architecture raises where it cannot do what it is asked.
FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
NAMES = ("logit", "lm_head")  # settings that have to do with logits have one of these in their name
LOUDEST = 60.0  # a logit at which every cap shows
TOKENS = 6


@dataclass(frozen=True)
class Transform:
    """What a model does to the products of hidden states and output embedding."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, products: Tensor) -> Tensor:
        """Logits from products, bias included; in place where it can be."""
        if self.scale != 1.0:
            products = products.mul_(self.scale)
        return products if self.cap is None else products.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, logits: Tensor) -> Tensor | float:
        """d logits / d products, from the logits."""
        return self.scale if self.cap is None else (1 - (logits / self.cap).square_()).mul_(self.scale)


@dataclass(frozen=True)
class Head:
    """What lies behind a model's last hidden states."""

    decoder: nn.Module  # the part of the model that makes them
    transform: Transform


_heads: WeakKeyDictionary[PreTrainedModel, Head] = WeakKeyDictionary()


def head_of(model: PreTrainedModel) -> Head:
    """How a model makes its logits. The first call tries it on the model, which must not be sharded then.

    Raises:
        UnavailableError: it makes them in a way that is not known here.
    """
    if model not in _heads:
        _heads[model] = _found(model)
    return _heads[model]


def named_head(model: PreTrainedModel) -> tuple[str, float, float | None]:
    """What `head_of` says of a model, in plain values: its decoder's name, scale and cap."""
    head = head_of(model)
    name = next(name for name, module in model.named_modules() if module is head.decoder)
    return name, head.transform.scale, head.transform.cap


def set_head(model: PreTrainedModel, decoder: str, scale: float, cap: float | None) -> None:
    """Say what `head_of` cannot try on a model without weights: what `named_head` said of the same with them."""
    _heads[model] = Head(model.get_submodule(decoder), Transform(scale, cap))


def probe_ids(model: PreTrainedModel, count: int) -> Tensor:
    """Some token ids [count] of a model's vocabulary, always the same, and none that its config gives a meaning to."""
    config = model.config.get_text_config()
    settings = [*vars(config).items(), *vars(model.config).items()]
    values = [value for name, value in settings if name.endswith(("token_id", "token_index"))]
    special = {n for value in values for n in (value if isinstance(value, list) else [value])}
    ids = [n for n in range(min(int(config.vocab_size), 1000)) if n not in special] or [0]
    places = torch.randint(len(ids), (count,), generator=torch.Generator().manual_seed(0))
    return torch.tensor(ids)[places].to(model.device)


def _found(model: PreTrainedModel) -> Head:
    kind = model.config.model_type
    try:
        head = model.get_output_embeddings()
    except FAULTS:
        head = None
    if not isinstance(head, nn.Module) or not isinstance(getattr(head, "weight", None), Tensor):
        raise UnavailableError(f"{kind}: it has no output embedding whose log-probs could be made piece by piece")
    weight: Tensor = head.weight  # type: ignore[assignment]
    loud = torch.randn(1, TOKENS, weight.shape[1], generator=torch.Generator().manual_seed(0))
    loud = (loud * torch.linspace(0.1, 1, TOKENS)[:, None]).to(weight)
    with torch.no_grad():
        loud *= LOUDEST / (loud @ weight.T).abs().max().clamp(min=1e-6)
        bias: Tensor | None = getattr(head, "bias", None)
        products = (loud[0] @ weight.T).float() if bias is None else (loud[0] @ weight.T + bias).float()
        for decoder in _decoders(model, loud.shape):
            logits = _logits_after(model, decoder, loud)
            if logits.shape != products.shape:
                continue
            tolerance = (1e-5 if torch.finfo(weight.dtype).bits >= 32 else 0.02) * float(logits.abs().max())
            for transform in _transforms(model):
                if torch.allclose(transform(products.clone()), logits, rtol=0, atol=tolerance):
                    return Head(decoder, transform)
    raise UnavailableError(
        f"{kind}: its logits are not those of its output embedding on its last hidden states, and what else it does to "
        f"them its config does not say"
    )


def _decoders(model: PreTrainedModel, shape: torch.Size) -> list[nn.Module]:
    """The parts that may make the last hidden states, of this shape for a row of TOKENS; the outermost first."""
    parts = [model.base_model, *model.children(), *(part for child in model.children() for part in child.children())]
    answered: list[nn.Module] = []

    def note(module: nn.Module, _inputs: object, output: object) -> None:
        last = getattr(output, "last_hidden_state", None)
        if isinstance(last, Tensor) and last.shape == shape:
            answered.append(module)

    parts = [part for part in dict.fromkeys(parts) if part is not model]
    _logits(model, dict.fromkeys(parts, note))
    return [part for part in parts if part in answered]


def _logits_after(model: PreTrainedModel, decoder: nn.Module, hidden: Tensor) -> Tensor:
    """The model's logits where its decoder answers with these last hidden states [1, N, H]: [N, V] if it has those."""

    def replace(_module: nn.Module, _inputs: object, output: object) -> object:
        output.last_hidden_state = hidden  # type: ignore[attr-defined]
        return output

    return _logits(model, {decoder: replace})


def _logits(model: PreTrainedModel, hooks: Mapping[nn.Module, Callable[..., object]]) -> Tensor:
    """The logits of a row of TOKENS, in float32 at least, while hooks see what parts of the model answer."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        logits: Tensor = model(input_ids=probe_ids(model, TOKENS)[None]).logits
    except torch.OutOfMemoryError:
        raise
    except FAULTS as error:
        raise UnavailableError(
            f"{model.config.model_type}: it does not take a row of token ids alone: {first_line(error)}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return logits.flatten(0, -2).float()


def _transforms(model: PreTrainedModel) -> Iterator[Transform]:
    """Every transform that the config has the numbers for, the plainest first."""
    numbers: list[float] = []
    for config in (model.config.get_text_config(), model.config):
        for name in (name for name in dir(config) if any(part in name for part in NAMES)):
            value = getattr(config, name)
            if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                numbers.append(float(value))
    numbers = list(dict.fromkeys(numbers))
    scales = [1.0, *(scale for number in numbers for scale in (number, 1 / number))]
    yield from (Transform(scale, cap) for scale, cap in product(scales, [None, *numbers]))
