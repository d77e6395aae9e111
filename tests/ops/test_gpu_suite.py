"""What `make gpu` runs, as far as it runs without a GPU: so that the first GPU does not find faults in the tests."""

from __future__ import annotations

import json

import pytest
import torch

from hart_infer.ops import registry
from hart_infer.ops.registry import OPS, REFERENCE, use_backend
from tests.csrc.conftest import host_library as host_library
from tests.csrc.conftest import on_host as on_host
from tests.gpu import every_kernel, test_shapes
from tests.gpu.test_shapes import calls as calls

GPU = {name: found for name in OPS if (found := [b for b in ("triton", "cuda") if b in OPS[name].backends])}  # its kernel
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs these on the GPU")


def test_every_operation_is_timed_by_one_command(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "BACKENDS", (REFERENCE,))  # an interpreter's time is none
    assert calls.main(["--device", "cpu", "--seconds", "0", "--dtype", "fp32", "--out", str(tmp_path / "ops.json")]) == 0
    found = json.loads((tmp_path / "ops.json").read_text())["ops"]
    assert [row["op"] for row in found] == list(calls.CASES) and {row["backend"] for row in found} == {REFERENCE}
    assert set(calls.CASES) == set(OPS) and all(row["seconds"]["median"] > 0 and row["bytes"] > 0 for row in found)


def test_every_variant_of_every_kernel(on_host, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert every_kernel.main() == 0


@torch.inference_mode()
@pytest.mark.parametrize("name", GPU)
def test_numbers_at_a_models_shapes(name, calls, on_host):
    (backend,) = GPU[name]
    if backend == "triton":
        pytest.importorskip("triton")
    with use_backend(backend):
        test_shapes.check(calls, name, "hart-mini", "cpu", rows=2)
