"""Draw pictures or videos and write them: what `generate`, `edit` and `video` share."""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..images.files import picture_format, save_picture
from ..pipelines.checks import check_seeds, factored
from ..version import __version__
from . import options
from .console import UsageError, note
from .families import TRAITS, Ability, AnyPipeline, Subject, family_of
from .loading import load_pipeline
from .naming import DEFAULT_NAME, DEFAULT_VIDEO_NAME, Job, make_plan
from .options import MachineOptions, ModelOptions
from .sampling import SamplingOptions, add_sampling, add_video_sampling
from .writing import OutputOptions, Previews, Writer, check_outputs

if TYPE_CHECKING:
    from ..checkpoints.families import Family
    from ..pipelines.edit import PictureEdit

MAX_PICTURES = 100_000  # per command; all names are chosen up front
MakeEdit = Callable[[Any], "PictureEdit"]  # of a pipeline that edits


@dataclass(frozen=True)
class Task:
    """What a command draws, and how it is written."""

    ability: Ability
    things: str  # plural
    default_name: str
    draw: Callable[..., Sequence[Any]]  # of a pipeline and the arguments of a call; returns pictures, or lists of frames
    lacks: frozenset[str]  # sampling arguments that `draw` doesn't take
    check: Callable[[str | Path], object]  # of an output's extension
    save: Callable[..., Path]


def _call(pipe: Any, prompt: Any, **arguments: Any) -> Sequence[Any]:
    images: Sequence[Any] = pipe(prompt, **arguments).images
    return images


PICTURES = Task("draw pictures", "pictures", DEFAULT_NAME, _call, frozenset(), picture_format, save_picture)


@dataclass(frozen=True)
class DrawOptions:
    """How much is drawn by which model, and where it is written."""

    out: str | None
    num: int
    seed: int | None
    batch_size: int
    preview_dir: str | None
    quiet: bool
    output: OutputOptions
    sampling: SamplingOptions
    model: ModelOptions
    machine: MachineOptions

    @staticmethod
    def of(args: argparse.Namespace) -> DrawOptions:
        """Read the options of `add_drawing`, or of `add_video_drawing`."""
        return DrawOptions(
            out=args.out,
            num=args.num,
            seed=args.seed,
            batch_size=args.batch_size,
            preview_dir=args.preview_dir,
            quiet=args.quiet,
            output=OutputOptions.of(args),
            sampling=SamplingOptions.of(args),
            model=ModelOptions.of(args),
            machine=MachineOptions.of(args),
        )


def add_drawing(parser: argparse.ArgumentParser) -> None:
    """Add the options of `DrawOptions`."""
    parser.add_argument("-o", "--out", metavar="PATTERN", help=f"where to write (default: {DEFAULT_NAME})")
    _add_output(parser)
    add_sampling(parser)
    options.add_text_encoder(options.add_model(parser))
    options.add_machine(parser)
    options.add_quiet(parser)


def add_video_drawing(parser: argparse.ArgumentParser) -> None:
    """Add the options of `DrawOptions` that videos have; the others are set as if not given."""
    parser.add_argument("-o", "--out", metavar="PATTERN", help=f"where to write (default: {DEFAULT_VIDEO_NAME})")
    _add_files(parser.add_argument_group("videos"), "video")
    parser.set_defaults(grid=None, singles=False, preview_dir=None)
    add_video_sampling(parser)
    options.add_vila_u_model(parser)
    options.add_machine(parser)
    options.add_quiet(parser)


def _add_files(group: Any, thing: str) -> None:
    """Add the options of files of any kind."""
    group.add_argument("-n", "--num", metavar="N", type=options.whole(1, MAX_PICTURES), default=1, help=f"{thing}s per prompt")
    group.add_argument("--no-overwrite", action="store_true", help="refuse to replace files, before anything is computed")
    group.add_argument("--no-metadata", dest="metadata", action="store_false", help="leave prompt and settings out")
    options.add_json(group, f"one JSON object per {thing} (path, prompt, seed) instead of its path")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pictures")
    _add_files(group, "picture")
    group.add_argument(
        "--grid",
        metavar="COLUMNS",
        nargs="?",
        const=0,
        type=_columns,
        help="all pictures as one file, --out (or NAME-grid.EXT, if that is a pattern or folder)",
    )
    group.add_argument("--singles", action="store_true", help="with --grid: also every picture by itself")
    group.add_argument("--preview-dir", metavar="DIR", help="also write a PNG after each scale, or row of VILA-U's positions")


def draw(
    prompts: Sequence[str | None],
    asked: DrawOptions,
    task: Task = PICTURES,
    *,
    make_edit: MakeEdit | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Check all that can be checked, load the model, draw and write. Raises UsageError or HartError.

    `make_edit` makes the `edit` of every call; only with it a prompt may be None. `metadata`: more of the files' metadata.
    """
    count = len(prompts) * asked.num
    if count > MAX_PICTURES:
        raise UsageError(
            f"{count:,} {task.things} are more than one command makes (at most {MAX_PICTURES:,}); call it several times."
        )
    seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
    _check_seeds(seed, count, task.things)
    if asked.output.singles and asked.output.grid is None:
        raise UsageError("--singles goes with --grid; without it every picture is written anyway.")
    has_grid = asked.output.grid is not None
    plan = make_plan(asked.out, prompts, num=asked.num, first_seed=seed, grid=has_grid, default_name=task.default_name)
    previews = Previews(Path(asked.preview_dir), plan.jobs) if asked.preview_dir else None
    writer = Writer(asked.output, plan, task.save)
    targets = [*writer.targets(), *(previews.first_paths() if previews else [])]
    check_outputs(targets, replace=asked.output.replaces, check=task.check)
    family = family_of(asked.model, set(asked.sampling.given()), ability=task.ability)
    pipe = load_pipeline(family, asked.model, asked.machine, text_encoder=asked.model.text_encoder, quiet=asked.quiet)
    subjects = _subjects(family, pipe, prompts)
    settings = asked.sampling.completed(family, pipe)
    settings = {name: value for name, value in settings.items() if name not in task.lacks}
    writer.check_grid_size(options.side(asked.sampling.size, pipe.sizes))
    facts = made_with(family, pipe, asked.model, asked.sampling)
    writer.made_with({**settings, **(metadata or {}), **facts}, subjects)
    arguments = settings if make_edit is None else {**settings, "edit": make_edit(pipe)}
    if not asked.quiet and asked.seed is None:
        note(f"seed {seed}" + (f" to {seed + count - 1}" if count > 1 else ""))
    for batch in _batches(pipe, plan.jobs, asked.batch_size, quiet=asked.quiet):
        callback = previews.callback(batch, TRAITS[family].step) if previews else None
        repeated, repeats = factored([subjects[job.prompt].argument for job in batch])
        drawn = task.draw(
            pipe,
            None if repeated == [None] else repeated,
            num_images_per_prompt=repeats,
            seed=[job.seed for job in batch],
            callback_on_step_end=callback,
            **arguments,
        )
        for job, one in zip(batch, drawn, strict=True):
            writer.add(job, one)
    writer.finish()


def _check_seeds(first: int, count: int, things: str) -> None:
    try:
        check_seeds(first, count, "--seed")
    except InputError as error:
        raise UsageError(f"--seed {first} is too large for {count} {things}.") from error


def _subjects(family: Family, pipe: AnyPipeline, prompts: Sequence[str | None]) -> dict[str | None, Subject]:
    """Return what each prompt is to the pipeline. Raises UsageError for one that it cannot draw."""
    try:
        return {text: Subject(None) if text is None else TRAITS[family].subject(pipe, text) for text in prompts}
    except InputError as error:
        raise UsageError(str(error)) from error


def made_with(family: Family, pipe: AnyPipeline, model: ModelOptions, sampling: SamplingOptions) -> dict[str, Any]:
    """Return what the metadata of pictures says of the speed, the model and the machine."""
    return {
        "speed": sampling.speed_name(family, pipe),
        "model": options.public_name(pipe.name),
        "revision": model.revision,
        "variant": model.variant,
        "quantize": model.quantize,
        "text_encoder": options.public_name(model.text_encoder) if model.text_encoder else None,
        "use_ema": None if "use_ema" in TRAITS[family].lacks else model.use_ema,
        "device": pipe.device.type,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "software": f"hart-infer {__version__}",
    }


def _batches(pipe: AnyPipeline, jobs: Sequence[Job], batch_size: int, *, quiet: bool) -> Iterator[Sequence[Job]]:
    """Yield what is drawn together, each batch once the one before is written; say on the progress bar where it is."""
    for first in range(0, len(jobs), batch_size):
        batch = jobs[first : first + batch_size]
        if len(jobs) > len(batch) and not quiet:
            until = f"-{first + len(batch)}" if len(batch) > 1 else ""
            pipe.set_progress_bar_config(desc=f"{first + 1}{until} of {len(jobs)}")
        yield batch


def _columns(text: str) -> int:
    """Parse the value of --grid; as it is optional, a prompt after --grid gets here. Raises ArgumentTypeError."""
    try:
        return options.whole(1)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of columns; put prompts before --grid, or another option between"
        ) from error
