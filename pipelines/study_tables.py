"""The tables of a study again, from what its students left: responses, training records, times.

    python pipelines/study_tables.py runs/study
    python pipelines/study_tables.py runs/study --baseline rkl      differences to another student than the recipe's
    python pipelines/study_tables.py runs/study --check             also says whether results.md is the same

No model is run, and nothing is written. Intervals are resampled with a fixed seed: equal files give equal digits.
With --check it ends with 4, and the first line that differs, where results.md of the folder is another.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from dpkd_offline.common.errors import DataError, DpkdError, MismatchError, UsageError
from dpkd_offline.config.base import in_words
from dpkd_offline.pipeline.study_layout import read_study
from dpkd_offline.pipeline.study_results import study_results
from dpkd_offline.pipeline.study_table import study_table


def tables(folder: Path, baseline: str | None = None) -> str:
    """The Markdown of results.md, with differences to `baseline` if it is given.

    Raises:
        DataError: the folder is no study.
        UsageError: the study has no student of that name.
    """
    layout = read_study(folder)
    if layout is None:
        raise DataError(f"{folder}: no study.json; is this the folder of a study?")
    if baseline is not None and baseline not in layout.students:
        raise UsageError(f"--baseline {baseline}: the study's students are {in_words([*layout.students])}")
    layout = layout.model_copy(update={"baseline": baseline or layout.baseline})
    return study_table(study_results(folder, layout))


def check(folder: Path, text: str) -> None:
    """Compare with results.md.

    Raises:
        MismatchError: it differs.
    """
    path = folder / "results.md"
    if not path.exists():
        raise DataError(f"{path}: there is none; let `distill` come to its end")
    lines = zip_longest(path.read_text(encoding="utf-8").splitlines(), text.splitlines())
    for number, (stored, computed) in enumerate(lines, 1):
        if stored != computed:
            raise MismatchError(f"{path}, line {number}: {stored!r}, where the files say {computed!r}")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--baseline", help="the student that the others are compared with")
    parser.add_argument("--check", action="store_true", help="compare with results.md of the folder")
    options = parser.parse_args(arguments)
    try:
        print(tables(options.folder, options.baseline))
        if options.check:
            check(options.folder, tables(options.folder))
            print(f"{options.folder / 'results.md'}: the same, digit by digit", file=sys.stderr)
    except DpkdError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
