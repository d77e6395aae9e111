"""Write a chunk's pictures: PNG files, or a tar shard as WebDataset reads them; and its contact sheet."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..images.files import make_grid, save_options
from .rows import Row
from .storage import Storage

if TYPE_CHECKING:
    from PIL.Image import Image

Format = Literal["png", "webdataset"]
IMAGES, SHARDS, SHEETS = "images", "shards", "sheets"  # folders
THUMBNAIL = 256  # pixels, the side of a picture on a contact sheet

Metadata = Mapping[str, Any]


@dataclass(frozen=True)
class Written:
    """Where a picture is, relative to the run's folder, and the hash of its PNG file."""

    file: str
    sha256: str


AddPicture = Callable[[Row, "Image", Metadata], Written]


def open_writer(kind: Format, storage: Storage, chunk: str, *, with_metadata: bool) -> AbstractContextManager[AddPicture]:
    """Yield the function that writes one picture of a chunk. With `with_metadata`, a picture says how it was made."""
    writer = {"png": _png_files, "webdataset": _tar_shard}[kind]
    return writer(storage, chunk, with_metadata)


@contextmanager
def _png_files(storage: Storage, chunk: str, with_metadata: bool) -> Iterator[AddPicture]:
    """Write images/STEM.png for each row."""

    def add(row: Row, image: Image, metadata: Metadata) -> Written:
        content = _png(image, metadata if with_metadata else None)
        name = f"{IMAGES}/{row.stem}.png"
        with storage.whole(name) as file:
            file.write(content)
        return Written(name, hashlib.sha256(content).hexdigest())

    yield add


@contextmanager
def _tar_shard(storage: Storage, chunk: str, with_metadata: bool) -> Iterator[AddPicture]:
    """Write shards/CHUNK.tar with STEM.png, STEM.txt (the prompt) and STEM.json for each row; times and owners are 0.

    Without a picture there is no shard.
    """
    name = f"{SHARDS}/{chunk}.tar"
    tar: tarfile.TarFile | None = None
    with ExitStack() as stack:

        def add(row: Row, image: Image, metadata: Metadata) -> Written:
            nonlocal tar
            if tar is None:
                file = stack.enter_context(storage.whole(name))
                tar = stack.enter_context(tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT))
            content = _png(image, metadata if with_metadata else None)
            _add_member(tar, f"{row.stem}.png", content)
            _add_member(tar, f"{row.stem}.txt", (row.prompt or "").encode())
            facts = {"id": row.id, "seed": row.seed, **(metadata if with_metadata else {})}
            _add_member(tar, f"{row.stem}.json", json.dumps(facts).encode())
            return Written(f"{name}/{row.stem}.png", hashlib.sha256(content).hexdigest())

        yield add


def write_sheet(storage: Storage, chunk: str, thumbnails: list[Image]) -> None:
    """Write sheets/CHUNK.png, a contact sheet, about square."""
    with storage.whole(f"{SHEETS}/{chunk}.png") as file:
        make_grid(thumbnails).save(file, format="PNG")


def thumbnail(image: Image) -> Image:
    """Return a copy that fits into THUMBNAIL pixels a side."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return small


def _png(image: Image, metadata: Metadata | None) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG", **save_options(image, "picture.png", "PNG", metadata))
    return buffer.getvalue()


def _add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
