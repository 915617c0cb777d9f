"""Config of `judge`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from dpkd_offline.config.base import Folder, ModelOptions, TemplateArgs, Urls

Form = Literal["pairwise", "score"]


class JudgeConfig(ModelOptions):
    """Let a model judge the responses of evaluations.

    pairwise: which of two evaluations has the better response to each prompt, asked in both orders. score: how good
    each response is beside its reference, from 1 to 10. The judge is a model that an engine runs (--model), or one
    behind an OpenAI-compatible chat endpoint (--judge-model with --url), whose key is read from OPENAI_API_KEY, or else
    VLLM_API_KEY.
    """

    a: Folder = Field(description="Output folder of evaluate: the responses whose win rate or score is reported.")
    b: Folder | None = Field(None, description="That of another model with the same prompts (form pairwise).")
    output: Folder | None = Field(
        None, description="Folder of verdicts.jsonl and results.json; by default A-vs-B or A-scored, beside A."
    )
    form: Form = Field("pairwise", description="Compare A with B, or score A beside its references.")
    model: str | None = Field(None, description="The judge: model folder or Hub name, run by --engine.")
    judge_model: str | None = Field(None, description="The judge: its name at the chat endpoint of --url.")
    url: Urls = Field(
        (),
        description="Base URLs, comma-separated: of chat endpoints with --judge-model, of vLLM servers with --model.",
    )
    limit: int | None = Field(None, gt=0, description="Judge the responses to the first N prompts only.")
    max_new_tokens: int = Field(
        16, gt=0, description="Longest answer of a chat endpoint, in tokens. A judge that thinks first needs thousands."
    )
    template_args: TemplateArgs = Field(
        None,
        exclude_if=lambda value: not value,
        description="What the judge's chat template is told besides, a JSON object such as "
        "'{\"enable_thinking\": false}'.",
    )
    max_length: int = Field(
        4096, gt=1, description="Longest question to the judge with its verdict, in tokens (with --model)."
    )
    dry_run: bool = Field(False, description="Only count the calls and tokens that are still needed.")

    @model_validator(mode="after")
    def _one_judge(self) -> Self:
        if (self.model is None) == (self.judge_model is None):
            raise ValueError("name the judge: either model (which an engine runs) or judge_model (with url)")
        if self.judge_model is not None and not self.url:
            raise ValueError("judge_model needs url, the base URL of a chat endpoint")
        if self.judge_model is not None and (self.engine != "auto" or self.cluster != "none"):
            raise ValueError("engine and cluster are for model; judge_model is behind the chat endpoint of url")
        return self

    @model_validator(mode="after")
    def _what_is_judged(self) -> Self:
        if self.form == "pairwise" and self.b is None:
            raise ValueError("form 'pairwise' compares two evaluations: give B, too; or take form 'score'")
        if self.form == "score" and self.b is not None:
            raise ValueError("form 'score' judges A beside its references: leave B out")
        return self

    @property
    def folder(self) -> Path:
        """The output folder."""
        if self.output is not None:
            return self.output
        a = self.a.absolute()
        return self.a.parent / (f"{a.name}-scored" if self.b is None else f"{a.name}-vs-{self.b.absolute().name}")
