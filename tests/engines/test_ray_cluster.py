"""A real Ray cluster on this machine: a head without CPUs for work, and nodes of one CPU each."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.faults import start
from helpers.tiny import TINY, command_line, files_of, rows, write_jsonl
from ray.cluster_utils import Cluster
from safetensors.torch import load_file, save_file

from dpkd_offline.common.errors import UnavailableError
from dpkd_offline.config.base import ModelOptions, SamplingOptions
from dpkd_offline.engines import factory, worker_pool
from dpkd_offline.engines.base import GenerateRequest, ScoreRequest
from dpkd_offline.engines.factory import load_engine
from dpkd_offline.models.info import ModelInfo

pytestmark = pytest.mark.slow
NODE = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
# A worker computes with the CPUs of its node, here one; the bits of a sum depend on the number of threads.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **NODE})
    for _ in range(3):
        cluster.add_node(num_cpus=1, **NODE)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def environment(cluster: Cluster) -> dict[str, str]:
    return {**ONE_THREAD, "RAY_ADDRESS": cluster.address}


def stages(folder: Path, source: Path, teacher: Path, student: Path, *more: object) -> list[list[object]]:
    generate = ["--max-new-tokens", 80, "--shard-size", 2, "--dataset", folder, *TINY, *more]
    return [
        ["generate", "--role", "teacher", "--model", teacher, "--prompts", source, *generate],
        ["generate", "--role", "student", "--model", student, *generate],
        ["score-teacher", "--model", teacher, "--dataset", folder, *TINY, *more],
    ]


def run_alone(arguments: list[object]) -> None:
    """Without a cluster; with one thread, too."""
    process = start(arguments)
    process.join(300)
    assert process.exitcode == 0


def data_of(folder: Path) -> dict[str, bytes]:
    """All but who made it, which the card says, too: shards, manifests, dataset.json."""
    return {name: data for name, data in files_of(folder).items() if not name.endswith(("_table.json", "README.md"))}


def test_a_lost_node_changes_no_byte(
    tmp_path: Path, cluster: Cluster, environment: dict[str, str], teachers: dict[str, Path], students: dict[str, Path]
) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", rows(80))
    models = teachers["llama"], students["llama"]
    for arguments in stages(tmp_path / "one", source, *models):
        run_alone(arguments)
    committed = tmp_path / "many" / "responses" / "teacher" / "_manifest"
    teacher, _, scores = stages(tmp_path / "many", source, *models, "--cluster", "ray")
    with subprocess.Popen(
        command_line(*teacher), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        while len(list(committed.glob("[!.]*.json"))) < 5:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        left = 40 - len(list(committed.glob("[!.]*.json")))
        stdout, stderr = process.communicate(timeout=300)
    assert (process.returncode, left > 5) == (0, True), stderr
    assert stdout == f"{tmp_path / 'many' / 'responses' / 'teacher'}\n"
    assert "is lost; " in stderr
    run_alone(stages(tmp_path / "many", source, *models)[1])
    # By the nodes that are left.
    subprocess.run(command_line(*scores), check=True, capture_output=True, env=environment)
    assert data_of(tmp_path / "many") == data_of(tmp_path / "one")
    provenance = (tmp_path / "many" / "pairs" / "round-000" / "_table.json").read_text()
    assert '"engine": "transformers"' in provenance
    assert '"ray": "' in provenance


def test_a_polite_signal_ends_the_driver_at_once(
    tmp_path: Path, environment: dict[str, str], teachers: dict[str, Path]
) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", rows(80))
    command = command_line(
        *stages(tmp_path / "ds", source, teachers["llama"], teachers["llama"], "--cluster", "ray")[0]
    )
    committed = tmp_path / "ds" / "responses" / "teacher" / "_manifest"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        while len(list(committed.glob("[!.]*.json"))) < 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert stderr.splitlines()[-1].startswith("dpkd-offline: stopped by SIGTERM; ")
    assert 2 <= len(list(committed.glob("[!.]*.json"))) < 40


def check_unavailable(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert (done.returncode, done.stdout) == (69, ""), done.stderr
    *before, line = done.stderr.splitlines()
    assert line.startswith("dpkd-offline: ") and message in line
    assert all(message.startswith(("prompts: ", "ray: ")) for message in before), done.stderr


def test_without_a_cluster_one_line_says_how_to_start_one(
    tmp_path: Path, source: Path, teachers: dict[str, Path], run_cli: Run
) -> None:
    command = stages(tmp_path / "ds", source, teachers["gpt2"], teachers["gpt2"], "--cluster", "ray")[0]
    for address in ("127.0.0.1:1", "nonsense"):
        done = run_cli(*command, env={**ONE_THREAD, "RAY_ADDRESS": address})
        check_unavailable(done, "; start one with `ray start --head`")
    assert not (tmp_path / "ds").exists()


def test_without_ray_one_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"`pip install 'dpkd-offline\[ray\]'`"):
        load_engine(ModelInfo("m"), ModelOptions(engine="transformers", cluster="ray"))


def test_servers_are_not_for_a_cluster(tmp_path: Path, run_cli: Run) -> None:
    arguments = ["generate", "--dataset", tmp_path, "--role", "teacher", "--model", "m", "--url", "http://h:1/v1"]
    done = run_cli(*arguments, "--engine", "http", "--cluster", "ray")
    assert (done.returncode, done.stdout) == (2, "")
    assert "with engine 'http' the servers run already" in done.stderr.splitlines()[-1]


def test_a_model_that_no_worker_can_load_is_said_once(
    tmp_path: Path, environment: dict[str, str], source: Path, teachers: dict[str, Path], run_cli: Run
) -> None:
    broken = shutil.copytree(teachers["gpt2"], tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    del weights["transformer.h.0.mlp.c_fc.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    done = run_cli(*stages(tmp_path / "ds", source, broken, broken, "--cluster", "ray")[0], env=environment)
    check_unavailable(done, f"model '{broken}': its weights are not those of its config: missing transformer.h.0")
    assert "(on node " in done.stderr
    assert not (tmp_path / "ds").exists()


def test_an_error_in_a_task_is_itself_and_the_engine_goes_on(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, teachers: dict[str, Path]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", environment["RAY_ADDRESS"])
    options = ModelOptions(engine="transformers", dtype="float32", batch_size=4)
    handler = signal.getsignal(signal.SIGTERM)
    many = load_engine(ModelInfo(str(teachers["gpt2"])), options.model_copy(update={"cluster": "ray"}))
    one = load_engine(ModelInfo(str(teachers["gpt2"])), options)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert (many.name, many.versions.keys() - one.versions.keys()) == ("transformers", {"ray"})
    wrong = [[GenerateRequest((0, 0), [5, 10**6], seed=0)]]
    with pytest.raises(IndexError, match="index out of range"):
        list(many.generate(wrong, SamplingOptions(max_new_tokens=4)))
    groups = [[ScoreRequest((s, n), [5, 6 + n], [[7, 8], [9] * (s + 1)]) for n in range(3)] for s in range(9)]
    asked = []
    results = many.score(group for group in groups if asked.append(group) is None)  # type: ignore[func-returns-value]
    scored = [next(results)]
    assert len(asked) <= 7  # two for each worker: the source is read as work goes on
    scored += results
    scores, expected = dict(scored), dict(one.score(groups))
    assert scores.keys() == expected.keys()
    for key in scores:
        for ours, theirs in zip(scores[key], expected[key], strict=True):
            assert ours.logps == pytest.approx(theirs.logps, abs=1e-5)
    many.close()


def test_a_cluster_without_workers_is_given_up_after_a_while(
    cluster: Cluster, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, teachers: dict[str, Path]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", environment["RAY_ADDRESS"])
    options = ModelOptions(engine="transformers", dtype="float32", cluster="ray")
    engine = load_engine(ModelInfo(str(teachers["gpt2"])), options)
    groups = [[GenerateRequest((n, 0), [5, 6], seed=n)] for n in range(400)]
    results = engine.generate(groups, SamplingOptions(max_new_tokens=200))
    next(results)
    monkeypatch.setattr(worker_pool, "PATIENCE_SECONDS", 4.0)  # once they are there, which takes longer
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node, allow_graceful=False)
    with pytest.raises(UnavailableError, match="ray: no worker for"):
        list(results)
    engine.close()
