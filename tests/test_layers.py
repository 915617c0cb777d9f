"""The house: imports point downward, and training cannot reach what loads a teacher."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dpkd_offline"
LAYERS = [
    {"errors"},
    {
        "columns",
        "config",
        "facts",
        "files",
        "health",
        "log",
        "losses",
        "metrics",
        "recipes",
        "records",
        "remote",
        "seen",
    },
    {"checkpoint", "checks", "dataset", "disclosure", "shards", "spool"},
    {
        "attention",
        "batch",
        "card",
        "engines",
        "holdings",
        "joining",
        "logps",
        "lora",
        "objectives",
        "optimiser",
        "pairs",
        "processes",
        "prompts",
        "respelling",
        "reusing",
        "rounds",
        "tracking",
        "trainee",
        "validation",
        "zero",
    },
    {
        "arrivals",
        "combining",
        "evaluation",
        "exchange",
        "generation",
        "inspection",
        "interchange",
        "preferences",
        "receivers",
        "scoring",
        "selection",
        "students",
        "training",
        "verification",
    },
    {"distillation", "planning"},
    {"cli"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}


def imports(path: Path) -> set[str]:
    """The package's own modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dpkd_offline"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names} - {"__version__"}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("dpkd_offline.")}
    return found


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_module_has_a_layer() -> None:
    assert {name_of(path) for path in modules()} == set(LEVEL)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path) -> None:
    here = name_of(path)
    for there in imports(path) - {here}:
        assert LEVEL[there] <= LEVEL[here], f"{here} imports {there}"


def test_there_is_no_import_cycle() -> None:
    graph = {name_of(path): imports(path) - {name_of(path)} for path in modules() if path.parent == PACKAGE}
    graph["engines"] = set().union(*(imports(p) for p in modules() if p.parent != PACKAGE)) - {"engines"}
    done: set[str] = set()
    while remaining := graph.keys() - done:
        ready = {module for module in remaining if graph[module] <= done}
        assert ready, f"a cycle among {sorted(remaining)}"
        done |= ready


def test_training_reaches_no_engine_and_only_its_student() -> None:
    reached, todo = set(), {"training"}
    while todo:
        module = todo.pop()
        reached.add(module)
        todo |= imports(PACKAGE / f"{module}.py") - reached
    assert not reached & {"engines", "scoring", "generation", "evaluation", "students"}
    loads = [
        ast.unparse(node.args[0])
        for node in ast.walk(ast.parse((PACKAGE / "trainee.py").read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "load_model"
    ]
    assert loads == ["config.student"]


def test_one_file_names_vllm() -> None:
    for path in modules():
        tree = ast.parse(path.read_text())
        named = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        named |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        if any(name.split(".")[0] == "vllm" for name in named):
            assert path == PACKAGE / "engines" / "vllm.py"


def test_the_package_and_its_help_do_without_what_is_slow_to_import() -> None:
    heavy = ["torch", "vllm", "transformers", "datasets", "fsspec", "pyarrow", "numpy", "httpx2"]
    code = f"import sys, dpkd_offline, dpkd_offline.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_public_names_exist() -> None:
    import dpkd_offline

    for name in dpkd_offline.__all__:
        assert getattr(dpkd_offline, name)
    with pytest.raises(AttributeError):
        dpkd_offline.nothing  # noqa: B018
