"""What the tests of kernels share: dtypes, views with gaps, and how near to fp64 a result has to be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def strided(x: Tensor) -> Tensor:
    """The same numbers as a view into a larger tensor of NaN, padded in front and behind in every dimension but the last."""
    around = x.new_full([n + 3 for n in x.shape[:-1]] + [x.shape[-1]], torch.nan)
    view = around[tuple(slice(1, 1 + n) for n in x.shape[:-1])]
    return view.copy_(x)


def check(found: Tensor, reference: Tensor, exact: Tensor) -> None:
    """`found` is as near to `exact`, fp64, as twice the reference's distance, or as half a unit in the last place.

    Of a few numbers in fp32 as two units: the reference's largest error over them may be small by luck.
    """
    assert found.dtype == reference.dtype and found.shape == exact.shape
    assert found.isfinite().all()
    floor = (
        torch.finfo(found.dtype).eps
        * exact.abs().max().item()
        * (2 if found.dtype == torch.float32 and found.numel() < 100 else 0.5)
    )
    assert (found.double() - exact).abs().max() <= max(2 * (reference.double() - exact).abs().max().item(), floor)
