"""A student that gets worse is noticed, in words, and its best is kept."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import train_config, train_until, validations, weights_of

from dpkd_offline.common.errors import StudentRuined
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.metrics.text import repetition
from dpkd_offline.training.health import WINDOW, Finding, Health
from dpkd_offline.training.trainer import train

GOOD = {"val_loss_kd": 5.0, "val_cut_off": 0.3, "val_cut_off_chosen": 0.2, "val_repetition": 0.1}
RUIN: dict[str, Any] = {
    "off_policy": "none",
    "learning_rate": 0.1,
    "max_steps": 12,
    "validate_every": 2,
    "holdout": 0.4,
}


def validation(step: int, logps_chosen: float, **changes: float) -> dict[str, float]:
    return {"step": step, "val_logps_chosen": logps_chosen, "val_repetition_chosen": 0.1, **GOOD, **changes}


def after(*lines: dict[str, float], of_pairs: bool = True) -> list[Finding]:
    """What the last line brings."""
    health = Health(of_pairs)
    return [health.read(line) for line in lines][-1]


def test_a_student_that_gets_better_or_hardly_worse_is_left_alone() -> None:
    health = Health(loss_of_pairs=True)
    for step, likely in enumerate((-3.0, -2.5, -2.6, -2.4, -2.5)):
        assert not health.read(validation(step, likely, val_loss_kd=5.0 - step, val_cut_off=0.3 + 0.09 * step))
    for step in range(40):
        assert not health.read({"step": step, "loss": 5.0, "logps_chosen": -2.5 - step / 100, "drift": step / 40})
    assert not health.ruined and not health.findings


def test_a_loss_that_falls_while_the_teachers_responses_become_unlikely_is_named() -> None:
    (finding,) = after(validation(0, -2.0), validation(10, -2.3, val_loss_kd=4.0))
    assert finding.step == 10 and not finding.ruined
    assert finding.sentence == (
        "the loss of held-out pairs fell to 4, but log q of held-out responses fell from -2.00 to -2.30 nats a token: "
        "the student unlearns what it was taught; take a lower --learning-rate or a larger --chosen-nll-weight"
    )
    (finding,) = after(validation(0, -2.0), validation(10, -2.3, val_loss_kd=6.0), of_pairs=False)
    assert finding.sentence.startswith("log q of held-out responses fell") and "nll" not in finding.sentence


def test_where_the_loss_is_a_distance_it_is_what_counts() -> None:
    """Reverse KL leaves what is unlikely for the student."""
    health = Health(loss_of_pairs=False, loss_measures=True)
    assert not health.read(validation(0, -2.0, val_loss_kd=2.0)) and not health.read(
        validation(1, -3.4, val_loss_kd=1.2)
    )
    (finding,) = health.read(validation(2, -3.0, val_loss_kd=1.5))
    assert finding.sentence.startswith("the loss of held-out prompts rose from 1.20 to 1.50 nats a token: the student")
    (finding,) = health.read(validation(3, -2.0, val_loss_kd=2.6))
    assert (
        finding.ruined
        and "is 2.60 nats a token, before training it was 2.00, and after step 1 1.20" in finding.sentence
    )


def test_a_student_that_says_only_what_is_likely_anyway_is_ruined_whatever_its_distance() -> None:
    """By reverse KL it may come to say "the" and "a" alone, which the teacher finds likelier than its gibberish."""
    health = Health(loss_of_pairs=False, loss_measures=True)
    assert not health.read(validation(0, -6.7, val_loss_kd=4.0)) and not health.read(validation(1, -8.1, val_loss_kd=3))
    (finding,) = health.read(validation(2, -9.9, val_loss_kd=2.1))
    assert finding.ruined and health.ruined
    assert finding.sentence == (
        "the student got worse: log q of held-out responses is -9.90 nats a token, before training it was -6.70: it "
        "leaves out what the teacher says, although the loss of held-out prompts went from 4.00 to 2.10"
    )
    assert not health.read(validation(3, -7.0, val_loss_kd=2.1)) and not health.ruined


def test_a_student_is_ruined_where_it_is_worse_than_before_or_far_below_its_best() -> None:
    assert [f.ruined for f in after(validation(0, -2.0), validation(1, -2.6))] == [False, True]
    assert [f.ruined for f in after(validation(0, -5.0), validation(1, -2.0), validation(2, -3.1))] == [False, True]
    broken = validation(1, -2.3, val_cut_off=0.9)
    assert [f.ruined for f in after(validation(0, -2.0), broken)] == [False, False, True]
    assert [f.ruined for f in after(validation(0, -2.0), validation(1, -2.1, val_cut_off=0.9))] == [False]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"val_cut_off": 0.94},
            "responses no longer end: 94% of them are cut off, before training 30%, although log q of held-out "
            "responses got better; take",
        ),
        ({"val_repetition": 0.7}, "responses repeat themselves: 70% of one stood in it before, before training 10%"),
        (
            {"val_rouge_l": 10.0, "val_rouge_l_error": 1.5},
            "Rouge-L of its responses fell from 20.0 to 10.0, although log q of held-out responses got better; take",
        ),
    ],
)
def test_responses_that_do_not_end_or_repeat_themselves_are_named(changes: dict[str, float], words: str) -> None:
    start = validation(0, -2.0, val_rouge_l=20.0, val_rouge_l_error=2.0)
    (finding,) = after(start, validation(5, -1.9, **changes))
    assert finding.sentence.startswith(words) and not finding.ruined
    (finding,) = after(start, validation(5, -2.1, **changes))
    assert "although" not in finding.sentence


@pytest.mark.parametrize("changes", [{"val_cut_off": 0.94}, {"val_repetition": 0.7}])
def test_what_the_teacher_does_too_is_no_fault(changes: dict[str, float]) -> None:
    same = {f"{name}_chosen": value for name, value in changes.items()}
    assert not after(validation(0, -2.0), validation(5, -1.9, **same, **changes))


def test_rouge_on_few_prompts_is_noise() -> None:
    """A third less, or a difference that may be chance, says nothing; nor does one prompt."""
    for before, now, error in ((20.0, 14.0, 0.1), (9.0, 4.0, 2.5), (20.0, 5.0, None)):
        errors = {} if error is None else {"val_rouge_l_error": error}
        lines = [
            validation(step, -2.0 + step / 10, val_rouge_l=value, **errors) for step, value in ((0, before), (1, now))
        ]
        assert not after(*lines)


def test_a_student_that_has_left_the_one_that_sampled_is_named_once_and_again_after_a_round() -> None:
    health, steps = Health(loss_of_pairs=True), []
    for step in range(60):
        drift = 3.0 if 20 <= step < 40 or step >= 50 else 0.1  # a round begins at step 40
        for finding in health.read({"step": step, "loss": 1.0, "logps_chosen": -2.0, "drift": drift}):
            assert "nats a token away from the one that sampled y_s" in finding.sentence
            steps.append(step)
    assert len(steps) == 2 and 20 < steps[0] < 20 + WINDOW and 50 < steps[1] < 50 + WINDOW


def test_without_held_out_prompts_the_steps_say_that_it_unlearns() -> None:
    health, findings = Health(loss_of_pairs=True), []
    for step in range(30):
        findings += health.read({"step": step, "loss": 10.0 - step / 10, "logps_chosen": -2.0 - step / 10})
    (finding,) = findings
    assert finding.sentence.startswith("the loss fell from 9.65 to ") and "but log q(y_t) fell too" in finding.sentence


def steps(count: int, **values: Callable[[int], float]) -> list[dict[str, float]]:
    """Lines of steps, in which what is not given stands still."""
    still = {"loss": 1.0, "logps_chosen": -2.0, "accuracy": 0.5, "margin": -1.0, "drift": 0.1}
    return [{"step": n, **still, **{name: value(n) for name, value in values.items()}} for n in range(1, count + 1)]


def findings_of(lines: list[dict[str, float]], of_pairs: bool = True) -> list[tuple[int, str]]:
    health = Health(of_pairs)
    return [(finding.step, finding.sentence) for line in lines for finding in health.read(line)]


def test_an_accuracy_that_stays_at_zero_is_named() -> None:
    ((step, sentence),) = findings_of(steps(60, accuracy=lambda n: 0.0, margin=lambda n: -10 + n / 100))
    assert step == 24 and sentence.startswith("in 24 steps in a row no pair had a larger reward for y_t than for y_s")
    # It begins again where a pair was right, and where the rate has risen to its peak.
    ((step, _),) = findings_of(steps(60, accuracy=lambda n: 0.1 if n == 20 else 0.0))
    assert step == 44
    ((step, _),) = findings_of(steps(60, accuracy=lambda n: 0.0, learning_rate=lambda n: min(n, 30) / 30))
    assert step == 30 + 23
    # Where the margin rises, a student far from its teacher has more time; where something else goes wrong, less.
    rising = {"accuracy": lambda n: 0.0, "margin": lambda n: -10 + n / 15}
    assert not findings_of(steps(99, **rising)) and len(findings_of(steps(100, **rising))) == 1
    found = findings_of(steps(20, **rising, drift=lambda n: n / 4))
    assert [(step, sentence[:14]) for step, sentence in found] == [(12, "the student is"), (16, "in 16 steps in")]


def test_margins_that_differ_from_batch_to_batch_are_no_news() -> None:
    """Pairs of one step have another mean margin than those of the next: up to 2 of 10, as seen on real pairs."""
    noise = [0.0, 1.8, -1.1, 0.4, -1.9, 1.2, -0.6, 0.9]
    still = {"accuracy": lambda n: 0.0, "margin": lambda n: -10 + noise[n % 8]}
    ((step, sentence),) = findings_of(steps(200, **still))  # once, and not at each step whose margin is a low one
    assert step == 24 and "the margin went from -9.91 to -9.91" in sentence
    rising = {"accuracy": lambda n: 0.0, "margin": lambda n: -10 + n / 15 + noise[n % 8]}
    assert not findings_of(steps(99, **rising))


def test_pairs_that_are_in_order_from_the_first_step_on_are_named() -> None:
    ((step, sentence),) = findings_of(steps(60, accuracy=lambda n: 1.0))
    assert step == 24 and sentence.startswith("in all of the first 24 steps every pair had a larger reward for y_t")
    assert not findings_of(steps(60, accuracy=lambda n: 0.8 if n < 5 else 1.0))  # what training is for


def test_a_drift_that_runs_away_is_named_in_a_short_run_and_where_it_is_measured() -> None:
    ((step, sentence),) = findings_of(steps(6, drift=lambda n: n))
    assert step == 4 and sentence.startswith("the student is 2.5 nats a token away from the one that sampled y_s")
    ((step, _),) = findings_of([{"step": n, "drift_kl_token": n / 8, "drift_kl": 2.0} for n in range(0, 40, 8)])
    assert step == 24
    # A new round is measured where it begins: what the steps before it had says nothing about it.
    lines = [*steps(20, drift=lambda n: 3.0), {"step": 20, "drift_kl_token": 0.01}, *steps(9)]
    assert len(findings_of(lines)) == 1


def test_a_falling_likelihood_is_named_whatever_the_loss_does() -> None:
    ((_, sentence),) = findings_of(steps(60, logps_chosen=lambda n: -2 - n / 30, loss=lambda n: 1 + n / 10))
    assert sentence.startswith("log q(y_t) fell, from -2.")
    assert not findings_of(steps(60, logps_chosen=lambda n: -2 - n / 30), of_pairs=False)
    health = Health(loss_of_pairs=False, loss_measures=True)
    (finding,) = [f for line in steps(60, loss=lambda n: 1 + n / 20) for f in health.read(line)]
    assert finding.sentence.startswith("the loss rose from 1.23 to 1.7")


def test_repetition_is_the_share_of_n_grams_that_came_before() -> None:
    assert repetition([]) == repetition([1, 2, 3]) == repetition(list(range(50))) == 0
    assert repetition([7] * 23) == pytest.approx(19 / 20)
    assert repetition([1, 2, 3, 4, 5, 1, 2, 3, 4]) == pytest.approx(1 / 6)


@pytest.fixture(scope="module")
def values(datasets_by_family: dict[str, Path], students: dict[str, Path]) -> dict[str, Any]:
    return {"dataset": datasets_by_family["llama"], "student": students["llama"], **RUIN}


def ruined(values: dict[str, Any], output: Path) -> tuple[TrainConfig, str]:
    config = train_config(**values, output=output, stop_when_ruined=True)
    with pytest.raises(StudentRuined) as error:
        train(config)
    return config, str(error.value)


@pytest.mark.parametrize(
    "changes",
    [{}, {"lora_rank": 64, "learning_rate": 0.02, "lora_alpha": 256.0}, {"compile": True}],
    ids=["plain", "lora", "compiled"],
)
def test_a_ruined_run_is_stopped_soon_and_leaves_its_best(
    changes: dict[str, Any], values: dict[str, Any], tmp_path: Path
) -> None:
    config, message = ruined({**values, **changes}, tmp_path)
    training = json.loads((tmp_path / "training.json").read_text())
    steps = [line["step"] for line in validations(tmp_path)]
    assert training["ruined"] == message and training["steps"] == steps[-1] < 12 and len(steps) <= 4
    assert f"stopped after step {steps[-1]} of 12: the student got worse: log q of held-out" in message
    assert f"{tmp_path} holds the best student by val_logps_chosen, that after step 0" in message
    assert training["best"]["step"] == 0 and training["warnings"]
    for name, weights in weights_of(Path(config.student)).items():
        assert torch.equal(weights_of(tmp_path)[name], weights), name
    with pytest.raises(StudentRuined, match="stopped after step"):  # again, at once
        train(config)


def test_a_run_that_is_not_to_be_stopped_goes_on_and_says_so(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(train_config(**values, output=tmp_path))
    training = json.loads((tmp_path / "training.json").read_text())
    assert training["steps"] == 12 and training["ruined"] is None and training["best"]["step"] == 0
    shown = capsys.readouterr().err
    for warning in training["warnings"]:
        assert f"warning: step {warning['step']}: {warning['warning']}\n" in shown
    assert "the best so far" not in shown.partition("validation after step 2")[2]


def test_a_run_that_goes_on_is_stopped_where_it_would_have_been(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, message = ruined(values, tmp_path / "whole")
    config = train_config(**values, output=tmp_path / "again", stop_when_ruined=True, save_every=1)
    train_until(config, 1, monkeypatch)
    with pytest.raises(StudentRuined) as error:
        train(config)
    assert str(error.value) == message.replace("whole", "again")
    whole, again = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("whole", "again"))
    assert whole["warnings"] == again["warnings"]


def test_an_undisturbed_run_is_never_stopped(values: dict[str, Any], tmp_path: Path) -> None:
    for seed in range(20):
        changes = {**values, "off_policy": "token", "learning_rate": 1e-3, "seed": seed, "max_steps": 6}
        result = train(train_config(**changes, output=tmp_path / str(seed), stop_when_ruined=True))
        assert json.loads((tmp_path / str(seed) / "training.json").read_text())["ruined"] is None
        assert not result.warnings


def test_the_command_ends_with_a_line_and_a_code(
    values: dict[str, Any], tmp_path: Path, run_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    flags = [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", value)]
    done = run_cli("train", *flags, "--dtype", "float32", "--output", tmp_path / "out", "--stop-when-ruined")
    assert done.returncode == 5
    assert done.stderr.splitlines()[-1].startswith("dpkd-offline: stopped after step ")
    assert (tmp_path / "out" / "model.safetensors").exists()
