"""Write pictures atomically, with metadata; read the metadata back; put pictures into grids.

PNG keeps the metadata as JSON in a text chunk, JPEG and WebP in EXIF's ImageDescription.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..errors import InputError, OutputError
from .reading import BROKEN, NotAFileError, check_regular

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MAX_SIDE = {"PNG": 2**31 - 1, "JPEG": 65500, "WEBP": 16383}
METADATA_KEY = "hart_infer"
SOFTWARE = "hart-infer"  # how the Software entry begins, which tells our pictures from others
EXIF_DESCRIPTION = 0x010E
EXIF_SOFTWARE = 0x0131
MAX_EXIF_BYTES = 65000  # one JPEG segment
MAX_NAME_BYTES = 255
GRID_GAP = 4
PARTIAL = re.compile(r"\.hart-[0-9a-f]{12}\.part")  # the name of a file that is being written

_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOTDIR: "a part of its path is a file, not a folder",
    errno.EEXIST: "a part of its path is a file, not a folder",
    errno.EISDIR: "it is a folder",
}


class NameTakenError(OutputError):
    """A picture with this name exists and was not to be replaced."""


def picture_format(path: str | Path) -> str:
    """Return Pillow's name of the format that the extension asks for. Raises InputError that lists the formats."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        found = f"the extension {suffix}" if suffix else "no extension"
        raise InputError(f"{path} has {found}; pictures are written as {', '.join(FORMATS)}.")
    return FORMATS[suffix]


def check_writable(paths: Iterable[str | Path], *, check: Callable[[str | Path], object] = picture_format) -> None:
    """Raise OutputError now for any path that can't be written; leaves nothing behind.

    `check` raises InputError for an extension that is not known.
    """
    probed: set[Path] = set()
    for path in paths:
        check(path)
        target = _resolved(path)
        try:
            _check_name(target)
            folder = _nearest_existing(target.parent)
            if folder not in probed:
                _probe(folder)
                probed.add(folder)
        except OSError as error:
            raise write_failure(path, error) from error


def save_picture(image: Image, path: str | Path, *, metadata: Mapping[str, Any] | None = None, overwrite: bool = True) -> Path:
    """Write `image` to `path` as RGB and return the path; missing folders are created.

    The file appears under its name only when it is complete. With `overwrite=False` an existing file is kept and NameTakenError
    raised. Raises OutputError if it can't be written, InputError for an unknown extension; leaves no partial file.
    """
    file_format = picture_format(path)
    limit = MAX_SIDE[file_format]
    if max(image.size) > limit:
        raise OutputError(
            f"{path} cannot be written: {image.width} x {image.height} pixels are too many for {file_format} "
            f"(at most {limit} a side); write a PNG."
        )
    options = save_options(image, path, file_format, metadata)
    try:
        with whole_file(path, overwrite=overwrite) as file:
            image.convert("RGB").save(file, format=file_format, **options)
    except NameTakenError:
        raise
    except OSError as error:
        raise write_failure(path, error) from error
    return Path(path)


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """Return the metadata that `save_picture` wrote, or None if there is none; decodes no pixels.

    Raises InputError if the file does not exist or is not a picture.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            check_regular(path)
            with Image.open(path) as image:
                exif = image.getexif()
                is_ours = str(exif.get(EXIF_SOFTWARE)).startswith(SOFTWARE)
                text = image.info.get(METADATA_KEY) or (exif.get(EXIF_DESCRIPTION) if is_ours else None)
    except NotAFileError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist.") from error
    except (*BROKEN, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as a picture.") from error
    try:
        values = json.loads(text) if text else None
    except (ValueError, TypeError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def make_grid(images: Sequence[Image], columns: int | None = None, *, gap: int = GRID_GAP) -> Image:
    """Put all images into one RGB picture, row by row, `gap` white pixels apart; about square if `columns` is None.

    Raises InputError for no images or fewer than one column.
    """
    from PIL import Image as Pillow

    if not images:
        raise InputError("A grid needs at least one image.")
    if columns is not None and columns < 1:
        raise InputError(f"A grid needs at least one column, not {columns}.")
    columns = grid_columns(len(images), columns)
    cell = (max(image.width for image in images), max(image.height for image in images))
    width, height = grid_size(len(images), columns, cell, gap)
    grid = Pillow.new("RGB", (width, height), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        grid.paste(image.convert("RGB"), (column * (cell[0] + gap), row * (cell[1] + gap)))
    return grid


def grid_columns(count: int, columns: int | None) -> int:
    """Return the columns of a grid of `count` cells: `columns` capped at `count`; for None or 0 about sqrt(count)."""
    return min(columns or math.ceil(math.sqrt(count)), count)


def grid_size(count: int, columns: int, cell: tuple[int, int], gap: int = GRID_GAP) -> tuple[int, int]:
    """Return width and height in pixels of a grid of `count` cells, each `cell` (width, height), `gap` pixels apart."""
    rows = math.ceil(count / columns)
    return columns * (cell[0] + gap) - gap, rows * (cell[1] + gap) - gap


def save_options(image: Image, path: str | Path, file_format: str, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return Pillow's keyword arguments; metadata is ASCII JSON, which any reader shows. Raises OutputError if too long."""
    from PIL import Image as Pillow
    from PIL.PngImagePlugin import PngInfo

    options: dict[str, Any] = {} if file_format == "PNG" else {"quality": 95}
    if file_format == "JPEG":
        options["subsampling"] = 0
    if metadata is None:
        return options
    text = json.dumps(metadata)
    software = str(metadata.get("software", SOFTWARE))
    if file_format == "PNG":
        chunks = PngInfo()
        chunks.add_text(METADATA_KEY, text)
        chunks.add_text("Software", software)
        return {**options, "pnginfo": chunks}
    if len(text) > MAX_EXIF_BYTES:
        raise OutputError(f"{path} cannot be written: its metadata is too long for {file_format}; write a PNG.")
    exif = Pillow.Exif()
    exif[EXIF_DESCRIPTION] = text
    exif[EXIF_SOFTWARE] = software
    return {**options, "exif": exif}


@contextmanager
def whole_file(path: str | Path, *, overwrite: bool) -> Iterator[BinaryIO]:
    """Yield a temporary file, renamed to `path` on success; on an exception it and new folders are removed."""
    target = _resolved(path)
    missing = [folder for folder in (target.parent, *target.parent.parents) if not os.path.lexists(folder)]
    temporary = target.with_name(_temporary_name())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # a full disk may show only here
        if overwrite:
            os.replace(temporary, target)
        else:
            _rename_to_new(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


def _rename_to_new(temporary: Path, target: Path) -> None:
    """Rename; raise NameTakenError if `target` exists, even since a moment ago where the file system has hard links."""
    try:
        os.link(temporary, target)
    except OSError as error:  # taken, or a file system without hard links
        if os.path.lexists(target):
            raise NameTakenError(f"{target} exists already; it was not replaced.") from error
        os.replace(temporary, target)
    else:
        temporary.unlink()


def _resolved(path: str | Path) -> Path:
    """Resolve symbolic links: a link at `path` stays, and the file behind it is written."""
    return Path(os.path.realpath(path))


def _nearest_existing(folder: Path) -> Path:
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def _check_name(target: Path) -> None:
    """Raise OSError if `target` is a folder, is not writable, or has too long a name."""
    if any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in target.parts):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _probe(folder: Path) -> None:
    """Create and delete a file: finds missing permission, read-only mounts and used-up quotas. Raises OSError."""
    probe = folder / _temporary_name()
    with open(probe, "xb"):
        pass
    probe.unlink()


def _temporary_name() -> str:
    return f".hart-{secrets.token_hex(6)}.part"


def write_failure(path: str | Path, error: OSError) -> OutputError:
    """Return the error to raise where writing `path` failed."""
    reason = _REASONS.get(error.errno or 0) or (error.strerror or str(error)).rstrip(".").lower()
    failure = OutputError(f"{path} cannot be written: {reason}.")
    failure.errno = error.errno
    return failure
