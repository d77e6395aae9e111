"""The recorded runs once more, every operation that has a Triton kernel forced onto it: the same codes, number for number."""

from __future__ import annotations

import pytest
import torch

from hart_infer.ops.registry import use_backend

from .recorded import load_trace, relative
from .test_free import run

pytest.importorskip("triton")
pytestmark = [pytest.mark.golden, pytest.mark.slow]


@pytest.mark.parametrize("name", ["smooth", "hard", "cfg0"])
def test_hart_tiny_by_triton(name):
    trace = load_trace("hart-tiny", name)
    with use_backend("triton"):
        found = run.__wrapped__("hart-tiny", name)  # anew: the cached run is PyTorch's
    for scale, indices in enumerate(found.indices):
        assert torch.equal(indices.cpu(), trace.at(scale, "indices")), f"scale {scale}"
    assert relative(found.f_hats[-1].cpu(), trace["f_hat"]) <= trace.error
