"""Score drawn pictures against real ones: FID, KID and, with captions, CLIP score.

    python recipes/evaluate/score.py REAL DRAWN --features inception --weights inception-2015-12-05.pt --out results.json

REAL and DRAWN are folders of pictures, folders that `hart-infer batch` wrote, or .npz files (arr_0, or mu and sigma for REAL).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from metrics import Fid, Gaussian, Kid, Mean, fid, kid
from networks import KINDS, Features, Network, clip_score, digest_of, extract, load_clip, load_network
from pictures import PictureSet, Settings, open_reference, open_set

from hart_infer import HartError, InputError, __version__
from hart_infer.batch.storage import open_storage

PACKAGES = ("torch", "torchmetrics", "numpy", "pillow", "transformers")


@dataclass(frozen=True)
class Scoring:
    """How pictures are scored."""

    features: str
    weights: Path
    size: int | None = None
    clip: Path | None = None
    seed: int = 0  # of subsets and halves
    batch_size: int = 32
    device: str = "cpu"

    def load(self) -> Network:
        """Load the network. Raises InputError."""
        return load_network(self.features, self.weights, torch.device(self.device))


@dataclass(frozen=True)
class SetRecord:
    """What a set of pictures was."""

    name: str
    pictures: int
    pixels: str | None  # hash of all pixels, of statistics None
    side: tuple[int, int] | None  # as stored
    formats: tuple[str, ...]
    failed: int = 0


@dataclass(frozen=True)
class Score:
    """The figures of one set or of a part of it."""

    pictures: int
    fid: Fid
    kid: Kid | None  # None against statistics
    clip_score: Mean | None = None


@dataclass(frozen=True)
class Results:
    """All of results.json."""

    model: str | None
    weights: str | None  # `hart_infer.pipelines.describe.weights_digest`, where the pictures' folder has it on record
    settings: Settings | None
    drawn: SetRecord
    reference: SetRecord
    features: dict[str, str | int | None]  # network, file, sha256, width, size
    clip: dict[str, str] | None
    seed: int
    score: Score
    parts: dict[str, Score]  # such as categories
    machine: dict[str, str | None]


# ---- scoring


def score(real: PictureSet | Gaussian, drawn: PictureSet, scoring: Scoring, reference_name: str | None = None) -> Results:
    """Score a set. Raises InputError, also for what should not be compared."""
    network = scoring.load()
    found = extract(network, drawn, size=scoring.size, batch_size=scoring.batch_size)
    if isinstance(real, Gaussian):
        reference, values = SetRecord(reference_name or "statistics", 0, None, None, ()), real
        if len(real.mean) != found.values.shape[1]:
            raise InputError(
                f"the reference has statistics of {len(real.mean)} features, {scoring.features} gives {found.values.shape[1]}."
            )
    else:
        of_real = extract(network, real, size=scoring.size, batch_size=scoring.batch_size)
        check_comparable(real, of_real, drawn, found, scoring.size)
        reference, values = record(real, of_real), of_real.values
    clip = None if scoring.clip is None else clip_score(load_clip(scoring.clip, network.device), drawn)
    whole = score_features(values, found.values, scoring, clip)
    return results_of(scoring, network, drawn, found, reference, whole)


def score_features(real: torch.Tensor | Gaussian, drawn: torch.Tensor, scoring: Scoring, clip: Mean | None = None) -> Score:
    """Score features. Raises InputError where there are too few."""
    counts = (len(drawn),) if isinstance(real, Gaussian) else (len(real), len(drawn))
    if min(counts) < 4:
        raise InputError(f"there are {min(counts)} pictures; halves need 4 or more.")
    by_kernel = None if isinstance(real, Gaussian) else kid(real, drawn, seed=scoring.seed)
    return Score(len(drawn), fid(real, drawn, seed=scoring.seed), by_kernel, clip)


def check_comparable(real: PictureSet, of_real: Features, drawn: PictureSet, found: Features, size: int | None) -> None:
    """Refuse pictures of different sizes, unless both are resized. Raises InputError."""
    if size is None and of_real.read.side != found.read.side:
        sides = [
            f"{name} {side[0]} x {side[1]} px" for name, side in ((real.name, of_real.read.side), (drawn.name, found.read.side))
        ]
        raise InputError(f"the pictures differ in size ({', '.join(sides)}); --size resizes both alike.")


def record(pictures: PictureSet, found: Features) -> SetRecord:
    """What the results say of a set."""
    read = found.read
    return SetRecord(pictures.name, len(found.values), read.pixels, read.side, read.formats, pictures.failed)


def results_of(
    scoring: Scoring,
    network: Network,
    drawn: PictureSet,
    found: Features,
    reference: SetRecord,
    whole: Score,
    parts: dict[str, Score] | None = None,
) -> Results:
    """Put everything into one record."""
    settings = dict(drawn.settings or {})
    model, weights = settings.pop("model", None), settings.pop("weights", None)
    return Results(
        model=None if model is None else str(model),
        weights=None if weights is None else str(weights),
        settings=settings or None,
        drawn=record(drawn, found),
        reference=reference,
        features={
            "network": network.kind,
            "file": network.file,
            "sha256": network.sha256,
            "width": found.values.shape[1],
            "size": scoring.size,
        },
        clip=None if scoring.clip is None else {"folder": scoring.clip.name, "sha256": digest_of(scoring.clip)},
        seed=scoring.seed,
        score=whole,
        parts=parts or {},
        machine=machine(scoring.device),
    )


def machine(device: str) -> dict[str, str | None]:
    """Where it was computed, and by which versions."""
    versions: dict[str, str | None] = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"device": device, "cpu": _cpu(), "python": platform.python_version(), "hart_infer": __version__, **versions}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# ---- output


def write_json(path: Path, values: object) -> None:
    """Write JSON, whole or not at all; NaN as null. Raises OutputError."""
    with open_storage(str(path.parent)).whole(path.name) as file:
        file.write((json.dumps(_plain(values), indent=1, allow_nan=False) + "\n").encode())


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(results: Results) -> str:
    """The figures for people."""
    lines = [
        f"{'':24s} {'pictures':>8s} {'FID':>9s} {'of halves':>16s} {'real halves':>11s} {'KID x 1000':>16s} {'CLIP score':>14s}"
    ]
    lines += [_line(name, each) for name, each in {results.drawn.name: results.score, **results.parts}.items()]
    if results.drawn.failed:
        lines.append(f"{results.drawn.failed} rows could not be drawn and are not among them.")
    if results.score.fid.rank_deficient:
        lines.append("Fewer pictures than features: the FID is biased upwards, and compares only with one of as many pictures.")
    if results.features["network"] != "inception":
        lines.append(f"Features are those of {results.features['file']}: the FID and KID compare with no published ones.")
    if len({*results.drawn.formats, *results.reference.formats}) > 1:
        stored = (results.reference.formats, results.drawn.formats)
        lines.append(
            f"Real pictures are {', '.join(stored[0])}, drawn ones {', '.join(stored[1])}; compression is part of the distance."
        )
    return "\n".join(lines)


def _line(name: str, s: Score) -> str:
    halves = torch.tensor(s.fid.halves)
    between = f"{sum(s.fid.reference_halves) / len(s.fid.reference_halves):.2f}" if s.fid.reference_halves else ""
    by_kernel = f"{s.kid.value * 1000:.2f} +- {s.kid.std * 1000:.2f}" if s.kid else ""
    clip = f"{s.clip_score.value:.2f} +- {s.clip_score.standard_error:.2f}" if s.clip_score else ""
    spread = f"{halves.mean():.2f} +- {halves.std():.2f}"
    return f"{name[:24]:24s} {s.pictures:8d} {s.fid.value:9.3f} {spread:>16s} {between:>11s} {by_kernel:>16s} {clip:>14s}"


# ---- the command


def add_scoring(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the options of `Scoring`."""
    parser.add_argument("--features", choices=KINDS, required=required, help="the network; inception is what FID is defined by")
    parser.add_argument("--weights", type=Path, required=required, metavar="FILE", help="its file, or the folder of clip")
    parser.add_argument("--size", type=int, help="resize all pictures to this side, antialiased, before the network sees them")
    parser.add_argument("--clip", type=Path, metavar="FOLDER", help="transformers' CLIP: a CLIP score too")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0, help="of subsets and halves (0)")


def scoring_of(args: argparse.Namespace) -> Scoring:
    """Read the options of `add_scoring`. Raises InputError."""
    if args.features is None or args.weights is None:
        raise InputError("a score takes --features and --weights.")
    if args.batch_size < 1 or (args.size is not None and args.size < 1):
        raise InputError("--batch-size and --size are 1 or more.")
    return Scoring(args.features, args.weights, args.size, args.clip, args.seed, batch_size=args.batch_size, device=args.device)


def guarded(run: Callable[[], None]) -> int:
    """Run; an error of the user's or the system's is one sentence. Returns the exit code."""
    try:
        run()
    except (HartError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Score and write; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("real", type=Path, metavar="REAL")
    parser.add_argument("drawn", type=Path, metavar="DRAWN")
    parser.add_argument("--out", type=Path, default=Path("results.json"), help="what is written (results.json)")
    add_scoring(parser)
    args = parser.parse_args(arguments)

    def run() -> None:
        out = Path(os.path.abspath(args.out))
        results = score(open_reference(args.real), open_set(args.drawn), scoring_of(args), args.real.name)
        write_json(out, asdict(results))
        print(table(results))

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
