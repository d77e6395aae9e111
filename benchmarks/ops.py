"""Time every operation by every backend that takes it, at the shapes of a model's last scale.

    python benchmarks/ops.py --model hart-mini
    python benchmarks/ops.py --model released --device cuda --dtype bf16 --out benchmarks/results/ops_released_bf16.json

Every operation of `hart_infer.ops` is declared here once: its inputs, and its arithmetic where that is what limits it. The
bytes that must move are those of its tensors, inputs and outputs each once. A GPU in `PEAKS` also gets the share of its
roofline: the least time that these bytes and operations could take over the time measured. A CPU has the reference alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import torch
from architecture import PRESETS, preset_config
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Vendors' data sheets: bytes/s of memory, dense 16-bit tensor-core and plain fp32 operations/s.
PEAKS = {
    "A100-SXM4-80GB": (2.039e12, 312e12, 19.5e12),
    "A100-SXM4-40GB": (1.555e12, 312e12, 19.5e12),
    "H100 80GB HBM3": (3.35e12, 989e12, 67e12),
    "H200": (4.8e12, 989e12, 67e12),
    "L4": (0.3e12, 121e12, 30.3e12),
    "RTX 4090": (1.008e12, 165e12, 82.6e12),
}
EPS = 1e-6
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Shapes:
    """What a model's last scale looks like to an operation; two rows, one per guidance half."""

    heads: int
    head_dim: int
    side: int  # of the last scale
    keys: int  # context and all scales
    mlp: int
    diffusion_width: int
    codes: int
    channels: int
    decoder_channels: int
    image: int
    norm_groups: int
    rows: int = 2

    @property
    def tokens(self) -> int:
        """Of the last scale."""
        return self.side**2

    @property
    def width(self) -> int:
        """Of the transformer."""
        return self.heads * self.head_dim


MODELS = ("hart-mini", "released")


def shapes_of(model: str) -> Shapes:
    """From the embedded model's configuration, or the published architecture's."""
    from hart_infer.checkpoints.hart import inspect_checkpoint
    from hart_infer.generation.schedule import hart_schedule
    from hart_infer.models.hart import HartConfig
    from hart_infer.models.parts.autoencoder import AutoencoderConfig

    if model == "released":
        transformer, autoencoder = (preset_config(PRESETS["1024"], kind) for kind in (HartConfig, AutoencoderConfig))
    else:
        found = inspect_checkpoint(model)
        transformer, autoencoder = found.transformer, found.autoencoder
    schedule = hart_schedule(
        transformer.patch_nums,
        context_tokens=transformer.context_token,
        share_quant_resi=autoencoder.share_quant_resi,
    )
    return Shapes(
        heads=transformer.num_heads,
        head_dim=transformer.head_dim,
        side=transformer.patch_nums[-1],
        keys=schedule.scratch_length,
        mlp=transformer.mlp_dim,
        diffusion_width=transformer.diff_width,
        codes=autoencoder.vocab_size,
        channels=autoencoder.z_channels,
        decoder_channels=autoencoder.ch,
        image=transformer.patch_nums[-1] * autoencoder.downsample,
        norm_groups=autoencoder.norm_groups,
    )


class Inputs:
    """Random tensors on a device, in a dtype."""

    def __init__(self, shapes: Shapes, device: str, dtype: torch.dtype) -> None:
        """The same numbers every time."""
        self.shapes, self.device, self.dtype = shapes, device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal."""
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype or self.dtype)

    def tokens(self) -> Tensor:
        """Hidden states [R, L, D]."""
        return self(self.shapes.rows, self.shapes.tokens, self.shapes.width)


def attention(x: Inputs) -> Call:
    """The last scale's queries over all keys."""
    s = x.shapes
    q, k, v = (x(s.rows, s.heads, n, s.head_dim) for n in (s.tokens, s.keys, s.keys))
    return (q, k, v), {"scale": 0.25 * s.head_dim**-0.5}


def rope_cache(x: Inputs) -> Call:
    """Into the last scale's place in the cache."""
    s = x.shapes
    cos, sin = (x(s.rows, 1, s.tokens, s.head_dim) for _ in range(2))
    cache = x(2, s.rows, s.heads, s.keys, s.head_dim)[:, :, :, -s.tokens :]
    return (x(s.rows, s.tokens, 3, s.heads, s.head_dim), cos, sin, *cache), {}


def swiglu(x: Inputs) -> Call:
    """The MLP's gate."""
    shape = (x.shapes.rows, x.shapes.tokens, x.shapes.mlp)
    return (x(*shape), x(*shape)), {}


def gelu_tanh(x: Inputs) -> Call:
    """Between the maps of a GeluMLP."""
    return (x(x.shapes.rows, x.shapes.tokens, x.shapes.mlp),), {}


def _weight(x: Inputs) -> Tensor:
    return x(x.shapes.width)


def rms_norm(x: Inputs) -> Call:
    """Before attention, where nothing was added yet."""
    return (x.tokens(), _weight(x), EPS), {}


def add_rms_norm(x: Inputs) -> Call:
    """Before the MLP."""
    return (x.tokens(), x.tokens(), _weight(x), EPS), {}


def rms_norm_modulate(x: Inputs) -> Call:
    """Before the head; one scale and shift per row."""
    row = x(x.shapes.rows, 1, x.shapes.width)
    return (x.tokens(), _weight(x), row, row, EPS), {}


def rms_norm_quantized(x: Inputs) -> Call:
    """The norm in int8."""
    return (x.tokens(), _weight(x), EPS, torch.int8), {}


def _diffusion_rows(x: Inputs, count: int) -> list[Tensor]:
    shape = (x.shapes.rows * x.shapes.tokens, x.shapes.diffusion_width)
    return [x(*shape) for _ in range(count)]


def layer_norm_modulate(x: Inputs) -> Call:
    """The residual diffusion's first norm."""
    rows, scale, shift = _diffusion_rows(x, 3)
    weight, bias = (x(x.shapes.diffusion_width) for _ in range(2))
    return (rows, weight, bias, scale, shift, EPS), {}


def gated_layer_norm_modulate(x: Inputs) -> Call:
    """Its later norms."""
    rows, update, gate, scale, shift = _diffusion_rows(x, 5)
    weight, bias = (x(x.shapes.diffusion_width) for _ in range(2))
    return (rows, update, gate, weight, bias, scale, shift, EPS), {}


def _settings(x: Inputs) -> Tensor:
    """The last scale's."""
    from hart_infer.ops import draw_settings

    return draw_settings(guidance=4.5, logit_gain=1.9, temperature=0.03, top_k=300).to(x.device)


def diffusion_step(x: Inputs) -> Call:
    """One step behind its network, guided."""
    from hart_infer.generation.residual import diffusion_schedule

    step = dataclasses.asdict(diffusion_schedule(8)[0])
    del step["timestep"]
    count, channels = x.shapes.tokens, x.shapes.channels
    now, noise = (x(count, channels, dtype=torch.float32) for _ in range(2))
    eps, variance = (x(2 * count, channels, dtype=torch.float32) for _ in range(2))
    return (now, eps, variance, noise, _settings(x)), step


def guided_sample(x: Inputs) -> Call:
    """The last scale's codes, guided, top-k 300, mixed."""
    s = x.shapes
    logits, codebook = x(2, s.tokens, s.codes, dtype=torch.float32), x(s.codes, s.channels, dtype=torch.float32)
    seeds, offset = (torch.tensor([n], device=x.device) for n in (7, 0))
    return (logits, codebook, seeds, offset, _settings(x)), {"top_k": True, "top_p": False, "more_smooth": True}


def drop_unlikely(x: Inputs) -> Call:
    """The last scale's logits by top-k and top-p."""
    return (x(1, x.shapes.tokens, x.shapes.codes, dtype=torch.float32), 600, 0.96), {}


def exponential(x: Inputs) -> Call:
    """As many as the last scale takes; on the CPU, whatever the device."""
    return (torch.Generator().manual_seed(7).get_state(), x.shapes.tokens * x.shapes.codes), {}


def normal_noise(x: Inputs) -> Call:
    """The residual diffusion's of one step."""
    seeds = torch.tensor([7], device=x.device)
    return (seeds,), {"step": 1, "tokens": x.shapes.tokens, "channels": x.shapes.channels}


def group_norm_silu(x: Inputs) -> Call:
    """The decoder's last level."""
    s = x.shapes
    layout = torch.contiguous_format if x.dtype == torch.float32 else torch.channels_last
    picture = x(1, s.decoder_channels, s.image, s.image).contiguous(memory_format=layout)
    return (picture, x(s.decoder_channels), x(s.decoder_channels), s.norm_groups, EPS), {}


def int8_linear(x: Inputs) -> Call:
    """An MLP's first map."""
    from hart_infer.ops.int8_linear import pack_int8

    s = x.shapes
    levels = torch.randint(-127, 128, (s.mlp, s.width), generator=x.generator, device=x.device, dtype=torch.int8)
    scale = x(s.mlp, dtype=torch.float32).abs()
    return (x.tokens(), pack_int8(levels), scale, levels.sum(dim=1, dtype=torch.int32), x(s.mlp)), {}


CASES: dict[str, Callable[[Inputs], Call]] = {
    case.__name__: case
    for case in (
        attention, rope_cache, swiglu, gelu_tanh, rms_norm, add_rms_norm, rms_norm_modulate, rms_norm_quantized,
        layer_norm_modulate, gated_layer_norm_modulate, diffusion_step, guided_sample, drop_unlikely, exponential,
        normal_noise, group_norm_silu, int8_linear,
    )
}  # fmt: skip


OVERWRITING = {"drop_unlikely", "exponential"}  # what writes over its first argument gets a copy of it in every timed call


def operations_of(name: str, s: Shapes) -> float:
    """Multiplications and additions, where they and not the bytes may be the limit."""
    return 4.0 * s.rows * s.heads * s.tokens * s.keys * s.head_dim if name == "attention" else 0.0


def bytes_of(call: Call, result: Any) -> int:
    """Of all tensors in and out, each once."""
    outputs = result if isinstance(result, tuple) else (result,)
    return sum(x.nbytes for x in (*call[0], *call[1].values(), *outputs) if isinstance(x, Tensor))


def timed(function: Callable[[], Any], device: str, seconds: float) -> list[float]:
    """Seconds of each of many calls; on CUDA by events, with the L2 cache emptied between."""
    start = time.perf_counter()
    function()
    measure.synchronize(torch.device(device))
    if not seconds:
        return [time.perf_counter() - start]
    if device.startswith("cuda"):
        from triton.testing import do_bench

        return [t / 1e3 for t in do_bench(function, warmup=25, rep=int(seconds * 1e3), return_mode="all")]
    times: list[float] = []
    while not times or sum(times) < seconds:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per operation and backend."""
    from hart_infer.errors import BackendError
    from hart_infer.ops.registry import BACKENDS, OPS, REFERENCE, use_backend

    inputs = Inputs(shapes_of(args.model), args.device, DTYPES[args.dtype])
    device = measure.machine(args.device)["device"]
    peaks = next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device)), None)
    for name, case in CASES.items():
        if args.only not in name:
            continue
        call = case(inputs)
        run = functools.partial(OPS[name], *call[0], **call[1])
        if name in OVERWRITING:
            run = functools.partial(lambda op, x, *rest: op(x.clone(), *rest), OPS[name], *call[0])
        for backend in (b for b in BACKENDS if b == REFERENCE or b in OPS[name].backends):
            try:
                with torch.inference_mode(), use_backend(backend):
                    moved, times = bytes_of(call, run()), timed(run, args.device, args.seconds)
            except BackendError:
                continue
            row = {"op": name, "backend": backend, "seconds": measure.spread(times), "calls": len(times), "bytes": moved}
            if peaks:
                flops = peaks[2] if args.dtype == "fp32" else peaks[1]
                least = max(moved / peaks[0], operations_of(name, inputs.shapes) / flops)
                row["roofline_share"] = least / row["seconds"]["median"]
            yield row


def main(arguments: list[str] | None = None) -> int:
    """Time, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="hart-mini")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--only", default="", help="operations whose name contains this")
    parser.add_argument("--seconds", type=float, default=0.3, help="of each operation and backend; 0 is two calls")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    measure.check_out(args.out)
    found = []
    for row in rows(args):
        found.append(row)
        seconds, share = row["seconds"], row.get("roofline_share")
        print(
            f"{row['op']:<28}{row['backend']:<8}{seconds['median'] * 1e3:10.4f} ms "
            f"({seconds['p20'] * 1e3:.4f} to {seconds['p80'] * 1e3:.4f})  {row['bytes'] / 1e6:10.2f} MB"
            + (f"  {share:.0%} of the roofline" if share else ""),
            flush=True,
        )
    if args.out:
        settings = {"model": args.model, "device": args.device, "dtype": args.dtype}
        result = {"benchmark": "ops", "machine": measure.machine(args.device), "settings": settings, "ops": found}
        measure.write_json(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
