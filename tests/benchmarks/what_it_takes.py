"""What distillation takes in memory and disk for models of some sizes, by the formulas of `distill --dry-run`.

    python tests/benchmarks/what_it_takes.py

Prints a Markdown table. Nothing is loaded or measured: the models are the numbers below, of Qwen2.5 Instruct and Llama.
Hours are not told, because nothing was measured on a GPU; `distill --dry-run` tells those of your machine.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dpkd_offline.common.markdown import markdown_table
from dpkd_offline.config.recipe import Recipe
from dpkd_offline.pipeline.dry_run import size_text
from dpkd_offline.pipeline.estimate import Estimate, Models, Work
from dpkd_offline.pipeline.memory import ModelShape
from dpkd_offline.pipeline.stages import plan
from dpkd_offline.pipeline.survey import PromptSurvey

B, M = 10**9, 10**6
#                         parameters    layers hidden intermediate keys vocabulary
SHAPES = {
    "0.5B": ModelShape(494 * M, 24, 896, 4864, 128, 151_936),
    "1.5B": ModelShape(1_544 * M, 28, 1536, 8960, 256, 151_936),
    "7B": ModelShape(7_616 * M, 28, 3584, 18_944, 512, 152_064),
    "8B": ModelShape(8_030 * M, 32, 4096, 14_336, 1024, 128_256),
    "32B": ModelShape(32_764 * M, 64, 5120, 27_648, 1024, 152_064),
    "70B": ModelShape(70_554 * M, 80, 8192, 28_672, 1024, 128_256),
}
PAIRS = (("7B", "0.5B"), ("7B", "1.5B"), ("32B", "1.5B"), ("70B", "8B"))
PROMPTS = (10_000, 100_000)
PROMPT_TOKENS, LONGEST_PROMPT, NEW_TOKENS = 128, 256, 256
MICRO_BATCH_TOKENS, BATCH_SIZE, TOP_K, DTYPE = 8192, 64, 50, "bfloat16"
STAGES = ("generate: teacher", "generate: student", "score-teacher", "train")


def works(teacher: str, student: str, prompts: int, *, top_k: int = 0, recompute: bool = False) -> dict[str, Work]:
    """The works of a recipe with these models, by their stages."""
    recipe = Recipe(
        teacher="teacher",
        student="student",
        output=Path("run"),
        generate={"prompts": "prompts.jsonl", "max_new_tokens": NEW_TOKENS, "dtype": DTYPE},
        score_teacher={"top_k": top_k, "dtype": DTYPE},
        train={
            "dtype": DTYPE,
            "micro_batch_tokens": MICRO_BATCH_TOKENS,
            "batch_size": BATCH_SIZE,
            "gradient_checkpointing": recompute,
        },
    )
    longest = LONGEST_PROMPT, LONGEST_PROMPT
    survey = PromptSurvey(prompts, prompts * PROMPT_TOKENS, *longest, prompts, 0, np.linspace(0, 1, prompts))
    models = Models(SHAPES[teacher], SHAPES[student])
    return {work.stage: work for work in Estimate(recipe, plan(recipe), survey, None, models).works()}


def memory_table() -> str:
    rows = []
    for teacher, student in PAIRS:
        stages = works(teacher, student, PROMPTS[0])
        memory = [stages[name].memory for name in STAGES]
        memory.append(works(teacher, student, PROMPTS[0], recompute=True)["train"].memory)
        rows.append([teacher, student, *map(size_text, memory), size_text(stages["train"].bytes)])
    return markdown_table(["teacher", "student", *STAGES, "train, recomputing", "disk of train"], rows)


def disk_table() -> str:
    rows = []
    for prompts in PROMPTS:
        sizes = []
        for top_k in (0, TOP_K):
            stages = works(*PAIRS[0], prompts, top_k=top_k)
            sizes.append(size_text(sum(stages[name].bytes or 0 for name in STAGES[:-1])))
        rows.append([f"{prompts:,}", f"{stages['score-teacher'].tokens:,}", *sizes])
    return markdown_table(["prompts", "tokens scored", "dataset", f"with the {TOP_K} likeliest tokens"], rows)


def main() -> None:
    print(f"Memory at least, of one process; {NEW_TOKENS} new tokens, micro batches of {MICRO_BATCH_TOKENS} tokens:\n")
    print(memory_table())
    print(f"\nDisk at most, before compression; prompts of {PROMPT_TOKENS} tokens, {NEW_TOKENS} new ones:\n")
    print(disk_table())


if __name__ == "__main__":
    main()
