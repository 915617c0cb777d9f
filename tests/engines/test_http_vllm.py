"""The whole way with a real vLLM server, as a user runs it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.faults import start
from helpers.tiny import files_of, rows, write_jsonl

from dpkd_offline.config.base import ModelOptions
from dpkd_offline.config.evaluate import EvaluateConfig
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.engines.base import ScoreRequest
from dpkd_offline.engines.factory import load_engine
from dpkd_offline.evaluation.evaluate import evaluate
from dpkd_offline.models.info import ModelInfo

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

# Per-request seeds crash the CPU build's chunked prefill.
FLAGS = "--enforce-eager --no-enable-chunked-prefill --max-num-batched-tokens 4096 --max-model-len 256 --dtype float32"


@pytest.fixture(scope="module")
def url(gpus: None, teachers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the llama teacher; its process group ends with the tests."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    # `vllm serve` asks for the version of a package "vllm", which the CPU build is not; this is the same server.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(teachers["llama"])]
    where = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*command, *where, *FLAGS.split()],
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        ) as server,
    ):
        try:
            for _ in range(600):
                assert server.poll() is None, log.read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(server.pid, signal.SIGKILL)


def test_generate_score_evaluate_by_a_server(
    url: str,
    tmp_path: Path,
    teachers: dict[str, Path],
) -> None:
    """One server is teacher and student: repeatable, and its log-probs are those of transformers in float32."""
    source, model = write_jsonl(tmp_path / "p.jsonl", rows(30)), teachers["llama"]
    engine = f"--engine http --url {url}/v1 --max-length 255 --model {model}"
    sampling = "--max-new-tokens 12 --temperature 0.9 --top-p 0.95"
    folders, printed = [tmp_path / name for name in ("ds", "again")], tmp_path / "printed"
    commands = [
        command
        for folder in folders
        for command in (
            f"generate --dataset {folder} --role teacher --prompts {source} --shard-size 8 {sampling} {engine}",
            f"generate --dataset {folder} --role student {sampling} {engine}",
            f"score-teacher --dataset {folder} {engine}",
        )
    ]
    evaluation = f"evaluate --output {tmp_path / 'out'} --prompts {source} --seeds 1,2 {sampling} {engine}"
    for command in (*commands, evaluation):
        process = start(list(command.split()), errors=printed)
        process.join(300)
        assert process.exitcode == 0, printed.read_text()
    assert "30 held-out prompts, 2 seeds" in printed.read_text()

    dataset, again = Dataset.open(tmp_path / "ds"), Dataset.open(tmp_path / "again")
    pairs, others = ([p for shard in range(4) for p in d.pairs(0).read(shard)] for d in (dataset, again))
    assert [p.id for p in pairs] == [f"row-{n}" for n in range(30)]
    assert [(p.chosen_ids, p.rejected_ids) for p in pairs] == [(p.chosen_ids, p.rejected_ids) for p in others]
    assert files_of(tmp_path / "ds/prompts") == files_of(tmp_path / "again/prompts")

    asked = [ScoreRequest((0, n), p.prompt_ids, [p.chosen_ids, p.rejected_ids]) for n, p in enumerate(pairs)]
    options = ModelOptions(engine="transformers", dtype="float32", max_length=255)
    for (_, n), (chosen, rejected) in load_engine(ModelInfo(str(model)), options).score([asked]):
        for stored, expected in (
            (pairs[n].teacher_chosen_logps, chosen.logps),
            (pairs[n].teacher_rejected_logps, rejected.logps),
            (pairs[n].behavior_rejected_logps, rejected.logps),
        ):
            torch.testing.assert_close(torch.tensor(stored), torch.tensor(expected), rtol=0, atol=1e-3)


def test_a_teacher_behind_a_url_scores_what_a_student_here_says(
    url: str, tmp_path: Path, teachers: dict[str, Path], students: dict[str, Path]
) -> None:
    values = {
        "model": str(students["llama"]),
        "prompts": str(write_jsonl(tmp_path / "p.jsonl", rows(4))),
        "engine": "transformers",
        "dtype": "float32",
        "max_new_tokens": 8,
        "max_length": 255,
        "seeds": [1],
        "teacher": str(teachers["llama"]),
    }
    results = [
        evaluate(EvaluateConfig.model_validate({**values, "output": tmp_path / name, "teacher_url": at})).results
        for name, at in (("there", f"{url}/v1"), ("here", ""))
    ]
    assert results[0]["rouge_l"] == results[1]["rouge_l"]
    for measure in ("teacher_nll", "reward", "accepted"):
        assert results[0][measure]["mean"] == pytest.approx(results[1][measure]["mean"], abs=1e-2)
    assert results[0]["made"]["teacher_engine"] == "http"


def test_the_likeliest_tokens_of_a_server(url: str, teachers: dict[str, Path]) -> None:
    from dpkd_offline.models.loading import load_model

    options = ModelOptions(engine="http", url=(url,), max_length=255)
    engine = load_engine(ModelInfo(str(teachers["llama"])), options)
    prompt, response = [7, 8, 9], [20, 300, 41, 1]
    ((_, (score,)),) = engine.score([[ScoreRequest((0, 0), prompt, [response])]], top_k=5)
    engine.close()
    with torch.no_grad():
        logits = load_model(str(teachers["llama"]), "float32")(input_ids=torch.tensor([prompt + response])).logits
    logps = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    top = logps.topk(5)
    assert score.top_ids == top.indices.tolist()
    torch.testing.assert_close(torch.tensor(score.top_logps), top.values, rtol=0, atol=1e-3)
    own = logps.gather(1, torch.tensor(response)[:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor(score.logps), own, rtol=0, atol=1e-3)
