"""The kernels of csrc/ on the CPU, behind the door that they have in the package."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hart_infer.extension import library
from hart_infer.ops.registry import OPS
from tests.csrc.build import compile_host, obstacle
from tests.ops.conftest import poisoned as poisoned


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> library.Library:
    """Built once per session."""
    if reason := obstacle():
        pytest.skip(reason)
    return library.Library(compile_host(tmp_path_factory.mktemp("csrc") / "host.so", "-O1", "-shared", "-fPIC"))


@pytest.fixture
def on_host(host_library: library.Library, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`use_backend("cuda")` runs the kernels on CPU tensors."""
    monkeypatch.setattr(library, "load", lambda: host_library)
    for operation in OPS.values():
        monkeypatch.setattr(operation, "_chosen", {})
    yield
