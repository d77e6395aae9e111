"""`hart-infer serve`: pictures over HTTP, by OpenAI's API."""

from __future__ import annotations

import argparse
import threading
import webbrowser
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BackendError, InputError
from . import options
from .console import PROGRAM, UsageError, emit, note
from .families import TRAITS, family_of
from .loading import load_pipeline
from .options import MachineOptions, ModelOptions

if TYPE_CHECKING:
    from ..checkpoints.families import Family
    from ..server.model import Model

DETAILS = """\
Serves OpenAI's API of pictures: /v1/images/generations, with previews as a stream,
/v1/images/edits, /v1/models, and for VILA-U /v1/chat/completions; beside them
/healthz, /readyz and /metrics. Requests that come together are drawn together, and
a seed draws the same picture either way. --ui adds a web page for all that.
By default only this machine can reach it. Needs the extra: pip install
'hart-infer[serve]'."""

EPILOG = """\
Options of the server, but for --ui and --new-key, and its limits may be given by
environment variables too: --max-queue is HART_INFER_SERVE_MAX_QUEUE.
docs/serving.md says more.

examples:
  hart-infer serve
  hart-infer serve -m mit-han-lab/hart-0.7b-1024px --port 8080
  hart-infer serve --keys keys.txt --new-key alice
  hart-infer serve --host 0.0.0.0 --keys keys.txt
"""
EXTRA = "The server needs the extra packages of 'serve': pip install 'hart-infer[serve]'."


@dataclass(frozen=True)
class DrawingOptions:
    """How a worker draws."""

    reproducible: bool
    safety: str | None  # folder or id of a safety model
    safety_threshold: float


def add_parser(commands: options.Commands) -> None:
    """Add the subcommand."""
    parser = options.add_command(
        commands,
        "serve",
        usage="[options]",
        summary="Serve pictures over HTTP, by OpenAI's API.",
        details=DETAILS,
        epilog=EPILOG,
    )
    parser.set_defaults(run=run)
    server = parser.add_argument_group("server")
    add_port(server)
    _add_server(server)
    _add_limits(parser.add_argument_group("limits"))
    add_model(parser)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add what says which model draws, and how."""
    parser.add_argument(
        "--no-reproducible",
        dest="reproducible",
        action="store_false",
        help="draw a batch's pictures together: faster on a GPU, and a seed's picture rounds otherwise from batch to batch",
    )
    parser.add_argument(
        "--safety",
        metavar="PATH|ID",
        type=options.named,
        help="refuse prompts that a ShieldGemma of texts objects to, such as google/shieldgemma-2b (default: none)",
    )
    parser.add_argument(
        "--safety-threshold", metavar="X", type=options.number(0, 1), default=0.5, help="score from which on it refuses (0.5)"
    )
    options.add_text_encoder(options.add_model(parser))
    options.add_machine(parser)


def add_port(group: Any) -> None:
    """Add --port."""
    group.add_argument("--port", metavar="N", type=options.whole(0, 65535), help="port, 0 for a free one (8000)")


def _add_server(group: Any) -> None:
    group.add_argument("--host", metavar="ADDRESS", help="address to listen at (127.0.0.1: this machine alone)")
    group.add_argument("--ui", action="store_true", help="serve the web page too, at /")
    group.add_argument("--keys", metavar="FILE", type=Path, help="names and hashes of API keys, which clients then need")
    group.add_argument("--new-key", metavar="NAME", help="make a key, add its hash to --keys, print it, and end")
    group.add_argument("--insecure", action="store_true", default=None, help="let other machines in without keys")
    group.add_argument("--keep", metavar="DIR", type=Path, help="keep finished pictures there; needed for urls of pictures")
    group.add_argument(
        "--drain", metavar="SECONDS", type=options.number(0, 86400), help="what open requests get when the server ends (60)"
    )


def _add_limits(group: Any) -> None:
    add, whole = group.add_argument, options.whole
    add("--max-batch", metavar="N", type=whole(1, 4096), help="pictures drawn together (8)")
    add("--max-wait-ms", metavar="MS", type=options.number(0, 60000), help="what a picture waits for others (10)")
    add("--max-queue", metavar="N", type=whole(1, 1_000_000), help="pictures that may wait; more are told to come later (256)")
    add("--timeout", metavar="SECONDS", type=options.number(0.001, 86400), help="of a request, its wait included (300)")
    add("--rate", metavar="N", type=whole(0), help="pictures a minute for each key, 0 for no limit (600)")
    add("--max-n", metavar="N", type=whole(1, 1000), help="pictures of a request (10)")
    add("--max-prompt", metavar="N", type=whole(1), help="characters of a prompt (4000)")
    add("--max-body-mb", metavar="MB", type=options.number(0.001, 1024), help="size of a request (20)")
    add("--max-pixels", metavar="N", type=whole(1), help="of a picture that is sent (16777216)")


SETTINGS = (
    "host port keys insecure keep drain max_batch max_wait_ms max_queue timeout rate max_n max_prompt max_body_mb max_pixels"
).split()


def run(args: argparse.Namespace) -> int:
    """Make a key, or serve until a signal. Raises HartError."""
    if args.new_key is not None:
        return _make_key(args.keys, args.new_key)
    return start(args, {name: getattr(args, name) for name in SETTINGS}, page=args.ui)


def start(args: argparse.Namespace, given: Mapping[str, object], *, page: bool, browser: bool = False) -> int:
    """Serve with the settings `given`; `page` serves the web page too, at which `browser` opens one. Raises HartError."""
    try:
        from ..server.run import Server, bind
        from ..server.settings import make_settings
    except ImportError as error:
        raise BackendError(f"{EXTRA} ({error})") from error
    settings = make_settings(**given)
    listening = bind(settings.host, settings.port)
    try:
        model, machine = ModelOptions.of(args), MachineOptions.of(args)
        name = options.public_name(model.name)
        drawing = DrawingOptions(args.reproducible, args.safety, args.safety_threshold)
        load = partial(load_model, model, machine, drawing, name)

        def announce(address: str) -> None:
            note(f"{PROGRAM} {args.command}: {name} at {address}, once it is loaded (Ctrl-C ends it)")
            if page:
                note(f"{PROGRAM} {args.command}: the page is {address.removesuffix('v1')}")
            if browser:
                threading.Thread(target=webbrowser.open, args=(address.removesuffix("v1"),), daemon=True).start()

        Server({name: load}, settings, page=page).run(listening, announce)
    finally:
        listening.close()
    return 0


def _make_key(path: Path | None, name: str) -> int:
    from ..server.keys import add_key

    if path is None:
        raise InputError("--new-key needs --keys FILE, to which it adds the key's hash.")
    key = add_key(path, name)
    note(f"{PROGRAM} serve: the key of {name}; it is shown this once, and {path} has its hash")
    emit(key)
    return 0


def load_model(model: ModelOptions, machine: MachineOptions, drawing: DrawingOptions, name: str) -> Model:
    """Load a pipeline, and the safety model, in the worker's process. Raises HartError."""
    from ..server import log
    from ..server.model import Model as Loaded
    from ..server.safety import Judge

    log.set_up()
    try:
        family = family_of(model)
    except UsageError as error:
        raise InputError(str(error)) from error
    pipe = load_pipeline(family, model, machine, text_encoder=model.text_encoder, quiet=True)
    judge = None
    if drawing.safety is not None:
        offline = model.local_files_only
        judge = Judge.load(drawing.safety, device=pipe.device, threshold=drawing.safety_threshold, local_files_only=offline)
    return Loaded(pipe, name, family, _argument(family, pipe), drawing.reproducible, judge)


def _argument(family: Family, pipe: Any) -> Callable[[str], Any]:
    """Return what makes a call's argument of a prompt."""
    return lambda text: TRAITS[family].subject(pipe, text).argument
