"""Find a checkpoint, on the Hub or in a folder, and choose its weight files."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..errors import CheckpointNotFoundError
from .hub import HubOptions, Repository, file_names

INDEX = "model_index.json"  # of the project's own layout, which `save_pretrained` writes
BUNDLED_MODEL, BUNDLED_VAR = BUNDLED = ("hart-mini", "var-mini")  # they come with this package, in assets/
RELEASED_MODEL = "mit-han-lab/hart-0.7b-1024px"
_ASSETS = Path(__file__).parents[1] / "assets"
_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(/(llm|transformer))?/?")


class Source(Protocol):
    """The files of a folder or a repository, which may have to be downloaded."""

    @property
    def names(self) -> Sequence[str]:
        """Return the file names, relative to the root."""
        ...

    @property
    def title(self) -> str:
        """Return its name for messages."""
        ...

    def fetch(self, names: Iterable[str]) -> Path:
        """Make the files local; return the root. Raises CheckpointNotFoundError or OutputError."""
        ...


@dataclass(frozen=True)
class Folder:
    """A local folder, as a Source."""

    root: Path
    title: str

    @property
    def names(self) -> Sequence[str]:
        """Return the names of the files in it and one level of subfolders."""
        return file_names(self.root)

    def fetch(self, names: Iterable[str]) -> Path:
        """Return the folder; all its files are local."""
        return self.root


def open_source(repo_or_path: str | Path, markers: Iterable[str], hub: HubOptions) -> Folder | Repository:
    """Return the Folder of a checkpoint (given it or a part such as llm/) or the Repository.

    `markers`: every checkpoint has one of these files. Raises CheckpointNotFoundError.
    """
    path = local_path(repo_or_path)
    if path is not None:
        return Folder(_root(path, tuple(markers)), str(repo_or_path))
    return Repository.open(hub_id(repo_or_path), hub)


def local_path(repo_or_path: str | Path) -> Path | None:
    """Return the path, `~` expanded, or None if it doesn't exist; a bundled model's bare name gives its folder here."""
    if repo_or_path in BUNDLED:
        return _ASSETS / repo_or_path
    path = Path(os.path.expanduser(repo_or_path))
    try:
        return path if path.exists() else None
    except (OSError, ValueError):  # not a valid file name
        return None


def absolute(repo_or_path: str | None) -> str | None:
    """Return a local folder's absolute path, which other processes find too; an id, a bundled name and None as they are."""
    if repo_or_path is None or repo_or_path in BUNDLED:
        return repo_or_path
    path = local_path(repo_or_path)
    return repo_or_path if path is None else os.path.abspath(path)


def hub_id(repo_or_path: str | Path) -> str:
    """Return `owner/name` of a Hub id, with or without a trailing /llm or /transformer. Raises CheckpointNotFoundError."""
    match = _HUB_ID.fullmatch(str(repo_or_path))
    if match is None:
        raise CheckpointNotFoundError(
            f"{repo_or_path} is neither an existing folder nor a Hub id (owner/name); check the path."
        )
    return match["repo"]


def parent(path: Path) -> Path:
    """Return the folder that a path is in; `.` and `..` are resolved, symbolic links are not."""
    return Path(os.path.abspath(path)).parent


def _root(path: Path, markers: tuple[str, ...]) -> Path:
    """Return the checkpoint's folder, given it or a part such as `llm/` or `transformer/`. Raises CheckpointNotFoundError."""
    if not path.is_dir():
        raise CheckpointNotFoundError(f"{path} is a file; give the checkpoint's folder.")
    is_part = not any((path / marker).exists() for marker in markers) and (path / "config.json").exists()
    above = parent(path)
    return above if is_part and any((above / marker).exists() for marker in markers) else path


def choose_weights(
    names: Collection[str], folder: str, stems: Sequence[str], variant: str | None, origin: str
) -> tuple[str, ...]:
    """Choose the weights of one folder: the first stem that exists, safetensors before .bin, one file or all its shards.

    Raises CheckpointNotFoundError if there are none, or shards are missing.
    """
    marked = f"\\.{re.escape(variant)}" if variant else ""
    for stem in stems:
        for suffix in ("safetensors", "bin"):
            pattern = rf"{folder}/{stem}(?:{marked}(-\d+-of-(?P<a>\d+))?|(-\d+-of-(?P<b>\d+)){marked})\.{suffix}"
            matches = [match for name in sorted(names) if (match := re.fullmatch(pattern, name))]
            if matches:
                shards = int(matches[-1]["a"] or matches[-1]["b"] or 1)
                chosen = [match.string for match in matches if int(match["a"] or match["b"] or 1) == shards]
                if len(chosen) != shards:
                    raise CheckpointNotFoundError(
                        f"{origin} has {len(chosen)} of {shards} shards of {folder}/{stem}.{suffix}; copy the others too."
                    )
                return tuple(chosen)
    wanted = " or ".join(f"{stem}{'.' + variant if variant else ''}.safetensors" for stem in stems)
    raise CheckpointNotFoundError(f"{origin} has no weights in {folder}/: expected {wanted} (or .bin).")
