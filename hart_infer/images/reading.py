"""Read pictures of any kind, from files or PIL, as upright 8-bit RGB."""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, OutOfMemoryError

if TYPE_CHECKING:
    from PIL.Image import Image

# What Pillow raises of a broken file, its EXIF data too.
BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, struct.error)


def read_image(path: str | Path) -> Image:
    """Read the picture in a file and convert it by `to_rgb`. Raises InputError or OutOfMemoryError."""
    from PIL import Image

    try:
        check_regular(path)
        with Image.open(path) as file:
            return to_rgb(file)
    except NotAFileError:
        raise
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except OSError as error:
        reason = error.strerror.lower() if error.strerror else "it is not a whole picture of a known format"
        raise InputError(f"{path} cannot be read: {reason}.") from error
    except (*BROKEN, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as a picture: {error}.") from error
    except MemoryError as error:
        raise OutOfMemoryError(f"{path} is too large for the memory.") from error


class NotAFileError(InputError):
    """A path names a pipe, a device or a folder, which may never end."""


def check_regular(path: str | Path) -> None:
    """Raise NotAFileError unless `path` is a file, and OSError if there is nothing."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise NotAFileError(f"{path} is not a file; give a picture's.")


def to_rgb(image: Image) -> Image:
    """Convert to 8-bit RGB: apply EXIF orientation, put transparency on white, scale 16-bit and float to 8 bits.

    Mode "I" is of 16 bits where it comes from a file, else of 8, as Pillow converts it. Raises InputError for integers over
    that and for floats outside 0..1.
    """
    from PIL import Image as Pillow
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode == "F" or upright.mode.startswith("I"):
        white = 1 if upright.mode == "F" else 255 if upright.mode == "I" and image.format is None else 65535
        return _scaled(upright, white).convert("RGB")
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    layer = upright.convert("RGBA")
    return Pillow.alpha_composite(Pillow.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _scaled(image: Image, white: int) -> Image:
    """Scale a grey picture of 0..white to 8 bits, rounded to the nearest, and make its transparent value white.

    Raises InputError.
    """
    import numpy as np
    from PIL import Image as Pillow

    values = np.asarray(image).astype(np.float64)
    if values.size and not (values.min() >= 0 and values.max() <= white):
        kind = "floats" if white == 1 else "integers"
        raise InputError(f"its values are {kind} from {values.min():g} to {values.max():g}; expected 0 to {white}.")
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        values[values == transparent] = white
    return Pillow.fromarray((values * (255 / white)).round().astype(np.uint8))
