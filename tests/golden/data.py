"""Where the golden data lies: all of it beside the checkout, or the subset in tests/data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FULL = REPOSITORY.parent / "shared" / "golden"
SUBSET = REPOSITORY / "tests" / "data"
CHECKPOINTS = ("hart-tiny", "hart-tiny-adaln", "hart-tiny-sharedaln", "hart-tiny-var", "hart-tiny-1024")
VAR_CHECKPOINTS = ("var-tiny", "var-tiny-shared")
TEXT_ENCODERS = ("text-tiny-right", "text-tiny-left")


def golden_root() -> Path:
    """HART_INFER_GOLDEN if it is set (a folder), else the full set if it is there, else the subset."""
    chosen = os.environ.get("HART_INFER_GOLDEN")
    if chosen:
        return Path(chosen).resolve()
    return FULL if FULL.is_dir() else SUBSET


def golden(name: str) -> Path:
    """A checkpoint's or text encoder's folder; skips the test where only the full set has it."""
    folder = golden_root() / name
    if not folder.is_dir():
        pytest.skip(f"{name} is only in the full golden set, which is not beside this checkout")
    return folder
