from __future__ import annotations

import errno
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.runs import log_prob, metrics_of, train_config, train_until, weights_of
from helpers.tiny import FAMILIES, files_of, write_jsonl
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from dpkd_offline.common.errors import DataError, Interrupted, MismatchError, OutputBusy, StorageError, UsageError
from dpkd_offline.common.ownership import output_folder
from dpkd_offline.config.train import InitStudentConfig
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.models.loading import load_model
from dpkd_offline.training import trainer
from dpkd_offline.training.examples import pair_stream
from dpkd_offline.training.init_student import init_student
from dpkd_offline.training.objectives import OBJECTIVES, score
from dpkd_offline.training.optimizer import learning_rate_at
from dpkd_offline.training.stream import Example
from dpkd_offline.training.student import Student
from dpkd_offline.training.trainer import train


def plain_loss(model: Any, example: Example, beta: float, corrected: bool = False) -> Tensor:
    (y_t, y_s), (p_t, p_s) = example.responses, map(sum, example.teacher_logps)
    q_s = log_prob(model, example.prompt_ids, y_s)
    if corrected:  # each token's gradient counts q/b
        ids = torch.tensor([[*example.prompt_ids, *y_s]])
        rows = model(input_ids=ids).logits[0, len(example.prompt_ids) - 1 : -1].log_softmax(-1)
        q = torch.stack([row[token] for row, token in zip(rows, y_s, strict=True)])
        weights = (q.detach() - torch.tensor(example.behavior_logps[1])).exp().clamp(max=5)
        q_s = (weights * q).sum() - (weights * q).sum().detach() + q_s.detach()
    chosen = beta / len(y_t) * (log_prob(model, example.prompt_ids, y_t) - p_t)
    return -F.logsigmoid(chosen - beta / len(y_s) * (q_s - p_s))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {"off_policy": "none"}),
        ("opt", {"off_policy": "token"}),
        ("llama", {"off_policy": "token", "chosen_nll_weight": 0.7}),
    ],
)
def test_training_equals_a_loop_written_again(
    family: str,
    changes: dict[str, Any],
    datasets_by_family: dict[str, Path],
    students: dict[str, Path],
    tmp_path: Path,
) -> None:
    """Three steps: the loss of eq. 9 pair by pair, torch's AdamW and clipping, the library's cosine schedule."""
    changes = {"beta": 2.0, "warmup_ratio": 0.3, "learning_rate": 3e-3, **changes}
    config = train_config(datasets_by_family[family], students[family], tmp_path / "out", **changes)
    train(config)

    model = load_model(str(students[family]), "float32")
    stream, _ = pair_stream(Dataset.open(config.dataset), config, 10**6)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate)
    norms, losses = [], []
    for step, batch in zip(range(3), stream.batches(config.batch_size), strict=False):
        for group in adamw.param_groups:
            group["lr"] = learning_rate_at(step, 3, config)
        loss = torch.stack([plain_loss(model, e, 2.0, config.off_policy == "token") for e in batch]).mean()
        anchors = [-log_prob(model, e.prompt_ids, e.responses[0]) / len(e.responses[0]) for e in batch]
        loss = loss + config.chosen_nll_weight * torch.stack(anchors).mean()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)))
        losses.append(loss.item())
        adamw.step()
        adamw.zero_grad()

    lines = metrics_of(tmp_path / "out")
    assert [m["loss"] for m in lines] == pytest.approx(losses, rel=1e-4)
    assert [m["grad_norm"] for m in lines] == pytest.approx(norms, rel=1e-3)
    trained, start = weights_of(tmp_path / "out"), weights_of(students[family])
    for name, parameter in model.named_parameters():
        # A key's bias has no gradient but rounding (softmax does not see it), which Adam blows up: leave it out.
        real = adamw.state[parameter]["exp_avg_sq"].sqrt() > 1e-6
        moved = (parameter - start[name]).abs().max()
        # Where gradients nearly cancel, Adam's first steps turn rounding into a step of its own.
        differs = (trained[name] - parameter)[real].abs() > 0.02 * moved + 1e-7
        assert differs.float().mean() <= 1e-3 or not real.any(), name
        assert real.any() or "k_proj.bias" in name
    assert any(not torch.equal(trained[name], start[name]) for name in trained)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_float64_autograd_of_the_formula(
    family: str, datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    config = train_config(datasets_by_family[family], students[family], tmp_path, beta=0.7)
    examples = next(pair_stream(Dataset.open(config.dataset), config, 10**6)[0].batches(6))
    model = load_model(str(students[family]), "float32")
    objective = OBJECTIVES["dpkd"]
    loss = objective.loss(score(Student(model), objective, examples, config)).sum()
    loss.backward()
    reference = load_model(str(students[family]), "float64")
    expected = torch.stack([plain_loss(reference, example, 0.7) for example in examples]).sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        exact = gradients[name].grad
        assert (parameter.grad - exact).abs().max() <= 1e-4 * exact.abs().max() + 1e-7, name


def test_a_student_equal_to_its_teacher_has_a_loss_of_ln_2(
    datasets_by_family: dict[str, Path], teachers: dict[str, Path], tmp_path: Path
) -> None:
    for family in FAMILIES:
        train(train_config(datasets_by_family[family], teachers[family], tmp_path / family, max_steps=1))
        (facts,) = metrics_of(tmp_path / family)
        assert facts["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert facts["margin"] == pytest.approx(0, abs=1e-5)


def test_training_lowers_the_loss_and_prefers_the_teacher(
    datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    config = train_config(
        datasets_by_family["llama"],
        students["llama"],
        tmp_path / "out",
        epochs=8,
        max_steps=None,
        beta=1.0,
        dtype="bfloat16",
    )
    train(config)
    lines = metrics_of(config.output)
    assert [m["step"] for m in lines] == list(range(1, 33))  # 22 pairs in batches of 6, 8 times
    assert sum(m["loss"] for m in lines[-4:]) < 0.7 * sum(m["loss"] for m in lines[:4])
    assert sum(m["margin"] for m in lines[-4:]) > sum(m["margin"] for m in lines[:4])
    assert lines[-1]["accuracy"] > 0.9
    assert {
        "loss_kd",
        "reward_chosen",
        "reward_rejected",
        "logps_chosen",
        "learning_rate",
        "tokens_per_s",
        "padding",
    } <= lines[0].keys()
    assert lines[0]["margin"] == pytest.approx(lines[0]["reward_chosen"] - lines[0]["reward_rejected"], abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_sft_is_the_cross_entropy_of_the_references(
    family: str, datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    config = train_config(
        datasets_by_family[family],
        students[family],
        tmp_path / "out",
        objective="sft",
        batch_size=22,
        epochs=6,
        max_steps=None,
    )
    train(config)
    model, tokenizer = load_model(str(students[family]), "float32"), ModelInfo(str(students[family])).tokenizer
    total = tokens = 0.0
    dataset = Dataset.open(config.dataset)
    for shard in range(dataset.plan.count):
        for prompt in dataset.prompts.read(shard):
            response = [*tokenizer(prompt.references[0])["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                total -= log_prob(model, prompt.prompt_ids, response).item()
            tokens += len(response)
    lines = metrics_of(config.output)
    assert lines[0]["loss"] == pytest.approx(total / tokens, rel=1e-4)
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_the_corpus_loss_is_added_with_its_weight(
    datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    corpus = write_jsonl(
        tmp_path / "corpus.jsonl", [{"text": f"Describe tea and a river, day {n}."} for n in range(20)]
    )
    config = train_config(
        datasets_by_family["opt"],
        students["opt"],
        tmp_path / "out",
        lm_corpus=str(corpus),
        lm_weight=0.25,
        lm_length=16,
        lm_batch_size=2,
        max_steps=1,
    )
    train(config)
    (facts,) = metrics_of(config.output)
    assert facts["loss"] == pytest.approx(facts["loss_kd"] + 0.25 * facts["loss_lm"])
    model, tokenizer = load_model(str(students["opt"]), "float32"), ModelInfo(str(students["opt"])).tokenizer
    ids: list[int] = []
    for n in range(20):
        ids += [*tokenizer(f"Describe tea and a river, day {n}.")["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        expected = [-log_prob(model, ids[k : k + 1], ids[k + 1 : k + 16]).item() / 15 for k in (0, 16)]
    assert facts["loss_lm"] == pytest.approx(sum(expected) / 2, rel=1e-4)


def test_micro_batches_do_not_change_the_step(
    datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    for size in (1, 6000):
        config = train_config(
            datasets_by_family["gpt2"], students["gpt2"], tmp_path / str(size), micro_batch_tokens=size
        )
        train(config)
    one, six = metrics_of(tmp_path / "1"), metrics_of(tmp_path / "6000")
    for a, b in zip(one, six, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_the_schedule_is_the_librarys_cosine() -> None:
    config = train_config(Path("d"), Path("s"), Path("o"), warmup_ratio=0.1)
    parameter = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([parameter], lr=config.learning_rate)
    schedule = get_cosine_schedule_with_warmup(sgd, 10, 100)
    for step in range(100):
        if step >= 10:  # ours takes its first step at 1/10 of the peak, theirs at 0
            assert learning_rate_at(step, 100, config) == pytest.approx(schedule.get_last_lr()[0])
        sgd.step()
        schedule.step()
    assert learning_rate_at(0, 100, config) == pytest.approx(config.learning_rate / 10)


def test_the_trained_student_is_a_hugging_face_model(
    datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    config = train_config(datasets_by_family["llama"], students["llama"], tmp_path / "student", dtype="bfloat16")
    train(config)
    names = {path.name for path in config.output.iterdir()}
    assert names == {
        ".dpkd-offline.json",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "metrics.jsonl",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "train.yaml",
        "training.json",
    }
    assert json.loads((config.output / "config.json").read_text())["dtype"] == "bfloat16"
    card = (config.output / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers")
    assert "Teacher: `llama` (`sha256:" in card
    for path in config.output.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path
    before = (config.output / "metrics.jsonl").stat().st_mtime_ns
    train(config)  # again: nothing
    assert (config.output / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_result_is_a_path_with_the_numbers_of_the_run(
    datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    config = train_config(
        datasets_by_family["opt"], students["opt"], tmp_path / "out", holdout=0.4, off_policy="none", learning_rate=0.1
    )
    result = train(config)
    training = json.loads((config.output / "training.json").read_text())
    assert (str(result), Path(result), result.path) == (str(config.output), config.output, config.output)
    assert (result.steps, result.loss) == (3, [line["loss"] for line in metrics_of(result.path) if "loss" in line][-1])
    assert result.best == training["best"] and result.best["by"] == "val_logps_chosen"
    first = training["warnings"][0]
    assert result.warnings[0] == f"step {first['step']}: {first['warning']}"
    assert len(result.warnings) == len(training["warnings"])
    assert train(config) == result  # trained already
    (config.output / "metrics.jsonl").unlink()
    assert train(config).loss is None


def test_what_does_not_match_is_refused(
    datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(MismatchError, match=r"are in the tokens of llama, and .* has another"):
        train(train_config(datasets_by_family["llama"], students["gpt2"].parent / "changed", tmp_path / "out"))
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        train(
            train_config(
                datasets_by_family["opt"], students["opt"], tmp_path / "out", lm_corpus=str(tmp_path / "none.jsonl")
            )
        )
    with pytest.raises(DataError, match="no pair is left"):
        train(train_config(datasets_by_family["opt"], students["opt"], tmp_path / "out", max_length=2))
    assert not (tmp_path / "out").exists()


@pytest.fixture(autouse=True)
def changed_tokenizer(students: dict[str, Path]) -> None:
    folder = students["gpt2"].parent / "changed"
    if not folder.exists():
        load_model(str(students["llama"]), "float32").save_pretrained(folder)
        tokenizer = ModelInfo(str(students["llama"])).tokenizer
        tokenizer.add_tokens(["<new>"])
        tokenizer.save_pretrained(folder)


# --- whose folder it is ---------------------------------------------------------------------------------------------


def test_a_student_is_never_written_over_something_else(
    datasets_by_family: dict[str, Path], students: dict[str, Path], teachers: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(teachers["gpt2"], tmp_path / "model")
    shutil.copytree(datasets_by_family["gpt2"], tmp_path / "dataset")
    init_student(InitStudentConfig(teacher=str(teachers["gpt2"]), output=tmp_path / "init", layers=2))
    before = files_of(tmp_path)
    for name, error in (("model", UsageError), ("dataset", UsageError), ("init", MismatchError)):
        for resume in (True, False):
            config = train_config(datasets_by_family["gpt2"], students["gpt2"], tmp_path / name, resume=resume)
            with pytest.raises(error, match=rf"{name}: (holds|is)"):
                train(config)
    assert files_of(tmp_path) == before


def test_a_run_of_which_nothing_counts_yet_makes_room_for_another(
    datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory in the first step, and so the same command with smaller batches."""

    def fails(*_: object) -> None:
        raise Interrupted("in the first step")

    config = train_config(datasets_by_family["gpt2"], students["gpt2"], tmp_path / "out", holdout=0.3, max_steps=2)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(trainer.Run, "step", fails)
        train(config)
    assert (config.output / "best" / "validation.json").exists()
    smaller = config.model_copy(update={"micro_batch_tokens": 300, "holdout": 0.0})
    train(smaller)
    assert not (config.output / "best").exists()
    with pytest.raises(MismatchError, match="holds a trained student of another command"):
        train(config)


def test_one_run_at_a_time_writes_a_folder(
    datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    config = train_config(datasets_by_family["gpt2"], students["gpt2"], tmp_path / "out")
    with output_folder(config.output, trainer.KIND, "train"), pytest.raises(OutputBusy, match=f"process {os.getpid()}"):
        train(config)
    assert not config.output.exists()


def test_damaged_records_are_one_line(
    datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"holdout": 0.3, "max_steps": 4, "save_every": 1, "validate_every": 2}
    config = train_config(datasets_by_family["gpt2"], students["gpt2"], tmp_path / "out", **values)
    train_until(config, 2, monkeypatch)
    best, metrics = config.output / "best" / "validation.json", config.output / "metrics.jsonl"
    for path, damaged, line in (
        (best, "[]", r"validation\.json:1:1: expected a JSON object"),
        (best, "{}", r"validation\.json: key 'run' is missing"),
        (best, '{"run": "a", "step": 1, "by": "val_x"}', r"validation\.json: .*there is no val_x"),
        (metrics, '{"step": 1}\ngarbage\n', r"metrics\.jsonl:2: not a JSON object"),
        (metrics, '[]\n{"step": 1}\n', r"metrics\.jsonl:1: not a JSON object"),
    ):
        whole = path.read_text()
        path.write_text(damaged)
        with pytest.raises(DataError, match=line):
            train(config)
        path.write_text(whole)
    removed = shutil.rmtree

    def fails_once(path: Path, *rest: object, **named: object) -> None:
        if Path(path).name == ".best-old":
            monkeypatch.setattr(shutil, "rmtree", removed)
            if not named:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return
        removed(path, *rest, **named)  # type: ignore[arg-type]

    shutil.copytree(config.output / "best", config.output / ".best-old")
    monkeypatch.setattr(shutil, "rmtree", fails_once)
    with pytest.raises(StorageError, match=r"best: cannot be written: Input/output error"):
        train(config)
    train(config)
    assert not (config.output / ".best-old").exists()
    (config.output / "training.json").write_text('{"run": "a", "steps": "four"}')
    with pytest.raises(DataError, match=r"training\.json: key 'steps' is missing or wrong"):
        train(config)
