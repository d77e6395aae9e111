"""`hart-infer batch`: draw a file of prompts, any number of them, and go on where a run was killed."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..batch.cluster import HERE, Cluster, import_ray
from ..batch.driver import Progress, run_batch
from ..batch.manifest import MANIFEST, import_pyarrow
from ..batch.reading import read_table
from ..batch.worker import Model, WorkerOptions
from ..checkpoints.layouts import absolute
from ..errors import InputError
from ..pipelines.checks import check_size
from . import options
from .console import UsageError, emit, emit_json, note
from .drawing import made_with
from .families import TRAITS, family_of
from .loading import load_pipeline
from .options import MachineOptions, ModelOptions
from .sampling import SamplingOptions, add_sampling

if TYPE_CHECKING:
    from ..checkpoints.families import Family

CHUNK_SIZE = 16
SECONDS_BETWEEN_LINES = 30  # of progress, where stderr is no terminal
FORMATS = ("png", "webdataset")

DETAILS = """\
FILE is .txt (one prompt per line), .csv, .jsonl or .parquet, with a column prompt
(or label, for a model of classes) and, if you like, id, seed and settings: size,
guidance_scale, top_k, top_p, more_smooth, num_inference_steps, residual_temperature,
negative_prompt, use_system_prompt. An empty cell is the command line's value.
Called again, the same command goes on where it was ended: what has a picture is
not drawn again. The manifest's path goes to stdout at the end."""

EPILOG = f"""\
what is written into --out:
  images/ID.png        or with --format webdataset shards/CHUNK.tar, which hold
                       ID.png, ID.txt and ID.json for each row
  {MANIFEST}     a line for every row: id, prompt, seed, file, sha256, model,
                       settings, seconds, error; until the end in parts, in
                       manifest/, one for each finished chunk
  sheets/CHUNK.png     with --grid
  batch.json           what all pictures have in common; a run with other settings
                       is refused
  A file appears under its name only when it is complete.

ids and seeds:
  Without an id a row has a hash of its content. Without a seed it has one that
  follows from its id and --seed. So rows may be added, removed and reordered.

bad rows:
  A row that can't be drawn gets a line with its error, and the others are drawn;
  the exit code is 1 then. The next run tries it again.

Ray:
  --ray local uses all of this machine, --ray HOST:PORT, or auto, a cluster, on
  whose machines hart-infer is installed and --out is the same folder or URL. Rows
  of a worker that dies are drawn by another.

examples:
  hart-infer batch prompts.txt --out pictures/
  hart-infer batch prompts.csv --out pictures/ --batch-size 8 --grid
  hart-infer batch prompts.parquet --out s3://bucket/run --ray auto
  hart-infer batch prompts.csv -o run/ --format webdataset --chunk-size 1000
"""


@dataclass(frozen=True)
class Loader:
    """Loads the pipeline that the options ask for, in any process."""

    family: Family
    model: ModelOptions
    machine: MachineOptions
    sampling: SamplingOptions
    quiet: bool

    def __call__(self) -> Model:
        """Load it. Raises HartError."""
        from ..pipelines.describe import weights_digest

        text_encoder = self.model.text_encoder
        pipe: Any = load_pipeline(self.family, self.model, self.machine, text_encoder=text_encoder, quiet=self.quiet)
        pipe.set_progress_bar_config(disable=True)
        check_size(self.sampling.size, pipe.sizes, "--size")
        try:
            settings = self.sampling.completed(self.family, pipe)
        except UsageError as error:
            raise InputError(str(error)) from error
        facts = made_with(self.family, pipe, self.model, self.sampling)
        return Model(
            pipe,
            name=facts.pop("model"),
            settings=settings,
            made_with=facts,
            subject=lambda text: TRAITS[self.family].subject(pipe, text),
            weights=weights_digest(pipe.components),
        )


def add_parser(commands: options.Commands) -> None:
    """Add the subcommand."""
    parser = options.add_command(
        commands,
        "batch",
        usage="FILE -o OUT [-m MODEL] [options]",
        summary="Draw a file of prompts, and go on where a run was ended.",
        details=DETAILS,
        epilog=EPILOG,
    )
    parser.set_defaults(run=run)
    parser.add_argument("file", metavar="FILE", help="the rows to draw; a file, or a URL such as s3://bucket/prompts.csv")
    parser.add_argument("-o", "--out", metavar="OUT", required=True, help="a folder, or a URL such as s3://bucket/folder")
    group = parser.add_argument_group("pictures")
    group.add_argument("--format", choices=FORMATS, default="png", help="files, or tar shards (png)")
    group.add_argument(
        "--chunk-size",
        metavar="N",
        type=options.whole(1),
        default=CHUNK_SIZE,
        help=f"rows that are finished together: a shard, a sheet, and the most that a kill loses ({CHUNK_SIZE})",
    )
    group.add_argument("--grid", action="store_true", help="also a contact sheet of every chunk")
    group.add_argument("--no-metadata", dest="metadata", action="store_false", help="leave prompt and settings out of pictures")
    options.add_json(group, "one JSON object (manifest, rows, drawn, failed, drawn_before) instead of the path")
    _add_workers(parser.add_argument_group("workers"))
    add_sampling(parser, seed="what seeds of rows without one follow from (0)")
    options.add_text_encoder(options.add_model(parser))
    options.add_machine(parser)
    options.add_quiet(parser)


def _add_workers(group: Any) -> None:
    group.add_argument("--ray", metavar="ADDRESS", help=f"draw on a Ray cluster; {HERE}: on all of this machine")
    group.add_argument("--workers", metavar="N", type=options.whole(1), help="with --ray: models at a time (all that fit)")
    group.add_argument(
        "--gpus-per-worker",
        metavar="X",
        type=options.number(0, 1024),
        help="with --ray: may be a share (1 where there are GPUs)",
    )
    group.add_argument(
        "--cpus-per-worker", metavar="X", type=options.number(0, 1024), help="with --ray: may be a share (4; 1 beside a GPU)"
    )


def run(args: argparse.Namespace) -> int:
    """Read the rows, draw, and say how it ended. Raises UsageError or HartError."""
    cluster = _cluster(args)
    import_pyarrow()
    model, sampling, machine = ModelOptions.of(args), SamplingOptions.of(args), MachineOptions.of(args)
    model = replace(model, model=absolute(model.model), text_encoder=absolute(model.text_encoder))
    seed = args.seed or 0
    table = read_table(args.file, seed)
    if table.ignored and not args.quiet:
        note(f"{args.file}: columns that mean nothing here are ignored: {', '.join(table.ignored)}")
    family = family_of(model, set(sampling.given()), ability="draw pictures")
    loader = Loader(family, model, machine, sampling, args.quiet)
    meter = _Meter(quiet=args.quiet)
    asked = WorkerOptions(loader, args.out, args.batch_size, args.format, args.metadata, args.grid)
    described = {**_described(model, machine), **_given(sampling), "seed": seed, "format": args.format}
    try:
        end = run_batch(
            table.rows, asked, chunk_size=args.chunk_size, described=described, pool=cluster, on_progress=meter.show
        )
    finally:
        meter.close()
    manifest = f"{args.out.rstrip('/')}/{MANIFEST}"
    if args.json:
        counts = {"rows": end.total, "drawn": end.drawn - end.before, "failed": end.failed, "drawn_before": end.before}
        emit_json({"manifest": manifest, **counts})
    else:
        emit(manifest)
    if end.failed:
        note(f"{end.failed} of {end.total} rows could not be drawn; the manifest's column error says why.")
    return 1 if end.failed else 0


def _cluster(args: argparse.Namespace) -> Cluster | None:
    """Return the cluster to draw on, None for this process. Raises UsageError, InputError."""
    shares = (args.workers, args.gpus_per_worker, args.cpus_per_worker)
    if args.ray is None:
        if any(share is not None for share in shares):
            raise UsageError("--workers, --gpus-per-worker and --cpus-per-worker go with --ray, such as --ray local.")
        return None
    import_ray()
    return Cluster(args.ray, *shares)


def _described(model: ModelOptions, machine: MachineOptions) -> dict[str, Any]:
    """Return what a run's pictures share beside sampling arguments."""
    shared = {
        "model": options.public_name(model.name),
        "revision": model.revision,
        "variant": model.variant,
        "quantize": model.quantize,
        "text_encoder": options.public_name(model.text_encoder) if model.text_encoder else None,
        "use_ema": None if model.use_ema else False,
        "dtype": machine.dtype,
    }
    return {name: value for name, value in shared.items() if value is not None}


def _given(sampling: SamplingOptions) -> dict[str, Any]:
    """Return the sampling arguments of the command line in JSON's types."""
    pruned = {} if sampling.prune is None else {"prune": sampling.prune.to_dict()}
    return {**sampling.given(), **pruned}


class _Meter:
    """Shows progress on stderr with the time that is left: a bar on a terminal, else a line now and then."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet or sys.stderr is None
        self._bar: Any = None
        self._begun = self._told = 0.0
        self._first: Progress | None = None

    def show(self, progress: Progress) -> None:
        """Show how far the run is; the first call shows what there is to do."""
        if self._quiet:
            return
        if self._first is None:
            self._begin(progress)
        elif sys.stderr.isatty():
            self._draw_bar(progress)
        elif progress.left and time.monotonic() - self._told > SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            note(self._line(progress))

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()

    def _begin(self, progress: Progress) -> None:
        self._first = progress
        self._begun = self._told = time.monotonic()
        parts = [f"{progress.before:,} drawn before"] if progress.before else []
        parts += [f"{progress.failed:,} refused"] if progress.failed else []
        note(f"{progress.total:,} rows: {', '.join([*parts, f'{progress.left:,} to draw'])}")
        if progress.changed:
            told = "Rows drawn before that have another prompt now, and keep their picture"
            note(f"{told}: {progress.changed:,}. New ids have them drawn.")

    def _draw_bar(self, progress: Progress) -> None:
        from tqdm import tqdm

        if self._bar is None:  # not before, as the notes of loading would stand in its line
            assert self._first is not None
            before = progress.total - self._first.left
            self._bar = tqdm(total=progress.total, initial=before, unit="row", dynamic_ncols=True)
            self._bar.start_t -= time.monotonic() - self._begun
        self._bar.n = progress.total - progress.left
        self._bar.set_postfix_str(f"{progress.failed} failed" if progress.failed else "")

    def _line(self, progress: Progress) -> str:
        from tqdm import tqdm

        assert self._first is not None
        done = self._first.left - progress.left
        seconds = time.monotonic() - self._begun
        left = tqdm.format_interval(seconds / done * progress.left) if done else "?"
        failed = f", {progress.failed:,} failed" if progress.failed else ""
        return f"{progress.total - progress.left:,} of {progress.total:,} rows{failed}; {left} left"
