"""Time and memory of whole pictures, stage by stage, as JSON.

    python benchmarks/end_to_end.py --size 1024 --dtype bf16 --out benchmarks/results/end_to_end.json
    python benchmarks/end_to_end.py --family var --depth 16 --dtype bf16

The pipeline runs in a fresh process, so that its peak memory is its own. Stages are timed from outside, by wrapping the
pipeline's parts and its per-scale callback; the device is synchronised at every stage's end. Without --checkpoint the
weights are random (`random_checkpoint.py`), made once and kept in a cache folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import measure
import torch
from architecture_var import VAR_PRESETS

PROMPT = "A small white cat asleep on a sunny windowsill, among pots of red flowers, photographed in soft light"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GUIDANCE = {"hart": 4.5, "var": 4.0}


class StageClock:
    """Seconds of each stage of one call; what no stage claims is `other`."""

    def __init__(self, pipe: Any) -> None:
        """Wrap the parts of `pipe`, for good: the process is the benchmark's own."""
        from hart_infer.generation import next_scale

        self.pipe = pipe
        self.seconds: dict[str, float] = {}
        self._inside = 0.0  # seconds of wrapped parts since the last scale ended
        self._last = 0.0
        next_scale.sample_residual = self._timed("diffusion", next_scale.sample_residual)
        pipe.autoencoder.decode = self._timed("decode", pipe.autoencoder.decode)
        if getattr(pipe, "text_encoder", None) is not None:
            pipe.text_encoder.encode = self._timed("text", pipe.text_encoder.encode)

    def _now(self) -> float:
        measure.synchronize(self.pipe.device)
        return time.perf_counter()

    def _timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self._now()
            result = function(*args, **kwargs)
            elapsed = self._now() - start
            self.seconds[stage] = self.seconds.get(stage, 0.0) + elapsed
            self._inside += elapsed
            return result

        return timed

    def _scale_ended(self, step: Any) -> None:
        now = self._now()
        self.seconds[f"scale {step.index} ({step.side}x{step.side})"] = now - self._last - self._inside
        self._last, self._inside = now, 0.0

    def run(self, **arguments: Any) -> tuple[float, dict[str, float]]:
        """One call: its seconds in all, and by stage in the order they ran."""
        self.seconds, self._inside = {}, 0.0
        start = self._last = self._now()
        self.pipe(callback_on_step_end=self._scale_ended, **arguments)
        total = self._now() - start
        print(f"  {total:.2f} s", flush=True)
        stages = dict(sorted(self.seconds.items(), key=lambda item: _order(item[0])))
        return total, {**stages, "other": total - sum(stages.values())}


def _order(stage: str) -> tuple[int, int]:
    if stage.startswith("scale"):
        return 1, int(stage.split()[1])
    return {"text": 0, "diffusion": 2, "decode": 3}[stage], 0


def load(family: str, path: str, dtype: str, device: str, text_encoder: str) -> tuple[Any, dict[str, Any]]:
    """The pipeline, and the seconds and memory that loading it took; the peak includes every weight and all libraries."""
    start = time.perf_counter()
    from hart_infer import HartPipeline, VarPipeline

    imported = time.perf_counter()
    target = torch.device(device)
    before = measure.resident_bytes() or 0
    measure.reset_peak(target)
    measure.reset_peak(torch.device("cpu"))
    pipe: Any
    if family == "var":
        pipe = VarPipeline.from_pretrained(path, dtype=DTYPES[dtype], device=device)
    else:
        pipe = HartPipeline.from_pretrained(
            path, torch_dtype=DTYPES[dtype], device=device, text_encoder=False if text_encoder == "none" else None
        )
    measure.synchronize(target)
    seconds = time.perf_counter() - imported
    at_return = measure.peak_bytes(torch.device("cpu"))
    encoder = getattr(pipe, "text_encoder", None)
    weights = measure.tensors_of(pipe.transformer, pipe.autoencoder, *([encoder.model] if encoder else []))
    measure.touch(weights)
    peak, size = measure.peak_bytes(torch.device("cpu")), sum(t.numel() * t.element_size() for t in weights)
    result = {
        "import_seconds": imported - start,
        "seconds": seconds,
        "weights_bytes": size,
        "resident_before_bytes": before,
        "peak_at_return_bytes": at_return,
        "peak_bytes": peak,
        "peak_over_weights": peak / size,
    }
    if target.type == "cuda":
        result["device_peak_bytes"] = measure.peak_bytes(target)
    return pipe, result


def inputs(family: str, pipe: Any) -> dict[str, Any]:
    """What to draw: a class, a prompt, or, without a text encoder, a random context."""
    if family == "var":
        return {"label": measure.var_label(pipe.transformer.config.num_classes)}
    if pipe.text_encoder is not None:
        return {"prompt": PROMPT}
    from hart_infer.models.text import PromptEmbeds

    config = pipe.transformer.config
    return {"prompt_embeds": PromptEmbeds(*measure.random_context(config.context_token, config.context_dim))}


def work(request: dict[str, Any]) -> dict[str, Any]:
    """In the worker: load, warm up, run, and report."""
    torch.set_num_threads(request["threads"])
    names = ("family", "checkpoint", "dtype", "device", "text_encoder")
    pipe, loading = load(*(request[name] for name in names))
    pipe.set_progress_bar_config(disable=True)
    pipe.num_threads = request["threads"]
    if request["packed"]:
        pipe.enable_packed_weights()
    options = {
        **inputs(request["family"], pipe),
        "num_images_per_prompt": request["images"],
        "guidance_scale": request["guidance"],
    }
    clock = StageClock(pipe)
    separate = measure.reset_peak(pipe.device)
    for i in range(request["warmup"]):
        clock.run(seed=i, **options)
    runs = [clock.run(seed=i, **options) for i in range(request["repeats"])]
    return {
        "size": pipe.sizes[0],
        "load": loading,
        "seconds": measure.spread([total for total, _ in runs]),
        "stages": {name: measure.spread([stages[name] for _, stages in runs]) for name in runs[0][1]},
        "runs": [{"seconds": total, "stages": stages} for total, stages in runs],
        "peak_bytes": measure.peak_bytes(pipe.device),
        "peak_covers": "generation, weights included" if separate else "the process's whole life",
    }


def report(result: dict[str, Any]) -> str:
    """The result for people."""
    settings, loading, total = result["settings"], result["load"], result["seconds"]
    lines = [
        f"{result['size']}px, {settings['dtype']} on {result['machine']['device']}, {settings['threads']} threads, "
        f"text encoder: {settings['text_encoder']}, {settings['family']}",
        f"load      {loading['seconds']:8.2f} s   peak {measure.gigabytes(loading['peak_bytes'])}, weights "
        f"{measure.gigabytes(loading['weights_bytes'])} ({loading['peak_over_weights']:.2f}x)",
        f"generate  {total['median']:8.2f} s   peak {measure.gigabytes(result['peak_bytes'])}",
    ]
    for name, seconds in result["stages"].items():
        lines.append(f"  {name:<18}{seconds['median']:8.3f} s {seconds['median'] / total['median']:6.1%}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description="Time and memory of whole pictures, stage by stage.")
    result.add_argument("--family", choices=GUIDANCE, default="hart")
    result.add_argument(
        "--size", type=int, default=1024, help=f"of HART's the random checkpoint: {sorted(measure.SIZES)} (1024)"
    )
    result.add_argument("--depth", type=int, choices=VAR_PRESETS, default=16, help="of VAR's random checkpoint (16)")
    result.add_argument("--dtype", choices=DTYPES, default="bf16")
    result.add_argument("--device", default="cpu")
    result.add_argument("--checkpoint", default="random", metavar="PATH", help="a folder, hart-mini, or random (the default)")
    result.add_argument("--stored", choices=DTYPES, help="dtype of the random checkpoint's file (default: --dtype)")
    result.add_argument("--text-encoder", choices=("none", "tiny", "full"), default="none",
                        help="with a given checkpoint: none, or anything else for its own")  # fmt: skip
    result.add_argument("--packed", action="store_true", help="pack weights, as the command line does in bf16 on CPUs")
    result.add_argument("--images", type=int, default=1, help="pictures per call")
    result.add_argument("--guidance", type=float, help="default: 4.5 for HART, 4 for VAR")
    measure.add_run_options(result)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    args = parser().parse_args(arguments)
    return measure.exit_code(lambda: benchmark(args))


def benchmark(args: argparse.Namespace) -> None:
    """Run, write and print."""
    measure.require_package()
    measure.check_out(args.out)
    path, stored = args.checkpoint, args.stored or args.dtype
    args.guidance = GUIDANCE[args.family] if args.guidance is None else args.guidance
    if path == "random" and args.family == "var":
        path = measure.random_var_checkpoint(args.depth, stored, args.cache_dir)
    elif path == "random":
        if args.size not in measure.SIZES:
            parser().error(f"--size must be one of {sorted(measure.SIZES)}, not {args.size}")
        path = measure.random_checkpoint(args.size, stored, args.text_encoder, args.cache_dir)
    settings = {
        **{name: getattr(args, name) for name in ("family", "dtype", "device", "text_encoder", "images", "guidance")},
        **{name: getattr(args, name) for name in ("repeats", "warmup", "threads", "packed")},
        "checkpoint": "random" if args.checkpoint == "random" else str(path),
        "stored": stored if args.checkpoint == "random" else None,
    }
    with measure.Worker(__file__, "ours", args.threads) as worker:
        answer = worker.ask("run", **{**settings, "checkpoint": str(path)})
    result = {"benchmark": "end_to_end", "machine": measure.machine(args.device), "settings": settings, **answer}
    if args.out:
        measure.write_json(args.out, result)
    print(report(result))


if __name__ == "__main__":
    sys.exit(measure.serve(work) if sys.argv[1:2] == ["--worker"] else main())
