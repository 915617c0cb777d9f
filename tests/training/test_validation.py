from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.runs import NO_SPEEDS, log_prob, make_pairs, metrics_of, train_config, train_until, validations, weights_of
from helpers.tiny import FAMILIES, files_of, score_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from dpkd_offline.common.errors import DataError, UnavailableError, UsageError
from dpkd_offline.config.recipe import validated
from dpkd_offline.config.train import TrainConfig
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import PreferencePair
from dpkd_offline.generation.score_teacher import score_teacher
from dpkd_offline.metrics.text import rouge_l
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.models.loading import load_model
from dpkd_offline.models.shared_prompt import SHARED_PROMPT
from dpkd_offline.training import step as step_module
from dpkd_offline.training import trainer
from dpkd_offline.training.distributed import Processes
from dpkd_offline.training.examples import pair_stream, reference_stream
from dpkd_offline.training.export import Best
from dpkd_offline.training.held_out import ReferencePrompt
from dpkd_offline.training.metrics_log import check_trackers
from dpkd_offline.training.objectives import OBJECTIVES, score
from dpkd_offline.training.student import Student
from dpkd_offline.training.trainer import train
from dpkd_offline.training.validation import losses_and_rewards, measure_rouge_l

HELD = {f"row-{n}" for n in range(22) if int(hashlib.sha256(f"row-{n}".encode()).hexdigest()[:12], 16) < 0.4 * 2**48}
VALIDATE: dict[str, Any] = {"holdout": 0.4, "validate_every": 3, "validate_rouge": 4, "validate_max_new_tokens": 24}
# References are what a student of this size learns to answer in a few steps, so that Rouge-L says something.
RUN: dict[str, Any] = {"objective": "sft", "learning_rate": 1e-2, "max_steps": 11, **VALIDATE}


@pytest.fixture(scope="module")
def run(
    datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Eleven steps with all there is: validations after 0, 3, 6, 9 and 11 of them."""
    output = tmp_path_factory.mktemp("run") / "student"
    train(train_config(datasets_by_family["llama"], students["llama"], output, **RUN))
    return output


def test_what_is_held_out_is_a_function_of_the_id(
    datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    assert 4 <= len(HELD) <= 14
    dataset = Dataset.open(datasets_by_family["opt"])
    model = ModelInfo(str(students["opt"]))
    for changes in ({}, {"seed": 7}, {"objective": "sft"}, {"batch_size": 1}):
        config = train_config(dataset.root, students["opt"], tmp_path, holdout=0.4, **changes)
        for stream in (pair_stream(dataset, config, 10**6)[0], reference_stream(dataset, config, model)):
            assert {e.id for e in stream.held_out.read()} == HELD
            assert sorted(e.id for e in stream.epoch(0)) == sorted({f"row-{n}" for n in range(22)} - HELD)
            assert (len(stream), stream.held_out.count) == (22 - len(HELD), len(HELD))


def test_a_larger_share_holds_out_more_and_a_limit_takes_some_of_all_shards(tmp_path: Path) -> None:
    dataset = make_pairs(tmp_path, 400, shard_size=8)

    def held(share: float, limit: int = 400, **changes: object) -> list[int]:
        config = train_config(tmp_path, Path("s"), tmp_path, holdout=share, validate_limit=limit, **changes)
        return [int(e.id) for e in pair_stream(dataset, config, 10**6)[0].held_out.read()]

    assert set(held(0.05)) < set(held(0.2)) < set(held(0.5))
    assert held(0.2, 10) == sorted(held(0.2, 10)) and set(held(0.2, 10)) < set(held(0.2, 20)) < set(held(0.2))
    assert len({n // 8 for n in held(0.5, 30)}) > 15
    assert set(held(0.2, truncated="drop")) == {n for n in held(0.2) if n % 4}


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_equal_those_of_a_loop_written_again(
    family: str, datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    config = train_config(
        datasets_by_family[family],
        students[family],
        tmp_path,
        objective="ipo",
        tau=0.4,
        beta=0.7,
        max_steps=1,
        micro_batch_tokens=150,
        holdout=0.4,
    )
    train(config)
    model = load_model(str(students[family]), "float32")
    dataset, rows = Dataset.open(config.dataset), []
    pairs = [pair for shard in range(dataset.plan.count) for pair in dataset.pairs(0).read(shard) if pair.id in HELD]
    with torch.no_grad():
        for pair in pairs:
            q = [log_prob(model, pair.prompt_ids, y).item() for y in (pair.chosen_ids, pair.rejected_ids)]
            p = [sum(pair.teacher_chosen_logps), sum(pair.teacher_rejected_logps)]
            lengths = len(pair.chosen_ids), len(pair.rejected_ids)
            rewards = [0.7 * (a - b) / length for a, b, length in zip(q, p, lengths, strict=True)]
            margin = rewards[0] - rewards[1]
            rows.append(
                {
                    "val_loss_kd": ((q[0] - p[0]) - (q[1] - p[1]) - 1 / 0.8) ** 2,
                    "val_loss_dpkd": -F.logsigmoid(torch.tensor(margin)).item(),
                    "val_reward_chosen": rewards[0],
                    "val_reward_rejected": rewards[1],
                    "val_margin": margin,
                    "val_accuracy": float(margin > 0),
                    "val_logps_chosen": q[0] / lengths[0],
                    "val_logps_rejected": q[1] / lengths[1],
                    "val_drift": (sum(pair.behavior_rejected_logps) - q[1]) / lengths[1],
                }
            )
    expected = {name: fmean(values[name] for values in rows) for name in rows[0]}
    line = validations(tmp_path)[0]
    form = {f"val_{name}{of}" for name in ("tokens", "cut_off", "repetition") for of in ("", "_chosen")}
    assert line.keys() == {"step", *expected, *form}
    assert {name: line[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("objective", ["sft", "seqkd", "dpkd", "cpo"])
def test_every_objective_has_its_own_loss(
    objective: str, datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    config = train_config(
        datasets_by_family["gpt2"], students["gpt2"], tmp_path, objective=objective, max_steps=1, holdout=0.4
    )
    train(config)
    model, info = load_model(str(students["gpt2"]), "float32"), ModelInfo(str(students["gpt2"]))
    dataset = Dataset.open(config.dataset)
    if OBJECTIVES[objective].data == "references":
        stream = reference_stream(dataset, config, info)
    else:
        stream, _ = pair_stream(dataset, config, 10**6)
    loss = over = 0.0
    with torch.no_grad():
        for e in stream.held_out.read():
            q = [log_prob(model, e.prompt_ids, y).item() for y in e.responses]
            if objective in ("sft", "seqkd"):
                loss, over = loss - q[0], over + len(e.responses[0])
            elif objective == "cpo":
                loss, over = loss + F.softplus(torch.tensor(-config.beta * (q[0] - q[1]))).item() - q[0], over + 1
            else:
                rewards = [
                    config.beta * (a - sum(p)) / len(y) for a, p, y in zip(q, e.teacher_logps, e.responses, strict=True)
                ]
                loss, over = loss + F.softplus(torch.tensor(rewards[1] - rewards[0])).item(), over + 1
    before, after = validations(tmp_path)
    assert before["val_loss_kd"] == pytest.approx(loss / over, rel=1e-4)
    assert ("val_loss_dpkd" in before) == (objective != "sft")
    if objective == "dpkd":
        assert before["val_loss_dpkd"] == before["val_loss_kd"]
    best = json.loads((tmp_path / "training.json").read_text())["best"]
    by_loss = objective in ("sft", "seqkd")
    assert best["by"] == ("val_loss_kd" if by_loss else "val_logps_chosen")
    assert best[best["by"]] == (min if by_loss else max)(before[best["by"]], after[best["by"]])


def plain_answer(model: Any, tokenizer: Any, prompt_ids: list[int], tokens: int) -> str:
    """One prompt alone, without padding, with the attention that the model comes with."""
    ids = torch.tensor([prompt_ids])
    answer = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    return str(tokenizer.decode(answer, skip_special_tokens=True))


def test_objectives_that_read_likeliest_tokens_have_both_losses(
    datasets_by_family: dict[str, Path],
    teachers: dict[str, Path],
    students: dict[str, Path],
    tmp_path: Path,
) -> None:
    dataset = tmp_path / "dataset"
    shutil.copytree(datasets_by_family["opt"], dataset)
    score_teacher(score_config(dataset, teachers["opt"], top_k=4))
    lines = {}
    for objective in ("dpkd", "kd", "minillm", "dpkd-token"):
        output = tmp_path / objective
        train(train_config(dataset, students["opt"], output, objective=objective, max_steps=1, holdout=0.4))
        lines[objective] = validations(output)[0]
    config = train_config(dataset, students["opt"], tmp_path, objective="kd", holdout=0.4)
    stream, _ = pair_stream(Dataset.open(dataset), config, 10**6, top_k=True)
    student = Student(load_model(str(students["opt"]), "float32"))
    with torch.no_grad():
        parts = [OBJECTIVES["kd"].loss(score(student, OBJECTIVES["kd"], [e], config)) for e in stream.held_out.read()]
    assert lines["kd"]["val_loss_kd"] == pytest.approx(torch.cat(parts).mean().item(), rel=1e-5)
    for line in lines.values():
        for name in lines["dpkd"].keys() - {"val_loss_kd"}:
            assert line[name] == pytest.approx(lines["dpkd"][name], rel=1e-5), name
        assert {f"val_{name}" for name in NEW} <= line.keys()
    assert len({line["val_loss_kd"] for line in lines.values()}) == 4
    assert lines["dpkd"]["val_forward_kl"] == pytest.approx(lines["kd"]["val_loss_kd"], rel=1e-5)
    by = {name: json.loads((tmp_path / name / "training.json").read_text())["best"]["by"] for name in lines}
    assert by == dict.fromkeys(lines, "val_forward_kl") | {"kd": "val_loss_kd"}


NEW = ("forward_kl", "forward_kl_first", "reverse_kl", "reverse_kl_first", "top_k_mass", "acceptance")


@torch.no_grad()
def full_distributions(folder: Path, pairs: Sequence[PreferencePair]) -> list[Tensor]:
    """Log-probs [T, V] at the positions of each y_t: a plain transformers model in float64, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    logits = [
        model(torch.tensor([[*p.prompt_ids, *p.chosen_ids]])).logits[0, len(p.prompt_ids) - 1 : -1] for p in pairs
    ]
    return [row.log_softmax(-1) for row in logits]


@pytest.mark.parametrize("family", FAMILIES)
def test_distances_to_the_teacher_are_those_of_the_whole_vocabulary_but_for_the_rest(
    family: str,
    datasets_by_family: dict[str, Path],
    teachers: dict[str, Path],
    students: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What K leaves out is what teacher and student differ in among the other tokens, and never more than they hold."""
    monkeypatch.setattr("dpkd_offline.generation.reuse.compact_columns", lambda _: {})  # float32, as of old
    original = Dataset.open(datasets_by_family[family])
    pairs = [p for shard in range(original.plan.count) for p in original.pairs(0).read(shard) if p.id in HELD]
    every_p, every_q = (full_distributions(of[family], pairs) for of in (teachers, students))
    student, vocabulary = Student(load_model(str(students[family]), "float32")), every_p[0].shape[-1]
    for k in (vocabulary - 1, 4, 1):
        dataset = tmp_path / str(k)
        shutil.copytree(original.root, dataset)
        score_teacher(score_config(dataset, teachers[family], top_k=k))
        config = train_config(dataset, students[family], tmp_path, holdout=0.4, micro_batch_tokens=150)
        held_out = pair_stream(Dataset.open(dataset), config, 10**6)[0].held_out
        actual = losses_and_rewards(student, held_out, config, Processes())
        exact: dict[str, list[float]] = defaultdict(list)
        outside: dict[str, list[float]] = defaultdict(list)
        for log_p, log_q in zip(every_p, every_q, strict=True):
            p, q = log_p.exp(), log_q.exp()
            is_rest = torch.ones_like(p, dtype=torch.bool).scatter(-1, log_p.topk(k).indices, False)
            p_rest, q_rest = (x[is_rest].view(len(x), -1).sum(-1) for x in (p, q))
            forward, reverse, both = p * (log_p - log_q), q * (log_q - log_p), torch.minimum(p, q)
            for name, terms, merged in (
                ("forward_kl", forward, p_rest * (p_rest / q_rest).log()),
                ("reverse_kl", reverse, q_rest * (q_rest / p_rest).log()),
                ("acceptance", both, torch.minimum(p_rest, q_rest)),
            ):
                exact[name] += terms.sum(-1).tolist()
                outside[name] += ((terms * is_rest).sum(-1) - merged).tolist()  # what merging the rest loses
                if name != "acceptance":
                    exact[f"{name}_first"].append(exact[name][-len(p)])
                    outside[f"{name}_first"].append(outside[name][-len(p)])
            exact["top_k_mass"] += (1 - p_rest).tolist()
        assert set(NEW) == exact.keys()
        for name in NEW:
            lost = fmean(outside[name]) if name in outside else 0.0
            assert actual[name] + lost == pytest.approx(fmean(exact[name]), rel=1e-5, abs=1e-5), (k, name)
            if k == vocabulary - 1:
                assert actual[name] == pytest.approx(fmean(exact[name]), rel=1e-5, abs=1e-5), name
        if k < 5:  # and the bounds are on the right side, with something to tell apart
            rest = 1 - actual["top_k_mass"]
            for name in ("forward_kl", "forward_kl_first", "reverse_kl", "reverse_kl_first"):
                assert 0 < actual[name] < fmean(exact[name]) - 1e-3, (k, name)
            assert actual["acceptance"] - rest - 1e-6 <= fmean(exact["acceptance"]) < actual["acceptance"] - 1e-3


RANKS = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from helpers.runs import train_config
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.models.loading import load_model
from dpkd_offline.training.distributed import Processes
from dpkd_offline.training.examples import pair_stream
from dpkd_offline.training.held_out import read_held_out
from dpkd_offline.training.student import Student
from dpkd_offline.training.validation import losses_and_rewards, measure_rouge_l

processes = Processes()
config = train_config(
    Path({dataset!r}), Path({student!r}), Path("o"), holdout=0.4, validate_rouge=1, validate_max_new_tokens=8
)
dataset, model = Dataset.open(config.dataset), ModelInfo(config.student)
held_out = read_held_out(pair_stream(dataset, config, 10**6)[0], dataset, model, config)
student = Student(load_model(config.student, "float32"))
facts = losses_and_rewards(student, held_out.examples, config, processes)
for prompt in held_out.reference_prompts:
    prompt.references.append("tea river rain salt chess")
facts |= measure_rouge_l(student, held_out.reference_prompts, model, config, processes)
Path({output!r}, f"{{processes.count}}-{{processes.rank}}.json").write_text(json.dumps(facts))
"""


@pytest.mark.slow
def test_several_processes_find_what_one_finds(
    datasets_by_family: dict[str, Path], teachers: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    """Two of them, for one prompt: one has nothing to answer."""
    script, dataset = tmp_path / "ranks.py", tmp_path / "dataset"
    shutil.copytree(datasets_by_family["llama"], dataset)
    score_teacher(score_config(dataset, teachers["llama"], top_k=4))
    places = {"dataset": str(dataset), "student": str(students["llama"]), "output": str(tmp_path)}
    script.write_text(RANKS.format(tests=str(Path(__file__).parents[1]), **places))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for count in (1, 2):
        subprocess.run([*launch, f"--nproc-per-node={count}", script], env=environment, check=True, timeout=300)
    results = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    one = results.pop("1-0.json")
    assert len(results) == 2
    assert one.keys() > set(NEW)
    for metrics in results.values():
        assert metrics == pytest.approx(one, rel=1e-5, abs=1e-6)  # there is no drift


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_plain_transformers(
    family: str, datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    model, info = load_model(str(students[family]), "float32"), ModelInfo(str(students[family]))
    tokenizer = info.tokenizer
    rows = Dataset.open(datasets_by_family[family]).prompts.read(0)
    answers = [plain_answer(model, tokenizer, row.prompt_ids, 12) for row in rows]
    answers = [
        " ".join([*answer.split()[:2], "tea"]) for answer in answers
    ]  # a part of it: a Rouge-L between 0 and 100
    prompts = [ReferencePrompt(row.prompt_ids, [answer, "-"]) for row, answer in zip(rows, answers, strict=True)]
    scores = [
        rouge_l(plain_answer(model, tokenizer, row.prompt_ids, 12), [answer, "-"])
        for row, answer in zip(rows, answers, strict=True)
    ]
    expected = {"rouge_l": fmean(scores), "rouge_l_error": stdev(scores) / len(scores) ** 0.5}
    assert 1 < expected["rouge_l"] < 99
    student, own = Student(model), model.generation_config
    for tokens in (16, 10_000):  # an answer at a time, and all at once
        config = train_config(tmp_path, students[family], tmp_path, validate_max_new_tokens=12, holdout=0.4)
        config = config.model_copy(update={"micro_batch_tokens": tokens})
        assert measure_rouge_l(student, prompts, info, config, Processes()) == pytest.approx(expected, abs=1e-6)
        assert model.config._attn_implementation == SHARED_PROMPT and model.generation_config is own


def test_rouge_is_that_of_the_held_out_prompts(run: Path, datasets_by_family: dict[str, Path]) -> None:
    """Of the final student, which has learned to end its answers."""
    model, tokenizer = load_model(str(run), "float32"), ModelInfo(str(run)).tokenizer
    dataset = Dataset.open(datasets_by_family["llama"])
    prompts = [p for shard in range(dataset.plan.count) for p in dataset.prompts.read(shard) if p.id in HELD]
    prompts.sort(key=lambda p: hashlib.sha256(p.id.encode()).hexdigest())
    scores = [rouge_l(plain_answer(model, tokenizer, p.prompt_ids, 24), p.references) for p in prompts[:4]]
    assert 20 < fmean(scores) < 100
    assert validations(run)[-1]["val_rouge_l"] == pytest.approx(fmean(scores))


def test_validation_changes_nothing_in_training(
    run: Path, datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    config = train_config(
        datasets_by_family["llama"],
        students["llama"],
        tmp_path / "student",
        **RUN | {"validate_every": 100, "validate_rouge": 0, "validate_limit": 1},
    )
    assert [line["step"] for line in validations(run)] == [0, 3, 6, 9, 11]
    seen = []
    original = trainer.Validation.after

    def after(self: Any, step: int, *rest: Any) -> bool:
        model, random = self.student.model, torch.get_rng_state()
        before = model.config._attn_implementation, model.generation_config.to_dict()
        ruined = original(self, step, *rest)
        assert torch.equal(torch.get_rng_state(), random)
        assert (model.config._attn_implementation, model.generation_config.to_dict()) == before
        assert self.student.own_attention != SHARED_PROMPT  # which has no cache to decode with
        seen.append(before[0])
        return ruined

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Validation, "after", after)
        train(config)
        train(config.model_copy(update={**VALIDATE, "validate_limit": 256, "output": tmp_path / "again"}))
    assert [line["step"] for line in validations(config.output)] == [0, 11]
    assert set(seen) == {SHARED_PROMPT}
    steps = [[m for m in metrics_of(folder) if "loss" in m] for folder in (config.output, run)]
    for ours, theirs in zip(*steps, strict=True):
        assert ours | NO_SPEEDS == theirs | NO_SPEEDS
    for name, weights in weights_of(run).items():
        assert torch.equal(weights, weights_of(config.output)[name]), name
        assert torch.equal(weights, weights_of(tmp_path / "again")[name]), name


def test_the_best_student_is_kept_whole_with_its_numbers(run: Path) -> None:
    best = json.loads((run / "best" / "validation.json").read_text())
    lines = validations(run)
    assert len({line["val_rouge_l"] for line in lines}) > 2
    first = max(lines, key=lambda line: line["val_rouge_l"])  # of equal ones the first
    assert {"run": best["run"], "by": "val_rouge_l", **first} == best
    assert json.loads((run / "training.json").read_text())["best"] == best
    for card in (run / "README.md", run / "best" / "README.md"):
        assert f"by val_rouge_l was that after step {first['step']}, kept in `best/`: val_loss_kd" in card.read_text()
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == [".dpkd-offline.json"]
    ModelInfo.load(str(run / "best"))
    assert weights_of(run / "best").keys() == weights_of(run).keys()


def test_the_best_student_has_the_weights_of_its_step(
    datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a learning rate that becomes too high, the best one is neither the first nor the last."""
    original, weights = trainer.Validation.after, {}

    def after(self: Any, step: int, *rest: Any) -> bool:
        weights[step] = {name: tensor.clone() for name, tensor in self.student.model.state_dict().items()}
        return original(self, step, *rest)

    monkeypatch.setattr(trainer.Validation, "after", after)
    monkeypatch.setattr(step_module, "learning_rate_at", lambda step, total, config: 1e-3 if step < 2 else 1.0)
    train(train_config(datasets_by_family["opt"], students["opt"], tmp_path, holdout=0.4))
    likely = {line["step"]: line["val_logps_chosen"] for line in validations(tmp_path)}
    best = json.loads((tmp_path / "training.json").read_text())["best"]["step"]
    assert likely[best] == max(likely.values()) and 0 < best < 3
    for name, tensor in weights_of(tmp_path / "best").items():
        assert torch.equal(weights[best][name], tensor), name
    assert f"dpkd, {best} steps of 6" in (tmp_path / "best" / "README.md").read_text()


@pytest.mark.parametrize("stop", [1, 2, 5, 8, 9])
def test_a_stopped_run_goes_on_to_the_same_best_and_the_same_lines(
    stop: int,
    run: Path,
    datasets_by_family: dict[str, Path],
    students: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = train_config(datasets_by_family["llama"], students["llama"], tmp_path / "student", **RUN)
    train_until(config, stop, monkeypatch)
    assert (config.output / "best" / "validation.json").exists()
    train(config)
    assert {**files_of(config.output / "best")} == files_of(run / "best")
    ours, theirs = ([m | NO_SPEEDS for m in metrics_of(folder)] for folder in (config.output, run))
    assert ours == theirs


def save_step(folder: Path, step: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights").write_text(str(step))


def test_of_two_students_that_are_equal_by_what_decides_the_one_of_the_smaller_loss_is_better(tmp_path: Path) -> None:
    best = Best.open(tmp_path, "run", True, Processes())
    offers = [(1, 20.0, 3.0), (2, 20.0, 3.0), (3, 19.0, 1.0), (4, 20.0, 2.0), (5, 20.5, 9.0)]
    better = [
        best.offer(step, {"val_rouge_l": rouge, "val_loss_kd": loss}, "val_rouge_l", save_step)
        for step, rouge, loss in offers
    ]
    assert better == [True, False, False, True, True]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_process_killed_while_it_replaces_the_best_leaves_a_whole_one(
    renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = Best.open(tmp_path, "run", True, Processes())
    assert best.offer(1, {"val_loss_kd": 2.0}, "val_loss_kd", save_step)
    assert not best.offer(2, {"val_loss_kd": 2.0}, "val_loss_kd", save_step)
    original, done = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        if self.parent == tmp_path:
            if len(done) == renames:
                raise KeyboardInterrupt
            done.append(self)
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        if renames < 2:
            with pytest.raises(KeyboardInterrupt):
                best.offer(3, {"val_loss_kd": 1.0}, "val_loss_kd", save_step)
        else:
            best.offer(3, {"val_loss_kd": 1.0}, "val_loss_kd", save_step)
    again = Best.open(tmp_path, "run", True, Processes())
    kept = 3 if renames else 1
    assert again.record["step"] == kept and (tmp_path / "best" / "weights").read_text() == str(kept)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert not Best.open(tmp_path, "another", True, Processes()).record
    assert not Best.open(tmp_path, "run", False, Processes()).record


def test_a_new_run_without_validation_leaves_no_best_of_another(
    datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    config = train_config(datasets_by_family["opt"], students["opt"], tmp_path, max_steps=1, holdout=0.4)
    train(config)
    assert (tmp_path / "best").exists()
    train(config.model_copy(update={"holdout": 0.0, "resume": False}))
    assert not (tmp_path / "best").exists()
    assert json.loads((tmp_path / "training.json").read_text())["best"] is None


def test_what_cannot_be_validated_is_refused(
    datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = {"dataset": "d", "student": "s", "output": "o"}
    for asked in ({"validate_rouge": 3}, {"validate_every": 3}, {"stop_when_ruined": True}):
        with pytest.raises(UsageError, match="validation needs held-out prompts: set holdout"):
            validated(TrainConfig, {**needed, **asked, "holdout": 0})
    with pytest.raises(UsageError, match="'holdout': input should be less than 1"):
        validated(TrainConfig, {**needed, "holdout": 1.0})
    with pytest.raises(UsageError, match="'track"):
        validated(TrainConfig, {**needed, "track": "tensorboard,paper"})
    dataset, student = datasets_by_family["opt"], students["opt"]
    train(train_config(dataset, student, tmp_path / "few", holdout=1e-6, max_steps=1))
    assert "warning: --holdout 1e-06 holds out none of 22 examples: nothing says whether" in capsys.readouterr().err
    assert not validations(tmp_path / "few") and not (tmp_path / "few" / "best").exists()
    with pytest.raises(DataError, match="no held-out prompt has a reference and room for 250 tokens"):
        train(train_config(dataset, student, tmp_path / "out", **VALIDATE | {"validate_max_new_tokens": 250}))
    with pytest.raises(DataError, match="no pair is left to train on"):
        train(train_config(dataset, student, tmp_path / "out", holdout=0.999))
    assert not (tmp_path / "out").exists()


def test_tensorboard_hears_what_the_metrics_say_and_goes_on_with_a_run(
    datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = train_config(
        datasets_by_family["opt"], students["opt"], tmp_path / "o", max_steps=5, track="tensorboard", **VALIDATE
    )
    train_until(config, 2, monkeypatch)
    train(config)
    events = EventAccumulator(str(config.output / "logs" / "tensorboard"))
    events.Reload()
    tracked: dict[int, dict[str, float]] = {}
    for name in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(name)]
        assert steps == sorted(set(steps))
        for event in events.Scalars(name):
            tracked.setdefault(event.step, {})[name] = event.value
    written: dict[int, dict[str, float]] = {}
    for line in metrics_of(config.output):
        written.setdefault(int(line.pop("step")), {}).update(line)
    assert tracked.keys() == written.keys()
    for number in written:
        assert tracked[number] == pytest.approx(written[number], rel=1e-6)
    for name, data in files_of(config.output / "logs").items():
        assert str(tmp_path).encode() not in data, name


def test_a_tracker_that_is_not_installed_is_named_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpkd_offline.training.metrics_log.get_available_trackers", lambda: ["tensorboard"])
    check_trackers(["tensorboard"])
    with pytest.raises(UnavailableError, match="--track wandb: not installed; `pip install wandb`") as caught:
        train(train_config(tmp_path / "nothing", tmp_path / "none", tmp_path / "out", track="tensorboard,wandb"))
    assert caught.value.exit_code == 69
