"""Prepare pictures for VILA-U's vision tower: square by `image_aspect_ratio` of its config.json, values in -1..1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from .tensors import to_tensor

if TYPE_CHECKING:
    from PIL.Image import Image

PAD_COLOUR = (127, 127, 127)
AspectRatio = Literal["resize", "pad"]


def resize(picture: Image, size: int) -> Image:
    """Scale a picture to `size` x `size` pixels bicubically, whatever its aspect ratio."""
    from PIL import Image

    return picture.resize((size, size), Image.Resampling.BICUBIC)


def pad(picture: Image, size: int) -> Image:
    """Put an RGB picture in the middle of a grey square, then `resize` it."""
    from PIL import Image

    side = max(picture.size)
    square = Image.new("RGB", (side, side), PAD_COLOUR)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return resize(square, size)


ASPECT_RATIOS: dict[AspectRatio, Callable[[Image, int], Image]] = {"resize": resize, "pad": pad}


def to_pixel_values(image: Image | Sequence[Image] | Tensor, size: int, aspect_ratio: AspectRatio = "resize") -> Tensor:
    """Convert pictures, made RGB first, or a tensor [N, 3, size, size] in 0..1 -> [N, 3, size, size] fp32 in -1..1.

    Raises InputError.
    """
    return to_tensor(image, size, fitted=ASPECT_RATIOS[aspect_ratio]) * 2 - 1
