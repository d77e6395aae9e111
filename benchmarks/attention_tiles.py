"""Time the attention kernel's tiles on a GPU, beside PyTorch's own, and write the winners into kernels/attention.py.

    python benchmarks/attention_tiles.py --write --out attention_tiles.json

For each head width and number of queries: every candidate that compiles and fits the shared memory, over all keys and over
ranges, by `triton.testing.do_bench`. The winner of a width is the tile with the least time over the late scales' shapes
together. A row in TIMED names the GPU; where ours beats PyTorch's, `DEFAULTS` in hart_infer/ops/attention.py has to change by
hand.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import torch

KERNEL = Path(__file__).resolve().parents[1] / "kernels" / "attention.py"
ROW = re.compile(r"\(\((\d+),\), \d+, (\d+), \d+, Config")  # capability and width
TIMED = re.compile(r"^TIMED: (.*?) = \((.*?)\)\n(?=CONFIGS)", re.MULTILINE | re.DOTALL)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Rows of guidance, heads, queries, keys: the released model's at 64, 48, 36 and 16, and its first scales.
LATE = ((2, 4096, 9750), (2, 2304, 5654), (2, 1296, 3350), (2, 256, 823))
EARLY = ((2, 4, 304), (2, 49, 399))


@dataclass(frozen=True)
class Timing:
    """Seconds of one shape by one tile, or by PyTorch's own where `tile` is None."""

    head_dim: int
    rows: int
    queries: int
    keys: int
    ranged: bool
    tile: tuple[int, int, int, int] | None  # queries, keys, warps, stages
    seconds: float


def candidates(queries: int) -> Iterator[tuple[int, int, int, int]]:
    """Tiles worth trying."""
    heights = (64, 128) if queries >= 64 else (16, 32)
    for height in heights:
        for width in (32, 64, 128):
            for warps in (4, 8):
                for stages in (2, 3, 4):
                    yield height, width, warps, stages


def best(timings: Sequence[Timing], head_dim: int, shapes: Sequence[tuple[int, int, int]]) -> tuple[int, int, int, int] | None:
    """The tile with the least time over all shapes of a head width, ranges included; None if none ran all of them."""
    sums: dict[tuple[int, int, int, int], list[float]] = {}
    for timing in timings:
        if timing.tile and timing.head_dim == head_dim and (timing.rows, timing.queries, timing.keys) in shapes:
            sums.setdefault(timing.tile, []).append(timing.seconds)
    whole = {tile: sum(found) for tile, found in sums.items() if len(found) == 2 * len(shapes)}
    return min(whole, key=lambda tile: whole[tile]) if whole else None


def row(capability: int, head_dim: int, queries: int, tile: tuple[int, int, int, int]) -> str:
    """A row of TIMED."""
    height, width, warps, stages = tile
    return f"    (({capability},), 2, {head_dim}, {queries}, Config({height}, {width}, warps={warps}, stages={stages})),"


def place(text: str) -> tuple[int, int]:
    """Capability and width of a row."""
    found = ROW.search(text)
    assert found is not None
    return int(found[1]), int(found[2])


def written(source: str, rows: Sequence[str], gpu: str) -> str:
    """The kernel's source with `rows` in TIMED, narrow ones first, as the first that fits is taken.

    They replace those of their GPU and width; all others stay.
    """
    found = TIMED.search(source)
    if found is None:
        raise measure.BenchmarkError(f"{KERNEL.name} has no TIMED table in front of CONFIGS")
    replaced = {place(text) for text in rows}
    kept = [text for text in found[2].split("\n") if ROW.search(text) and place(text) not in replaced]
    body = "\n".join(sorted([*kept, *(f"{text}  # {gpu}" for text in rows)], key=lambda text: place(text)[1]))
    return f"{source[: found.start()]}TIMED: {found[1]} = (\n{body}\n)\n{source[found.end() :]}"


def sweep(
    head_dim: int, shape: tuple[int, int, int], dtype: torch.dtype, bench: Callable[[Callable[[], Any]], float]
) -> Iterator[Timing]:
    """Yield the timings of one shape."""
    from hart_infer import ops
    from hart_infer.ops.registry import use_backend

    kernel = importlib.import_module("hart_infer.kernels.attention")
    rows, queries, keys = shape
    heads = 1536 // head_dim
    q, k, v = (torch.randn(rows, heads, n, head_dim, device="cuda", dtype=dtype) for n in (queries, keys, keys))
    ranges = [0, 1, keys // 4, keys]
    options: dict[bool, dict[str, Any]] = {False: {"scale": 0.03}, True: {"scale": 0.03, "ranges": ranges, "multiplicity": 300}}
    with use_backend("torch"):
        yield Timing(head_dim, *shape, False, None, bench(lambda: ops.attention(q, k, v, scale=0.03)))
    chosen = kernel.CONFIGS
    try:
        for tile in candidates(queries):
            kernel.CONFIGS = (((), 4, 128, 0, kernel.Config(tile[0], tile[1], warps=tile[2], stages=tile[3])),)
            for ranged in (False, True):
                try:
                    with use_backend("triton"):
                        seconds = bench(lambda given=options[ranged]: ops.attention(q, k, v, **given))
                except Exception as error:  # too much shared memory, or a tile that Triton can't compile
                    print(f"  {tile}: {str(error).splitlines()[0]}", file=sys.stderr)
                    break
                yield Timing(head_dim, *shape, ranged, tile, seconds)
    finally:
        kernel.CONFIGS = chosen


def main(arguments: list[str] | None = None) -> int:
    """Time, print, perhaps write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--write", action="store_true", help="write the winners into kernels/attention.py")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: a sweep of attention's tiles needs a CUDA device, and there is none", file=sys.stderr)
        return 1
    from triton.testing import do_bench

    measure.check_out(args.out)
    major, minor = torch.cuda.get_device_capability()
    timings: list[Timing] = []
    rows = []
    for head_dim in args.head_dim:
        for shapes, least in ((LATE, 64), (EARLY, 0)):
            for shape in shapes:
                found = list(sweep(head_dim, shape, DTYPES[args.dtype], lambda run: do_bench(run, return_mode="median") / 1e3))
                timings += found
                ours = [t for t in found if t.tile and not t.ranged]
                first = min(ours, key=lambda t: t.seconds) if ours else None
                print(f"d {head_dim} {shape}: PyTorch {found[0].seconds * 1e6:.0f} us, best of ours {first}", flush=True)
            tile = best(timings, head_dim, shapes)
            rows += [row(10 * major + minor, head_dim, least, tile)] if tile else []
    print("\n".join(rows))
    if args.out:
        record = {"benchmark": "attention_tiles", "machine": measure.machine("cuda"), "rows": rows}
        measure.write_json(args.out, {**record, "timings": [vars(timing) for timing in timings]})
    if args.write:
        gpu = torch.cuda.get_device_name()
        KERNEL.write_text(written(KERNEL.read_text(encoding="utf-8"), rows, gpu), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
