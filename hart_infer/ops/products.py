"""Matrix products and convolutions, in the precision that suits the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import MIN_ROWS, widens


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in], weight [out, in], bias [out] -> [..., out] in x's dtype, accumulated in fp32.

    On CUDA cuBLAS may add the parts of a split sum in x's dtype, unless
    `torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction` (`fp16` alike) is off; PyTorch leaves it on.
    """
    if x.numel() >= MIN_ROWS * x.shape[-1] and widens(x, "linear"):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return F.linear(x, weight, bias)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor, *, stride: int, padding: int) -> Tensor:
    """x [B, in, h, w], weight [out, in, k, k], bias [out] -> [B, out, h', w'] in x's dtype, accumulated in fp32.

    fp32 means fp32: cuDNN's default, TF32, is turned off.
    """
    if widens(x, "conv2d"):
        return F.conv2d(x.float(), weight.float(), bias.float(), stride, padding).to(x.dtype)
    if x.device.type == "cuda" and x.dtype == torch.float32:
        cudnn = torch.backends.cudnn
        with cudnn.flags(cudnn.enabled, cudnn.benchmark, cudnn.benchmark_limit, cudnn.deterministic, allow_tf32=False):
            return F.conv2d(x, weight, bias, stride, padding)
    return F.conv2d(x, weight, bias, stride, padding)
