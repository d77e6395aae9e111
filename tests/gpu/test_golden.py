"""The recorded numbers on a CUDA device, by whatever kernels it takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.golden.recorded import load_model, load_trace, relative, rms
from tests.golden.test_free import generate_as_recorded
from tests.golden.test_precision import PARTS, eager, ours, reference

CHECKPOINTS = ("hart-tiny", "hart-tiny-adaln", "hart-tiny-sharedaln", "hart-tiny-var")
every_checkpoint = pytest.mark.parametrize("checkpoint", CHECKPOINTS)
every_part = pytest.mark.parametrize("part", PARTS)
FP32 = {"hidden": 2e-4, "logits": 2e-4, "residual": 2e-3, "decoder": 2e-4}  # relative: sums in another order than the CPU's


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def on_the_gpu(checkpoint: str, part: str, dtype: torch.dtype) -> list[Tensor]:
    """A part of the model, fed the recorded inputs: hidden states, logits, the residual diffusion or the decoder."""
    model, trace = load_model(checkpoint, dtype), load_trace(checkpoint, "smooth").to("cuda")
    with model.on("cuda"):
        return [x.float().cpu() for x in ours(model, trace, part, dtype)]


@every_checkpoint
@every_part
def test_in_fp32(checkpoint, part):
    for found, recorded in zip(on_the_gpu(checkpoint, part, torch.float32), reference(checkpoint, part), strict=True):
        assert relative(found, recorded) <= FP32[part]


@every_checkpoint
@every_part
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_in_half_precision(checkpoint, part, dtype):
    """At most twice the error of eager PyTorch in the same dtype."""
    theirs = eager(checkpoint, part, dtype)
    for found, their, recorded in zip(on_the_gpu(checkpoint, part, dtype), theirs, reference(checkpoint, part), strict=True):
        assert rms(found, recorded) <= 2 * rms(their.float(), recorded)


def test_a_whole_run_from_the_seed():
    """In fp32 with the CPU's draws, on drawn codes. Rounding may move a code across a threshold, and with it what follows."""
    model, trace = load_model("hart-tiny"), load_trace("hart-tiny", "hard")
    with model.on("cuda"):
        found = generate_as_recorded(model, trace.to("cuda"))
    same = [(indices.cpu() == trace.at(scale, "indices")).float().mean().item() for scale, indices in enumerate(found.indices)]
    assert same[0] == 1 and min(same) >= 0.95, same
