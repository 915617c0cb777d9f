"""A real Ray cluster on this machine: a head without CPUs for work, and nodes of one CPU each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, command_line, files_of, rows, write_jsonl
from ray.cluster_utils import Cluster

from dpkd_offline.engines import load_engine
from dpkd_offline.errors import UnavailableError
from dpkd_offline.config import ModelOptions

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
    generate = ["--max-new-tokens", 100, "--shard-size", 2, "--dataset", folder, *TINY, *more]
    return [
        ["generate", "--role", "teacher", "--model", teacher, "--prompts", source, *generate],
        ["generate", "--role", "student", "--model", student, *generate],
        ["score-teacher", "--model", teacher, "--dataset", folder, *TINY, *more],
    ]


def data_of(folder: Path) -> dict[str, bytes]:
    """All but who made it: shards, manifests, dataset.json, card."""
    return {name: data for name, data in files_of(folder).items() if not name.endswith("_table.json")}


def test_a_lost_node_changes_no_byte(
    tmp_path: Path, cluster: Cluster, environment: dict[str, str], teachers: dict[str, Path], students: dict[str, Path]
) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", rows(120))
    models = teachers["llama"], students["llama"]
    for arguments in stages(tmp_path / "one", source, *models):
        subprocess.run(command_line(*arguments), check=True, capture_output=True, env=ONE_THREAD)
    committed = tmp_path / "many" / "responses" / "teacher" / "_manifest"
    first, *rest = (command_line(*stage) for stage in stages(tmp_path / "many", source, *models, "--cluster", "ray"))
    with subprocess.Popen(
        first, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        while len(list(committed.glob("[!.]*.json"))) < 5:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        left = 60 - len(list(committed.glob("[!.]*.json")))
        stdout, stderr = process.communicate(timeout=300)
    assert (process.returncode, left > 10) == (0, True), stderr
    assert stdout == f"{tmp_path / 'many' / 'responses' / 'teacher'}\n"
    print(stderr)
    assert "is lost; " in stderr
    for command in rest:  # with the nodes that are left
        subprocess.run(command, check=True, capture_output=True, env=environment)
    assert data_of(tmp_path / "many") == data_of(tmp_path / "one")
    made = (tmp_path / "many" / "pairs" / "round-000" / "_table.json").read_text()
    assert '"engine": "transformers"' in made
    assert '"ray": "' in made
