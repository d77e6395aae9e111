"""Define the command `hart-infer`: one file per subcommand, put together by `app.py`."""

from .app import main

__all__ = ["main"]
