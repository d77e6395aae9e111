"""The CPU's compiled kernels against fp64 and PyTorch, and their library where there is none."""

from __future__ import annotations

import ctypes
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hart_infer import ops
from hart_infer.errors import BackendError
from hart_infer.ops import cpu as extension
from hart_infer.ops.cpu import library
from hart_infer.ops.int8_linear import pack_int8, quantize_rows, unpack_int8
from hart_infer.ops.registry import OPS, Where, use_backend
from tests.ops.checks import check, strided

HERE = Where("cpu", torch.bfloat16)
compiled = pytest.mark.skipif(extension.refusal(HERE) is not None, reason=str(extension.refusal(HERE)))
SHAPES = [  # rows, heads, queries, keys, head width: one of each, ragged tails, several blocks of keys, of queries, of both
    (1, 1, 1, 1, 2),
    (2, 3, 1, 1, 32),
    (1, 2, 1, 301, 64),
    (2, 1, 9, 700, 32),
    (1, 2, 12, 256, 64),
    (1, 2, 13, 257, 64),
    (1, 1, 27, 95, 24),
    (1, 1, 70, 333, 48),
    (1, 1, 5, 1100, 80),
    (1, 1, 130, 65, 128),
    (1, 2, 790, 520, 64),
    (1, 1, 20, 300, 640),
]


@pytest.fixture(autouse=True)
def on_the_gpu() -> None:
    """What runs on the CPU is tested on the CPU, wherever that is."""


def draw(shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, heads, queries, keys, width = shape
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(rows, heads, n, width, generator=generator).bfloat16() for n in (queries, keys, keys))
    return strided(q), strided(k), strided(v)


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    weights = torch.softmax(q.double() @ k.double().transpose(-1, -2) * scale, dim=-1)
    return (weights @ v.double()).transpose(1, 2).flatten(2)


@compiled
@pytest.mark.parametrize("scale", [0.02, 0.3, 2.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(shape: tuple[int, ...], scale: float) -> None:
    q, k, v = draw(shape, sum(shape))
    with use_backend("cpu"):
        found = ops.attention(q, k, v, scale=scale)
    check(found, F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2), exact(q, k, v, scale))


@compiled
@pytest.mark.parametrize("multiplicity", [1, 300])
@pytest.mark.parametrize("ranges", [[3, 80], [0, 1, 40, 700], [50, 70, 5, 55], [0, 10, 20, 21, 40, 300]], ids=str)
def test_attention_to_ranges_of_the_keys(ranges: list[int], multiplicity: int) -> None:
    """Against fp64 attention to a copy in which the first range's keys stand there as often as they count."""
    q, k, v = draw((2, 1, 20, 700, 24), 1)
    with use_backend("cpu"):
        found = ops.attention(q, k, v, scale=0.3, ranges=ranges, multiplicity=multiplicity)
    index = torch.cat([torch.arange(a, b) for a, b in zip(ranges[::2], ranges[1::2], strict=True)])
    index = torch.cat([index[: ranges[1] - ranges[0]].repeat(multiplicity - 1), index])
    k, v = k[:, :, index], v[:, :, index]
    check(found, F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(2), exact(q, k, v, 0.3))


@compiled
def test_attention_with_large_and_rising_scores() -> None:
    """The largest score comes last, and all others vanish beside it."""
    q, k, v = draw((1, 2, 15, 600, 64), 2)
    k *= torch.linspace(0.1, 30, 600).bfloat16()[:, None]
    with use_backend("cpu"):
        found = ops.attention(q, k, v, scale=1.0)
    check(found, F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).flatten(2), exact(q, k, v, 1.0))


@compiled
def test_attention_is_the_same_in_any_number_of_threads_and_beside_any_rows() -> None:
    q, k, v = draw((2, 3, 800, 300, 64), 3)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(ops.attention(q, k, v, scale=0.3))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert torch.equal(found[0][1:], ops.attention(q[1:], k[1:], v[1:], scale=0.3))


@compiled
def test_attention_without_pytorch_s_threads_runs_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw((1, 2, 800, 30, 64), 4)
    expected = ops.attention(q, k, v, scale=0.3)
    assert library.parallel(), "PyTorch's OpenMP is found"
    monkeypatch.setattr(library, "parallel", ctypes.c_void_p)
    assert torch.equal(ops.attention(q, k, v, scale=0.3), expected)


@compiled
def test_strides_along_the_width_are_taken_and_no_query_gives_nothing() -> None:
    q, k, v = (torch.randn(1, 2, 32, n).bfloat16().transpose(2, 3) for n in (5, 90, 90))
    assert torch.equal(
        ops.attention(q, k, v, scale=0.3), ops.attention(q.contiguous(), k.contiguous(), v.contiguous(), scale=0.3)
    )
    assert ops.attention(q[:, :, :0], k, v, scale=0.3).shape == (1, 0, 64)


@compiled
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
def test_attention_refuses_ranges_that_are_not_there(options: dict[str, object], message: str) -> None:
    q, k, v = (torch.zeros(1, 2, n, 16, dtype=torch.bfloat16) for n in (3, 5, 5))
    with use_backend("cpu"), pytest.raises(ValueError, match=f"attention: .*{message}"):
        ops.attention(q, k, v, scale=1.0, **options)


@compiled
def test_attention_refuses_what_does_not_fit() -> None:
    q, k = torch.zeros(1, 2, 3, 16, dtype=torch.bfloat16), torch.zeros(1, 2, 5, 8, dtype=torch.bfloat16)
    with use_backend("cpu"):
        with pytest.raises(ValueError, match="don't fit each other"):
            ops.attention(q, k, k, scale=1.0)
        with pytest.raises(ValueError, match="there must be a key"):
            ops.attention(q, q[:, :, :0], q[:, :, :0], scale=1.0)
        with pytest.raises(ValueError, match="must be in bfloat16"):
            ops.attention(q, q.float(), q.float(), scale=1.0)
        with pytest.raises(BackendError, match="even head_dim up to 1024"):
            ops.attention(q[..., :3], q[..., :3], q[..., :3], scale=1.0)


ROWS = [(1,), (33,), (2, 3, 64), (7, 1536), (2, 40, 1000)]


@compiled
@pytest.mark.parametrize("added", [False, True], ids=["alone", "added"])
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_rms_norm(shape: tuple[int, ...], added: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    x, update = (strided(torch.randn(shape, generator=generator).bfloat16() * 3) for _ in range(2))
    weight = torch.randn(shape[-1], generator=generator).bfloat16()
    with use_backend("cpu"):
        total, found = ops.add_rms_norm(x, update, weight, 1e-6) if added else (x, ops.rms_norm(x, weight, 1e-6))
    assert torch.equal(total, x + update if added else x)
    wide = total.double()
    exact = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + 1e-6) * weight.double()
    check(found, ops.rms_norm.reference(total, weight, 1e-6), exact)


@compiled
@pytest.mark.parametrize("learned", [False, True], ids=["plain", "learned"])
@pytest.mark.parametrize("gated", [False, True], ids=["alone", "gated"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (2, 3, 64), (7, 1024), (2, 40, 1000)], ids=str)
def test_layer_norm_modulate(shape: tuple[int, ...], gated: bool, learned: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    shared = (*shape[:-2], 1, shape[-1]) if len(shape) == 3 else shape
    x, update = (strided(torch.randn(shape, generator=generator).bfloat16() * 3 + 1) for _ in range(2))
    gate, scale, shift = (strided(torch.randn(shared, generator=generator).bfloat16()) for _ in range(3))
    weight, bias = (torch.randn(shape[-1], generator=generator).bfloat16() if learned else None for _ in range(2))
    rest = (weight, bias, scale, shift, 1e-6)
    with use_backend("cpu"):
        total, found = (
            ops.gated_layer_norm_modulate(x, update, gate, *rest) if gated else (x, ops.layer_norm_modulate(x, *rest))
        )
    assert torch.equal(total, x + gate * update if gated else x)
    wide = [None if y is None else y.double() for y in (weight, bias)]
    exact = F.layer_norm(total.double(), shape[-1:], *wide, 1e-6) * (1 + scale.double()) + shift.double()
    check(found, ops.layer_norm_modulate.reference(total, *rest), exact)


@compiled
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_swiglu(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(6)
    gate, up = (strided(torch.randn(shape, generator=generator).bfloat16() * 8) for _ in range(2))
    gate[..., :1] = -200.0  # whose exponential overflows
    with use_backend("cpu"):
        found = ops.swiglu(gate, up)
    check(found, ops.swiglu.reference(gate, up), gate.double().sigmoid() * gate.double() * up.double())


@compiled
def test_gelu_tanh() -> None:
    """Of every bf16 number, and where 1 + tanh would cancel too."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(2, -1)
    x = strided(x)
    with use_backend("cpu"):
        found = ops.gelu_tanh(x)
    wide = x.double()
    exact = wide * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))
    finite = x.isfinite()
    assert ((found.double() - exact).abs() <= 2.0**-8 * exact.abs() + 2.0**-124)[finite].all(), "smaller results may be 0"
    normal = finite & (exact.abs() > 2.0**-124)
    assert (found == exact.bfloat16())[normal].float().mean() > 0.999, "all but a few are the nearest"
    assert torch.equal(found[~finite].nan_to_num(), ops.gelu_tanh.reference(x)[~finite].nan_to_num())


@compiled
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_gelu_tanh_of_any_shape(shape: tuple[int, ...]) -> None:
    x = strided(torch.randn(shape, generator=torch.Generator().manual_seed(6)).bfloat16())
    with use_backend("cpu"):
        found = ops.gelu_tanh(x)
    torch.testing.assert_close(found, ops.gelu_tanh.reference(x))


@compiled
@pytest.mark.parametrize("normalised", [False, True], ids=["plain", "normalised"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 8), (2, 5, 3, 24), (1, 7, 4, 64), (2, 300, 2, 128)], ids=str)
def test_rope_cache(shape: tuple[int, ...], normalised: bool) -> None:
    """Bit for bit the reference's, which rounds every product and sum; the norm may differ by one rounding."""
    rows, tokens, heads, width = shape
    torch.manual_seed(sum(shape))
    qkv = strided(torch.randn(rows, tokens, 3, heads, width).bfloat16())
    angles = torch.randn(rows, 1, tokens, width)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    gains = (torch.rand(heads) * 3 + 1).bfloat16() if normalised else None
    results = []
    for backend in ("cpu", "torch"):
        cache = torch.full((2, rows, heads, tokens + 9, width), torch.nan, dtype=torch.bfloat16)
        keys, values = cache[:, :, :, 4 : 4 + tokens]
        with use_backend(backend):
            results.append((ops.rope_cache(qkv, cos, sin, keys, values, gains), keys, values))
        assert cache[:, :, :, :4].isnan().all() and cache[:, :, :, 4 + tokens :].isnan().all(), "wrote beyond its slot"
    for found, reference in zip(*results, strict=True):
        if normalised:
            torch.testing.assert_close(found, reference, rtol=0.016, atol=0.016)
            assert (found != reference).float().mean() < 0.01
        else:
            assert torch.equal(found, reference)


@compiled
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("shape", [(1, 4, 1), (1, 64, 33), (13, 24, 31), (2, 5, 1536, 600), (421, 100, 70)], ids=str)
def test_int8_linear(shape: tuple[int, ...], biased: bool) -> None:
    """Bit for bit the reference's: sums are integers, and the rest is rounded alike."""
    *rows, width, outputs = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x = strided(torch.randn(*rows, width, generator=generator).bfloat16() * 5)
    x[..., :1, :] = 0  # a row without a largest
    levels, scale = quantize_rows(torch.randn(outputs, width, generator=generator))
    bias = torch.randn(outputs, generator=generator).bfloat16() if biased else None
    arguments = (x, pack_int8(levels), scale, levels.sum(dim=1, dtype=torch.int32), bias)
    assert torch.equal(unpack_int8(pack_int8(levels), outputs), levels)
    with use_backend("cpu"):
        found = ops.int8_linear(*arguments)
    assert torch.equal(found, ops.int8_linear.reference(*arguments))


@compiled
def test_kernels_refuse_what_does_not_fit() -> None:
    x, y = torch.zeros(2, 8, dtype=torch.bfloat16), torch.zeros(2, 4, dtype=torch.bfloat16)
    qkv, table = torch.zeros(1, 2, 3, 1, 8, dtype=torch.bfloat16), torch.zeros(1, 1, 2, 8, dtype=torch.bfloat16)
    with use_backend("cpu"):
        with pytest.raises(ValueError, match="swiglu: .* should be"):
            ops.swiglu(x, y)
        with pytest.raises(ValueError, match="add_rms_norm: .* should be"):
            ops.add_rms_norm(x, y, x[0], 1e-6)
        with pytest.raises(ValueError, match="rms_norm: all arguments must be in bfloat16"):
            ops.rms_norm(x, x[0].float(), 1e-6)
        with pytest.raises(ValueError, match="rope_cache: .* should be"):
            ops.rope_cache(qkv, table[:, :, :1], table, table, table)


@compiled
def test_it_is_what_runs_in_bf16_and_pytorch_in_the_rest() -> None:
    attention = OPS["attention"]
    assert attention.choose(HERE).backend == "cpu"
    for dtype in (torch.float32, torch.float16):
        assert attention.choose(Where("cpu", dtype)).backend == "torch"
    odd = torch.ones(1, 1, 4, 3, dtype=torch.bfloat16)
    assert torch.equal(ops.attention(odd, odd, odd, scale=1.0), torch.ones(1, 4, 3, dtype=torch.bfloat16)), "falls back"


def test_where_the_kernels_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert extension.refusal(Where("cuda", torch.bfloat16, (9, 0))) == "it is for CPUs"
    assert "float32" in str(extension.refusal(Where("cpu", torch.float32)))
    monkeypatch.setattr(library, "instructions", frozenset)
    assert extension.refusal(HERE) == "this CPU has no AVX512_BF16"


def test_a_missing_library_is_told_once(monkeypatch: pytest.MonkeyPatch, tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(library, "FILE", tmp_path / "_cpu.so")
    monkeypatch.setattr(library, "REASON", tmp_path / "_cpu.absent")
    monkeypatch.setattr(library, "instructions", lambda: frozenset({"avx512_bf16", "avx512_vnni"}))
    (tmp_path / "_cpu.absent").write_text("g++ was not found (CXX, PATH)\n", encoding="utf-8")
    with forgotten(), caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert "g++ was not found" in str(extension.refusal(HERE))
        assert len(caplog.records) == 1 and "HART_INFER_BUILD_CPU=1" in caplog.text and str(tmp_path) not in caplog.text
        (tmp_path / "_cpu.so").write_bytes(b"no library")
        library.load.cache_clear()
        assert "can't be used" in extension.describe()
        q = torch.zeros(1, 1, 2, 8, dtype=torch.bfloat16)
        with pytest.raises(BackendError, match="can't be used"):
            extension.attention(q, q, q, scale=math.pi)


class forgotten:  # noqa: N801 - a context manager
    """Loading is remembered; forget it before and after."""

    def __enter__(self) -> None:
        library.load.cache_clear()
        library._say_once.cache_clear()

    def __exit__(self, *_: object) -> None:
        self.__enter__()
