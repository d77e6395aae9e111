"""Flash attention, forward only, of one scale's queries over the key/value cache: online softmax in base 2, fp32 sums."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import LimitExceeded as LimitExceeded
from . import refusal as refusal
from .launch import Config, capability, multiprocessors

LOG2E = math.log2(math.e)
MAX_HEAD_DIM = 128
LIMIT = f"head_dim up to {MAX_HEAD_DIM} and a scale above 0"
# (capabilities, () for all; largest element size in bytes; largest head dim; fewest queries) -> tile; the first match is taken.
# Chosen by the compiled code (tools/compiled_kernels.json), never timed on a GPU; benchmarks/attention_tiles.py times them, and
# writes the rows in TIMED, which come first. "a/b" below: instructions and bytes of shared memory for each matrix instruction
# of the inner loop, in bf16. On sm_80 an HMMA takes 2 cycles and 128 bytes of shared memory one, so over 256 bytes the shared
# memory is the bound.
TIMED: tuple[tuple[tuple[int, ...], int, int, int, Config], ...] = ()
CONFIGS: tuple[tuple[tuple[int, ...], int, int, int, Config], ...] = (
    *TIMED,
    # 5.3/195 with all 255 registers and two blocks a multiprocessor; with 8 warps 5.6/322, 64 x 64 takes 6.1/354. A fourth
    # stage saves nothing. On sm_86, 89 and 120, whose matrix units are half as fast, 322 is no bound, and 4 warps spill.
    ((80,), 2, 64, 64, Config(128, 64, warps=4, stages=3)),
    # On sm_90 301 instructions of a warp for 64 keys and two blocks a multiprocessor; 128 x 128 takes 323, and leaves one.
    ((), 2, 64, 64, Config(128, 64, warps=8, stages=3)),
    # 379 instructions for 64 keys. 128 x 128 takes 297, but spills 8 bytes over ranges, which are what it is the default for.
    ((90, 100, 103), 2, 128, 64, Config(128, 64, warps=8, stages=2)),
    # 4.9/358. 128 x 64 takes 4.1/323, but spills where a head is narrower than its tile; with 4 warps every tile spills.
    ((80, 86, 89), 2, 128, 64, Config(128, 32, warps=8, stages=2)),
    ((), 2, 128, 64, Config(128, 32, warps=8, stages=1)),  # sm_120: 4.8/352; with two stages, or 64 keys, it spills
    ((120,), 2, 128, 0, Config(16, 32, warps=4, stages=3)),  # 16 x 64 spills over ranges
    ((), 2, 128, 0, Config(16, 64, warps=4, stages=3)),
    ((), 4, 64, 64, Config(64, 32, warps=8, stages=2)),
    ((), 4, 128, 64, Config(32, 16, warps=8, stages=2)),
    ((), 4, 64, 0, Config(16, 32, warps=4, stages=2)),
    ((), 4, MAX_HEAD_DIM, 0, Config(16, 32, warps=8, stages=2)),
)


@triton.jit
def _attend(
    query, k, v, start, last, lane, largest, total, sum_v, scale_log2, k_token, v_token, first_keys, jump, bonus,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr, RANGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys from `start` on, BLOCK_K of them, to the running softmax; MASKED: only those before `last`.

    `largest` is in base 2 and scaled, so that one fused multiply-add makes the exponent of a raw score.
    """
    place = start + tl.arange(0, BLOCK_K)
    where = place
    if RANGED:
        where += tl.where(place < first_keys, 0, jump)
    k_place = k + where[None, :].to(tl.int64) * k_token + lane[:, None]
    v_place = v + where[:, None].to(tl.int64) * v_token + lane[None, :]
    if MASKED:
        key = tl.load(k_place, mask=(lane[:, None] < HEAD_DIM) & (place[None, :] < last), other=0.0)
    elif HEAD_DIM < WIDTH:
        key = tl.load(k_place, mask=lane[:, None] < HEAD_DIM, other=0.0)
    else:
        key = tl.load(k_place)
    score = tl.dot(query, key, input_precision=PRECISION)
    if RANGED:
        score += tl.where(place < first_keys, bonus, 0.0)[None, :]
    if MASKED:
        score = tl.where(place[None, :] < last, score, float("-inf"))
    larger = tl.maximum(largest, tl.max(score, 1) * scale_log2)
    weight = tl.exp2(score * scale_log2 - larger[:, None])
    shrink = tl.exp2(largest - larger)
    total = total * shrink + tl.sum(weight, 1)
    if MASKED:
        value = tl.load(v_place, mask=(place[:, None] < last) & (lane[None, :] < HEAD_DIM), other=0.0)
    elif HEAD_DIM < WIDTH:
        value = tl.load(v_place, mask=lane[None, :] < HEAD_DIM, other=0.0)
    else:
        value = tl.load(v_place)
    sum_v = tl.dot(weight.to(value.dtype), value, sum_v * shrink[:, None], input_precision=PRECISION)
    return larger, total, sum_v


@triton.jit(do_not_specialize=["heads", "queries", "keys", "keys_per_split", "first_keys", "jump"])
def attention_kernel(
    q, k, v, out, maxima, sums, scale_log2,
    q_row, q_head, q_token, k_row, k_head, k_token, v_row, v_head, v_token, out_split, out_row, out_head, out_token,
    heads, queries, keys, keys_per_split, first_keys, jump, bonus,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, RANGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend from BLOCK_Q queries of one row and head to one split of the keys; grid (blocks of queries, R * H, splits).

    q [R, H, L, HEAD_DIM], k and v [R, H, N, HEAD_DIM] -> out [R, H, L, HEAD_DIM], all with strides of their own.
    scale_log2: scale * log2(e), above 0. WIDTH: the next power of two of HEAD_DIM, at least 16.
    SPLIT: write out as fp32 [splits, R, H, L, HEAD_DIM], each split normalised by itself, and for `merge_kernel` its largest
    score and its sum of weights: maxima, sums [splits, R * H, L] fp32.
    RANGED: the keys are one or two ranges of k and v. Key n is token n if n < first_keys, else token n + jump. `bonus`,
    log(multiplicity) / scale, is added to the raw scores of the first range.
    In half precision only the last block of keys, where it is not whole, is masked.
    """
    row_head = tl.program_id(1)
    row = (row_head // heads).to(tl.int64)
    head = (row_head % heads).to(tl.int64)
    split = tl.program_id(2)
    token = (tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
    lane = tl.arange(0, WIDTH)
    in_q = (token[:, None] < queries) & (lane[None, :] < HEAD_DIM)
    query = tl.load(q + row * q_row + head * q_head + token[:, None] * q_token + lane[None, :], mask=in_q, other=0.0)
    k += row * k_row + head * k_head
    v += row * v_row + head * v_head
    largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    sum_v = tl.zeros([BLOCK_Q, WIDTH], tl.float32)
    first = split * keys_per_split
    last = tl.minimum(first + keys_per_split, keys)
    whole = first  # in fp32, where a second copy of the loop's body spills, every block is masked
    if PRECISION != "ieee":
        whole = first + (last - first) // BLOCK_K * BLOCK_K
    for start in range(first, whole, BLOCK_K):
        largest, total, sum_v = _attend(
            query, k, v, start, last, lane, largest, total, sum_v, scale_log2, k_token, v_token, first_keys, jump, bonus,
            HEAD_DIM, WIDTH, BLOCK_K, False, RANGED, PRECISION,
        )  # fmt: skip
    for start in range(whole, last, BLOCK_K):  # at most one, but in fp32
        largest, total, sum_v = _attend(
            query, k, v, start, last, lane, largest, total, sum_v, scale_log2, k_token, v_token, first_keys, jump, bonus,
            HEAD_DIM, WIDTH, BLOCK_K, True, RANGED, PRECISION,
        )  # fmt: skip
    out += split.to(tl.int64) * out_split + row * out_row + head * out_head
    result = sum_v / total[:, None]
    tl.store(out + token[:, None] * out_token + lane[None, :], result.to(out.dtype.element_ty), mask=in_q)
    if SPLIT:
        place = (split * tl.num_programs(1) + row_head).to(tl.int64) * queries + token
        tl.store(maxima + place, largest, mask=token < queries)
        tl.store(sums + place, total, mask=token < queries)


@triton.jit(do_not_specialize=["heads", "queries", "splits"])
def merge_kernel(
    parts, maxima, sums, out,
    out_row, out_head, out_token, heads, queries, splits,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one query of one row and head, weighed by their shares of the softmax; grid (L, R * H).

    parts [splits, R, H, L, HEAD_DIM], maxima and sums [splits, R * H, L], fp32, as `attention_kernel` writes them; out of any
    dtype. SPLITS: the next power of two of `splits`. WIDTH: of HEAD_DIM, at least 16.
    """
    token = tl.program_id(0)
    row_head = tl.program_id(1)
    which = tl.arange(0, SPLITS)
    lane = tl.arange(0, WIDTH)
    place = (which * tl.num_programs(1) + row_head).to(tl.int64) * queries + token
    largest = tl.load(maxima + place, mask=which < splits, other=float("-inf"))
    total = tl.load(sums + place, mask=which < splits, other=0.0)
    weight = total * tl.exp2(largest - tl.max(largest, 0))
    valid = (which[:, None] < splits) & (lane[None, :] < HEAD_DIM)
    part = tl.load(parts + place[:, None] * HEAD_DIM + lane[None, :], mask=valid, other=0.0)
    merged = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    out += (
        (row_head // heads).to(tl.int64) * out_row + (row_head % heads).to(tl.int64) * out_head + token.to(tl.int64) * out_token
    )
    tl.store(out + lane, merged.to(out.dtype.element_ty), mask=lane < HEAD_DIM)


def config_for(capability: int, itemsize: int, head_dim: int, queries: int) -> Config:
    """Return the tile for a GPU (80, 86, ...; 0 for the CPU), an element of `itemsize` bytes and a shape."""
    return next(
        tiles
        for targets, size, width, least, tiles in CONFIGS
        if (not targets or capability in targets) and itemsize <= size and head_dim <= width and queries >= least
    )


def splits_for(programs: int, keys: int, block: int, processors: int) -> int:
    """Return the number of key splits, 1 to 64: enough for two programs per multiprocessor, each of at least `block` keys.

    programs: those of one split, which are blocks of queries * R * H. One split if they fill 0.8 of a wave of two programs per
    multiprocessor, as in FlashAttention-2, since splits cost a second launch; and one for fewer than `block` keys.
    """
    wave = 2 * processors
    wanted = 1 if programs >= 0.8 * wave else -(-wave // programs)
    return max(1, min(wanted, keys // block, 64))


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float, multiplicity: int) -> None:
    """Raise ValueError for shapes, dtypes or devices that don't fit each other, LimitExceeded beyond LIMIT."""
    if not q.dim() == k.dim() == v.dim() == 4 or not q.device == k.device == v.device:
        raise ValueError("attention: q must be [R, H, L, d], k and v [R, H, N, d], all on one device.")
    if k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3] or not k.shape[2]:
        raise ValueError(f"attention: q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} don't fit each other.")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q, k and v must be of one dtype, not {q.dtype}, {k.dtype} and {v.dtype}.")
    if q.shape[3] > MAX_HEAD_DIM:
        raise LimitExceeded(f"attention's kernel takes head_dim up to {MAX_HEAD_DIM}, not {q.shape[3]}.")
    if not scale > 0:
        raise LimitExceeded(f"attention's kernel takes a scale above 0, not {scale}.")
    if multiplicity < 1:
        raise ValueError(f"attention: multiplicity must be at least 1, not {multiplicity}.")


def _in_ranges(k: Tensor, v: Tensor, ranges: Sequence[int] | None) -> tuple[Tensor, Tensor, int, int, int]:
    """Return k, v, keys, first_keys and jump as `attention_kernel` takes them.

    k and v begin with the first range; `keys` is the length of all ranges, `first_keys` of the first, `jump` the distance from
    the first one's stop to the second one's start. More than two ranges are copied into one tensor, without a jump.
    """
    if ranges is None:
        return k, v, k.shape[2], k.shape[2], 0
    pairs = list(zip(ranges[::2], ranges[1::2], strict=False))
    if not pairs or len(ranges) % 2 or not all(0 <= start < stop <= k.shape[2] for start, stop in pairs):
        raise ValueError(f"attention: ranges {list(ranges)} must be pairs of a start and a stop within {k.shape[2]} keys.")
    keys, first = sum(stop - start for start, stop in pairs), pairs[0][1] - pairs[0][0]
    if len(pairs) > 2:
        k, v = (torch.cat([x[:, :, start:stop] for start, stop in pairs], dim=2) for x in (k, v))
        return k, v, keys, first, 0
    k, v = (x[:, :, pairs[0][0] :] for x in (k, v))
    return k, v, keys, first, pairs[-1][0] - pairs[0][1] if len(pairs) > 1 else 0


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, multiplicity: int = 1, ranges: Sequence[int] | None = None
) -> Tensor:
    """Compute what the reference in `hart_infer/ops/attention.py` computes; q, k and v may have any strides."""
    _check(q, k, v, scale, multiplicity)
    rows, heads, queries, head_dim = q.shape
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    k, v, keys, first_keys, jump = _in_ranges(k, v, ranges)
    out = q.new_empty(rows, queries, heads * head_dim)
    if not out.numel():
        return out
    tiles = config_for(capability(q.device), q.itemsize, head_dim, queries)
    blocks = triton.cdiv(queries, tiles.rows)
    splits = splits_for(blocks * rows * heads, keys, tiles.columns, multiprocessors(q.device))
    per_split = triton.cdiv(triton.cdiv(keys, splits), tiles.columns) * tiles.columns
    splits = triton.cdiv(keys, per_split)
    strides = (out.stride(0), head_dim, out.stride(1))
    parts, maxima, sums, part_strides = out, out, out, (0, *strides)
    if splits > 1:
        parts = q.new_empty(splits, rows, heads, queries, head_dim, dtype=torch.float32)
        maxima, sums = q.new_empty(2, splits, rows * heads, queries, dtype=torch.float32)
        part_strides = parts.stride()[:4]
    width = max(16, triton.next_power_of_2(head_dim))
    attention_kernel[(blocks, rows * heads, splits)](
        q, k, v, parts, maxima, sums, scale * LOG2E,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *part_strides,
        heads, queries, keys, per_split, first_keys, jump, math.log(multiplicity) / scale,
        HEAD_DIM=head_dim, WIDTH=width, BLOCK_Q=tiles.rows, BLOCK_K=tiles.columns,
        SPLIT=splits > 1, RANGED=ranges is not None,  # without ranges a multiplicity applies to all keys and cancels out
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(queries, rows * heads)](
            parts, maxima, sums, out, *strides, heads, queries, splits,
            HEAD_DIM=head_dim, WIDTH=width, SPLITS=triton.next_power_of_2(splits), num_warps=1 if splits <= 8 else 4,
        )  # fmt: skip
    return out
