"""The learning rate of each student of study.yaml, chosen among those of the pilot.

    python pipelines/study_rates.py runs/study-pilot

A student of the pilot is called NAME.RATE. Of the rates of a NAME, those whose Rouge-L of greedy responses to held-out
prompts is within one standard error of the highest count as equally good; of these it takes the one whose distribution
is nearest to the teacher's on held-out responses y_t (the acceptance rate, 1 - TV), and where that is not measured, as
of sft, the one with the highest Rouge-L. Numbers are those after the last step, means over the seeds. Where all is
equal the lowest rate is taken. The rule was fixed before the pilot ran.

Prints the numbers as a Markdown table, the chosen ones marked, then the words with which study.yaml takes them: those
of dpkd are for its variants, too, and those of a student for the one that is trained for longer. Ends with 3 where a
student has not been trained.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from dpkd_offline.common.errors import DataError, DpkdError
from dpkd_offline.common.markdown import markdown_table
from dpkd_offline.pipeline.study_layout import read_study
from dpkd_offline.training.record import metrics_lines

VARIANTS = {  # of a student in study.yaml: those that take its rate
    "dpkd": (
        *("dpkd-uncorrected", "dpkd-without-nll", "dpkd-with-lm"),
        *("dpkd-beta-0_1", "dpkd-beta-1", "dpkd-beta-4", "dpkd-two-rounds", "dpkd-long"),
    ),
    **{name: (f"{name}-long",) for name in ("sft", "seqkd", "kd", "rkl", "gkd")},
}
ROUGE_L, ERROR, ACCEPTANCE = "val_rouge_l", "val_rouge_l_error", "val_acceptance"
Measures = Mapping[str, float]


def last_validation(metrics: Path) -> Measures:
    """The numbers of the last validation of a run."""
    lines = [line for line in metrics_lines(metrics) if ROUGE_L in line]
    if not lines:
        raise DataError(f"{metrics}: no validation with Rouge-L; let `distill` of the pilot come to its end")
    return lines[-1]


def measures_of(folder: Path) -> dict[str, dict[str, Measures]]:
    """By name and rate the numbers of the pilot's students, means over their seeds.

    Raises:
        DataError: the folder is no study, or a student is not trained.
    """
    layout = read_study(folder)
    if layout is None:
        raise DataError(f"{folder}: no study.json; is this the folder of a study?")
    found: dict[str, dict[str, Measures]] = defaultdict(dict)
    for student, of in layout.students.items():
        name, _, rate = student.partition(".")
        runs = [folder / run.folder / "student" for run in of.runs]
        if missing := [run for run in runs if not (run / "training.json").exists()]:
            raise DataError(f"{missing[0]}: not trained to its end; the same `distill` goes on")
        last = [last_validation(run / "metrics.jsonl") for run in runs]
        common = [key for key in (ROUGE_L, ERROR, ACCEPTANCE) if all(key in of_seed for of_seed in last)]
        found[name][rate] = {key: fmean(of_seed[key] for of_seed in last) for key in common}
    return found


def choose(rates: Mapping[str, Measures]) -> str:
    """The rate that the rule takes, of those of one student."""
    ordered = sorted(rates, key=float)
    best = max(ordered, key=lambda rate: rates[rate][ROUGE_L])
    least = rates[best][ROUGE_L] - rates[best].get(ERROR, 0.0)
    equal = [rate for rate in ordered if rates[rate][ROUGE_L] >= least]
    if all(ACCEPTANCE in rates[rate] for rate in equal):
        return max(equal, key=lambda rate: rates[rate][ACCEPTANCE])
    return best


def table(found: Mapping[str, Mapping[str, Measures]]) -> str:
    """A row for each student, with Rouge-L ± its standard error and the acceptance rate of each rate."""
    every = sorted({rate for rates in found.values() for rate in rates}, key=float)
    rows = [[f"`{name}`", *(_cell(rates, rate) for rate in every)] for name, rates in found.items()]
    return markdown_table(["Rouge-L, acceptance in %", *every], rows)


def _cell(rates: Mapping[str, Measures], rate: str) -> str:
    if rate not in rates:
        return ""
    of = rates[rate]
    error = f" ± {of[ERROR]:.2f}" if ERROR in of else ""
    accepted = f", {of[ACCEPTANCE]:.1%}".rstrip("%") if ACCEPTANCE in of else ""
    text = f"{of[ROUGE_L]:.2f}{error}{accepted}"
    return f"**{text}**" if rate == choose(rates) else text


def words(found: Mapping[str, Mapping[str, Measures]]) -> list[str]:
    """What to add to `distill pipelines/study.yaml`."""
    chosen = {name: choose(rates) for name, rates in found.items()}
    chosen |= {variant: chosen[name] for name, of in VARIANTS.items() if name in chosen for variant in of}
    return [f"--set students.{name}.train.learning_rate={float(rate):.1e}" for name, rate in chosen.items()]


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        found = measures_of(Path(arguments[0]))
    except DpkdError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(table(found), " \\\n".join(words(found)), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
