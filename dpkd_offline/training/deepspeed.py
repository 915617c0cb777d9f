"""DeepSpeed's ZeRO as the optimizer of a run that Accelerate launches with it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any

import torch
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor

from dpkd_offline.common.errors import UnavailableError
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.training.checkpoint import StoredState
from dpkd_offline.training.optimizer import adamw
from dpkd_offline.training.student import Student

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroAdamW:
    """AdamW on float32 masters that ZeRO keeps a part of in each process, with the interface of MasterAdamW.

    The launcher's config says which stage, and what is offloaded; all numbers are the run's own. A checkpoint holds
    the same tensors as without DeepSpeed.

    Args:
        state: the tensors of a checkpoint; None at the start of a run.

    Raises:
        UnavailableError: DeepSpeed is not installed, or is to shard nothing.
    """

    def __init__(self, model: Student, dtype: torch.dtype, config: TrainConfig, state: StoredState | None) -> None:
        self._deepspeed = _deepspeed()  # before its settings, which need it
        if config.moments_dtype != "float32":
            raise UnavailableError("--moments-dtype: DeepSpeed keeps moments in float32; launch with FSDP, or without")
        settings = engine_settings(dtype, config)
        stage: int = settings["zero_optimization"]["stage"]
        if not 1 <= stage <= 3:
            raise UnavailableError(
                f"ZeRO stage {stage} shards nothing; launch without DeepSpeed, or with stage 1, 2 or 3"
            )
        self._count = torch.distributed.get_world_size()
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._steps = torch.tensor(0.0)  # that were taken
        # Those that the model comes with, on the CPU: ZeRO rounds copies of them before it makes its own.
        masters = {name: p.detach() for name, p in self._parameters.items()}
        for name, parameter in self._parameters.items():
            if state is not None:
                self._steps = state[f"step/{name}"]
                parameter.data.copy_(state[f"master/{name}"])
        # Its learning rate is zero so far: ZeRO takes a step without gradients to make its state.
        self._engine = self._start_engine(model, adamw(self._parameters, config), settings)
        self._reset_moments(stage, model)
        self._restore(masters, state)

    def _start_engine(self, model: Student, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> Any:
        """DeepSpeed's engine around a model, whose buffers keep their dtype: rotary frequencies stay float32."""
        buffers = [(buffer, buffer.data) for buffer in model.buffers()]
        with redirect_stdout(sys.stderr):
            engine, *_ = self._deepspeed.initialize(
                model=model, optimizer=optimizer, config=settings, dist_init_required=False
            )
        for buffer, data in buffers:
            buffer.data = data
        return engine

    def _reset_moments(self, stage: int, model: Student) -> None:
        """Undo what that step has left, and let the moments be asked for by parameter."""
        zero = self._engine.optimizer
        parts = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
        for part in parts:
            zeros = {key: torch.zeros_like(part) for key in MOMENTS}
            zero.optimizer.state[part] = {"step": self._steps.clone(), **zeros}
        if stage < 3:
            zero._lazy_init_hp_params_optimizer_state()
        else:  # the head is used outside of its module
            head = model.model.get_output_embeddings().weight
            self._deepspeed.zero.register_external_parameter(model, head)

    def _restore(self, masters: dict[str, Tensor], state: StoredState | None) -> None:
        """Set the masters, and of a checkpoint the moments, one tensor at a time."""
        utils, device = self._deepspeed.utils, self._engine.device
        for name, parameter in self._parameters.items():
            utils.safe_set_full_fp32_param(parameter, masters.pop(name).to(device))
            for key in MOMENTS if state is not None else ():
                assert state is not None
                utils.safe_set_full_optimizer_state(parameter, state[f"{key}/{name}"].to(device), key)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Backward through a loss of the step; with the `last` ZeRO adds up over the processes."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self._count, scale_wrt_gas=False)  # it takes means, and we sums

    def sum_gradients(self) -> None:
        """ZeRO has added them up."""

    def norm(self) -> None:
        """ZeRO makes it when it clips."""

    def step(self, learning_rate: float, norm: Tensor | None, value: float | None) -> float:
        """Clip and update. Returns the norm of the gradient before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        self._steps += 1
        return float(self._engine.get_global_grad_norm())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Masters, moments and step counts, with their names, put together from all processes."""
        utils = self._deepspeed.utils
        for name, parameter in self._parameters.items():
            yield f"master/{name}", utils.safe_get_full_fp32_param(parameter).cpu()
            yield f"step/{name}", self._steps.clone()
            for key in MOMENTS:
                yield f"{key}/{name}", utils.safe_get_full_optimizer_state(parameter, key).cpu()


def _deepspeed() -> Any:
    """The library. What it prints goes to stderr."""
    try:
        with redirect_stdout(sys.stderr):
            import deepspeed
    except ImportError as error:
        raise UnavailableError(f"DeepSpeed: {error}; pip install 'dpkd-offline[deepspeed]'") from error
    return deepspeed


def engine_settings(dtype: torch.dtype, config: TrainConfig) -> dict[str, Any]:
    """The launcher's config for DeepSpeed, with what the run itself decides."""
    settings = _without_auto(DeepSpeedPlugin().deepspeed_config)
    for decided in ("train_batch_size", "optimizer", "scheduler", "fp16"):
        settings.pop(decided, None)
    return settings | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    """Without what a trainer is to fill in; DeepSpeed has its own defaults."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if value != "auto"
    }
