"""The command `hart-infer`: one file per subcommand, `app.py` puts them together."""

from .app import main

__all__ = ["main"]
