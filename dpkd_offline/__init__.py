"""dpkd-offline: Direct Preference Knowledge Distillation, data first, then training (arXiv 2406.19774)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpkd_offline.config import (
        EvaluateConfig,
        GenerateConfig,
        InitStudentConfig,
        Recipe,
        ScoreTeacherConfig,
        TrainConfig,
    )
    from dpkd_offline.distillation import distill
    from dpkd_offline.evaluation import evaluate
    from dpkd_offline.generation import generate
    from dpkd_offline.losses import dpkd_loss
    from dpkd_offline.scoring import score_teacher
    from dpkd_offline.students import init_student
    from dpkd_offline.training import train

__version__ = "0.1.0"

# Imported on first use: `import dpkd_offline` must not wait for torch.
_HOME = {
    "EvaluateConfig": "config",
    "GenerateConfig": "config",
    "InitStudentConfig": "config",
    "Recipe": "config",
    "ScoreTeacherConfig": "config",
    "TrainConfig": "config",
    "distill": "distillation",
    "dpkd_loss": "losses",
    "evaluate": "evaluation",
    "generate": "generation",
    "init_student": "students",
    "score_teacher": "scoring",
    "train": "training",
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
    if name in _HOME:
        return getattr(import_module(f"dpkd_offline.{_HOME[name]}"), name)
    raise AttributeError(f"module 'dpkd_offline' has no attribute '{name}'")
