"""Check what users pass to a pipeline: seeds and generators, devices, dtypes, and the settings of the sampling."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import InputError
from ..generation.schedule import Settings
from .checks import MAX_GUIDANCE, MAX_SEED, check_bool, check_float, check_int, check_seeds

DRAWN_SEEDS = 2**32  # fresh seeds are below it, short enough to retype
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda", "mps")
GeneratorArgument = torch.Generator | Sequence[torch.Generator] | None


def seeds_for(
    count: int, seed: int | Sequence[int] | None, generator: GeneratorArgument, device: torch.device
) -> tuple[list[int], torch.device]:
    """Return one seed per image, and the device that draws noise.

    `seed`: an int gives seed, seed + 1, ...; a list gives one per image. `generator`: one gives the first seed, from which the
    rest count up; a list gives one seed each; noise is drawn on its device. An unused generator gives its initial seed, so
    that `torch.Generator().manual_seed(7)` equals `seed=7`. Neither: fresh seeds from the system. Without a generator CUDA
    draws on CUDA, and everything else on the CPU (MPS may draw exact zeros, which the exponential draws can't take).
    Raises InputError.
    """
    if seed is not None and generator is not None:
        raise InputError("seed and generator contradict each other; give one of them.")
    draw_device = device if device.type == "cuda" else torch.device("cpu")
    if generator is not None:
        generators = list(generator) if isinstance(generator, Sequence) else [generator]
        _check_generators(generators, draw_device)
        seed = [_next_seed(item) for item in generators]
        if isinstance(generator, torch.Generator):
            seed = [seed[0] + i for i in range(count)]
        draw_device = generators[0].device if generators else draw_device
    if seed is None:
        return [secrets.randbelow(DRAWN_SEEDS) for _ in range(count)], draw_device
    if isinstance(seed, Sequence):
        if len(seed) != count:
            name = "seed" if generator is None else "generator"
            raise InputError(f"{name} has {len(seed)} entries for {count} images; give one per image, or a single one.")
        return [check_int(item, "seed", 0, MAX_SEED) for item in seed], draw_device
    first = check_seeds(seed, count)
    return [first + i for i in range(count)], draw_device


def _check_generators(generators: Sequence[Any], draw_device: torch.device) -> None:
    for item in generators:
        if not isinstance(item, torch.Generator):
            raise InputError(f"generator must be a torch.Generator or a list of them, not {type(item).__name__}.")
        if item.device.type != "cpu" and not _same(item.device, draw_device):
            raise InputError(f"generator is on {item.device}; make it on the CPU, or on {draw_device}, where noise is drawn.")
        if item.device != generators[0].device:
            raise InputError("The generators are on different devices; make them all on one.")


def _same(a: torch.device, b: torch.device) -> bool:
    """Whether two devices are one; "cuda" may be any of its kind."""
    return a.type == b.type and (a.index is None or b.index is None or a.index == b.index)


def _next_seed(generator: torch.Generator) -> int:
    """Return initial_seed() if nothing was drawn yet, else a drawn seed; the generator advances either way."""
    fresh = torch.Generator(generator.device).manual_seed(generator.initial_seed())
    is_fresh = torch.equal(fresh.get_state(), generator.get_state())
    drawn = torch.randint(DRAWN_SEEDS, (), generator=generator, device=generator.device).item()
    return generator.initial_seed() if is_fresh else int(drawn)


def check_settings(
    *, guidance_scale: Any, top_k: Any, top_p: Any, more_smooth: Any, vocab_size: int, residual_temperature: Any = 1.0
) -> Settings:
    """Return the checked settings of the sampling; raises InputError."""
    return Settings(
        guidance_scale=check_float(guidance_scale, "guidance_scale", 0, MAX_GUIDANCE),
        top_k=None if top_k is None else check_int(top_k, "top_k", 0, vocab_size),
        top_p=check_float(top_p, "top_p", 0, 1),
        more_smooth=check_bool(more_smooth, "more_smooth"),
        residual_temperature=check_float(residual_temperature, "residual_temperature", 0, 1),
    )


def default_device() -> torch.device:
    """Return CUDA where there is one, else MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def check_device(device: torch.device | str | None) -> torch.device:
    """Return the device, the default one for None; raises InputError for an unknown, unsupported or absent one."""
    if device is None:
        return default_device()
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{device!r} is not a device; cuda, cuda:0, mps and cpu are examples.") from error
    if parsed.type not in DEVICES:
        raise InputError(f"{device!r} is not a device that hart_infer runs on; {', '.join(DEVICES)} are.")
    if parsed.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (parsed.index or 0) >= count:
            raise InputError(f"{parsed} is not here: torch {torch.__version__} sees {count or 'no'} CUDA devices.")
    if parsed.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"mps is not here: torch {torch.__version__} sees no Apple GPU.")
    return parsed


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise InputError unless `dtype` is None or one of DTYPES."""
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"The dtype must be one of {', '.join(map(str, DTYPES))}, not {dtype!r}.")
