"""What a pipeline is made of, in words."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .. import ops
from ..engine.packed import PackedLinear
from ..ops.registry import OPS, REFERENCE, Choice, Op, Where

IN_FP32 = {"drop_unlikely"}  # operations whose arguments are in fp32, whatever a pipeline's dtype


def describe(
    name: str, components: Mapping[str, Any], device: torch.device, dtype: torch.dtype, facts: Mapping[str, str]
) -> str:
    """Several lines: the model, its parts with parameters and memory, its family's facts, and what runs each operation."""
    lines = [f"{name} on {device}, {str(dtype).removeprefix('torch.')}"]
    lines += [f"  {part.replace('_', ' ')}: {_part(module)}" for part, module in components.items()]
    lines += [f"  {fact}: {value}" for fact, value in facts.items()]
    if device.type == "cpu":
        chosen = operations(Where("cpu", dtype))
        ours = {operation: by for operation, by in chosen.items() if not by.startswith("PyTorch")}
        lines.append(f"  operations: by PyTorch, {'all but these' if ours else 'every one'}; most kernels are for GPUs")
        return "\n".join([*lines, *(f"  {operation}: {by}" for operation, by in ours.items())])
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # refusal() tries kernels on the current device
        chosen = operations(Where.of(torch.empty(0, dtype=dtype, device=device)))
    return "\n".join([*lines, *(f"  {operation}: {by}" for operation, by in chosen.items())])


def operations(where: Where) -> dict[str, str]:
    """Map each operation to what runs it, and why its other kernels were refused."""
    told = {}
    for name in ops.__all__:
        declared = OPS.get(name)
        if declared is None:
            told[name] = "PyTorch; this version has no kernel for it"
            continue
        try:
            choice = declared.choose(replace(where, dtype=torch.float32) if name in IN_FP32 else where)
        except torch.OutOfMemoryError:
            told[name] = "not known; the device has too little memory to try its kernels"
            continue
        reasons = "; ".join(f"not {backend}: {reason}" for backend, reason in choice.refusals.items())
        limit = None if choice.backend == REFERENCE else declared.backends[choice.backend].limit()
        runs = "PyTorch" if choice.backend == REFERENCE else f"{choice.backend}, for {limit}" if limit else choice.backend
        told[name] = "; ".join(text for text in (runs, choice.why, reasons, *_exceptions(declared, choice)) if text)
    return told


def _exceptions(declared: Op[Any, Any], choice: Choice[Any, Any]) -> list[str]:
    """Return what an operation's table says of the calls that use special arguments, where the table made the choice."""
    return [f"with {' or '.join(row.uses)} {row.backend}: {row.why}" for row in declared.defaults if row.uses and choice.why]


def weights_digest(components: Mapping[str, Any]) -> str:
    """Return a hash of all weights as they lie in memory, 16 hexadecimal digits; another dtype gives another."""
    digest = hashlib.sha256()
    for name, part in sorted(components.items()):
        for key, tensor in ({} if part is None else _module(part).state_dict()).items():
            digest.update(f"{name}.{key} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _module(part: Any) -> nn.Module:
    """Return a component's module: itself, or that of the text encoder around it."""
    module: nn.Module = part if isinstance(part, nn.Module) else part.model
    return module


def _part(part: Any) -> str:
    """Return the size of a component in words; a note for None."""
    if part is None:
        return "none (calls need prompt_embeds)"
    module = _module(part)
    packed = [part.packed for part in module.modules() if isinstance(part, PackedLinear)]
    weights = [*module.parameters(), *module.buffers(), *packed]
    count = sum(tensor.numel() for tensor in weights)
    size = sum(tensor.numel() * tensor.itemsize for tensor in weights)
    small = ", most in int8" if any(tensor.dtype == torch.int8 for tensor in weights) else ", packed" if packed else ""
    return f"{count / 1e6:.1f} M parameters, {size / 1e6:.0f} MB{small}"
