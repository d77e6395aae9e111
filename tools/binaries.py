"""What a compiled kernel tells about itself: instructions, loads, and how much of a multiprocessor it fills."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]+)(.*)$", re.MULTILINE)
LABEL = re.compile(r"^\s*(\.L_x_\d+):", re.MULTILINE)
SHARED = re.compile(r"(?:LDS|STS|LDSM|STSM|LDGSTS)\b")  # through the load and store unit; HGMMA reads shared memory by itself
MATRIX = re.compile(r"(HMMA|HGMMA|IMMA|QGMMA|UTC\w*MMA)")
REGISTERS, REGISTERS_AT_ONCE, PARTITIONS = 65536, 256, 4  # of a multiprocessor; granted to a warp; schedulers
# Warps, blocks and bytes of shared memory of a multiprocessor (CUDA's programming guide, compute capabilities).
LIMITS = {80: (64, 32, 164 << 10), 86: (48, 16, 100 << 10), 89: (48, 24, 100 << 10), 90: (64, 32, 228 << 10)}
LIMITS[100] = LIMITS[90]
LIMITS[120] = (48, 24, 100 << 10)
RESERVED, SHARED_AT_ONCE = 1024, 128  # bytes of shared memory: the system's for each block; granted


def instructions(listing: str) -> dict[str, Any]:
    """Matrix instructions, loads from global memory and all instructions of a disassembled kernel."""
    counts = Counter(op for op, _ in INSTRUCTION.findall(listing))
    loads = {op: n for op, n in counts.items() if op.startswith(("LDG", "LDGSTS"))}
    return {
        "matrix": dict(sorted(Counter(match[0] for op in counts.elements() if (match := MATRIX.match(op))).items())),
        "loads_128": sum(n for op, n in loads.items() if ".128" in op),
        "loads": sum(loads.values()),
        "instructions": sum(counts.values()),
        **loop(listing),
    }


def loop(listing: str) -> dict[str, float]:
    """What the loop with the most matrix instructions does for each; {} without one.

    `per_matrix`: all its instructions. `shared_per_matrix`: bytes of shared memory that a warp's loads and stores move.
    """
    found: list[list[str]] = []
    labels: dict[str, int] = {}
    ops: list[str] = []
    for line in listing.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(ops)
        elif instruction := INSTRUCTION.match(line):
            ops.append(instruction[1])
            target = re.search(r"\.L_x_\d+", instruction[2]) if instruction[1].startswith("BRA") else None
            if target and target[0] in labels:  # backwards
                found.append(ops[labels[target[0]] :])
    if not found:
        return {}
    body = max(found, key=lambda ops: (sum(map(_is_matrix, ops)), -len(ops)))
    count = sum(map(_is_matrix, body))
    if not count:
        return {}
    shared = sum(_warp_bytes(op) for op in body if SHARED.match(op))
    return {"per_matrix": round(len(body) / count, 2), "shared_per_matrix": round(shared / count, 1)}


def _is_matrix(op: str) -> bool:
    return MATRIX.match(op) is not None


def _warp_bytes(op: str) -> int:
    """Bytes that one warp's access to shared memory moves: LDSM takes 128 for each of 1, 2 or 4 matrices, others by width."""
    if op.startswith(("LDSM", "STSM")):
        return 128 * int(op.rsplit(".", 1)[1]) if op[-1] in "24" else 128
    width = re.search(r"\.(8|16|64|128)\b|\.[US](8|16)\b", op)
    return 4 * int((width[1] or width[2]) if width else 32)


def occupancy(capability: int, *, warps: int, registers: int, shared_bytes: int) -> float:
    """Share of a multiprocessor's warps that blocks of so many `warps` can occupy together."""
    most_warps, most_blocks, shared = LIMITS[capability]
    of_a_warp = -(-registers * 32 // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    held = REGISTERS // PARTITIONS // of_a_warp * PARTITIONS  # warps whose registers there are
    of_a_block = -(-(shared_bytes + RESERVED) // SHARED_AT_ONCE) * SHARED_AT_ONCE
    blocks = min(most_blocks, most_warps // warps, held // warps, shared // of_a_block)
    return blocks * warps / most_warps
