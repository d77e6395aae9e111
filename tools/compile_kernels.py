"""Compile every kernel for several GPUs, without one, and say what the compilers made of it.

    python tools/compile_kernels.py --out tools/compiled_kernels.json --table docs/kernels.md
    python tools/compile_kernels.py --capability 80 90 --compare tools/compiled_kernels.json

Registers, shared memory, spilled bytes, occupancy, matrix instructions and 128-bit loads, from the compiled binaries: static
facts, not timings. The Triton kernels need triton 3.6 or newer, whose package brings assembler and disassembler; the CUDA
ones nvcc, and are left out without it. --compare fails where a kernel is worse than on record.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cuda_kernels
from binaries import instructions, occupancy
from triton.backends.compiler import GPUTarget
from triton_kernels import Case, cases, triton

CAPABILITIES = (80, 86, 89, 90, 100, 120)
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
BEGIN, END = "<!-- begin: tools/compile_kernels.py -->", "<!-- end -->"


def tool(name: str, *arguments: str) -> str:
    """Run one of the programs in Triton's package."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, check=True).stdout


def compiled(case: Case, capability: int) -> dict[str, Any]:
    """What the binary for one GPU is like."""
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": case.fusion}
    with contextlib.redirect_stdout(log):
        kernel = triton.compile(case.source(), target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = RESOURCES.search(tool("cuobjdump", "--dump-resource-usage", file.name))
        listing = tool("nvdisasm", "-c", file.name)
    spilled = re.search(r"(\d+) bytes spill stores", log.getvalue())
    assert usage is not None and spilled is not None
    return {
        "kernel": case.name,
        "capability": capability,
        "warps": case.warps,
        "registers": int(usage[1]),
        "shared_bytes": kernel.metadata.shared,
        "spilled_bytes": int(spilled[1]),
        **instructions(listing),
    }


def triton_rows(only: str, capabilities: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for each case whose name contains `only`, and each capability."""
    for case in cases():
        for capability in capabilities if only in case.name else ():
            if not case.targets or capability in case.targets:
                yield compiled(case, capability)


def cuda_rows(only: str, capabilities: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The same of csrc/; none where nvcc is missing."""
    try:
        yield from (row for row in cuda_kernels.rows(capabilities) if only in row["kernel"])
    except FileNotFoundError as error:
        print(f"without the CUDA kernels: {error}", file=sys.stderr)


SOURCES: dict[str, Callable[[str, Sequence[int]], Iterator[dict[str, Any]]]] = {"triton": triton_rows, "cuda": cuda_rows}


def versions(sources: Sequence[str]) -> dict[str, str | None]:
    """Of the compilers, whose work this is."""
    found = {"triton": triton.__version__, "cuda": cuda_kernels.version()}
    return {name: found[name] for name in sources}


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    return (
        f"{row['kernel']:<46}sm_{row['capability']:<4}{row['registers']:>3} registers {row['shared_bytes']:>6} B shared "
        f"{row['spilled_bytes']} B spilled  {row['occupancy']:>4.0%} occupied  {row['loads_128']}/{row['loads']} wide loads"
        + "".join(f"  {op} {count}" for op, count in row["matrix"].items())
        + (f", a loop of {row['per_matrix']} instructions and {row['shared_per_matrix']} B shared each" if loops(row) else "")
    )


def loops(row: dict[str, Any]) -> bool:
    """Whether it has matrix instructions in a loop."""
    return "per_matrix" in row


def worse(row: dict[str, Any], before: dict[str, Any]) -> str | None:
    """What got worse since `before`, or None."""
    if row["spilled_bytes"] > before["spilled_bytes"]:
        return f"spills {row['spilled_bytes']} bytes, not {before['spilled_bytes']}"
    if row["occupancy"] < before["occupancy"]:
        return f"occupies {row['occupancy']:.0%}, not {before['occupancy']:.0%} ({row['registers']} registers)"
    if row["loads_128"] / max(row["loads"], 1) < before["loads_128"] / max(before["loads"], 1):
        return f"has {row['loads_128']} of {row['loads']} loads of 128 bits, not {before['loads_128']} of {before['loads']}"
    if set(before["matrix"]) - set(row["matrix"]):
        return f"has no {', '.join(set(before['matrix']) - set(row['matrix']))}"
    for count, what in (("per_matrix", "instructions"), ("shared_per_matrix", "bytes of shared memory")):
        if loops(before) and (not loops(row) or row[count] > 1.05 * before[count]):
            return f"takes {row.get(count)} {what} for each matrix instruction of its loop, not {before[count]}"
    return None


def regressions(rows: Sequence[dict[str, Any]], record: dict[str, Any], compilers: dict[str, str | None]) -> list[str]:
    """Sentences about the rows that got worse, or are not on record; another compiler's work is not compared, which is told."""
    same = {name for name, version in compilers.items() if version and version == record["compilers"].get(name)}
    for name in sorted(set(compilers) - same):
        print(f"not compared: {name} (on record {record['compilers'].get(name)}, here {compilers[name]})", file=sys.stderr)
    if not same:
        return ["Nothing could be compared."]
    known = {key_of(row): row for row in record["kernels"]}
    found = []
    for row in rows:
        if row["source"] not in same:
            continue
        before = known.get(key_of(row))
        reason = "is not on record" if before is None else worse(row, before)
        if reason:
            found.append(f"{row['kernel']} on sm_{row['capability']} {reason}")
    return found


def key_of(row: dict[str, Any]) -> tuple[str, str, int]:
    """Tells a row from others."""
    return row["source"], row["kernel"], row["capability"]


def merged(record: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """`record` with what was compiled anew: in the place of its rows, or behind those of its source. All others stay."""
    rows = {key_of(row): row for row in (*record["kernels"], *result["kernels"])}
    found = {name: version for name, version in result["compilers"].items() if version}
    kernels = sorted(rows.values(), key=lambda row: row["source"] != "triton")
    return {**result, "compilers": record["compilers"] | found, "kernels": kernels}


def cell(row: dict[str, Any] | None, warps: int) -> str:
    """Registers, shared memory, occupancy and matrix instructions, for the table; its warps where they are not `warps`."""
    if row is None:
        return ""
    own = [] if row["warps"] == warps else [f"{row['warps']} warps"]
    spilled = [f"spills {row['spilled_bytes']} B"] if row["spilled_bytes"] else []
    shared = f"{row['shared_bytes'] / 1024:.0f} K"
    matrix = [f"{op} {row['per_matrix']:.1f}/{row['shared_per_matrix']:.0f}" if loops(row) else op for op in row["matrix"]]
    return ", ".join([*own, str(row["registers"]), shared, f"{row['occupancy']:.0%}", *matrix, *spilled])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a line per kernel."""
    targets = sorted({row["capability"] for row in rows})
    lines = ["| kernel | warps | instructions | 128-bit loads | " + " | ".join(f"sm_{target}" for target in targets) + " |"]
    lines.append("|---" * (4 + len(targets)) + "|")
    by_kernel: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        by_kernel.setdefault(row["kernel"], {})[row["capability"]] = row
    for name, on in by_kernel.items():
        last = on[max((target for target in on if target <= 90), default=min(on))]
        cells = " | ".join(cell(on.get(target), last["warps"]) for target in targets)
        lines.append(
            f"| {name} | {last['warps']} | {last['instructions']} | {last['loads_128']} of {last['loads']} | {cells} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Compile, print, compare and write; 1 where something got worse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="*", default=CAPABILITIES)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--source", nargs="*", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--compare", type=Path, help="a record; fail where a kernel is worse")
    parser.add_argument("--out", type=Path, help="JSON file to write; with --only, the other kernels' rows stay as they are")
    parser.add_argument("--table", type=Path, help="Markdown file whose table to replace")
    args = parser.parse_args()
    rows, compilers = [], versions(args.source)
    for name in args.source:
        for row in SOURCES[name](args.only, args.capability):
            sizes = {key: row[key] for key in ("warps", "registers", "shared_bytes")}
            rows.append({"source": name, **row, "occupancy": occupancy(row["capability"], **sizes)})
            print(line(rows[-1]), flush=True)
    result = {"benchmark": "kernels", "compilers": compilers, "kernels": rows}
    if args.only and args.out and args.out.exists():
        result = merged(json.loads(args.out.read_text(encoding="utf-8")), result)
        rows = result["kernels"]
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.table:
        text = args.table.read_text(encoding="utf-8")
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        args.table.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}", encoding="utf-8")
    found = regressions(rows, json.loads(args.compare.read_text(encoding="utf-8")), compilers) if args.compare else []
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
