"""Compute norms, activations and rotary positions by the CPU's kernels: each does as the reference of its name, in bf16."""

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


class Rows(ctypes.Structure):
    """A tensor [groups, rows, width] with stride 1 along the width: its address, its other strides in elements."""

    _fields_ = [("data", _POINTER), ("group", _LONG), ("row", _LONG)]


class LayerNorm(ctypes.Structure):
    """`struct LayerNorm` of csrc/cpu/kernels.h."""

    _fields_ = [
        *((name, _POINTER) for name in ("x", "update", "weight", "bias")),
        *((name, Rows) for name in ("gate", "scale", "shift")),
        *((name, _POINTER) for name in ("total", "out")),
        *((name, _LONG) for name in ("groups", "rows", "width")),
        ("eps", ctypes.c_float),
    ]


class Swiglu(ctypes.Structure):
    """`struct Swiglu` of csrc/cpu/kernels.h."""

    _fields_ = [*((name, _POINTER) for name in ("gate", "up", "out")), *((name, _LONG) for name in ("rows", "width"))]


class GeluTanh(ctypes.Structure):
    """`struct GeluTanh` of csrc/cpu/kernels.h."""

    _fields_ = [*((name, _POINTER) for name in ("x", "out")), *((name, _LONG) for name in ("rows", "width"))]


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


def layer_norm_modulate(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> Tensor:
    """Compute what the reference in `hart_infer/ops/layer_norm_modulate.py` computes."""
    return _layer_norm("layer_norm_modulate", x, None, None, weight, bias, scale, shift, eps)[1]


def gated_layer_norm_modulate(
    x: Tensor,
    update: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Compute what the reference in `hart_infer/ops/layer_norm_modulate.py` computes."""
    return _layer_norm("gated_layer_norm_modulate", x, update, gate, weight, bias, scale, shift, eps)


def _layer_norm(
    name: str,
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return (x + gate * update, its modulated norm); x itself without update."""
    vectors = [None if y is None else y.contiguous() for y in (weight, bias)]
    _check(name, x, x.shape[-1:], *(y for y in vectors if y is not None))
    x = x.contiguous()
    shape = x.shape if x.dim() == 3 else torch.Size((1, x.numel() // max(1, x.shape[-1]), x.shape[-1]))
    shared = [None if y is None else _spread(name, y, x, shape) for y in (gate, scale, shift)]
    total, out = x if update is None else x.new_empty(x.shape), x.new_empty(x.shape)
    if update is not None:
        _check(name, x, x.shape, update)
        update = update.contiguous()
    if x.numel():
        pointers = [None if y is None else y.data_ptr() for y in (update, *vectors)]
        rows = [Rows() if y is None else Rows(y.data_ptr(), *y.stride()[:2]) for y in shared]
        written = None if update is None else total.data_ptr()
        call("layer_norm", LayerNorm(x.data_ptr(), *pointers, *rows, written, out.data_ptr(), *shape, eps))
    return total, out


def _spread(name: str, y: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
    """Return `y`, which broadcasts to x's shape, as a view [groups, rows, width] with strides 0 where it is shared."""
    _check(name, x, y.shape, y)
    try:
        wide = y.expand(x.shape)
    except RuntimeError:
        raise ValueError(f"{name}: {list(y.shape)} does not broadcast to {list(x.shape)}.") from None
    wide = wide if wide.stride(-1) == 1 or x.shape[-1] == 1 else wide.contiguous()
    return wide if x.dim() == 3 else wide.reshape(shape)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute what the reference in `hart_infer/ops/swiglu.py` computes."""
    _check("swiglu", gate, gate.shape, up)
    gate, up = gate.contiguous(), up.contiguous()
    out = gate.new_empty(gate.shape)
    if gate.numel():
        width = gate.shape[-1]
        call("swiglu", Swiglu(gate.data_ptr(), up.data_ptr(), out.data_ptr(), gate.numel() // width, width))
    return out


def gelu_tanh(x: Tensor) -> Tensor:
    """Compute what the reference in `hart_infer/ops/gelu_tanh.py` computes."""
    _check("gelu_tanh", x, x.shape)
    x = x.contiguous()
    out = x.new_empty(x.shape)
    if x.numel():
        width = x.shape[-1]
        call("gelu_tanh", GeluTanh(x.data_ptr(), out.data_ptr(), x.numel() // width, width))
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
