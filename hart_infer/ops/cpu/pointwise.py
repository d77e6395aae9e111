"""Compute norms, gates and rotary positions by the CPU's kernels: each does what the reference of its name does, in bf16."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .library import LimitExceeded, Operand, call

_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64


class RmsNorm(ctypes.Structure):
    """`struct RmsNorm` of csrc/cpu/kernels.h."""

    _fields_ = [
        *((name, _POINTER) for name in ("x", "update", "weight", "total", "out")),
        *((name, _LONG) for name in ("rows", "width")),
        ("eps", ctypes.c_float),
    ]


class Swiglu(ctypes.Structure):
    """`struct Swiglu` of csrc/cpu/kernels.h."""

    _fields_ = [*((name, _POINTER) for name in ("gate", "up", "out")), *((name, _LONG) for name in ("rows", "width"))]


class RopeCache(ctypes.Structure):
    """`struct RopeCache` of csrc/cpu/kernels.h."""

    _fields_ = [
        *((name, Operand) for name in ("q", "k", "v", "cos", "sin", "rotated", "keys", "values")),
        ("gains", _POINTER),
        *((name, _LONG) for name in ("rows", "heads", "tokens", "head_dim")),
    ]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute what the reference in `hart_infer/ops/rms_norm.py` computes."""
    return _rms_norm("rms_norm", x, None, weight, eps)[1]


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute what the reference in `hart_infer/ops/rms_norm.py` computes."""
    return _rms_norm("add_rms_norm", x, update, weight, eps)


def _rms_norm(name: str, x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (x + update, its norm); x itself without update."""
    _check(name, x, x.shape[-1:], weight)
    x, weight = x.contiguous(), weight.contiguous()
    total, out = x if update is None else x.new_empty(x.shape), x.new_empty(x.shape)
    addresses: list[int | None] = [None, None]
    if update is not None:
        _check(name, x, x.shape, update)
        update = update.contiguous()
        addresses = [update.data_ptr(), total.data_ptr()]
    if x.numel():
        width = x.shape[-1]
        pointers = (x.data_ptr(), addresses[0], weight.data_ptr(), addresses[1], out.data_ptr())
        call("rms_norm", RmsNorm(*pointers, x.numel() // width, width, eps))
    return total, out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute what the reference in `hart_infer/ops/swiglu.py` computes."""
    _check("swiglu", gate, gate.shape, up)
    gate, up = gate.contiguous(), up.contiguous()
    out = gate.new_empty(gate.shape)
    if gate.numel():
        width = gate.shape[-1]
        call("swiglu", Swiglu(gate.data_ptr(), up.data_ptr(), out.data_ptr(), gate.numel() // width, width))
    return out


def rope_cache(qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, gains: Tensor | None = None) -> Tensor:
    """Compute what the reference in `hart_infer/ops/rope_cache.py` computes."""
    rows, tokens, parts, heads, head_dim = qkv.shape
    _check("rope_cache", qkv, torch.Size((rows, 1, tokens, head_dim)), cos, sin)
    _check("rope_cache", qkv, torch.Size((rows, heads, tokens, head_dim)), keys, values)
    if parts != 3 or head_dim % 2:
        raise ValueError(f"rope_cache: qkv must be [R, L, 3, H, d], d even, not {list(qkv.shape)}.")
    if keys.stride(3) != 1 or values.stride(3) != 1:
        raise LimitExceeded("rope_cache's kernel for CPUs writes to keys and values of stride 1 along the head.")
    if gains is not None:
        _check("rope_cache", qkv, torch.Size((heads,)), gains)
        gains = gains.contiguous()
    qkv, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (qkv, cos, sin))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    rotated = q.new_empty(q.shape)
    if q.numel():
        operands = [Operand.of(x) for x in (q, k, v, cos, sin, rotated, keys, values)]
        call("rope_cache", RopeCache(*operands, None if gains is None else gains.data_ptr(), rows, heads, tokens, head_dim))
    return rotated


def _check(name: str, x: Tensor, shape: torch.Size, *others: Tensor) -> None:
    """Raise ValueError unless all are in bf16 on the CPU, and the others of `shape`."""
    if any(y.dtype != torch.bfloat16 or y.device.type != "cpu" for y in (x, *others)):
        raise ValueError(f"{name}: all arguments must be in bfloat16, on the CPU.")
    for y in others:
        if y.shape != shape:
            raise ValueError(f"{name}: {list(y.shape)} should be {list(shape)}.")
