"""VILA-U measured: its two loops against others, all uses of a model of full width, and the whole model counted; as JSON.

    python benchmarks/vila_u.py --part depth language uses counts --out benchmarks/results/vila_u.json
    python benchmarks/vila_u.py --part language --width 1024 --layers 4

`depth` and `language` are `vila_u_compare.py`, `counts` is `vila_u_counts.py`. `uses` makes a random checkpoint of full width
with two Llama layers (`vila_u_checkpoint.py`), loads it and goes through drawing, video, answering, encoding and rebuilding;
drawings are stopped after some rows of positions, as a callback may. Each part runs in a process of its own, so that its peak
memory is its own.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
import torch

PARTS = ("depth", "language", "uses", "counts")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT = "A small white cat asleep on a sunny windowsill, among pots of red flowers"
QUESTION = "What is in this picture?"
ANSWER_TOKENS = 8
SLOTS, ROWS = (4, 16), (2, 8)


# ---- all uses


class Rows:
    """A callback that notes when each row of positions was done and stops after `wanted` of them."""

    def __init__(self, wanted: int, device: torch.device) -> None:
        self.wanted, self.device = wanted, device
        self.ends: list[float] = []

    def __call__(self, step: Any) -> None:
        """Take note of a row."""
        measure.synchronize(self.device)
        self.ends.append(time.perf_counter())
        if len(self.ends) >= self.wanted:
            step.stop()


def load(request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The pipeline, and what loading it took; the peak includes every weight."""
    from hart_infer import VilaUPipeline

    device = torch.device(request["device"])
    measure.reset_peak(device)
    start = time.perf_counter()
    pipe = VilaUPipeline.from_pretrained(request["checkpoint"], dtype=DTYPES[request["dtype"]], device=request["device"])
    measure.synchronize(device)
    seconds = time.perf_counter() - start
    weights = measure.tensors_of(*pipe.components.values())
    measure.touch(weights)
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights)
    return pipe, {"seconds": seconds, "peak_bytes": measure.peak_bytes(device), "weights_bytes": size}


def use(request: dict[str, Any]) -> dict[str, Any]:
    """In a worker: all uses of one checkpoint in one dtype."""
    from PIL import Image

    torch.set_num_threads(request["threads"])
    pipe, loading = load(request)
    pipe.set_progress_bar_config(disable=True)
    pipe.num_threads = request["threads"]
    pipe.answers = replace(pipe.answers, eos_token_id=())  # so that no answer ends early
    side = pipe.vision_tower.config.image_size
    noise = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(noise.numpy())

    def drawn(rows: int, draw: Callable[..., Any]) -> dict[str, Any]:
        callback = Rows(rows, pipe.device)
        start = time.perf_counter()
        draw(PROMPT, seed=0, callback_on_step_end=callback)
        spans = [end - begin for begin, end in zip([start, *callback.ends], callback.ends, strict=False)]
        grid = pipe.vision_tower.config.grid
        later = spans[1:] or spans  # the first row has the prompt's prefill
        return {"rows": len(spans), "row_seconds": spans, "seconds_per_position": sum(later) / len(later) / grid}

    def answered() -> dict[str, Any]:
        pipe.answer(picture, QUESTION, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        return {"tokens": ANSWER_TOKENS}

    uses: dict[str, Callable[[], Any]] = {
        "draw": lambda: drawn(request["picture_rows"], pipe),
        "video": lambda: drawn(request["video_rows"], pipe.video),
        "answer": answered,
        "encode": lambda: {"codes": list(pipe.encode(picture).codes.shape)},
        "reconstruct": lambda: {"size": list(pipe.reconstruct(picture).size)},
    }
    found = {}
    for name, run in uses.items():
        separate = measure.reset_peak(pipe.device)
        start, processor = time.perf_counter(), time.process_time()
        result = run()
        measure.synchronize(pipe.device)
        found[name] = {
            "seconds": time.perf_counter() - start,
            "processor": time.process_time() - processor,
            "peak_bytes": measure.peak_bytes(pipe.device),
            "peak_covers": "this use, weights included" if separate else "the process's whole life",
            **result,
        }
        print(f"  {use_line(name, found[name])}", file=sys.stderr, flush=True)
    return {"load": loading, "uses": found}


def use_line(name: str, found: dict[str, Any]) -> str:
    """A use for people."""
    position = f", {found['seconds_per_position']:.3f} s a position" if "seconds_per_position" in found else ""
    rows = f" ({found['rows']} rows)" if "rows" in found else ""
    return f"{name + rows:<20}{found['seconds']:8.2f} s{position}; peak {measure.gigabytes(found['peak_bytes'])}"


# ---- parts


def work(request: dict[str, Any]) -> dict[str, Any]:
    """In a worker: one part."""
    part = request["part"]
    if part == "uses":
        return use(request)
    if part == "counts":
        import vila_u_counts

        return {"counts": [vila_u_counts.count(slots) for slots in request["slots"]]}
    import vila_u_compare

    with torch.inference_mode():
        return (vila_u_compare.compare_depth if part == "depth" else vila_u_compare.compare_language)(request)


def run_part(part: str, settings: dict[str, Any], cache: Path) -> dict[str, Any]:
    """Run one part in a worker, `uses` in one for each dtype."""
    print(part, file=sys.stderr, flush=True)
    if part != "uses":
        with measure.Worker(__file__, part, settings["threads"]) as worker:
            return worker.ask("run", part=part, **settings)
    from vila_u_checkpoint import random_vila_u_checkpoint

    results = []
    for dtype in settings["dtype"]:
        path = random_vila_u_checkpoint(settings["uses_layers"], dtype, cache)
        with measure.Worker(__file__, f"{part} in {dtype}", settings["threads"]) as worker:
            own = settings | {"dtype": dtype, "checkpoint": str(path)}
            results.append({"dtype": dtype, **worker.ask("run", part=part, **own)})
    return {"results": results}


def report(results: dict[str, Any]) -> str:
    """The results for people."""
    import vila_u_compare
    import vila_u_counts

    lines = [f"depth  {vila_u_compare.depth_line(each)}" for each in results.get("depth", {}).get("results", [])]
    lines += [f"language  {vila_u_compare.language_line(each)}" for each in results.get("language", {}).get("results", [])]
    for each in results.get("uses", {}).get("results", []):
        loading = each["load"]
        weights = measure.gigabytes(loading["weights_bytes"])
        lines.append(f"uses  {each['dtype']}: loaded in {loading['seconds']:.2f} s, weights {weights}")
        lines += [f"  {use_line(name, found)}" for name, found in each["uses"].items()]
    for each in results.get("counts", {}).get("counts", []):
        lines += vila_u_counts.lines(each)
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="VILA-U measured, as JSON.")
    result.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    result.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    result.add_argument("--device", default="cpu")
    result.add_argument("--threads", type=int, default=torch.get_num_threads())
    result.add_argument(
        "--repeats", type=measure.one_or_more, default=3, help="of `depth` and `language`, after a turn that does not count"
    )
    result.add_argument("--slots", type=int, nargs="+", default=list(SLOTS), help="D of `depth` and `counts` (4 16)")
    result.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="of `depth` (2 8)")
    result.add_argument("--width", type=measure.one_or_more, default=4096, help="of `language` (4096)")
    result.add_argument("--layers", type=measure.one_or_more, default=2, help="of `language` (2)")
    result.add_argument("--prompt", type=measure.one_or_more, default=128, help="tokens before the answer, in `language` (128)")
    result.add_argument("--new-tokens", type=measure.one_or_more, default=64, help="of `language` (64)")
    result.add_argument("--uses-layers", type=int, default=2, help="Llama layers in `uses`; 0 takes a tiny model (2)")
    result.add_argument(
        "--picture-rows", type=measure.one_or_more, default=2, help="rows of positions to draw of a picture (2)"
    )
    result.add_argument("--video-rows", type=measure.one_or_more, default=1, help="and of a video (1)")
    result.add_argument("--cache-dir", type=Path, default=measure.default_cache(), help="where random checkpoints are kept")
    result.add_argument("--out", type=Path, help="JSON file to write")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    args = parser().parse_args(arguments)
    return measure.exit_code(lambda: benchmark(args))


def benchmark(args: argparse.Namespace) -> None:
    """Run every part, write and print."""
    settings = {name: value for name, value in vars(args).items() if name not in ("part", "out", "cache_dir")}
    measure.require_package()
    measure.check_out(args.out)
    results = {part: run_part(part, settings, args.cache_dir) for part in dict.fromkeys(args.part)}
    result = {"benchmark": "vila_u", "machine": measure.machine(args.device), "settings": settings, "results": results}
    if args.out:
        measure.write_json(args.out, result)
    print(report(results))


if __name__ == "__main__":
    sys.exit(measure.serve(work) if sys.argv[1:2] == ["--worker"] else main())
