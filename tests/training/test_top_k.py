"""Likeliest tokens in few bytes teach what those in float32 do, within the error that is recorded."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import make_pairs, metrics_of, train_config
from helpers.tiny import replace_shard, score_config
from torch import Tensor

from dpkd_offline.common.errors import DataError, MismatchError
from dpkd_offline.curation.verify import verify
from dpkd_offline.dataset.catalog import summarize_tables
from dpkd_offline.dataset.dataset import Dataset
from dpkd_offline.dataset.schema import SIDES, TopK, to_table
from dpkd_offline.dataset.top_k import NOT_STORED, compact_columns, covering
from dpkd_offline.dataset.writing import claim, write_shard
from dpkd_offline.engines.base import Key, Score, ScoreRequest
from dpkd_offline.generation.reuse import RoundTables
from dpkd_offline.generation.score_teacher import score_teacher
from dpkd_offline.training import losses
from dpkd_offline.training.examples import pair_stream
from dpkd_offline.training.objectives import top_tensors
from dpkd_offline.training.trainer import train

GOLDEN = Path(__file__).parents[1] / "golden" / "v1"
ROWS, VOCABULARY, K = 24, 400, 16
LENGTHS = {"chosen": 2, "rejected": 3}  # of the responses of `make_pairs`
TOP = dict[str, Any]


def teacher_logps(seed: int) -> dict[str, Tensor]:
    """log p of the whole vocabulary, [ROWS, T, V] of each side; some positions are nearly certain, some flat."""
    random = torch.Generator().manual_seed(seed)
    sharpness = torch.tensor([0.3, 1.0, 3.0, 12.0])
    sides = {}
    for side, length in LENGTHS.items():
        logits = torch.randn(ROWS, length, VOCABULARY, generator=random, dtype=torch.float64)
        sides[side] = (logits * sharpness[torch.arange(ROWS) % 4][:, None, None]).log_softmax(-1).float()
    return sides


def with_top_k(folder: Path, logps: dict[str, Tensor], columns: dict[str, str], share: float | None = None) -> Dataset:
    """A dataset whose likeliest tokens are the K of these distributions, as `score-teacher` stores them."""
    dataset = make_pairs(folder, ROWS, 8)
    table = dataset.top_k(0)
    made = {**dataset.pairs(0).require_provenance(), "top_k": K, **({"columns": columns} if columns else {})}
    claim(table, made | ({} if share is None else {"top_mass": share}))
    for shard in range(table.plan.count):
        rows = []
        for n in range(8 * shard, 8 * shard + 8):
            values: TOP = {"id": str(n)}
            for side in SIDES:
                top = logps[side][n].topk(K)
                counts = [K if share is None else covering(of.tolist(), share) for of in top.values]
                kept = [of[:count].tolist() for of, count in zip(top.values, counts, strict=True)]
                values[f"{side}_top_ids"] = [of[:c].tolist() for of, c in zip(top.indices, counts, strict=True)]
                values[f"{side}_top_logps"] = kept
                values[f"{side}_top_mass"] = [min(math.fsum(map(math.exp, of)), 1.0) for of in kept]
            rows.append(TopK(**values))
        write_shard(table, shard, rows)
    return dataset


def read(dataset: Dataset, tmp_path: Path) -> tuple[Tensor, Tensor]:
    """Ids and log-probs [N, K] of y_t, as training reads them, row after row."""
    stream, _ = pair_stream(dataset, train_config(dataset.root, tmp_path, tmp_path), VOCABULARY, top_k=True)
    return top_tensors(sorted(stream.epoch(0), key=lambda e: int(e.id)), (0,))


def student_logps(ids: Tensor) -> Tensor:
    """Random log q of the stored tokens [N, K], with a gradient."""
    logits = torch.randn(len(ids), VOCABULARY, generator=torch.Generator().manual_seed(5))
    logps = logits.log_softmax(-1).gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, NOT_STORED)
    return logps.requires_grad_()


def test_losses_differ_by_what_the_recorded_error_allows(tmp_path: Path) -> None:
    """Log-probs as read are off by ε_k: by rounding, at most δ, and by the shift to the mass, a mean of roundings. With
    p̃_k = p_k exp ε_k, |ε_k| ≤ 2δ, and the same rest,

        KL(p̃‖q) - KL(p‖q) = Σ (p̃_k - p_k) log p_k/q_k + Σ p̃_k ε_k,

    at most (exp 2δ - 1) Σ p_k |log p_k/q_k| + 2δ exp 2δ. A gradient is p̃_k or p_k times one of log q_k.
    """
    logps = teacher_logps(seed=0)
    exact = with_top_k(tmp_path / "float", logps, {})
    half = with_top_k(tmp_path / "half", logps, compact_columns(VOCABULARY))
    (ids, p), (same_ids, read_p) = read(exact, tmp_path), read(half, tmp_path)
    assert torch.equal(ids, same_ids) and p.dtype == read_p.dtype == torch.float32
    facts = next(s.stats for s in summarize_tables(half) if s.name == "top_k/round-000")
    count, most = facts.halves["chosen_top_logps"], facts.rounding_max["chosen_top_logps"]
    stored = torch.tensor([of for row in half.top_k(0).read(0) for of in row.chosen_top_logps])
    off = (stored - p[: len(stored)]).abs()
    assert count == p.numel() and off.max() <= most <= 2**-11 * p.abs().max() * 2
    assert 0.3 < off.mean() * count / facts.rounding_sum["chosen_top_logps"] < 0.7  # half of what it may be
    torch.testing.assert_close(read_p.double().exp().sum(-1), p.double().exp().sum(-1), rtol=0, atol=2e-7)

    q = student_logps(ids)
    ratios = (p.exp() * (p - q).abs()).sum(-1)
    allowed = math.expm1(2 * most) * ratios + 2 * most * math.exp(2 * most) + 1e-5
    gaps = (losses.forward_kl(q, read_p) - losses.forward_kl(q, p)).abs()
    assert (gaps <= allowed).all() and 0 < gaps.mean() < allowed.mean() / 4
    of_half, of_exact = (
        torch.autograd.grad(losses.forward_kl(q, t).sum(), q, retain_graph=True)[0] for t in (read_p, p)
    )
    rest = 1 - q.exp().sum(-1, keepdim=True)
    of_rest = (1 - p.exp().sum(-1, keepdim=True)) / rest * q.exp()  # is the same but for float32
    assert ((of_half - of_exact).abs() <= math.expm1(2 * most) * p.exp() + 1e-5 * (1 + of_rest)).all()
    sizes = [sum(entry.bytes for entry in of.top_k(0).entries().values()) for of in (half, exact)]
    assert sizes[0] < 0.7 * sizes[1]


@pytest.mark.parametrize("columns", [{}, compact_columns(VOCABULARY)], ids=["float", "half"])
def test_tokens_beyond_the_share_are_as_not_stored(columns: dict[str, str], tmp_path: Path) -> None:
    logps = teacher_logps(seed=1)
    dataset = with_top_k(tmp_path / "d", logps, columns, share=0.9)
    ids, p = read(dataset, tmp_path)
    counts = (ids >= 0).sum(-1)
    mass = p.double().exp().sum(-1)
    assert counts.min() == 1 and counts.max() == K and len(set(counts.tolist())) > 4
    assert ((mass > 0.9 - 1e-6) | (counts == K)).all()
    last = p.exp().gather(-1, counts[:, None] - 1)[:, 0]
    assert (mass - last < 0.9 + 1e-3).all()  # as few as that

    q = student_logps(ids)
    best = torch.arange(len(ids)) % VOCABULARY
    of_mixtures = [partial(losses.skew_kl, skew_alpha=0.1), partial(losses.skew_reverse_kl, skew_alpha=0.1)]
    of_mixtures.append(partial(losses.jensen_shannon, jsd_beta=0.3))
    for equation in (losses.forward_kl, losses.reverse_kl, losses.adaptive_kl, losses.acceptance, *of_mixtures):
        together = equation(q, p)
        (gradient,) = torch.autograd.grad(together.sum(), q, retain_graph=True)
        assert torch.isfinite(gradient).all() and (gradient[ids < 0] == 0).all()
        alone = [equation(q[n : n + 1, :k], p[n : n + 1, :k]) for n, k in enumerate(counts.tolist())]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)
    together = losses.logps_from_top(best, ids, p, VOCABULARY)
    alone = [
        losses.logps_from_top(best[n : n + 1], ids[n : n + 1, :k], p[n : n + 1, :k], VOCABULARY)
        for n, k in enumerate(counts.tolist())
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_damage_to_a_cut_table_is_placed(tmp_path: Path) -> None:
    dataset = with_top_k(tmp_path / "d", teacher_logps(seed=2), compact_columns(VOCABULARY), share=0.9)
    table = dataset.top_k(0)
    good = table.read(1)
    short = next(n for n, row in enumerate(good) if len(row.chosen_top_ids[0]) > 2)
    row = good[short]
    for changes, message in (
        (
            {
                "chosen_top_ids": [row.chosen_top_ids[0][:1], *row.chosen_top_ids[1:]],
                "chosen_top_logps": [row.chosen_top_logps[0][:1], *row.chosen_top_logps[1:]],
                "chosen_top_mass": [math.exp(row.chosen_top_logps[0][0]), *row.chosen_top_mass[1:]],
            },
            "column 'chosen_top_mass' is below 0.9, with fewer than K",
        ),
        ({"chosen_top_ids": [[], *row.chosen_top_ids[1:]]}, "column 'chosen_top_ids' has not 1 to 16 entries"),
        ({"chosen_top_ids": [of[:1] for of in row.chosen_top_ids]}, "column 'chosen_top_logps' has not 1 to 16"),
        ({"chosen_top_mass": [0.97 * of for of in row.chosen_top_mass]}, "column 'chosen_top_mass' is not the sum"),
        ({"chosen_top_mass": [0.0 for _ in row.chosen_top_mass]}, "column 'chosen_top_mass' is not the sum"),
    ):
        rows = [*good[:short], replace(row, **changes), *good[short + 1 :]]
        replace_shard(table, 1, to_table(rows, table.schema))
        with pytest.raises(DataError, match=f"row {short}: {message}"):
            read(dataset, tmp_path)


def test_a_dataset_of_float32_goes_on_in_float32(tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN, tmp_path / "ds")
    config = score_config(folder, Path("teacher"), round=1, top_k=3)
    made = Dataset.open(folder).pairs(1).require_provenance()
    top_k = RoundTables.open(Dataset.open(folder), made, config).top_k
    assert top_k is not None and "columns" not in top_k.provenance and top_k.reused_from == 0
    shutil.rmtree(folder / "top_k")
    top_k = RoundTables.open(Dataset.open(folder), made, config).top_k
    assert top_k is not None and top_k.provenance["columns"] == compact_columns(400)
    assert compact_columns(65537).keys() == {"chosen_top_logps", "rejected_top_logps"}


def test_a_cut_from_scoring_to_training(
    datasets_by_family: dict[str, Path], teachers: dict[str, Path], students: dict[str, Path], tmp_path: Path
) -> None:
    folder, teacher = shutil.copytree(datasets_by_family["llama"], tmp_path / "ds"), teachers["llama"]
    score_teacher(score_config(folder, teacher, top_k=300, top_mass=0.5))
    verify(folder)
    rows = Dataset.open(folder).top_k(0).read(0)
    counts = {len(of) for row in rows for of in row.rejected_top_ids}
    assert len(counts) > 3 and max(counts) < 300
    assert min(mass for row in rows for mass in row.rejected_top_mass) >= 0.5 - 1e-6
    for objective in ("kd", "akl", "dpkd-token"):
        output = tmp_path / objective
        train(train_config(folder, students["llama"], output, objective=objective, max_steps=2, holdout=0.2))
        assert all(math.isfinite(value) for line in metrics_of(output) for value in line.values())
    with pytest.raises(MismatchError, match=r"top_mass=0\.5, this command has top_mass=None"):
        score_teacher(score_config(folder, teacher, top_k=300))
    with pytest.raises(ValueError, match="top_mass is a share that some of the top_k tokens cover"):
        score_config(folder, teacher, top_mass=0.5)


class Boundless:
    """An engine whose second token has no probability, or is no number."""

    name, versions = "transformers", {}

    def __init__(self, logp: float) -> None:
        self.logp = logp

    def score(self, groups: Iterable[Sequence[ScoreRequest]], top_k: int = 0) -> Iterator[tuple[Key, list[Score]]]:
        for request in (request for group in groups for request in group):
            tops = [([[5, 6]] * len(y), [[-0.1, self.logp]] * len(y)) for y in request.responses]
            yield request.key, [Score([-0.1] * len(ids), ids, logps) for ids, logps in tops]

    def close(self) -> None:
        pass


@pytest.mark.parametrize("logp", [-math.inf, -1e5, math.nan])
def test_a_log_prob_that_cannot_be_stored_ends_in_a_line(
    logp: float,
    datasets_by_family: dict[str, Path],
    teachers: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = shutil.copytree(datasets_by_family["llama"], tmp_path / "ds")
    monkeypatch.setattr("dpkd_offline.generation.score_teacher.load_engine", lambda *_: Boundless(logp))
    with pytest.raises(DataError, match=r"prompt 'row-\d+': the teacher gave one of its 2 likeliest tokens a log-prob"):
        score_teacher(score_config(folder, teachers["llama"], top_k=2))
