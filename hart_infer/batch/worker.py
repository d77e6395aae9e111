"""Own a pipeline; draw a chunk, write its pictures, and record them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import HartError, InputError
from .claim import claim_weights
from .manifest import Record, write_part
from .plan import Chunk
from .rows import Row
from .storage import open_storage
from .writers import AddPicture, Format, open_writer, thumbnail, write_sheet

if TYPE_CHECKING:
    from PIL.Image import Image


class BrokenWorkerError(HartError, RuntimeError):
    """The worker's device has failed, and fails from now on: only a new process can draw."""


class Subject(Protocol):
    """What a row's prompt is to a model."""

    @property
    def argument(self) -> Any:
        """Return the argument of a call."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Return entries of a picture's metadata."""
        ...


@dataclass(frozen=True)
class Model:
    """A loaded pipeline, and how it is called."""

    pipe: Callable[..., Any]  # of prompts, seed=[...] and settings; returns an output with PIL `images`
    name: str
    settings: Mapping[str, Any]  # all arguments that a row may change, by name
    made_with: Mapping[str, Any]  # what metadata says of model and machine
    subject: Callable[[str], Subject]  # of a row's prompt; raises InputError
    weights: str  # a hash of all weights as they lie in memory


@dataclass(frozen=True)
class WorkerOptions:
    """What a worker does, in a form that goes to other machines. `out` is the storage's path or URL."""

    load: Callable[[], Model]
    out: str
    batch_size: int = 1
    format: Format = "png"
    with_metadata: bool = True
    sheets: bool = False


@dataclass(frozen=True)
class Done:
    """What became of a chunk."""

    drawn: int
    failed: int


@dataclass(frozen=True)
class _Picture:
    row: Row
    subject: Subject
    image: Image
    seconds: float


class Worker:
    """Draws one chunk after the other."""

    def __init__(self, options: WorkerOptions) -> None:
        """Load the model. Raises HartError, also where the folder's pictures are drawn with other weights."""
        self._options = options
        self._storage = open_storage(options.out)
        self._model = options.load()
        claim_weights(self._storage, self._model.weights)

    def finish(self, chunk: Chunk) -> Done:
        """Draw a chunk, write its pictures, then its part of the manifest.

        A row that can't be drawn is recorded with its error. Raises OutputError where nothing can be written, and
        BrokenWorkerError.
        """
        options = self._options
        records: dict[str, Record] = {}
        thumbnails: list[Image] = []
        with open_writer(options.format, self._storage, chunk.name, with_metadata=options.with_metadata) as add:
            for rows in chunk.batches(options.batch_size):
                for outcome in self._draw(rows):
                    record = outcome if isinstance(outcome, Record) else self._write(outcome, add)
                    records[record.id] = record
                    if options.sheets and isinstance(outcome, _Picture):
                        thumbnails.append(thumbnail(outcome.image))
        if thumbnails:
            write_sheet(self._storage, chunk.name, thumbnails)
        write_part(self._storage, chunk.name, [records[row.id] for row in chunk.rows])
        failed = sum(record.error is not None for record in records.values())
        return Done(len(records) - failed, failed)

    def _draw(self, rows: Sequence[Row]) -> list[_Picture | Record]:
        """Draw rows of equal settings together; if that fails, one by one, to find which of them can't be drawn."""
        ready: list[tuple[Row, Subject]] = []
        outcomes: list[_Picture | Record] = []
        for row in rows:
            try:
                self._arguments(row)
                ready.append((row, self._model.subject(row.prompt or "")))
            except InputError as error:
                outcomes.append(self._failure(row, error))
        return outcomes + (self._draw_ready(ready) if ready else [])

    def _draw_ready(self, ready: Sequence[tuple[Row, Subject]]) -> list[_Picture | Record]:
        try:
            return list(self._call(ready))
        except Exception as error:  # whatever it is, it is recorded, and the next row is drawn
            if "CUDA error" in str(error):
                raise BrokenWorkerError(f"the device failed: {error}") from error
            if len(ready) == 1:
                return [self._failure(ready[0][0], error)]
        return [outcome for each in ready for outcome in self._draw_ready([each])]

    def _call(self, ready: Sequence[tuple[Row, Subject]]) -> list[_Picture]:
        start = time.perf_counter()
        prompts, seeds = [subject.argument for _, subject in ready], [row.seed for row, _ in ready]
        images = self._model.pipe(prompts, seed=seeds, **self._arguments(ready[0][0])).images
        seconds = (time.perf_counter() - start) / len(ready)
        return [_Picture(row, subject, image, seconds) for (row, subject), image in zip(ready, images, strict=True)]

    def _arguments(self, row: Row) -> dict[str, Any]:
        """Return the settings of a row's call. Raises InputError for one that the model does not have."""
        unknown = [name for name, _ in row.settings if name not in self._model.settings]
        if unknown:
            raise InputError(f"{self._model.name} does not take {' or '.join(unknown)}; leave the cell empty.")
        return {**self._model.settings, **dict(row.settings)}

    def _write(self, picture: _Picture, add: AddPicture) -> Record:
        row = picture.row
        made_of = {**picture.subject.metadata, "seed": row.seed, "size": picture.image.width, "model": self._model.name}
        settings = {**self._arguments(row), **self._model.made_with}
        if row.settings:
            settings.pop("speed", None)  # a name for the run's settings, which a row's own may belie
        metadata = {name: value for name, value in {**settings, **made_of}.items() if value is not None}
        written = add(row, picture.image, metadata)
        return Record(
            id=row.id,
            prompt=row.prompt,
            seed=row.seed,
            file=written.file,
            sha256=written.sha256,
            model=self._model.name,
            settings=_json(settings),
            seconds=picture.seconds,
        )

    def _failure(self, row: Row, error: Exception) -> Record:
        told = str(error) if isinstance(error, HartError) else f"{type(error).__name__}: {error}"
        return Record(row.id, row.prompt, row.seed, model=self._model.name, settings=_json(dict(row.settings)), error=told)


def _json(settings: Mapping[str, Any]) -> str:
    return json.dumps({name: value for name, value in settings.items() if value is not None}, sort_keys=True)
