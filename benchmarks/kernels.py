"""Compile every Triton kernel for several GPUs, without one, and say what the compiler made of it.

    python benchmarks/kernels.py --out benchmarks/results/kernels.json

Registers, shared memory, spilled bytes, matrix instructions and 128-bit loads, from the compiled binaries. These are static
facts, not timings. Needs triton 3.6 or newer, whose package brings the assembler and the disassembler; no CUDA, no driver.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel can't be compiled

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

CAPABILITIES = (80, 86, 89, 90)
TYPES = {"bf16": "bf16", "fp16": "fp16", "fp32": "fp32"}
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Za-z0-9_.]+)", re.MULTILINE)
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
MATRIX = re.compile(r"(HMMA|HGMMA|IMMA|QGMMA|UTC\w*MMA)")


@dataclass(frozen=True)
class Case:
    """One kernel with the constants and the types of one use."""

    name: str
    kernel: Any
    types: dict[str, str]  # of pointers and floats; the rest are 32-bit integers
    constants: dict[str, Any]
    warps: int
    stages: int

    def source(self) -> ASTSource:
        """For the compiler; pointers and strides are multiples of 16, as the launchers' almost always are."""
        names = self.kernel.arg_names
        kinds = {name: "constexpr" if name in self.constants else self.types.get(name, "i32") for name in names}
        aligned = [n for n in names if kinds[n].startswith("*") or re.search(r"_(row|head|token|part|split)$|^width$", n)]
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
        return ASTSource(fn=self.kernel, signature=kinds, constexprs=self.constants, attrs=attributes)


def cases() -> Iterator[Case]:
    """Every kernel, in the shapes of the released model and of hart-mini."""
    attention = importlib.import_module("hart_infer.kernels.attention")
    rope_cache = importlib.import_module("hart_infer.kernels.rope_cache")
    swiglu = importlib.import_module("hart_infer.kernels.swiglu")
    tensors = ("q", "k", "v", "out")
    for dtype in TYPES:
        for head_dim, queries in ((64, 4096), (64, 1), (32, 144), (128, 4096)):
            for split in (False, True) if queries == 1 else (False,):
                tiles = attention.config_for(4 if dtype == "fp32" else 2, head_dim, queries)
                types = (
                    dict.fromkeys(tensors, f"*{dtype}") | dict.fromkeys(("maxima", "sums"), "*fp32") | {"scale_log2": "fp32"}
                )
                types["out"] = "*fp32" if split else types["out"]
                constants = {"HEAD_DIM": head_dim, "WIDTH": head_dim, "BLOCK_Q": tiles.rows, "BLOCK_K": tiles.columns}
                constants |= {"SPLIT": split, "PRECISION": "ieee" if dtype == "fp32" else "tf32"}
                name = f"attention {dtype} d{head_dim} {tiles.rows}x{tiles.columns}{' split' if split else ''}"
                yield Case(name, attention.attention_kernel, types, constants, tiles.warps, tiles.stages)
        for heads, head_dim in ((24, 64), (8, 32)):
            types = dict.fromkeys(("qkv", "cos", "sin", "gains", "q_out", "k_out", "v_out"), f"*{dtype}")
            constants = {
                "HALF": head_dim // 2,
                "LANES": head_dim // 2,
                "HEADS": triton.next_power_of_2(heads),
                "NORMALISED": False,
            }
            yield Case(f"rope_cache {dtype} {heads}x{head_dim}", rope_cache.rope_cache_kernel, types, constants, 4, 3)
        types = dict.fromkeys(("gate", "up", "out"), f"*{dtype}")
        yield Case(f"swiglu {dtype}", swiglu.swiglu_kernel, types, {"BLOCK": swiglu.BLOCK}, 4, 3)
    types = dict.fromkeys(("parts", "maxima", "sums"), "*fp32") | {"out": "*bf16"}
    constants = {"HEAD_DIM": 64, "WIDTH": 64, "SPLITS": 16}
    yield Case("attention merge bf16 d64 16 splits", attention.merge_kernel, types, constants, 4, 3)


def tool(name: str, *arguments: str) -> str:
    """Run one of the programs in Triton's package."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, check=True).stdout


def compiled(case: Case, capability: int) -> dict[str, Any]:
    """What the binary for one GPU is like."""
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    options = {"num_warps": case.warps, "num_stages": case.stages}
    with contextlib.redirect_stdout(log):
        kernel = triton.compile(case.source(), target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = RESOURCES.search(tool("cuobjdump", "--dump-resource-usage", file.name))
        counts = Counter(INSTRUCTION.findall(tool("nvdisasm", "-c", file.name)))
    spilled = re.search(r"(\d+) bytes spill stores", log.getvalue())
    assert usage is not None
    return {
        "kernel": case.name,
        "capability": capability,
        "warps": case.warps,
        "registers": int(usage[1]),
        "shared_bytes": kernel.metadata.shared,
        "spilled_bytes": int(spilled[1]) if spilled else None,
        "matrix": dict(sorted(Counter(match[0] for op in counts.elements() if (match := MATRIX.match(op))).items())),
        "loads_128": sum(n for op, n in counts.items() if op.startswith(("LDG", "LDGSTS")) and ".128" in op),
        "loads": sum(n for op, n in counts.items() if op.startswith(("LDG", "LDGSTS"))),
        "instructions": sum(counts.values()),
    }


def main() -> int:
    """Compile, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="*", default=CAPABILITIES)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for case in cases():
        for capability in args.capability if args.only in case.name else ():
            row = compiled(case, capability)
            rows.append(row)
            matrix = " ".join(f"{op} {count}" for op, count in row["matrix"].items())
            print(
                f"{case.name:<40}sm_{capability}  {row['registers']:>3} registers  {row['shared_bytes']:>6} B shared  "
                f"{row['spilled_bytes']} B spilled  {row['loads_128']}/{row['loads']} loads of 128 bit  {matrix}",
                flush=True,
            )
    if args.out:
        result = {"benchmark": "kernels", "triton": triton.__version__, "kernels": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
