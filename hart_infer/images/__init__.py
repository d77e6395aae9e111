"""Convert pictures between tensors, PIL and files."""

from __future__ import annotations

from typing import Any

FUNCTIONS = ("to_numpy", "to_pil", "to_tensor", "to_uint8")


def __getattr__(name: str) -> Any:
    """Give the functions that this package had as a module, with a warning; removed in 0.2."""
    if name not in FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import warnings
    from importlib import import_module

    warnings.warn(f"{__name__}.{name} is {__name__}.tensors.{name} now; the old name goes in 0.2.", FutureWarning, stacklevel=2)
    return getattr(import_module(".tensors", __name__), name)
