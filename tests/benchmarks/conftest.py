"""The benchmarks' scripts, which are no package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def benchmarks() -> Iterator[None]:
    """They can be imported by their names."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def script(benchmarks: None, request: pytest.FixtureRequest) -> Any:
    """The script that a file of tests is named after."""
    return importlib.import_module(Path(request.module.__file__).stem.removeprefix("test_"))
