"""Guard against slower stages: draw small pictures, and measure each stage in units of a product timed in the same run.

    python benchmarks/run.py --out run.json
    python benchmarks/run.py --compare run.json

Other work on a machine slows the product as much as the pictures, so their ratio stays where seconds don't. Product and
pictures take turns; of both the fastest counts. --compare fails where a stage takes LIMIT times what is on record. Compare
records of one kind of CPU only: another one's ratios differ, and it is refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import end_to_end
import measure
import products
import torch

LIMIT = 1.15
NEGLIGIBLE = 0.01  # of the whole: what takes less is compared as part of the sum of such stages
OTHERS = "all smaller stages"


def product(dtype: torch.dtype) -> float:
    """Seconds of one matrix product, the late scales' MLP of an eighth of the rows."""
    x, weight = torch.randn(576, 1536).to(dtype), torch.randn(4096, 1536).to(dtype)
    return products.best_seconds(lambda: torch.nn.functional.linear(x, weight), 5)


def work(request: dict[str, Any]) -> dict[str, Any]:
    """In the worker: load, and let product and pictures take turns."""
    torch.set_num_threads(request["threads"])
    pipe, _ = end_to_end.load("hart", request["checkpoint"], request["dtype"], "cpu", "none")
    pipe.set_progress_bar_config(disable=True)
    pipe.num_threads = request["threads"]
    clock, given = end_to_end.StageClock(pipe), end_to_end.inputs("hart", pipe)
    runs, calibrated = [], []
    for seed in range(1 + request["repeats"]):
        with torch.inference_mode():
            calibrated.append(product(pipe.dtype))
        runs.append(clock.run(seed=seed, **given)[1])
    stages = {name: min(run[name] for run in runs[1:]) for name in runs[0]}
    return {"product_seconds": min(calibrated[1:]), "seconds": stages}


def ratios(seconds: dict[str, float], product_seconds: float) -> dict[str, float]:
    """Each stage in units of the product; those that are negligible together, and the whole."""
    whole = sum(seconds.values())
    large = {name: value for name, value in seconds.items() if value >= NEGLIGIBLE * whole}
    found = {**large, OTHERS: whole - sum(large.values()), "whole": whole}
    return {name: value / product_seconds for name, value in found.items()}


def slower(now: dict[str, float], before: dict[str, float]) -> list[str]:
    """Sentences about the stages that take LIMIT times what they took; those of one record alone are in the whole."""
    return [
        f"{name} takes {now[name] / before[name]:.2f} times what it took ({now[name]:.1f} products, not {before[name]:.1f})"
        for name in now
        if name in before and before[name] > 0 and now[name] > LIMIT * before[name]
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run, print, compare; 1 where a stage is slower."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256, choices=sorted(measure.SIZES))
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compare", type=Path, help="a record; fail where a stage is slower")
    parser.add_argument("--cache-dir", type=Path, default=measure.default_cache())
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    settings = {name: getattr(args, name) for name in ("size", "dtype", "threads")}
    machine = measure.machine()
    try:
        record = json.loads(args.compare.read_text(encoding="utf-8")) if args.compare else None
        if record and (record["settings"] != settings or record["machine"]["cpu"] != machine["cpu"]):
            raise measure.BenchmarkError(
                f"{args.compare} is of {record['settings']} on {record['machine']['cpu']}, not of this"
            )
        measure.check_out(args.out)
        checkpoint = measure.random_checkpoint(args.size, args.dtype, "none", args.cache_dir)
        with measure.Worker(__file__, "ours", args.threads) as worker:
            answer = worker.ask("run", checkpoint=str(checkpoint), repeats=args.repeats, **settings)
    except (measure.BenchmarkError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    now = ratios(answer["seconds"], answer["product_seconds"])
    print(f"one product: {answer['product_seconds'] * 1e3:.2f} ms on {machine['cpu']}, {args.threads} thread(s)")
    for name, value in now.items():
        print(
            f"  {name:<20}{value:9.1f} products" + (f"{value / record['ratios'][name]:8.2f}x" if _known(record, name) else "")
        )
    if args.out:
        measure.write_json(args.out, {"benchmark": "run", "machine": machine, "settings": settings, "ratios": now, **answer})
    found = slower(now, record["ratios"]) if record else []
    print("\n".join(found), end="\n" if found else "", file=sys.stderr)
    return 1 if found else 0


def _known(record: dict[str, Any] | None, name: str) -> bool:
    return record is not None and record["ratios"].get(name, 0) > 0


if __name__ == "__main__":
    sys.exit(measure.serve(work) if sys.argv[1:2] == ["--worker"] else main())
