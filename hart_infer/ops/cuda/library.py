"""Load the compiled library `hart_infer/_kernels.so`, tell what it was built for, and call it."""

from __future__ import annotations

import ctypes
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import BackendError

FILE = Path(__file__).resolve().parents[2] / "_kernels.so"
REASON = FILE.with_suffix(".absent")  # written by setup.py: why no library was built
INTERFACE = 2  # ABI version, equal to csrc/library.cpp's
OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
HOST = "host"  # the tests' build, whose kernels run on CPU tensors
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3, torch.float8_e4m3fn: 4}
ACTIVATIONS = (torch.float32, torch.float16, torch.bfloat16)
HOW = "to build it: HART_INFER_BUILD_CUDA=1 pip install --force-reinstall --no-deps --no-cache-dir . in the sources, with nvcc"


class View(ctypes.Structure):
    """A tensor [groups, rows, width]: its address and its strides in elements. All zero for None."""

    _fields_ = [("data", ctypes.c_void_p), ("group", ctypes.c_int64), ("row", ctypes.c_int64)]

    @staticmethod
    def of(x: Tensor | None) -> View:
        """Describe x [groups, rows, width], last stride 1; dimensions of size 1 get stride 0, as theirs is never used."""
        if x is None:
            return View()
        group, row = (stride if size > 1 else 0 for size, stride in zip(x.shape[:2], x.stride()[:2], strict=True))
        return View(x.data_ptr(), group, row)


class Shape(ctypes.Structure):
    """The sizes of a tensor [groups, rows, width]."""

    _fields_ = [("groups", ctypes.c_int64), ("rows", ctypes.c_int64), ("width", ctypes.c_int64)]


_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
LAUNCHERS: dict[str, list[Any]] = {
    "rms_norm": [View, View, _POINTER, View, View, View, View, Shape, _FLOAT, _INT, _INT, _POINTER],
    "rms_norm_quantized": [View, _POINTER, View, _POINTER, Shape, _FLOAT, _INT, _INT, _POINTER],
    "layer_norm_modulate": [View, View, View, _POINTER, _POINTER, View, View, View, View, Shape, _FLOAT, _INT, _POINTER],
}


class Library:
    """A loaded library."""

    def __init__(self, path: Path) -> None:
        """Load it. Raises OSError if that fails or its interface is another, AttributeError if it lacks a function."""
        self.path = path
        self._c = ctypes.CDLL(str(path))
        interface = self._c.hart_infer_interface()
        if interface != INTERFACE:
            raise OSError(f"{path.name} was built for another version of hart-infer (interface {interface}, not {INTERFACE})")
        self._c.hart_infer_targets.restype = self._c.hart_infer_error.restype = ctypes.c_char_p
        self.targets: str = self._c.hart_infer_targets().decode()
        for name, arguments in LAUNCHERS.items():
            getattr(self._c, f"hart_infer_{name}").argtypes = arguments

    def launch(self, name: str, x: Tensor, *arguments: Any) -> None:
        """Call launcher `name` on the current stream of x's device. Raises BackendError if CUDA refuses."""
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.device.type == "cuda" else None
        code = getattr(self._c, f"hart_infer_{name}")(*arguments, stream)
        if code:
            raise BackendError(f"The CUDA kernel {name} could not be launched: {self._c.hart_infer_error(code).decode()}.")

    @lru_cache(maxsize=16)  # noqa: B019 - there is one library
    def failure(self, index: int) -> str | None:
        """Launch a trial kernel on the current device; return the driver's error, None on success.

        A driver older than the CUDA that compiled the library fails, for example. `index`: the current device, by which the
        answer is cached. Raises OutOfMemoryError, which is not cached.
        """
        code = self._c.hart_infer_trial()
        if code == OUT_OF_MEMORY:
            raise torch.OutOfMemoryError("CUDA out of memory, at the first launch of a compiled kernel.")
        return self._c.hart_infer_error(code).decode() if code else None

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Return whether it has code for `capability`: the same major version and no newer, or PTX that is no newer."""
        for major, minor, ptx in re.findall(r"(\d+)(\d)(\+PTX)?", self.targets):
            target = int(major), int(minor)
            if (ptx or target[0] == capability[0]) and target <= capability:
                return True
        return False


@lru_cache(maxsize=1)
def load() -> Library | str:
    """Load the library once; return it, or why there is none."""
    if not FILE.exists():
        reason = f"when this package was built, {REASON.read_text(encoding='utf-8').strip()}; " if REASON.exists() else ""
        return f"the compiled extension is absent ({reason}{HOW})"
    try:
        return Library(FILE)
    except (OSError, AttributeError) as error:
        reason = str(error).replace(f"{FILE.parent}/", "")  # without the path: users post reports
        return f"the compiled extension can't be used ({reason}; {HOW})"


def library() -> Library:
    """Return the library. Raises BackendError if there is none."""
    loaded = load()
    if isinstance(loaded, str):
        raise BackendError(f"The CUDA kernels can't run: {loaded}.")
    return loaded


def refusal(where: Any) -> str | None:
    """Return why the kernels can't run at a `Where` (device, dtype, capability), or None if they can."""
    if where.dtype not in ACTIVATIONS:
        return f"{where.dtype} is not supported"
    loaded = load()
    if isinstance(loaded, str):
        return loaded
    if loaded.targets == HOST:
        return None if where.device == "cpu" else "this build is for tests on the CPU"
    if where.device != "cuda":
        return "CUDA kernels run on NVIDIA GPUs"
    if not loaded.runs_on(where.capability):
        return f"the compiled extension was built for {loaded.targets} (HART_INFER_CUDA_ARCHS)"
    failure = loaded.failure(torch.cuda.current_device() if torch.cuda.is_available() else 0)
    return f"the compiled extension can't be used ({failure})" if failure else None


def describe() -> str:
    """Return for which targets the library was built, or why there is none, in words."""
    loaded = load()
    if isinstance(loaded, str):
        return loaded
    return "built for " + ", ".join(f"sm_{target}" for target in loaded.targets.split())
