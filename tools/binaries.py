"""What a compiled kernel tells about itself: instructions, loads, and how much of a multiprocessor it fills."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Za-z0-9_.]+)", re.MULTILINE)
MATRIX = re.compile(r"(HMMA|HGMMA|IMMA|QGMMA|UTC\w*MMA)")
REGISTERS, REGISTERS_AT_ONCE, PARTITIONS = 65536, 256, 4  # of a multiprocessor; granted to a warp; schedulers
# Warps, blocks and bytes of shared memory of a multiprocessor (CUDA's programming guide, compute capabilities).
LIMITS = {80: (64, 32, 164 << 10), 86: (48, 16, 100 << 10), 89: (48, 24, 100 << 10), 90: (64, 32, 228 << 10)}
LIMITS[100] = LIMITS[90]
RESERVED, SHARED_AT_ONCE = 1024, 128  # bytes of shared memory: the system's for each block; granted


def instructions(listing: str) -> dict[str, Any]:
    """Matrix instructions, loads from global memory and all instructions of a disassembled kernel."""
    counts = Counter(INSTRUCTION.findall(listing))
    loads = {op: n for op, n in counts.items() if op.startswith(("LDG", "LDGSTS"))}
    return {
        "matrix": dict(sorted(Counter(match[0] for op in counts.elements() if (match := MATRIX.match(op))).items())),
        "loads_128": sum(n for op, n in loads.items() if ".128" in op),
        "loads": sum(loads.values()),
        "instructions": sum(counts.values()),
    }


def occupancy(capability: int, *, warps: int, registers: int, shared_bytes: int) -> float:
    """Share of a multiprocessor's warps that blocks of so many `warps` can occupy together."""
    most_warps, most_blocks, shared = LIMITS[capability]
    of_a_warp = -(-registers * 32 // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    held = REGISTERS // PARTITIONS // of_a_warp * PARTITIONS  # warps whose registers there are
    of_a_block = -(-(shared_bytes + RESERVED) // SHARED_AT_ONCE) * SHARED_AT_ONCE
    blocks = min(most_blocks, most_warps // warps, held // warps, shared // of_a_block)
    return blocks * warps / most_warps
