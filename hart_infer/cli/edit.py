"""`hart-infer edit`: paint a part of a picture anew."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..images.reading import read_image
from ..pipelines.checks import check_prompts, shown
from . import options
from .console import UsageError
from .drawing import PICTURES, DrawOptions, add_drawing, draw

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..pipelines.edit import PictureEdit
    from ..pipelines.hart import HartPipeline
    from ..pipelines.var import VarPipeline

DETAILS = """\
What --mask or --box marks is painted anew, the rest is kept, by any model of HART
or VAR and without training. The picture and its mask are cut to a centred square
and scaled to the model's size, which is the size of the result.
A PROMPT says what the whole picture shows; for VAR it is a class's name or number.
The results' paths go to stdout, one per line, each as soon as it is written."""

EPILOG = """\
Cells of the model's latent are kept whole or not at all (16 pixels a side in the
released models). The kept pixels are then put back, feathered at the border;
--no-blend leaves all pixels as the model decodes them.

Names, seeds, metadata and what else an option means are as in
`hart-infer generate --help`.

examples:
  hart-infer edit photo.png --mask mask.png "a cat" -o edited.png
  hart-infer edit photo.png --box 0.25,0.25,0.75,0.75 -n 4 -o "{seed}.png"
  hart-infer edit photo.png --box 0.2,0.2,0.8,0.8 --outside 207 -m ./var-d36
"""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Given:
    """The picture to edit, and what of it is painted anew."""

    picture: Image
    mask: Image | Box
    outside: bool
    blend: bool

    def edit(self, pipe: HartPipeline | VarPipeline) -> PictureEdit:
        """Make the `edit` of a call. Raises InputError."""
        return pipe.edit(self.picture, self.mask, blend=self.blend, inside=not self.outside)


def add_parser(commands: options.Commands) -> None:
    """Add the subcommand."""
    parser = options.add_command(
        commands,
        "edit",
        usage="IMAGE [PROMPT] (--mask FILE | --box BOX) [-o OUT] [options]",
        summary="Paint a part of a picture anew.",
        details=DETAILS,
        epilog=EPILOG,
    )
    parser.set_defaults(run=run)
    parser.add_argument("image", metavar="IMAGE", type=options.picture, help="the picture to edit")
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="what the picture shows (default: no prompt, no class)")
    part = parser.add_mutually_exclusive_group(required=True)
    part.add_argument(
        "--mask", metavar="FILE", type=options.picture, help="a picture of the same size, white where painted anew"
    )
    part.add_argument(
        "--box", metavar="TOP,LEFT,BOTTOM,RIGHT", type=_box, help="a box that is painted anew; shares of the side, from 0 to 1"
    )
    parser.add_argument("--outside", action="store_true", help="with --box: keep the box and paint around it")
    parser.add_argument("--no-blend", dest="blend", action="store_false", help="don't put the kept pixels back")
    add_drawing(parser)


def run(args: argparse.Namespace) -> int:
    """Read the picture and the mask, draw. Raises UsageError or HartError."""
    if args.outside and args.box is None:
        raise UsageError("--outside goes with --box; of a mask, swap black and white.")
    prompt = None if args.prompt is None else _prompt(args.prompt)
    picture = read_image(args.image)
    mask = _read_mask(args.mask, picture, args.image) if args.box is None else args.box
    given = Given(picture, mask, args.outside, args.blend)
    metadata: dict[str, Any] = {"edited": Path(args.image).name, "blend": args.blend}
    metadata |= {"mask": Path(args.mask).name} if args.box is None else {"box": args.box, "outside": args.outside}
    task = replace(PICTURES, ability="edit pictures")
    draw([prompt], DrawOptions.of(args), task, make_edit=given.edit, metadata=metadata)
    return 0


def _prompt(text: str) -> str:
    try:
        return check_prompts(text)[0]
    except InputError as error:
        raise UsageError(str(error)) from error


def _read_mask(name: str, picture: Image, picture_name: str) -> Image:
    """Read the mask before a model is loaded. Raises InputError for what is no picture, or one of another size."""
    mask = read_image(name)
    if mask.size != picture.size:
        sizes = [f"{each.width} x {each.height}" for each in (mask, picture)]
        raise InputError(f"{name} has {sizes[0]} pixels and {picture_name} {sizes[1]}; the mask must have the picture's size.")
    return mask


def _box(text: str) -> Box:
    """Parse the value of --box. Raises ArgumentTypeError."""
    parts = text.split(",")
    if len(parts) != 4:
        raise argparse.ArgumentTypeError(f"a box has four numbers, TOP,LEFT,BOTTOM,RIGHT, not {len(parts)}")
    top, left, bottom, right = (options.number(0, 1)(part.strip()) for part in parts)
    if top >= bottom or left >= right:
        raise argparse.ArgumentTypeError(f"{shown(text)} is empty: top must be above bottom, and left before right")
    return top, left, bottom, right
