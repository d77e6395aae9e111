"""`hart-infer generate`: generate picture files from prompts."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..pipelines.checks import MAX_GUIDANCE, MAX_SEED, check_prompts, check_seeds
from . import options
from .console import UsageError, note
from .loading import load_pipeline
from .naming import DEFAULT_NAME, Job, make_plan
from .options import MachineOptions, ModelOptions
from .writing import OutputOptions, Previews, Writer, check_outputs

if TYPE_CHECKING:
    from ..pipelines.hart import HartPipeline

DETAILS = """\
The pictures' paths go to stdout, one per line, each as soon as it is written."""

EPILOG = f"""\
names:
  --out is a file name; or a pattern with {{index}}, {{seed}} and {{prompt}}, which
  take Python's format specs ({{index:04d}}, {{prompt:.20}}); or a folder. Pictures
  that would get the same name are numbered: cat-000.png, cat-001.png.
  A file that --out names is replaced if it exists (not with --no-overwrite).
  Without --out, or in a folder, names are {DEFAULT_NAME}: they continue
  after those that are there, and no file is ever replaced.
  The extension decides the format: .png, .jpg, .jpeg or .webp. Missing folders
  are made.

prompts file:
  One prompt per line, in UTF-8. Empty lines and lines that begin with # are
  skipped. Prompts on the command line come first.

seeds:
  Picture i of a call has seed SEED + i, whatever --batch-size is. Without --seed
  the first one is drawn, and shown.

metadata:
  Every picture carries its prompt, seed, model and settings: as JSON in a PNG's
  text chunk, in EXIF otherwise. `hart-infer info PICTURE` shows them;
  --no-metadata leaves them out.

examples:
  hart-infer generate "a cat, noto style" -o cat.png
  hart-infer generate "a cat" "a dog" --num 4 --seed 7 -o "out/{{prompt}}-{{seed}}.png"
  hart-infer generate "a cat" --num 9 --grid -o cats.png
  hart-infer generate --prompts prompts.txt -o pictures/ --batch-size 4
  echo "a fox" | hart-infer generate --prompts - --json
"""


MAX_PICTURES = 10**7  # per command; all names are chosen up front


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling arguments of the pipeline's call; None: the default."""

    size: int | None
    guidance_scale: float | None
    num_inference_steps: int
    top_k: int | None
    top_p: float | None
    more_smooth: bool
    negative_prompt: str | None
    use_system_prompt: bool | None

    @staticmethod
    def of(args: argparse.Namespace) -> SamplingOptions:
        """Read the options of `_add_sampling`."""
        return SamplingOptions(
            size=args.size,
            guidance_scale=args.guidance_scale,
            num_inference_steps=args.steps,
            top_k=args.top_k,
            top_p=args.top_p,
            more_smooth=args.more_smooth,
            negative_prompt=args.negative_prompt,
            use_system_prompt=args.use_system_prompt,
        )

    def completed(self, pipe: HartPipeline) -> SamplingOptions:
        """Fill in the checkpoint's defaults."""
        chosen = {name: getattr(pipe.defaults, name) for name in ("guidance_scale", "top_p", "use_system_prompt")}
        return replace(self, **{name: value for name, value in chosen.items() if getattr(self, name) is None})


def add_parser(commands: options.Commands) -> None:
    """Add the subcommand."""
    parser = options.add_command(
        commands,
        "generate",
        usage="PROMPT... [-o OUT] [-m MODEL] [options]",
        summary="Generate pictures from prompts.",
        details=DETAILS,
        epilog=EPILOG,
    )
    parser.set_defaults(run=run)
    parser.add_argument("prompt", metavar="PROMPT", nargs="*", help="what the picture shows; quote it")
    parser.add_argument("--prompts", metavar="FILE", help="more prompts, one per line; - reads stdin")
    parser.add_argument("-o", "--out", metavar="PATTERN", help=f"where to write (default: {DEFAULT_NAME})")
    _add_output(parser)
    _add_sampling(parser)
    options.add_text_encoder(options.add_model(parser))
    options.add_machine(parser)
    options.add_quiet(parser)


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pictures")
    group.add_argument("-n", "--num", metavar="N", type=options.whole(1, MAX_PICTURES), default=1, help="pictures per prompt")
    group.add_argument("--no-overwrite", action="store_true", help="refuse to replace files, before anything is computed")
    group.add_argument(
        "--grid",
        metavar="COLUMNS",
        nargs="?",
        const=0,
        type=_columns,
        help="all pictures as one file, --out (or NAME-grid.EXT, if that is a pattern or folder)",
    )
    group.add_argument("--singles", action="store_true", help="with --grid: also every picture by itself")
    group.add_argument("--preview-dir", metavar="DIR", help="also write what each scale adds, one PNG per scale")
    group.add_argument("--no-metadata", dest="metadata", action="store_false", help="leave prompt and settings out")
    options.add_json(group, "one JSON object per picture (path, prompt, seed) instead of its path")


def _add_sampling(parser: argparse.ArgumentParser) -> None:

    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add("-s", "--seed", type=options.whole(0, MAX_SEED), help="seed of the first picture (default: random)")
    add("--size", metavar="PIXELS", type=options.whole(1), help="side of the picture (default: largest)")
    add(
        "--guidance-scale",
        metavar="X",
        type=options.number(0, MAX_GUIDANCE),
        help="guidance strength (default: the checkpoint's; 4.5 in the released one)",
    )
    add("--steps", metavar="N", type=options.steps, default=8, help="residual diffusion steps, 0 for none (8)")
    add(
        "--top-k",
        metavar="K",
        type=options.whole(0),
        help="codes kept, 0 for all (default: 600, then 300 from scale 7)",
    )
    add(
        "--top-p",
        metavar="P",
        type=options.number(0, 1),
        help="probability kept, 0 for all (default: the checkpoint's; 0 in the released one)",
    )
    add(
        "--no-smooth",
        dest="more_smooth",
        action="store_false",
        help="use drawn codes as the next input, not mixtures",
    )
    add("--negative-prompt", metavar="TEXT", help="what to steer away from")
    add("--no-system-prompt", dest="use_system_prompt", action="store_false", default=None, help="leave the system prompt out")
    add("--batch-size", metavar="N", type=options.whole(1), default=1, help="pictures at a time (1)")


def run(args: argparse.Namespace) -> int:
    """Check all that can be checked, load the model, generate and write the pictures. Raises UsageError or HartError."""
    prompts = _prompts(args.prompt, args.prompts)
    count = len(prompts) * args.num
    if count > MAX_PICTURES:
        raise UsageError(
            f"{count:,} pictures are more than one command makes (at most {MAX_PICTURES:,}); call it several times."
        )
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    _check_seeds(seed, count)
    if args.singles and args.grid is None:
        raise UsageError("--singles goes with --grid; without it every picture is written anyway.")
    plan = make_plan(args.out, prompts, num=args.num, first_seed=seed, grid=args.grid is not None)
    previews = Previews(Path(args.preview_dir), plan.jobs) if args.preview_dir else None
    output = OutputOptions.of(args)
    writer = Writer(output, plan)
    check_outputs([*writer.targets(), *(previews.first_paths() if previews else [])], replace=output.replaces)
    model = ModelOptions.of(args)
    pipe = load_pipeline(model, MachineOptions.of(args), text_encoder=model.text_encoder, quiet=args.quiet)
    sampling = SamplingOptions.of(args).completed(pipe)
    writer.made_with(asdict(sampling), model, pipe)
    writer.check_grid_size(options.side(args.size, pipe.sizes))
    if not args.quiet and args.seed is None:
        note(f"seed {seed}" + (f" to {seed + count - 1}" if count > 1 else ""))
    _generate(pipe, plan.jobs, sampling, writer, previews, batch_size=args.batch_size, quiet=args.quiet)
    return 0


def _check_seeds(first: int, count: int) -> None:

    try:
        check_seeds(first, count, "--seed")
    except InputError as error:
        raise UsageError(f"--seed {first} is too large for {count} pictures.") from error


def _generate(
    pipe: HartPipeline,
    jobs: Sequence[Job],
    sampling: SamplingOptions,
    writer: Writer,
    previews: Previews | None,
    *,
    batch_size: int,
    quiet: bool,
) -> None:
    """Generate the pictures batch by batch, writing each batch before the next begins."""
    settings: dict[str, Any] = asdict(sampling)
    for first in range(0, len(jobs), batch_size):
        batch = jobs[first : first + batch_size]
        if len(jobs) > len(batch) and not quiet:
            until = f"-{first + len(batch)}" if len(batch) > 1 else ""
            pipe.set_progress_bar_config(desc=f"{first + 1}{until} of {len(jobs)}")
        prompts, repeats = _factored([job.prompt for job in batch])
        output: Any = pipe(
            prompts,
            num_images_per_prompt=repeats,
            seed=[job.seed for job in batch],
            callback_on_step_end=previews.callback(batch) if previews else None,
            **settings,
        )
        for job, image in zip(batch, output.images, strict=True):
            writer.add(job, image)
    writer.finish()


def _factored(prompts: list[str]) -> tuple[list[str], int]:
    """Return distinct prompts and their repeat count if all repeat alike, in order; else (prompts, 1)."""
    once = list(dict.fromkeys(prompts))
    repeats = len(prompts) // len(once)
    is_even = prompts == [prompt for prompt in once for _ in range(repeats)]
    return (once, repeats) if is_even else (prompts, 1)


def _prompts(given: Sequence[str], file: str | None) -> list[str]:
    """Return the prompts of the command line, then those of the file. Raises UsageError or InputError."""

    prompts = [*given, *(_read_prompts(file) if file is not None else [])]
    if not prompts:
        raise UsageError("no prompt: give one in quotes, or a file of them with --prompts.")
    try:
        return check_prompts(prompts)
    except InputError as error:
        raise UsageError(str(error)) from error


def _read_prompts(name: str) -> list[str]:
    shown = "stdin" if name == "-" else name
    try:
        text = (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{shown} is not UTF-8 text (byte {error.start}).") from error
    except OSError as error:
        raise InputError(f"{shown} cannot be read: {(error.strerror or str(error)).lower()}.") from error
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n")]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise InputError(f"{shown} holds no prompt.")
    return prompts


def _columns(text: str) -> int:
    """Parse the value of --grid; as it is optional, a prompt after --grid gets here. Raises ArgumentTypeError."""
    try:
        return options.whole(1)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of columns; put prompts before --grid, or another option between"
        ) from error
