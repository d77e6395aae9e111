"""Read pictures of any kind, from files or PIL, as upright 8-bit RGB."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, OutOfMemoryError

if TYPE_CHECKING:
    from PIL.Image import Image


def read_image(path: str | Path) -> Image:
    """Read the picture in a file and convert it by `to_rgb`. Raises InputError or OutOfMemoryError."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            return to_rgb(file)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except OSError as error:
        reason = error.strerror.lower() if error.strerror else "it is not a whole picture of a known format"
        raise InputError(f"{path} cannot be read: {reason}.") from error
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as a picture: {error}.") from error
    except MemoryError as error:
        raise OutOfMemoryError(f"{path} is too large for the memory.") from error


def to_rgb(image: Image) -> Image:
    """Convert to 8-bit RGB: apply EXIF orientation, put transparency on white, scale 16-bit and float to 8 bits.

    Raises InputError for integers over 65535 and for floats outside 0..1.
    """
    from PIL import Image as Pillow
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode == "F" or upright.mode.startswith("I"):
        return _scaled(upright).convert("RGB")
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    layer = upright.convert("RGBA")
    return Pillow.alpha_composite(Pillow.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _scaled(image: Image) -> Image:
    """Scale a grey picture of 16-bit integers or of floats in 0..1 to 8 bits, rounded to the nearest. Raises InputError."""
    import numpy as np
    from PIL import Image as Pillow

    values = np.asarray(image).astype(np.float64)
    white = 1 if image.mode == "F" else 65535
    if values.size and not (values.min() >= 0 and values.max() <= white):
        kind = "floats" if white == 1 else "integers"
        raise InputError(f"its values are {kind} from {values.min():g} to {values.max():g}; expected 0 to {white}.")
    return Pillow.fromarray((values * (255 / white)).round().astype(np.uint8))
