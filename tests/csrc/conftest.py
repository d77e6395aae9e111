"""The kernels of csrc/ behind the door that they have in the package: on the CPU, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hart_infer.ops.cuda import library
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
def on_host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`use_backend("cuda")` runs the kernels: the package's where there is a GPU, else on CPU tensors."""
    if torch.cuda.is_available():
        with torch.device("cuda"):
            yield
        return
    host_library = request.getfixturevalue("host_library")
    monkeypatch.setattr(library, "load", lambda: host_library)
    for operation in OPS.values():
        monkeypatch.setattr(operation, "_chosen", {})
    yield
