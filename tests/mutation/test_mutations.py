"""The tests find planted faults: each of `mutations.py`, in a copy of the source tree."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.csrc.build import obstacle
from tests.golden.data import golden_root
from tests.mutation.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns(
    "__pycache__", "*.so", "hart-mini", "var-mini", "data", "mutation", "references", "pictures", "results"
)
SAMPLE = MUTATIONS[:: len(MUTATIONS) // 10]
CASES = [
    pytest.param(mutation, id=mutation.name.replace(" ", "-"), marks=[pytest.mark.sample] if mutation in SAMPLE else [])
    for mutation in MUTATIONS
]


def lacks(mutation: Mutation) -> str | None:
    """What the mutation's test would be skipped for."""
    if mutation.file.startswith("csrc/"):
        return obstacle()
    if mutation.file.startswith("kernels/") and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source tree, with `kernels/` where installing puts it."""
    folder = tmp_path_factory.mktemp("mutated")
    for name in ("hart_infer", "csrc", "tests", "benchmarks", "tools", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=LEFT_OUT)
    shutil.copytree(ROOT / "kernels", folder / "hart_infer" / "kernels", ignore=LEFT_OUT)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run(folder: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """Run tests of the copy, in a process that may crash."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(folder), "HART_INFER_GOLDEN": str(golden_root())},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_table_fits_the_sources(mutation):
    assert (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.before) == 1
    file, _, test = mutation.test.partition("::")
    assert re.search(rf"^def {test.partition('[')[0]}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.slow
def test_without_a_fault_they_pass(copy):
    """Otherwise a failure would tell nothing."""
    tests = sorted({mutation.test for mutation in MUTATIONS if lacks(mutation) is None})
    done = run(copy, *tests)
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mutation", CASES)
def test_a_planted_fault_is_found(mutation, copy):
    if reason := lacks(mutation):
        pytest.skip(reason)
    file = copy / mutation.file.replace("kernels/", "hart_infer/kernels/")
    sound = file.read_text(encoding="utf-8")
    file.write_text(sound.replace(mutation.before, mutation.after), encoding="utf-8")
    try:
        done = run(copy, mutation.test)
    finally:
        file.write_text(sound, encoding="utf-8")
    crashed = done.returncode < 0
    assert crashed or (done.returncode == 1 and "1 failed" in done.stdout), done.stdout + done.stderr
