"""The recorded runs once more, with Triton forced in the interpreter: the same codes, number for number.

Attention, the rotary embedding, SwiGLU and the diffusion step run so. Recorded codes are drawn by the CPU's generator, which
`guided_sample` has no part in.
"""

from __future__ import annotations

import pytest
import torch

from hart_infer.ops.registry import use_backend

from .recorded import load_model, load_trace, relative
from .test_free import generate_as_recorded

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.golden,
    pytest.mark.slow,
    pytest.mark.sample,
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles where there is a GPU: tests/gpu"),
]


@pytest.mark.parametrize("name", ["smooth", "hard", "cfg0"])
def test_hart_tiny_by_triton(name):
    trace = load_trace("hart-tiny", name)
    with use_backend("triton"):
        found = generate_as_recorded(load_model("hart-tiny"), trace)
    for scale, indices in enumerate(found.indices):
        assert torch.equal(indices, trace.at(scale, "indices")), f"scale {scale}"
    assert relative(found.f_hats[-1], trace["f_hat"]) <= trace.error
