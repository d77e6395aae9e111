"""Choose the file of every picture: --out patterns, seeds, numbers."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import Formatter

from ..images.files import MAX_NAME_BYTES
from ..pipelines.checks import shown
from .console import UsageError

DEFAULT_STEM = "hart-{index:03d}"
DEFAULT_NAME = f"{DEFAULT_STEM}.png"
DEFAULT_VIDEO_NAME = f"{DEFAULT_STEM}.webp"
PLACEHOLDERS = ("index", "seed", "prompt")
MAX_SLUG_BYTES = 80
MAX_REASON = 80  # characters of Python's own message about a pattern
_GAP = "\0"  # stands for a placeholder; no file name contains it


@dataclass(frozen=True)
class Job:
    """One picture or video to make."""

    index: int
    prompt: str | None  # as it was typed; None for an edit without
    seed: int
    path: Path


@dataclass(frozen=True)
class Plan:
    """All files of one call. `may_replace`: False for default names; no file is replaced then."""

    jobs: tuple[Job, ...]
    grid: Path | None
    may_replace: bool


def make_plan(
    out: str | None,
    prompts: Sequence[str | None],
    *,
    num: int,
    first_seed: int,
    grid: bool,
    default_name: str = DEFAULT_NAME,
) -> Plan:
    """Name every picture before any is made. Raises UsageError for an invalid pattern.

    Each prompt gets `num` pictures in a row; picture i has seed first_seed + i. Repeated names are numbered. Default names (no
    `out`, or a folder) continue after those that are there.
    """
    is_folder = out is not None and (out.endswith(("/", os.sep)) or os.path.isdir(out))
    pattern = os.path.join(_escaped(out or ""), default_name) if out is None or is_folder else out
    may_replace = out is not None and not is_folder
    _check_pattern(pattern)
    start = 0 if may_replace else next_free_index(Path(out or ""), Path(default_name).suffix)
    repeated = [prompt for prompt in prompts for _ in range(num)]
    jobs = [
        Job(start + i, prompt, first_seed + i, Path(_fill(pattern, start + i, first_seed + i, prompt)))
        for i, prompt in enumerate(repeated)
    ]
    grid_path = _grid_path(pattern, [job.path for job in jobs], number=None if may_replace else start) if grid else None
    paths = distinct([job.path for job in jobs], reserved=grid_path)
    named = tuple(replace(job, path=path) for job, path in zip(jobs, paths, strict=True))
    return Plan(named, grid_path, may_replace)


def renumbered(path: Path) -> Path:
    """Return the next default name, for one that another process took."""
    return path.with_name(re.sub(r"\d+", f"{next_free_index(path.parent, path.suffix):03d}", path.name, count=1))


def slug(prompt: str) -> str:
    """Turn a prompt into part of a file name: words of letters and digits of any script, joined by hyphens."""
    text = unicodedata.normalize("NFC", prompt)
    words = "".join(c.lower() if unicodedata.category(c)[0] in "LMN" else " " for c in text).split()
    kept = ""
    for word in words:
        longer = f"{kept}-{word}" if kept else word
        if len(longer.encode("utf-8", "replace")) > MAX_SLUG_BYTES:
            break
        kept = longer
    if not kept and words:
        kept = words[0].encode("utf-8", "replace")[:MAX_SLUG_BYTES].decode("utf-8", "ignore")
    return kept or "picture"


def next_free_index(folder: Path, suffix: str = ".png") -> int:
    """Return the number after the highest of the default names with a suffix in a folder; 0 if there are none."""
    pattern = re.compile(re.escape(DEFAULT_STEM).replace(re.escape("{index:03d}"), r"(\d+)(?:-grid)?") + re.escape(suffix))
    try:
        names = os.listdir(folder)
    except OSError:
        return 0
    return max((int(match[1]) + 1 for name in names if (match := pattern.fullmatch(name))), default=0)


def _check_pattern(pattern: str) -> None:
    try:
        fields = [(name, spec or "") for _, name, spec, _ in Formatter().parse(pattern) if name is not None]
        unknown = {name for name, _ in fields} - set(PLACEHOLDERS)
        for _, spec in fields:
            _check_spec(spec)
        if not unknown:
            _fill(pattern, 0, 0, "prompt")
    except (ValueError, KeyError, IndexError) as error:
        reason = str(error) if len(str(error)) <= MAX_REASON else f"{str(error)[:MAX_REASON]}..."
        hint = "write a brace that is no placeholder as {{ or }}."
        raise UsageError(f"--out {shown(pattern)} is not a pattern ({reason}); {hint}") from error
    if unknown:
        listed = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
        raise UsageError(f"--out {shown(pattern)} has a placeholder that does not exist; there are {listed}.")


def _check_spec(spec: str) -> None:
    """Raise ValueError for a format spec that makes no name or a far too long one, before anything is formatted by it."""
    if "{" in spec:
        raise ValueError("a placeholder can't have another one inside")
    if spec.endswith("c"):
        raise ValueError("a number makes no character of a name")
    widths = re.findall(r"\d+", spec)
    if any(len(width) > MAX_NAME_BYTES or int(width) > MAX_NAME_BYTES for width in widths):
        raise ValueError(f"a width of more than {MAX_NAME_BYTES} fits in no name")


def _fill(pattern: str, index: int, seed: int, prompt: str | None) -> str:
    return pattern.format(index=index, seed=seed, prompt=slug(prompt or ""))


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def distinct(paths: Sequence[Path], reserved: Path | None = None) -> list[Path]:
    """Number repeated names, and return all; compares without case, as some file systems do."""
    count = Counter(_key(path) for path in (*paths, *([reserved] if reserved else [])))
    taken = set(count)
    given: Counter[str] = Counter()
    result = []
    for path in paths:
        name, key = path, _key(path)
        while count[key] > 1 and _key(name) in taken:
            name = path.with_name(f"{path.stem}-{given[key]:03d}{path.suffix}")
            given[key] += 1
        taken.add(_key(name))
        result.append(name)
    return result


def _key(path: Path) -> str:
    return os.path.normcase(os.path.abspath(path)).casefold()


def _grid_path(pattern: str, paths: Sequence[Path], *, number: int | None) -> Path:
    """Return the pattern itself if it has no placeholder, else NAME-grid.EXT in the folder that holds all pictures.

    NAME is the pattern's file name without its placeholders.
    """
    if all(field is None for _, field, _, _ in Formatter().parse(pattern)):
        return paths[0]
    folder = os.path.commonpath([path.parent for path in paths])
    parts = Formatter().parse(os.path.basename(pattern))
    marked = "".join(text + (_GAP if field is not None else "") for text, field, _, _ in parts)
    stem = re.sub(f"[ ._-]*{_GAP}[ ._-]*", "-", os.path.splitext(marked)[0]).strip("-") or "hart"
    middle = "" if number is None else f"-{number:03d}"
    return Path(folder) / f"{stem}{middle}-grid{paths[0].suffix}"
