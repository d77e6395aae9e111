"""Turn what a row of the input says into a Row: its id, its seed, its settings, or the reason why it can't be drawn."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..pipelines.checks import MAX_SEED, check_bool, check_float, check_int, check_prompts, shown

SUBJECTS = ("prompt", "label")  # columns that say what to draw; the first that a row has counts
SETTINGS: dict[str, Callable[[Any, str], Any]] = {  # columns that change a row's settings, and their checks
    "size": lambda value, name: check_int(_number(value), name, 1),
    "guidance_scale": lambda value, name: check_float(_number(value), name, 0),
    "num_inference_steps": lambda value, name: check_int(_number(value), name, 0),
    "residual_temperature": lambda value, name: check_float(_number(value), name, 0, 1),
    "top_k": lambda value, name: check_int(_number(value), name, 0),
    "top_p": lambda value, name: check_float(_number(value), name, 0, 1),
    "more_smooth": lambda value, name: check_bool(_flag(value), name),
    "negative_prompt": lambda value, name: check_prompts(value, name)[0],
    "use_system_prompt": lambda value, name: check_bool(_flag(value), name),
}
COLUMNS = ("id", *SUBJECTS, "seed", *SETTINGS)
MAX_STEM = 80  # characters of a file name that come from the id
_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}

Settings = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Row:
    """One picture to draw. With an `error` it can't be drawn, and `prompt` and `seed` may be None."""

    id: str
    stem: str  # of its file's name: ASCII letters, digits, - and _
    prompt: str | None
    seed: int | None
    settings: Settings = ()  # that differ from the run's: (name, value), in the order of SETTINGS
    error: str | None = None


def make_rows(found: Iterable[tuple[str, Mapping[str, Any] | InputError]], base_seed: int) -> list[Row]:
    """Make Rows of (place, values by column) or (place, error), in order.

    A row without an id gets a hash of its content, the second with the same content "-2" behind it, and so on. A row without a
    seed gets one that follows from `base_seed` and its id, so that it draws the same wherever it stands in the file.
    """
    rows: list[Row] = []
    ids: set[str] = set()
    repeats: dict[str, int] = {}
    for place, values in found:
        row = _parse(place, values, base_seed, ids, repeats)
        ids.add(row.id)
        rows.append(Row(row.id, _stem(row.id), row.prompt, row.seed, row.settings, row.error))
    return rows


def _parse(place: str, values: Mapping[str, Any] | InputError, base_seed: int, ids: set[str], repeats: dict[str, int]) -> Row:
    """Return the row, without its stem."""
    if isinstance(values, InputError):
        return Row(f"{place.replace(' ', '-')}-{_digest(str(values))}", "", None, None, (), f"{place}: {values}")
    values = {name: value for name, value in values.items() if not _is_missing(value)}
    prompt = values["prompt"] if "prompt" in values else _label(values.get("label"))
    prompt = str(prompt) if isinstance(prompt, int) and not isinstance(prompt, bool) else prompt
    row_id = _numbered(_digest(json.dumps(values, sort_keys=True, default=repr)), repeats)
    try:
        row_id = _given_id(_whole(values["id"]), place, ids) if "id" in values else row_id
        if prompt is None:
            raise InputError("there is no prompt")
        text = check_prompts([prompt])[0].strip()
        settings = tuple((name, check(values[name], name)) for name, check in SETTINGS.items() if name in values)
        seed = check_int(_number(values["seed"]), "seed", 0, MAX_SEED) if "seed" in values else _seed(base_seed, row_id)
    except InputError as error:
        known = prompt.encode("utf-8", "replace").decode("utf-8") if isinstance(prompt, str) else None
        if isinstance(error, _IdError):
            row_id = f"{place.replace(' ', '-')}-{row_id}"
        return Row(row_id, "", known, None, (), f"{place}: {error}")
    return Row(row_id, "", text, seed, settings)


class _IdError(InputError):
    """A row's id can't be used."""


def _given_id(value: Any, place: str, ids: set[str]) -> str:
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise _IdError(f"id must be a text or a whole number, not {shown(value)}.")
    text = str(value).strip()
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _IdError("id is not valid Unicode text (it has half of a surrogate pair).")
    if text in ids:
        raise _IdError(f"id {shown(text)} is that of an earlier row; give every row its own.")
    return text


def _numbered(digest: str, repeats: dict[str, int]) -> str:
    """Return the digest, with its number behind it from its second use on."""
    repeats[digest] = repeats.get(digest, 0) + 1
    return digest if repeats[digest] == 1 else f"{digest}-{repeats[digest]}"


def _stem(row_id: str) -> str:
    """Return the id where it is a plain name without capitals; else what is plain of it, and a hash.

    So it depends on the id alone, and no two are equal, even case aside.
    """
    plain = re.sub(r"[^A-Za-z0-9_]+", "-", row_id).strip("-")[:MAX_STEM]
    if plain == row_id and plain == plain.lower() and not re.search(r"-[0-9a-f]{16}$", plain):
        return plain
    return f"{plain or 'row'}-{_digest(row_id)}"


def _seed(base_seed: int, row_id: str) -> int:
    """Return a seed below 2**32."""
    return int.from_bytes(hashlib.sha256(f"{base_seed}:{row_id}".encode()).digest()[:4], "big")


def _digest(text: str) -> str:
    """Return 16 hexadecimal digits: among a million rows two are equal with a chance of 3e-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _is_missing(value: Any) -> bool:
    """Whether a cell is empty; a table of floats has NaN there."""
    return value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, float) and math.isnan(value))


def _whole(value: Any) -> Any:
    """Read a whole number from a float, which a column with empty cells may hold."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number(value: Any) -> Any:
    """Read a number from a text, and a whole one from a float."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return _whole(kind(value))
            except ValueError:
                continue
    return _whole(value)


def _label(value: Any) -> Any:
    """Return a class's number that a table holds as a float, or as the text of one, as a whole one; others as they are."""
    return _number(value) if isinstance(value, str) and re.fullmatch(r"\d+\.0+", value.strip()) else _whole(value)


def _flag(value: Any) -> Any:
    return _FLAGS.get(value.strip().lower(), value) if isinstance(value, str) else value
