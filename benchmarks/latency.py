"""Latency and memory on a GPU, in one command: batches, CUDA graphs against eager, speed modes, stages.

    python benchmarks/latency.py --out latency.json
    python benchmarks/latency.py --official official-hart      # the released code beside it
    python benchmarks/latency.py --model mit-han-lab/hart-0.7b-1024px --batch 1 2 4 8 16

Weights are random unless --model names a checkpoint; pictures take encoded prompts, so the text encoder is not in the times.
A time is one call by CUDA events, from its first launch to its pictures as uint8 on the host; on a CPU by the clock. Each
configuration is warmed up (compiled, captured) first. They are timed one after the other, so a device that heats up slows the
later ones. One that does not fit the memory is listed as such.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import end_to_end
import measure
import torch

WARMUP = 3  # eager, captured, replayed


@dataclass(frozen=True)
class Configuration:
    """How pictures are drawn: one row of the table."""

    batch: int
    speed: str
    graphs: bool

    def __str__(self) -> str:
        """For people."""
        return f"batch {self.batch:<3}{self.speed:<6} {'graphs' if self.graphs else 'eager'}"


def configurations(batches: list[int], speeds: list[str], device: torch.device) -> Iterator[Configuration]:
    """All of them: graphs only where there are any, speed modes of the first batch alone."""
    for batch in batches:
        for speed in speeds if batch == batches[0] else speeds[:1]:
            yield Configuration(batch, speed, False)
            if device.type == "cuda":
                yield Configuration(batch, speed, True)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50 and p95, interpolated."""
    found = torch.quantile(torch.tensor(seconds, dtype=torch.float64), torch.tensor([0.5, 0.95], dtype=torch.float64))
    return {"p50": found[0].item(), "p95": found[1].item()}


class Runner:
    """One pipeline, drawing by any configuration."""

    def __init__(self, pipe: Any) -> None:
        self.pipe, self.given = pipe, end_to_end.inputs("hart", pipe)

    def call(self, how: Configuration, seed: int) -> Callable[[], object]:
        """Prepare a call; `graphs` is switched outside of the time."""
        if how.graphs and self.pipe.engine.graphs is None:
            self.pipe.enable_graphs()
        elif not how.graphs:
            self.pipe.disable_graphs()
        arguments = self.given | {"num_images_per_prompt": how.batch, "speed": how.speed, "reproducible": False}
        return lambda: self.pipe(seed=seed, **arguments)

    def measure(self, how: Configuration, repeats: int) -> dict[str, Any]:
        """Warm up, time, and note the peak."""
        device = self.pipe.device
        row: dict[str, Any] = {"batch": how.batch, "speed": how.speed, "graphs": how.graphs}
        try:
            for seed in range(WARMUP if device.type == "cuda" else 1):
                self.call(how, seed)()
            measure.reset_peak(device)
            seconds = [timed(self.call(how, seed), device) for seed in range(repeats)]
        except (torch.OutOfMemoryError, MemoryError) as error:
            self.pipe.disable_graphs()
            gc.collect()
            return row | {"error": f"out of memory: {str(error).splitlines()[0]}"}
        return row | {"seconds": percentiles(seconds), "all": seconds, "peak_bytes": measure.peak_bytes(device)}


def work(request: dict[str, Any]) -> dict[str, Any]:
    """In the worker: load once, run every configuration and, eagerly, the stages of one picture."""
    torch.set_num_threads(request["threads"])
    pipe, loading = end_to_end.load("hart", request["checkpoint"], request["dtype"], request["device"], "none")
    pipe.set_progress_bar_config(disable=True)
    runner, rows = Runner(pipe), []
    for how in configurations(request["batch"], request["speed"], pipe.device):
        rows.append(runner.measure(how, request["repeats"]))
        print(line(rows[-1]), flush=True)
    pipe.disable_graphs()
    clock = end_to_end.StageClock(pipe)  # for good: nothing is timed behind it
    runs = [clock.run(seed=seed, **runner.given)[1] for seed in range(3)][1:]
    stages = {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}
    return {"load": loading, "size": pipe.sizes[0], "rows": rows, "stages": stages}


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    name = str(Configuration(row["batch"], row["speed"], row["graphs"]))
    if "error" in row:
        return f"{name:<24}{row['error']}"
    p50, p95 = row["seconds"]["p50"], row["seconds"]["p95"]
    return (
        f"{name:<24}p50 {p50 * 1e3:9.1f} ms  p95 {p95 * 1e3:9.1f} ms  {row['batch'] / p50:7.2f} pictures/s  "
        f"peak {measure.gigabytes(row['peak_bytes'])}"
    )


def report(result: dict[str, Any]) -> str:
    """The table, and the stages of one picture."""
    settings = result["settings"]
    lines = [f"{result['size']}px, {settings['dtype']} on {result['machine']['device']}, {settings['checkpoint']}"]
    lines += [line(row) for row in result["rows"]]
    lines += [
        f"  {name:<18}{seconds * 1e3:9.2f} ms, eager, the device waited for" for name, seconds in result["stages"].items()
    ]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--model", help="a checkpoint; without it random weights of --size")
    result.add_argument("--size", type=int, default=1024, choices=sorted(measure.SIZES))
    result.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="bf16")
    result.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    result.add_argument("--batch", type=measure.one_or_more, nargs="+", default=[1, 2, 4, 8, 16])
    result.add_argument("--speed", nargs="+", default=["exact", "fast", "turbo", "draft"], help="the first is every batch's")
    result.add_argument("--repeats", type=measure.one_or_more, default=20)
    result.add_argument("--threads", type=int, default=torch.get_num_threads())
    result.add_argument("--official", metavar="CHECKOUT", help="the released code, timed beside ours by against_official.py")
    result.add_argument("--cache-dir", type=Path, default=measure.default_cache())
    result.add_argument("--out", type=Path, help="JSON file to write")
    return result


def against_official(args: argparse.Namespace) -> int:
    """Run `against_official.py`, which writes beside --out."""
    script = Path(__file__).with_name("against_official.py")
    command = [sys.executable, str(script), "--official", args.official, "--size", str(args.size), "--dtype", args.dtype]
    command += ["--device", args.device, "--cache-dir", str(args.cache_dir)]
    if args.out:
        command += ["--out", str(args.out.with_name(f"{args.out.stem}_against_official.json"))]
    return subprocess.run(command, check=False).returncode


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark, and where asked the released code's; returns the exit code."""
    args = parser().parse_args(arguments)
    return measure.exit_code(lambda: benchmark(args)) or (against_official(args) if args.official else 0)


def benchmark(args: argparse.Namespace) -> None:
    """Run, write and print."""
    measure.require_package()
    measure.check_out(args.out)
    checkpoint = args.model or str(measure.random_checkpoint(args.size, args.dtype, "none", args.cache_dir))
    settings = {name: getattr(args, name) for name in ("dtype", "device", "batch", "speed", "repeats", "threads")}
    with measure.Worker(__file__, "ours", args.threads) as worker:
        answer = worker.ask("run", **settings, checkpoint=checkpoint)
    settings["checkpoint"] = args.model or "random weights"
    result = {"benchmark": "latency", "machine": measure.machine(args.device), "settings": settings, **answer}
    if args.out:
        measure.write_json(args.out, result)
    print(report(result))


if __name__ == "__main__":
    sys.exit(measure.serve(work) if sys.argv[1:2] == ["--worker"] else main())
