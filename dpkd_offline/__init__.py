"""dpkd-offline: Direct Preference Knowledge Distillation, data first, then training (arXiv 2406.19774)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpkd_offline.config.data import GenerateConfig, ScoreTeacherConfig
    from dpkd_offline.config.evaluate import EvaluateConfig
    from dpkd_offline.config.recipe import Recipe
    from dpkd_offline.config.train import InitStudentConfig, TrainConfig
    from dpkd_offline.evaluation.evaluate import evaluate
    from dpkd_offline.generation.generate import generate
    from dpkd_offline.generation.score_teacher import score_teacher
    from dpkd_offline.pipeline.distill import distill
    from dpkd_offline.training.init_student import init_student
    from dpkd_offline.training.losses import dpkd_loss
    from dpkd_offline.training.trainer import train

# Imported on first use: `import dpkd_offline` must not wait for torch.
_HOME = {
    "EvaluateConfig": "config.evaluate",
    "GenerateConfig": "config.data",
    "InitStudentConfig": "config.train",
    "Recipe": "config.recipe",
    "ScoreTeacherConfig": "config.data",
    "TrainConfig": "config.train",
    "distill": "pipeline.distill",
    "dpkd_loss": "training.losses",
    "evaluate": "evaluation.evaluate",
    "generate": "generation.generate",
    "init_student": "training.init_student",
    "score_teacher": "generation.score_teacher",
    "train": "training.trainer",
}

__all__ = [
    "EvaluateConfig",
    "GenerateConfig",
    "InitStudentConfig",
    "Recipe",
    "ScoreTeacherConfig",
    "TrainConfig",
    "distill",
    "dpkd_loss",
    "evaluate",
    "generate",
    "init_student",
    "score_teacher",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("dpkd-offline")
    if name in _HOME:
        return getattr(import_module(f"dpkd_offline.{_HOME[name]}"), name)
    raise AttributeError(f"module 'dpkd_offline' has no attribute '{name}'")
