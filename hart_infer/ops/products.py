"""Compute matrix products and convolutions in the precision that suits the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .held import no_convolution_tf32
from .precision import MIN_ROWS, NATIVE, instructions, widens


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Map x [..., in] by weight [out, in] and bias [out] or None -> [..., out] in x's dtype.

    Sums are accumulated in fp32, except that on CUDA cuBLAS may reduce split-K sums in x's dtype, unless
    `torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction` (for fp16 `allow_fp16_...`) is False; PyTorch's
    default is True.
    """
    if x.numel() >= MIN_ROWS * x.shape[-1] and widens(x, "linear"):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    if bias is not None and x.dtype == torch.bfloat16 and x.device.type == "cpu" and _calls_onednn(x, weight, bias):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [None], "")
        return out
    return F.linear(x, weight, bias)


def _calls_onednn(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Return whether to call oneDNN directly: bit for bit F.linear, which first writes the bias to all of the result.

    In bf16 that pass took up to a tenth of the time of a map of 1,024 inputs (one core of an AMD EPYC with AVX512_BF16).
    """
    if torch.compiler.is_compiling() or not x.numel() or not instructions() & NATIVE[x.dtype]["linear"]:
        return False
    if not x.dtype == weight.dtype == bias.dtype:  # as under autocast, which casts them in F.linear
        return False
    learning = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad)
    return not learning and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def conv2d(x: Tensor, weight: Tensor, bias: Tensor, *, stride: int, padding: int) -> Tensor:
    """Convolve x [B, in, h, w] with weight [out, in, k, k], bias [out] -> [B, out, h', w'] in x's dtype, accumulated in fp32.

    Turns TF32, cuDNN's default, off for fp32 on CUDA.
    """
    if widens(x, "conv2d"):
        return F.conv2d(x.float(), weight.float(), bias.float(), stride, padding).to(x.dtype)
    if x.device.type == "cuda" and x.dtype == torch.float32:
        with no_convolution_tf32:
            return F.conv2d(x, weight, bias, stride, padding)
    return F.conv2d(x, weight, bias, stride, padding)
