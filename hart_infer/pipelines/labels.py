"""Turn what users call a class, its number or one of its names, into its index; without torch, as the checks are."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from importlib import resources
from numbers import Integral
from pathlib import Path
from typing import Any

from ..checkpoints.configs import read_json_value
from ..errors import ConfigError, InputError
from .checks import check_int

IMAGENET_CLASSES = 1000
MAX_LISTED = 10  # classes of the same name that a message lists
MAX_SUGGESTIONS = 5
MIN_LIKENESS = 0.7  # of difflib; "lyon" is 0.75 like "lion"
MAX_NAME = 100  # letters of a label that are compared to find suggestions
Names = tuple[tuple[str, ...], ...]  # the usual name of each class first, then its synonyms


@dataclass(frozen=True)
class Labels:
    """The classes of a checkpoint: their number, and their names where it has any."""

    classes: int
    names: Names | None = None

    @classmethod
    def for_checkpoint(cls, classes: int, file: Path | None = None) -> Labels:
        """Read the names from `file`; without one, take ImageNet's for 1000 classes and none for another number.

        The file is JSON: a list with a name or a list of names for each class, an object {"0": ..., "1": ...} of those, or an
        object that has such a list under "classes". Raises CheckpointNotFoundError, or ConfigError for its contents.
        """
        if file is None and classes != IMAGENET_CLASSES:
            return cls(classes)
        if file is None:
            bundled = resources.files("hart_infer") / "assets" / "imagenet_classes.json"
            return cls(classes, _names(json.loads(bundled.read_text(encoding="utf-8")), "imagenet_classes.json"))
        names = _names(read_json_value(file), str(file))
        if len(names) != classes:
            raise ConfigError(f"{file} names {len(names)} classes, but the checkpoint has {classes}; correct it or remove it.")
        return cls(classes, names)

    def name(self, index: int) -> str | None:
        """Return the usual name of a class, or None if the checkpoint has no names."""
        number = check_int(index, "index", 0, self.classes - 1)
        return None if self.names is None else self.names[number][0]

    def index(self, label: Any) -> int:
        """Return the index of a class from its number or one of its names; a string of digits is a number.

        Names are compared without case, and hyphens, underscores and spaces count as the same. Where several classes have a
        name, the one that spells it exactly so is taken, then the one that has it as its usual name; if that leaves more than
        one, or no class has the name, InputError lists those that could be meant.
        """
        if isinstance(label, bool) or not isinstance(label, Integral | str):
            names = " or a name" if self.names is not None else ""
            raise InputError(f"a class must be a whole number {self._range}{names}, not {type(label).__name__}.")
        if isinstance(label, str) and not re.fullmatch("-?[0-9]+", label.strip()):
            return self._named(label.strip())
        try:
            number: Any = int(label)
        except ValueError:  # more digits than Python reads; check_int refuses the string
            number = label
        return check_int(number, "a class", 0, self.classes - 1)

    def check(self, labels: Any, name: str = "label") -> list[int]:
        """Return the indices of one class or a sequence of classes; arrays and tensors of one dimension are sequences too.

        Raises InputError that says which of them is wrong, `name` being the argument.
        """
        listed = [labels] if isinstance(labels, str | Integral) else _listed(labels)
        if listed is None:
            raise InputError(f"{name} must be a class's number or name, or a list of those, not {type(labels).__name__}.")
        if not listed:
            raise InputError(f"{name} is an empty list; give at least one class.")
        indices = []
        for i, item in enumerate(listed):
            try:
                indices.append(self.index(item))
            except InputError as error:
                raise InputError(f"{name}[{i}]: {error}") from None
        return indices

    @property
    def _range(self) -> str:
        return f"from 0 to {self.classes - 1}"

    @cached_property
    def _by_name(self) -> dict[str, list[int]]:
        """Map each folded name to the classes that have it, in order."""
        found: dict[str, list[int]] = {}
        for i, names in enumerate(self.names or ()):
            for name in dict.fromkeys(_folded(name) for name in names):
                found.setdefault(name, []).append(i)
        return found

    def _named(self, label: str) -> int:
        """Return the index of the class that a name means."""
        if self.names is None:
            raise InputError(f"{_quoted(label)} is a name, but this checkpoint has no names; give a number {self._range}.")
        name = _folded(label)
        found = self._by_name.get(name, [])
        if not found and "," in label:  # "tench, Tinca tinca", as lists of ImageNet's classes write them
            parts = [set(self._by_name.get(_folded(part), ())) for part in label.split(",")]
            found = sorted(set.intersection(*parts))
            if len(found) == 1:
                return found[0]
        if not found:
            raise InputError(f"{_quoted(label)} is not a class of this checkpoint; {self._advice(name[:MAX_NAME])}")
        exact = [i for i in found if label in self.names[i]] or found
        usual = [i for i in exact if _folded(self.names[i][0]) == name] or exact
        if len(usual) > 1:
            listed = [f"{i} ({', '.join(self.names[i])})" for i in found[:MAX_LISTED]]
            listed += [f"{len(found) - MAX_LISTED} others"] if len(found) > MAX_LISTED else []
            raise InputError(f"{_quoted(label)} is the name of {len(found)} classes; give the number: {_either(listed)}.")
        return usual[0]

    def _advice(self, text: str) -> str:
        """Say what an unknown folded name may mean: names that hold it as words, similar names, longer names, names in it."""
        words = f" {text} "
        holding = [name for name in self._by_name if text and words in f" {name} "]
        similar = get_close_matches(text, self._by_name, MAX_SUGGESTIONS, MIN_LIKENESS)
        partly = [name for name in self._by_name if text and text in name]
        within = sorted((name for name in self._by_name if f" {name} " in words), key=len, reverse=True)
        meant: dict[int, str] = {}  # by class, the first name that fits
        for name in [*holding, *similar, *partly, *within]:
            for i in self._by_name[name]:
                meant.setdefault(i, f"{self._written(i, name)} ({i})")
        if not meant:
            return f"give one of its names or a number {self._range}."
        return f"did you mean {_either(list(meant.values())[:MAX_SUGGESTIONS])}?"

    def _written(self, index: int, folded: str) -> str:
        """Return the name of a class that folds to `folded`; its usual one if other classes have that too."""
        names = (self.names or ())[index]
        shared = len(self._by_name[folded]) > 1
        return names[0] if shared else next(name for name in names if _folded(name) == folded)


def _names(values: Any, origin: str) -> Names:
    """Return each class's names from any of the forms that a file may have; `origin` is its name in messages."""
    if isinstance(values, dict) and "classes" in values:
        values = values["classes"]
    elif isinstance(values, dict):
        numbers = [str(i) for i in range(len(values))]
        if values.keys() != set(numbers):
            raise ConfigError(f'{origin} must have the keys "0", "1", ... without a gap, one for each class, or "classes".')
        values = [values[number] for number in numbers]
    if not isinstance(values, list):
        raise ConfigError(f"{origin} must hold a list of names or an object of names by number, not {type(values).__name__}.")
    return tuple(_class_names(entry, f"{origin}: class {i}") for i, entry in enumerate(values))


def _class_names(entry: Any, where: str) -> tuple[str, ...]:
    names = entry if isinstance(entry, list) else [entry]
    if not names or not all(isinstance(name, str) and _folded(name) for name in names):
        raise ConfigError(f"{where} must be a name or a list of names, none of them empty.")
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for name in names for letter in name):
        raise ConfigError(f"{where} has a name with a control character or half of a surrogate pair; remove it.")
    return tuple(name.strip() for name in names)


def _folded(name: str) -> str:
    """Return the form in which names are compared."""
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()


def _listed(labels: Any) -> Sequence[Any] | None:
    """Return a sequence's items, an array's as Python's own values, None for anything else."""
    if isinstance(labels, Sequence) and not isinstance(labels, bytes | bytearray | memoryview):
        return labels
    if not hasattr(labels, "tolist") or isinstance(labels, memoryview):
        return None
    try:
        values = labels.tolist()
    except (TypeError, RuntimeError):  # a class, a tensor without data
        return None
    return values if isinstance(values, list) else [values]


def _quoted(label: str) -> str:
    """Return a label between double quotes, on one line and shortened."""
    text = label if len(label) <= 60 else f"{label[:40]}..."
    return f'"{repr(text)[1:-1]}"'


def _either(choices: list[str]) -> str:
    """Join choices as "a, b or c"."""
    *first, last = choices
    return f"{', '.join(first)} or {last}" if first else last
