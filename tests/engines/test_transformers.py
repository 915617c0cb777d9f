from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import FAMILIES

from dpkd_offline.common.errors import UnavailableError
from dpkd_offline.config.base import ModelOptions, SamplingOptions
from dpkd_offline.engines.base import Completion, Engine, GenerateRequest, Key, ScoreRequest
from dpkd_offline.engines.factory import choose_engine, load_engine
from dpkd_offline.engines.transformers import TransformersEngine, draw
from dpkd_offline.models.info import ModelInfo
from dpkd_offline.models.loading import load_model

EOS = [1]
PROMPTS = [[7, 8, 9], [5], list(range(20, 60)), [9, 9, 300, 301], [12, 13]]
SAMPLING = SamplingOptions(max_new_tokens=20)


def options(**changes: object) -> ModelOptions:
    return ModelOptions.model_validate({"engine": "transformers", "dtype": "float32", "max_length": 128, **changes})


def requests(repeat: int = 1) -> list[GenerateRequest]:
    prompts = PROMPTS * repeat
    return [GenerateRequest((0, n), prompt, seed=1000 + n) for n, prompt in enumerate(prompts)]


def sample(engine: Engine, asked: list[GenerateRequest], sampling: SamplingOptions = SAMPLING) -> dict[Key, Completion]:
    return dict(engine.generate([asked], sampling))


def check_completion(completion: Completion, sampling: SamplingOptions) -> None:
    assert 1 <= len(completion.response_ids) <= sampling.max_new_tokens
    assert len(completion.logps) == len(completion.response_ids)
    assert all(logp <= 0 for logp in completion.logps)
    assert not set(completion.response_ids[:-1]) & set(EOS)
    ended = completion.response_ids[-1] in EOS
    assert completion.finish_reason == ("stop" if ended else "length")
    assert ended or len(completion.response_ids) == sampling.max_new_tokens


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, teachers: dict[str, Path]) -> ModelInfo:
    return ModelInfo(str(teachers[request.param]))


def test_a_seed_gives_the_same_response_whatever_the_batch(model: ModelInfo) -> None:
    whole = sample(TransformersEngine(model, options(batch_size=16)), requests())
    alone = TransformersEngine(model, options(batch_size=1))
    some = TransformersEngine(model, options(batch_size=2))
    for request in requests():
        (other,) = sample(alone, [request]).values()
        assert other.response_ids == whole[request.key].response_ids
    for key, completion in sample(some, requests()[::-1]).items():
        assert completion.response_ids == whole[key].response_ids
        assert completion.finish_reason == whole[key].finish_reason


def test_completions_are_well_formed_and_seeds_differ(model: ModelInfo) -> None:
    completions = sample(TransformersEngine(model, options()), requests(8))
    for completion in completions.values():
        check_completion(completion, SAMPLING)
    of_one_prompt = {tuple(completions[0, n].response_ids) for n in range(0, 40, len(PROMPTS))}
    assert len(of_one_prompt) > 4


def test_sampling_log_probs_are_those_of_prefill_at_temperature_1(model: ModelInfo) -> None:
    engine = TransformersEngine(model, options())
    hot = SamplingOptions(max_new_tokens=16, temperature=1.7, top_p=0.8)
    completions = sample(engine, requests(), hot)
    asked = [ScoreRequest((0, n), p, [completions[0, n].response_ids]) for n, p in enumerate(PROMPTS)]
    for key, (score,) in engine.score([asked]):
        torch.testing.assert_close(torch.tensor(score.logps), torch.tensor(completions[key].logps), rtol=0, atol=1e-4)


def test_the_first_token_follows_the_models_distribution(teachers: dict[str, Path]) -> None:
    """20,000 draws against the model's own probabilities, tempered and cut to the nucleus."""
    model = load_model(str(teachers["llama"]), "float32")
    engine = TransformersEngine(ModelInfo(str(teachers["llama"])), options(batch_size=2000))
    for temperature, top_p in ((1.0, 1.0), (0.7, 0.6)):
        sampling = SamplingOptions(max_new_tokens=1, temperature=temperature, top_p=top_p)
        asked = [GenerateRequest((0, n), PROMPTS[0], seed=n) for n in range(20_000)]
        counts = Counter(c.response_ids[0] for c in sample(engine, asked, sampling).values())
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].double() / temperature
        probabilities, order = logits.softmax(-1).sort(descending=True)
        nucleus = (probabilities.cumsum(0) - probabilities) < top_p
        expected = torch.zeros_like(logits).scatter(0, order[nucleus], probabilities[nucleus])
        expected = 20_000 * expected / expected.sum()
        drawn = torch.tensor([counts[n] for n in range(len(expected))]).double()
        assert drawn[expected == 0].sum() == 0
        common = expected >= 5
        chi2 = ((drawn - expected)[common] ** 2 / expected[common]).sum().item()
        freedom = int(common.sum()) - 1
        assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


def test_drawing_inverts_the_distribution_function() -> None:
    torch.manual_seed(0)
    probabilities = torch.rand(500, 1000).pow(8)
    probabilities[:, 990:] = 0
    probabilities /= probabilities.sum(-1, keepdim=True)
    uniforms = torch.rand(500, dtype=torch.float64)
    cumulative = probabilities.double().cumsum(-1)
    expected = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
    assert (draw(probabilities, uniforms) == expected).float().mean() > 0.998  # float32 block sums round
    for edge in (0.0, 1.0 - 2**-53):
        tokens = draw(probabilities, torch.full((500,), edge, dtype=torch.float64))
        assert (probabilities.gather(1, tokens[:, None]) > 0).all()


def test_a_group_gives_the_same_numbers_on_every_run(model: ModelInfo) -> None:
    engine = TransformersEngine(model, options(dtype="bfloat16", batch_size=2))
    groups = [requests(), [GenerateRequest((1, n), p, seed=n) for n, p in enumerate(PROMPTS)]]
    whole = dict(engine.generate(groups, SAMPLING))
    second = dict(TransformersEngine(model, options(dtype="bfloat16", batch_size=2)).generate(groups[1:], SAMPLING))
    assert second == {key: completion for key, completion in whole.items() if key[0] == 1}


def test_what_does_not_fit_into_memory_goes_in_halves(
    teachers: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A GPU that holds 150 tokens: halves, each in its place, and later batches are cut before they are tried."""
    engine = TransformersEngine(ModelInfo(str(teachers["llama"])), options(batch_size=8))
    asked = [ScoreRequest((0, n), [5 + n] * 10, [[40 + n] * 20, [7, 8]]) for n in range(16)]
    whole, sampled = dict(engine.score([asked])), sample(engine, requests(4))
    tried: list[int] = []

    def within_memory(verb: str, tokens: Callable[[Any], int], most: int) -> None:
        original = getattr(engine, verb)

        def run(batch: Any, *rest: Any) -> Any:
            tried.append(sum(map(tokens, batch)))
            if tried[-1] > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return original(batch, *rest)

        monkeypatch.setattr(engine, verb, run)

    within_memory("_score", lambda r: len(r.prompt_ids) + sum(map(len, r.responses)), 150)
    halved = dict(engine.score([asked]))
    assert tried == [256, 128, 128, 128, 128]
    assert halved.keys() == whole.keys()
    for key, scores in halved.items():
        for score, expected in zip(scores, whole[key], strict=True):
            torch.testing.assert_close(torch.tensor(score.logps), torch.tensor(expected.logps), rtol=0, atol=1e-5)
    assert capsys.readouterr().err.count("do not fit into memory") == 1

    tried.clear()
    within_memory("_sample", lambda r: len(r.prompt_ids) + SAMPLING.max_new_tokens, 60)
    again = sample(engine, requests(4))
    assert tried[:4] == [336, 240, 120, 60]
    assert {k: c.response_ids for k, c in again.items()} == {k: c.response_ids for k, c in sampled.items()}
    tried.clear()
    within_memory("_score", len_of_none, 0)
    with pytest.raises(torch.OutOfMemoryError):
        list(engine.score([asked]))


def len_of_none(_: ScoreRequest) -> int:
    return 1


def test_requests_are_taken_group_by_group(model: ModelInfo) -> None:
    taken: list[int] = []

    def groups() -> Iterator[list[GenerateRequest]]:
        for shard in range(3):
            taken.append(shard)
            yield [GenerateRequest((shard, 0), [5], seed=0)]

    results = TransformersEngine(model, options()).generate(groups(), SamplingOptions(max_new_tokens=2))
    assert next(results)[0] == (0, 0)
    assert taken == [0]


def test_unknown_models_and_missing_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnavailableError, match="nowhere"):
        load_engine(ModelInfo(str(tmp_path / "nowhere")), options())
    monkeypatch.setattr("dpkd_offline.engines.factory.find_spec", lambda name: None)
    assert choose_engine("auto") == "transformers"
    with pytest.raises(UnavailableError, match="vLLM is not installed"):
        choose_engine("vllm")
    monkeypatch.setattr("dpkd_offline.engines.factory.find_spec", lambda name: object())
    assert choose_engine("auto") == "vllm"


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.usefixtures("gpus")
def test_vllm_samples_and_scores_as_transformers_do(teachers: dict[str, Path]) -> None:
    """One real engine: repeatable row by row, well-formed, log-probs those of transformers in float32. In a
    process with Flask, whose proxies raise when a library looks at them: what a caller has imported is not vLLM's."""
    import_module("flask")
    model = ModelInfo(str(teachers["llama"]))
    ours = TransformersEngine(model, options())
    engine = load_engine(model, options(engine="vllm"))
    asked = requests(6)
    first = sample(engine, asked)
    second = dict(engine.generate([asked[7:], asked[:7]], SAMPLING))
    assert first.keys() == {request.key for request in asked}
    for key, completion in first.items():
        check_completion(completion, SAMPLING)
        assert second[key].response_ids == completion.response_ids
    scored = [ScoreRequest(r.key, r.prompt_ids, [first[r.key].response_ids]) for r in asked]
    theirs = dict(engine.score([scored]))
    for key, (score,) in ours.score([scored]):
        logps = torch.tensor(score.logps)
        torch.testing.assert_close(torch.tensor(theirs[key][0].logps), logps, rtol=0, atol=1e-3)
        torch.testing.assert_close(torch.tensor(first[key].logps), logps, rtol=0, atol=1e-3)
    engine.close()
