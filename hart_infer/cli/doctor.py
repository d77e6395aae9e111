"""`hart-infer doctor`: show what this machine has, and what will be used."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

from ..checkpoints.layouts import BUNDLED_MODEL
from ..errors import CheckpointNotFoundError
from ..version import __version__
from . import machine, options
from .console import emit_json, emit_table

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "transformers", "huggingface_hub", "safetensors", "tokenizers", "numpy", "pillow")
EXTRAS = {"sentencepiece": "vila-u", "av": "video", "fastapi": "serve"}  # packages, and the extra that installs each
GIB = 2**30
NO = "no"


def add_parser(commands: options.Commands) -> None:
    """Add the subcommand."""
    parser = options.add_command(
        commands,
        "doctor",
        usage="[--json]",
        summary="Show what this machine has and what will be used.",
        details="Loads no model and downloads nothing. Good to have in a bug report.",
    )
    parser.set_defaults(run=run)
    options.add_json(parser, "the report as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    report = examine()
    if args.json:
        emit_json(report, indent=2)
        return 0
    for title, section in report.items():
        emit_table([(name.replace("_", " "), _shown(value)) for name, value in section.items()], title=title)
    return 0


def examine() -> dict[str, dict[str, Any]]:
    """Return the report: sections of names and values."""
    return {
        "software": _software(),
        "cpu": _cpu(),
        "gpu": _gpu(),
        "kernels": _kernels(),
        "hub": _hub(),
        "used by default": _defaults(),
    }


def _software() -> dict[str, Any]:
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "hart-infer": __version__,
        "python": f"{platform.python_version()} ({_tilde(sys.executable)})",
        "system": platform.platform(),
        **versions,
        **{name: _version(name) or f"not installed (it is in hart-infer[{extra}])" for name, extra in EXTRAS.items()},
    }


def _cpu() -> dict[str, Any]:
    import torch

    from ..ops.cpu import describe

    total, available = machine.memory()
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "architecture": platform.machine(),
        "cores": allowed,
        "torch_threads": torch.get_num_threads(),
        "memory": _gib(total),
        "memory_available": _gib(available),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "compiled_kernels": describe(),
        **{name: _half_precision(dtype) for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))},
    }


def _gpu() -> dict[str, Any]:
    import torch

    from ..ops.cuda import describe

    found: dict[str, Any] = {"built_for_cuda": torch.version.cuda or NO, "compiled_kernels": describe()}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = f"{properties.major}.{properties.minor}"
            found[f"cuda:{index}"] = f"{properties.name}, capability {capability}, {_gib(properties.total_memory)}"
    else:
        found["cuda_devices"] = "none"
    found["mps"] = torch.backends.mps.is_available()
    return found


def _half_precision(dtype: torch.dtype) -> str:
    """Return how this CPU computes products in `dtype`."""
    import torch

    from ..ops.precision import NATIVE, widens

    widened = [product for product in NATIVE[dtype] if widens(torch.empty(0, dtype=dtype), product)]
    if not widened:
        return "native"
    some = "" if len(widened) == len(NATIVE[dtype]) else f" ({', '.join(widened)})"
    return f"products computed in fp32{some}"


def _kernels() -> dict[str, Any]:
    """Return what runs each operation on the default device, and why."""
    import torch

    from ..ops.registry import Where
    from ..pipelines.describe import operations

    choice = machine.choose()
    return operations(Where.of(torch.empty(0, dtype=choice.torch_dtype, device=choice.device)))


def _hub() -> dict[str, Any]:
    from huggingface_hub import constants

    from ..checkpoints.families import RELEASED

    return {
        "cache": _tilde(constants.HF_HUB_CACHE),
        "offline": constants.HF_HUB_OFFLINE,
        "released_models_cached": [model for family, model in RELEASED.items() if _is_cached(model, family)] or "none",
    }


def _is_cached(model: str, family: str) -> bool:
    """Return whether files of a released model are in the Hub's cache."""
    from ..checkpoints.families import find_family
    from ..checkpoints.hub import HubOptions

    try:
        return find_family(model, HubOptions(local_files_only=True)) == family
    except CheckpointNotFoundError:
        return False


def _defaults() -> dict[str, Any]:
    choice = machine.choose()
    return {
        "device": f"{choice.device}: {choice.device_reason}",
        "dtype": f"{choice.dtype}: {choice.dtype_reason}",
        "model": BUNDLED_MODEL,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _tilde(path: str) -> str:
    """Replace the home directory by ~: users post reports."""
    home = os.path.expanduser("~")
    return f"~{path.removeprefix(home)}" if path.startswith(home + os.sep) else path


def _gib(size: int | None) -> str | None:
    return None if size is None else f"{size / GIB:.1f} GiB"


def _shown(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else NO
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
