"""Choose a device and dtype by what the machine has."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
FIRST_BF16_CAPABILITY = (8, 0)
STORED = "the stored dtype"
DEFAULT_REASONS = {
    "cuda": "a CUDA device is here",
    "mps": "no CUDA device, but Apple's GPU is here",
    "cpu": "neither a CUDA device nor Apple's GPU is here",
}


@dataclass(frozen=True)
class MachineChoice:
    """A device, a dtype (one of DTYPES, or STORED) and the reasons for them."""

    device: str
    dtype: str
    device_reason: str
    dtype_reason: str

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """Return the dtype as torch's; None for the stored one."""
        import torch

        return getattr(torch, DTYPES[self.dtype]) if self.dtype in DTYPES else None


def choose(device: str | None = None, dtype: str | None = None) -> MachineChoice:
    """Choose a device and dtype for arguments that are None. Raises InputError if `device` is not there."""
    from ..pipelines.arguments import check_device

    asked = "asked for"
    chosen = str(check_device(device))
    device_reason = asked if device else DEFAULT_REASONS[chosen]
    dtype, dtype_reason = (dtype, asked) if dtype else _choose_dtype(chosen)
    return MachineChoice(chosen, dtype, device_reason, dtype_reason)


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


def memory() -> tuple[int | None, int | None]:
    """Return the bytes of main memory in total and available now; None for what the operating system does not tell."""
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
