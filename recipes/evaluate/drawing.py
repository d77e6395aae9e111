"""Draw a list of prompts by `hart-infer batch`, which goes on where it was killed, and put the pictures where scorers look."""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pictures import PictureSet, open_set

from hart_infer import HartError, InputError
from hart_infer.batch.storage import open_storage

ROWS = "rows.csv"
DRAWN = "drawn"
BATCH = (sys.executable, "-m", "hart_infer", "batch")


class DrawingError(HartError, RuntimeError):
    """`hart-infer batch` did not end well; it has said why."""


def draw(rows: Sequence[Mapping[str, str]], out: Path, options: Sequence[str], folder: str = DRAWN) -> PictureSet:
    """Draw rows (columns id, prompt and others) into OUT/`folder` and return its pictures; `options` are those of batch.

    Raises InputError for a folder that was begun with other rows, and DrawingError.
    """
    storage = open_storage(str(out))
    table = _csv(rows)
    if ROWS in storage.names(""):
        if storage.read([ROWS])[0] != table:
            raise InputError(f"{out} was begun with other prompts; give the same again to go on, or another folder.")
    else:
        with storage.whole(ROWS) as file:
            file.write(table)
    command = [*BATCH, str(out / ROWS), "--out", str(out / folder), *options]
    if code := subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        raise DrawingError(f"hart-infer batch ended with exit code {code}; the same command goes on where it was.")
    return open_set(out / folder)


def place(picture: Path, target: Path) -> None:
    """Give a picture a second name, by a link where the file system has links."""
    try:
        os.link(picture, target)
    except OSError:
        shutil.copyfile(picture, target)


def paths_of(pictures: PictureSet) -> dict[str, Path]:
    """Return where the picture of each id is. Raises InputError for pictures that are no files."""
    paths: Sequence[Path] | None = getattr(pictures.source, "paths", None)
    if paths is None:
        raise InputError(f"{pictures.name} is no folder of picture files.")
    return dict(zip(pictures.names, paths, strict=True))


def split_options(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part a command line at `--`: ours, and what goes to `hart-infer batch`."""
    arguments = list(arguments)
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def _csv(rows: Sequence[Mapping[str, str]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
