"""The CUDA kernels under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.csrc.build import HERE, compile_host, obstacle

pytestmark = [pytest.mark.slow, pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sanitized") / "driver"
    sanitizers = "-fsanitize=address,undefined"
    return compile_host(output, "-O1", "-g", sanitizers, "-fno-sanitize-recover=all", driver=HERE / "sanitize.cpp")


def test_nothing_is_touched_beyond_its_end(program):
    environment = os.environ | {"ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    done = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
