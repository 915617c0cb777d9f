"""Configs of `train` and `init-student`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from dpkd_offline.config.base import Config, DatasetPlace, Folder, ObjectiveName, Source, StudentName, Trackers

PAIRWISE = ("dpkd", "dpkd-sum", "ipo", "cpo", "simpo")  # which compare y_t and y_s
SUMS = ("dpkd-sum", "cpo", "dpkd-token")  # whose β is not of means over tokens


class TrainConfig(Config):
    """Train a student, without the teacher.

    DPKD (eq. 9) on the pairs of a dataset, its variants, or the baselines of the paper on the same data.
    """

    dataset: DatasetPlace = Field(description="The dataset directory, or the URL of one (s3://, gs://, hf://, ...).")
    student: str = Field(description="Model folder or Hub name to start from.")
    output: Folder = Field(description="Folder of the trained model, metrics and checkpoints.")
    objective: ObjectiveName = Field("dpkd", description="What is minimised; the README says what each is.")
    beta: float = Field(
        2.0,
        gt=0,
        description="β of the objective and of the rewards in metrics.jsonl; for dpkd-sum, cpo and dpkd-token 0.1.",
    )
    tau: float = Field(0.1, gt=0, description="τ of ipo: the logratios of a pair are drawn to a gap of 1/(2τ) nats.")
    gamma: float = Field(0.5, ge=0, description="γ of simpo: the margin that it asks for, β times nats per token.")
    responses: Literal["pairs", "teacher"] = Field(
        "pairs", description="What seqkd reads: pairs, or y_t alone, as soon as generate has sampled it."
    )
    off_policy: Literal["token", "none"] = Field(
        "token",
        description="token: weight the gradient of each token of y_s by min(q/b, 5), q the student now and b the one "
        "that sampled it, so that stored y_s stand for new ones. none: as if they were new.",
    )
    chosen_nll_weight: float = Field(
        1.0,
        ge=0,
        description="Weight of -log q(y_t)/|y_t| beside an objective of pairs; for cpo, which has such a term, 0.",
    )
    lm_corpus: Source | None = Field(None, description="Text of the language-modelling loss: JSONL or Parquet, 'text'.")
    lm_weight: float = Field(0.5, ge=0, description="λ, the weight of the language-modelling loss on lm-corpus.")
    lm_length: int = Field(256, gt=1, description="Tokens a block of lm-corpus.")
    lm_batch_size: int = Field(4, gt=0, description="Blocks of lm-corpus an optimiser step.")
    epochs: int = Field(3, gt=0, description="Passes over the data.")
    max_steps: int | None = Field(None, gt=0, description="Number of optimiser steps, instead of epochs.")
    batch_size: int = Field(8, gt=0, description="Pairs an optimiser step, of all processes together.")
    micro_batch_tokens: int = Field(
        640, gt=0, description="Most tokens a forward pass; memory grows with it. On a GPU take as many as fit."
    )
    gradient_checkpointing: bool = Field(
        False, description="Make each layer's activations again in the backward pass: less memory, a third more time."
    )
    compile: bool = Field(
        False, description="Compile the layers with torch.compile: a minute first, then less time and memory a step."
    )
    learning_rate: float = Field(5e-5, gt=0, description="Peak of the cosine schedule.")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="Share of the steps that warm up linearly.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's, on matrices only.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient clipping.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="Precision of the products; master weights and reductions are float32 in either."
    )
    lora_rank: int = Field(
        0, ge=0, description="Train LoRA adapters of this rank and leave the model as it is; 0: train the model."
    )
    lora_alpha: float = Field(16, gt=0, description="What the adapters add is scaled by lora-alpha / lora-rank.")
    lora_targets: str = Field(
        "all-linear", description="Layers that get adapters: all-linear (but the head), or names such as q_proj,v_proj."
    )
    lora_output: Literal["merged", "adapter"] = Field(
        "merged", description="merged: a model like any other. adapter: the adapters alone, for PEFT."
    )
    seed: int = Field(0, ge=0, description="Seed of the order of the pairs, and of the first adapters.")
    student_name: StudentName = Field(None, description="Whose pairs, of the dataset's further students.")
    round: int | None = Field(None, ge=0, description="Round of pairs; by default the latest.")
    truncated: Literal["keep", "drop"] = Field("keep", description="Pairs with a response cut off by its length.")
    max_length: int = Field(1024, gt=1, description="Drop pairs with more tokens of prompt plus response.")
    holdout: float = Field(
        0.05, ge=0, lt=1, description="Share of the prompts, chosen by their ids, that is kept for validation alone."
    )
    validate_every: int | None = Field(
        None, gt=0, description="Steps between validations; by default an epoch. Also before the first and at the end."
    )
    validate_limit: int = Field(256, gt=0, description="Most held-out pairs that a validation reads.")
    validate_rouge: int = Field(
        0, ge=0, description="Held-out prompts to answer greedily, for Rouge-L with their references; 0: none."
    )
    validate_max_new_tokens: int = Field(256, gt=0, description="Longest answer, in tokens.")
    validate_responses: int = Field(
        16, ge=0, description="Held-out prompts to answer greedily, to see whether responses end or repeat; 0: none."
    )
    stop_when_ruined: bool = Field(
        False, description="Stop where held-out prompts say that the student got worse; the best one is the result."
    )
    regenerate_every: int | None = Field(
        None, gt=0, description="Steps between rounds of the student's responses: then it waits for the next one."
    )
    regenerate_epochs: int | None = Field(None, gt=0, description="The same in epochs.")
    regenerate_above: float | None = Field(
        None, gt=0, description="The same where the drift is larger: KL from the student that sampled, nats a token."
    )
    regenerate_rounds: int = Field(3, gt=0, description="At most so many rounds after the first.")
    replay: float = Field(0.0, ge=0, lt=1, description="Share of the pairs that come from earlier rounds.")
    drift_every: int | None = Field(
        None, gt=0, description="Steps between measures of the drift; by default 20 where there are rounds, else none."
    )
    drift_pairs: int = Field(64, gt=1, description="Pairs on which the drift is measured, always the same ones.")
    track: Trackers = Field((), description="Also log to these, comma-separated: tensorboard, wandb, trackio.")
    save_every: int = Field(100, gt=0, description="Steps between checkpoints.")
    save_minutes: float = Field(30, gt=0, description="Also a checkpoint where the last is this old.")
    resume: bool = Field(True, description="Go on from the output's checkpoint, if there is one.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_objective(cls, values: dict[str, Any]) -> dict[str, Any]:
        objective = values.get("objective", "dpkd")
        own: dict[str, Any] = {"beta": 0.1} if objective in SUMS else {}
        if objective == "cpo" or objective not in PAIRWISE:
            own["chosen_nll_weight"] = 0.0
        if objective not in PAIRWISE:
            own["off_policy"] = "none"
        return {**own, **values}

    @model_validator(mode="after")
    def _what_only_pairs_have(self) -> Self:
        if self.objective not in PAIRWISE and (self.chosen_nll_weight or self.off_policy != "none"):
            raise ValueError(
                f"objective '{self.objective}' does not compare y_t with y_s, so that it has no off_policy and no "
                f"chosen_nll_weight"
            )
        return self

    @model_validator(mode="after")
    def _something_to_validate_on(self) -> Self:
        if not self.holdout and (self.validate_rouge or self.validate_every or self.stop_when_ruined):
            raise ValueError("validation needs held-out prompts: set holdout, such as to 0.05")
        return self

    @property
    def due(self) -> Path:
        """Where `train` says which round it waits for: its `round`, the `step` where that begins, and the `student`,
        a folder beside this file, that is to answer the prompts."""
        return self.output / "rounds" / "due.json"

    @property
    def regenerates(self) -> bool:
        """Whether later rounds of the student's responses are waited for."""
        return any((self.regenerate_every, self.regenerate_epochs, self.regenerate_above))

    @model_validator(mode="after")
    def _one_reason_for_rounds(self) -> Self:
        given = (self.regenerate_every, self.regenerate_epochs, self.regenerate_above)
        if sum(value is not None for value in given) > 1:
            raise ValueError("give one of regenerate_every, regenerate_epochs and regenerate_above")
        if self.responses == "teacher" and self.objective != "seqkd":
            raise ValueError(f"objective '{self.objective}' needs pairs; seqkd alone reads the teacher's responses")
        if (self.objective == "sft" or self.responses == "teacher") and (self.regenerates or self.drift_every):
            raise ValueError("without y_s there is no drift and no round of them")
        if self.regenerates and self.lora_output == "adapter":
            raise ValueError("rounds need a model that generates: take lora_output 'merged'")
        return self


class InitStudentConfig(Config):
    """Cut a shallower student from the teacher.

    Evenly spaced layers stay, with embeddings and head: where a user without a small sibling model starts.
    """

    teacher: str = Field(description="Model folder or Hub name.")
    output: Folder = Field(description="Folder of the new student.")
    layers: int = Field(gt=0, description="Layers to keep; the first and the last always stay.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
