"""What the fast modes cost and save, beside exact at the same seeds: seconds, PSNR, SSIM, codes, and what a judge sees.

    python benchmarks/fast_modes.py hart-mini --data DATA --judge JUDGE --out fast.json
    python benchmarks/fast_modes.py MODEL --dtype bf16 --prompts prompts.txt --count 8 --out fast.json

The modes take turns picture by picture in one process. DATA and JUDGE are recipes/mini's: prompts are then hart-mini's in
wordings that it was not trained on, or var-mini's classes, and the judge tells subject, style, a Frechet distance to the real
pictures, and a distance to exact's picture by its features (as LPIPS, but of this small network and without LPIPS's weights).
`--alone` adds each knob of the modes by itself, `--int8` exact and the modes in int8. Needs the extra `evaluate`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from fit_late_temperature import load, subjects_of
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from hart_infer import HartError, VarPipeline
from hart_infer.generation.next_scale import Generation
from hart_infer.generation.schedule import Schedule
from hart_infer.generation.speed import SPEEDS
from hart_infer.images.files import save_picture
from hart_infer.pipelines.describe import weights_digest

ROOT = Path(__file__).resolve().parents[1]
EXACT = "exact"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHOWN = 8  # pictures side by side, evenly spread over all


@dataclass(frozen=True)
class Drawn:
    """A picture and what it took."""

    image: Image.Image
    codes: dict[int, Tensor]  # by the side of a scale
    seconds: float
    processor_seconds: float


@dataclass(frozen=True)
class Cost:
    """A mode's figures over all pictures. Distances are to exact's picture of the same seed; None where there are none."""

    knobs: str
    seconds: dict[str, float]
    processor_seconds: dict[str, float]
    times_faster: dict[str, float]  # exact's seconds / the mode's, picture by picture
    times_faster_by_processor: dict[str, float]
    identical: int  # pictures that are exact's to the last bit
    psnr: float | None  # of the mean squared error
    ssim: float | None
    agreement: dict[int, float]  # share of a scale's codes that are exact's
    judge_distance: float | None = None
    subject: float | None = None
    style: float | None = None
    frechet: float | None = None
    frechet_of_halves: tuple[float, ...] | None = None


# ---- drawing


def ways_of(pipe: Any, modes: Sequence[str], *, alone: bool) -> dict[str, dict[str, Any]]:
    """Map a name to arguments of a call: exact, the modes, and with `alone` every knob of theirs."""
    ways: dict[str, dict[str, Any]] = {mode: {"speed": mode} for mode in (EXACT, *modes)}
    for mode in modes if alone else ():
        knobs = pipe.knobs(mode).given()
        temperature = knobs.pop("late_temperature", None)
        for name, value in knobs.items():
            way = {name: value, **({"late_temperature": temperature} if name == "guidance_stops_at" else {})}
            if way not in ways.values():
                ways[f"{mode}'s {name} alone"] = way
    return ways


def draw(pipe: Any, subject: Any, seed: int, way: dict[str, Any]) -> Drawn:
    """Draw one picture in a way."""
    started: list[tuple[Schedule, Generation]] = []
    start = pipe.engine.start

    def noting(schedule: Schedule, *rest: Any, **named: Any) -> list[Generation]:
        states: list[Generation] = list(start(schedule, *rest, **named))
        started.extend((schedule, state) for state in states)
        return states

    pipe.engine.start = noting
    try:
        wall, processor = time.perf_counter(), time.process_time()
        image = pipe(subject, seed=seed, **way).images[0]
        seconds, processor_seconds = time.perf_counter() - wall, time.process_time() - processor
    finally:
        pipe.engine.start = start
    ((schedule, state),) = started
    codes = {stage.side: indices.cpu() for stage, indices in zip(schedule, state.indices, strict=True)}
    return Drawn(image, codes, seconds, processor_seconds)


def draw_all(
    pipes: Mapping[str, Any], subjects: Sequence[Any], ways: Mapping[str, dict[str, Any]], seed: int
) -> dict[str, list[Drawn]]:
    """Draw every subject in every way, by the way's pipeline; which comes first changes from picture to picture.

    The first round is not counted.
    """
    for name, way in ways.items():
        draw(pipes[name], subjects[0], seed, way)
    names, drawn = list(ways), {name: list[Drawn]() for name in ways}
    for index, subject in enumerate(subjects):
        first = index % len(names)
        for name in [*names[first:], *names[:first]]:
            drawn[name].append(draw(pipes[name], subject, seed + index, ways[name]))
    return drawn


# ---- figures


def cost(pipe: Any, way: dict[str, Any], drawn: Sequence[Drawn], exact: Sequence[Drawn]) -> Cost:
    """What a way of drawing costs and saves."""
    found, wanted = (torch.stack([to_tensor(one.image) for one in each]) for each in (drawn, exact))
    same = sum(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    equal = same == len(drawn)
    pairs = list(zip(drawn, exact, strict=True))
    return Cost(
        knobs=str(pipe.knobs(**way)),
        seconds=measure.spread([one.seconds for one in drawn]),
        processor_seconds=measure.spread([one.processor_seconds for one in drawn]),
        times_faster=measure.spread([b.seconds / a.seconds for a, b in pairs]),
        times_faster_by_processor=measure.spread([b.processor_seconds / a.processor_seconds for a, b in pairs]),
        identical=same,
        psnr=None if equal else float(peak_signal_noise_ratio(found, wanted, data_range=1.0)),
        ssim=None if equal else float(structural_similarity_index_measure(found, wanted, data_range=1.0)),
        agreement={
            side: float(torch.stack([(a.codes[side] == b.codes[side]).float().mean() for a, b in pairs]).mean())
            for side in drawn[0].codes
        },
    )


def to_tensor(image: Image.Image) -> Tensor:
    """[3, h, w] in 0..1."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255


class Judge:
    """recipes/mini's classifier, the real pictures and the captions that ask for them."""

    def __init__(self, pipe: Any, data: Path, judge: Path, subjects: Path | None, count: int) -> None:
        sys.path[:0] = [str(ROOT / "recipes" / "evaluate"), str(ROOT / "recipes" / "mini")]
        import mini
        from networks import load_judge, load_network
        from perceptual import PerceptualLoss
        from pictures import of_array

        self.path = judge
        if isinstance(pipe, VarPipeline):
            if pipe.labels.names is None:
                raise measure.BenchmarkError(f"{pipe.name} has no class names, by which the judge knows what was asked for.")
            self.wishes = mini.read_class_wishes(data, [names[0] for names in pipe.labels.names], count)
        else:
            self.wishes = mini.read_wishes(data, subjects, count)
        pixels = np.load(data / "pictures.npy", mmap_mode="r")[[wish.index for wish in self.wishes]]
        self.size, self.network = pixels.shape[1], load_network("judge", judge, torch.device("cpu"))
        self.distance = PerceptualLoss(load_judge(judge))
        self.real = self._features(of_array("real", pixels, [wish.id for wish in self.wishes]))

    def _features(self, pictures: Any) -> Tensor:
        from networks import extract

        return extract(self.network, pictures, size=self.size).values

    def figures(self, drawn: Sequence[Drawn], exact: Sequence[Drawn]) -> dict[str, Any]:
        """The judge's part of a Cost."""
        import mini
        import pictures
        from metrics import fid

        one = pictures.of_array("drawn", np.stack([np.asarray(each.image) for each in drawn]), [w.id for w in self.wishes])
        seen, distance = mini.see(one, self.wishes, self.path, self.size), fid(self.real, self._features(one))
        with torch.inference_mode():
            apart = [
                self.distance(*(pictures.to_tensor(each.image, self.size)[None] / 127.5 - 1 for each in pair)).item()
                for pair in zip(drawn, exact, strict=True)
            ]
        return {
            "judge_distance": sum(apart) / len(apart),
            "subject": seen.subject.value,
            "style": seen.style.value,
            "frechet": distance.value,
            "frechet_of_halves": distance.halves,
        }


def side_by_side(drawn: dict[str, list[Drawn]]) -> Image.Image:
    """Some of the pictures, a row for each mode."""
    step = max(1, len(next(iter(drawn.values()))) // SHOWN)
    rows = [np.concatenate([np.asarray(one.image) for one in each[::step][:SHOWN]], axis=1) for each in drawn.values()]
    return Image.fromarray(np.concatenate(rows))


def table(costs: dict[str, Cost]) -> str:
    """The figures in Markdown, as docs/fast.md shows them."""
    first = next(iter(costs.values()))
    sides = list(first.agreement)[-3:]
    head = ["mode", "seconds", "exact / mode", "by processor time", "PSNR", "SSIM", *(f"codes at {side}" for side in sides)]
    judged = first.subject is not None
    head += ["judge's distance", "subject", "style", "Fréchet"] if judged else []
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for mode, c in costs.items():
        times = [
            f"{c.seconds['median']:.3f}",
            f"{c.times_faster['median']:.2f}",
            f"{c.times_faster_by_processor['median']:.2f}",
        ]
        quality = ["equal" if c.psnr is None else f"{c.psnr:.1f} dB", "1" if c.ssim is None else f"{c.ssim:.3f}"]
        codes = [f"{100 * c.agreement[side]:.1f} %" if side in c.agreement else "not run" for side in sides]
        cells = [mode, *times, *quality, *codes]
        if judged:
            halves = c.frechet_of_halves or ()
            spread = (max(halves) - min(halves)) / 2 if halves else 0.0
            cells += [f"{c.judge_distance:.3f}", f"{100 * (c.subject or 0):.1f} %", f"{100 * (c.style or 0):.1f} %"]
            cells += [f"{c.frechet:.2f} (halves +- {spread:.2f})"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---- the command


def run(args: argparse.Namespace) -> None:
    """Draw, measure, write."""
    measure.check_out(args.out)
    pipe = load(args.model, args.variant, args.device, DTYPES[args.dtype])
    judge = Judge(pipe, args.data, args.judge, args.subjects, args.count) if args.judge else None
    subjects = [w.prompt for w in judge.wishes] if judge else subjects_of(pipe, args.prompts, args.count)
    ways = ways_of(pipe, [mode for mode in args.modes if mode != EXACT], alone=args.alone)
    pipes = dict.fromkeys(ways, pipe)
    if args.int8:
        quantized = load(args.model, args.variant, args.device, DTYPES[args.dtype], "int8")
        for name in (EXACT, *(mode for mode in args.modes if mode != EXACT)):
            ways[f"{name} in int8"], pipes[f"{name} in int8"] = ways[name], quantized
    drawn = draw_all(pipes, subjects, ways, args.seed)
    costs: dict[str, Cost] = {}
    for mode, pictures in drawn.items():
        found = asdict(cost(pipe, ways[mode], pictures, drawn[EXACT]))
        costs[mode] = Cost(**{**found, **(judge.figures(pictures, drawn[EXACT]) if judge else {})})
    if args.pictures:
        save_picture(side_by_side(drawn), args.pictures, overwrite=True)
    print(table(costs))
    if args.out:
        settings = {
            "model": args.model,
            "variant": args.variant,
            "weights": weights_digest(pipe.components),
            "dtype": args.dtype,
        }
        settings |= {"threads": pipe.num_threads or torch.get_num_threads(), **asdict(pipe.defaults)}
        settings |= {"pictures": len(subjects), "seed": args.seed, "judge": judge.network.sha256 if judge else None}
        results = {"settings": settings, "modes": {mode: asdict(c) for mode, c in costs.items()}}
        plain = json.loads(json.dumps({"machine": measure.machine(args.device or "cpu"), **results}, default=str))
        measure.write_json(args.out, plain)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, a Hub id, hart-mini or var-mini")
    parser.add_argument("--variant", help="as of from_pretrained")
    parser.add_argument("--modes", nargs="+", choices=list(SPEEDS), default=list(SPEEDS))
    parser.add_argument("--alone", action="store_true", help="also each knob of the modes by itself")
    parser.add_argument("--int8", action="store_true", help="also exact and the modes in int8")
    parser.add_argument("--prompts", type=Path, help="HART without a judge: a file of prompts, one per line")
    parser.add_argument("--data", type=Path, help="with --judge: what recipes/mini/data.py wrote")
    parser.add_argument("--judge", type=Path, help="recipes/mini/judge.safetensors")
    parser.add_argument("--subjects", type=Path, help="HART with --judge: what it has learned, one name a line (all)")
    parser.add_argument("--count", type=int, default=32, help="pictures drawn in every mode (32)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--pictures", type=Path, help=f"PNG: {SHOWN} side by side, a row for each mode")
    args = parser.parse_args(arguments)
    if (args.judge is None) != (args.data is None) or args.count < (4 if args.judge else 1):
        parser.error("--judge and --data go together; --count is 1 or more, with a judge 4.")
    try:
        run(args)
    except (measure.BenchmarkError, HartError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
