"""Pictures as clients send and get them: read with limits, written as PNG, JPEG or WebP, kept where that is asked for."""

from __future__ import annotations

import hashlib
import io
import re
import secrets
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

from ..errors import InputError
from ..images.files import check_writable, whole_file, write_failure
from ..images.reading import BROKEN, to_rgb
from .problems import ApiError
from .protocol import Given, Picture

if TYPE_CHECKING:
    from PIL.Image import Image

Format = Literal["png", "jpeg", "webp"]
READ = ("PNG", "JPEG", "WEBP")
TRANSPARENT = 128  # alpha below this is transparent
NAME = re.compile(r"[0-9a-f]{32}\.(png|jpeg|webp)")
READERS = 2  # requests whose pictures are decoded at once, for a small file may be a large picture
T = TypeVar("T")
_readers: RunVar[CapacityLimiter] = RunVar("hart_infer_readers")


@dataclass(frozen=True)
class Encoding:
    """How pictures are sent; `quality` from 0 to 100 is of JPEG and WebP."""

    format: Format = "png"
    quality: int = 100


def encode(picture: Picture, encoding: Encoding) -> bytes:
    """Return a picture's file."""
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.frombytes("RGB", (picture.width, picture.height), picture.pixels)
    if encoding.format == "jpeg":
        image.save(buffer, format="JPEG", quality=encoding.quality, subsampling=0)
    elif encoding.format == "webp":
        image.save(buffer, format="WEBP", quality=encoding.quality)
    else:
        image.save(buffer, format="PNG")
    return buffer.getvalue()


async def in_turn(read: Callable[[], T]) -> T:
    """Run what decodes pictures in a thread, few at once."""
    limiter = _readers.get(None)
    if limiter is None:
        limiter = CapacityLimiter(READERS)
        _readers.set(limiter)
    return await to_thread.run_sync(read, limiter=limiter)


@dataclass
class Budget:
    """How many pixels the pictures of a request may have, each and together."""

    most: int
    taken: int = 0

    def take(self, width: int, height: int, name: str) -> None:
        """Take a picture's pixels. Raises InputError for a picture that is too large, ApiError for too many together."""
        if width * height > self.most:
            raise InputError(f"{name} has {width} x {height} pixels; at most {self.most:,} are taken.")
        self.taken += width * height
        if self.taken > self.most:
            told = f"{name}: the pictures have more than the {self.most:,} pixels that a request may have together."
            raise ApiError(413, told, code="too_large")


def read_picture(content: bytes, name: str, budget: Budget) -> Picture:
    """Read an uploaded picture. Raises InputError, and ApiError where the budget is spent."""
    with _told(name):
        return _picture(to_rgb(_opened(content, name, budget)))


def read_given(image: bytes, mask: bytes | None, max_pixels: int) -> Given:
    """Read a picture and its mask, which says what to paint anew: transparent parts, or white ones if it has no transparency.

    Without a mask the picture's own transparent parts are painted anew. Raises InputError.
    """
    from PIL import Image

    picture = _upright(image, "image", max_pixels)
    if mask is None and not picture.has_transparency_data:
        raise InputError("There is no mask, and image has no transparent parts: send a mask of what to paint anew.")
    painted = picture if mask is None else _upright(mask, "mask", max_pixels)
    if painted.size != picture.size:
        sizes = [f"{each.width} x {each.height}" for each in (painted, picture)]
        raise InputError(f"mask has {sizes[0]} pixels and image {sizes[1]}; they must have the same size.")
    if painted.has_transparency_data:
        anew = painted.convert("RGBA").getchannel("A").point(lambda alpha: 255 if alpha < TRANSPARENT else 0)
    else:
        anew = to_rgb(painted).convert("L")
    digest = hashlib.sha256(image + b"|" + (mask or b"")).hexdigest()
    assert isinstance(anew, Image.Image)
    return Given(_picture(to_rgb(picture)), _picture(anew), digest)


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Raise InputError for what Pillow raises of a broken file, its EXIF data too."""
    from PIL import Image

    try:
        yield
    except InputError:
        raise
    except (*BROKEN, Image.DecompressionBombError):
        raise InputError(f"{name} is not a whole picture in PNG, JPEG or WebP.") from None


def _upright(content: bytes, name: str, max_pixels: int) -> Image:
    """Decode a picture's file and turn it as its EXIF data says. Raises InputError."""
    from PIL import ImageOps

    with _told(name):
        return ImageOps.exif_transpose(_opened(content, name, Budget(max_pixels)))


def _opened(content: bytes, name: str, budget: Budget) -> Image:
    """Decode a picture's file once its header has passed the budget."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(content), formats=READ)
        budget.take(image.width, image.height, name)
        image.load()
    return image


def _picture(image: Image) -> Picture:
    return Picture(image.width, image.height, image.tobytes())


class PictureStore:
    """A folder of finished pictures, under names that nobody can guess."""

    def __init__(self, folder: Path) -> None:
        """Raises OutputError if nothing can be written there."""
        self._folder = folder
        check_writable([folder / "x.png"])

    def keep(self, content: bytes, file_format: Format) -> str:
        """Write a picture's file and return its name. Raises OutputError; leaves no half-written file."""
        name = f"{secrets.token_hex(16)}.{file_format}"
        path = self._folder / name
        try:
            with whole_file(path, overwrite=False) as file:
                file.write(content)
        except OSError as error:
            raise write_failure(path, error) from error
        return name

    def path(self, name: str) -> Path | None:
        """Return the file of a name that `keep` returned; None if there is none."""
        path = self._folder / name
        return path if NAME.fullmatch(name) and path.is_file() else None
