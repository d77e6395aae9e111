"""A recorded run of VAR once more, with Triton forced in the interpreter: the same codes, number for number.

Attention, the rotary embedding with normalised queries and keys, and the norms run so. Recorded codes are drawn by the CPU's
generator, which `guided_sample` has no part in.
"""

from __future__ import annotations

import pytest
import torch

from hart_infer.ops.registry import use_backend

from .recorded import relative
from .recorded_var import error, generate_as_recorded, load_model, load_trace

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.golden,
    pytest.mark.slow,
    pytest.mark.sample,
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles where there is a GPU: tests/gpu"),
]


def test_var_tiny_by_triton():
    trace = load_trace("var-tiny", "hard")
    with use_backend("triton"):
        found = generate_as_recorded(load_model("var-tiny"), trace)
    for scale, indices in enumerate(found.indices):
        assert torch.equal(indices, trace.at(scale, "indices")), f"scale {scale}"
    assert relative(found.f_hats[-1], trace["f_hat"]) <= error("var-tiny", trace)
