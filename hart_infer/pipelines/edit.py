"""Paint parts of a given picture anew: what a mask keeps is fed on from its own codes (VAR section 4.4, zero-shot)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..generation.schedule import Stage
from ..images import tensors
from ..images.reading import to_rgb
from ..models.parts.quantizer import Quantizer, Tokens
from .checks import check_float

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[float, float, float, float]  # top, left, bottom, right, as shares of the side
Mask = Union["Image", Tensor, Box]
KEPT_WHOLE = 3  # scales of at most so many tokens keep everything, as released
PAINTED = 0.5  # a mask's values from here on are painted anew


@dataclass(frozen=True, eq=False)
class PictureEdit:
    """A given picture's codes and what of it is kept; the `edit` of a call. The masks are 1 where painted anew."""

    tokens: Tokens  # of one picture
    keep: Tensor  # [1, 1, P, P] fp32: 1 keeps, 0 is painted anew
    picture: Tensor  # [1, 3, H, W] fp32 in 0..1
    anew: Tensor | None  # [1, 1, H, W] fp32: weight of the painted pixels; None leaves all pixels as decoded

    def embedding(self, embedding: Tensor, stage: Stage) -> Tensor:
        """Replace the kept cells of a scale's embedding [B, C, p, p] by the given picture's.

        At a scale whose codes are not refined, HART's last, by the picture's continuous residual.
        """
        given = self.tokens.residual if stage.phi is None else self.tokens.embeddings[stage.index]
        keep = keep_at(self.keep.to(embedding.device), stage.side)
        return torch.where(keep, given.to(embedding.device), embedding)

    def blend(self, pixels: Tensor) -> Tensor:
        """Put the given picture's pixels [1, 3, H, W] back where it is kept, feathered; [B, 3, H, W] -> [B, 3, H, W]."""
        if self.anew is None:
            return pixels
        picture, anew = self.picture.to(pixels.device), self.anew.to(pixels.device)
        return picture + (pixels - picture) * anew

    def digest(self) -> int:
        """Return a number that differs where picture or mask do."""
        parts = [part for part in (self.keep, self.picture, self.anew) if part is not None]
        return zlib.crc32(torch.cat([part.flatten().cpu() for part in parts]).numpy().tobytes())


class NoEdit(PictureEdit):
    """The edit of a call that draws everything."""

    def __init__(self) -> None:
        pass

    def digest(self) -> int:
        """Return 0."""
        return 0

    def __repr__(self) -> str:
        """Return its name; it has no fields."""
        return "NoEdit()"

    def embedding(self, embedding: Tensor, stage: Stage) -> Tensor:
        """Return the embedding as drawn."""
        return embedding

    def blend(self, pixels: Tensor) -> Tensor:
        """Return the pixels as decoded."""
        return pixels


NO_EDIT = NoEdit()


def check_edit(edit: Any, size: int, quantizer: Quantizer) -> None:
    """Raise InputError unless `edit` was made for pictures of `size` pixels and codes of this quantizer."""
    if not isinstance(edit, PictureEdit):
        raise InputError(f"edit must come from the pipeline's edit(), not {type(edit).__name__}.")
    sides = tuple(each.shape[-1] for each in edit.tokens.embeddings)
    channels = edit.tokens.residual.shape[1]
    if (edit.picture.shape[-1], sides, channels) != (size, quantizer.patch_nums, quantizer.codebook.embedding_dim):
        raise InputError("edit is of another model; make it by this pipeline's edit().")


def check_picture(image: Any, size: int) -> tuple[Tensor, tuple[int, int]]:
    """Return one picture as [1, 3, size, size] in 0..1, and its own width and height when upright. Raises InputError."""
    if isinstance(image, Tensor):
        image = image[None] if image.dim() == 3 else image
    elif isinstance(image, Sequence) and not isinstance(image, str):
        image = list(image)
    else:
        image = [image]
    pixels = tensors.to_tensor(image, size)
    if len(pixels) != 1:
        raise InputError(f"edit takes one picture, not {len(pixels)}.")
    if isinstance(image, Tensor):
        return pixels, (size, size)
    from PIL import ImageOps

    return pixels, ImageOps.exif_transpose(image[0]).size


def keep_at(keep: Tensor, side: int) -> Tensor:
    """Return which cells of a scale are kept, [1, 1, side, side] bool: the mask resized bilinearly, above 0.5."""
    if side * side <= KEPT_WHOLE:
        return torch.ones(1, 1, side, side, dtype=torch.bool, device=keep.device)
    return F.interpolate(keep, size=(side, side), mode="bilinear", align_corners=False) > 0.5


def check_mask(mask: Any, *, side: int, cell: int, source: tuple[int, int] | None, inside: bool) -> Tensor:
    """Return where to paint anew, [1, 1, H, W] fp32 of zeros and ones, for a latent of `side` cells of `cell` pixels.

    `mask`: a PIL image of the picture's size `source` (width, height), white where painted anew; a tensor of H x W pixels or
    side x side cells, 1 or True there; or a box, which is painted anew inside or, unless `inside`, outside. Transparent parts
    of a PIL mask are kept. Raises InputError.
    """
    if isinstance(mask, Tensor):
        anew = _from_tensor(mask, side, side * cell)
    elif isinstance(mask, Sequence) and not isinstance(mask, str):
        anew = _from_box(mask, side, inside)
    else:
        anew = _from_picture(mask, source, side * cell)
    if not anew.any():
        raise InputError(
            "The mask keeps all of the picture's centred square, so there is nothing to paint; make what shall be painted anew "
            "white (or True, or within the box)."
        )
    return F.interpolate(anew[None, None], size=(side * cell, side * cell), mode="nearest")


def keep_mask(anew: Tensor, side: int) -> Tensor:
    """Return the latent's mask [1, 1, side, side]: a cell is kept if none of its pixels is painted anew."""
    return (F.adaptive_max_pool2d(anew, side) == 0).float()


def feathered(anew: Tensor, radius: int) -> Tensor:
    """Let a mask of ones [1, 1, H, W] fall to zero over 2 * radius pixels outside itself."""
    width = 2 * radius + 1
    grown = F.max_pool2d(anew, width, stride=1, padding=radius)
    padded = F.pad(grown, (radius, radius, radius, radius), mode="replicate")
    return F.avg_pool2d(padded, width, stride=1)


def _from_box(box: Sequence[Any], side: int, inside: bool) -> Tensor:
    """Return a box's mask of side x side cells; each edge is the nearest cell's, half to even, as released."""
    if len(box) != 4:
        raise InputError(f"A box has four numbers, top, left, bottom and right as shares of the side, not {len(box)}.")
    top, left, bottom, right = (round(check_float(value, "The box's numbers", 0, 1) * side) for value in box)
    if float(box[0]) >= float(box[2]) or float(box[1]) >= float(box[3]):
        raise InputError(f"The box {tuple(box)} is empty: top must be above bottom, and left before right.")
    if top >= bottom or left >= right:
        raise InputError(
            f"The box {tuple(box)} is too thin: its edges go to the nearest of {side} cells a side, and meet there."
        )
    anew = torch.full((side, side), 0.0 if inside else 1.0)
    anew[top:bottom, left:right] = 1.0 if inside else 0.0
    return anew


def _from_tensor(mask: Tensor, side: int, pixels: int) -> Tensor:
    shape = tuple(mask.shape[-2:])
    if mask.dim() < 2 or mask.numel() != shape[0] * shape[1] or shape not in ((side, side), (pixels, pixels)):
        raise InputError(
            f"The mask must have {pixels} x {pixels} pixels or {side} x {side} cells, not the shape {list(mask.shape)}."
        )
    values = mask.detach().reshape(shape).float().cpu()
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise InputError("The mask's values must be from 0 (kept) to 1 (painted anew).")
    return (values >= PAINTED).float()


def _from_picture(mask: Any, source: tuple[int, int] | None, size: int) -> Tensor:
    import numpy as np
    from PIL import Image, ImageOps

    if not isinstance(mask, Image.Image):
        raise InputError(f"The mask must be a PIL image, a tensor or a box of four numbers, not {type(mask).__name__}.")
    upright = ImageOps.exif_transpose(mask)
    if source is not None and upright.size != source:
        raise InputError(f"The mask has {upright.width} x {upright.height} pixels and the picture {source[0]} x {source[1]}.")
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, "black"), layer)
    grey = np.asarray(to_rgb(upright).convert("L"))
    width = min(grey.shape)
    top, left = ((length - width) // 2 for length in grey.shape)
    square = torch.from_numpy(grey[top : top + width, left : left + width] >= PAINTED * 255).float()[None, None]
    if width >= size:
        return F.adaptive_max_pool2d(square, size)[0, 0]  # a thin stroke counts
    return F.interpolate(square, size=(size, size), mode="nearest")[0, 0]
