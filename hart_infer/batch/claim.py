"""Say in a folder what all its pictures have in common, and refuse to mix others in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from .storage import Storage

RUN = "batch.json"
MADE_BY = {"made_by": "hart-infer batch"}  # tells our file from others
WEIGHTS = "weights"  # its entry that the first worker adds, since only who has loaded a model knows it


def claim(storage: Storage, described: Mapping[str, Any]) -> None:
    """Write down what the folder's pictures share, or compare it with what is there. Raises InputError, OutputError.

    What a run wrote that loaded no model, so drew nothing, is replaced.
    """
    described = {**MADE_BY, **json.loads(json.dumps(described))}  # tuples are lists there
    there = _read(storage) if is_claimed(storage) else MADE_BY
    if there.items() >= MADE_BY.items() and WEIGHTS not in there:
        _write(storage, described)
        return
    there = {**MADE_BY, **there}  # versions before this one did not say so
    names = [name for name in {**described, **there} if name != WEIGHTS and there.get(name) != described.get(name)]
    if names:
        told = "; ".join(f"{name} {_said(there.get(name))}, not {_said(described.get(name))}" for name in names)
        raise InputError(f"{storage.title} was begun with {told}. Give the same again to go on, or another folder.")


def claim_weights(storage: Storage, weights: str) -> None:
    """Add the hash of the weights, or compare it with what is there. Raises InputError, OutputError."""
    there = _read(storage)
    if WEIGHTS not in there:
        _write(storage, {**there, WEIGHTS: weights})
    elif there[WEIGHTS] != weights:
        raise InputError(
            f"{storage.title} was begun with other weights, or with the same in another dtype. Give the same model and --dtype "
            "again to go on, or another folder."
        )


def is_claimed(storage: Storage) -> bool:
    """Whether a run has begun here."""
    return RUN in storage.names("")


def _read(storage: Storage) -> dict[str, Any]:
    content = storage.read([RUN])[0]
    try:
        there = json.loads(content)
    except ValueError:
        there = None
    if not isinstance(there, dict):
        raise InputError(f"{storage.title}/{RUN} is not what batch writes; give another folder.")
    return there


def _write(storage: Storage, values: Mapping[str, Any]) -> None:
    with storage.whole(RUN) as file:
        file.write(json.dumps(values, indent=2).encode())


def _said(value: Any) -> str:
    return "left out" if value is None else json.dumps(value)
