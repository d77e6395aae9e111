"""One step of the residual diffusion, given its network's output: elementwise, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import refusal as refusal

BLOCK = 1024


@triton.jit(do_not_specialize=["rows"])
def diffusion_step_kernel(
    x, eps, variance, noise, settings, out,
    x_row, eps_row, variance_row, noise_row, rows,
    x0_from_x, x0_from_noise, mean_from_x0, mean_from_x, log_variance_min, log_variance_max,
    CHANNELS: tl.constexpr, GUIDED: tl.constexpr, ADDS_NOISE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK elements of out [rows, CHANNELS], contiguous; grid (blocks). The inputs' channels are contiguous too.

    GUIDED: eps and variance are [2 * rows, CHANNELS], the conditional half first; settings: guidance, 1 + guidance.
    """
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, lane = element // CHANNELS, element % CHANNELS
    valid = row < rows
    before = tl.load(x + row * x_row + lane, mask=valid, other=0.0)
    predicted = tl.load(eps + row * eps_row + lane, mask=valid, other=0.0)
    if GUIDED:
        unconditional = tl.load(eps + (row + rows) * eps_row + lane, mask=valid, other=0.0)
        predicted = tl.load(settings + 1) * predicted - tl.load(settings) * unconditional
    x0 = x0_from_x * before - x0_from_noise * predicted
    x0 = tl.where(x0 < -1.0, -1.0, tl.where(x0 > 1.0, 1.0, x0))  # NaN stays NaN
    after = mean_from_x0 * x0 + mean_from_x * before
    if ADDS_NOISE:
        share = (tl.load(variance + row * variance_row + lane, mask=valid, other=0.0) + 1.0) / 2.0
        log_variance = share * log_variance_max + (1.0 - share) * log_variance_min
        after += tl.exp(0.5 * log_variance) * tl.load(noise + row * noise_row + lane, mask=valid, other=0.0)
    tl.store(out + element, after, mask=valid)


def diffusion_step(
    x: Tensor,
    eps: Tensor,
    variance: Tensor,
    noise: Tensor,
    settings: Tensor,
    *,
    x0_from_x: float,
    x0_from_noise: float,
    mean_from_x0: float,
    mean_from_x: float,
    log_variance_min: float,
    log_variance_max: float,
    adds_noise: bool,
) -> Tensor:
    """Compute what the reference in `hart_infer/ops/diffusion_step.py` computes."""
    given = {"x": x, "eps": eps, "variance": variance, "noise": noise, "settings": settings}
    if any(t.device != x.device for t in given.values()):
        raise ValueError(f"diffusion_step: all must be on {x.device}, as x is.")
    if any(t.dtype != torch.float32 for t in given.values()):
        raise ValueError(f"diffusion_step: all must be float32, not {', '.join(f'{n} {t.dtype}' for n, t in given.items())}.")
    rows, channels = x.shape if x.dim() == 2 else (-1, -1)
    halves = ((rows, channels), (2 * rows, channels))
    if rows < 0 or noise.shape != x.shape or eps.shape not in halves or variance.shape != eps.shape:
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in given.items())
        raise ValueError(f"diffusion_step: {shapes} don't fit: x and noise are [N, C], eps and variance as long or twice.")
    x, eps, variance, noise = (t if t.stride(1) == 1 else t.contiguous() for t in (x, eps, variance, noise))
    out = x.new_empty(rows, channels)
    if out.numel():
        diffusion_step_kernel[(triton.cdiv(out.numel(), BLOCK),)](
            x, eps, variance, noise, settings.contiguous(), out,
            x.stride(0), eps.stride(0), variance.stride(0), noise.stride(0), rows,
            x0_from_x, x0_from_noise, mean_from_x0, mean_from_x, log_variance_min, log_variance_max,
            CHANNELS=channels, GUIDED=len(eps) > rows, ADDS_NOISE=adds_noise, BLOCK=BLOCK,
            num_warps=4, enable_fp_fusion=False,  # without fused multiply-adds: rounds after each operation, as PyTorch does
        )  # fmt: skip
    return out
