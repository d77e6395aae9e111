"""Where an operation's tests run, poisoned memory, and a repaired interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext, suppress

import pytest
import torch
from torch import Tensor

from tests.ops.interpreter import repair

with suppress(ImportError):  # without Triton its tests are skipped
    repair()


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    """Where there is one, tensors are made there and the kernels are compiled; elsewhere Triton interprets them."""
    with torch.device("cuda") if torch.cuda.is_available() else nullcontext():
        yield


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that no kernel has written holds NaN."""
    empty = torch.Tensor.new_empty

    def new_empty(self: Tensor, *size, **options) -> Tensor:
        made = empty(self, *size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
