"""The GPUs of a run, and what each stage does with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpkd_offline.common.errors import UsageError
from dpkd_offline.common.gpus import memory_of_each, only, visible_gpus
from dpkd_offline.config.base import ModelOptions
from dpkd_offline.config.recipe import Recipe
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.pipeline.memory import ModelShape, train_memory

LEAST_TOKENS = 1024  # of a micro batch that is worth a GPU
USABLE = 0.9  # of a GPU's memory: the rest is CUDA's own, and what lies between what is in use


@dataclass(frozen=True)
class Training:
    """How a student is trained: in how many processes, and whether each holds a part of it alone."""

    processes: int = 1
    sharded: bool = False

    @property
    def way(self) -> str:
        return "fsdp" if self.sharded else "ddp"


@dataclass(frozen=True)
class Box:
    """The GPUs that a run may use; none on a machine without."""

    gpus: Sequence[str]
    are_all: bool = True  # that this process may use

    @classmethod
    def of(cls, recipe: Recipe) -> Box:
        """Those of a recipe, on this machine.

        Raises:
            UsageError: there are fewer.
        """
        gpus, wanted = visible_gpus(), recipe.gpus
        if wanted == "auto":
            return cls(gpus)
        if wanted > len(gpus):
            there = f"there are {len(gpus)}" if len(gpus) > 1 else "there is one" if gpus else "there is none here"
            raise UsageError(f"gpus: {wanted} are asked for, and {there}; leave gpus out to use what there is")
        return cls(gpus[:wanted], wanted == len(gpus))

    @property
    def environment(self) -> Mapping[str, str]:
        """What a stage has to be told to see these GPUs alone."""
        return {} if self.are_all else only(self.gpus)

    def training(self, config: TrainConfig, student: ModelShape | None, adapters: int | None = None) -> Training:
        """How a student is trained here: with a whole copy on each GPU where that has memory for it, else sharded.

        Args:
            adapters: parameters of adapters, if these alone are trained.
        """
        if len(self.gpus) < 2:
            return Training()
        if student is not None:
            tokens = config.micro_batch_tokens or LEAST_TOKENS
            recomputed = bool(config.gradient_checkpointing)
            needed = train_memory(student, config.precision, tokens, recomputed=recomputed, adapters=adapters)
            if needed <= USABLE * memory_of_each(tuple(self.gpus)):
                return Training(min(len(self.gpus), config.batch_size))  # one without a pair would have nothing to do
        return Training(len(self.gpus), sharded=True)

    def training_of(self, config: TrainConfig) -> Training:
        """The same of a student that exists by now."""
        if len(self.gpus) < 2:
            return Training()
        from dpkd_offline.pipeline.shapes import adapter_count, shape_of  # which imports torch

        trusts = config.trust_remote_code
        adapters = adapter_count(config.student, config.lora_rank, config.lora_targets, trusts)
        return self.training(config, shape_of(config.student, trusts), adapters if config.lora_rank else None)

    def copies(self, config: ModelOptions, groups: int) -> int:
        """How many copies of a model share so many groups of requests."""
        if config.url or config.cluster != "none":
            return 1
        most = len(self.gpus) // config.gpus_of_a_copy if self.gpus else 1
        return max(1, min(most if config.replicas == "auto" else config.replicas, groups))

    def note(self, count: int, what: str = "") -> str:
        """So many of these GPUs, in words."""
        own = self.gpus[:count]
        numbers = [int(gpu) for gpu in own if gpu.isdecimal()]
        run = len(own) > 2 and numbers == list(range(numbers[0], numbers[0] + len(own))) if numbers else False
        names = f"{own[0]}-{own[-1]}" if run else ",".join(own)
        return f"GPU{'s' * (len(own) > 1)} {names}{': ' * bool(what)}{what}" if own else what
