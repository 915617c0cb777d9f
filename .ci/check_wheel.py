"""Is the whole package in the wheel that is installed here, and does each module import without the extras?

usage: python .ci/check_wheel.py SOURCE

SOURCE is the package that the wheel was built of. Run it with the python beside the wheel, from any other folder.
"""

import importlib
import pkgutil
import sys
from pathlib import Path

import dpkd_offline

EXTRAS = {"dpkd_offline.engines.ray_cluster": "ray", "dpkd_offline.engines.vllm": "vllm"}  # which need one of them


def files(package: Path) -> set[Path]:
    return {path.relative_to(package) for suffix in ("*.py", "*.j2", "py.typed") for path in package.rglob(suffix)}


def main(source: Path) -> None:
    installed = Path(str(dpkd_offline.__file__)).parent
    assert installed.is_relative_to(sys.prefix), f"{installed} is not what was installed"
    assert files(installed) == files(source), files(installed) ^ files(source)
    assert (installed / "py.typed").exists()
    modules = [module.name for module in pkgutil.walk_packages(dpkd_offline.__path__, "dpkd_offline.")]
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != EXTRAS.get(name):
                raise
    print(f"wheel: {len(modules)} modules, all there")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
