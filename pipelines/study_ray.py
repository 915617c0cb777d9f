"""The students of a study on a Ray cluster: `distill` once on every GPU, or on every node where there are none.

    ray start --head --port=6379                                          on the first node
    ray start --address=FIRST:6379                                        on each other node
    RAY_ADDRESS=FIRST:6379 python pipelines/study_ray.py study.yaml       in a folder that all nodes see

All nodes have the same dpkd-offline, and see recipe, models and output under the same paths. What follows the recipe
goes to `distill`, such as `--only dpkd,sft`. A node that is lost leaves its student to the others. Prints the table;
ends with the first exit code that is not 0, where no `distill` ended with 0.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def distill(arguments: list[str], folder: str) -> tuple[int, str]:
    """On a node: the exit code and what is printed. The messages are in Ray's logs of the node."""
    command = [sys.executable, "-m", "dpkd_offline.cli", "distill", *arguments]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stdout


def workers() -> Iterator[dict[str, Any]]:
    """What each takes of the cluster: a GPU, or where there are none the CPUs of a node."""
    nodes = [(node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
    gpus = any(resources.get("GPU") for _, resources in nodes)
    for node, resources in nodes:
        place = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False), "max_retries": 0}
        if gpus:
            yield from [{**place, "num_gpus": 1, "num_cpus": 1}] * int(resources.get("GPU", 0))
        elif resources.get("CPU", 0) >= 1:
            yield {**place, "num_cpus": int(resources["CPU"])}


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    ray.init(address="auto", log_to_driver=False)
    running = [ray.remote(distill).options(**place).remote(sys.argv[1:], os.getcwd()) for place in workers()]
    print(f"{len(running)} workers", file=sys.stderr)
    codes, table = [], ""
    while running:
        (ended,), running = ray.wait(running)
        try:
            code, printed = ray.get(ended)
        except RayError as error:  # the others take over what it was at
            print(f"a worker is lost: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        codes.append(code)
        table = printed or table
    print(table, end="")
    return 0 if 0 in codes else next(iter(codes), 69)


if __name__ == "__main__":
    sys.exit(main())
