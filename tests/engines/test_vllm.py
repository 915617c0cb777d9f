"""The whole way with a real vLLM engine, as a user runs it."""

from __future__ import annotations

import json
import subprocess
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.tiny import rows, write_jsonl

from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.engines.base import ScoreRequest

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


class Lossy:
    """An engine of vLLM's that leaves requests by id without an answer, as many as it is told to."""

    def __init__(self, unanswered: int) -> None:
        self.unanswered, self.running = unanswered, deque[tuple[str, Any, Any]]()
        self.vllm_config = SimpleNamespace(use_v2_model_runner=True)

    def add_request(self, number: str, prompt: Any, params: Any) -> None:
        self.running.append((number, prompt["prompt_token_ids"], params))

    def step(self) -> list[Any]:
        number, ids, params = self.running.popleft()
        output = SimpleNamespace(request_id=number, finished=True, prompt_logprobs=None, prompt_token_id_logprobs=None)
        if params.prompt_logprob_token_ids is None:
            places = list(range(len(ids)))
            output.prompt_logprobs = SimpleNamespace(
                start_indices=places, end_indices=[n + 1 for n in places], token_ids=ids, logprobs=[-t for t in ids]
            )
        elif self.unanswered:
            self.unanswered -= 1
        else:
            output.prompt_token_id_logprobs = [[-token] for (token,) in params.prompt_logprob_token_ids]
        return [output]


def test_what_vllm_leaves_without_an_answer_is_asked_again() -> None:
    from dpkd_offline.engines.vllm import VllmEngine

    engine = VllmEngine.__new__(VllmEngine)
    requests = [ScoreRequest((0, row), [1, 2], [[row + 3, 4], [5]]) for row in range(4)]
    for unanswered in (0, 3, 8):
        engine._llm = SimpleNamespace(llm_engine=Lossy(unanswered))
        groups = iter([requests[:2], [], requests[2:]])  # an empty one: no other has come yet
        scores = dict(engine.score(groups))
        assert {key: [score.logps for score in of_row] for key, of_row in scores.items()} == {
            (0, row): [[-row - 3, -4], [-5]] for row in range(4)
        }


def test_what_vllm_cannot_load_for_want_of_memory_names_what_needs_less() -> None:
    from dpkd_offline.engines.vllm import cannot_load

    for words in (
        "No available memory for the cache blocks.",
        "Engine core initialization failed. See root cause above.",
    ):
        assert "a lower --max-length" in str(cannot_load("m", ValueError(words)))
    assert "--max-length" not in str(cannot_load("m", ValueError("unknown architecture")))


@pytest.mark.usefixtures("gpus")
def test_generate_score_train_evaluate(
    tmp_path: Path,
    teachers: dict[str, Path],
    students: dict[str, Path],
    run_cli: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    source, folder = write_jsonl(tmp_path / "p.jsonl", rows(30)), tmp_path / "ds"
    teacher, student, trained = teachers["gpt2"], students["gpt2"], tmp_path / "trained"
    engine = "--engine vllm --dtype float32 --max-length 256"
    sampling = f"--max-new-tokens 12 {engine}"
    commands = [
        f"generate --dataset {folder} --role teacher --model {teacher} --prompts {source} --shard-size 8 {sampling}",
        f"generate --dataset {folder} --role student --model {student} {sampling}",
        f"score-teacher --dataset {folder} --model {teacher} {engine}",
        f"train --dataset {folder} --student {student} --output {trained} --max-steps 3 --dtype float32",
        f"evaluate --model {trained} --prompts {source} --output {tmp_path / 'eval'} --seeds 1,2 --teacher {teacher} "
        + sampling,
    ]
    for command in commands:
        done = run_cli(*command.split())
        assert done.returncode == 0, done.stderr
    dataset = Dataset.open(folder)
    pairs = [pair for shard in range(dataset.plan.count) for pair in dataset.pairs(0).read(shard)]
    assert [pair.id for pair in pairs] == [f"row-{n}" for n in range(30)]
    for pair in pairs:
        assert len(pair.teacher_chosen_logps) == len(pair.chosen_ids)
        assert max(pair.teacher_rejected_logps) <= 0
    provenance = dataset.pairs(0).provenance() or {}
    assert (provenance["engine"], sorted(provenance["versions"])) == ("vllm", ["torch", "vllm"])
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert (results["prompts"], results["made"]["settings"]["engine"]) == (30, "vllm")
