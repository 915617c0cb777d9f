"""The students that a run writes: the best so far, and the model card."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dpkd_offline.common.files import disk_errors, find_model, fsync, write_json
from dpkd_offline.common.markdown import inline_code
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.dataset.card import template_options
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.training.distributed import Processes
from dpkd_offline.training.objectives import StepMetrics
from dpkd_offline.training.record import BestRecord


def student_card(
    config: TrainConfig, provenance: Mapping[str, Any], dataset: Dataset, steps: int, best: Mapping[str, Any]
) -> str:
    """The model card of a trained student, in Markdown.

    Args:
        provenance: what the run was made of, as training.json holds it.
        best: the step and the numbers of the best validation, if any.
    """
    settings = f"{config.objective}, {steps} steps of {config.batch_size}, learning rate {config.learning_rate}"
    if config.lora_rank:
        merged = ", merged" if config.lora_output == "merged" else ""
        settings += f", LoRA of rank {config.lora_rank} (α = {config.lora_alpha}) on {config.lora_targets}{merged}"
    teacher = ""
    if provenance["pairs"] is not None:
        models = provenance["pairs"].get("teachers") or [provenance["pairs"]["model"]]
        teacher = f"\nTeacher: {', '.join(map(_shown, models))}.\n"
    validated = ""
    if best:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in best.items() if name.startswith("val_"))
        validated = (
            f"\nOn held-out prompts, {config.holdout:.3g} of all, the best student by {best['by']} was that after step "
            f"{best['step']}, kept in `best/`: {numbers}.\n"
        )
    prompts = prompts_of_student(dataset)
    start, template = provenance["student"], f"{inline_code(prompts['template'])}{template_options(prompts)}"
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [dpkd-offline, {config.objective}]\n"
        f"---\n\n# {config.output.name}\n\nA student trained with dpkd-offline (Direct Preference Knowledge "
        f"Distillation, arXiv 2406.19774): {settings}.\n\nStarted from: {_shown(start)}.\n"
        f"{teacher}{validated}\nPrompt template: {template}. All settings are in `train.yaml`, the "
        f"course of the training in `metrics.jsonl`.\n"
    )


def prompts_of_student(dataset: Dataset) -> Mapping[str, Any]:
    """How the prompts were made that the student of a dataset sees."""
    return dataset.student_prompts.provenance() or dataset.prompt_set.as_dict()


def _shown(model: Mapping[str, str]) -> str:
    return f"{inline_code(model['name'])} ({inline_code(model['revision'][:19])})"


VALIDATION = "validation.json"  # of the best student, in its folder


class Best:
    """output/best: the student of the best validation so far, with its numbers in validation.json.

    The folder is replaced by a whole one or not at all, so that a run that goes on from an earlier checkpoint knows
    from it what the best was, and number and weights are always of each other. The first process reads and writes.
    """

    def __init__(self, output: Path, run: str, processes: Processes) -> None:
        self.folder, self._run, self._processes = output / "best", run, processes
        self._new, self._old = output / ".best-new", output / ".best-old"
        self.record: dict[str, Any] = {}  # step, by what number it is the best, all numbers; empty before the first

    @classmethod
    def open(cls, output: Path, run: str, resume: bool, processes: Processes) -> Best:
        """What lies in an output folder; where a run is to `resume`, the best that it had counts."""
        best = cls(output, run, processes)
        if processes.first:
            best._mend()
            record = find_model(best.folder / VALIDATION, BestRecord) if resume else None
            if record is not None and record.run == run:
                best.record = record.model_dump()
        return best

    def _mend(self) -> None:
        """After a process that was killed between two renames."""
        with disk_errors(self.folder):
            for whole in (self._new, self._old):
                if (whole / VALIDATION).exists() and not self.folder.exists():
                    whole.rename(self.folder)
                if whole.exists():
                    shutil.rmtree(whole)

    def offer(self, step: int, metrics: StepMetrics, by: str, save_student: Callable[[Path, int], None]) -> bool:
        """Keep the student as it is now, if it is better by the number `by` of its metrics. Returns whether it is.

        All processes call it; `save_student` writes the student into a folder.
        """
        sign = -1 if by in ("val_forward_kl", "val_loss_kd") else 1

        def rank(numbers: Mapping[str, Any]) -> tuple[float, float]:
            return sign * numbers[by], -numbers["val_loss_kd"]  # where two are equal, as Rouge-L may be, the loss

        better = self._processes.first and (not self.record or rank(metrics) > rank(self.record))
        if not self._processes.sum({"better": float(better)})["better"]:
            return False
        self.record = {"run": self._run, "step": step, "by": by, **metrics}
        save_student(self._new, step)
        if self._processes.first:
            write_json(self._new / VALIDATION, self.record)  # last: with it the folder is whole
            self._replace()
        return True

    def _replace(self) -> None:
        """Give the new best its name. Where an older one cannot be removed, the next best tries again."""
        with disk_errors(self.folder):
            if self._old.exists():
                shutil.rmtree(self._old)
            if self.folder.exists():
                self.folder.rename(self._old)
            self._new.rename(self.folder)
            fsync(self.folder.parent)
        shutil.rmtree(self._old, ignore_errors=True)

    def publish(self) -> None:
        """Make the best student that of the run: it stands in the output folder too."""
        with disk_errors(self.folder.parent):
            for path in self.folder.iterdir():
                place = self.folder.parent / path.name
                if path.is_dir():  # of further chat templates
                    fsync(Path(shutil.copytree(path, place, dirs_exist_ok=True)))
                elif path.name != VALIDATION:
                    fsync(Path(shutil.copyfile(path, place)))
            fsync(self.folder.parent)
