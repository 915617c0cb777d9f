"""Ways to let stored y_s stand for y_s of the student of now: bias and variance of each, where all can be listed.

usage: python tests/benchmarks/off_policy.py [--seeds 12] [--beta 2]

On the model of tests/helpers/enumerated.py (121 responses, float64). Teacher and sampler b are random; the student q
has gone from b some steps of Algorithm 1. Prints a Markdown table, means over the seeds:
- bias: of the expected gradient from the on-policy one, as a share of the latter's norm
- deviation: standard deviation of a pair's gradient, as a share of that on policy
- error of 16: root mean square error of the mean of 16 pairs, as a share of the same on policy
- KL(p‖q), nats a response, after 50 and 400 steps down the expected gradient while y_s stay those of b, and the worst
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.enumerated import VARIANTS, gradient, kl, random_model, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--beta", type=float, default=2.0)
    options = parser.parse_args()
    models = [(random_model(2 * seed), random_model(2 * seed + 1)) for seed in range(options.seeds)]
    moved = [train(sampler, teacher, options.beta, None, steps=40, rate=0.5) for teacher, sampler in models]
    drift = fmean(kl(sampler, student) for (_, sampler), student in zip(models, moved, strict=True))
    start = fmean(kl(teacher, sampler) for teacher, sampler in models)
    print(f"KL(b‖q) {drift:.2f} nats a response; KL(p‖b) {start:.2f}\n")
    print(
        "| weight of y_s | bias | deviation | error of 16 | KL(p‖q) after 50 | after 400 | the worst |\n"
        + "|---" * 7
        + "|"
    )
    for name in (None, *VARIANTS):
        rows = []
        for (teacher, sampler), student in zip(models, moved, strict=True):
            exact, deviation = gradient(student, student, teacher, options.beta, "none")
            mean, own = exact, deviation
            if name is not None:
                mean, own = gradient(student, sampler, teacher, options.beta, name)
            bias = float((mean - exact).norm())
            error = math.sqrt(bias**2 + own**2 / 16) / (deviation / 4)
            middle = train(sampler, teacher, options.beta, name, steps=50, rate=0.5)
            end = train(sampler, teacher, options.beta, name, steps=400, rate=0.5)
            rows.append((bias / float(exact.norm()), own / deviation, error, kl(teacher, middle), kl(teacher, end)))
        columns = list(zip(*rows, strict=True))
        cells = [f"{fmean(column):.2f}" for column in columns] + [f"{max(columns[-1]):.2f}"]
        print(f"| {name or '(on policy: y_s of q)'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
