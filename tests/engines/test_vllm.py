"""The whole way with a real vLLM engine, as a user runs it."""

from __future__ import annotations

import json
import re
import subprocess
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.tiny import rows, write_jsonl

from dpkd_offline.common.errors import UnavailableError
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.engines.base import ScoreRequest

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


class FakeVllm:
    """vLLM's scheduler, cache of prefixes and prompt log-probs, without a model; it counts the tokens that it computes.

    The log-prob of a token is a function of what is before it. `v2` is the newer runner, which by id gives nothing at
    all where what it computes begins behind the first position that is asked about, and leaves out other log-probs of
    what it takes from the cache; the older one fills these with zeros.
    """

    def __init__(self, v2: bool = True, chunked: bool = True, caching: bool = True, lost: int = 0) -> None:
        self.vllm_config = SimpleNamespace(
            use_v2_model_runner=v2,
            scheduler_config=SimpleNamespace(max_num_seqs=4, enable_chunked_prefill=chunked),
            cache_config=SimpleNamespace(block_size=BLOCK, enable_prefix_caching=caching, num_gpu_blocks=40),
        )
        self.v2, self.caching, self.lost = v2, caching, lost
        self.waiting = deque[tuple[str, list[int], Any]]()
        self.cache: dict[tuple[int, ...], None] = {}  # blocks, those that were used last at the end
        self.computed: list[int] = []  # a request: tokens
        self.logits = self.most = 0  # positions whose logits exist; requests that were held at once

    def add_request(self, number: str, prompt: Any, params: Any) -> None:
        self.waiting.append((number, list(prompt["prompt_token_ids"]), params))
        self.most = max(self.most, len(self.waiting))

    def step(self) -> list[Any]:
        outputs = [self.run(*self.waiting.popleft()) for _ in range(min(4, len(self.waiting)))]
        return outputs

    def run(self, number: str, ids: list[int], params: Any) -> Any:
        hit = 0
        while self.caching and not params.skip_reading_prefix_cache and hit + BLOCK < len(ids):
            if tuple(ids[: hit + BLOCK]) not in self.cache:
                break
            hit += BLOCK
        for block in (tuple(ids[:end]) for end in range(BLOCK, len(ids) + 1, BLOCK)):
            self.cache.pop(block, None)
            self.cache[block] = None
        while len(self.cache) > self.vllm_config.cache_config.num_gpu_blocks:
            del self.cache[next(iter(self.cache))]
        self.computed.append(len(ids) - hit)
        output = SimpleNamespace(request_id=number, finished=True, num_cached_tokens=hit)
        output.prompt_logprobs = output.prompt_token_id_logprobs = None
        if params.prompt_logprob_token_ids is not None:
            start, rows = params.prompt_logprob_start, params.prompt_logprob_token_ids
            assert self.v2 and len(rows) == len(ids) - 1 - start
            self.logits += len(rows)
            self.lost -= 1
            if hit <= start and self.lost < 0:
                output.prompt_token_id_logprobs = [
                    [logp(ids[: start + 1 + n], token) for token in row] for n, row in enumerate(rows)
                ]
        elif params.prompt_logprobs is not None:
            self.logits += len(ids) - 1 - hit
            known = range(hit + 1 if self.v2 else 1, len(ids))
            values = [logp(ids[:n], ids[n]) if n > hit else 0.0 for n in known]
            width = params.prompt_logprobs + 1
            output.prompt_logprobs = SimpleNamespace(  # nothing for the first position, then a token and its top k
                start_indices=[0, *range(0, width * len(known), width)],
                end_indices=[0, *range(width, width * len(known) + 1, width)],
                token_ids=[ids[n] + k for n in known for k in range(width)],
                logprobs=[value for value in values for _ in range(width)],
            )
        return output


BLOCK = 4


def logp(prefix: list[int], token: int) -> float:
    return -float(hash((*prefix, token)) % 100_003 + 1)


def fake_engine(fake: FakeVllm) -> Any:
    from dpkd_offline.engines.vllm import VllmEngine

    engine = VllmEngine.__new__(VllmEngine)
    engine._llm = SimpleNamespace(llm_engine=fake)  # type: ignore[assignment]
    return engine


def pairs(prompts: int, prompt: int = 13, response: int = 9) -> list[ScoreRequest]:
    """Two responses each, which part at the first token."""
    return [
        ScoreRequest((0, n), [n, *range(1, prompt)], [[100 + n] * response, [200 + n] * response])
        for n in range(prompts)
    ]


ALIKE = [  # responses that have more or less in common, and prompts that end with a block or not
    ScoreRequest((1, 0), [1, 2, 3, 4], [[5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 11], [5, 6, 7, 8, 9, 10], [5, 6], [7]]),
    ScoreRequest((1, 1), [1, 2, 3, 4], [[5, 6, 7, 8, 9, 10, 3], [9], [5, 6, 7, 8, 9, 11]]),
    ScoreRequest((1, 2), [1], [[5], [5, 5, 5, 5, 5, 5, 5, 5, 5, 5], [5, 5, 5, 5, 5, 5, 5, 1]]),
    ScoreRequest((1, 3), [1, 2, 3, 4, 5], [[6, 7, 8, 9, 10, 11, 12, 13], [6, 7, 8, 9, 10, 11, 12, 14], [8, 9]]),
    ScoreRequest((1, 4), [1, 2, 3], [[4, 5]]),
]


def check_scores(requests: list[ScoreRequest], scores: dict[Any, Any], top_k: int = 0) -> None:
    assert scores.keys() == {request.key for request in requests}
    for request in requests:
        for response, score in zip(request.responses, scores[request.key], strict=True):
            prefixes = [[*request.prompt_ids, *response[:n]] for n in range(len(response))]
            logps = [logp(prefix, token) for prefix, token in zip(prefixes, response, strict=True)]
            assert score.logps == logps
            assert score.top_ids == ([[token + k for k in range(1, top_k + 1)] for token in response] if top_k else [])


@pytest.mark.parametrize("top_k", [0, 2])
@pytest.mark.parametrize("v2", [True, False])
@pytest.mark.parametrize("caching", [True, False])
def test_scores_are_those_of_each_response_whatever_the_cache_holds(v2: bool, caching: bool, top_k: int) -> None:
    for chunked, lost in ((True, 0), (False, 0), (True, 5)):
        fake = FakeVllm(v2, chunked, caching, lost)
        requests = [*pairs(30), *ALIKE]
        groups = iter([requests[:7], [], requests[7:8], requests[8:], []])  # empty ones: no other has come yet
        check_scores(requests, dict(fake_engine(fake).score(groups, top_k)), top_k)
        assert fake.most <= 8  # twice what the scheduler runs


def test_a_prompt_is_computed_once_for_both_responses() -> None:
    """All but the last block of it, in tokens computed: 13 and 9 twice by id, where 44 would be without a cache."""
    by_id = FakeVllm()
    check_scores(pairs(20), dict(fake_engine(by_id).score([pairs(20)])))
    assert sum(by_id.computed) == 20 * (13 + 9 + 1 + 9)  # 12 of the prompt are whole blocks
    assert by_id.logits == 20 * (9 + 8)  # the first token of y_s is scored where that of y_t is
    for v2 in (True, False):
        likeliest = FakeVllm(v2, chunked=v2)
        check_scores(pairs(20), dict(fake_engine(likeliest).score([pairs(20)], 3)), 3)
        assert sum(likeliest.computed) == 20 * (12 + 2 * (1 + 9))
        assert likeliest.logits == 20 * 2 * 9  # none of the prompt but its last


def test_what_vllm_never_answers_ends_the_run() -> None:
    with pytest.raises(UnavailableError, match="no log-probs of a prompt of 13 tokens"):
        list(fake_engine(FakeVllm(lost=10**6)).score([pairs(2)]))


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
        f"generate --dataset {folder} --role student --model {student} --max-new-tokens 12 --engine transformers "
        "--dtype float32 --max-length 256",  # a minute less to load
        f"score-teacher --dataset {folder} --model {teacher} {engine}",
        f"train --dataset {folder} --student {student} --output {trained} --max-steps 3 --dtype float32",
        f"evaluate --model {trained} --prompts {source} --output {tmp_path / 'eval'} --seeds 1,2 --teacher {teacher} "
        + sampling,
    ]
    for command in commands:
        done = run_cli(*command.split())
        assert done.returncode == 0, done.stderr
        assert not re.search("Warning|Triton", done.stderr)  # what libraries say is not for people
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
