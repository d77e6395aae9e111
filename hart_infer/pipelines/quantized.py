"""What pipelines do about `quantize`: check it, quantise a transformer's blocks, refuse to save them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..engine.cpu import leave_file
from ..engine.quantize import Quantize, is_quantized, quantize_weights
from ..errors import InputError
from ..models.next_scale import NextScaleTransformer

MODES: tuple[Quantize, ...] = ("int8", "int8_weight_only")
WEIGHT_ONLY: tuple[Quantize, ...] = ("int8_weight_only",)


def check_quantize(value: Any, modes: Sequence[Quantize] = MODES) -> None:
    """Raise InputError unless `value` is None or one of `modes`."""
    if value is not None and value not in modes:
        raise InputError(f"quantize must be {', '.join(map(repr, modes))} or None, not {value!r}.")


def quantize_blocks(transformer: NextScaleTransformer, mode: Quantize | None) -> None:
    """Quantise the linear maps of the blocks, but not those that make modulations; embeddings, head and diffusion stay."""
    if mode is not None:
        quantize_weights(transformer.blocks, mode, keep=("modulation",))
        leave_file(transformer)


def refuse_to_save(module: nn.Module) -> None:
    """Raise InputError if `module` holds weights in int8: what they were made from is gone."""
    if is_quantized(module):
        raise InputError("Weights in int8 are not saved; load without quantize and save that, then quantize on loading.")
