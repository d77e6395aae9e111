"""What nvcc makes of the CUDA kernels, for GPUs that need not be here."""

from __future__ import annotations

import pytest

from benchmarks.cuda_kernels import rows, tool

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kernels() -> list[dict]:
    try:
        for name in ("nvcc", "nvdisasm"):
            tool(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return rows((80, 86, 89, 90))


def test_none_spills_and_many_fit(kernels):
    """With 64 registers a multiprocessor holds 1024 threads."""
    assert {kernel["spilled_bytes"] for kernel in kernels} == {0}
    assert max(kernel["registers"] for kernel in kernels) <= 64


def test_packs_are_read_by_loads_of_16_bytes(kernels):
    """All of them; but half-precision parameters of an fp32 row come in packs of 8 bytes."""
    for kernel in kernels:
        if "packs" in kernel["kernel"]:
            mixed = kernel["kernel"].startswith(("rms_norm fp32 fp16", "rms_norm fp32 bf16"))
            assert kernel["loads_128"] == kernel["loads"] or (mixed and kernel["loads_128"] >= 4), kernel
