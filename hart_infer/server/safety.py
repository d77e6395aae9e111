"""Refuse prompts that a safety model objects to (ShieldGemma, arXiv:2407.21772). Off unless it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    pass


class RefusedError(InputError):
    """The safety model objects to a prompt."""


class Judge:
    def check(self, prompt: str) -> None: ...
