"""The recorded numbers on a CUDA device, by whatever kernels it takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hart_infer.model.transformer import Transformer
from tests.golden.recorded import feed_transformer, load_model, load_trace, recorded_inputs, relative, rms
from tests.golden.test_precision import eager, reference

CHECKPOINTS = ("hart-tiny", "hart-tiny-adaln", "hart-tiny-sharedaln", "hart-tiny-var")
every_checkpoint = pytest.mark.parametrize("checkpoint", CHECKPOINTS)
FP32 = 2e-4  # relative: another order of sums than the CPU's, through every block


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def hidden_states(checkpoint: str, dtype: torch.dtype) -> list[Tensor]:
    """Of all scales, fed the recorded inputs; the model goes back to the CPU, where other tests share it."""
    model, trace = load_model(checkpoint, dtype), load_trace(checkpoint, "smooth")
    transformer: Transformer = model.transformer
    inputs = recorded_inputs(model, trace)
    try:
        transformer.cuda()
        return [x.float().cpu() for x in feed_transformer(model, trace, inputs)[0]]
    finally:
        transformer.cpu()


@every_checkpoint
def test_hidden_states_in_fp32(checkpoint):
    for found, recorded in zip(hidden_states(checkpoint, torch.float32), reference(checkpoint, "hidden"), strict=True):
        assert relative(found, recorded) <= FP32


@every_checkpoint
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_hidden_states_in_half_precision(checkpoint, dtype):
    """At most twice the error of eager PyTorch in the same dtype."""
    theirs = eager(checkpoint, "hidden", dtype)
    for found, their, recorded in zip(hidden_states(checkpoint, dtype), theirs, reference(checkpoint, "hidden"), strict=True):
        assert rms(found, recorded) <= 2 * rms(their.float(), recorded)
