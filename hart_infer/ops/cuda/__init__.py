"""Check arguments and call the compiled CUDA kernels of `csrc/`, where they were built."""

from __future__ import annotations

from .library import describe, refusal
from .norms import (
    add_rms_norm,
    gated_layer_norm_modulate,
    layer_norm_modulate,
    rms_norm,
    rms_norm_modulate,
    rms_norm_quantized,
)

__all__ = [
    "add_rms_norm",
    "describe",
    "gated_layer_norm_modulate",
    "layer_norm_modulate",
    "refusal",
    "rms_norm",
    "rms_norm_modulate",
    "rms_norm_quantized",
]
