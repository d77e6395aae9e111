"""One step of the residual diffusion behind its network: the Triton kernel, interpreted, against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hart_infer import ops
from hart_infer.generation.residual import diffusion_schedule
from hart_infer.ops.registry import use_backend
from tests.ops.checks import check, strided

pytest.importorskip("triton")


def constants(index: int) -> dict[str, Any]:
    """One kept step's."""
    found = dict(vars(diffusion_schedule(8)[index]))
    del found["timestep"]
    return found


def inputs(rows: int, channels: int, halves: int) -> tuple[Tensor, ...]:
    torch.manual_seed(rows)
    x, noise = torch.randn(2, rows, channels)
    eps, variance = torch.randn(halves * rows, 2 * channels).chunk(2, dim=-1)  # as the network gives them
    return strided(x), eps, variance, noise


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("index", [0, 4, 7])
@pytest.mark.parametrize("shape", [(1, 1), (7, 4), (65, 32)], ids=str)
def test_every_kind_of_step(shape, index, halves):
    given, options = (*inputs(*shape, halves), ops.draw_settings(guidance=3.7)), constants(index)
    with use_backend("triton"):
        found = ops.diffusion_step(*given, **options)
    reference = ops.diffusion_step.reference(*given, **options)
    if found.numel() > 100:  # so many that PyTorch's error is not small by luck
        check(found, reference, ops.diffusion_step.reference(*(x.double() for x in given), **options))
    torch.testing.assert_close(found, reference, rtol=1e-6, atol=1e-6)


def test_what_is_not_a_number_stays_so():
    """The limits of x0 must not hide it."""
    x, eps, variance, noise = inputs(4, 4, 1)
    eps = eps.clone()
    eps[2, 1] = torch.nan
    with use_backend("triton"):
        found = ops.diffusion_step(x, eps, variance, noise, ops.draw_settings(), **constants(3))
    assert found.isnan().nonzero().tolist() == [[2, 1]]


def test_no_rows_are_no_work():
    with use_backend("triton"):
        assert ops.diffusion_step(*inputs(0, 4, 1), ops.draw_settings(), **constants(0)).shape == (0, 4)


def test_what_does_not_fit_is_refused():
    x, eps, variance, noise = inputs(4, 4, 2)
    with use_backend("triton"):
        for given, message in (
            ((x, eps[:6], variance[:6], noise), "eps and variance as long or twice"),
            ((x, eps, variance[:4], noise), "eps and variance as long or twice"),
            ((x, eps, variance, noise[:3]), "don't fit"),
            ((x[0], eps, variance, noise), "don't fit"),
            ((x, eps.half(), variance, noise), "all must be float32, not .*eps torch.float16"),
        ):
            with pytest.raises(ValueError, match=f"diffusion_step: .*{message}"):
                ops.diffusion_step(*given, ops.draw_settings(guidance=1.0), **constants(0))
