"""The CPU's kernels in plain C++ under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(shutil.which("g++") is None or platform.machine() != "x86_64", reason="needs g++ on x86-64")
@pytest.mark.parametrize("name", ["filter", "exponential"])
def test_agrees_with_the_standard_library_without_undefined_behaviour(tmp_path: Path, name: str) -> None:
    program = tmp_path / name
    command = ["g++", "-O1", "-g", "-fopenmp-simd", "-std=c++17", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run([*command, str(HERE / f"{name}.cpp"), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
