"""Check arguments and call the compiled kernels for x86 CPUs of `csrc/cpu/`, where they were built."""

from __future__ import annotations

from .attention import attention
from .int8_linear import int8_linear
from .library import LimitExceeded, describe, refusal
from .pointwise import add_rms_norm, gated_layer_norm_modulate, gelu_tanh, layer_norm_modulate, rms_norm, rope_cache, swiglu

__all__ = [
    "LimitExceeded",
    "add_rms_norm",
    "attention",
    "describe",
    "gated_layer_norm_modulate",
    "gelu_tanh",
    "int8_linear",
    "layer_norm_modulate",
    "refusal",
    "rms_norm",
    "rope_cache",
    "swiglu",
]
