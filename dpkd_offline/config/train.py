"""Configs of `train` and `init-student`. What belongs to the objective: config/objectives.py."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from dpkd_offline.common.precision import fast_dtype
from dpkd_offline.config.base import CodeOptions, Config, DatasetPlace, Folder, PairOptions, Source, Trackers
from dpkd_offline.config.objectives import OBJECTIVES, Y_T, ObjectiveOptions


class PairLengthOptions(PairOptions):
    """Which pairs are trained on."""

    max_length: int = Field(1024, gt=1, description="Drop pairs with more tokens of prompt plus response.")


class CorpusOptions(Config):
    """The language-modelling loss beside the objective."""

    panel: ClassVar[str] = "Language modelling"

    lm_corpus: Source | None = Field(
        None, description="Corpus of a language-modelling loss: a source as of prompts, with a column text."
    )
    lm_weight: float = Field(0.5, ge=0, description="λ, the weight of that loss.")
    lm_length: int = Field(256, gt=1, description="Tokens in a block of the corpus.")
    lm_batch_size: int = Field(4, gt=0, description="Blocks of the corpus in an optimiser step.")

    @model_validator(mode="after")
    def _weight_of_a_corpus(self) -> Self:
        if self.lm_corpus is None and self.lm_weight != type(self).model_fields["lm_weight"].default:
            raise ValueError("lm_weight is that of lm_corpus, which is not given")
        return self


class OptimisationOptions(Config):
    """How long and how fast a student is trained."""

    panel: ClassVar[str] = "Optimisation"

    epochs: int = Field(3, gt=0, description="Passes over the data.")
    max_steps: int | None = Field(None, gt=0, description="Number of optimiser steps, instead of epochs.")
    batch_size: int = Field(8, gt=0, description="Pairs in an optimiser step, of all processes together.")
    learning_rate: float = Field(5e-5, gt=0, description="Peak of the cosine schedule.")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="Share of the steps in which the rate rises to its peak.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay of AdamW. Only matrices decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Clip gradients to this norm.")
    seed: int = Field(0, ge=0, description="Seed of the order of the pairs, and of new adapters.")


# By the type of device: on a CPU enough for the products, on a GPU for the time that it takes to start its kernels,
# where no trial chooses (training/memory.py).
MICRO_BATCH_TOKENS = {"cpu": 640, "cuda": 8192}
MOMENT_BYTES = {"float32": 8, "bfloat16": 4, "int8": 2}  # of both moments of a trained parameter, by their dtype


class MemoryOptions(Config):
    """What a step takes in memory and time."""

    panel: ClassVar[str] = "Memory and speed"

    micro_batch_tokens: int | None = Field(
        None,
        gt=0,
        description="Most tokens in a forward pass, by default 640 on a CPU, and on a GPU as many as a trial finds "
        "room for, up to 32768. Memory grows with it.",
    )
    gradient_checkpointing: bool | None = Field(
        None,
        description="Compute activations again in the backward pass. Takes less memory and a third more time. By "
        "default on where a GPU has no room for the longest pair without it.",
    )
    compile: bool | None = Field(
        None,
        description="Compile the layers with torch.compile. Takes a minute, then saves time and memory per step. By "
        "default on for 100 steps or more on a GPU, where a C compiler is there.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Precision of matrix products. auto: bfloat16, or float32 on a machine that is slow in it. Master "
        "weights and reductions are float32 in either.",
    )
    moments_dtype: Literal["float32", "bfloat16", "int8"] = Field(
        "float32",
        description="How AdamW stores its two moments of each matrix: in 8, 4 or 2 bytes a parameter. Fewer than 8 are "
        "rounded at random.",
    )


class LoraOptions(Config):
    """Adapters, trained in place of the model."""

    panel: ClassVar[str] = "LoRA"

    lora_rank: int = Field(
        0, ge=0, description="Train LoRA adapters of this rank and leave the model as it is. 0: train the model."
    )
    lora_alpha: float = Field(16, gt=0, description="Scale of the adapters: they are multiplied by alpha / rank.")
    lora_targets: str = Field(
        "all-linear", description="Layers that get adapters: all-linear (all but the head), or names: q_proj,v_proj."
    )
    lora_output: Literal["merged", "adapter"] = Field(
        "merged", description="merged: write a model like any other. adapter: write the adapters alone, for PEFT."
    )

    @model_validator(mode="after")
    def _adapters_to_write(self) -> Self:
        if self.lora_output == "adapter" and not self.lora_rank:
            raise ValueError("lora_output 'adapter' needs adapters: set lora_rank, such as to 16")
        return self


class ValidationOptions(Config):
    """What is measured on prompts that are not trained on."""

    panel: ClassVar[str] = "Validation"

    holdout: float = Field(
        0.05, ge=0, lt=1, description="Share of the prompts to validate on and not train on, drawn by their ids."
    )
    validate_every: int | None = Field(
        None,
        gt=0,
        description="Steps between validations; by default an epoch. One comes before training, and one after.",
    )
    validate_limit: int = Field(256, gt=0, description="Most held-out pairs that a validation reads.")
    validate_rouge: int = Field(
        0, ge=0, description="Answer N held-out prompts greedily, and compare with the references by Rouge-L."
    )
    validate_max_new_tokens: int = Field(256, gt=0, description="Longest of these answers, in tokens.")
    validate_responses: int = Field(
        16, ge=0, description="Answer N held-out prompts greedily, to see whether responses end or repeat themselves."
    )
    stop_when_ruined: bool = Field(
        False,
        description="Stop when held-out prompts show that the student got worse. The result is the best student.",
    )

    @model_validator(mode="after")
    def _something_to_validate_on(self) -> Self:
        if not self.holdout and (self.validate_rouge or self.validate_every or self.stop_when_ruined):
            raise ValueError("validation needs held-out prompts: set holdout, such as to 0.05")
        return self


class RegenerationOptions(Config):
    """When the student answers the prompts anew, while it is trained."""

    panel: ClassVar[str] = "Rounds"

    regenerate_every: int | None = Field(
        None, gt=0, description="Every N steps, wait for a new round of the student's responses."
    )
    regenerate_epochs: int | None = Field(None, gt=0, description="Every N epochs, wait for a new round.")
    regenerate_above: float | None = Field(
        None,
        gt=0,
        description="Wait for a new round when the drift, the KL from the student that sampled, is above X nats per "
        "token.",
    )
    regenerate_rounds: int = Field(3, gt=0, description="Most rounds after the first.")
    replay: float = Field(0.0, ge=0, lt=1, description="Share of the pairs that come from earlier rounds.")
    drift_every: int | None = Field(
        None, gt=0, description="Measure the drift every N steps; by default 20 with rounds, else never."
    )
    drift_pairs: int = Field(64, gt=1, description="Number of pairs on which the drift is measured; always the same.")

    @property
    def regenerates(self) -> bool:
        """Whether later rounds of the student's responses are waited for."""
        return any((self.regenerate_every, self.regenerate_epochs, self.regenerate_above))


class SavingOptions(Config):
    """What is written besides the student."""

    panel: ClassVar[str] = "Saving and logging"

    save_minutes: float = Field(10, gt=0, description="Save a checkpoint when the last is this old.")
    save_every: int | None = Field(None, gt=0, description="Also save one every N steps.")
    resume: bool = Field(True, description="Go on from the checkpoint in the output folder, if there is one.")
    track: Trackers = Field((), description="Also log to these trackers, comma-separated: tensorboard, wandb, trackio.")


class TrainConfig(
    CodeOptions,
    SavingOptions,
    RegenerationOptions,
    ValidationOptions,
    PairLengthOptions,
    LoraOptions,
    MemoryOptions,
    OptimisationOptions,
    CorpusOptions,
    ObjectiveOptions,
):
    """Train a student, without the teacher.

    Reads the pairs of a dataset, and minimises the loss of DPKD (eq. 9), one of its variants, or a baseline. A repeated
    call goes on from the last checkpoint.
    """

    dataset: DatasetPlace = Field(description="The dataset directory, or the URL of one (s3://, gs://, hf://, ...).")
    student: str = Field(description="Model folder or Hub name to start from.")
    output: Folder = Field(description="Folder of the trained model, metrics and checkpoints.")

    @property
    def precision(self) -> Literal["float32", "bfloat16"]:
        """`dtype`, chosen by the machine where it is auto."""
        return fast_dtype() if self.dtype == "auto" else self.dtype

    @property
    def due(self) -> Path:
        """Where `train` writes which round it waits for.

        A JSON object: the `round`, the `step` where it begins, and the `student`, a folder beside this file, that is to
        answer the prompts.
        """
        return self.output / "rounds" / "due.json"

    @model_validator(mode="after")
    def _one_reason_for_rounds(self) -> Self:
        reasons = (self.regenerate_every, self.regenerate_epochs, self.regenerate_above)
        if sum(value is not None for value in reasons) > 1:
            raise ValueError("give one of regenerate_every, regenerate_epochs and regenerate_above")
        without_y_s = OBJECTIVES[self.objective].data == "references" or self.responses == "teacher"
        if without_y_s and (self.regenerates or self.drift_every):
            raise ValueError("without y_s there is no drift and no round of them")
        if self.regenerates and OBJECTIVES[self.objective].sides == Y_T:
            raise ValueError(f"objective '{self.objective}' reads y_t alone, so that new y_s change nothing")
        if self.replay and not self.regenerates:
            raise ValueError("replay is of earlier rounds; give one of regenerate_every, _epochs and _above, too")
        if self.regenerates and self.lora_output == "adapter":
            raise ValueError("rounds need a model that generates: take lora_output 'merged'")
        return self


class InitStudentConfig(CodeOptions):
    """Cut a shallower student from the teacher.

    Keeps evenly spaced layers, the embeddings and the head. For when there is no small model of the teacher's family.
    """

    teacher: str = Field(description="Model folder or Hub name.")
    output: Folder = Field(description="Folder of the new student.")
    layers: int = Field(gt=0, description="Layers to keep. The first and the last always stay.")
