"""Plot time and memory against size and batch: ours, the released code's, and the roofline's model.

    python benchmarks/plot.py --roofline roofline.json --against benchmarks/results/against_official_{256,1024}.json \\
        --latency latency.json --out time_and_memory.png

Points are measurements of one CPU or GPU, which the title names, of whatever day their records are; the dashed line is
`roofline.py`'s model from the rates in its record, for every size and batch. Records of other CPUs than the roofline's, of
another dtype than bf16, or of a checkpoint's latency are refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import counting
import measure
import roofline
from architecture import PRESETS

from hart_infer.images.files import whole_file

OURS, THEIRS, MODEL = "#0b6e4f", "#c1440e", "#555555"
BATCHES, DTYPE, WEIGHTS = (1, 2, 4, 8), "bf16", "random weights"


def read(path: Path) -> dict[str, Any]:
    """A record."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def check(path: Path, found: object, wanted: str) -> None:
    """Refuse a record of something else. Raises BenchmarkError."""
    if found != wanted:
        raise measure.BenchmarkError(f"{path} is of {found}, not of {wanted}")


def modelled(device: roofline.Device, sizes: list[int], batch_size: int) -> dict[str, Any]:
    """Seconds and bytes by size at one picture, and by batch at one size."""
    found: dict[str, Any] = {"size": {}, "batch": {}}
    for size in sizes:
        found["size"][size] = point(roofline.model(counting.Work(PRESETS[measure.SIZES[size]]), device))
    for batch in BATCHES:
        work = counting.Work(PRESETS[measure.SIZES[batch_size]], batch_size=batch)
        found["batch"][batch] = point(roofline.model(work, device))
    return found


def point(result: dict[str, Any]) -> tuple[float, float]:
    """Seconds and bytes of a model."""
    return result["total"]["seconds"], float(sum(result["memory"].values()))


def against(paths: list[Path], cpu: str) -> dict[int, dict[str, tuple[float, float]]]:
    """By size, seconds and bytes of both sides."""
    found: dict[int, dict[str, tuple[float, float]]] = {}
    for path in paths:
        record = read(path)
        check(path, record["machine"]["cpu"], cpu)
        for row in record["results"]:
            check(path, row["dtype"], DTYPE)
            sides = {side: (row["seconds"][side]["median"], row["peak_bytes"][side]) for side in ("ours", "theirs")}
            found[row["size"]] = sides
    return found


def draw(
    model: dict[str, Any],
    both: dict[int, Any],
    latency: dict[str, Any] | None,
    beside: tuple[int, float] | None,
    title: str,
    out: Path,
) -> None:
    """Write the picture, whole or not at all; `beside`: size and seconds of pictures drawn in the run that gave the rates."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), constrained_layout=True)
    for row, unit in enumerate((1.0, 1e9)):  # seconds, then memory
        by_size, by_batch = axes[row]
        for axis, key in ((by_size, "size"), (by_batch, "batch")):
            points = model[key]
            values = [points[x][row] / unit for x in points]
            label = "roofline's model" if row == 0 else "weights, cache and logits (counted)"
            axis.plot(list(points), values, "--", color=MODEL, label=label)
        for side, color, label in (("ours", OURS, "hart_infer"), ("theirs", THEIRS, "the released code")):
            measured = {size: sides[side][row] / unit for size, sides in sorted(both.items())}
            by_size.plot(list(measured), list(measured.values()), "o-", color=color, label=f"{label} (measured)")
        if beside and row == 0:
            by_size.plot(*beside, "x", color=OURS, markersize=9, label="hart_infer (measured in the run that gave the rates)")
        if latency:
            rows = [r for r in latency["rows"] if r["speed"] == "exact" and not r["graphs"] and "error" not in r]
            values = [r["seconds"]["p50"] if row == 0 else r["peak_bytes"] / 1e9 for r in rows]
            by_batch.plot([r["batch"] for r in rows], values, "o-", color=OURS, label="hart_infer (measured)")
        by_size.set(
            xlabel="side, pixels (batch 1)",
            ylabel="seconds a picture" if row == 0 else "peak, GB",
            xticks=sorted(model["size"]),
        )
        size = latency["size"] if latency else max(model["size"])
        by_batch.set(xlabel=f"pictures in a batch ({size} px)", ylabel="seconds a batch" if row == 0 else "peak, GB")
        by_batch.set_xticks(list(model["batch"]))
        for axis in (by_size, by_batch):
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    with whole_file(out, overwrite=True) as file:
        figure.savefig(file, format="png", dpi=110)


def main(arguments: list[str] | None = None) -> int:
    """Plot; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--roofline", type=Path, required=True, help="a record of roofline.py, for its rates")
    parser.add_argument("--against", type=Path, nargs="*", default=[], help="records of against_official.py")
    parser.add_argument("--latency", type=Path, help="a record of latency.py")
    parser.add_argument("--size", type=int, nargs="+", default=[256, 512, 1024], help="of the model")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    return measure.exit_code(lambda: plot(args))


def plot(args: argparse.Namespace) -> None:
    """Read, model and draw."""
    record, latency = read(args.roofline), read(args.latency) if args.latency else None
    device, cpu = roofline.Device(**record["rates"]), record["machine"]["cpu"]
    check(args.roofline, record["settings"]["dtype"], DTYPE)
    both = against(args.against, cpu)
    if latency:
        check(args.latency, latency["machine"]["cpu"], cpu)
        check(args.latency, latency["settings"]["dtype"], DTYPE)
        check(args.latency, latency["settings"]["checkpoint"], WEIGHTS)
    model = modelled(device, sorted(args.size), latency["size"] if latency else max(args.size))
    beside = (record["settings"]["size"], record["measured"]["whole"]) if record["measured"] else None
    draw(model, both, latency, beside, f"HART, {DTYPE}, {WEIGHTS}: {device.name}", args.out)


if __name__ == "__main__":
    sys.exit(main())
