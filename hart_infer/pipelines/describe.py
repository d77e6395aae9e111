"""What a pipeline is made of, in words."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from .. import ops
from ..ops.registry import OPS, REFERENCE, Where

if TYPE_CHECKING:
    from .hart import HartPipeline


def describe_pipeline(pipeline: HartPipeline) -> str:
    """Several lines: the model, its parts with parameters and memory, and what runs each operation."""
    parts = {"transformer": pipeline.transformer, "autoencoder": pipeline.autoencoder}
    encoder = pipeline.text_encoder
    lines = [f"{pipeline.name or 'HART'} on {pipeline.device}, {str(pipeline.dtype).removeprefix('torch.')}"]
    lines += [f"  {name}: {_size(module)}" for name, module in parts.items()]
    lines.append(f"  text encoder: {_size(encoder.model) if encoder else 'none (calls need prompt_embeds)'}")
    config = pipeline.transformer.config
    lines.append(f"  sizes: {', '.join(map(str, pipeline.sizes))} px; scales: {' '.join(map(str, config.patch_nums))}")
    with torch.cuda.device(pipeline.device) if pipeline.device.type == "cuda" else nullcontext():  # whose kernels are tried
        chosen = operations(Where.of(next(pipeline.transformer.parameters())))
    lines += [f"  {name}: {by}" for name, by in chosen.items()]
    return "\n".join(lines)


def operations(where: Where) -> dict[str, str]:
    """What runs each operation there, and why not a kernel that it has."""
    told = {}
    for name in ops.__all__:
        declared = OPS.get(name)
        if declared is None:
            told[name] = "PyTorch; this version has no kernel for it"
            continue
        choice = declared.choose(where)
        reasons = "; ".join(f"not {backend}: {reason}" for backend, reason in choice.refusals.items())
        limit = None if choice.backend == REFERENCE else declared.backends[choice.backend].limit()
        runs = "PyTorch" if choice.backend == REFERENCE else f"{choice.backend}, for {limit}" if limit else choice.backend
        told[name] = f"{runs}; {reasons}" if reasons else runs
    return told


def _size(module: nn.Module) -> str:
    parameters = list(module.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    size = sum(parameter.nbytes for parameter in parameters)
    return f"{count / 1e6:.1f} M parameters, {size / 1e6:.0f} MB"
