"""API keys, of which only hashes are stored, and how many pictures each may ask for."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConfigError, InputError, OutputError

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
        names: dict[str, str] = {}
        for number, line in enumerate(_lines(path), 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            if len(words) != 2 or not NAME.fullmatch(words[0]) or not HASH.fullmatch(words[1]):
                raise ConfigError(f"{path}, line {number}: expected a name and a hash, as --new-key writes them.")
            names[words[1]] = words[0]
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
    """Make a key, add its hash to a file that only its owner may read, and return the key. Raises InputError, OutputError."""
    if not NAME.fullmatch(name):
        raise InputError(f"A key's name has up to 64 letters, digits, dots, dashes and underscores, not {name!r}.")
    if path.exists() and name in Keys.read(path).names.values():
        raise InputError(f"{path} has a key named {name} already; take another name, or delete its line.")
    key = PREFIX + secrets.token_urlsafe(32)
    try:
        path.touch(mode=0o600)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{name} {digest(key)}\n")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {(error.strerror or str(error)).lower()}.") from error
    return key


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
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
