"""Group norm and SiLU: the Triton kernels, interpreted, against fp64, in both memory formats."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hart_infer import ops
from hart_infer.ops.registry import use_backend
from tests.ops.checks import check, every_dtype, strided

pytest.importorskip("triton")
EPS = 1e-6
SHAPES = [  # [B, C, h, w], groups: one pixel, ragged tiles, several slabs and blocks of channels, groups across a block's edge
    ((1, 4, 1, 1), 2),
    ((2, 6, 9, 5), 3),
    ((1, 96, 13, 11), 32),
    ((2, 130, 5, 27), 2),
    ((1, 4, 31, 43), 1),
]


def layers(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.rand(channels).add(0.5).to(dtype), torch.randn(channels).to(dtype)


@every_dtype
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_group_norm_silu(shape, groups, layout, dtype):
    torch.manual_seed(sum(shape))
    x = torch.randn(shape).mul_(2).add_(torch.randn(shape[1])[:, None, None]).to(dtype, memory_format=layout)
    weight, bias = layers(shape[1], dtype)
    kept = x.clone()
    for silu in (True, False):
        with use_backend("triton"):
            found = ops.group_norm_silu(x, weight, bias, groups, EPS, silu=silu)
        reference = F.group_norm(x, groups, weight, bias, EPS)
        exact = F.group_norm(x.double(), groups, weight.double(), bias.double(), EPS)
        check(found, F.silu(reference) if silu else reference, F.silu(exact) if silu else exact)
        assert found.is_contiguous(memory_format=layout)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("view", [lambda x: strided(x), lambda x: x.transpose(2, 3), lambda x: x[:, ::2]])
def test_any_strides_will_do(view):
    torch.manual_seed(0)
    x, (weight, bias) = view(torch.randn(2, 8, 4, 6)), layers(8, torch.float32)
    weight, bias = weight[: x.shape[1]], bias[: x.shape[1]]
    with use_backend("triton"):
        found = ops.group_norm_silu(x, weight, bias, 2, EPS)
    torch.testing.assert_close(found, F.silu(F.group_norm(x, 2, weight, bias, EPS)), rtol=1e-5, atol=1e-5)


def test_a_tile_of_a_channels_last_picture_stays_channels_last():
    x = torch.randn(1, 4, 9, 9).to(memory_format=torch.channels_last)[..., 2:7, 3:8]
    with use_backend("triton"):
        found = ops.group_norm_silu(x, *layers(4, torch.float32), 2, EPS)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["channels_first", "channels_last"])
def test_a_mean_far_from_zero_costs_no_precision(layout):
    """In fp32 squares about zero would leave nothing of a deviation of 1 about 10 000."""
    torch.manual_seed(0)
    x = (torch.randn(1, 4, 40, 30) + 1e4).to(memory_format=layout)
    ones, zeros = torch.ones(4), torch.zeros(4)
    with use_backend("triton"):
        found = ops.group_norm_silu(x, ones, zeros, 2, EPS, silu=False)
    exact = F.group_norm(x.double(), 2, eps=EPS)
    assert (found.double() - exact).abs().max() <= 4 * 1e4 * torch.finfo(torch.float32).eps


def test_slabs_fill_the_device_and_are_never_empty():
    slabs_for = importlib.import_module("hart_infer.kernels.group_norm_silu").slabs_for
    assert slabs_for(pixels=1, tile=64, per_group=5, programs=1, processors=132) == (1, 64)
    slabs, per_slab = slabs_for(pixels=2**20, tile=64, per_group=5, programs=3, processors=132)
    assert slabs >= 132 and per_slab % 64 == 0 and (slabs - 1) * per_slab < 2**20 <= slabs * per_slab
    assert slabs_for(pixels=2**20, tile=64, per_group=20, programs=10**6, processors=132) == (1, 2**20)
    assert slabs_for(pixels=2**20, tile=64, per_group=2**13, programs=1, processors=132)[0] == 1, "more than one can merge"


def test_what_does_not_fit_is_refused():
    x, (weight, bias) = torch.zeros(1, 6, 2, 2), layers(6, torch.float32)
    with use_backend("triton"):
        for given, message in (
            ((x, weight, bias, 4), "a multiple of 4 groups, not \\[1, 6, 2, 2\\]"),
            ((x, weight, bias, 0), "a multiple of 0 groups"),
            ((x[0], weight, bias, 2), "must be \\[B, C, h, w\\]"),
            ((x, weight[1:], bias, 2), "weight and bias must be \\[6\\]"),
            ((x, weight, bias[1:], 2), "weight and bias must be \\[6\\]"),
        ):
            with pytest.raises(ValueError, match=f"group_norm_silu: .*{message}"):
                ops.group_norm_silu(*given, EPS)
        assert ops.group_norm_silu(x[:0], weight, bias, 2, EPS).shape == (0, 6, 2, 2)
