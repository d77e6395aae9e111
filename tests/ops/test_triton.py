"""The transformer's Triton kernels, interpreted on the CPU, against fp64: odd sizes, strided memory, every dtype."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F

from hart_infer import ops
from hart_infer.errors import BackendError
from hart_infer.ops.registry import use_backend
from tests.ops.checks import check, every_dtype, strided

pytest.importorskip("triton")
SHAPES = [  # rows, heads, queries, keys, head width: one query, ragged tails, one block, many blocks, splits and none
    (2, 3, 1, 1, 32),
    (1, 2, 1, 301, 64),
    (2, 1, 9, 700, 32),
    (1, 2, 16, 64, 24),
    (1, 1, 70, 333, 64),
    (1, 1, 130, 65, 128),
    (1, 1, 5, 1100, 80),
]


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(shape, dtype):
    rows, heads, queries, keys, width = shape
    torch.manual_seed(sum(shape))
    q, k, v = (strided(torch.randn(rows, heads, n, width).to(dtype)) for n in (queries, keys, keys))
    with use_backend("triton"):
        found = ops.attention(q, k, v, scale=0.3)
    weights = torch.softmax(q.double() @ k.double().transpose(-1, -2) * 0.3, dim=-1)
    exact = (weights @ v.double()).transpose(1, 2).flatten(2)
    reference = F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(2)
    check(found, reference, exact)


def test_attention_with_huge_scores_and_strides_along_the_width():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 32, n).transpose(2, 3) for n in (5, 90, 90))
    with use_backend("triton"):
        found = ops.attention(100 * q, k, v, scale=1.0)
    exact = torch.softmax(100 * q.double() @ k.double().transpose(-1, -2), dim=-1) @ v.double()
    torch.testing.assert_close(found.double(), exact.transpose(1, 2).flatten(2), rtol=1e-4, atol=1e-4)


RANGES = [  # of 90 keys or more: one, a window, backwards and overlapping, three, which are copied
    [3, 80],
    [0, 1, 40, 90],
    [50, 70, 5, 55],
    [0, 10, 20, 21, 40, 90],
]


@every_dtype
@pytest.mark.parametrize("multiplicity", [1, 300])
@pytest.mark.parametrize("ranges", RANGES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 3, 90, 32), (2, 1, 20, 700, 24)], ids=str)
def test_attention_to_ranges_of_the_keys(shape, ranges, multiplicity, dtype):
    """Against fp64 attention to a copy in which the first range's keys stand there as often as they count."""
    rows, heads, queries, keys, width = shape
    torch.manual_seed(sum(shape))
    q, k, v = (strided(torch.randn(rows, heads, n, width).to(dtype)) for n in (queries, keys, keys))
    ranges = ranges[:-1] + [keys if ranges[-1] == 90 else ranges[-1]]
    options = {"scale": 0.3, "multiplicity": multiplicity, "ranges": ranges}
    with use_backend("triton"):
        found = ops.attention(q, k, v, **options)
    index = torch.cat([torch.arange(a, b) for a, b in zip(ranges[::2], ranges[1::2], strict=True)])
    index = torch.cat([index[: ranges[1] - ranges[0]].repeat(multiplicity - 1), index])
    k, v = k[:, :, index].double(), v[:, :, index].double()
    exact = (torch.softmax(q.double() @ k.transpose(-1, -2) * 0.3, dim=-1) @ v).transpose(1, 2).flatten(2)
    plain = F.scaled_dot_product_attention(q, k.to(dtype), v.to(dtype), scale=0.3).transpose(1, 2).flatten(2)
    check(found, plain, exact)


def test_attention_counts_and_ranges_alike_without_a_kernel():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 16) for n in (5, 40, 40))
    repeated = [torch.cat([x[:, :, 4:7].repeat(1, 1, 9, 1), x[:, :, 10:]], dim=2) for x in (k, v)]
    found = ops.attention(q, k, v, scale=0.3, multiplicity=9, ranges=[4, 7, 10, 40])
    torch.testing.assert_close(found, ops.attention(q, *repeated, scale=0.3))
    assert torch.equal(ops.attention(q, k, v, scale=0.3, multiplicity=9), ops.attention(q, k, v, scale=0.3))
    assert torch.equal(ops.attention(q, k, v, scale=0.3, ranges=[0, 40]), ops.attention(q, k, v, scale=0.3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranges": []}, "must be pairs"),
        ({"ranges": [0, 3, 4]}, "must be pairs"),
        ({"ranges": [2, 2]}, "must be pairs"),
        ({"ranges": [-1, 2]}, "must be pairs"),
        ({"ranges": [0, 2, 3, 6]}, "within 5 keys"),
        ({"multiplicity": 0}, "multiplicity must be at least 1, not 0"),
    ],
)
def test_attention_refuses_ranges_that_are_not_there(options, message):
    q, k, v = (torch.zeros(1, 2, n, 16) for n in (3, 5, 5))
    with use_backend("triton"), pytest.raises(ValueError, match=f"attention: .*{message}"):
        ops.attention(q, k, v, scale=1.0, **options)


def test_each_generation_has_its_tiles():
    kernel = importlib.import_module("hart_infer.kernels.attention")
    for dtype_size, width, queries in itertools.product((2, 4), (32, 64, 80, 128), (1, 64, 4096)):
        for capability in (0, 80, 86, 89, 90, 100, 120):
            assert kernel.config_for(capability, dtype_size, width, queries).rows <= max(16, 2 * queries)
    assert kernel.config_for(80, 2, 128, 4096) != kernel.config_for(90, 2, 128, 4096)


def test_attention_splits_its_keys_where_queries_are_few():
    kernel = importlib.import_module("hart_infer.kernels.attention")
    assert kernel.splits_for(programs=2, keys=64, block=64, processors=108) == 1, "no part without work"
    assert kernel.splits_for(programs=48, keys=304, block=64, processors=108) == 4, "the released model's second scale"
    assert kernel.splits_for(programs=2, keys=9750, block=64, processors=108) > 16, "a GPU to fill"
    assert kernel.splits_for(programs=5000, keys=9750, block=64, processors=108) == 1, "already full"
    assert kernel.splits_for(programs=173, keys=9750, block=64, processors=108) == 1, "0.8 of a wave of two a multiprocessor"
    assert kernel.splits_for(programs=172, keys=9750, block=64, processors=108) == 2


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 2, 3, 32), (1, 2, 5, 32), (1, 2, 6, 32)), "don't fit each other"),
        (((1, 2, 3, 32), (1, 2, 5, 16), (1, 2, 5, 16)), "don't fit each other"),
        (((1, 2, 3, 32), (1, 2, 0, 32), (1, 2, 0, 32)), "don't fit each other"),
        (((2, 3, 32), (1, 2, 5, 32), (1, 2, 5, 32)), "q must be"),
    ],
)
def test_attention_refuses(shapes, message):
    q, k, v = (torch.zeros(shape) for shape in shapes)
    with use_backend("triton"), pytest.raises(ValueError, match=message):
        ops.attention(q, k, v, scale=1.0)


def test_attention_with_a_scale_that_is_not_above_0_has_no_kernel():
    q, k, v = (torch.zeros(1, 1, n, 16) for n in (3, 5, 5))
    with use_backend("triton"), pytest.raises(BackendError, match="a scale above 0, not -1.0. Leave the choice"):
        ops.attention(q, k, v, scale=-1.0)


def test_attention_of_wide_heads_has_no_kernel():
    q, k, v = (torch.zeros(1, 1, n, 136) for n in (3, 5, 5))
    with use_backend("triton"), pytest.raises(BackendError, match="head_dim up to 128, not 136. Leave the choice"):
        ops.attention(q, k, v, scale=1.0)


@every_dtype
@pytest.mark.parametrize("normalised", [False, True], ids=["plain", "normalised"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 5, 3, 24), (1, 7, 4, 64)], ids=str)
def test_rope_cache(shape, normalised, dtype):
    """Bit for bit the reference's, which rounds every product and sum; the norm may differ by one rounding."""
    rows, tokens, heads, width = shape
    torch.manual_seed(sum(shape))
    qkv = strided(torch.randn(rows, tokens, 3, heads, width).to(dtype))
    angles = torch.randn(rows, 1, tokens, width)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    gains = torch.rand(heads).to(dtype) * 3 + 1 if normalised else None
    results = []
    for backend in ("triton", "torch"):
        cache = torch.full((2, rows, heads, tokens + 9, width), torch.nan, dtype=dtype)
        keys, values = cache[:, :, :, 4 : 4 + tokens]
        with use_backend(backend):
            results.append((ops.rope_cache(qkv, cos, sin, keys, values, gains), keys, values))
        assert cache[:, :, :, :4].isnan().all() and cache[:, :, :, 4 + tokens :].isnan().all(), "wrote beyond its slot"
    for found, reference in zip(*results, strict=True):
        if normalised:
            torch.testing.assert_close(found, reference, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
        else:
            assert torch.equal(found, reference)


def test_rope_cache_widens_into_a_wider_cache():
    qkv, angles = torch.randn(1, 3, 3, 2, 8).bfloat16(), torch.randn(1, 1, 3, 8)
    keys, values = torch.empty(2, 1, 2, 3, 8)
    with use_backend("triton"):
        ops.rope_cache(qkv, angles.cos().bfloat16(), angles.sin().bfloat16(), keys, values)
    assert torch.equal(values, qkv[:, :, 2].transpose(1, 2).float())


def test_rope_cache_refuses_what_does_not_fit():
    qkv, table = torch.zeros(1, 3, 3, 2, 8), torch.zeros(1, 1, 3, 8)
    slot = torch.zeros(1, 2, 3, 8)
    with use_backend("triton"):
        for keys, cos, gains, message in (
            (torch.zeros(1, 2, 4, 8), table, None, "must be \\[1, 2, 3, 8\\]"),
            (slot, torch.zeros(1, 1, 2, 8), None, "cos and sin must be"),
            (slot, table.bfloat16(), None, "in torch.float32"),
            (slot, table, torch.zeros(3), "gains must be \\[2\\]"),
            (slot.to("meta"), table, None, "all must be on"),
        ):
            with pytest.raises(ValueError, match=message):
                ops.rope_cache(qkv, cos, table, keys, slot, gains)
        with pytest.raises(ValueError, match="qkv must be \\[R, L, 3, H, d\\], not \\[1, 3, 2, 2, 8\\]"):
            ops.rope_cache(qkv[:, :, :2], table, table, slot, slot)
        with pytest.raises(ValueError, match="swiglu: .* must be alike"):
            ops.swiglu(torch.zeros(4), torch.zeros(3))


@every_dtype
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 3, 1025), (0, 5)], ids=str)
def test_swiglu(shape, dtype):
    torch.manual_seed(len(shape))
    gate, up = (
        strided(torch.randn(*shape).to(dtype) * 4) if len(shape) > 1 else torch.randn(shape).to(dtype) for _ in range(2)
    )
    with use_backend("triton"):
        found = ops.swiglu(gate, up)
    if found.numel():
        check(found, F.silu(gate) * up, F.silu(gate.double()) * up.double())
    assert found.shape == shape
