"""Guidance, top-k, top-p, the draw of a code and the Gumbel-softmax mixture, in two launches and without a sort.

The first holds a token's row of logits in registers and finds the lowest logit that top-k and top-p keep, by a binary search
over its bits from the highest down. The second reads the logits again in tiles of TOKENS x CODES, draws by the Gumbel-max
trick (adds Gumbel noise, takes the largest), and mixes the codebook by an online softmax.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import LimitExceeded as LimitExceeded
from . import refusal as refusal

MAX_VOCABULARY = 16384  # the longest row that fits a block's registers
LIMIT = f"up to {MAX_VOCABULARY} codes"
TOKENS, CODES = 16, 64  # the second launch's tile


@triton.jit
def _guided(logits, place, valid, x_half, with_guidance, guidance, GUIDED: tl.constexpr):
    """Return guided logits in fp32, -inf where not `valid`. x_half: elements from the conditional to the unconditional row."""
    x = tl.load(logits + place, mask=valid, other=float("-inf")).to(tl.float32)
    if GUIDED:
        x = with_guidance * x - guidance * tl.load(logits + x_half + place, mask=valid, other=0.0).to(tl.float32)
    return x


@triton.jit
def _ordered(x):
    """Map fp32 to uint32 so that integers compare as the numbers do; -0.0 and 0.0 map to the same."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _unordered(image):
    """Map the integers of `_ordered` back to fp32."""
    bits = (image ^ 0x80000000).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def threshold_kernel(
    logits, settings, thresholds,
    x_half, x_image, x_token, vocab_size,
    GUIDED: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write one token's lowest kept logit to thresholds [B, L] fp32; grid (L, B). BLOCK: vocab_size's next power of two.

    With logits as ordered integers, top-k's threshold is the largest integer that at least top_k logits reach; top-p's is the
    largest below which the probabilities left by top-k add up to at most 1 - p. settings [6] fp32: as `guided_sample`'s.
    """
    guidance, with_guidance = tl.load(settings), tl.load(settings + 1)
    image, token = tl.program_id(1).to(tl.int64), tl.program_id(0)
    code = tl.arange(0, BLOCK)
    place = image * x_image + token.to(tl.int64) * x_token + code
    x = _guided(logits, place, code < vocab_size, x_half, with_guidance, guidance, GUIDED)
    ordered = _ordered(x)
    lowest = tl.full([], 0, tl.uint32)
    if TOP_K:
        top_k = tl.load(settings + 4).to(tl.int32)
        bit = tl.full([], 0x80000000, tl.uint32)
        for _ in range(32):
            reached = tl.sum(((ordered >= (lowest | bit)) & (code < vocab_size)).to(tl.int32), 0)
            lowest = tl.where(reached >= top_k, lowest | bit, lowest)
            bit = bit >> 1
    if TOP_P:
        best = tl.max(x, 0)
        weight = tl.where(ordered >= lowest, tl.exp(x - best), 0.0)
        allowed = tl.load(settings + 5) * tl.sum(weight, 0)
        raised = tl.full([], 0, tl.uint32)
        bit = tl.full([], 0x80000000, tl.uint32)
        for _ in range(32):
            below = tl.sum(tl.where(ordered < (raised | bit), weight, 0.0), 0)
            raised = tl.where(below <= allowed, raised | bit, raised)
            bit = bit >> 1
        lowest = tl.maximum(lowest, tl.minimum(raised, _ordered(best)))
    tl.store(thresholds + image * tl.num_programs(0) + token, _unordered(lowest))


@triton.jit
def _gumbel(word):
    """Turn 32 random bits into standard Gumbel noise, as `hart_infer/ops/philox.py` does."""
    uniform = ((word >> 9) * 2 + 1).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    return -tl.log(-tl.log(uniform))


@triton.jit(do_not_specialize=["tokens"])
def draw_kernel(
    logits, codebook, seeds, offset, settings, thresholds, indices, embeddings,
    x_half, x_image, x_token, tokens, vocab_size, channels,
    GUIDED: tl.constexpr, FILTERED: tl.constexpr, MORE_SMOOTH: tl.constexpr,
    TOKENS: tl.constexpr, CODES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Draw the codes of TOKENS tokens of one image and their embeddings; grid (blocks of tokens, B).

    logits [B or 2B, L, V], codebook [V, C] fp32, seeds [B] int64, offset [1] int64, thresholds [B, L] fp32 (FILTERED); writes
    indices [B, L] int64, and embeddings [B, L, C] fp32: of the drawn code, or MORE_SMOOTH the mixture of the kept ones.
    A token whose guided logits have no softmax (one is NaN or inf, or all are -inf) gets code -1 and embedding NaN.
    settings [6] fp32: as `guided_sample`'s. WIDTH: the next power of two of `channels`, at least 16.
    """
    guidance, with_guidance, logit_gain = tl.load(settings), tl.load(settings + 1), tl.load(settings + 2)
    rate = 1.4426950408889634 / tl.load(settings + 3)  # log2(e) / temperature
    image = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    known = token < tokens
    lane = tl.arange(0, WIDTH)
    seed, drawn = tl.load(seeds + image), tl.load(offset)
    low, high = (drawn & 0xFFFFFFFF).to(tl.uint32), (drawn >> 32).to(tl.uint32)
    lowest = tl.full([TOKENS], float("-inf"), tl.float32)
    if FILTERED:
        lowest = tl.load(thresholds + image * tokens + token, mask=known, other=0.0)
    row = image * x_image + token.to(tl.int64) * x_token
    failed = tl.zeros([TOKENS], tl.int32)
    best = tl.full([TOKENS], float("-inf"), tl.float32)
    winner = tl.full([TOKENS], -1, tl.int32)
    largest = tl.full([TOKENS], float("-inf"), tl.float32)
    total = tl.zeros([TOKENS], tl.float32)
    mixture = tl.zeros([TOKENS, WIDTH], tl.float32)
    for start in range(0, vocab_size, CODES):
        code = start + tl.arange(0, CODES)
        valid = known[:, None] & (code[None, :] < vocab_size)
        x = _guided(logits, row[:, None] + code[None, :], valid, x_half, with_guidance, guidance, GUIDED)
        failed = tl.maximum(failed, tl.max(((x != x) | (x == float("inf"))).to(tl.int32), 1))
        kept = valid & (x >= lowest[:, None])
        race, mixing, _, _ = tl.philox(seed, code[None, :].to(tl.uint32), token[:, None].to(tl.uint32), low, high)
        score = tl.where(kept, x + _gumbel(race), float("-inf"))
        score, place = tl.max(score, 1, return_indices=True)
        winner = tl.where(score > best, start + place, winner)
        best = tl.maximum(best, score)
        if MORE_SMOOTH:
            noisy = tl.where(kept, x * logit_gain + _gumbel(mixing), float("-inf"))
            larger = tl.maximum(largest, tl.max(noisy, 1))
            base = tl.where(larger == float("-inf"), 0.0, larger)  # no code is kept so far
            weight = tl.exp2((noisy - base[:, None]) * rate)
            shrink = tl.exp2((largest - base) * rate)
            total = total * shrink + tl.sum(weight, 1)
            in_table = (code[:, None] < vocab_size) & (lane[None, :] < channels)
            table = tl.load(codebook + code[:, None] * channels + lane[None, :], mask=in_table, other=0.0)
            mixture = tl.dot(weight, table, mixture * shrink[:, None], input_precision="ieee")
            largest = larger
    winner = tl.where(failed > 0, -1, winner)
    if MORE_SMOOTH:
        mixture = mixture / tl.where(total > 0.0, total, 1.0)[:, None]
    else:
        in_table = (winner[:, None] >= 0) & (lane[None, :] < channels)
        mixture = tl.load(codebook + winner[:, None] * channels + lane[None, :], mask=in_table, other=0.0)
    mixture = tl.where(winner[:, None] < 0, float("nan"), mixture)
    place = image * tokens + token
    tl.store(indices + place, winner.to(tl.int64), mask=known)
    in_out = known[:, None] & (lane[None, :] < channels)
    tl.store(embeddings + place[:, None] * channels + lane[None, :], mixture, mask=in_out)


def warps_for(block: int) -> int:
    """Return the number of warps of threshold_kernel, so that a thread holds at most 32 of the row's `block` numbers."""
    return max(4, min(block // 1024, 16))


def _check(logits: Tensor, codebook: Tensor, seeds: Tensor, offset: Tensor, settings: Tensor) -> None:
    """Raise ValueError for shapes, dtypes or devices that don't fit, LimitExceeded for more than MAX_VOCABULARY codes."""
    if logits.dim() != 3 or codebook.dim() != 2 or logits.shape[2] != codebook.shape[0] or not codebook.numel():
        shapes = f"{list(logits.shape)} and {list(codebook.shape)}"
        raise ValueError(f"guided_sample: logits and codebook must be [B or 2B, L, V] and [V, C], not {shapes}.")
    if logits.shape[2] > MAX_VOCABULARY:
        raise LimitExceeded(f"guided_sample's kernel takes at most {MAX_VOCABULARY} codes, not {logits.shape[2]}.")
    if codebook.dtype != torch.float32:
        raise ValueError(f"guided_sample: the codebook must be float32, not {codebook.dtype}.")
    if seeds.dtype != torch.int64 or seeds.dim() != 1 or len(logits) not in (len(seeds), 2 * len(seeds)):
        raise ValueError(f"guided_sample: seeds must be int64, one for each image, not {list(seeds.shape)} {seeds.dtype}.")
    if not logits.device == codebook.device == seeds.device == offset.device == settings.device:
        raise ValueError(f"guided_sample: all must be on {logits.device}, as the logits are.")
    if offset.dtype != torch.int64 or offset.numel() != 1:
        raise ValueError(f"guided_sample: offset must be one int64, not {list(offset.shape)} {offset.dtype}.")
    if settings.dtype != torch.float32 or settings.shape != (6,) or settings.stride(0) != 1:
        raise ValueError(f"guided_sample: settings must be [6] float32, not {list(settings.shape)} {settings.dtype}.")


def guided_sample(
    logits: Tensor,
    codebook: Tensor,
    seeds: Tensor,
    offset: Tensor,
    settings: Tensor,
    *,
    top_k: bool,
    top_p: bool,
    more_smooth: bool,
) -> tuple[Tensor, Tensor]:
    """Compute what the reference in `hart_infer/ops/guided_sample.py` computes."""
    _check(logits, codebook, seeds, offset, settings)
    (rows, tokens, vocab_size), channels, images = logits.shape, codebook.shape[1], len(seeds)
    logits = logits if logits.stride(2) == 1 else logits.contiguous()
    indices = logits.new_empty(images, tokens, dtype=torch.int64)
    embeddings = logits.new_empty(images, tokens, channels, dtype=torch.float32)
    if not indices.numel():
        return indices, embeddings
    guided, filtered = rows > images, top_k or top_p
    strides = (images * logits.stride(0), logits.stride(0), logits.stride(1))
    thresholds = logits.new_empty(images, tokens, dtype=torch.float32) if filtered else embeddings
    if filtered:
        block = triton.next_power_of_2(vocab_size)
        threshold_kernel[(tokens, images)](
            logits, settings, thresholds, *strides, vocab_size,
            GUIDED=guided, TOP_K=top_k, TOP_P=top_p, BLOCK=block,
            num_warps=warps_for(block), enable_fp_fusion=False,  # both launches must round the guided logits alike
        )  # fmt: skip
    draw_kernel[(triton.cdiv(tokens, TOKENS), images)](
        logits, codebook.contiguous(), seeds.contiguous(), offset, settings, thresholds, indices, embeddings,
        *strides, tokens, vocab_size, channels,
        GUIDED=guided, FILTERED=filtered, MORE_SMOOTH=more_smooth,
        TOKENS=TOKENS, CODES=CODES, WIDTH=max(16, triton.next_power_of_2(channels)), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return indices, embeddings
