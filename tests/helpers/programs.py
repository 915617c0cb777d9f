"""The programs that a test has started."""

from __future__ import annotations

from types import ModuleType

import psutil


def children(module: ModuleType) -> list[psutil.Process]:
    """This process's children that run a module; a child of another test that has ended, unreaped, has no command."""
    own = psutil.Process().children()
    return [child for child in own if module.__name__ in " ".join(child.as_dict(["cmdline"])["cmdline"] or [])]
