"""DeepSpeed's ZeRO as the optimiser of a run that Accelerate launches with it."""

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
from dpkd_offline.training.optimizer import adamw
from dpkd_offline.training.student import Student

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroAdamW:
    """AdamW on float32 masters that ZeRO keeps a part of in each process, with the interface of MasterAdamW.

    The launcher's config says which stage, and what is offloaded; all numbers are the run's own. What a checkpoint
    holds is the same as without DeepSpeed.

    Args:
        kept: the tensors of a checkpoint, if there is one.

    Raises:
        UnavailableError: DeepSpeed is not installed, or is to shard nothing.
    """

    def __init__(self, model: Student, dtype: torch.dtype, config: TrainConfig, kept: dict[str, Tensor]) -> None:
        deepspeed = _deepspeed()
        settings = _settings(dtype, config)
        stage: int = settings["zero_optimization"]["stage"]
        if not 1 <= stage <= 3:
            raise UnavailableError(
                f"ZeRO stage {stage} shards nothing; launch without DeepSpeed, or with stage 1, 2 or 3"
            )
        self._count = torch.distributed.get_world_size()
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._taken = torch.tensor(0.0)
        masters = {name: p.detach().clone() for name, p in self._parameters.items()}
        for name, parameter in self._parameters.items():
            if kept:
                self._taken = kept[f"step/{name}"].clone()
                masters[name] = kept[f"master/{name}"].to(parameter.device)
                parameter.data.copy_(masters[name])
        buffers = [(buffer, buffer.data) for buffer in model.buffers()]
        # A learning rate of zero: ZeRO takes a step without gradients to make its state.
        with redirect_stdout(sys.stderr):
            made = deepspeed.initialize(
                model=model,
                optimizer=adamw(self._parameters, config, lr=0.0),
                config=settings,
                dist_init_required=False,
            )
        self._engine: Any = made[0]
        for buffer, data in buffers:  # rotary frequencies stay float32
            buffer.data = data
        zero = self._engine.optimizer
        flat = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
        for part in flat:
            zero.optimizer.state[part] = {
                "step": self._taken.clone(),
                **{key: torch.zeros_like(part) for key in MOMENTS},
            }
        if stage < 3:
            zero._lazy_init_hp_params_optimizer_state()  # so that the moments can be asked for by parameter
        else:  # it is used outside of its module
            deepspeed.zero.register_external_parameter(model, model.model.get_output_embeddings().weight)
        for name, parameter in self._parameters.items():
            deepspeed.utils.safe_set_full_fp32_param(parameter, masters[name])
            for key in MOMENTS if kept else ():
                deepspeed.utils.safe_set_full_optimizer_state(
                    parameter, kept[f"{key}/{name}"].to(masters[name].device), key
                )

    def backward(self, loss: Tensor, last: bool) -> None:
        """Backward; with the last of a step ZeRO adds up over the processes."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self._count, scale_wrt_gas=False)  # it takes means, and we sums

    def gradients(self) -> list[Tensor]:
        """None that anybody else is to add up."""
        return []

    def step(self, learning_rate: float) -> float:
        """Clip and update. Returns the norm of the gradient before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        self._taken += 1
        return float(self._engine.get_global_grad_norm())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Masters, moments and step counts, with their names, put together from all processes."""
        ask = _deepspeed().utils
        for name, parameter in self._parameters.items():
            yield f"master/{name}", ask.safe_get_full_fp32_param(parameter).cpu()
            yield f"step/{name}", self._taken.clone()
            for key in MOMENTS:
                yield f"{key}/{name}", ask.safe_get_full_optimizer_state(parameter, key).cpu()


def _deepspeed() -> Any:
    """The library, which says what it does on the output if nobody stops it."""
    try:
        with redirect_stdout(sys.stderr):
            import deepspeed
    except ImportError as error:
        raise UnavailableError(f"DeepSpeed: {error}; pip install 'dpkd-offline[deepspeed]'") from error
    return deepspeed


def _settings(dtype: torch.dtype, config: TrainConfig) -> dict[str, Any]:
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
