"""`hart-infer info`: what a checkpoint is, or what made a picture; no weights are loaded."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..images.files import FORMATS, read_metadata
from . import options
from .console import emit, emit_json, emit_table

if TYPE_CHECKING:
    from ..checkpoints.layouts import Checkpoint
    from ..models.config import AutoencoderConfig, TransformerConfig

DETAILS = """\
For a checkpoint: parameters, scales, memory and flags, from its configuration
and its files' headers; of a Hugging Face id only the configuration is downloaded.
For a picture that `hart-infer generate` wrote: prompt, seed and settings."""

EPILOG = """\
examples:
  hart-infer info mit-han-lab/hart-0.7b-1024px
  hart-infer info ./hart-bf16 --json
  hart-infer info cat.png
"""

MIB, GIB = 2**20, 2**30
GUIDED_ROWS = 2  # an image and its unconditional half
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class _Parts:
    """Parameters of each part of a model."""

    transformer: int
    residual_diffusion: int
    encoder: int
    decoder: int
    quantizer: int


def add_parser(commands: options.Commands) -> None:
    """Add the subcommand."""
    parser = options.add_command(
        commands,
        "info",
        usage="PATH|ID [options]",
        summary="Show what a checkpoint is, or what made a picture.",
        details=DETAILS,
        epilog=EPILOG,
    )
    parser.set_defaults(run=run)
    parser.add_argument("target", metavar="PATH|ID", help="checkpoint folder, Hugging Face id, or picture")
    options.add_source(parser)
    options.add_json(parser, "everything as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Read and tell."""
    path = Path(args.target)
    if path.suffix.lower() in FORMATS and not path.is_dir():
        return _show_picture(args)
    from ..checkpoints.layouts import inspect_checkpoint

    found = inspect_checkpoint(
        args.target, revision=args.revision, local_files_only=args.local_files_only, use_ema=args.use_ema
    )
    report = describe(found)
    if args.json:
        emit_json(report, indent=2)
        return 0
    emit(args.target)
    for title in ("parameters", "schedule", "memory"):
        emit_table(_rows(report[title]), title=title)
    emit_table(_named(report["files"] or {"": "not on this machine"}), title="files")
    for title in ("defaults", "transformer", "autoencoder"):
        emit_table(_named(report[title]), title=title)
    return 0


def _show_picture(args: argparse.Namespace) -> int:
    metadata = read_metadata(args.target)
    if metadata is None:
        raise InputError(f"{args.target} carries no metadata of hart-infer.")
    if args.json:
        emit_json(metadata, indent=2)
    else:
        emit_table(_rows(metadata), title=args.target)
    return 0


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """The report on a checkpoint, in JSON's types."""
    transformer, autoencoder = checkpoint.transformer, checkpoint.autoencoder
    parts = count_parameters(transformer, autoencoder)
    return {
        "parameters": {**vars(parts), "total": sum(vars(parts).values())},
        "schedule": _schedule(transformer, autoencoder),
        "memory": _memory(transformer, autoencoder, parts),
        "files": _files(checkpoint),
        "defaults": checkpoint.defaults.to_dict(),
        "transformer": _flags(transformer.to_dict()),
        "autoencoder": _flags(autoencoder.to_dict()),
    }


def _flags(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the scales, which have a section of their own."""
    return {name: value for name, value in config.items() if name not in ("patch_nums", "v_patch_nums")}


def count_parameters(transformer: TransformerConfig, autoencoder: AutoencoderConfig) -> _Parts:
    """Parameters by part, from modules without storage."""
    import torch

    from ..models.next_scale import Transformer
    from ..models.parts.autoencoder import Autoencoder

    with torch.device("meta"):
        llm = Transformer(transformer, vocab_size=autoencoder.vocab_size, channels=autoencoder.z_channels)
        vae = Autoencoder(autoencoder)
    diffusion = _count(llm.diffusion)
    encoder = _count(vae.encoder) + _count(vae.quant_conv)
    quantizer = _count(vae.quantizer)
    return _Parts(
        transformer=_count(llm) - diffusion,
        residual_diffusion=diffusion,
        encoder=encoder,
        decoder=_count(vae) - encoder - quantizer,
        quantizer=quantizer,
    )


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _schedule(transformer: TransformerConfig, autoencoder: AutoencoderConfig) -> dict[str, Any]:
    sides = transformer.patch_nums
    return {
        "picture_pixels": sides[-1] * autoencoder.downsample,
        "scales": len(sides),
        "sides": list(sides),
        "image_tokens": sum(side * side for side in sides),
        "context_tokens": transformer.context_token,
    }


def _memory(transformer: TransformerConfig, autoencoder: AutoencoderConfig, parts: _Parts) -> dict[str, dict[str, int]]:
    """Bytes of the weights, text encoder not counted, and of one picture's keys and values with guidance."""
    from ..generation.schedule import build_schedule
    from ..models.parts.cache import KVCache

    stages = build_schedule(
        transformer.patch_nums,
        context_tokens=transformer.context_token,
        share_quant_resi=autoencoder.share_quant_resi,
    )
    total = sum(vars(parts).values())
    return {
        dtype: {
            "weights_bytes": total * itemsize,
            "cache_bytes_per_picture": KVCache.size_in_bytes(transformer, stages, rows=GUIDED_ROWS, itemsize=itemsize),
        }
        for dtype, itemsize in DTYPE_BYTES.items()
    }


def _files(checkpoint: Checkpoint) -> dict[str, Any]:
    """The weight files that a pipeline would read, from their headers."""
    from ..checkpoints.weights import rename, tensor_shapes

    found: dict[str, Any] = {}
    for file in checkpoint.transformer_files + checkpoint.autoencoder_files:
        tensors = tensor_shapes(file)
        read = [dtype for name, (_, dtype) in tensors.items() if rename(name) is not None]
        found[f"{file.parent.name}/{file.name}"] = {
            "bytes": file.stat().st_size,
            "dtypes": sorted({str(dtype).removeprefix("torch.") for dtype in read}),
            "tensors": len(tensors),
            "tensors_never_read": len(tensors) - len(read),
        }
    if checkpoint.text_encoder is not None:
        found["text encoder"] = str(checkpoint.text_encoder)
    return found


def _named(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, _shown(value)) for name, value in values.items()]


def _rows(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), _shown(value)) for name, value in values.items()]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(_entry(name, item) for name, item in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def _entry(name: str, value: Any) -> str:
    words = name.replace("bytes_", "").removesuffix("bytes").strip("_").replace("_", " ")
    shown = _size(value) if "bytes" in name else _shown(value)
    return f"{words} {shown}".strip()


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.1f} MiB"
