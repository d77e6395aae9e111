"""Convert between tensors in 0..1 and PIL, NumPy or torch images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError
from .reading import to_rgb

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


def to_numpy(pixels: Tensor) -> np.ndarray[Any, Any]:
    """Convert [N, 3, H, W] -> numpy [N, H, W, 3] fp32."""
    return pixels.permute(0, 2, 3, 1).float().cpu().numpy()


def to_uint8(pixels: Tensor, *, truncated: bool = False) -> Tensor:
    """Convert [N, 3, H, W] in 0..1 -> [N, H, W, 3] uint8 on the CPU, rounded to the nearest level on the source device.

    `truncated`: to the level below instead, as the released VILA-U writes pictures.
    """
    scaled = pixels * 255
    levels = (scaled if truncated else scaled.round_()).clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    if levels.device.type != "cuda":
        return levels.cpu()
    pinned = torch.empty(levels.shape, dtype=torch.uint8, pin_memory=True)
    pinned.copy_(levels, non_blocking=True)
    torch.cuda.current_stream(levels.device).synchronize()
    return pinned


def to_pil(pixels: Tensor, *, truncated: bool = False) -> list[Image]:
    """Convert [N, 3, H, W] in 0..1 -> N 8-bit RGB pictures, rounded to the nearest level or `truncated` to the level below."""
    from PIL import Image

    return [Image.fromarray(picture) for picture in to_uint8(pixels, truncated=truncated).numpy()]


def fit(picture: Image, size: int) -> Image:
    """Crop a picture to its centred square and scale it to `size` x `size` pixels."""
    from PIL import Image, ImageOps

    return ImageOps.fit(picture, (size, size), method=Image.Resampling.LANCZOS)


def to_tensor(image: Image | Sequence[Image] | Tensor, size: int, *, fitted: Callable[[Image, int], Image] = fit) -> Tensor:
    """Convert pictures -> [N, 3, size, size] fp32 in 0..1; PIL ones are made square by `fitted`, tensors must fit.

    Raises InputError.
    """
    if isinstance(image, Tensor):
        if image.ndim != 4 or not len(image) or image.shape[1:] != (3, size, size):
            raise InputError(f"An image tensor must have shape [N, 3, {size}, {size}], not {list(image.shape)}.")
        if not image.is_floating_point() or not ((image >= 0) & (image <= 1)).all():
            raise InputError("An image tensor must be floating-point with values in 0..1.")
        return image.float()
    pictures = list(image) if isinstance(image, Sequence) else [image]
    if not pictures:
        raise InputError("The list of images is empty; give at least one.")
    return torch.stack([_pil_to_tensor(picture, size, fitted) for picture in pictures])


def _pil_to_tensor(picture: Image, size: int, fitted: Callable[[Image, int], Image]) -> Tensor:
    import numpy as np
    from PIL import Image

    if not isinstance(picture, Image.Image):
        raise InputError(f"An image must be a PIL image or a tensor, not {type(picture).__name__}.")
    square = fitted(to_rgb(picture), size)
    return torch.from_numpy(np.asarray(square, dtype=np.float32) / 255).permute(2, 0, 1)


FORMS: dict[str, Callable[[Tensor], Any]] = {"pil": to_pil, "np": to_numpy, "pt": lambda pixels: pixels}
