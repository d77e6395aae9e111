"""Tests on a real device: `make gpu`. Figures go to benchmarks/results, or to the folder in HART_INFER_RESULTS."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
STARTED = pytest.StashKey[float]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of this folder needs a CUDA device."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


def _folder() -> Path:
    folder = Path(os.environ.get("HART_INFER_RESULTS", ROOT / "benchmarks" / "results"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def results() -> Path:
    """Where figures are written."""
    return _folder()


def pytest_sessionstart(session: pytest.Session) -> None:
    """From here on the minutes count."""
    session.stash[STARTED] = time.monotonic()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """How long it took on a GPU, where 8 minutes are allowed, and what came out."""
    started = terminalreporter._session.stash.get(STARTED, None)  # None where this folder was not asked for
    if started is None or not torch.cuda.is_available():
        return
    counts = {kind: len(terminalreporter.stats.get(kind, ())) for kind in ("passed", "failed", "skipped", "error")}
    seconds = round(time.monotonic() - started)
    told = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "seconds": seconds, **counts}
    if not config.option.keyword and not config.option.markexpr:  # the whole suite
        (_folder() / "gpu_suite.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    terminalreporter.write_line(f"{seconds} s on a GPU{' (8 minutes are allowed)' if seconds > 480 else ''}")
