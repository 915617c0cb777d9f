"""The house: what may import what, and what a newcomer can rely on in every file. The floors: pyproject.toml."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpkd_offline.config.engines import ENGINES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dpkd_offline"
MODULES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted(path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__")
LONGEST_FUNCTION = 60  # lines


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """The modules that a file imports, wherever in the file, and the names that it takes from them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from ((str(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("dataset/table.py", "from dpkd_offline.prompts.reader import read_prompts", "downward"),
        ("training/trainer.py", "from dpkd_offline.curation.verify import verify", "sideways"),
        ("training/trainer.py", "from dpkd_offline.engines.factory import load_engine", "loads a teacher"),
        ("training/stream.py", "from dpkd_offline.training.student import Student", "Inside training"),
        ("engines/http.py", "from dpkd_offline.engines.vllm import VllmEngine", "Engines do not import"),
    ],
    ids=["upward", "sideways", "to an engine", "upward in training", "between engines"],
)
def test_an_import_against_the_contract_fails(tmp_path: Path, module: str, line: str, contract: str) -> None:
    for path in MODULES:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text() + (f"\n{line}\n" if path == PACKAGE / module else ""))
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    lint = str(Path(sys.executable).with_name("lint-imports"))
    done = subprocess.run([lint, "--no-cache"], cwd=tmp_path, capture_output=True, text=True)
    broken = [title for title in done.stdout.splitlines() if title.endswith("BROKEN")]
    assert done.returncode == 1
    assert any(contract in title for title in broken), done.stdout


def test_an_engine_is_imported_by_nobody() -> None:
    homes = {f"dpkd_offline.engines.{traits.home.partition(':')[0]}" for traits in ENGINES.values()}
    for path in MODULES:
        assert not homes & {module for module, _ in imports(path)}, path


def test_the_trainer_loads_its_student_alone() -> None:
    loads = [
        ast.unparse(node.args[0])
        for path in (PACKAGE / "training").glob("*.py")
        if path.name != "init_student.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "load_model"
    ]
    assert loads == ["config.student"]


def test_one_file_names_vllm() -> None:
    named = [path for path in MODULES for module, _ in imports(path) if module.split(".")[0] == "vllm"]
    assert set(named) == {PACKAGE / "engines" / "vllm.py"}


def test_nothing_takes_a_private_name_of_another_module() -> None:
    for path in MODULES:
        for module, name in imports(path):
            assert not (module.startswith("dpkd_offline") and name.startswith("_")), f"{path}: {module}.{name}"


def test_every_folder_says_what_belongs_there() -> None:
    for folder in FOLDERS:
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert text and len(text.splitlines()) >= 3, folder
        assert not list(imports(folder / "__init__.py")), f"{folder}: a folder forwards nothing"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_function_fits_a_screen(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= LONGEST_FUNCTION, f"{path}:{node.lineno}: {node.name} has {lines} lines"


def test_the_package_and_its_help_do_without_what_is_slow_to_import() -> None:
    heavy = ["torch", "vllm", "transformers", "datasets", "fsspec", "pyarrow", "numpy", "httpx2"]
    code = f"import sys, dpkd_offline, dpkd_offline.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


CUDA_CALLS = """
import importlib, importlib.util, os, pkgutil, traceback
import dpkd_offline
from dpkd_offline.common.console import prepare_libraries

prepare_libraries()
import torch

asked = []

def recorded(name, answer):
    def call(*_, **__):
        files = [frame.filename for frame in traceback.extract_stack()]
        files = [file for file in files if not any(part in file for part in ("importlib", f"{os.sep}torch{os.sep}"))]
        asked.append((name, files[-2]))  # the last is this one
        return answer
    return call

for name, answer in {"is_available": False, "device_count": 0, "init": None, "_lazy_init": None}.items():
    setattr(torch.cuda, name, recorded(name, answer))
optional = {"dpkd_offline.engines.vllm": "vllm", "dpkd_offline.engines.ray_cluster": "ray"}
for module in pkgutil.walk_packages(dpkd_offline.__path__, "dpkd_offline."):
    package = optional.get(module.name)
    if package is None or importlib.util.find_spec(package):
        importlib.import_module(module.name)
ours = os.path.dirname(dpkd_offline.__file__)
for name, file in asked:
    if file.startswith(ours) or name not in ("is_available", "device_count"):  # libraries ask for the driver's library
        print(name, file)
print(os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"], os.environ.get("VLLM_WORKER_MULTIPROC_METHOD", "spawn"))
"""


@pytest.mark.slow
def test_no_import_asks_for_cuda() -> None:
    """A process that has CUDA cannot be forked, and one that only asks for it in the usual way has it."""
    done = subprocess.run([sys.executable, "-c", CUDA_CALLS], capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["1 spawn"]), done.stderr
    assert done.stdout == "1 spawn\n"


def test_public_names_exist() -> None:
    import dpkd_offline

    for name in dpkd_offline.__all__:
        assert getattr(dpkd_offline, name)
    with pytest.raises(AttributeError):
        dpkd_offline.nothing  # noqa: B018


def test_commands_on_datasets_alone_wait_for_no_model_library() -> None:
    modules = [f"curation.{name}" for name in ("verify", "inspect", "merge", "export_pairs")] + ["sharing.push"]
    imports = "; ".join(f"import dpkd_offline.{name}" for name in [*modules, "sharing.pull"])
    heavy = "{'transformers', 'torch', 'datasets'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {imports}; print({heavy})"], capture_output=True, text=True
    )
    assert done.stdout == "set()\n", done.stdout + done.stderr
