"""What an operator may set, by options of the command line or by environment variables HART_INFER_SERVE_*."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from ..errors import ConfigError
from .scheduler import Limits

PREFIX = "HART_INFER_SERVE_"
MIB = 2**20


class ServerSettings(BaseSettings):
    """All settings with their defaults, which are those of a server for this machine alone."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    keys: Path | None = None  # file of hashed API keys
    insecure: bool = False  # serve other machines without keys
    rate: int = Field(600, ge=0)  # pictures a minute for each key; 0 is no limit
    max_batch: int = Field(8, ge=1, le=4096)
    max_wait_ms: float = Field(10, ge=0, le=60_000)
    max_queue: int = Field(256, ge=1, le=1_000_000)
    timeout: float = Field(300, gt=0, le=86_400)  # seconds for a request
    drain: float = Field(60, ge=0, le=86_400)  # seconds that open requests get when the server ends
    max_body_mb: float = Field(20, gt=0, le=1024)
    max_prompt: int = Field(4000, ge=1)  # characters
    max_n: int = Field(10, ge=1, le=1000)
    max_pixels: int = Field(4096 * 4096, ge=1)  # of a given picture
    keep: Path | None = None  # folder for finished pictures; without it none is kept

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    @property
    def max_body(self) -> int:
        """Bytes of a request."""
        return round(self.max_body_mb * MIB)

    @property
    def limits(self) -> Limits:
        """The queue's limits."""
        return Limits(
            max_batch=self.max_batch,
            max_wait=self.max_wait_ms / 1000,
            max_queue=self.max_queue,
            deadline=self.timeout,
            patience=self.timeout,
        )


def is_loopback(name: str) -> bool:
    """Return whether a host's name is localhost or a loopback address."""
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def make_settings(**given: object) -> ServerSettings:
    """Make the settings of what the command line gives; None is not given. Raises ConfigError."""
    try:
        settings = ServerSettings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{name} (or {PREFIX}{name.upper()}) is wrong: {first['msg'].lower()}.") from None
    if not settings.is_local and settings.keys is None and not settings.insecure:
        raise ConfigError(
            f"Other machines can reach {settings.host}, so the server wants API keys: make one with --keys FILE --new-key "
            "NAME, then serve with --keys FILE; or say --insecure to let everyone in."
        )
    return settings
