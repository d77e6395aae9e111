"""The CUDA kernels of csrc/, compiled for several GPUs without one; `compile_kernels.py` shows what came out.

Needs nvcc, and nvdisasm: the toolkit's, or that in Triton's package.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from binaries import instructions

CSRC = Path(__file__).resolve().parents[1] / "csrc"
TYPES = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16", "a": "int8", "NS_6Float8E": "fp8"}
REPORT = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)'.*?(?P<spilled>\d+) bytes spill stores.*?Used (?P<registers>\d+) registers"
    r"(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)
WARPS = 3  # of a block, for the released width of 1536: 16 elements a thread (csrc/include/launch.cuh)


def tool(name: str) -> str:
    """A program of the toolkit, or of Triton's package."""
    folders = [f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin", os.environ.get("PATH", "")]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    found = shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise FileNotFoundError(f"{name} is not here: it comes with CUDA's toolkit, nvdisasm with Triton too")
    return found


def name_of(symbol: str) -> str:
    """A mangled kernel's name: "rms_norm bf16, packs of 8"."""
    parts = re.match(r"_ZN4hart\d+(\w+?)_kernelI(\w+?)Li(\d+)EEEv", symbol)
    assert parts is not None, symbol
    kernel, kinds, pack = parts.groups()
    found: list[str] = []
    while kinds:
        repeated = re.match(r"S\d?_", kinds)
        kind = repeated[0] if repeated else next(kind for kind in TYPES if kinds.startswith(kind))
        found.append(found[0] if repeated else TYPES[kind])
        kinds = kinds.removeprefix(kind)
    return f"{kernel} {' '.join(dict.fromkeys(found))}, {f'packs of {pack}' if pack != '1' else 'single elements'}"


def compiled(source: Path, capability: int) -> list[dict[str, Any]]:
    """What the kernels of one file are like on one GPU."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernels.cubin"
        options = ["-O3", "-std=c++17", f"-I{CSRC / 'include'}", "-Xptxas=-v", "-cubin", f"-arch=sm_{capability}"]
        command = [tool("nvcc"), *options, str(source), "-o", str(binary)]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        listing = subprocess.run([tool("nvdisasm"), "-c", str(binary)], capture_output=True, text=True, check=True).stdout
    bodies = dict(re.findall(r"^\.text\.(\w+):\n(.*?)(?=^\.text\.|\Z)", listing, re.MULTILINE | re.DOTALL))
    return [row(report, capability, bodies[report["symbol"]]) for report in REPORT.finditer(log)]


def row(report: re.Match[str], capability: int, listing: str) -> dict[str, Any]:
    """With the keys of `tools/compile_kernels.py`."""
    return {
        "kernel": name_of(report["symbol"]),
        "capability": capability,
        "warps": WARPS,
        "registers": int(report["registers"]),
        "shared_bytes": int(report["shared"] or 0),
        "spilled_bytes": int(report["spilled"]),
        **instructions(listing),
    }


def rows(capabilities: Sequence[int]) -> list[dict[str, Any]]:
    """Every kernel on every GPU."""
    jobs = [(source, capability) for capability in capabilities for source in sorted(CSRC.glob("*.cu"))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found: Iterator[list[dict[str, Any]]] = pool.map(lambda job: compiled(*job), jobs)
        return [kernel for kernels in found for kernel in kernels]


def version() -> str | None:
    """Of CUDA, or None without nvcc."""
    try:
        told = subprocess.run([tool("nvcc"), "--version"], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        return None
    release = re.search(r"release ([\d.]+)", told)
    return release and release[1]
