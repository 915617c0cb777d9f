"""How much memory of the host each process takes while a student is loaded and resumed in parts, by FSDP.

    python tests/benchmarks/fsdp_memory.py [--parameters 1e9] [--processes 4] [--only-load] [--folder DIR]

Makes a student with random weights in bfloat16, in several .safetensors files, and starts so many processes on a CPU.
Each loads its part as `train` does, and writes a checkpoint (12 bytes a parameter on the disk); a second start goes on
from it, with as much memory in all. Prints the most private memory (that is not of a file) of each beyond its imports,
beside the bytes of its part.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

GIB = 2**30
RUN = "run"


def private() -> int:
    """Anonymous memory of this process, in bytes."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


class Peak:
    """The most private memory from its start on, looked at each hundredth of a second."""

    def __init__(self) -> None:
        self.base = self.most = private()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.most = max(self.most, private())
            time.sleep(0.01)

    def read(self) -> int:
        most, self.most = self.most - self.base, private()
        return most


def build(folder: Path, parameters: float) -> int:
    """A Llama of about so many parameters; returns how many."""
    import torch
    from train_memory import build_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    layers, vocabulary = 16, 32_768
    width = 64 * round((parameters / layers / 12) ** 0.5 / 64)
    build_model(folder, 512)  # for its tokenizer
    (folder / "model.safetensors").unlink()
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=64 * round(width * 2.67 / 64),
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        bos_token_id=None,
        eos_token_id=511,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500MB")
    return sum(parameter.numel() for parameter in model.parameters())


def measure(folder: Path, only_load: bool) -> None:
    """In a process of several: load, and go on from a checkpoint; write one where there is none."""
    import torch

    from dpkd_offline.config.train import TrainConfig
    from dpkd_offline.training.checkpoint import Position, load_state, own_parts, save_state
    from dpkd_offline.training.distributed import Processes
    from dpkd_offline.training.optimizer import MasterAdamW
    from dpkd_offline.training.student import load_student

    config = TrainConfig(dataset=Path("d"), student=str(folder / "model"), output=folder / "out", learning_rate=1e-9)
    with Processes() as processes:
        peak = Peak()
        student = load_student(config, processes)
        loaded = peak.read()
        part = sum(p.to_local().nbytes for p in student.parameters())
        line = f"process {processes.rank}: part {part / GIB:.2f} GiB, loading {loaded / GIB:.2f} GiB"
        if only_load:
            return print(line, flush=True)
        optimizer = MasterAdamW(student, torch.bfloat16, config, processes)
        state = load_state(config.output, RUN, processes)
        if state is not None:
            optimizer.restore(state[1])
        resumed = peak.read()
        if state is None:
            names = [
                (key, name) for key in ("master", "exp_avg", "exp_avg_sq") for name, _ in student.named_parameters()
            ]
            own = dict(student.named_parameters())
            tensors = {f"{key}/{name}": own[name].detach() for key, name in names}  # of a step's size, without a step
            tensors |= {f"step/{name}": torch.tensor(1.0) for name in own}
            tensors = own_parts(tensors.items(), processes.rank, processes.count)
            save_state(config.output, Position(1), RUN, tensors, processes)
            written = peak.read()
        writing = f"writing {written / GIB:.2f}" if state is None else f"with its moments {resumed / GIB:.2f}"
        print(f"{line}, {writing} GiB", flush=True)


def start(folder: Path, count: int, only_load: bool) -> None:
    several = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555", "OMP_NUM_THREADS": "1"}
    sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    ranks = []
    for rank in range(count):
        environment = {**os.environ, **several, **sharded, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(
            subprocess.Popen([sys.executable, __file__, "measure", str(folder), *["only"] * only_load], env=environment)
        )
    assert [rank.wait() for rank in ranks] == [0] * count


def main() -> None:
    if sys.argv[1:2] == ["measure"]:
        return measure(Path(sys.argv[2]), "only" in sys.argv)
    if sys.argv[1:2] == ["build"]:
        return print(build(Path(sys.argv[2]), float(sys.argv[3])))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1e9)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--only-load", action="store_true")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        command = [sys.executable, __file__, "build", str(folder / "model"), str(options.parameters)]
        parameters = int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.split()[-1])
        print(f"{parameters:,} parameters: a copy in float32 {4 * parameters / GIB:.2f} GiB", flush=True)
        for _ in range(1 if options.only_load else 2):
            start(folder, options.processes, options.only_load)


if __name__ == "__main__":
    main()
