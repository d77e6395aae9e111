"""Describe a checkpoint in JSON types: parameters, schedule, memory, files.

Of safetensors it reads the headers only; a .bin file is mapped by torch.load, or read whole if it is in PyTorch's old format.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..generation.schedule import Schedule, hart_schedule
from ..models.hart import HartTransformer
from ..models.parts.autoencoder import Autoencoder
from ..models.parts.cache import KVCache
from .autoencoder import AUTOENCODER_KEYS
from .configs import config_to_dict
from .hart import DEFAULTS_KEYS, RENAMES, TRANSFORMER_KEYS, HartCheckpoint
from .weights import tensor_shapes

GUIDED_ROWS = 2  # an image and its unconditional half
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def report(checkpoint: HartCheckpoint) -> dict[str, Any]:
    """Return the report by sections. Raises WeightsError for files that are not weights."""
    with torch.device("meta"):  # modules without storage
        autoencoder = Autoencoder(checkpoint.autoencoder)
        transformer = HartTransformer(
            checkpoint.transformer,
            vocab_size=checkpoint.autoencoder.vocab_size,
            channels=checkpoint.autoencoder.z_channels,
        )
    schedule = hart_schedule(
        checkpoint.transformer.patch_nums,
        context_tokens=checkpoint.transformer.context_token,
        share_quant_resi=checkpoint.autoencoder.share_quant_resi,
    )
    parameters = _parameters(transformer, autoencoder)
    return {
        "parameters": parameters,
        "schedule": _schedule(checkpoint),
        "memory": _memory(transformer, schedule, parameters["total"]),
        "files": _files(checkpoint),
        "defaults": config_to_dict(checkpoint.defaults, DEFAULTS_KEYS),
        "transformer": _without_scales(config_to_dict(checkpoint.transformer, TRANSFORMER_KEYS)),
        "autoencoder": _without_scales(config_to_dict(checkpoint.autoencoder, AUTOENCODER_KEYS)),
    }


def _parameters(transformer: HartTransformer, autoencoder: Autoencoder) -> dict[str, int]:
    """Count the parameters by part and in total."""
    diffusion = _count(transformer.diffusion)
    encoder = _count(autoencoder.encoder) + _count(autoencoder.quant_conv)
    quantizer = _count(autoencoder.quantizer)
    parts = {
        "transformer": _count(transformer) - diffusion,
        "residual_diffusion": diffusion,
        "encoder": encoder,
        "decoder": _count(autoencoder) - encoder - quantizer,
        "quantizer": quantizer,
    }
    return parts | {"total": sum(parts.values())}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _schedule(checkpoint: HartCheckpoint) -> dict[str, Any]:
    sides = checkpoint.transformer.patch_nums
    return {
        "picture_pixels": sides[-1] * checkpoint.autoencoder.downsample,
        "scales": len(sides),
        "sides": list(sides),
        "image_tokens": sum(side * side for side in sides),
        "context_tokens": checkpoint.transformer.context_token,
    }


def _memory(transformer: HartTransformer, schedule: Schedule, parameters: int) -> dict[str, dict[str, int]]:
    """Return by dtype the bytes of the weights without the text encoder, and of one picture's keys and values with guidance."""
    return {
        dtype: {
            "weights_bytes": parameters * itemsize,
            "cache_bytes_per_picture": KVCache.size_in_bytes(
                depth=transformer.depth,
                rows=GUIDED_ROWS,
                width=transformer.width,
                length=schedule.cached_length,
                scratch_length=schedule.scratch_length,
                itemsize=itemsize,
            ),
        }
        for dtype, itemsize in DTYPE_BYTES.items()
    }


def _files(checkpoint: HartCheckpoint) -> dict[str, Any]:
    """Describe the weight files that a pipeline would read, and name the text encoder's folder."""
    found: dict[str, Any] = {}
    for file in checkpoint.transformer_files + checkpoint.autoencoder_files:
        tensors = tensor_shapes(file)
        read = [dtype for name, (_, dtype) in tensors.items() if RENAMES(name) is not None]
        found[f"{file.parent.name}/{file.name}"] = {
            "bytes": file.stat().st_size,
            "dtypes": sorted({str(dtype).removeprefix("torch.") for dtype in read}),
            "tensors": len(tensors),
            "tensors_never_read": len(tensors) - len(read),
        }
    if checkpoint.text_encoder is not None:
        found["text encoder"] = str(checkpoint.text_encoder)
    return found


def _without_scales(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without the scales, which have a section of their own."""
    return {name: value for name, value in config.items() if name not in ("patch_nums", "v_patch_nums")}
