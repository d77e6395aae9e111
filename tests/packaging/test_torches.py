"""The wheel with its compiled kernels beside other versions of torch, each in an environment of its own: `make torches`.

Several GB for each; HART_INFER_TORCHES names them.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.packaging.test_kernels import NVCC, build
from tests.packaging.test_kernels import source as source
from tests.packaging.test_wheel import ROOT, run
from tests.test_mini import DRAWN, SAME, near

pytestmark = [
    pytest.mark.packaging,
    pytest.mark.skipif(NVCC is None, reason="the kernels are compiled by nvcc, which is not here"),
]
TORCHES = os.environ.get("HART_INFER_TORCHES", "").split()
SCRIPT = """
import torch
from hart_infer.extension import library
from hart_infer.ops.registry import OPS
loaded = library.load()
assert isinstance(loaded, library.Library), loaded
assert loaded.targets == "80 90+PTX"
assert torch.cuda.is_available() or loaded.failure(0), "a launch without a driver fails, in words"
x = torch.randn(2, 8)
assert torch.equal(torch.ops.hart_infer.rms_norm(x, torch.ones(8), 1e-6), OPS["rms_norm"](x, torch.ones(8), 1e-6))
print(torch.__version__, loaded.failure(0))
"""


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One wheel for all of them."""
    folder = tmp_path_factory.mktemp("torches") / "dist"
    return build(source, folder, "--wheel", HART_INFER_BUILD_CUDA="1", HART_INFER_CUDA_ARCHS="80;90")


@pytest.mark.parametrize("version", TORCHES)
def test_one_wheel_serves_every_torch(version: str, wheel: Path, tmp_path: Path) -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith(("torch", "triton"))]
    (tmp_path / "pins.txt").write_text("\n".join(pins))
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    programs = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    try:
        install = (programs / "python", "-m", "pip", "install", "-c", tmp_path / "pins.txt", f"torch=={version}", wheel)
        run(*install, cwd=tmp_path)
        assert run(programs / "python", "-c", SCRIPT, cwd=tmp_path).startswith(version)
        prompt, seed = next(iter(DRAWN.items()))
        options = ("--seed", seed, "--dtype", "fp32", "--device", "cpu", "-o", tmp_path / "drawn.png")
        run(programs / "hart-infer", "generate", prompt, *map(str, options), cwd=tmp_path)
        with Image.open(tmp_path / "drawn.png") as drawn:
            assert near(drawn, prompt) > SAME
    finally:
        shutil.rmtree(tmp_path / "venv")
