"""Real processes, as a launcher starts them: each a command line with its rank in the environment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from helpers.launched import FSDP, RANK, WAYS, ZERO, ended, free_port, options, start
from helpers.runs import metrics_of, weights_of
from torch import nn
from transformers import AutoModelForCausalLM

from dpkd_offline.config.train import TrainConfig
from dpkd_offline.models.loading import load_model
from dpkd_offline.training import distributed
from dpkd_offline.training.distributed import GradientSums, Processes
from dpkd_offline.training.optimizer import MasterAdamW


def run(notes: Path, arguments: Sequence[str], count: int, **more: str) -> list[tuple[int | None, str, str]]:
    results = ended(start(notes, arguments, count, **more))
    assert [code for code, _, _ in results] == [0] * count, results
    return results


def steps_of(notes: Path) -> list[list[str]]:
    """The ids that the processes took in each step, sorted; those that stand in for nothing left out."""
    steps: dict[int, set[str]] = {}
    for path in sorted(notes.glob("rank-*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            taken = {id_ for group in line["micro"] for id_ in group}
            assert taken <= set(line["batch"])
            steps.setdefault(line["step"], set()).update(taken)
    return [sorted(steps[step]) for step in sorted(steps)]


def assert_same_training(one: Path, other: Path, weights: float = 1e-4) -> None:
    a, b = metrics_of(one), metrics_of(other)
    assert [m["step"] for m in a] == [m["step"] for m in b]
    for name in ("loss", "margin", "reward_chosen", "logps_rejected", "accuracy"):
        assert [m[name] for m in a] == pytest.approx([m[name] for m in b], rel=1e-5, abs=1e-6), name
    assert [m["grad_norm"] for m in a] == pytest.approx([m["grad_norm"] for m in b], rel=1e-5)
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        # Adam turns rounding into steps where a gradient is nothing but rounding: most of the numbers, not all.
        far = (ours[name] - theirs[name]).abs() > weights
        assert far.float().mean() < 0.01 or "k_proj.bias" in name, name


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.slow
def test_one_two_and_four_processes_train_the_same(
    datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    for count in (1, 2, 4):
        arguments = options(datasets_by_family["llama"], students["llama"], tmp_path / f"out-{count}")
        results = run(tmp_path / f"notes-{count}", arguments, count)
        assert [bool(out) for _, out, _ in results] == [True] + [False] * (count - 1)
        assert [err for _, _, err in results[1:]] == [""] * (count - 1)
    assert steps_of(tmp_path / "notes-1") == steps_of(tmp_path / "notes-2") == steps_of(tmp_path / "notes-4")
    taken = [json.loads(line) for line in (tmp_path / "notes-2" / "rank-1.jsonl").read_text().splitlines()]
    assert all(len(step["batch"]) > sum(map(len, step["micro"])) > 0 for step in taken)
    assert_same_training(tmp_path / "out-1", tmp_path / "out-2")
    assert_same_training(tmp_path / "out-1", tmp_path / "out-4")
    assert files(tmp_path / "out-1") == files(tmp_path / "out-4")


@pytest.mark.slow
def test_batches_smaller_than_the_number_of_processes(
    datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"Tea is a river on day {n}."}) + "\n" for n in range(30)))
    more = {"batch-size": 2, "lm-corpus": corpus, "lm-length": 16, "lm-batch-size": 1}
    for count in (1, 3):
        arguments = options(datasets_by_family["gpt2"], students["gpt2"], tmp_path / f"out-{count}", **more)
        run(tmp_path / f"notes-{count}", arguments, count)
    assert_same_training(tmp_path / "out-1", tmp_path / "out-3")
    a, b = metrics_of(tmp_path / "out-1"), metrics_of(tmp_path / "out-3")
    assert [m["loss_lm"] for m in a] == pytest.approx([m["loss_lm"] for m in b], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["plain", "fsdp", "zero-2", "zero-3"])
def test_a_run_goes_on_with_another_number_of_processes(
    way: str, datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    """Stopped by a signal to one process, at the same step everywhere; whole: in one process, without a stop."""
    family, environment = ("opt" if way == "fsdp" else "llama"), WAYS[way]
    where = datasets_by_family[family], students[family]
    run(tmp_path / "notes-whole", options(*where, tmp_path / "whole"), 1)
    for first, second in ((2, 1), (1, 2)):
        output, notes = tmp_path / f"out-{first}-{second}", tmp_path / f"notes-{first}-{second}"
        started = start(notes, options(*where, output), first, seconds=0.5, **environment)
        last = notes / f"rank-{first - 1}.jsonl"
        while not last.exists() and all(one.process.is_alive() for one in started):
            time.sleep(0.05)
        pid = started[-1].process.pid
        assert pid is not None
        os.kill(pid, signal.SIGTERM)
        results = ended(started)
        assert [code for code, _, _ in results] == [75] * first, results
        lines = [err for _, _, err in results if "the same command goes on" in err]
        assert len(lines) == 1 and "stopped by" in lines[0]
        (checkpoint,) = (output / "checkpoints").iterdir()
        done = json.loads((checkpoint / "state.json").read_text())["step"]
        assert checkpoint.name == f"step-{done:08d}" and 1 <= done < 4
        assert len(list(checkpoint.glob("*.safetensors"))) == first  # each writes its share
        assert len(metrics_of(output)) == done
        results = run(notes, options(*where, output), second, **environment)
        assert f"going on after step {done} of 4" in results[0][2]
        assert ("trains without DeepSpeed" in results[0][2]) == (second == 1 and "zero" in way)
        assert_same_training(tmp_path / "whole", output)
        assert not (output / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["plain", "fsdp"])
def test_threads_write_the_checkpoints_of_several_processes(
    way: str, datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    """One is committed once all have written it; killed after that, the run goes on from it."""
    where, environment = (datasets_by_family["llama"], students["llama"]), {**WAYS[way], "WRITING_SECONDS": "0.3"}
    run(tmp_path / "notes-whole", options(*where, tmp_path / "whole"), 1)
    output, notes = tmp_path / "out", tmp_path / "notes"
    arguments = options(*where, output, **{"save-every": 1})
    started = start(notes, arguments, 2, 0.5, **environment)
    while not list(output.glob("checkpoints/step-*")) and all(one.process.is_alive() for one in started):
        time.sleep(0.01)
    for one in started:
        one.process.kill()
    ended(started)
    (checkpoint,) = (output / "checkpoints").glob("step-*")
    assert len(list(checkpoint.glob("*.safetensors"))) == 2
    results = run(notes, arguments, 2, **environment)
    assert "going on after step" in results[0][2]
    assert_same_training(tmp_path / "whole", output)
    assert files(output) == files(tmp_path / "whole")


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others_with_its_code(
    datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    model = load_model(str(students["opt"]), "float32")
    with torch.no_grad():
        row = model.get_input_embeddings().weight[7]  # of some prompts
        row.copy_(torch.linspace(-1e25, 1e25, len(row)))  # which no number holds the square of
    broken = tmp_path / "broken"
    model.save_pretrained(broken)
    for path in students["opt"].glob("tokenizer*"):
        (broken / path.name).write_bytes(path.read_bytes())
    began = time.monotonic()
    results = ended(start(tmp_path / "notes", options(datasets_by_family["opt"], broken, tmp_path / "out"), 3))
    assert Counter(code for code, _, _ in results) == {3: 3}, results
    assert sum("not finite" in err for _, _, err in results) == 1
    assert not any("Traceback" in err for _, _, err in results)
    assert time.monotonic() - began < 120  # they did not wait for a timeout
    results = ended(start(tmp_path / "notes", options(tmp_path / "none", broken, tmp_path / "out"), 2))
    assert len({code for code, _, _ in results}) == 1 and results[0][0] in (2, 3), results
    assert sum(bool(err) for _, _, err in results) == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])  # with tied embeddings, and without
def test_fsdp_trains_the_same(
    family: str, datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    where = datasets_by_family[family], students[family]
    run(tmp_path / "notes-1", options(*where, tmp_path / "one"), 1)
    run(tmp_path / "notes-2", options(*where, tmp_path / "fsdp"), 2, **FSDP)
    run(
        tmp_path / "notes-3", [*options(*where, tmp_path / "again"), "--gradient-checkpointing", "--compile"], 2, **FSDP
    )
    assert steps_of(tmp_path / "notes-1") == steps_of(tmp_path / "notes-2")
    for name in ("fsdp", "again"):
        assert_same_training(tmp_path / "one", tmp_path / name)
    assert files(tmp_path / "one") == files(tmp_path / "fsdp")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert json.loads((tmp_path / "fsdp" / "config.json").read_text()) == config
    AutoModelForCausalLM.from_pretrained(tmp_path / "fsdp")


@pytest.mark.slow
def test_adapters_train_the_same_in_shards(
    datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    where, more = (datasets_by_family["gpt2"], students["gpt2"]), {"lora-rank": 4, "dtype": "bfloat16"}
    run(tmp_path / "notes-1", options(*where, tmp_path / "one", **more), 1)
    run(tmp_path / "notes-2", options(*where, tmp_path / "plain", **more), 2)
    run(tmp_path / "notes-3", options(*where, tmp_path / "fsdp", **more), 2, **FSDP)
    run(tmp_path / "notes-4", options(*where, tmp_path / "adapter", **more, **{"lora-output": "adapter"}), 2, **FSDP)
    one = metrics_of(tmp_path / "one")
    for name in ("plain", "fsdp", "adapter"):
        lines = metrics_of(tmp_path / name)
        assert [m["loss"] for m in lines] == pytest.approx([m["loss"] for m in one], abs=0.02)
    ours, theirs = weights_of(tmp_path / "one"), weights_of(tmp_path / "fsdp")
    for name in ours:  # the model is the same, but for where adapters were merged
        assert (ours[name] - theirs[name]).abs().max() < 0.02, name
    assert files(tmp_path / "adapter") > {"adapter_model.safetensors", "adapter_config.json"}


@pytest.mark.slow
@pytest.mark.parametrize("way", ["plain", "fsdp", "zero-3"])
def test_all_processes_stop_where_the_student_got_worse(
    way: str, datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    """They validate together, answers included; the first one decides, and says why."""
    ruin = {"learning-rate": 0.1, "max-grad-norm": 1, "max-steps": 8, "off-policy": "none", "holdout": 0.4}
    arguments = options(
        datasets_by_family["llama"], students["llama"], tmp_path / "out", **ruin, **{"validate-every": 2}
    )
    (first, _, why), (second, _, others) = ended(
        start(tmp_path / "notes", [*arguments, "--stop-when-ruined"], 2, **WAYS[way])
    )
    assert (first, second) == (5, 5), why
    assert "the student got worse" in why.splitlines()[-1] and "got worse" not in others
    training = json.loads((tmp_path / "out" / "training.json").read_text())
    assert training["best"]["step"] == 0 and training["steps"] <= 6
    trained, begun = weights_of(tmp_path / "out"), weights_of(students["llama"])
    assert all(torch.equal(trained[name], begun[name]) for name in begun)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["accelerate.commands.launch", "--num_processes=2", "--num_machines=1", "--multi_gpu"],
        ["accelerate.commands.launch", "--num_processes=2", "--num_machines=1", "--use_fsdp", "--fsdp_version=2"],
        ["accelerate.commands.launch", "--num_processes=2", "--num_machines=1", "--use_deepspeed", "--zero_stage=3"],
        ["torch.distributed.run", "--nproc-per-node=2"],
    ],
    ids=["accelerate", "accelerate-fsdp", "accelerate-deepspeed", "torchrun"],
)
def test_launchers(
    launcher: list[str], datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    port = f"--main_process_port={free_port()}" if "accelerate" in launcher[0] else f"--master-port={free_port()}"
    arguments = options(datasets_by_family["gpt2"], students["gpt2"], tmp_path / "out", **{"max-steps": 2})
    command = [sys.executable, "-m", *launcher, port, str(RANK), str(tmp_path / "notes"), "0", "train", *arguments]
    told = {**os.environ, "DS_ACCELERATOR": "cpu"}  # or the launcher itself says what it has guessed
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=told)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "out")]
    notes = [json.loads(path.read_text().splitlines()[0]) for path in sorted((tmp_path / "notes").iterdir())]
    assert [note["count"] for note in notes] == [2, 2]
    assert len(metrics_of(tmp_path / "out")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("family", ["gpt2", "llama"])  # with tied embeddings, and without
def test_zero_trains_the_same(
    family: str, stage: int, datasets_by_family: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    where = datasets_by_family[family], students[family]
    run(tmp_path / "notes-1", options(*where, tmp_path / "one"), 1)
    run(tmp_path / "notes-2", options(*where, tmp_path / "zero"), 2, **ZERO[stage])
    assert steps_of(tmp_path / "notes-1") == steps_of(tmp_path / "notes-2")
    assert_same_training(tmp_path / "one", tmp_path / "zero")
    assert files(tmp_path / "one") == files(tmp_path / "zero")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert json.loads((tmp_path / "zero" / "config.json").read_text()) == config


class Sent:
    """In place of sums over two processes that have the same gradients: doubles, when it is waited for."""

    def __init__(self, bucket: torch.Tensor) -> None:
        self.bucket, self.sent_as = bucket, bucket.clone()

    def wait(self) -> None:
        assert torch.equal(self.bucket, self.sent_as)  # nothing was added to it on its way
        self.bucket.mul_(2)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Sent]:
    """What two processes, of which this is one, have begun to add up."""
    everything: list[Sent] = []

    def all_reduce(bucket: torch.Tensor, async_op: bool) -> Sent:
        assert async_op
        everything.append(Sent(bucket))
        return everything[-1]

    monkeypatch.setattr(distributed.distributed, "all_reduce", all_reduce)
    return everything


def two_processes() -> Processes:
    processes = Processes()
    processes.count = 2
    return processes


def test_gradients_lie_in_buckets(sent: list[Sent], monkeypatch: pytest.MonkeyPatch) -> None:
    """The last ones first, as many as fit in one, of one dtype; a larger one by itself."""
    monkeypatch.setattr(distributed, "BUCKET_BYTES", 4 * 64)
    shapes = [(2, 3), (4,), (9, 8), (1,), (3, 21)]
    like = [torch.zeros(shape) for shape in shapes] + [torch.zeros(1, dtype=torch.bfloat16)]
    sums = GradientSums(like, two_processes())
    for n, (gradient, zeros) in enumerate(zip(sums.gradients, like, strict=True)):
        assert torch.equal(gradient, zeros) and gradient.dtype == zeros.dtype
        assert gradient.data_ptr() % (16 * gradient.itemsize) == 0
        gradient.add_(n + 1)
    sums.finish()
    counted = [(one.bucket.dtype, int(one.bucket.count_nonzero())) for one in sent]
    assert counted == [(torch.bfloat16, 1), (torch.float32, 63 + 1), (torch.float32, 72), (torch.float32, 4 + 6)]
    assert all((gradient == 2 * (n + 1)).all() for n, gradient in enumerate(sums.gradients))


@pytest.mark.parametrize("order", [(3, 2, 1, 0), (1, 3, 0, 2), (0, 1, 2, 3)])
def test_gradients_are_sent_in_one_order_whatever_that_in_which_they_are_made(
    order: tuple[int, ...], sent: list[Sent], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "BUCKET_BYTES", 4)
    sums = GradientSums([torch.zeros(1) for _ in range(4)], two_processes())
    for _ in range(2):  # steps
        sent.clear()
        made: list[int] = []
        for place in order:
            sums.gradients[place].fill_(place + 1)
            sums.made(place)
            made.append(place)
            expected = list(takewhile(made.__contains__, (3, 2, 1, 0)))
            assert [int(one.sent_as.sum()) - 1 for one in sent] == expected
        sums.finish()
        assert [float(gradient) for gradient in sums.gradients] == [2, 4, 6, 8]
    sums.made(2)
    with pytest.raises(KeyError):  # what is added to it now would be lost
        sums.made(2)


def test_sums_begin_while_the_last_backward_pass_goes_on(sent: list[Sent], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "BUCKET_BYTES", 4)
    torch.manual_seed(0)
    layers = [nn.Linear(5, 5, bias=False) for _ in range(4)]
    model, unused = nn.Sequential(*layers), nn.Linear(5, 5, bias=False)
    config = TrainConfig(dataset=Path("d"), student="s", output=Path("o"))
    optimizer = MasterAdamW(nn.ModuleList([unused, model]), torch.float32, config, two_processes())
    begun: list[int] = []  # sums, when the backward pass comes to a layer
    for layer in layers:
        layer.register_full_backward_pre_hook(lambda *_: begun.append(len(sent)))
    inputs = torch.randn(2, 3, 5, requires_grad=True)
    for n, x in enumerate(inputs):
        optimizer.backward(model(x).square().sum(), last=n == 1)
    assert begun == [0, 0, 0, 0, 0, 1, 2, 3]
    assert len(sent) == 4
    optimizer.sum_gradients()
    assert len(sent) == 5  # that which no backward pass reaches among them
    exact = nn.Sequential(*(nn.Linear(5, 5, bias=False) for _ in layers))
    exact.load_state_dict(model.state_dict())
    exact(inputs.detach().view(6, 5)).square().sum().backward()
    for gradient, parameter in zip(optimizer.gradients(), (None, *exact.parameters()), strict=True):
        expected = torch.zeros(5, 5) if parameter is None else parameter.grad
        assert expected is not None
        torch.testing.assert_close(gradient, 2 * expected)
