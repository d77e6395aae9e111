"""HART's rotary embedding of q and k from the merged qkv, which writes k and v straight into the cache, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import refusal as refusal


@triton.jit
def _rotated(first, second, cos_first, cos_second, sin_first, sin_second, DTYPE: tl.constexpr):
    """Rotate both halves [heads, HALF]; round every product and sum to DTYPE, as PyTorch does."""
    a = (first * cos_first).to(DTYPE).to(tl.float32) - (second * sin_first).to(DTYPE).to(tl.float32)
    b = (second * cos_second).to(DTYPE).to(tl.float32) + (first * sin_second).to(DTYPE).to(tl.float32)
    return a.to(DTYPE), b.to(DTYPE)


@triton.jit
def _normalised(first, second, gain, DTYPE: tl.constexpr):
    """Divide both halves [heads, HALF] by the head's l2 norm, then multiply by gain [heads, 1]; round to DTYPE after each."""
    norm = tl.sqrt_rn(tl.sum(first * first, 1) + tl.sum(second * second, 1)).to(DTYPE).to(tl.float32)
    norm = tl.maximum(norm, 1e-12)[:, None]
    first = (tl.div_rn(first, norm).to(DTYPE).to(tl.float32) * gain).to(DTYPE).to(tl.float32)
    second = (tl.div_rn(second, norm).to(DTYPE).to(tl.float32) * gain).to(DTYPE).to(tl.float32)
    return first, second


@triton.jit(do_not_specialize=["heads", "tokens"])
def rope_cache_kernel(
    qkv, cos, sin, gains, q_out, k_out, v_out,
    x_row, x_token, x_part, x_head, table_row, table_token,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token,
    heads, tokens,
    HALF: tl.constexpr, LANES: tl.constexpr, HEADS: tl.constexpr, NORMALISED: tl.constexpr,
):  # fmt: skip
    """Rotate q and k, and copy v, of all heads of one token of one row; grid (R * L).

    qkv [R, L, 3, H, d], cos and sin [R, 1, L, d], q_out, k_out and v_out [R, H, L, d], each of its own strides (table_row and
    table_token are those of cos and sin). HALF: d / 2. LANES and HEADS: the next powers of two of HALF and of `heads`.
    NORMALISED: first divide each head's q and k by their l2 norms, then multiply q by gains [H].
    """
    row = (tl.program_id(0) // tokens).to(tl.int64)
    token = (tl.program_id(0) % tokens).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    valid = (head < heads) & (lane < HALF)
    in_lane = lane < HALF
    table = row * table_row + token * table_token + lane
    cos_first = tl.load(cos + table, mask=in_lane, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + table + HALF, mask=in_lane, other=0.0).to(tl.float32)
    sin_first = tl.load(sin + table, mask=in_lane, other=0.0).to(tl.float32)
    sin_second = tl.load(sin + table + HALF, mask=in_lane, other=0.0).to(tl.float32)
    x = qkv + row * x_row + token * x_token + head * x_head + lane
    dtype = qkv.dtype.element_ty
    first = tl.load(x, mask=valid, other=0.0).to(tl.float32)
    second = tl.load(x + HALF, mask=valid, other=0.0).to(tl.float32)
    if NORMALISED:
        gain = tl.load(gains + head, mask=head < heads, other=0.0).to(tl.float32)
        first, second = _normalised(first, second, gain, dtype)
    first, second = _rotated(first, second, cos_first, cos_second, sin_first, sin_second, dtype)
    place = q_out + row * q_row + head * q_head + token * q_token + lane
    tl.store(place, first, mask=valid)
    tl.store(place + HALF, second, mask=valid)
    first = tl.load(x + x_part, mask=valid, other=0.0).to(tl.float32)
    second = tl.load(x + x_part + HALF, mask=valid, other=0.0).to(tl.float32)
    if NORMALISED:
        first, second = _normalised(first, second, tl.full([HEADS, 1], 1.0, tl.float32), dtype)
    first, second = _rotated(first, second, cos_first, cos_second, sin_first, sin_second, dtype)
    place = k_out + row * k_row + head * k_head + token * k_token + lane
    tl.store(place, first.to(k_out.dtype.element_ty), mask=valid)
    tl.store(place + HALF, second.to(k_out.dtype.element_ty), mask=valid)
    first = tl.load(x + 2 * x_part, mask=valid, other=0.0)
    second = tl.load(x + 2 * x_part + HALF, mask=valid, other=0.0)
    place = v_out + row * v_row + head * v_head + token * v_token + lane
    tl.store(place, first.to(v_out.dtype.element_ty), mask=valid)
    tl.store(place + HALF, second.to(v_out.dtype.element_ty), mask=valid)


def rope_cache(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, gains: Tensor | None = None) -> Tensor:
    """Compute what the reference in `hart_infer/ops/rope_cache.py` computes."""
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"rope_cache: qkv must be [R, L, 3, H, d], not {list(qkv.shape)}.")
    others = [x for x in (cos, sin, keys, values, gains) if x is not None]
    if any(x.device != qkv.device for x in others):
        raise ValueError(f"rope_cache: all must be on {qkv.device}, as qkv is.")
    rows, tokens, _, heads, head_dim = qkv.shape
    place = (rows, heads, tokens, head_dim)
    if keys.shape != place or values.shape != place or head_dim % 2:
        raise ValueError(
            f"rope_cache: keys {list(keys.shape)} and values {list(values.shape)} must be {list(place)}, of even width."
        )
    if cos.shape[2:] != (tokens, head_dim) or sin.shape != cos.shape or cos.dtype != qkv.dtype or sin.dtype != qkv.dtype:
        raise ValueError(f"rope_cache: cos and sin must be [R, 1, {tokens}, {head_dim}] in {qkv.dtype}.")
    if gains is not None:
        if gains.shape != (heads,) or gains.dtype != qkv.dtype:
            raise ValueError(f"rope_cache: gains must be [{heads}] in {qkv.dtype}, not {list(gains.shape)} in {gains.dtype}.")
        gains = gains.contiguous()
    qkv = qkv if qkv.stride(4) == 1 else qkv.contiguous()
    cos, sin = (table.expand(rows, 1, tokens, head_dim) for table in (cos, sin))
    cos, sin = (table if table.stride(3) == 1 else table.contiguous() for table in (cos, sin))
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    if keys.stride(3) != 1 or values.stride(3) != 1:
        raise ValueError("rope_cache: keys and values must be contiguous along their last dimension.")
    q = qkv.new_empty(rows, heads, tokens, head_dim)
    rope_cache_kernel[(rows * tokens,)](
        qkv, cos, sin, qkv if gains is None else gains, q, keys, values,
        *qkv.stride()[:4], cos.stride(0), cos.stride(2),
        *q.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        heads, tokens,
        HALF=head_dim // 2, LANES=triton.next_power_of_2(head_dim // 2), HEADS=triton.next_power_of_2(heads),
        NORMALISED=gains is not None, num_warps=4, enable_fp_fusion=False,  # a fused multiply-add would not round the product
    )  # fmt: skip
    return q
