"""A checkpoint's files to modules on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .checkpoint import RELEASED_TEXT_ENCODER, Checkpoint, find_text_encoder
from .errors import CheckpointNotFoundError, ConfigError
from .model.autoencoder import Autoencoder
from .model.transformer import Transformer
from .text import TextEncoder
from .weights import load_module


def default_device() -> torch.device:
    """CUDA where there is one, else MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_models(checkpoint: Checkpoint, torch_dtype: torch.dtype | None) -> tuple[Transformer, Autoencoder]:
    """The transformer and the autoencoder, on the CPU; without `torch_dtype` both in the transformer's stored one."""
    vocab_size, channels = checkpoint.autoencoder.vocab_size, checkpoint.autoencoder.z_channels
    transformer = load_module(
        lambda: Transformer(checkpoint.transformer, vocab_size=vocab_size, channels=channels),
        checkpoint.transformer_files,
        torch_dtype=torch_dtype,
    )
    autoencoder = load_module(
        lambda: Autoencoder(checkpoint.autoencoder), checkpoint.autoencoder_files, torch_dtype=transformer.dtype
    )
    return transformer, autoencoder


def load_text_encoder(
    checkpoint: Checkpoint, source: str | Path | None, torch_dtype: torch.dtype, device: torch.device, **hub: Any
) -> TextEncoder:
    """The text encoder at `source` (id or folder), else the one beside the checkpoint, else the released one."""
    source = source or checkpoint.text_encoder
    try:
        folder = find_text_encoder(source or RELEASED_TEXT_ENCODER, **hub)
    except CheckpointNotFoundError as error:
        if source:
            raise
        raise CheckpointNotFoundError(
            f"No text encoder is beside {checkpoint.name}, and the released one can't be had: {error} Or pass text_encoder=..."
        ) from error
    encoder = TextEncoder.from_pretrained(folder, torch_dtype=torch_dtype, device=device)
    if encoder.width != checkpoint.transformer.context_dim:
        raise ConfigError(
            f"The text encoder {source or RELEASED_TEXT_ENCODER} gives {encoder.width} features, {checkpoint.name} expects "
            f"{checkpoint.transformer.context_dim}; pass the checkpoint's own as text_encoder=..."
        )
    return encoder
