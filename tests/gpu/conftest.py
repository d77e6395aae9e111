"""Tests on a real device: `make gpu`. Figures go to benchmarks/results, or to the folder in HART_INFER_RESULTS."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of this folder needs a CUDA device."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture(scope="session")
def results() -> Path:
    """Where figures are written."""
    folder = Path(os.environ.get("HART_INFER_RESULTS", ROOT / "benchmarks" / "results"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
