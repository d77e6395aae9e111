"""Time from an import to hart-mini's first picture, by what it goes into, and of the pictures after it.

    python benchmarks/startup.py [--against OTHER_CHECKOUT] --out startup.json

Every repeat is a process of its own with warm file caches. `--against` runs another checkout of the package by turns, and adds
the ratio of the two.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import measure
import official

REPOSITORY = Path(__file__).resolve().parent.parent
STEPS = ("import torch", "import hart_infer", "load", "first picture")
CHILD = """
import json, resource, sys, time

def stamp():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), used.ru_utime + used.ru_stime

stamps = [stamp()]
import torch; stamps.append(stamp())
from hart_infer import HartPipeline; stamps.append(stamp())
pipe = HartPipeline.from_pretrained(device="cpu"); pipe.set_progress_bar_config(disable=True); stamps.append(stamp())
pipe("a cat", seed=0); stamps.append(stamp())
for seed in range(1, 6):
    pipe("a cat", seed=seed)
stamps.append(stamp())
print(json.dumps(stamps))
"""


def run_once(checkout: Path) -> dict[str, dict[str, float]]:
    """Seconds and processor seconds of each step, of a later picture, and of all until the first picture."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled
    run = subprocess.run([sys.executable, "-c", CHILD], env=environment, cwd=checkout, capture_output=True, text=True)
    if run.returncode:
        said = run.stderr.strip() or "it says nothing"
        raise measure.BenchmarkError(f"{checkout} draws no picture: {said.splitlines()[-1]}")
    stamps = json.loads(run.stdout)
    found: dict[str, dict[str, float]] = {}
    for clock, place in (("seconds", 0), ("processor", 1)):
        times = [stamp[place] for stamp in stamps]
        steps = dict(zip(STEPS, [b - a for a, b in zip(times, times[1:])], strict=False))  # noqa: B905 - pairs of neighbours
        found[clock] = steps | {"until the first picture": times[4] - times[0], "a later picture": (times[5] - times[4]) / 5}
    return found


def summary(runs: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians."""
    return {clock: {name: median(run[clock][name] for run in runs) for name in runs[0][clock]} for clock in runs[0]}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--repeats", type=measure.one_or_more, default=5)
    result.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout, its kernels built")
    result.add_argument("--out", type=Path, help="JSON file to write")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run and print; returns the exit code: 1 where a checkout draws no picture."""
    args = parser().parse_args(arguments)
    return measure.exit_code(lambda: benchmark(args))


def benchmark(args: argparse.Namespace) -> None:
    """Start every checkout by turns, print and write."""
    checkouts = {"this": REPOSITORY} | ({"other": args.against.resolve()} if args.against else {})
    runs: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in checkouts}
    measure.check_out(args.out)
    for repeat in range(args.repeats + 1):
        for name, checkout in checkouts.items():
            found = run_once(checkout)
            if repeat:  # the first fills the file caches
                runs[name].append(found)
    result: dict[str, Any] = {name: summary(found) for name, found in runs.items()}
    for name in result["this"]["seconds"]:
        cells = [f"{result[who]['seconds'][name]:6.2f} s ({result[who]['processor'][name]:.2f})" for who in checkouts]
        if "other" in result:
            cells.append(f"ratio {result['this']['seconds'][name] / result['other']['seconds'][name]:.2f}")
        print(f"{name:24}{'  '.join(cells)}")
    if args.out:
        commits = {name: official.commit(checkout) for name, checkout in checkouts.items()}
        settings = {"repeats": args.repeats}
        record = {"benchmark": "startup", "machine": measure.machine(), "settings": settings, "commits": commits}
        measure.write_json(args.out, record | result)


if __name__ == "__main__":
    sys.exit(main())
