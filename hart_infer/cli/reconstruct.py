"""`hart-infer reconstruct`: send a picture through the tokenizer and back."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..images.files import make_grid, save_picture
from ..images.reading import read_image
from . import options
from .console import UsageError, emit, emit_json
from .families import TRAITS, family_of
from .loading import load_pipeline
from .options import MachineOptions, ModelOptions
from .writing import check_outputs

if TYPE_CHECKING:
    from PIL.Image import Image

MODES = ("hybrid", "discrete", "both")

DETAILS = """\
The picture is cut to a centred square, scaled to the model's size, encoded and
decoded. Mode hybrid decodes the latent as it is encoded (the best of HART's
tokenizer), discrete its codes alone (all that VAR and VILA-U draw), both puts
original, discrete and hybrid side by side. VILA-U has discrete only.
One line per mode on stdout: path, mode and PSNR to the scaled picture, separated
by tabs."""

EPILOG = """\
example:
  hart-infer reconstruct photo.jpg -o again.png --mode both
"""


def add_parser(commands: options.Commands) -> None:
    """Add the subcommand."""
    parser = options.add_command(
        commands,
        "reconstruct",
        usage="IMAGE -o OUT [-m MODEL] [options]",
        summary="Send a picture through the tokenizer and back.",
        details=DETAILS,
        epilog=EPILOG,
    )
    parser.set_defaults(run=run)
    parser.add_argument("image", metavar="IMAGE", type=options.picture, help="the picture to reconstruct")
    parser.add_argument("-o", "--out", metavar="OUT", required=True, help="where to write; replaced if it exists")
    parser.add_argument("--mode", choices=MODES, help="what to decode (default: hybrid for HART, else discrete)")
    parser.add_argument("--size", metavar="PIXELS", type=options.whole(1), help="side to scale to (default: the model's)")
    options.add_json(parser, "one JSON object with path and PSNR per mode")
    options.add_model(parser)
    options.add_machine(parser)
    options.add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    """Read, reconstruct, write and report. Raises UsageError or HartError."""
    from ..images.tensors import fit

    source = read_image(args.image)
    check_outputs([Path(args.out)], replace=True)
    model = ModelOptions.of(args)
    family = family_of(model)
    kinds = TRAITS[family].modes
    if args.mode is not None and args.mode not in kinds and len(kinds) == 1:
        raise UsageError(f"{model.name} is a {family} model, whose --mode is {kinds[0]}, not {args.mode}.")
    pipe: Any = load_pipeline(family, model, MachineOptions.of(args), text_encoder=False, quiet=args.quiet)
    side = options.side(args.size, pipe.sizes)
    original = fit(source, side)
    results: dict[str, Image]
    if len(kinds) == 1:
        results = {kinds[0]: pipe.reconstruct(original)}
    else:
        modes = ("discrete", "hybrid") if args.mode == "both" else (args.mode or pipe.tokenization,)
        results = {mode: pipe.reconstruct(original, mode=mode) for mode in modes}
    picture = make_grid([original, *results.values()], 3) if args.mode == "both" else next(iter(results.values()))
    save_picture(picture, args.out)
    scores = {mode: psnr(original, image) for mode, image in results.items()}
    if args.json:
        emit_json({"path": args.out, "psnr": {mode: _finite(score) for mode, score in scores.items()}})
        return 0
    for mode, score in scores.items():
        emit(f"{args.out}\t{mode}\t{score:.2f} dB")
    return 0


def psnr(first: Image, second: Image) -> float:
    """Return the peak signal-to-noise ratio in dB of two RGB pictures of one size; infinity if they are equal."""
    import numpy as np

    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    error = float(np.mean(difference**2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def _finite(score: float) -> float | None:
    """Round to 4 decimals; None for infinity, which JSON lacks."""
    return round(score, 4) if math.isfinite(score) else None
