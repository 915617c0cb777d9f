"""Does every command go on to the same result, wherever it is killed, and does one of two on an output win?

    python tests/benchmarks/owners.py FOLDER [COMMAND...] [--train-points 200] [--times 20]

Kills (SIGKILL) init-student, evaluate and export before each change that they make to a file, and train before so many,
spread over the run; repeats the command, and compares every byte with the undisturbed run, but for the speeds in
metrics.jsonl. Then starts two of each command at once, by turns the same one twice and two different ones: one must end
with 0, the other with 75, 4 or 2 (or with 0 where it came later and the result was its own), and what is left must be
the undisturbed result of one of them. Ends with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def commands(root: Path) -> dict[str, tuple[object, object]]:
    """Of each command two that differ, on tiny models."""
    from helpers.tiny import TINY, build_model, make_dataset, rows, write_jsonl

    teacher, student = build_model("llama", root / "teacher"), build_model("llama", root / "student", seed=1)
    source = write_jsonl(root / "prompts.jsonl", rows(20))
    dataset = make_dataset(root / "dataset", source, teacher, student)
    half = make_dataset(root / "half", write_jsonl(root / "half.jsonl", rows(10)), teacher, student)
    pairs = [{"prompt": f"Tell {n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(20)]
    preferences = write_jsonl(root / "preferences.jsonl", pairs)
    tiny = [*TINY, "--max-new-tokens", 8]
    evaluate = ["evaluate", "--model", student, "--teacher", teacher, "--prompts", source, *tiny]
    train = ["train", "--dataset", dataset, "--student", student, "--dtype", "float32", "--batch-size", 4]
    train += ["--max-steps", 16, "--save-every", 2, "--validate-every", 2, "--holdout", 0.3, "--validate-responses", 2]
    init = ["init-student", "--teacher", teacher, "--layers"]
    subset = ["subset", dataset]
    return {
        "init-student": (lambda o: [*init, 2, "--output", o], lambda o: [*init, 3, "--output", o]),
        "evaluate": (
            lambda o: [*evaluate, "--seeds", "1,2", "--output", o],
            lambda o: [*evaluate, "--seeds", "3", "--output", o],
        ),
        "export": (
            lambda o: ["export", dataset, o, "--format", "trl"],
            lambda o: ["export", half, o, "--format", "trl"],
        ),
        "export jsonl": (
            lambda o: ["export", dataset, o, "--format", "jsonl"],
            lambda o: ["export", half, o, "--format", "jsonl"],
        ),
        "train": (lambda o: [*train, "--output", o], lambda o: [*train, "--seed", 7, "--output", o]),
        "subset": (lambda o: [*subset, o, "--limit", 8], lambda o: [*subset, o, "--limit", 12]),
        "merge": (lambda o: ["merge", o, dataset], lambda o: ["merge", o, dataset, "--shard-size", 5]),
        "pull": (lambda o: ["pull", dataset, o], lambda o: ["pull", half, o]),
        "import": (
            lambda o: ["import", preferences, "--model", teacher, "--dataset", o],
            lambda o: ["import", preferences, "--model", teacher, "--dataset", o, "--limit", 9],
        ),
    }


KILLED = ("init-student", "evaluate", "export", "export jsonl", "train")


def main() -> None:
    from helpers.owners import after_kill, together, undisturbed

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("commands", nargs="*")
    parser.add_argument("--train-points", type=int, default=200)
    parser.add_argument("--times", type=int, default=20)
    options = parser.parse_args()
    root = options.folder / "inputs"
    root.mkdir(parents=True)
    failures = 0
    for name, (one, other) in commands(root).items():
        if options.commands and name not in options.commands:
            continue
        notes = options.folder / name.replace(" ", "-")
        calm, changes = undisturbed(one, notes)
        if name in KILLED:
            points = list(range(changes))
            if name == "train" and changes > options.train_points:
                points = [round(n * (changes - 1) / (options.train_points - 1)) for n in range(options.train_points)]
            hit = wrong = 0
            for number, at in enumerate(random.Random(0).sample(points, len(points)), start=1):
                if number % 20 == 0:
                    print(f"{name}: {number} of {len(points)} kills, {wrong} wrong", flush=True)
                killed, code, left = after_kill(one, at, notes)
                hit += killed == -9
                if code or left != calm:
                    wrong += 1
                    differing = sorted(k for k in left.keys() | calm.keys() if left.get(k) != calm.get(k))
                    print(f"{name} killed before change {at}: then {code}, {differing}", flush=True)
                else:
                    shutil.rmtree(notes / str(at))
            print(f"{name}: {changes} changes, killed before {hit}, {wrong} went on to something else", flush=True)
            failures += wrong
        other_calm, _ = undisturbed(other, notes / "other")
        outcomes: dict[tuple[int, ...], int] = {}
        wrong = 0
        for number in range(options.times):
            pair = [one, other] if number % 2 else [one, one]
            codes, left, lines = together(pair, number, notes)
            outcome = tuple(sorted(codes))
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            expected = [calm] if number % 2 == 0 else [calm, other_calm]
            if outcome not in {(0, 75), (0, 4), (0, 2), (0, 0)} or left not in expected:
                wrong += 1
                print(f"{name} together, number {number}: {codes} {lines}", flush=True)
        print(f"{name}: two at once {options.times} times, exit codes {outcomes}, {wrong} wrong", flush=True)
        failures += wrong
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
