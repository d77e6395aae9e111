"""What a picture would take on a device: a model from counted launches, bytes and operations, not a measurement.

    python benchmarks/roofline.py --device a100
    python benchmarks/roofline.py --device cpu --size 256 --measure --out roofline.json

The loop runs on the meta device (`counting.py`). Each launch takes the longer of its operations at the rate of its kind and of
its bytes at the memory's, and what a launch itself costs: more than the device is busy where the host can't keep up (eager), a
microsecond in a CUDA graph. A GPU's rates are assumed, from data sheets and what its vendor's libraries are known to reach;
nobody has measured them here. A CPU's are measured in the same run, and --measure compares the model with pictures drawn.
Attention is at the rate of what runs it on that CPU; a CPU's own pointwise kernels are not in the model, which counts
PyTorch's operators in their place.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import counting
import end_to_end
import measure
import products
import torch
from architecture import PRESETS
from counting import Launch, Work, stage_name

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KINDS = ("linear", "attention", "wide attention", "convolution")
RATED = ("linear", "conv2d", "attention as ops.attention runs it")  # of products.py
TOLERANCE = 0.25  # within which the model has to meet a measurement


@dataclass(frozen=True)
class Device:
    """Rates by kind in operations/s, of memory in bytes/s, of codes drawn; and seconds of the device and host for a launch."""

    name: str
    assumed: bool
    memory: float
    linear: float
    attention: float
    wide_attention: float
    convolution: float
    codes: float  # logits guided, filtered, drawn from and mixed, each second
    launch: float  # what a launch takes at least, as in a graph
    host: float  # what the host takes to launch one, eagerly
    kernels: bool = True  # the library's run
    weights: float | None = None  # bytes/s of a linear map of few rows, which reading its weights dominates; None: memory's

    def seconds(self, launch: Launch) -> float:
        """Of one launch on the device."""
        if launch.kind == "sampling":
            return max(launch.flops / self.codes, launch.nbytes / self.memory) + self.launch
        rate = getattr(self, launch.kind.replace(" ", "_"), None)
        memory = self.weights or self.memory if launch.kind == "linear" else self.memory
        return max(launch.flops / rate if rate else 0.0, launch.nbytes / memory) + self.launch


# Attainable, not peak: bf16 products of a library at large sizes, memory by copies, PyTorch's attention at head width 64.
DEVICES = {
    "a100": Device("A100 80 GB", True, 1.65e12, 235e12, 150e12, 45e12, 165e12, 4e10, 1.5e-6, 12e-6),
    "h100": Device("H100 SXM", True, 2.7e12, 620e12, 320e12, 90e12, 380e12, 8e10, 1.5e-6, 10e-6),
    "4090": Device("RTX 4090", True, 0.9e12, 150e12, 110e12, 40e12, 120e12, 5e10, 1.5e-6, 8e-6),
}


def cpu_device(dtype: torch.dtype, threads: int) -> Device:
    """Measure this CPU's rates, each at a shape of the late scales."""
    torch.set_num_threads(threads)
    with torch.inference_mode():
        rate: dict[str, float] = {}
        for name in RATED:
            function, shapes, operations = products.products()[name]
            given = [products.laid_out(torch.randn(shape).to(dtype), name) for shape in shapes]
            rate[name] = operations / products.best_seconds(lambda f=function, g=given: f(*g), 2)
        wide = [torch.randn(1, 1, 1024, 640).to(dtype) for _ in range(3)]
        seconds = products.best_seconds(lambda: torch.nn.functional.scaled_dot_product_attention(*wide), 3)
        large, other = torch.randn(1 << 25), torch.randn(1 << 25)
        added = products.best_seconds(lambda: large.add_(other), 3)
        matrices = [torch.randn(4096, 1536).to(dtype) for _ in range(24)]  # more than a cache holds
        few = torch.randn(8, 1536).to(dtype)
        read = products.best_seconds(lambda: [torch.nn.functional.linear(few, matrix) for matrix in matrices], 3)
    return Device(
        name=f"{measure.machine()['cpu']}, {threads} thread(s)",
        assumed=False,
        memory=3 * large.nbytes / added,
        linear=rate["linear"],
        attention=rate["attention as ops.attention runs it"],
        wide_attention=4 * 1024 * 1024 * 640 / seconds,
        convolution=rate["conv2d"],
        codes=codes_drawn(),
        launch=launch_seconds(dtype),
        host=0.0,
        kernels=False,
        weights=len(matrices) * matrices[0].nbytes / read,
    )


def launch_seconds(dtype: torch.dtype) -> float:
    """Seconds that an operator takes on a few numbers, Python's share included: of a norm's."""
    from hart_infer import ops
    from hart_infer.ops.registry import use_backend

    x, weight = torch.randn(2, 4, 64).to(dtype), torch.ones(64, dtype=dtype)
    with use_backend("torch"):  # a CPU's own kernel has no operators to count
        with counting.counting(kernels=False) as counter:
            ops.rms_norm(x, weight, 1e-6)
        seconds = products.best_seconds(lambda: [ops.rms_norm(x, weight, 1e-6) for _ in range(200)], 3) / 200
    return seconds / len(counter.launches)


def codes_drawn() -> float:
    """Logits a second that the CPU's sampler guides, filters, draws from and mixes."""
    from hart_infer.generation.sampling import GeneratorSampler

    stage = Work(PRESETS["256"]).schedule.stages[-2]
    logits, codebook = torch.randn(2, stage.tokens, 4096), torch.randn(4096, 32)
    sampler = GeneratorSampler([0])
    return stage.tokens * 4096 / products.best_seconds(lambda: sampler.draw(logits.clone(), codebook, stage), 3)


def predicted(found: Sequence[Launch], device: Device) -> dict[str, dict[str, float]]:
    """By stage: launches, bytes, operations, and seconds of a graph and eagerly, in the order they ran."""
    stages: dict[str, dict[str, float]] = {}
    for launch in found:
        row = stages.setdefault(launch.stage, dict.fromkeys(("launches", "nbytes", "flops", "seconds", "eager"), 0))
        seconds = device.seconds(launch)
        row["launches"] += 1
        row["nbytes"] += launch.nbytes
        row["flops"] += launch.flops if launch.kind in KINDS else 0
        row["seconds"] += seconds
        row["eager"] += max(seconds, device.host)
    return stages


def model(work: Work, device: Device) -> dict[str, Any]:
    """The prediction of one call, as written to JSON."""
    stages = predicted(counting.launches(work, kernels=device.kernels), device)
    total = {key: sum(row[key] for row in stages.values()) for key in next(iter(stages.values()))}
    return {"stages": stages, "total": total, "memory": counting.memory(work)}


def measured(args: argparse.Namespace) -> dict[str, float]:
    """Seconds by stage of pictures drawn on this CPU, the median of a few, after one that does not count."""
    checkpoint = measure.random_checkpoint(args.size, args.dtype, "none", args.cache_dir)
    with measure.Worker(end_to_end.__file__, "ours", args.threads) as worker:
        answer = worker.ask(
            "run", family="hart", checkpoint=str(checkpoint), dtype=args.dtype, device="cpu", text_encoder="none",
            images=1, guidance=4.5, repeats=args.repeats, warmup=1, threads=args.threads,
        )  # fmt: skip
    stages = {name: row["median"] for name, row in answer["stages"].items()}
    stages[stage_name(0, 1)] += stages.pop("other")  # the condition, and what a call does besides
    return {**stages, "whole": answer["seconds"]["median"]}


def report(result: dict[str, Any], device: Device, compared: dict[str, float] | None) -> str:
    """The model for people; beside a measurement where there is one."""
    kind = "rates assumed, none measured: a MODEL" if device.assumed else "rates measured here; a model of them"
    lines = [f"{device.name} ({kind})", f"{'':<18}{'launches':>9}{'GB':>8}{'TFLOP':>8}{'ms':>10}{'eager ms':>10}"]
    for name, row in (*result["stages"].items(), ("whole", result["total"])):
        line = f"{name:<18}{row['launches']:>9.0f}{row['nbytes'] / 1e9:>8.2f}{row['flops'] / 1e12:>8.2f}"
        line += f"{row['seconds'] * 1e3:>10.2f}{row['eager'] * 1e3:>10.2f}"
        if compared:
            line += f"   measured {compared[name] * 1e3:>9.1f} ms, model/measured {row['seconds'] / compared[name]:.2f}"
        lines.append(line)
    memory = ", ".join(f"{name} {measure.gigabytes(size)}" for name, size in result["memory"].items())
    return "\n".join([*lines, f"memory throughout: {memory}"])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--device", choices=(*DEVICES, "cpu"), default="a100")
    result.add_argument("--size", type=int, default=1024, choices=sorted(measure.SIZES))
    result.add_argument("--dtype", choices=DTYPES, default="bf16")
    result.add_argument("--batch", type=int, default=1)
    result.add_argument("--speed", choices=("exact", "fast", "turbo", "draft"), default="exact")
    result.add_argument("--measure", action="store_true", help="with cpu: draw pictures, and compare")
    result.add_argument("--threads", type=int, default=torch.get_num_threads())
    result.add_argument("--repeats", type=int, default=2)
    result.add_argument("--cache-dir", type=Path, default=measure.default_cache())
    result.add_argument("--out", type=Path, help="JSON file to write")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Count, predict, perhaps measure; 1 where the model is not within TOLERANCE of the measurement."""
    args = parser().parse_args(arguments)
    if args.measure and (args.device != "cpu" or args.batch != 1 or args.speed != "exact"):
        parser().error("--measure is of the CPU, one picture, speed exact")
    measure.check_out(args.out)
    device = DEVICES[args.device] if args.device in DEVICES else cpu_device(DTYPES[args.dtype], args.threads)
    work = Work(PRESETS[measure.SIZES[args.size]], DTYPES[args.dtype], args.batch, speed=args.speed)
    result = model(work, device)
    start = time.perf_counter()
    compared = measured(args) if args.measure else None
    print(report(result, device, compared))
    if args.out:
        settings = {name: getattr(args, name) for name in ("device", "size", "dtype", "batch", "speed", "threads")}
        record = {
            "benchmark": "roofline",
            "machine": measure.machine(),
            "settings": settings,
            "rates": asdict(device),
            **result,
        }
        measure.write_json(args.out, {**record, "measured": compared, "seconds_measuring": time.perf_counter() - start})
    if not compared:
        return 0
    ratio = result["total"]["seconds"] / compared["whole"]
    print(
        f"the whole: model/measured {ratio:.2f}; within {TOLERANCE:.0%} {'as asked' if abs(ratio - 1) <= TOLERANCE else 'NOT'}"
    )
    return 0 if abs(ratio - 1) <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
