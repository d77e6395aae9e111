"""Import renamed modules by their old names, with a warning; removed in 0.2."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from types import ModuleType
from typing import Any

MOVED = {
    "checkpoint": "checkpoints.hart", "config": "checkpoints.configs", "describe": "pipelines.describe",
    "hub": "checkpoints.hub", "memory": "pipelines.out_of_memory", "outputs": "pipelines.outputs",
    "pictures": "images.files", "pipeline": "pipelines.hart", "sampling": "generation.sampling",
    "saving": "checkpoints.saving", "schedule": "generation.schedule", "text": "models.text", "weights": "checkpoints.weights",
}  # fmt: skip


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Provides an old module name as a proxy of the new one."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        found = package == __package__ and name in MOVED
        return importlib.machinery.ModuleSpec(fullname, self) if found else None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__.partition(".")[2]
        new = f"{__package__}.{MOVED[name]}"
        warnings.warn(f"{module.__name__} is {new} now; the old name goes in 0.2.", FutureWarning, stacklevel=2)
        module.__getattr__ = lambda attribute: getattr(importlib.import_module(new), attribute)  # type: ignore[method-assign]


def install() -> None:
    """Make the old names importable; further calls change nothing."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
