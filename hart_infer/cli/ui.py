"""`hart-infer ui`: the web page, in a browser."""

from __future__ import annotations

import argparse

from . import options, serve

DETAILS = """\
Serves the web page and the API behind it to this machine alone, and opens a browser:
draw pictures and watch them come scale by scale, paint parts of a picture anew,
reconstruct, and with VILA-U ask about pictures. `hart-infer serve --ui` serves it to
others. Needs the extra: pip install 'hart-infer[ui]'."""

EPILOG = """\
examples:
  hart-infer ui
  hart-infer ui -m mit-han-lab/hart-0.7b-1024px --port 8080 --no-browser
"""
LOOPBACK = "127.0.0.1"


def add_parser(commands: options.Commands) -> None:
    """Add the subcommand."""
    parser = options.add_command(
        commands,
        "ui",
        usage="[options]",
        summary="Open a web page that draws, edits and reconstructs.",
        details=DETAILS,
        epilog=EPILOG,
    )
    parser.set_defaults(run=run)
    serve.add_port(parser)
    parser.add_argument("--no-browser", dest="browser", action="store_false", help="open no browser, only print the address")
    serve.add_model(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal. Raises HartError."""
    return serve.start(args, {"host": LOOPBACK, "port": args.port}, page=True, browser=args.browser)
