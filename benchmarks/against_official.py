"""The released code and ours, in one run on one machine, with the same weights, seeds and draws.

    python benchmarks/against_official.py --official PATH --size 256 1024 --dtype bf16 fp32 --out benchmarks/results/x.json
    python benchmarks/against_official.py --family var --official PATH --dtype bf16 fp32 --out benchmarks/results/y.json
    python benchmarks/against_official.py --official PATH --size 256 --also int8 fast "turbo int8" --out z.json

PATH is a checkout of github.com/mit-han-lab/hart, or with `--family var` of FoundationVision/VAR; it is run unmodified (see
`official.py`, `official_var.py`) and not part of this project.
Each side has a process of its own; they take turns, so that a change in the machine's speed touches both. In fp32 the
pictures must agree; in bf16 the two round differently and draw different codes from some scale on, so the difference says
little there and is printed for the record.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measure
import official
import torch
from architecture_var import VAR_PRESETS
from families import DTYPES, FAMILIES, Loaded

OURS, THEIRS = "ours", "theirs"
QUANTIZED = ("int8", "int8_weight_only")


# ---- a side, in a worker


class Side:
    """A worker's state: load once, then generate and measure."""

    def __init__(self, role: str) -> None:
        """`role` says which code this process runs."""
        self._role = role
        self._loaded: Loaded | None = None
        self._device = torch.device("cpu")

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer a request."""
        return self._load(request) if request["command"] == "load" else self._generate(request)

    def _load(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds until the code has loaded, and with every page read; the peak includes all pages."""
        torch.set_num_threads(request["threads"])
        self._device = torch.device(request["device"])
        family = FAMILIES[request["family"]]
        start = time.perf_counter()
        self._loaded = (family.load_ours if self._role == OURS else family.load_theirs)(request)
        measure.synchronize(self._device)
        seconds = time.perf_counter() - start
        measure.touch(self._loaded.weights)
        read_seconds = time.perf_counter() - start
        answer = {"seconds": seconds, "read_seconds": read_seconds, "peak_bytes": measure.peak_bytes(self._device)}
        answer |= {"packed": self._loaded.packed}
        measure.reset_peak(self._device)
        return answer

    def _generate(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._loaded is not None
        measure.reset_peak(self._device)
        measure.synchronize(self._device)
        start, cpu_start = time.perf_counter(), time.process_time()
        picture = self._loaded.draw(request["seed"], **request["options"])
        measure.synchronize(self._device)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        indices = [each.cpu() for each in picture.indices]
        torch.save({"images": picture.images.float().cpu(), "indices": indices}, request["save"])
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": measure.peak_bytes(self._device)}


# ---- the comparison


@dataclass(frozen=True)
class Variant:
    """A way to draw: the released code's, ours, or one of ours that is approximate."""

    name: str
    role: str
    quantize: str | None = None
    speed: str | None = None

    @staticmethod
    def parse(text: str) -> Variant:
        """Read what `--also` was given: a speed mode, what is quantized, or both."""
        from hart_infer.generation.speed import SPEEDS

        words = set(text.split())
        quantize = next(iter(words & set(QUANTIZED)), None)
        speed = next(iter(words & set(SPEEDS)), None)
        if not words or words != {quantize, speed} - {None}:
            raise argparse.ArgumentTypeError(f"{text!r} is not of {', '.join((*SPEEDS, *QUANTIZED))}, or one of each")
        return Variant(text, OURS, quantize, speed)

    @property
    def process(self) -> tuple[str, str | None]:
        """Which process draws it: speed modes share one."""
        return self.role, self.quantize


def compare(model: int, dtype: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both sides of one model in one dtype; `model` is a size of HART or a depth of VAR."""
    family, stored = FAMILIES[args.family], args.stored or dtype
    checkpoint = family.checkpoint(model, stored, args.cache_dir)
    request = {
        "family": args.family,
        "checkpoint": str(checkpoint),
        "official": str(args.official),
        "dtype": dtype,
        "stored": stored,
        "setting": "fp32" if dtype == "fp32" else args.official_setting,
        "device": args.device,
        "guidance": args.guidance,
        "more_smooth": family.more_smooth and not args.hard,
        "threads": args.threads,
    }
    run = run_together if args.processes == "together" else run_separately
    variants = [Variant(OURS, OURS), *args.also, Variant(THEIRS, THEIRS)]
    loads, rounds = run(request, variants, args, folder)
    result = summarise(loads, rounds, variants, folder, args)
    settings = {"size": family.pixels(model), "dtype": dtype, "official_setting": official.SETTINGS[request["setting"]]}
    if family.option != "size":
        settings[family.option] = model
    return {**settings, "processes": args.processes, **result}


def run_together(
    request: dict[str, Any], variants: list[Variant], args: argparse.Namespace, folder: Path
) -> tuple[dict[str, Any], list[Any]]:
    """All loaded throughout; what loading took, and the measured rounds."""
    with contextlib.ExitStack() as stack:
        workers: dict[tuple[str, str | None], measure.Worker] = {}
        loads: dict[str, Any] = {}
        for variant in variants:
            if variant.process not in workers:
                workers[variant.process] = worker = stack.enter_context(measure.Worker(__file__, variant.role, args.threads))
                loads[variant.name] = worker.ask("load", quantize=variant.quantize, **request)
        rounds = [
            {variant.name: _picture(workers[variant.process], variant, i, args, folder) for variant in _turn(i, variants)}
            for i in range(-args.warmup, args.repeats)
        ]
    return loads, rounds[args.warmup :]


def run_separately(
    request: dict[str, Any], variants: list[Variant], args: argparse.Namespace, folder: Path
) -> tuple[dict[str, Any], list[Any]]:
    """A fresh process for every measured picture, with its own warm-up: half the memory, more time."""
    loads: dict[str, Any] = {}
    rounds: list[dict[str, Any]] = []
    for i in range(args.repeats):
        rounds.append({})
        for variant in _turn(i, variants):
            with measure.Worker(__file__, variant.role, args.threads) as worker:
                loads[variant.name] = worker.ask("load", quantize=variant.quantize, **request)
                for _ in range(args.warmup + 1):
                    rounds[-1][variant.name] = _picture(worker, variant, i, args, folder)
    return loads, rounds


def _turn(index: int, variants: list[Variant]) -> list[Variant]:
    return variants if index % 2 == 0 else variants[::-1]


def _picture(worker: measure.Worker, variant: Variant, index: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    seed = args.seed + max(index, 0)
    options = {} if variant.speed is None else {"speed": variant.speed}
    answer = worker.ask("generate", seed=seed, options=options, save=str(folder / f"{variant.name}-{seed}.pt"))
    print(f"  {variant.name:>6} seed {seed}: {answer['seconds']:.2f} s", file=sys.stderr, flush=True)
    return answer


def summarise(
    loads: dict[str, Any], rounds: list[dict[str, Any]], variants: list[Variant], folder: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """Times, peaks and differences of the measured rounds; ratios are to the released code's times."""
    seconds = {variant.name: measure.spread([r[variant.name]["seconds"] for r in rounds]) for variant in variants}
    peaks = {variant.name: max(r[variant.name]["peak_bytes"] for r in rounds) for variant in variants}
    ratios, cpu_ratios = (
        {variant.name: [r[variant.name][kind] / r[THEIRS][kind] for r in rounds] for variant in variants[:-1]}
        for kind in ("seconds", "cpu_seconds")
    )
    seeds = range(args.seed, args.seed + args.repeats)
    differences = {v.name: [difference(folder, v.name, seed) for seed in seeds] for v in variants[:-1]}
    also = {
        name: {
            "time_ratio": statistics.geometric_mean(ratios[name]),
            "time_ratios": ratios[name],
            "cpu_time_ratio": statistics.geometric_mean(cpu_ratios[name]),
            "difference": largest(differences[name]),
        }
        for name in ratios
        if name != OURS
    }
    return {
        "time_ratio": statistics.geometric_mean(ratios[OURS]),
        "time_ratios": ratios[OURS],
        "cpu_time_ratio": statistics.geometric_mean(cpu_ratios[OURS]),
        "also": also,
        "seconds": seconds,
        "peak_bytes": peaks,
        "load": loads,
        "difference": largest(differences[OURS]),
        "differences": differences[OURS],
    }


def largest(differences: list[dict[str, float]]) -> dict[str, float]:
    """Of all pictures."""
    return {key: max(each[key] for each in differences) for key in differences[0]}


def difference(folder: Path, name: str, seed: int) -> dict[str, float]:
    """From the released code's picture of a seed: of the pixels, and where both sides recorded them, of the drawn indices."""
    ours, theirs = (torch.load(folder / f"{side}-{seed}.pt", weights_only=True) for side in (name, THEIRS))
    if ours["images"].shape != theirs["images"].shape:
        shapes = ", ".join(str(list(side["images"].shape)) for side in (ours, theirs))
        raise measure.BenchmarkError(f"the pictures differ in shape: {shapes}")
    pixels = (ours["images"] - theirs["images"]).abs()
    result = {"largest": pixels.max().item(), "mean": pixels.mean().item()}
    if ours["indices"] and len(ours["indices"]) == len(theirs["indices"]):
        drawn = [torch.cat(side["indices"], dim=1) for side in (ours, theirs)]
        result["indices"] = (drawn[0] != drawn[1]).double().mean().item()
    return result


def report(result: dict[str, Any]) -> str:
    """One comparison for people."""
    seconds, peaks, loads, found = (result[key] for key in ("seconds", "peak_bytes", "load", "difference"))
    gigabytes = measure.gigabytes
    lines = [
        f"{result['size']}px {result['dtype']}: ours / theirs {result['time_ratio']:.3f} "
        f"({seconds[OURS]['median']:.2f} s / {seconds[THEIRS]['median']:.2f} s; "
        f"processor time {result['cpu_time_ratio']:.3f})",
        *(
            f"  {name}: {also['time_ratio']:.3f} ({seconds[name]['median']:.2f} s; processor time {also['cpu_time_ratio']:.3f})"
            for name, also in result["also"].items()
        ),
        "  peak memory: " + ", ".join(f"{name} {gigabytes(peak)}" for name, peak in peaks.items()),
        "  loading: "
        + ", ".join(
            f"{role} {loads[role]['read_seconds']:.2f} s, peak {gigabytes(loads[role]['peak_bytes'])}" for role in loads
        ),
        f"  pictures differ by at most {found['largest']:.2e}, on average {found['mean']:.2e} (of 1)",
        f"  theirs: {result['official_setting']}; processes {result['processes']}",
    ]
    if "indices" in found:
        share = f"{found['indices']:.2%} of the drawn indices differ" if found["indices"] else "every drawn index is the same"
        lines.insert(-1, f"  {share}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="Compare with a checkout of the released code.")
    result.add_argument("--family", choices=FAMILIES, default="hart")
    result.add_argument("--official", type=Path, required=True, metavar="PATH",
                        help="checkout of mit-han-lab/hart or FoundationVision/VAR")  # fmt: skip
    result.add_argument("--size", type=int, nargs="+", choices=sorted(measure.SIZES), default=[256, 1024],
                        help="HART: pixels; 128 is a tiny model's")  # fmt: skip
    result.add_argument("--depth", type=int, nargs="+", choices=VAR_PRESETS, default=[16],
                        help="VAR: 16 to 30 draw 256px, 36 draws 512px; 2 is a tiny model's")  # fmt: skip
    result.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    result.add_argument("--device", default="cpu")
    result.add_argument("--official-setting", choices=("cast", "autocast"), default="cast",
                        help="its bf16: cast is faster and smaller, autocast is as released")  # fmt: skip
    result.add_argument("--hard", action="store_true", help="HART: without more_smooth, which amplifies rounding")
    result.add_argument("--stored", choices=DTYPES, help="dtype of the random checkpoint's file (default: --dtype)")
    result.add_argument("--also", type=Variant.parse, nargs="+", default=[], metavar="MODE",
                        help='approximate ways of ours in the same run: int8, fast, turbo, draft, "turbo int8"')  # fmt: skip
    result.add_argument("--guidance", type=float, help="default: 4.5 for HART, 4 for VAR")
    result.add_argument("--seed", type=int, default=1)
    result.add_argument("--processes", choices=("together", "separate"), default="together",
                        help="both loaded throughout, or a fresh process for every picture: half the memory")  # fmt: skip
    measure.add_run_options(result)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison; returns the exit code: 2 where PATH is no checkout, 1 where a side fails."""
    args = parser().parse_args(arguments)
    return measure.exit_code(lambda: benchmark(args))


def benchmark(args: argparse.Namespace) -> None:
    """Compare every model in every dtype, print, and write after each."""
    family, results = FAMILIES[args.family], []
    args.guidance = family.guidance if args.guidance is None else args.guidance
    args.official = official.check_checkout(args.official, args.family)
    measure.require_package()
    measure.check_out(args.out)
    for model in getattr(args, family.option):
        for dtype in args.dtype:
            with tempfile.TemporaryDirectory() as folder:
                results.append(compare(model, dtype, args, Path(folder)))
            print(report(results[-1]), flush=True)
            if args.out:
                write(args, results)


def write(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """The record so far, so that a long run that dies leaves what it had."""
    names = ("family", "guidance", "hard", "seed", "repeats", "warmup", "threads", "device", "stored")
    values = {
        "benchmark": "against_official",
        "machine": measure.machine(args.device),
        "settings": {name: getattr(args, name) for name in names} | {"also": [variant.name for variant in args.also]},
        "official_commit": official.commit(args.official),
        "results": results,
    }
    measure.write_json(args.out, values)


if __name__ == "__main__":
    worker_role = sys.argv[2] if sys.argv[1:2] == ["--worker"] else None
    sys.exit(measure.serve(Side(worker_role)) if worker_role else main())
