"""Cards: README.md of a dataset, for people, for the Hub and for `datasets.load_dataset`, and that of a student."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dpkd_offline.config import TrainConfig
from dpkd_offline.dataset import Dataset
from dpkd_offline.files import read_json, sweep_folder, write_atomically

TABLES = {
    "pairs": "pairs/*",
    "top_k": "top_k/*",
    "prompts": "prompts",
    "teacher_responses": "responses/teacher",
    "student_responses": "responses/student/*",
}
CARD = """---
{front}
---

# Precomputed distillation data

{rows} prompts in {shards} shards, made by dpkd-offline: responses of a teacher and a student, and the teacher's
log-probs of both. Prompts come from {source}, template {template}, tokenizer {tokenizer}.

| table | made by |
|---|---|
{tables}

Train a student on it, without the teacher: `dpkd-offline train --dataset THIS_FOLDER --student MODEL --output FOLDER`.
"""


def write_card(dataset: Dataset) -> None:
    """Say what the dataset holds now. A pure function of its other files, so that any worker may write it."""
    root = dataset.root
    assert isinstance(root, Path), f"{root}: what is at a URL is read only"
    there = {name: where for name, where in TABLES.items() if any(root.glob(f"{where}/*.parquet"))}
    configs = [
        {"config_name": name, "data_files": [{"split": "train", "path": f"{where}/*.parquet"}]}
        for name, where in there.items()
    ]
    front = {"configs": configs, "tags": ["dpkd-offline", "knowledge-distillation", "preference"]}
    text = CARD.format(
        front=yaml.safe_dump(front, sort_keys=False).strip(),
        rows=dataset.plan.rows,
        shards=dataset.plan.count,
        tables="\n".join(f"| {name} | {_made_by(root, where)} |" for name, where in there.items()),
        source=dataset.prompt_set.source,
        template=dataset.prompt_set.template,
        tokenizer=dataset.prompt_set.tokenizer,
    )
    path = root / "README.md"
    if not path.exists() or path.read_bytes() != text.encode():
        write_atomically(path, text.encode())
    sweep_folder(root)


def _made_by(root: Path, where: str) -> str:
    """Who made the tables of a kind, in a line."""
    said = []
    for path in sorted(root.glob(f"{where}/_table.json")):
        made = read_json(path)
        if made.get("stage") == "import":
            said.append(f"{path.parent.name}: imported from {made['source']}")
            continue
        who = f"{made['model']['name']} ({made['model']['revision'][:19]})"
        said.append(f"{path.parent.name}: {who}, {made['engine']}, {made['dtype']}")
    return "; ".join(said) or "the source's rows, rendered and tokenised"


def student_card(
    config: TrainConfig, made: dict[str, Any], dataset: Dataset, steps: int, best: Mapping[str, Any]
) -> str:
    """The model card of a trained student; `best` are the step and the numbers of the best validation, if any."""
    how = f"{config.objective}, {steps} steps of {config.batch_size}, learning rate {config.learning_rate}"
    if config.lora_rank:
        merged = ", merged" if config.lora_output == "merged" else ""
        how += f", LoRA of rank {config.lora_rank} (α = {config.lora_alpha}) on {config.lora_targets}{merged}"
    teacher = ""
    if made["pairs"] is not None:
        by = made["pairs"]["model"]
        teacher = f"\nTeacher: {by['name']} ({by['revision'][:19]}).\n"
    validated = ""
    if best:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in best.items() if name.startswith("val_"))
        validated = (
            f"\nOn held-out prompts, {config.holdout:.3g} of all, the best student by {best['by']} was that after step "
            f"{best['step']}, kept in `best/`: {numbers}.\n"
        )
    start = made["student"]
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [dpkd-offline, {config.objective}]\n"
        f"---\n\n# {config.output.name}\n\nA student trained with dpkd-offline (Direct Preference Knowledge "
        f"Distillation, arXiv 2406.19774): {how}.\n\nStarted from: {start['name']} ({start['revision'][:19]}).\n"
        f"{teacher}{validated}\nPrompt template: {dataset.prompt_set.template}. All settings are in `train.yaml`, the "
        f"course of the training in `metrics.jsonl`.\n"
    )
