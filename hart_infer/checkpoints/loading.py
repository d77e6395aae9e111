"""A checkpoint's files to modules on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointNotFoundError, ConfigError, InputError
from ..models.next_scale import Transformer
from ..models.parts.autoencoder import Autoencoder
from ..models.text import TextEncoder
from .layouts import RELEASED_TEXT_ENCODER, Checkpoint, find_text_encoder
from .weights import load_module

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def default_device() -> torch.device:
    """CUDA where there is one, else MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def check_device(device: torch.device | str | None) -> torch.device:
    """The device, or the default one for None; raises InputError where it is unknown or not here."""
    if device is None:
        return default_device()
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{device!r} is not a device; cuda, cuda:0, mps and cpu are examples.") from error
    if parsed.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (parsed.index or 0) >= count:
            raise InputError(f"{parsed} is not here: torch {torch.__version__} sees {count or 'no'} CUDA devices.")
    if parsed.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"mps is not here: torch {torch.__version__} sees no Apple GPU.")
    return parsed


def check_dtype(dtype: torch.dtype | None) -> None:
    """One of the dtypes that the model runs in, or None; raises InputError."""
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"The dtype must be one of {', '.join(map(str, DTYPES))}, not {dtype!r}.")


def load_transformer(checkpoint: Checkpoint, torch_dtype: torch.dtype | None) -> Transformer:
    """The transformer, on the CPU; without `torch_dtype` in its stored one."""
    vocab_size, channels = checkpoint.autoencoder.vocab_size, checkpoint.autoencoder.z_channels
    return load_module(
        lambda: Transformer(checkpoint.transformer, vocab_size=vocab_size, channels=channels),
        checkpoint.transformer_files,
        torch_dtype=torch_dtype,
    )


def load_autoencoder(checkpoint: Checkpoint, torch_dtype: torch.dtype | None) -> Autoencoder:
    """The autoencoder, on the CPU; without `torch_dtype` in its stored one."""
    return load_module(lambda: Autoencoder(checkpoint.autoencoder), checkpoint.autoencoder_files, torch_dtype=torch_dtype)


def locate_text_encoder(checkpoint: Checkpoint, source: str | Path | None, **hub: Any) -> Path:
    """The folder of the text encoder `source` (id or folder), else of the one beside the checkpoint, else the released one."""
    source = source or checkpoint.text_encoder
    try:
        return find_text_encoder(source or RELEASED_TEXT_ENCODER, **hub)
    except CheckpointNotFoundError as error:
        if source:
            raise
        raise CheckpointNotFoundError(
            f"No text encoder is beside {checkpoint.name}, and the released one can't be had: {error} Or pass text_encoder=..."
        ) from error


def load_text_encoder(checkpoint: Checkpoint, folder: Path, torch_dtype: torch.dtype, device: torch.device) -> TextEncoder:
    """The text encoder in `folder`; raises ConfigError where it is not the checkpoint's kind."""
    encoder = TextEncoder.from_pretrained(folder, torch_dtype=torch_dtype, device=device)
    if encoder.width != checkpoint.transformer.context_dim:
        raise ConfigError(
            f"The text encoder {folder} gives {encoder.width} features, {checkpoint.name} expects "
            f"{checkpoint.transformer.context_dim}; pass the checkpoint's own as text_encoder=..."
        )
    return encoder
