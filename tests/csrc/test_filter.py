"""The CPU's filter of logits under the address and undefined-behaviour sanitizers, against a sort."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif(shutil.which("g++") is None or platform.machine() != "x86_64", reason="needs g++ on x86-64")
def test_the_filter_keeps_what_a_sort_keeps_without_undefined_behaviour(tmp_path: Path) -> None:
    program = tmp_path / "filter"
    command = ["g++", "-O1", "-g", "-fopenmp-simd", "-std=c++17", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run([*command, str(HERE / "filter.cpp"), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
