"""Rates of a CPU's matrix products, convolutions and attention, by dtype: as they are, and widened to fp32 and rounded once.

    python benchmarks/products.py --threads 1 --out benchmarks/results/products_epyc_avx512_bf16.json

`hart_infer/ops/precision.py` chooses between the two by what a CPU can do, and its table rests on such records. The shapes are
the released model's at 1024px: an MLP's matrix at the last scale but one, that scale's attention, the decoder's widest level.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
import torch.nn.functional as F
from architecture import PRESETS
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RELEASED = PRESETS["1024"]
Product = Callable[..., Tensor]


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, chunk: int = 128) -> Tensor:
    """Attention as two products and a softmax for `chunk` queries at a time: what PyTorch does without a fused kernel."""
    scores = ((part @ k.transpose(-1, -2)).mul_(scale) for part in q.split(chunk, dim=2))
    return torch.cat([score.softmax(dim=-1) @ v for score in scores], dim=2)


def products() -> dict[str, tuple[Product, list[tuple[int, ...]], float]]:
    """By name: the function, its arguments' shapes, and its floating-point operations."""
    from hart_infer import ops
    from hart_infer.generation.schedule import hart_schedule

    schedule = hart_schedule(RELEASED.patch_nums, context_tokens=RELEASED.context_token, share_quant_resi=4)
    stage = schedule.stages[-2]
    rows, width, hidden = 2 * stage.length, RELEASED.embed_dim, RELEASED.mlp_dim
    heads, head_dim = RELEASED.num_heads, RELEASED.embed_dim // RELEASED.num_heads
    keys = stage.offset + stage.length
    channels, image = RELEASED.ch, RELEASED.size // 4
    shapes = [(1, heads, stage.length, head_dim), *[(1, heads, keys, head_dim)] * 2]
    scale, operations = 0.25 / head_dim**0.5, 4 * heads * stage.length * keys * head_dim
    return {
        "linear": (F.linear, [(rows, width), (hidden, width), (hidden,)], 2 * rows * width * hidden),
        "conv2d": (
            lambda x, weight, bias: F.conv2d(x, weight, bias, padding=1),
            [(1, channels, image, image), (channels, channels, 3, 3), (channels,)],
            2 * image**2 * channels**2 * 9,
        ),
        "attention": (
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=scale),
            shapes,
            operations,
        ),
        "attention, 128 queries at a time": (lambda q, k, v: chunked_attention(q, k, v, scale=scale), shapes, operations),
        "attention as ops.attention runs it": (lambda q, k, v: ops.attention(q, k, v, scale=scale), shapes, operations),
    }


def laid_out(x: Tensor, product: str) -> Tensor:
    """Channels last for a convolution in half precision, as the autoencoder has it."""
    suits = product == "conv2d" and x.ndim == 4 and x.dtype != torch.float32
    return x.contiguous(memory_format=torch.channels_last) if suits else x


def best_seconds(run: Callable[[], object], repeats: int) -> float:
    """The shortest of several runs after one that does not count: what the CPU can do, undisturbed."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def rates(dtypes: list[str], repeats: int) -> dict[str, dict[str, float]]:
    """GFLOP/s by product, and by dtype and way."""
    found: dict[str, dict[str, float]] = {}
    for name, (function, shapes, operations) in products().items():
        found[name] = {}
        for dtype in dtypes:
            arguments = [laid_out(torch.randn(shape).to(DTYPES[dtype]), name) for shape in shapes]
            seconds = best_seconds(lambda f=function, a=arguments: f(*a), repeats)
            found[name][dtype] = operations / seconds / 1e9
            if dtype != "fp32":
                seconds = best_seconds(
                    lambda f=function, a=arguments, d=dtype: f(*(x.float() for x in a)).to(DTYPES[d]), repeats
                )
                found[name][f"{dtype} widened"] = operations / seconds / 1e9
            print(f"{name:<34} {dtype}: {found[name][dtype]:.0f} GFLOP/s", file=sys.stderr, flush=True)
    return found


def main() -> int:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description="Rates of a CPU's products, by dtype.")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args()
    measure.check_out(args.out)
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        found = rates(args.dtype, args.repeats)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    result: dict[str, Any] = {
        "benchmark": "products",
        "machine": measure.machine(),
        "instructions": sorted(name for name, has in capabilities.items() if has is True),
        "threads": args.threads,
        "gflops": found,
    }
    if args.out:
        measure.write_json(args.out, result)
    columns = list(dict.fromkeys(way for ways in found.values() for way in ways))
    print(f"GFLOP/s, {args.threads} thread(s) of {result['machine']['cpu']}")
    print(f"{'':<34}" + "".join(f"{column:>14}" for column in columns))
    for name, ways in found.items():
        print(f"{name:<34}" + "".join(f"{ways[column]:>14.0f}" for column in columns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
