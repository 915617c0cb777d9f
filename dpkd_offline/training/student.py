"""The student as it is trained: loaded, prepared, and called on a micro batch.

Legend: N response tokens of a micro batch, K token ids that are asked for at each.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpkd_offline.common import console
from dpkd_offline.common.errors import UnavailableError
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.models.batch import Batch
from dpkd_offline.models.head import named_head, set_head
from dpkd_offline.models.loading import load_model, model_without_weights
from dpkd_offline.models.logprobs import likeliest, logps_of, response_hidden
from dpkd_offline.models.shared_prompt import SHARED_PROMPT
from dpkd_offline.models.trial import RowLayout, SamplingLayout, check_model, row_layout, sampling_layout
from dpkd_offline.training import lora
from dpkd_offline.training.distributed import Processes, gather_full
from dpkd_offline.training.sharding import layout_on, shard

if TYPE_CHECKING:
    from peft import PeftModel

Weights = dict[str, Tensor]
COMPILED_STEPS = 100  # from so many on, compiling takes less time than it saves


class Student(nn.Module):
    """A student that answers with log-probs; what shards a model over several processes takes this as its root.

    Args:
        device: where it is called, if it does not lie there yet.
        adapted: the same model with its adapters, if only they are trained.
        dtype: that of its parameters while it is trained, if it is another.
        longest: tokens of the longest sequence that will come; by default all that it takes.
        layout: how its rows may be laid out, where that is known; else it is tried.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device | None = None,
        adapted: PeftModel | None = None,
        dtype: torch.dtype | None = None,
        longest: int | None = None,
        layout: RowLayout | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.device = device or model.device
        self.__dict__["adapted"] = adapted  # not as a child: it has the same parameters by other names
        self.compiled: bool | None = False  # whether its layers are
        self.own_attention: str = model.config._attn_implementation
        self._sampling: SamplingLayout | None = None
        self._longest = longest
        layout = layout or row_layout(model, longest, dtype or model.dtype)
        self.alone = layout == "alone"
        self.shares = layout == "shared"
        if self.shares:
            model.set_attn_implementation(SHARED_PROMPT)
        if not self.shares:
            alone = ", by itself" if self.alone else ""
            console.info(f"{model.config.model_type}: each response goes with a prompt of its own{alone}")

    @property
    def precise(self) -> torch.dtype:
        """That of its log-probs."""
        return torch.promote_types(self.model.dtype, torch.float32)

    @property
    def vocab_size(self) -> int:
        """The rows of its embedding."""
        return int(self.model.config.get_text_config().vocab_size)

    def forward(self, batch: Batch, ids: Tensor, best: bool = False) -> tuple[Tensor, Tensor | None]:
        """Log-probs [N, K] in nats of ids [N, K] at the response positions of a batch.

        With `best` also the student's likeliest ids [N], whose log-probs are the last column of [N, K + 1].
        """
        hidden = response_hidden(self.model, batch, self.alone)
        best_ids = likeliest(self.model, hidden) if best else None
        if best_ids is not None:
            ids = torch.cat([ids, best_ids[:, None]], dim=1)
        return logps_of(self.model, hidden, ids), best_ids

    def sampling_layout(self) -> SamplingLayout:
        """How prompts may go together through `generate`, with the attention that is set then; tried once."""
        if self._sampling is None:
            self._sampling = sampling_layout(self.model, self._longest)
        return self._sampling

    def generate(self, input_ids: Tensor, **options: Any) -> Tensor:
        """What transformers' `generate` returns; what wraps the model wraps this too."""
        tokens: Tensor = self.model.generate(input_ids, **options)  # type: ignore[operator]
        return tokens

    @torch.no_grad()
    def to_save(self, config: TrainConfig, processes: Processes) -> tuple[PreTrainedModel | PeftModel, Weights]:
        """What is written of the student: a model, and its weights, put together in the first process.

        All processes call it; training may go on. The model is a skeleton without weights, into which adapters are
        merged if there are some; or the adapters alone.
        """
        dtype = getattr(torch, config.precision)
        stored = self.model.state_dict().keys()  # by all of them, and first: FSDP frees what is whole for it
        gathered: dict[nn.Parameter, Tensor] = {}  # tied ones once
        weights: Weights = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if parameter not in gathered:
                full = gather_full(parameter)  # by all of them
                gathered[parameter] = full.to(dtype) if processes.first else full.new_empty(0)
            if processes.first:
                weights[name] = gathered[parameter].detach()
        if processes.first:  # buffers that are stored, which nobody trains, as they are
            buffers = self.model.named_buffers(remove_duplicate=False)
            weights |= {name: buffer.detach().cpu() for name, buffer in buffers if name in stored}
        adapted: PeftModel | None = self.__dict__["adapted"]
        if adapted is not None and config.lora_output == "adapter":
            return adapted, {f"base_model.model.{name}": weight for name, weight in weights.items()}
        if adapted is not None and processes.first:
            weights = lora.merged(weights, self.model)
        with torch.device("meta"):
            skeleton: PreTrainedModel = type(self.model)._from_config(self.model.config, dtype=dtype)
        skeleton.generation_config = self.model.generation_config
        return skeleton, weights


def load_student(config: TrainConfig, processes: Processes, steps: int = 0) -> Student:
    """The student with what is trained in float32, ready for an optimizer that keeps it so.

    Args:
        steps: how many the whole run takes, by which it is compiled where the config leaves that open.

    Raises:
        UnavailableError: it cannot be loaded, or its log-probs cannot be made here.
    """
    # oneDNN keeps a kernel per length of a row, 1024 of them if nobody says less: half a gigabyte.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    dtype = getattr(torch, config.precision)
    whole: PreTrainedModel | None = None
    if processes.sharded:
        tried = None
        if processes.first:  # which alone holds a copy, and only until it has handed out the parts
            whole, _ = _loaded(config, torch.device("cpu"))
            tried = layout_on(whole, processes.device, config.max_length, dtype), named_head(whole)
        layout, head = processes.from_first("tried", tried)
        model = model_without_weights(config.student, config.trust_remote_code)
        set_head(model, *head)
        adapted = lora.adapt(model, config) if config.lora_rank else None
    else:  # ZeRO takes it from the CPU, and so does a frozen model that is rounded
        by_way = processes.zero or config.lora_rank
        model, adapted = _loaded(config, torch.device("cpu") if by_way else processes.device)
        if config.lora_rank and not processes.zero:
            lora.round_frozen(model, dtype)
            model.to(processes.device)  # type: ignore[arg-type]
        layout = layout_on(model, processes.device, config.max_length, dtype)
    student = Student(model, processes.device, adapted, dtype, config.max_length, layout)
    student.compiled = config.compile
    if config.compile is None:
        student.compiled = not processes.zero and pays_to_compile(model, processes.device, steps)
    if student.compiled:
        compile_layers(model, processes.device)
    if config.gradient_checkpointing:
        recompute_layers(model)
    if not (processes.sharded or processes.zero) and isinstance(words := model.get_input_embeddings(), nn.Embedding):
        words.sparse = True  # its gradient: of the tokens that are there, not of the whole vocabulary
    if processes.sharded:
        shard(student, layers_of(student), whole, dtype, processes)
    return student


def _loaded(config: TrainConfig, device: torch.device) -> tuple[PreTrainedModel, PeftModel | None]:
    """The model, and the same with adapters if only they are trained."""
    model = load_model(config.student, "float32", config.trust_remote_code, device)
    check_model(model)
    return model, lora.adapt(model, config) if config.lora_rank else None


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a model, of those that transformers can recompute; empty where it marks none."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _known_layers(model: PreTrainedModel, option: str) -> list[nn.Module]:
    if not (layers := layers_of(model)):
        raise UnavailableError(f"{model.config.model_type}: {option} does not know its layers")
    return layers


def compile_layers(model: PreTrainedModel, device: torch.device | None = None) -> None:
    """Let torch.compile fuse what each layer does between its products; all layers of a kind are one compilation.

    Rows of any length are one too, or a run that goes on would compute other bits than one that was never stopped.

    Args:
        device: where the model will be, if it is not there yet.

    Raises:
        UnavailableError: the layers are not known, or nothing here compiles what torch generates.
    """
    if missing := _missing_compiler(device or model.device):
        raise UnavailableError(f"--compile {missing}")

    def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
        fast = torch.compile(forward, dynamic=True)

        def call(*args: Any, **keywords: Any) -> Any:  # an answer of a validation, token by token, is not worth it
            return (fast if torch.is_grad_enabled() else forward)(*args, **keywords)

        return call

    for layer in _known_layers(model, "--compile"):
        layer.forward = compiled(layer.forward)


def pays_to_compile(model: nn.Module, device: torch.device, steps: int) -> bool:
    """Whether layers are worth compiling where nobody has said: on a GPU, where that is possible and steps are many."""
    return (
        device.type == "cuda"
        and steps >= COMPILED_STEPS
        and bool(layers_of(model))
        and find_spec("triton") is not None
        and not _missing_compiler(device)
    )


def _missing_compiler(device: torch.device) -> str:
    """What torch.compile lacks on a machine, in words; empty where the compiler is there."""
    # On a CPU torch generates C++; on a GPU a C compiler builds what launches its kernels.
    on_cpu = device.type == "cpu"
    language, variable, usual = ("C++", "CXX", ["g++"]) if on_cpu else ("C", "CC", ["gcc", "clang"])
    compilers = [os.environ[variable]] if variable in os.environ else usual
    if any(map(shutil.which, compilers)):
        return ""
    return f"needs a {language} compiler, and {' or '.join(compilers)} is not there; {variable} names another one"


def recompute_layers(model: PreTrainedModel) -> None:
    """Let each layer keep its inputs alone, and make the rest again in the backward pass.

    transformers would do that in training mode only, where there is dropout.
    """

    def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **keywords)

        return call

    for layer in _known_layers(model, "--gradient-checkpointing"):
        layer.forward = recomputed(layer.forward)


def student_fault(student: Student, config: TrainConfig, step: int, where: str) -> str:
    """Why the student's log-probs on some examples are not finite after so many steps: its weights, or its products."""
    wrong = []
    for name, weight in student.model.named_parameters():
        own = weight.to_local() if isinstance(weight, DTensor) else weight  # of a sharded model this process's part
        if not torch.isfinite(own.detach()).all():
            wrong.append(name)
    if not wrong:
        try_this = "--dtype float32" if config.precision != "float32" else "another student"
        if step:
            try_this = "a lower --learning-rate"
        return (
            f"the student's log-probs on {where} are after step {step} not finite, although its weights are; take "
            f"{try_this}"
        )
    weights = f"{wrong[0]}{f' and {len(wrong) - 1} more' if wrong[1:] else ''}"
    if step:
        return f"the student's weights are after step {step} not finite ({weights}); take a lower --learning-rate"
    return f"{config.student}: the student's weights are not finite before any step ({weights}); take another copy"
