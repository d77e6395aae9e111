"""Sets of pictures as they come: a folder, what `hart-infer batch` wrote, an .npz of pixels or of statistics."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from metrics import Gaussian
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from hart_infer import InputError
from hart_infer.batch.claim import RUN
from hart_infer.batch.manifest import MANIFEST, PARTS, import_pyarrow

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SAMPLED = "settings.json"  # what benchmarks/sample_for_fid.py writes beside its pictures
Settings = dict[str, object]  # as JSON has them


class Source(Protocol):
    """Where pixels come from."""

    def __len__(self) -> int:
        """Return how many pictures there are."""
        ...

    def picture(self, place: int) -> tuple[Image.Image, str]:
        """Return a picture in RGB and the format that it is stored in."""
        ...


@dataclass(frozen=True)
class PictureSet:
    """Pictures and what is known of them. `settings` has the model and the hash of its weights where they are on record."""

    name: str
    source: Source
    names: tuple[str, ...]
    captions: tuple[str, ...] | None = None
    settings: Settings | None = None
    failed: int = 0  # rows of a batch that could not be drawn

    def chosen(self, names: Sequence[str]) -> PictureSet:
        """Return the set of these pictures, in this order. Raises InputError for one that is missing."""
        place = {name: i for i, name in enumerate(self.names)}
        missing = [name for name in names if name not in place]
        if missing:
            raise InputError(f"{self.name} lacks {len(missing)} of {len(names)} pictures, such as {missing[0]}.")
        places = [place[name] for name in names]
        captions = None if self.captions is None else tuple(self.captions[i] for i in places)
        return replace(self, source=_Chosen(self.source, places), names=tuple(names), captions=captions)


@dataclass(frozen=True)
class Read:
    """What came to light while a set was read."""

    pixels: str  # hash of all pixels, 16 hexadecimal digits
    side: tuple[int, int]  # height and width as stored
    formats: tuple[str, ...]


class Reader:
    """Reads a set once, in batches; `found` says afterwards what was read."""

    def __init__(self, pictures: PictureSet, size: int | None) -> None:
        """`size`: resize to this side. Without one all pictures must be equally large."""
        self._pictures, self._size = pictures, size
        self._digest, self._formats, self._side = hashlib.sha256(), set[str](), (0, 0)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield [N, 3, h, w] fp32 in 0..255. Raises InputError."""
        count = len(self._pictures.source)
        for first in range(0, count, batch_size):
            yield torch.stack([self._next(place) for place in range(first, min(first + batch_size, count))])

    def _next(self, place: int) -> Tensor:
        image, stored = self._pictures.source.picture(place)
        side = (image.height, image.width)
        if self._size is None and place and side != self._side:
            raise InputError(
                f"{self._pictures.name} has pictures of {_sides(self._side)} and of {_sides(side)}; --size resizes them to one."
            )
        self._side = side
        self._formats.add(stored)
        self._digest.update(f"{side}".encode() + image.tobytes())
        return to_tensor(image, self._size)

    @property
    def found(self) -> Read:
        """What was read."""
        return Read(self._digest.hexdigest()[:16], self._side, tuple(sorted(self._formats)))


def to_tensor(image: Image.Image, size: int | None) -> Tensor:
    """Return [3, h, w] fp32 in 0..255; resized by Pillow's bicubic filter in fp32, as clean-fid does (arXiv:2104.11222)."""
    if size is None:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    channels = [Image.fromarray(np.asarray(channel, dtype=np.float32)) for channel in image.split()]
    resized = [np.asarray(channel.resize((size, size), Image.Resampling.BICUBIC)) for channel in channels]
    return torch.from_numpy(np.stack(resized)).clamp(0, 255)


# ---- sources


@dataclass(frozen=True)
class _Files:
    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def picture(self, place: int) -> tuple[Image.Image, str]:
        path = self.paths[place]
        try:
            with Image.open(path) as image:
                return image.convert("RGB"), image.format or "?"
        except (OSError, UnidentifiedImageError, SyntaxError) as error:
            raise InputError(f"{path} can't be read as a picture.") from error


@dataclass(frozen=True)
class _Array:
    pixels: np.ndarray  # [N, h, w, 3] uint8

    def __len__(self) -> int:
        return len(self.pixels)

    def picture(self, place: int) -> tuple[Image.Image, str]:
        return Image.fromarray(self.pixels[place]), "npz"


@dataclass(frozen=True)
class _Chosen:
    source: Source
    places: list[int]

    def __len__(self) -> int:
        return len(self.places)

    def picture(self, place: int) -> tuple[Image.Image, str]:
        return self.source.picture(self.places[place])


# ---- opening


def open_set(path: Path) -> PictureSet:
    """Open a folder or an .npz. Raises InputError."""
    if path.suffix == ".npz":
        array = _arrays(path).get("arr_0")
        if array is None or array.ndim != 4 or array.dtype != np.uint8 or array.shape[-1] != 3:
            raise InputError(f"{path} has no pictures: an array arr_0 [N, H, W, 3] of uint8.")
        return PictureSet(path.name, _Array(array), tuple(str(i) for i in range(len(array))))
    if not path.is_dir():
        raise InputError(f"{path} is neither a folder of pictures nor an .npz file.")
    return _batch(path) if (path / RUN).exists() else _folder(path)


def open_reference(path: Path) -> PictureSet | Gaussian:
    """Open what is compared with: pictures, or an .npz with the statistics `mu` [D] and `sigma` [D, D]. Raises InputError."""
    if path.suffix == ".npz":
        arrays = _arrays(path)
        if "mu" in arrays and "sigma" in arrays:
            return Gaussian(torch.from_numpy(arrays["mu"]).double(), torch.from_numpy(arrays["sigma"]).double())
    return open_set(path)


def of_array(name: str, pixels: np.ndarray, names: Sequence[str]) -> PictureSet:
    """Return the set of pictures [N, h, w, 3] uint8 that lie in memory."""
    return PictureSet(name, _Array(pixels), tuple(names))


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            wanted = ("mu", "sigma") if "mu" in archive.files else ("arr_0",)
            return {name: archive[name] for name in wanted if name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} can't be read as an .npz file.") from error


def _folder(path: Path) -> PictureSet:
    """A folder with all that is below it; a picture is called by its path without the suffix."""
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))
    if not files:
        raise InputError(f"{path} holds no pictures ({', '.join(SUFFIXES)}).")
    names = tuple(file.relative_to(path).with_suffix("").as_posix() for file in files)
    settings = read_json(path / SAMPLED) if (path / SAMPLED).exists() else None
    return PictureSet(path.name, _Files(tuple(files)), names, settings=settings)


def _batch(path: Path) -> PictureSet:
    """What `hart-infer batch` drew into a folder, whole."""
    settings = read_json(path / RUN)
    if settings.get("format", "png") != "png":
        raise InputError(f"{path} holds shards; unpack shards/*.tar into a folder and give that.")
    if not (path / MANIFEST).exists() or any((path / PARTS).glob("*.parquet")):
        raise InputError(f"{path} is a batch that is not finished; the same `hart-infer batch` goes on.")
    pyarrow = import_pyarrow()
    from pyarrow import parquet

    file = parquet.ParquetFile(pyarrow.BufferReader((path / MANIFEST).read_bytes()))
    lines = file.read(["id", "prompt", "file", "error"], use_threads=False).to_pylist()
    drawn = [line for line in lines if line["error"] is None]
    if not drawn:
        raise InputError(f"{path} holds no pictures: no row of the batch could be drawn.")
    files = tuple(path / line["file"] for line in drawn)
    return PictureSet(
        path.name,
        _Files(files),
        names=tuple(line["id"] for line in drawn),
        captions=tuple(line["prompt"] for line in drawn),
        settings=settings,
        failed=len(lines) - len(drawn),
    )


def read_json(path: Path) -> Settings:
    """Read a JSON object. Raises InputError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read as JSON.") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} is not a JSON object.")
    return values


def _sides(side: tuple[int, int]) -> str:
    return f"{side[0]} x {side[1]} px"
