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
from tests.reference_pictures import SAME, near
from tests.test_mini import DRAWN, name_of

pytestmark = [
    pytest.mark.packaging,
    pytest.mark.skipif(NVCC is None, reason="the kernels are compiled by nvcc, which is not here"),
]
TORCHES = os.environ.get("HART_INFER_TORCHES", "").split()
SCRIPT = """
import torch
from hart_infer.ops.cuda import library
from hart_infer.ops.registry import OPS
loaded = library.load()
assert isinstance(loaded, library.Library), loaded
assert loaded.targets == "80 90+PTX"
assert torch.cuda.is_available() or loaded.failure(0), "a launch without a driver fails, in words"
x = torch.randn(2, 8)
assert torch.equal(torch.ops.hart_infer.rms_norm(x, torch.ones(8), 1e-6), OPS["rms_norm"](x, torch.ones(8), 1e-6))
print(torch.__version__, loaded.failure(0))
"""

# Each torch for CUDA brings its own Triton, one for the CPU takes any: its interpreter has to agree with PyTorch.
INTERPRETED = """
import torch
from hart_infer import ops
from hart_infer.ops.registry import use_backend
torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, n, 32) for n in (5, 90, 90))
table, rows, both = torch.randn(1, 1, 5, 32), torch.randn(9, 12), torch.randn(18, 12)
settings = ops.draw_settings(guidance=1.5, top_k=9, top_p=0.9, logit_gain=1.5, temperature=0.3)
step = dict(x0_from_x=1.1, x0_from_noise=0.5, mean_from_x0=0.4, mean_from_x=0.6)
step |= dict(log_variance_min=-3.0, log_variance_max=-1.0, adds_noise=True)
drawn = dict(top_k=True, top_p=True, more_smooth=True)
calls = {
    "attention": ((q, k, v), dict(scale=0.3)),
    "rope_cache": ((torch.randn(1, 5, 3, 2, 32), table, table, *torch.empty(2, 1, 2, 5, 32)), {}),
    "swiglu": ((q, q + 1), {}),
    "diffusion_step": ((rows, both, both, rows, settings), step),
    "group_norm_silu": ((torch.randn(1, 8, 5, 6), torch.ones(8), torch.zeros(8), 4, 1e-6), {}),
    "guided_sample": ((torch.randn(2, 5, 70), torch.randn(70, 12), torch.tensor([7]), torch.tensor([1]), settings), drawn),
}
for name, (arguments, options) in calls.items():
    expected = getattr(ops, name)(*arguments, **options)
    with use_backend("triton"):
        torch.testing.assert_close(getattr(ops, name)(*arguments, **options), expected, rtol=1e-4, atol=1e-4)
print(len(calls))
"""


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One wheel for all of them."""
    folder = tmp_path_factory.mktemp("torches") / "dist"
    return build(source, folder, "--wheel", HART_INFER_BUILD_CUDA="1", HART_INFER_CUDA_ARCHS="80;90")


@pytest.mark.parametrize("version", TORCHES)
def test_one_wheel_serves_every_torch(version: str, wheel: Path, tmp_path: Path) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith(("torch", "triton", "numpy"))] + ["numpy<2.4"]  # Triton 3.6's limit
    (tmp_path / "pins.txt").write_text("\n".join(pins))
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    programs = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    try:
        install = (programs / "python", "-m", "pip", "install", "-c", tmp_path / "pins.txt")
        run(*install, f"torch=={version}", "triton", wheel, cwd=tmp_path)
        assert run(programs / "python", "-c", SCRIPT, cwd=tmp_path).startswith(version)
        assert run(programs / "python", "-c", INTERPRETED, cwd=tmp_path, TRITON_INTERPRET="1").strip().endswith("6")
        prompt, seed = next(iter(DRAWN.items()))
        options = ("--seed", seed, "--dtype", "fp32", "--device", "cpu", "-o", tmp_path / "drawn.png")
        run(programs / "hart-infer", "generate", prompt, *map(str, options), cwd=tmp_path)
        with Image.open(tmp_path / "drawn.png") as drawn:
            assert near(drawn, name_of(prompt)) > SAME
    finally:
        shutil.rmtree(tmp_path / "venv")
