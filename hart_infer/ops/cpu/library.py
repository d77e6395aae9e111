"""Load the compiled library `hart_infer/_cpu.so`, say where it runs, and find the threads that it shares with PyTorch."""

from __future__ import annotations

import ctypes
import logging
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import BackendError
from ..precision import instructions

FILE = Path(__file__).resolve().parents[2] / "_cpu.so"
REASON = FILE.with_suffix(".absent")  # written by setup.py: why no library was built
INTERFACE = 4  # ABI version, equal to csrc/cpu/library.cpp's
NEEDS = ("avx512_bf16", "avx512_vnni")  # no x86 CPU has the first alone
TILES = frozenset({"amx_bf16", "amx_tile"})  # torch's names for AMX's products in bf16, of its versions
HOW = "to build it: HART_INFER_BUILD_CPU=1 pip install --force-reinstall --no-deps --no-cache-dir . in the sources, with g++"
logger = logging.getLogger(__name__)


class LimitExceeded(Exception):
    """Valid arguments that a kernel does not take."""


class Operand(ctypes.Structure):
    """A tensor [R, H, N, d] with stride 1 along d: its address, its other strides in elements."""

    _fields_ = [("data", ctypes.c_void_p), ("row", ctypes.c_int64), ("head", ctypes.c_int64), ("token", ctypes.c_int64)]

    @staticmethod
    def of(x: Tensor) -> Operand:
        """Describe `x`."""
        return Operand(x.data_ptr(), *x.stride()[:3])


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL | str:
    """Load the library once; return it, or why there is none."""
    if not FILE.exists():
        reason = f"when this package was built, {REASON.read_text(encoding='utf-8').strip()}; " if REASON.exists() else ""
        return f"the compiled kernels for CPUs are absent ({reason}{HOW})"
    try:
        found = ctypes.CDLL(str(FILE))
        interface = found.hart_infer_cpu_interface()
    except (OSError, AttributeError) as error:
        reason = str(error).replace(f"{FILE.parent}/", "")  # without the path: users post reports
        return f"the compiled kernels for CPUs can't be used ({reason}; {HOW})"
    if interface != INTERFACE:
        return f"the compiled kernels for CPUs are of another version (interface {interface}, not {INTERFACE}; {HOW})"
    return found


def refusal(where: Any) -> str | None:
    """Return why the kernels can't run at a `Where` (device, dtype), or None if they can.

    Logs one warning where the CPU could run them but there is no library.
    """
    if where.device != "cpu":
        return "it is for CPUs"
    if where.dtype != torch.bfloat16:
        return f"{where.dtype} is not supported"
    if lacking := [name for name in NEEDS if name not in instructions()]:
        return f"this CPU has no {lacking[0].upper()}"
    loaded = load()
    if isinstance(loaded, str):
        _say_once(loaded)
        return loaded
    return None


@lru_cache(maxsize=1)
def _say_once(reason: str) -> None:
    logger.warning("In bfloat16 this CPU could be faster: %s.", reason)


@lru_cache(maxsize=1)
def parallel() -> ctypes.c_void_p:
    """Return the address of GOMP_parallel in the OpenMP runtime that PyTorch loaded; null where there is none.

    LLVM's and Intel's runtimes have the function too. Without it kernels run in one thread.
    """
    try:
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ctypes.c_void_p()
    paths = dict.fromkeys(re.findall(r"(/\S*/lib(?:gomp|omp|iomp5)\b\S*)", mapped))
    for path in sorted(paths, key=lambda path: "/torch/" not in path):  # other packages bring runtimes of their own
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p)
        except (OSError, AttributeError):
            continue
    return ctypes.c_void_p()


@lru_cache(maxsize=1)
def has_tiles() -> bool:
    """Return whether this process may use AMX's tiles in bf16."""
    loaded = load()
    return not isinstance(loaded, str) and bool(TILES & instructions()) and bool(loaded.hart_infer_cpu_ask_for_tiles())


def call(name: str, arguments: ctypes.Structure) -> None:
    """Call kernel `name` in as many threads as PyTorch takes. Raises BackendError if there is no library, or no memory."""
    loaded = load()
    if isinstance(loaded, str):
        raise BackendError(f"The CPU's kernels can't run: {loaded}.")
    code = getattr(loaded, f"hart_infer_cpu_{name}")(ctypes.byref(arguments), torch.get_num_threads(), parallel())
    if code:
        raise BackendError(f"The CPU kernel {name} found no memory for its buffers.")


def describe() -> str:
    """Return whether there is a library, in words."""
    loaded = load()
    return loaded if isinstance(loaded, str) else "built"
