"""What `generate` writes: pictures, grids, previews, their metadata and the lines on stdout."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hart_infer

from ..errors import InputError, OutputError
from ..images.files import (
    MAX_SIDE,
    NameTakenError,
    check_writable,
    grid_columns,
    grid_size,
    make_grid,
    picture_format,
    save_picture,
)
from .console import UsageError, emit, emit_json
from .naming import Job, Plan, distinct, renumbered
from .options import public_name

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..pipelines.outputs import Step


def check_outputs(paths: Iterable[Path], *, replace: bool) -> None:
    """Raise before the work is done what writing to `paths` would raise after it."""
    paths = list(paths)
    for path in paths:
        try:
            picture_format(path)
        except InputError as error:
            raise UsageError(f"--out: {error}") from error
        if not replace and path.exists():
            raise OutputError(f"{path} exists, and --no-overwrite was given.")
    check_writable(paths)


def sampling_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options that shape a picture, under the names of the pipeline's call."""
    return {
        "size": args.size,
        "guidance_scale": args.guidance_scale,
        "num_inference_steps": args.steps,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "more_smooth": args.more_smooth,
        "negative_prompt": args.negative_prompt,
        "use_system_prompt": args.use_system_prompt,
    }


class Writer:
    """Writes the pictures of one plan and reports each."""

    def __init__(self, args: argparse.Namespace, plan: Plan) -> None:
        """Take the options and the names; touches no file."""
        self._args = args
        self._plan = plan
        self._wants_singles = plan.grid is None or args.singles
        self._grid_images: list[Image] = []
        self._machine: dict[str, str] = {}

    def made_on(self, *, device: str, dtype: str) -> None:
        """Tell what the pictures are computed on, for their metadata."""
        self._machine = {"device": device, "dtype": dtype}

    def targets(self) -> list[Path]:
        """Every file that will be written."""
        singles = [job.path for job in self._plan.jobs] if self._wants_singles else []
        return singles if self._plan.grid is None else [*singles, self._plan.grid]

    def check_grid_size(self, side: int) -> None:
        """Refuse a grid that its format cannot hold, before the pictures are made."""
        path = self._plan.grid
        if path is None:
            return
        count = len(self._plan.jobs)
        size = max(grid_size(count, grid_columns(count, self._args.grid), (side, side)))
        limit = MAX_SIDE[picture_format(path)]
        if size > limit:
            raise OutputError(f"{path} cannot be written: {size} pixels are more than its format holds ({limit}).")

    def add(self, job: Job, image: Image) -> None:
        """Write one picture, or keep it for the grid."""
        if self._plan.grid is not None:
            self._grid_images.append(image)
        if self._wants_singles:
            path = self._save(image, job.path, {"prompt": job.prompt, "seed": job.seed, "size": image.width})
            self._report(path, {"prompt": job.prompt, "seed": job.seed})

    def finish(self) -> None:
        """Write the grid, if one was asked for."""
        if self._plan.grid is None:
            return
        prompts, seeds = [job.prompt for job in self._plan.jobs], [job.seed for job in self._plan.jobs]
        made_of = {"prompts": prompts, "seeds": seeds, "size": self._grid_images[0].width}
        path = self._save(make_grid(self._grid_images, self._args.grid or None), self._plan.grid, made_of)
        self._report(path, {"prompts": prompts, "seeds": seeds})

    def _save(self, image: Image, path: Path, made_of: dict[str, Any]) -> Path:
        metadata = {**made_of, **self._common_metadata(made_of)} if self._args.metadata else None
        overwrite = self._plan.may_replace and not self._args.no_overwrite
        while True:
            try:
                return save_picture(image, path, metadata=metadata, overwrite=overwrite)
            except NameTakenError:
                if self._plan.may_replace:
                    raise
                path = renumbered(path)

    def _common_metadata(self, made_of: dict[str, Any]) -> dict[str, Any]:
        args = self._args
        settings = {key: value for key, value in sampling_settings(args).items() if key not in made_of}
        source = {
            "model": public_name(args.model),
            "revision": args.revision,
            "text_encoder": public_name(args.text_encoder) if args.text_encoder else None,
            "use_ema": args.use_ema,
            **self._machine,
            "software": f"hart-infer {hart_infer.__version__}",
        }
        return {key: value for key, value in {**settings, **source}.items() if value is not None}

    def _report(self, path: Path, made_of: dict[str, Any]) -> None:
        if self._args.json:
            emit_json({"path": str(path), **made_of})
        else:
            emit(str(path))


class Previews:
    """One PNG per picture and scale in a folder of their own: NAME-scale-00.png and so on."""

    def __init__(self, folder: Path, jobs: Sequence[Job]) -> None:
        """Choose a distinct name for every picture."""
        names = distinct([folder / f"{job.path.stem}.png" for job in jobs])
        self._stems = {job.index: path.with_suffix("") for job, path in zip(jobs, names, strict=True)}

    def first_paths(self) -> list[Path]:
        """The first scale's file of every picture; what goes for these goes for the others."""
        return [_scale_path(stem, 0) for stem in self._stems.values()]

    def callback(self, jobs: Sequence[Job]) -> Callable[[Step], None]:
        """What to call after each scale of a batch."""

        def write(step: Step) -> None:
            for job, image in zip(jobs, step.preview(), strict=True):
                save_picture(image, _scale_path(self._stems[job.index], step.index))

        return write


def _scale_path(stem: Path, index: int) -> Path:
    return stem.with_name(f"{stem.name}-scale-{index:02d}.png")
