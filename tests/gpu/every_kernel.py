"""Calls every kernel in the ways it is compiled, for compute-sanitizer: nothing else runs on the device but copies."""

from __future__ import annotations

import itertools
import sys

import torch
from torch import Tensor

from hart_infer import ops
from hart_infer.ops.registry import OPS, use_backend

HALF = (torch.float16, torch.bfloat16)
EPS = 1e-6


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Drawn on the CPU."""
    return torch.randn(shape).to(dtype).cuda()


def attention(dtype: torch.dtype) -> None:
    """Split and whole, long tiles and short ones, padded widths, ranges, copies."""
    for heads, queries, keys, width in (
        (2, 1, 301, 64),
        (1, 70, 333, 64),
        (1, 130, 65, 128),
        (2, 5, 90, 24),
        (1, 80, 1100, 80),
    ):
        q, k, v = (rand(1, heads, n, width, dtype=dtype) for n in (queries, keys, keys))
        ops.attention(q, k, v, scale=0.3)
        for ranges in ([3, keys], [0, 1, 40, keys], [0, 10, 20, 21, 40, keys]):
            ops.attention(q, k, v, scale=0.3, multiplicity=300, ranges=ranges)


def rope_cache(dtype: torch.dtype) -> None:
    """Whole and odd head widths."""
    for tokens, heads, width in ((5, 3, 24), (4, 7, 64)):
        cache, table = (
            rand(2, 2, heads, tokens + 3, width, dtype=dtype)[:, :, :, :tokens],
            rand(2, 1, tokens, width, dtype=dtype),
        )
        for gains in (None, rand(heads, dtype=dtype)):
            ops.rope_cache(rand(2, tokens, 3, heads, width, dtype=dtype), table, table, *cache, gains)


def pointwise(dtype: torch.dtype) -> None:
    """SwiGLU and group norms of both memory formats, of one pixel and of many."""
    for width in (7, 1025):
        ops.swiglu(rand(3, width, dtype=dtype), rand(3, width, dtype=dtype))
    for shape, layout in itertools.product(((1, 8, 1, 1), (2, 24, 9, 31)), (torch.contiguous_format, torch.channels_last)):
        weight = rand(shape[1], dtype=dtype)
        picture = torch.randn(shape).to(dtype).contiguous(memory_format=layout).cuda()
        ops.group_norm_silu(picture, weight, weight, 4, EPS, silu=True)


def norms(dtype: torch.dtype) -> None:
    """One element at a time and in packs, in registers and beyond, in all their forms."""
    for width in (7, 256, 9001):
        x, weight = rand(2, 3, width, dtype=dtype), rand(width, dtype=dtype)
        row = rand(2, 1, width, dtype=dtype)
        ops.rms_norm(x, weight, EPS)
        ops.rms_norm(x.float(), weight, EPS)  # parameters narrower than the input
        ops.add_rms_norm(x, x, weight, EPS)
        ops.rms_norm_modulate(x, weight, row, row, EPS)
        for quantized in (torch.int8, torch.float8_e4m3fn):
            ops.rms_norm_quantized(x, weight, EPS, quantized)
        ops.layer_norm_modulate(x, None, None, x, x, EPS)
        ops.layer_norm_modulate(x.float(), None, None, row, row, EPS)  # the same
        ops.gated_layer_norm_modulate(x, x, row, None, None, row, row, EPS)  # vectors that rows share
        ops.gated_layer_norm_modulate(x, x, x, weight, weight, x, x, EPS)


def sampling() -> None:
    """With and without guidance, filters and mixing; small codebooks and the largest."""
    seeds, offset = (torch.tensor([n]).cuda() for n in (7, 1))
    for rows, top_k, top_p, mixes in itertools.product((1, 2), (0, 5), (0.0, 0.9), (False, True)):
        settings = ops.draw_settings(guidance=2.0, top_k=top_k, top_p=top_p, logit_gain=1.5, temperature=0.1).cuda()
        options = {"top_k": top_k > 0, "top_p": top_p > 0, "more_smooth": mixes}
        ops.guided_sample(rand(rows, 19, 500), rand(500, 12), seeds, offset, settings, **options)
    for codes, dtype in ((16384, torch.float32), (4096, torch.bfloat16)):
        ops.guided_sample(rand(2, 3, codes, dtype=dtype), rand(codes, 32), seeds, offset, settings, **options)
    step = {"x0_from_x": 1.1, "x0_from_noise": 0.5, "mean_from_x0": 0.4, "mean_from_x": 0.6}
    step |= {"log_variance_min": -3.0, "log_variance_max": -1.0}
    for tokens, channels in ((33, 12), (300, 32)):
        ops.normal_noise(seeds, step=3, tokens=tokens, channels=channels)
    for halves, noisy in itertools.product((1, 2), (False, True)):
        x, both = rand(33, 12), rand(33 * halves, 12)
        ops.diffusion_step(x, both, both, x, settings, **step, adds_noise=noisy)


@torch.inference_mode()
def main() -> int:
    """By the kernels alone: another backend is an error."""
    for operation in OPS.values():
        assert operation.backends, operation.name
    with use_backend("triton"):
        for dtype in (torch.float32, *HALF):
            attention(dtype)
            rope_cache(dtype)
            pointwise(dtype)
        sampling()
    with use_backend("cuda"):
        for dtype in (torch.float32, *HALF):
            norms(dtype)
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
