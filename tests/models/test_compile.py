"""`torch.compile` takes the transformer, and its numbers stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hart_infer import HartPipeline, VarPipeline
from hart_infer.ops.registry import Op
from tests.pipelines.test_hart import HARD, latent, load, relative


@pytest.fixture
def own(hart_tiny: Path, text_tiny: Path):
    torch._dynamo.reset()
    yield load(hart_tiny, text_tiny, torch.float32)
    torch._dynamo.reset()


def test_a_compiled_transformer_draws_the_same(own: HartPipeline) -> None:
    """Traced and made functional, run by PyTorch: bit for bit."""
    before = latent(own)
    own.transformer = torch.compile(own.transformer, backend="aot_eager")
    assert torch.equal(latent(own), before)
    assert own.transformer is own.engine.transformer


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_var_draws_the_same(whole_var_tiny: Path, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Its blocks hand updates and their gates on; as on a GPU, operations with kernels for one are opaque."""
    call = Op.__call__

    def traced(self: Op[Any, Any], *args: Any, **kwargs: Any) -> Any:
        opaque = torch.compiler.is_compiling() and self._has_kernels("cuda")
        return (self._trace if opaque else lambda *a, **k: call(self, *a, **k))(*args, **kwargs)

    monkeypatch.setattr(Op, "__call__", traced)
    torch._dynamo.reset()
    pipe = VarPipeline.from_pretrained(whole_var_tiny, device="cpu")
    before = pipe(1, seed=0, output_type="latent").images
    pipe.transformer = torch.compile(pipe.transformer, backend=backend)
    assert relative(pipe(1, seed=0, output_type="latent").images, before) <= HARD
    torch._dynamo.reset()


def test_compiled_in_place(own: HartPipeline) -> None:
    before = latent(own)
    own.transformer.compile(backend="aot_eager")
    assert torch.equal(latent(own), before)


def test_a_compiled_pipeline_is_saved_as_itself(own: HartPipeline, tmp_path: Path) -> None:
    before = latent(own)
    own.transformer = torch.compile(own.transformer, backend="aot_eager")
    own.save_pretrained(tmp_path / "saved")
    assert torch.equal(latent(load(tmp_path / "saved", tmp_path / "saved" / "text_encoder", torch.float32)), before)


@pytest.mark.slow
@pytest.mark.parametrize("opaque", [False, True], ids=["reference", "opaque"])
def test_inductor_s_code_draws_the_same(own: HartPipeline, monkeypatch: pytest.MonkeyPatch, opaque: bool) -> None:
    """Opaque operations are what a GPU's graphs hold; here the reference runs in them, at offsets that may be symbols."""
    if opaque:
        call = Op.__call__

        def traced(self: Op[Any, Any], *args: Any, **kwargs: Any) -> Any:
            return (self._trace if torch.compiler.is_compiling() else lambda *a, **k: call(self, *a, **k))(*args, **kwargs)

        monkeypatch.setattr(Op, "__call__", traced)
    before = latent(own, more_smooth=False)
    own.transformer = torch.compile(own.transformer)  # symbols from the second scale on
    assert relative(latent(own, more_smooth=False), before) <= HARD
