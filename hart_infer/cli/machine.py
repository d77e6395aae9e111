"""What a machine has, and the device and dtype that follow from it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from ..errors import InputError
from .options import DTYPES

if TYPE_CHECKING:
    import torch

FIRST_BF16_CAPABILITY = (8, 0)
STORED = "the stored dtype"
BF16_FEATURES = ("amx_bf16", "avx512_bf16", "arm_bf16")


@dataclass(frozen=True)
class Choice:
    """A device, a dtype (one of DTYPES, or STORED) and the reasons for them."""

    device: str
    dtype: str
    device_reason: str
    dtype_reason: str

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype as torch's; None for the stored one."""
        import torch

        return getattr(torch, DTYPES[self.dtype]) if self.dtype in DTYPES else None


def choose(device: str | None = None, dtype: str | None = None) -> Choice:
    """The device and dtype to use where they are None; InputError if `device` is not there."""
    asked = "asked for"
    device, device_reason = (_checked(device), asked) if device else _choose_device()
    dtype, dtype_reason = (dtype, asked) if dtype else _choose_dtype(device)
    return Choice(device, dtype, device_reason, dtype_reason)


def _choose_device() -> tuple[str, str]:
    import torch

    if torch.cuda.is_available():
        return "cuda", "a CUDA device is here"
    if torch.backends.mps.is_available():
        return "mps", "no CUDA device, but Apple's GPU is here"
    return "cpu", "neither a CUDA device nor Apple's GPU is here"


def _choose_dtype(device: str) -> tuple[str, str]:
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        capability = torch.cuda.get_device_capability(device)
        version = ".".join(map(str, capability))
        if capability >= FIRST_BF16_CAPABILITY:
            return "bf16", f"compute capability {version} has bf16"
        return "fp16", f"compute capability {version} has no bf16"
    return STORED, "it is exact; --dtype bf16 halves the memory"


def _checked(device: str) -> str:
    import torch

    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"{device!r} is not a device; cuda, cuda:0, mps and cpu are examples.") from error
    if parsed.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (parsed.index or 0) >= count:
            here = f"{count} CUDA device{'s' * (count != 1)}" if count else "no CUDA device"
            raise InputError(f"{device} is not here: torch {torch.__version__} sees {here} (see hart-infer doctor).")
    if parsed.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("mps is not here: torch sees no Apple GPU (see hart-infer doctor).")
    return device


@cache
def cpu_features() -> frozenset[str]:
    """Instructions that multiply bf16: amx_bf16, avx512_bf16, arm_bf16, as far as the CPU has them."""
    found = set(_cpu_flags())
    if found & {"bf16", "FEAT_BF16"}:
        found.add("arm_bf16")
    return frozenset(found.intersection(BF16_FEATURES))


def _cpu_flags() -> list[str]:
    """The operating system's names of the CPU's features; empty where it does not tell."""
    if platform.system() == "Darwin":
        return _darwin_flags()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.lower().startswith(("flags", "features")):
                    return line.partition(":")[2].split()
    except OSError:
        pass
    return []


def _darwin_flags() -> list[str]:
    import subprocess

    try:
        output = subprocess.run(["sysctl", "hw.optional.arm"], capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    pairs = (line.partition(":") for line in output.splitlines())
    return [name.rpartition(".")[2] for name, _, value in pairs if value.strip() == "1"]


def memory() -> tuple[int | None, int | None]:
    """Bytes of main memory in all and available now; None where the operating system does not tell."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None, None
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return total, None
    return total, available
