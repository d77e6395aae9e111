"""What only a GPU can tell: memory errors in the kernels, and figures for benchmarks/results."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hart_infer.ops.registry import OPS

from .conftest import ROOT


def sanitizer() -> str | None:
    """CUDA's checker of memory accesses, if it is installed."""
    beside = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    return shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)


def benchmark(script: str, out: Path, *arguments: str) -> dict:
    """Run a benchmark; its record."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments, "--device", "cuda", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def compiled() -> None:
    """All that `every_kernel.py` calls is in Triton's cache: compiling under a sanitizer takes minutes."""
    subprocess.run([sys.executable, "-m", "tests.gpu.every_kernel"], cwd=ROOT, check=True, timeout=300)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_every_kernel_is_clean(tool, compiled):
    """`every_kernel.py`, once."""
    program = sanitizer()
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [program, "--tool", tool, "--error-exitcode", "97", "--report-api-errors", "no"]
    calls = [sys.executable, "-m", "tests.gpu.every_kernel"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else a pool hides what is out of bounds
    done = subprocess.run([*command, *calls], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=150)
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this device")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("dtype", ["bf16"])
@pytest.mark.parametrize("model", ["hart-mini", "released"])
def test_time_of_every_operation(results, model, dtype):
    found = benchmark("ops.py", results / f"ops_{model}_{dtype}.json", "--model", model, "--dtype", dtype, "--seconds", "0.1")
    by_kernels = {row["op"] for row in found["ops"] if row["backend"] != "torch"}
    assert by_kernels == {name for name, operation in OPS.items() if {*operation.backends} - {"cpu"}}


def test_latency_of_hart_mini(results):
    name = torch.cuda.get_device_name().replace(" ", "-")
    out = results / f"end_to_end_hart-mini_{name}.json"
    found = benchmark(
        "end_to_end.py", out, "--checkpoint", "hart-mini", "--text-encoder", "tiny", "--dtype", "bf16", "--guidance", "0"
    )
    assert found["seconds"]["median"] > 0


def test_graphs_against_eager(results):
    """The short form of what `benchmarks/latency.py` measures: `make gpu-figures` has the whole."""
    name = torch.cuda.get_device_name().replace(" ", "-")
    few = ("--batch", "1", "2", "--speed", "exact", "turbo", "--repeats", "5")
    found = benchmark("latency.py", results / f"latency_256_{name}.json", "--size", "256", *few)
    assert all("error" not in row for row in found["rows"]) and {row["graphs"] for row in found["rows"]} == {False, True}


def test_latency_of_a_random_model_of_the_released_size(results):
    name = torch.cuda.get_device_name().replace(" ", "-")
    found = benchmark("end_to_end.py", results / f"end_to_end_1024_{name}.json", "--size", "1024", "--dtype", "bf16")
    assert found["seconds"]["median"] > 0
