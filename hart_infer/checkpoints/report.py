"""Describe a checkpoint in JSON types: parameters, schedule or positions, memory, costs, files.

Of safetensors it reads the headers only; a pickle is mapped by torch.load, or read whole if it is in PyTorch's old format.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..generation.schedule import Schedule, Settings, hart_schedule, var_schedule
from ..models.hart import HartTransformer
from ..models.llama import Llama
from ..models.next_scale import NextScaleTransformer
from ..models.parts.autoencoder import Autoencoder
from ..models.parts.cache import KVCache
from ..models.var import VarTransformer
from ..models.vila_u.depth import DepthTransformer
from ..models.vila_u.projector import Projector
from ..models.vila_u.vision import VisionTower
from . import hart, var
from .autoencoder import AUTOENCODER_KEYS
from .configs import Keys, config_to_dict
from .families import Checkpoint, Family
from .hart import HartCheckpoint
from .var import VarCheckpoint
from .vila_u import OWN_KEYS, VilaUCheckpoint
from .vila_u_costs import Cost, position_costs
from .weights import RenameTable, tensor_shapes

GUIDED_ROWS = 2  # an image and its unconditional half
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class _Described:
    """What a report takes from a family that draws scale by scale."""

    family: Family
    transformer: NextScaleTransformer  # without storage
    schedule: Schedule
    keys: Keys  # of the transformer's configuration
    defaults_keys: Keys
    renames: RenameTable
    facts: Mapping[str, int]  # more lines of the schedule
    parts: Mapping[str, nn.Module] = field(default_factory=dict)  # of the transformer, counted by themselves
    beside: Mapping[str, Path | None] = field(default_factory=dict)  # files and folders that are not weights


def report(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the report: `family`, and sections by name. Raises WeightsError for files that are not weights."""
    return _vila_u(checkpoint) if isinstance(checkpoint, VilaUCheckpoint) else _next_scale(checkpoint)


def _next_scale(checkpoint: HartCheckpoint | VarCheckpoint) -> dict[str, Any]:
    with torch.device("meta"):  # modules without storage
        autoencoder = Autoencoder(checkpoint.autoencoder)
        described = _hart(checkpoint) if isinstance(checkpoint, HartCheckpoint) else _var(checkpoint)
    parameters = _parameters(described, autoencoder)
    return {
        "family": described.family,
        "parameters": parameters,
        "schedule": {**_schedule(checkpoint), **described.facts},
        "memory": _memory(described.transformer, described.schedule, parameters["total"]),
        "files": _files(checkpoint.transformer_files + checkpoint.autoencoder_files, described.renames, described.beside),
        "defaults": config_to_dict(checkpoint.defaults, described.defaults_keys),
        "transformer": _without_scales(config_to_dict(checkpoint.transformer, described.keys)),
        "autoencoder": _without_scales(config_to_dict(checkpoint.autoencoder, AUTOENCODER_KEYS)),
    }


def _hart(checkpoint: HartCheckpoint) -> _Described:
    config, autoencoder = checkpoint.transformer, checkpoint.autoencoder
    transformer = HartTransformer(config, vocab_size=autoencoder.vocab_size, channels=autoencoder.z_channels)
    return _Described(
        "HART",
        transformer,
        hart_schedule(config.patch_nums, context_tokens=config.context_token, share_quant_resi=autoencoder.share_quant_resi),
        hart.TRANSFORMER_KEYS,
        hart.DEFAULTS_KEYS,
        hart.RENAMES,
        facts={"context_tokens": config.context_token},
        parts={"residual_diffusion": transformer.diffusion},
        beside={"text encoder": checkpoint.text_encoder},
    )


def _var(checkpoint: VarCheckpoint) -> _Described:
    config, autoencoder = checkpoint.transformer, checkpoint.autoencoder
    return _Described(
        "VAR",
        VarTransformer(config, vocab_size=autoencoder.vocab_size, channels=autoencoder.z_channels),
        var_schedule(config.patch_nums, share_quant_resi=autoencoder.share_quant_resi, settings=Settings()),
        var.TRANSFORMER_KEYS,
        var.DEFAULTS_KEYS,
        var.RENAMES,
        facts={"classes": config.num_classes},
        beside={"class names": checkpoint.classes},
    )


def _parameters(described: _Described, autoencoder: Autoencoder) -> dict[str, int]:
    """Count the parameters by part and in total."""
    inner = {name: _count(part) for name, part in described.parts.items()}
    encoder = _count(autoencoder.encoder) + _count(autoencoder.quant_conv)
    quantizer = _count(autoencoder.quantizer)
    parts = {
        "transformer": _count(described.transformer) - sum(inner.values()),
        **inner,
        "encoder": encoder,
        "decoder": _count(autoencoder) - encoder - quantizer,
        "quantizer": quantizer,
    }
    return parts | {"total": sum(parts.values())}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _schedule(checkpoint: HartCheckpoint | VarCheckpoint) -> dict[str, Any]:
    sides = checkpoint.transformer.patch_nums
    return {
        "picture_pixels": sides[-1] * checkpoint.autoencoder.downsample,
        "scales": len(sides),
        "sides": list(sides),
        "image_tokens": sum(side * side for side in sides),
    }


def _memory(transformer: NextScaleTransformer, schedule: Schedule, parameters: int) -> dict[str, dict[str, int]]:
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


def _vila_u(checkpoint: VilaUCheckpoint) -> dict[str, Any]:
    with torch.device("meta"):
        llama, tower = Llama(checkpoint.llama), VisionTower(checkpoint.vision)
        depth = DepthTransformer(checkpoint.depth)
        projector = Projector(
            checkpoint.projector, code_dim=checkpoint.vision.hidden_size, hidden_size=llama.config.hidden_size
        )
    decoder = _count(tower.post_quant_conv) + _count(tower.decoder)
    parameters = {
        "llama": _count(llama),
        "depth_transformer": _count(depth),
        "projector": _count(projector),
        "encoder": _count(tower.encoder),
        "decoder": decoder,
        "quantizer": _count(tower.quantizer),
    }
    parameters["total"] = sum(parameters.values())
    files = (*checkpoint.llama_files, *checkpoint.vision_files, *checkpoint.depth_files, *checkpoint.projector_files)
    return {
        "family": "VILA-U",
        "parameters": parameters,
        "positions": _positions(checkpoint),
        "memory": _vila_u_memory(checkpoint, parameters["total"]),
        "cost_per_position": _costs(position_costs(llama, depth, projector, length=checkpoint.vision.grid**2)),
        "files": _files(dict.fromkeys(files), checkpoint.renames, {"tokenizer": checkpoint.tokenizer} if files else {}),
        "defaults": config_to_dict(checkpoint.defaults, OWN_KEYS),
        "answers": config_to_dict(checkpoint.answers, OWN_KEYS),
        "settings": {**config_to_dict(checkpoint.settings, OWN_KEYS), "mm_projector_type": checkpoint.projector},
        "llama": config_to_dict(checkpoint.llama, OWN_KEYS),
        "depth_transformer": config_to_dict(checkpoint.depth, OWN_KEYS),
        "vision_tower": config_to_dict(checkpoint.vision, OWN_KEYS),
    }


def _positions(checkpoint: VilaUCheckpoint) -> dict[str, Any]:
    vision, settings = checkpoint.vision, checkpoint.settings
    frames = settings.num_video_frames if settings.mm_use_vi_start_end else 0
    return {
        "picture_pixels": max(vision.picture_shape),
        "grid": vision.grid,
        "codes_per_position": vision.depth,
        "per_picture": vision.grid**2,
        "per_video": frames * vision.grid**2,
        "video_frames": frames,
        "longest_prompt": settings.tokenizer_model_max_length,
    }


def _costs(costs: Mapping[str, Cost]) -> dict[str, dict[str, int]]:
    """Return the bytes of weights read by dtype, and the operations of a row, both by part and in total."""
    read = {part: cost.weights_read for part, cost in costs.items()}
    flops = {f"{part}_flops": cost.flops for part, cost in costs.items()}
    read |= {"total": sum(read.values())}
    return {
        **{
            f"weights_read_{dtype}": {f"{part}_bytes": count * itemsize for part, count in read.items()}
            for dtype, itemsize in DTYPE_BYTES.items()
        },
        "one_row": flops | {"total_flops": sum(flops.values())},
    }


def _vila_u_memory(checkpoint: VilaUCheckpoint, parameters: int) -> dict[str, dict[str, int]]:
    """Return by dtype the bytes of the weights, and of keys and values: of one picture's own positions with guidance, and more.

    A prompt's tokens, which are only known once it is encoded, take theirs beside: `cache_bytes_per_token` in each row.
    """
    llama, positions = checkpoint.llama, _positions(checkpoint)
    memory = {}
    for dtype, itemsize in DTYPE_BYTES.items():
        token = KVCache.size_in_bytes(
            depth=llama.num_hidden_layers,
            rows=1,
            width=llama.num_key_value_heads * llama.head_dim,
            length=1,
            scratch_length=0,
            itemsize=itemsize,
        )
        memory[dtype] = {
            "weights_bytes": parameters * itemsize,
            "cache_bytes_per_picture": GUIDED_ROWS * positions["per_picture"] * token,
            "cache_bytes_per_video": GUIDED_ROWS * positions["per_video"] * token,
            "cache_bytes_per_token": token,
        }
    return memory


def _files(files: Iterable[Path], renames: RenameTable, beside: Mapping[str, Path | None]) -> dict[str, Any]:
    """Describe the weight files that a pipeline would read, by their names in the checkpoint, and name what is beside them."""
    files = list(files)
    root = Path(os.path.commonpath([file.parent for file in files])) if files else Path()
    found: dict[str, Any] = {}
    for file in files:
        tensors = tensor_shapes(file)
        read = [dtype for name, (_, dtype) in tensors.items() if renames(name) is not None]
        found[file.relative_to(root).as_posix()] = {
            "bytes": file.stat().st_size,
            "dtypes": sorted({str(dtype).removeprefix("torch.") for dtype in read}),
            "tensors": len(tensors),
            "tensors_never_read": len(tensors) - len(read),
        }
    return found | {name: str(path) for name, path in beside.items() if path is not None}


def _without_scales(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without the scales, which have a section of their own."""
    return {name: value for name, value in config.items() if name not in ("patch_nums", "v_patch_nums")}
