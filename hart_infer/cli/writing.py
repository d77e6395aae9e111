"""Write what `generate`, `edit` and `video` produce: pictures, videos, grids, previews, metadata, the lines on stdout."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, OutputError
from ..images.files import (
    MAX_NAME_BYTES,
    MAX_SIDE,
    NameTakenError,
    check_writable,
    grid_columns,
    grid_size,
    make_grid,
    picture_format,
    save_picture,
)
from ..pipelines.checks import shown
from .console import UsageError, emit, emit_json
from .families import Subject
from .naming import Job, Plan, distinct, renumbered

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..pipelines.outputs import Step


PLURALS = {"prompt": "prompts", "class_index": "class_indices", "class_name": "class_names"}  # in a grid's metadata


def check_outputs(paths: Iterable[Path], *, replace: bool, check: Callable[[str | Path], object] = picture_format) -> None:
    """Check before generating that `paths` can be written, and without `replace` are new; `check` is of an extension.

    Raises UsageError, OutputError.
    """
    paths = list(paths)
    for path in paths:
        if len(os.fsencode(path.name)) > MAX_NAME_BYTES:
            raise OutputError(f"{shown(str(path))} cannot be written: the name is too long.")
        try:
            check(path)
        except InputError as error:
            raise UsageError(f"--out: {error}") from error
        if not replace and path.exists():
            raise OutputError(f"{path} exists, and --no-overwrite was given.")
    check_writable(paths, check=check)


@dataclass(frozen=True)
class OutputOptions:
    """What is written for each picture, and what is printed."""

    grid: int | None  # columns; 0 for about square, None for no grid
    singles: bool  # beside a grid
    replaces: bool
    with_metadata: bool
    as_json: bool

    @staticmethod
    def of(args: argparse.Namespace) -> OutputOptions:
        """Read the options of `generate`, `edit` and `video`."""
        return OutputOptions(args.grid, args.singles, not args.no_overwrite, args.metadata, args.json)


class Writer:
    """Writes the pictures or videos of one plan and prints each one's path or JSON; touches no file before the first."""

    def __init__(self, options: OutputOptions, plan: Plan, save: Callable[..., Path] = save_picture) -> None:
        """Take the function that writes one: `save_picture`, or `save_video` with its frame rate."""
        self._options = options
        self._plan = plan
        self._save_one = save
        self._wants_singles = plan.grid is None or options.singles
        self._grid_images: list[Image] = []
        self._metadata: dict[str, Any] = {}
        self._subjects: Mapping[str | None, Subject] = {}

    def made_with(self, metadata: Mapping[str, Any], subjects: Mapping[str | None, Subject]) -> None:
        """Set the metadata that all pictures share, and what each prompt is."""
        self._metadata, self._subjects = dict(metadata), subjects

    def targets(self) -> list[Path]:
        """Return every file that will be written, previews not counted."""
        singles = [job.path for job in self._plan.jobs] if self._wants_singles else []
        return singles if self._plan.grid is None else [*singles, self._plan.grid]

    def check_grid_size(self, side: int) -> None:
        """Raise OutputError for a grid of pictures of `side` pixels that its format cannot hold."""
        path = self._plan.grid
        if path is None:
            return
        count = len(self._plan.jobs)
        size = max(grid_size(count, grid_columns(count, self._options.grid), (side, side)))
        limit = MAX_SIDE[picture_format(path)]
        if size > limit:
            raise OutputError(f"{path} cannot be written: {size} pixels are more than its format holds ({limit}).")

    def add(self, job: Job, drawn: Image | list[Image]) -> None:
        """Write one picture, keep it for the grid, or both; or write the frames of a video."""
        frames = drawn if isinstance(drawn, list) else [drawn]
        if self._plan.grid is not None:
            self._grid_images += frames
        if self._wants_singles:
            made_of = {**self._subjects[job.prompt].metadata, "seed": job.seed}
            self._report(self._save(drawn, job.path, {**made_of, "size": frames[0].width}), made_of)

    def finish(self) -> None:
        """Write the grid, if one was asked for."""
        if self._plan.grid is None:
            return
        jobs = self._plan.jobs
        subjects = [self._subjects[job.prompt].metadata for job in jobs]
        made_of = {PLURALS[name]: [subject[name] for subject in subjects] for name in subjects[0]}
        made_of |= {"seeds": [job.seed for job in jobs]}
        grid = make_grid(self._grid_images, self._options.grid or None)
        self._report(self._save(grid, self._plan.grid, {**made_of, "size": self._grid_images[0].width}), made_of)

    def _save(self, drawn: Image | list[Image], path: Path, made_of: dict[str, Any]) -> Path:
        metadata = None
        if self._options.with_metadata:
            metadata = {key: value for key, value in {**self._metadata, **made_of}.items() if value is not None}
        overwrite = self._plan.may_replace and self._options.replaces
        while True:
            try:
                return self._save_one(drawn, path, metadata=metadata, overwrite=overwrite)
            except NameTakenError:
                if self._plan.may_replace:
                    raise
                path = renumbered(path)

    def _report(self, path: Path, made_of: dict[str, Any]) -> None:
        if self._options.as_json:
            emit_json({"path": str(path), **made_of})
        else:
            emit(str(path))


class Previews:
    """Writes one PNG per picture and step into a folder of their own: NAME-scale-00.png, NAME-row-00.png and so on."""

    def __init__(self, folder: Path, jobs: Sequence[Job]) -> None:
        """Choose a distinct name for every picture."""
        names = distinct([folder / f"{job.path.stem}.png" for job in jobs])
        self._stems = {job.index: path.with_suffix("") for job, path in zip(jobs, names, strict=True)}

    def first_paths(self) -> list[Path]:
        """Return the first file of every picture, under the longest name of a step, checked in place of all steps."""
        return [_step_path(stem, "scale", 0) for stem in self._stems.values()]

    def callback(self, jobs: Sequence[Job], name: str) -> Callable[[Step], None]:
        """Return the function to call after each step of a batch, which writes its previews; `name`: what a step is."""

        def write(step: Step) -> None:
            for job, image in zip(jobs, step.preview(), strict=True):
                save_picture(image, _step_path(self._stems[job.index], name, step.index))

        return write


def _step_path(stem: Path, name: str, index: int) -> Path:
    return stem.with_name(f"{stem.name}-{name}-{index:02d}.png")
