"""The registry of objectives: what each minimises, reads, reports, and lets a user set. It imports no torch.

To add an objective, write its equation in `training/losses.py` and its entry here. The parameters of the equation name
what it reads (the names: `TENSORS` in `training/objectives.py`) and its settings. Help, choices, defaults, validation,
preflight, dry run and wiring follow from the entry. A setting that no other objective has becomes a field of
`ObjectiveOptions`, below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from dpkd_offline.config.base import Config, in_words

PAIR, Y_T, Y_S = (0, 1), (0,), (1,)  # the sides of dataset/schema.py: chosen, rejected

LOGPS_T, LOGPS_S = ("logps_chosen", "reward_chosen"), ("logps_rejected", "reward_rejected", "drift")
KLS, WEIGHTS = ("forward_kl", "reverse_kl"), ("weight", "clipped")


@dataclass(frozen=True)
class ObjectiveInfo:
    """An objective without its equation: all that is known of it before a model is loaded."""

    name: str
    help: str  # what it minimises, and when one takes it
    source: str  # paper and equation
    equation: str  # the function in training/losses.py
    per: Literal["pair", "token"]  # what the loss of a batch is the mean over
    sides: tuple[int, ...]  # the responses that it reads
    reports: tuple[str, ...]  # its own numbers in metrics.jsonl
    data: Literal["pairs", "references", "responses"] = "pairs"  # the last: y_t as generate stored it, without pairs
    responses_suffice: bool = False  # whether it can do with y_t alone
    top_k: bool = False  # whether it reads the teacher's likeliest tokens
    best: bool = False  # whether it reads the student's
    behavior: bool = False  # whether it reads log-probs under the student that sampled
    measures: bool = False  # whether its loss says how far the student is from what it is taught, in nats a token
    off_policy: bool = False  # whether the gradient of y_s is corrected for who sampled it, where that is stored
    settings: Mapping[str, float | str] = field(default_factory=dict)  # its own, with their defaults


_of_pairs = partial(
    ObjectiveInfo, per="pair", sides=PAIR, off_policy=True, reports=(*LOGPS_T, *LOGPS_S, "margin", "accuracy", *WEIGHTS)
)
_of_tokens = partial(ObjectiveInfo, per="token", sides=Y_T, reports=LOGPS_T)
_of_likeliest = partial(_of_tokens, top_k=True, reports=(*LOGPS_T, *KLS))
_of_both = partial(
    ObjectiveInfo,
    per="pair",
    sides=PAIR,
    top_k=True,
    measures=True,
    reports=(*LOGPS_T, *LOGPS_S, "margin", "accuracy", *KLS),
)
HALF: dict[str, float | str] = {"student_share": 0.5}
ON: dict[str, float | str] = {"off_policy": "token", "chosen_nll_weight": 1.0}  # what stored y_s need

OBJECTIVES: dict[str, ObjectiveInfo] = {
    info.name: info
    for info in (
        _of_pairs(
            name="dpkd",
            help="Makes y_t likelier than y_s, per token and relative to the teacher. The default.",
            source="DPKD, eq. 9, arXiv 2406.19774",
            equation="dpkd_loss",
            settings={"beta": 2.0, **ON},
        ),
        _of_pairs(
            name="dpkd-sum",
            help="dpkd without division by lengths, so that long responses count more. To compare with the paper.",
            source="DPKD, eq. 8, arXiv 2406.19774",
            equation="dpkd_sum_loss",
            settings={"beta": 0.1, **ON},
        ),
        _of_pairs(
            name="ipo",
            help="Pulls the gap between y_t and y_s, relative to the teacher, to 1/(2 tau) nats and no further.",
            source="IPO, arXiv 2310.12036; DPKD, table 2",
            equation="ipo_loss",
            settings={"tau": 0.1, **ON},
        ),
        _of_pairs(
            name="cpo",
            help="Makes y_t likelier than y_s, and y_t likely as such. Does without the teacher's log-probs.",
            source="CPO, arXiv 2401.08417; DPKD, table 2",
            equation="cpo_loss",
            settings={"beta": 0.1, **ON, "chosen_nll_weight": 0.0},  # its equation has such a term
        ),
        _of_pairs(
            name="simpo",
            help="Makes y_t likelier than y_s per token, by a margin gamma. Does without the teacher's log-probs.",
            source="SimPO, arXiv 2405.14734; DPKD, table 2",
            equation="simpo_loss",
            settings={"beta": 2.0, "gamma": 0.5, **ON},
        ),
        _of_likeliest(
            name="dpkd-token",
            help="Compares the likeliest tokens of teacher and student, as the authors' code does. To compare with it.",
            source="the code of DPKD's authors",
            equation="dpkd_token_loss",
            best=True,
            reports=(*LOGPS_T, *KLS, "argmax_same", "argmax_stored"),
            settings={"beta": 0.1},
        ),
        _of_tokens(
            name="sft",
            help="Teaches the references of the prompts. The first fine-tuning of a student.",
            source="maximum likelihood",
            equation="token_nll",
            data="references",
            measures=True,
            reports=("logps_chosen",),
        ),
        _of_tokens(
            name="seqkd",
            help="Teaches the teacher's responses y_t. Take it first for a student that is far from its teacher.",
            source="sequence-level distillation, arXiv 1606.07947",
            equation="token_nll",
            responses_suffice=True,
            measures=True,
        ),
        _of_likeliest(
            name="kd",
            help="Matches the teacher's distribution at each token of y_t, by forward KL.",
            source="word-level distillation, arXiv 1503.02531",
            equation="forward_kl",
            measures=True,
        ),
        _of_likeliest(
            name="rkl",
            help="As kd, by reverse KL: the student may leave out what it cannot say. For a student near its teacher.",
            source="reverse KL, arXiv 2306.08543",
            equation="reverse_kl",
            measures=True,
        ),
        _of_likeliest(
            name="akl",
            help="Both KL, weighted by where teacher and student differ: among likely tokens or in the tail.",
            source="AKL, arXiv 2404.02657",
            equation="adaptive_kl",
            measures=True,
        ),
        _of_likeliest(
            name="minillm",
            help="Reverse KL on the student's own stored responses y_s, by policy gradient. For a student near its "
            "teacher.",
            source="MiniLLM, arXiv 2306.08543",
            equation="minillm_loss",
            sides=Y_S,
            behavior=True,
            reports=(*LOGPS_S, *KLS, *WEIGHTS, "behavior_kl"),
        ),
        _of_both(
            name="gkd",
            help="Matches the teacher's distribution at each token of y_t and of y_s, by a Jensen-Shannon divergence.",
            source="GKD, eq. 1, arXiv 2306.13649",
            equation="gkd_loss",
            settings={"jsd_beta": 0.5, **HALF},
        ),
        _of_both(
            name="skl",
            help="As gkd, by forward KL from a mixture of teacher and student, which is never infinite.",
            source="skew KL of DistiLLM, arXiv 2402.03898",
            equation="skew_kl_loss",
            settings={"skew_alpha": 0.1, **HALF},
        ),
        _of_both(
            name="srkl",
            help="As skl, by reverse KL.",
            source="skew reverse KL of DistiLLM, arXiv 2402.03898",
            equation="skew_reverse_kl_loss",
            settings={"skew_alpha": 0.1, **HALF},
        ),
        _of_both(
            name="distillm-2",
            help="skl on y_t, which raises it, and srkl on y_s, which lowers what the teacher would not say there.",
            source="DistiLLM-2, arXiv 2503.07067",
            equation="distillm_2_loss",
            settings={"skew_alpha": 0.1, **HALF},
        ),
    )
}

OFF: dict[str, Any] = {"chosen_nll_weight": 0.0, "off_policy": "none"}  # in a run whose objective has none

if TYPE_CHECKING:
    ObjectiveName = str
else:
    ObjectiveName = Literal[tuple(OBJECTIVES)]


def _owners(setting: str) -> list[str]:
    return [info.name for info in OBJECTIVES.values() if setting in info.settings]


def _default(setting: str) -> Any:
    """That of the first objective that has the setting."""
    return OBJECTIVES[_owners(setting)[0]].settings[setting]


def _exceptions(setting: str) -> str:
    """Which objectives have another default than the first."""
    others: dict[Any, list[str]] = {}
    for name in _owners(setting):
        others.setdefault(OBJECTIVES[name].settings[setting], []).append(name)
    return ". ".join(f"{v} for {in_words(names)}" for v, names in others.items() if v != _default(setting))


class ObjectiveOptions(Config):
    """Which objective is trained, and its settings."""

    panel: ClassVar[str] = "Objective"

    objective: ObjectiveName = Field(
        "dpkd", description="What is minimised: one of the objectives that `train --help` lists."
    )
    beta: float = Field(
        _default("beta"),
        gt=0,
        description=f"β of the objective, and of the rewards in metrics.jsonl. {_exceptions('beta')}.",
    )
    tau: float = Field(_default("tau"), gt=0, description="τ of ipo: it pulls the gap of a pair to 1/(2τ) nats.")
    gamma: float = Field(
        _default("gamma"), ge=0, description="γ of simpo: the margin that it asks for, β times nats per token."
    )
    jsd_beta: float = Field(
        _default("jsd_beta"),
        gt=0,
        lt=1,
        description="β of gkd's Jensen-Shannon divergence, which is not that of the rewards: the teacher's part of the "
        "mixture. Near 0 it is forward KL, near 1 reverse KL.",
    )
    skew_alpha: float = Field(
        _default("skew_alpha"),
        ge=0,
        lt=1,
        description=f"α of {in_words(_owners('skew_alpha'))}: how much of itself a distribution has in the mixture "
        "that it is compared with.",
    )
    student_share: float = Field(
        _default("student_share"),
        ge=0,
        le=1,
        description=f"λ of {in_words(_owners('student_share'))}: how much y_s counts in the loss; y_t counts 1 - λ.",
    )
    responses: Literal["pairs", "teacher"] = Field(
        "pairs", description="What seqkd reads. teacher: y_t alone, as soon as generate has sampled it."
    )
    off_policy: Literal["token", "none"] = Field(
        _default("off_policy"),
        description="How objectives of pairs treat y_s that an earlier student sampled. token: weight the gradient of "
        "each token by min(q/b, 5), with q of the student now and b of the one that sampled. none: like new ones.",
    )
    chosen_nll_weight: float = Field(
        _default("chosen_nll_weight"),
        ge=0,
        description="Weight of -log q(y_t)/|y_t|, which is added to objectives of pairs. "
        f"{_exceptions('chosen_nll_weight')}.",
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_objective(cls, values: dict[str, Any]) -> dict[str, Any]:
        info = OBJECTIVES.get(str(values.get("objective", "dpkd")))
        return values if info is None else {**OFF, **info.settings, **values}

    @model_validator(mode="after")
    def _settings_of_the_objective(self) -> Self:
        info = OBJECTIVES[self.objective]
        known = {name for other in OBJECTIVES.values() for name in other.settings}
        for name in sorted(known - {"beta", *info.settings}):  # beta is also that of the rewards
            if getattr(self, name) != OFF.get(name, type(self).model_fields[name].default):
                why = "" if info.per == "pair" else "does not compare y_t with y_s, so that it "
                raise ValueError(f"objective '{info.name}' {why}has no {name}; it belongs to {in_words(_owners(name))}")
        if self.responses == "teacher" and not info.responses_suffice:
            able = in_words([name for name, other in OBJECTIVES.items() if other.responses_suffice])
            raise ValueError(f"objective '{info.name}' needs pairs; {able} alone reads the teacher's responses")
        return self
