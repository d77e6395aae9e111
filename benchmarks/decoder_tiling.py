"""What decoding in tiles saves in memory and costs in quality: the same latents decoded whole and in tiles.

    python benchmarks/decoder_tiling.py --size 1024 --dtype bf16 --tiles 32 16 --out benchmarks/results/decoder_tiling.json

Latents are the encoder's of a synthetic picture (gradients, discs, stripes). Each way runs in a process of its own, so that the
peaks are its alone. With random weights (the default checkpoint) the quality cost is that of random group norms, not of a
trained decoder: `--checkpoint` takes a trained one.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure
import torch


def synthetic_picture(size: int) -> torch.Tensor:
    """A picture [1, 3, size, size] in 0..1 with smooth and sharp parts in every tile."""
    axis = torch.linspace(0, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    discs = (torch.sin(12 * math.pi * x) * torch.sin(12 * math.pi * y) > 0.5).float()
    stripes = (torch.sin(80 * math.pi * (x + y)) > 0).float() * (y > 0.5)
    return torch.stack([x, 0.5 * y + 0.5 * discs, 0.7 * (1 - x) + 0.3 * stripes])[None]


def handle(request: dict[str, Any]) -> dict[str, Any]:
    """Worker: load, encode the picture, decode it one way; the result goes to a file."""
    from hart_infer import HartPipeline

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[request["dtype"]]
    pipe = HartPipeline.from_pretrained(request["checkpoint"], text_encoder=False, torch_dtype=dtype, device=request["device"])
    del pipe.transformer
    device, autoencoder = torch.device(request["device"]), pipe.autoencoder
    with torch.inference_mode():
        latent = autoencoder.encode_latent(synthetic_picture(request["size"]).to(device) * 2 - 1)
        before = measure.resident_bytes() or 0
        measure.reset_peak(device)
        start = time.perf_counter()
        picture = autoencoder.decode(latent, tile=request["tile"])
        measure.synchronize(device)
        seconds = time.perf_counter() - start
    torch.save(picture.cpu(), request["result"])
    return {"seconds": seconds, "peak_bytes": measure.peak_bytes(device), "resident_before_bytes": before}


def decode_in_process(request: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
    """Figures and picture of one way of decoding, from a fresh process."""
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        with measure.Worker(__file__, "decode", torch.get_num_threads()) as worker:
            figures = worker.ask("decode", **request, result=file.name)
        return figures, torch.load(file.name, weights_only=True)


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Decode whole and in every tile size; distances are against whole."""
    checkpoint = arguments.checkpoint or measure.random_checkpoint(arguments.size, arguments.dtype, "none", arguments.cache_dir)
    request = {
        "checkpoint": str(checkpoint), "size": arguments.size, "dtype": arguments.dtype, "device": arguments.device
    }  # fmt: skip
    whole, reference = decode_in_process({**request, "tile": None})
    rows = [{"tile": None, **whole}]
    for tile in arguments.tiles:
        figures, picture = decode_in_process({**request, "tile": tile})
        error = (picture - reference) / 2  # in 0..1
        psnr = -10 * torch.log10(error.square().mean()).item()
        rows.append({"tile": tile, **figures, "psnr_db": psnr, "largest_difference": error.abs().max().item()})
    settings = {**request, "checkpoint": checkpoint.name}  # not where it lies
    return {"settings": settings, "weights": "random" if arguments.checkpoint is None else "given", "rows": rows}


def main() -> int:
    """Parse, run, print and write."""
    if "--worker" in sys.argv:
        return measure.serve(handle)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiles", type=int, nargs="+", default=[32, 16], help="in latent cells")
    parser.add_argument("--checkpoint", type=Path, help="a trained one; random weights otherwise")
    parser.add_argument("--cache-dir", type=Path, default=measure.default_cache())
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    measure.check_out(arguments.out)
    result = {**compare(arguments), "machine": measure.machine(arguments.device)}
    for row in result["rows"]:
        quality = f", {row['psnr_db']:.1f} dB against whole" if "psnr_db" in row else ""
        print(f"tile {row['tile'] or 'whole'}: peak {measure.gigabytes(row['peak_bytes'])}, {row['seconds']:.1f} s{quality}")
    if arguments.out:
        measure.write_json(arguments.out, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
