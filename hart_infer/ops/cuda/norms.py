"""Compute norms by compiled kernels: each function does what the reference of its name in `hart_infer/ops` does.

They raise ValueError for shapes, dtypes or devices that don't fit, BackendError where the kernel can't be launched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import ACTIVATIONS, DTYPES, Shape, View, library

MOST_ROWS = 2**31 - 1
MOST_COLUMNS = 2**30


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute what the reference in `hart_infer/ops/rms_norm.py` computes."""
    return _rms_norm("rms_norm", x, None, weight, None, None, eps)[1]


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute what the reference in `hart_infer/ops/rms_norm.py` computes."""
    return _rms_norm("add_rms_norm", x, update, weight, None, None, eps)


def rms_norm_modulate(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Compute what the reference in `hart_infer/ops/rms_norm.py` computes."""
    return _rms_norm("rms_norm_modulate", x, None, weight, scale, shift, eps)[1]


def rms_norm_quantized(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute what the reference in `hart_infer/ops/rms_norm.py` computes."""
    name = "rms_norm_quantized"
    _check_size(name, x)
    if dtype not in (torch.int8, torch.float8_e4m3fn):
        raise ValueError(f"{name}: dtype must be torch.int8 or torch.float8_e4m3fn, not {dtype}.")
    weight = _vector(name, "weight", weight, x, x.dtype)
    out = x.new_empty(x.shape, dtype=dtype)
    scales = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if x.numel():
        rows, result = _rows(x), _rows(out)
        library().launch(
            name, x, View.of(rows), weight.data_ptr(), View.of(result), scales.data_ptr(), Shape(*rows.shape), eps,
            DTYPES[x.dtype], DTYPES[dtype],
        )  # fmt: skip
    return out, scales


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


def _rms_norm(
    name: str, x: Tensor, update: Tensor | None, weight: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (x + update, its norm); x itself without update. With x in fp32, parameters may be in half precision."""
    _check_size(name, x)
    parameters = weight.dtype if x.dtype == torch.float32 and weight.dtype in ACTIVATIONS else x.dtype
    weight = _vector(name, "weight", weight, x, parameters)
    update = _like(name, "update", update, x, x.dtype, shared=False)
    scale = _like(name, "scale", scale, x, parameters)
    shift = _like(name, "shift", shift, x, parameters)
    out = x.new_empty(x.shape)
    total = x if update is None else x.new_empty(x.shape)
    if x.numel():
        rows = _rows(x)
        written = None if update is None else _rows(total)
        library().launch(
            "rms_norm", x, View.of(rows), View.of(update), weight.data_ptr(), View.of(scale), View.of(shift),
            View.of(written), View.of(_rows(out)), Shape(*rows.shape), eps, DTYPES[x.dtype], DTYPES[parameters],
        )  # fmt: skip
    return total, out


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
    """Return (x + gate * update, its modulated norm); x itself without update.

    With x in fp32, scale and shift may be in half precision. 1 + scale is rounded to theirs, and goes through fp32 unchanged.
    """
    _check_size(name, x)
    if x.dtype == torch.float32 and scale.dtype in (torch.float16, torch.bfloat16) and shift.dtype == scale.dtype:
        scale, shift = (1 + scale).float() - 1, shift.float()
    weight = None if weight is None else _vector(name, "weight", weight, x, x.dtype)
    bias = None if bias is None else _vector(name, "bias", bias, x, x.dtype)
    update = _like(name, "update", update, x, x.dtype, shared=False)
    gate = _like(name, "gate", gate, x, x.dtype)
    scaled, shifted = _like(name, "scale", scale, x, x.dtype), _like(name, "shift", shift, x, x.dtype)
    out = x.new_empty(x.shape)
    total = x if update is None else x.new_empty(x.shape)
    if x.numel():
        rows = _rows(x)
        written = None if update is None else _rows(total)
        addresses = [None if vector is None else vector.data_ptr() for vector in (weight, bias)]
        library().launch(
            "layer_norm_modulate", x, View.of(rows), View.of(update), View.of(gate), *addresses, View.of(scaled),
            View.of(shifted), View.of(written), View.of(_rows(out)), Shape(*rows.shape), eps, DTYPES[x.dtype],
        )  # fmt: skip
    return total, out


def _check_size(name: str, x: Tensor) -> None:
    """Raise ValueError if `x` is 0-d or exceeds the launchers' row and column counts."""
    if x.dim() == 0:
        raise ValueError(f"{name}: x must have a last dimension.")
    if x.shape[-1] > MOST_COLUMNS or x.numel() > MOST_ROWS * x.shape[-1]:
        raise ValueError(f"{name}: x {list(x.shape)} has more than {MOST_ROWS} rows or {MOST_COLUMNS} columns.")


def _rows(x: Tensor) -> Tensor:
    """Return `x` [..., D] as [groups, rows, D] of stride 1 along D; copied only if strides require it."""
    x = x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _check(name: str, argument: str, y: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    if y.dtype != dtype:
        raise ValueError(f"{name}: {argument} must be in {dtype}, not {y.dtype}.")
    if y.device != x.device:
        raise ValueError(f"{name}: {argument} must be on {x.device}, as x is, not on {y.device}.")


def _vector(name: str, argument: str, y: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Check `y` [D] and return it contiguous. Raises ValueError."""
    _check(name, argument, y, x, dtype)
    if y.shape != x.shape[-1:]:
        raise ValueError(f"{name}: {argument} must be {list(x.shape[-1:])}, not {list(y.shape)}.")
    return y.contiguous()


def _like(name: str, argument: str, y: Tensor | None, x: Tensor, dtype: torch.dtype, *, shared: bool = True) -> Tensor | None:
    """Return `y` as rows of x's shape. `shared`: broadcast size-1 dimensions before the last. Raises ValueError."""
    if y is None:
        return None
    _check(name, argument, y, x, dtype)
    sizes = tuple(zip(y.shape, x.shape, strict=False))
    fits = y.dim() == x.dim() and all(a == b or (shared and a == 1) for a, b in sizes[:-1]) and y.shape[-1] == x.shape[-1]
    if not fits:
        repeated = ", or 1 before the last dimension" if shared else ""
        raise ValueError(f"{name}: {argument} must be {list(x.shape)}{repeated}, not {list(y.shape)}.")
    return _rows(y.expand(x.shape)) if x.numel() else y
