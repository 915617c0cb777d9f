"""What noise on a student's weights does to reverse KL, implicit reward and Rouge-L: Figure 2 of the paper.

usage: python pipelines/reward_noise.py DATASET --student MODEL --teacher MODEL --figure FILE.svg
           [--scales 0,0.05,0.1,0.15,0.2,0.3] [--seeds 0,1,2] [--limit 48] [--max-new-tokens 64] [--beta 2] …

DATASET has pairs of this teacher, in tokens that it shares with the student. Of them the first --limit by the hash of
their ids are read that have a reference: those that training holds out come first. A student with noise of scale s has
W + s std(W) ε in place of each weight matrix W, with ε ~ N(0, 1) of the seed.

Of each, a row of a Markdown table, in nats and per token:
- reverse KL: mean of log q(y)/p(y) over the tokens y that it samples itself, at temperature 1; an estimate of KL(q‖p)
- reward of y_t and of y_s: the mean of β/|y| log q(y)/p(y) over the stored responses; margin: their difference
- Rouge-L of the responses that it sampled
The figure has the rewards over the reverse KL; lighter points have a higher Rouge-L, as in the paper.
"""

from __future__ import annotations

import argparse
import heapq
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from dpkd_offline.common.console import prepare_libraries
from dpkd_offline.common.errors import DataError, DpkdError, MismatchError

if TYPE_CHECKING:
    from dpkd_offline.config.base import ModelOptions, SamplingOptions
    from dpkd_offline.dataset.schema import PreferencePair
    from dpkd_offline.engines.base import Completion, Engine, Score
    from dpkd_offline.models.info import ModelInfo


@dataclass(frozen=True)
class Point:
    """A student with noise, and what was measured of it. In nats but for Rouge-L x 100."""

    scale: float
    seed: int
    reverse_kl: float
    reward_chosen: float
    reward_rejected: float
    rouge_l: float

    @property
    def margin(self) -> float:
        return self.reward_chosen - self.reward_rejected


def arguments(given: Sequence[str]) -> argparse.Namespace:
    def numbers(kind: type) -> Any:
        return lambda text: [kind(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--student", required=True, help="model folder or Hub name")
    parser.add_argument("--teacher", required=True, help="the one that scored the dataset")
    parser.add_argument("--figure", type=Path, required=True, help="an SVG file")
    parser.add_argument("--scales", type=numbers(float), default="0,0.05,0.1,0.15,0.2,0.3", help="of the noise")
    parser.add_argument("--seeds", type=numbers(int), default="0,1,2", help="of the noise; scale 0 has one")
    parser.add_argument("--limit", type=int, default=48, help="pairs")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--beta", type=float, default=2.0)
    parser.add_argument("--engine", default="transformers")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch-size", type=int, default=32)
    return parser.parse_args(given)


def read_pairs(folder: Path, limit: int, student: ModelInfo, teacher: ModelInfo) -> list[PreferencePair]:
    """Pairs of the latest round with the smallest draws that have a reference.

    Raises:
        DataError: there are none.
        MismatchError: they are of another teacher, or in tokens that it does not share.
    """
    from dpkd_offline.dataset.columns import draws_of
    from dpkd_offline.dataset.dataset import Dataset

    dataset = Dataset.open(folder)
    if not (rounds := dataset.rounds()):
        raise DataError(f"{folder}: no pairs yet; run `dpkd-offline score-teacher` first")
    table = dataset.pairs(rounds[-1])
    provenance = table.require_provenance()
    if provenance["scored"] == "text" or student.tokenizer_fingerprint != teacher.tokenizer_fingerprint:
        raise MismatchError(
            f"{table.folder}: student and teacher do not share a tokenizer, and are compared token by token"
        )
    if provenance["model"]["revision"] != teacher.identity["revision"]:
        raise MismatchError(f"{table.folder}: another teacher scored these pairs: {provenance['model']['name']}")
    drawn: list[tuple[float, PreferencePair]] = []
    for shard in range(dataset.plan.count):
        draws = draws_of(table.read_arrow(shard, ["id"])["id"]).tolist()
        with_reference = [d for d in zip(draws, table.read(shard), strict=True) if d[1].reference is not None]
        drawn = heapq.nsmallest(limit, [*drawn, *with_reference], key=lambda d: d[0])
    if not drawn:
        raise DataError(f"{table.folder}: no pair has a reference, for Rouge-L")
    return [pair for _, pair in drawn]


def save_with_noise(student: ModelInfo, scale: float, seed: int, dtype: str, folder: Path) -> ModelInfo:
    """Write the student with noise on its weight matrices. The same seed gives every scale the same ε."""
    import torch

    from dpkd_offline.models.info import ModelInfo
    from dpkd_offline.models.loading import load_model, save_student

    model = load_model(student.name, "float32", device=torch.device("cpu"))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in (p for p in model.parameters() if p.ndim >= 2):
            weights += scale * weights.std() * torch.randn(weights.shape, generator=random)
    save_student(model.to(getattr(torch, dtype)), student.tokenizer, folder, card="")
    return ModelInfo(str(folder))


def sample(engine: Engine, pairs: Sequence[PreferencePair], sampling: SamplingOptions) -> list[Completion]:
    """A response to each prompt. A row has the same seed with every student, so that alike students answer alike."""
    from dpkd_offline.engines.base import GenerateRequest, row_seed

    requests = [GenerateRequest((0, n), p.prompt_ids, row_seed(0, p.id)) for n, p in enumerate(pairs)]
    by_key = dict(engine.generate([requests], sampling))
    return [by_key[request.key] for request in requests]


def score(
    engine: Engine, pairs: Sequence[PreferencePair], responses: Sequence[Sequence[list[int]]]
) -> list[list[Score]]:
    """The scores of the responses to each prompt."""
    from dpkd_offline.engines.base import ScoreRequest

    together = zip(pairs, responses, strict=True)
    requests = [ScoreRequest((0, n), pair.prompt_ids, of) for n, (pair, of) in enumerate(together)]
    by_key = dict(engine.score([requests]))
    return [by_key[request.key] for request in requests]


def reward(student_logps: Sequence[float], teacher_logps: Sequence[float], beta: float) -> float:
    """β/|y| log q(y)/p(y) of one response, from its tokens' log-probs."""
    import torch

    from dpkd_offline.training.losses import implicit_reward

    sums = [torch.tensor(logps, dtype=torch.float64).sum() for logps in (student_logps, teacher_logps)]
    return float(implicit_reward(*sums, torch.tensor(len(student_logps)), beta))


def measure(
    scale: float,
    seed: int,
    student: ModelInfo,
    teacher: Engine,
    pairs: Sequence[PreferencePair],
    options: ModelOptions,
    sampling: SamplingOptions,
    beta: float,
) -> Point:
    """Of a student with noise of this scale and seed."""
    from dpkd_offline.engines.factory import load_engine
    from dpkd_offline.metrics.text import rouge_l

    with TemporaryDirectory() as folder:
        engine = load_engine(save_with_noise(student, scale, seed, options.dtype, Path(folder)), options)
        completions = sample(engine, pairs, sampling)
        stored = score(engine, pairs, [[pair.chosen_ids, pair.rejected_ids] for pair in pairs])
        engine.close()
    under_teacher = score(teacher, pairs, [[completion.response_ids] for completion in completions])
    own = [c.logps for c in completions]
    by_teacher = [scores[0].logps for scores in under_teacher]
    ratios = [q - p for qs, ps in zip(own, by_teacher, strict=True) for q, p in zip(qs, ps, strict=True)]
    rewards = [
        (
            reward(chosen.logps, pair.teacher_chosen_logps, beta),
            reward(rejected.logps, pair.teacher_rejected_logps, beta),
        )
        for pair, (chosen, rejected) in zip(pairs, stored, strict=True)
    ]
    texts = student.tokenizer.batch_decode([c.response_ids for c in completions], skip_special_tokens=True)
    rouge = [rouge_l(text, [pair.reference or ""]) for text, pair in zip(texts, pairs, strict=True)]
    return Point(scale, seed, fmean(ratios), *map(fmean, zip(*rewards, strict=True)), fmean(rouge))


def draw(points: Sequence[Point], file: Path) -> None:
    """The rewards over the reverse KL; points are lighter where Rouge-L is higher."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "dpkd-offline"  # the same file of the same numbers
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    x, rouge = [p.reverse_kl for p in points], [p.rouge_l for p in points]
    rewards = {
        "implicit reward of $y_t$": [p.reward_chosen for p in points],
        "margin of $y_t$ over $y_s$": [p.margin for p in points],
    }
    for axes, (title, y) in zip(panels, rewards.items(), strict=True):
        dots = axes.scatter(x, y, c=rouge, cmap="viridis", edgecolors="0.3", linewidths=0.5)
        for place, point in enumerate(points):
            if point.seed == points[0].seed:
                where = (point.reverse_kl, y[place])
                axes.annotate(f"{point.scale:g}", where, (4, 4), textcoords="offset points", fontsize="x-small")
        axes.set(xlabel="reverse KL, nats a token", ylabel=title)
        axes.margins(0.12)  # room for the scales beside the points
    figure.colorbar(dots, ax=panels, label="Rouge-L")
    figure.savefig(file, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def main(given: Sequence[str]) -> None:
    options = arguments(given)
    prepare_libraries()
    from dpkd_offline.config.base import ModelOptions, SamplingOptions
    from dpkd_offline.engines.factory import load_engine
    from dpkd_offline.models.info import ModelInfo

    options.figure.parent.mkdir(parents=True, exist_ok=True)
    student, teacher = ModelInfo.load(options.student), ModelInfo.load(options.teacher)
    pairs = read_pairs(options.dataset, options.limit, student, teacher)
    how = ModelOptions(engine=options.engine, dtype=options.dtype, batch_size=options.batch_size)
    sampling = SamplingOptions(max_new_tokens=options.max_new_tokens)
    engine = load_engine(teacher, how)
    points: list[Point] = []
    print("| noise | seed | reverse KL | reward of y_t | reward of y_s | margin | Rouge-L |")
    print("|---|---|---|---|---|---|---|")
    for scale in options.scales:
        for seed in options.seeds if scale else options.seeds[:1]:
            point = measure(scale, seed, student, engine, pairs, how, sampling, options.beta)
            points.append(point)
            numbers = (point.reverse_kl, point.reward_chosen, point.reward_rejected, point.margin)
            row = " | ".join([f"{scale:g}", str(seed), *(f"{n:.3f}" for n in numbers), f"{point.rouge_l:.2f}"])
            print(f"| {row} |", flush=True)
    draw(points, options.figure)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except DpkdError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
