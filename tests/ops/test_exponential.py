"""Exponential draws: PyTorch's uniform ones, and what they leave of the generator."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hart_infer import ops
from hart_infer.ops.cpu import exponential as kernel
from hart_infer.ops.registry import Where, use_backend

BLOCK = 312  # draws from one twist of the generator: two words each


@pytest.fixture(autouse=True, params=["torch", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """By the reference and by the CPU's kernel."""
    if request.param == "cpu" and (reason := kernel.refusal(Where("cpu", torch.uint8))):
        pytest.skip(reason)
    with use_backend(request.param):
        yield request.param


def expected(generator: torch.Generator, count: int) -> Tensor:
    return -torch.log1p(-torch.rand(count, dtype=torch.float64, generator=generator))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("words_before", [0, 1, 2, 623, 624])
@pytest.mark.parametrize("count", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 4097, 128 * BLOCK, 300_001])
def test_draws_and_state_are_those_of_a_generator(count: int, words_before: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(count)
    torch.rand(words_before, generator=generator)  # a word each
    state, before = generator.get_state(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        drawn = ops.exponential(state, count)
    finally:
        torch.set_num_threads(before)
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn, expected(generator, count).float(), rtol=2**-22, atol=0.0)
    assert torch.equal(state, generator.get_state())


def test_all_but_the_rarest_draws_are_the_same_to_the_bit() -> None:
    """Both logs have errors below 2 ulp of fp64, which seldom show in fp32: one draw in some 2^28."""
    generator = torch.Generator().manual_seed(3)
    drawn = ops.exponential(generator.get_state(), 10**6)
    assert (drawn != expected(generator, 10**6).float()).sum() <= 1
    assert drawn.min() >= 0 and drawn.max() < 37


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_defaults_do_not_matter(default: torch.dtype) -> None:
    state = torch.Generator().manual_seed(5).get_state()
    whole, dtype = ops.exponential(state.clone(), 1000), torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            drawn = ops.exponential(state, 1000)
    finally:
        torch.set_default_dtype(dtype)
    assert torch.equal(drawn, whole)


def test_a_broken_state_is_refused() -> None:
    state = torch.Generator().get_state()
    state[16:24] = 127  # the place of the next word
    with pytest.raises(RuntimeError, match="(?i)state"):
        ops.exponential(state, 1)


def test_the_reference_draws_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, state = ops.exponential.reference, torch.Generator().manual_seed(5).get_state()
    whole = reference(state.clone(), 1000)
    monkeypatch.setattr(importlib.import_module("hart_infer.ops.exponential"), "FP64_DRAWS", 7)
    assert torch.equal(reference(state, 1000), whole)


@pytest.mark.parametrize("state", [torch.zeros(5056), torch.zeros(5000, dtype=torch.uint8), torch.zeros(10112).byte()[::2]])
def test_the_kernel_refuses_what_is_no_state(state: Tensor) -> None:
    with pytest.raises(ValueError, match="must be 5056 contiguous bytes"):
        kernel.exponential(state, 1)


def test_a_state_kept_otherwise_is_left_to_pytorch(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "torch":
        pytest.skip("of the kernel")
    monkeypatch.setattr(kernel, "STATE", 5000)
    kernel._knows_the_state.cache_clear()
    reason = kernel.refusal(Where("cpu", torch.uint8))
    kernel._knows_the_state.cache_clear()
    assert reason is not None and "otherwise" in reason
