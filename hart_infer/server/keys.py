"""API keys, of which only hashes are stored, and how many pictures each may ask for."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConfigError, InputError
from ..images.files import whole_file, write_failure

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
HASH = re.compile(r"[0-9a-f]{64}")
PREFIX = "hart-"


def digest(key: str) -> str:
    """Return the hash that is stored of a key. Keys have 256 random bits, so a fast hash without salt is enough."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


@dataclass(frozen=True)
class Keys:
    """Names of keys by their hashes."""

    names: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Read lines "NAME HASH"; # begins a comment. Raises ConfigError."""
        names = _names(path, _text(path))
        if not names:
            raise ConfigError(f"{path} has no key; make one with --keys {path} --new-key NAME.")
        return cls(names)

    def name_of(self, key: str) -> str | None:
        """Return the name of a key, None for a wrong one; takes as long whichever it is."""
        given, found = digest(key), None
        for stored, name in self.names.items():
            if hmac.compare_digest(stored, given):
                found = name
        return found


def add_key(path: Path, name: str) -> str:
    """Make a key, add its hash to a file that only its owner may read, and return the key.

    Raises InputError, OutputError, and ConfigError for a file that is not of keys.
    """
    if not NAME.fullmatch(name):
        raise InputError(f"A key's name has up to 64 letters, digits, dots, dashes and underscores, not {name!r}.")
    text = _text(path) if path.exists() else ""
    if name in _names(path, text).values():
        raise InputError(f"{path} has a key named {name} already; take another name, or delete its line.")
    key = PREFIX + secrets.token_urlsafe(32)
    glue = "\n" if text and not text.endswith("\n") else ""
    _replace(path, f"{text}{glue}{name} {digest(key)}\n")
    return key


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all; a new one is for its owner alone, an old one stays whose it was. Raises OutputError."""
    try:
        path.resolve().parent.stat()  # a missing folder is a slip, and is not made
        old = path.stat() if path.exists() else None
        with whole_file(path, overwrite=True) as file:
            if old is not None and hasattr(os, "chown"):
                with suppress(OSError):  # only root may give a file away
                    os.chown(file.name, old.st_uid, old.st_gid)
            os.chmod(file.name, 0o600 if old is None else stat.S_IMODE(old.st_mode))
            file.write(text.encode("utf-8"))
    except OSError as error:
        raise write_failure(path, error) from error


def _names(path: Path, text: str) -> dict[str, str]:
    """Return the names by their hashes. Raises ConfigError."""
    names: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not NAME.fullmatch(words[0]) or not HASH.fullmatch(words[1]):
            raise ConfigError(f"{path}, line {number}: expected a name and a hash, as --new-key writes them.")
        names[words[1]] = words[0]
    return names


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else "it is no text"
        raise ConfigError(f"{path} cannot be read: {reason}.") from error


@dataclass
class Allowance:
    """How many pictures a key may ask for: `rate` a minute, and as many at once after a quiet minute."""

    rate: int
    _left: dict[str, tuple[float, float]] = field(default_factory=dict)  # of a name: pictures, and when that was

    def take(self, name: str, count: int) -> float:
        """Take `count` pictures; return 0, or in how many seconds there will be so many, and take none."""
        if not self.rate:
            return 0.0
        now = time.monotonic()
        left, since = self._left.get(name, (float(self.rate), now))
        left = min(self.rate, left + (now - since) * self.rate / 60)
        missing = min(count, self.rate) - left
        self._left[name] = (left if missing > 0 else left - count, now)
        return max(0.0, missing * 60 / self.rate)
