"""Is a dataset the same to all who read it, and is TRL's loss on its export ours?

usage: python tests/benchmarks/shared_dataset.py DATASET MODEL [--pairs 32] [--batch 4]

DATASET: one that `just demo` has made, or any other; MODEL: the student to train. Prints the rows of each table as
datasets, pyarrow, DuckDB and polars see them, and the loss of each batch of the first pairs, in float32: the training's
own, and that of the code which `dpkd-offline export` puts beside what it exports. Ends with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")  # read when the library is imported
        from helpers.readers import TABLES, our_losses, pairs_of, rows_by_reader, trl_losses

        from dpkd_offline.config.data import ExportConfig, SubsetConfig
        from dpkd_offline.curation.export_pairs import export_pairs
        from dpkd_offline.curation.merge import subset

        same = True
        for config in TABLES:
            rows = rows_by_reader(options.dataset.resolve(), config, folder / "cache")
            alike = all(read == rows["pyarrow"] for read in rows.values())
            print(f"{config}: {', '.join(f'{reader} {len(read)}' for reader, read in rows.items())} rows; ", end="")
            print("the same" if alike else "NOT the same", flush=True)
            same &= alike
        some = folder / "some"
        subset(SubsetConfig(dataset=options.dataset, output=some, limit=options.pairs))
        export_pairs(ExportConfig(dataset=some, output=folder / "for-trl"))
        ours = list(our_losses(pairs_of(some), options.model.resolve(), options.batch))
        theirs = trl_losses(folder / "for-trl", options.model.resolve(), options.batch, folder)
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        print(f"batch {number}: ours {a:.6f}, TRL {b:.6f}, difference {abs(a - b):.1e}")
    sys.exit(0 if same and max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-4 else 1)


if __name__ == "__main__":
    main()
