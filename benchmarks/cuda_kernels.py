"""Compile every CUDA kernel of csrc/ for several GPUs, without one, and say what the compiler made of it.

    python benchmarks/cuda_kernels.py --out benchmarks/results/cuda_kernels.json

Registers, shared memory, spilled bytes and 128-bit loads, from nvcc's report and the disassembled binaries. These are static
facts, not timings. Needs nvcc, and nvdisasm: the toolkit's, or that in Triton's package.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CSRC = Path(__file__).resolve().parents[1] / "csrc"
CAPABILITIES = (80, 86, 89, 90, 100)
TYPES = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16", "a": "int8", "NS_6Float8E": "fp8"}
REPORT = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)'.*?(?P<spilled>\d+) bytes spill stores.*?Used (?P<registers>\d+) registers"
    r"(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Za-z0-9_.]+)", re.MULTILINE)
MATRIX = re.compile(r"(HMMA|HGMMA|IMMA|QGMMA|UTC\w*MMA)")


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
    return [row(report, capability, Counter(INSTRUCTION.findall(bodies[report["symbol"]]))) for report in REPORT.finditer(log)]


def row(report: re.Match[str], capability: int, counts: Counter[str]) -> dict[str, Any]:
    """With the keys of `benchmarks/kernels.py`."""
    loads = {op: n for op, n in counts.items() if op.startswith(("LDG", "LDGSTS"))}
    return {
        "kernel": name_of(report["symbol"]),
        "capability": capability,
        "registers": int(report["registers"]),
        "shared_bytes": int(report["shared"] or 0),
        "spilled_bytes": int(report["spilled"]),
        "matrix": dict(sorted(Counter(match[0] for op in counts.elements() if (match := MATRIX.match(op))).items())),
        "loads_128": sum(n for op, n in loads.items() if ".128" in op),
        "loads": sum(loads.values()),
        "instructions": sum(counts.values()),
    }


def rows(capabilities: Sequence[int] = CAPABILITIES) -> list[dict[str, Any]]:
    """Every kernel on every GPU."""
    jobs = [(source, capability) for capability in capabilities for source in sorted(CSRC.glob("*.cu"))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found: Iterator[list[dict[str, Any]]] = pool.map(lambda job: compiled(*job), jobs)
        return [kernel for kernels in found for kernel in kernels]


def main() -> int:
    """Compile, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="*", default=CAPABILITIES)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    kernels = rows(args.capability)
    for kernel in kernels:
        print(
            f"{kernel['kernel']:<48}sm_{kernel['capability']:<4}{kernel['registers']:>3} registers  "
            f"{kernel['shared_bytes']:>4} B shared  {kernel['spilled_bytes']} B spilled  "
            f"{kernel['loads_128']}/{kernel['loads']} loads of 128 bit  {kernel['instructions']} instructions"
        )
    if args.out:
        version = subprocess.run([tool("nvcc"), "--version"], capture_output=True, text=True, check=True).stdout
        release = re.search(r"release ([\d.]+)", version)
        result = {"benchmark": "cuda_kernels", "cuda": release and release[1], "kernels": kernels}
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
