"""The model's modules with the CUDA norms, compiled for the CPU, in place of PyTorch's."""

from __future__ import annotations

import pytest
import torch

from hart_infer.models.parts.diffusion import ResidualDiffusion
from hart_infer.ops.registry import use_backend
from tests.models.test_hart import ADAPTIVE, PLAIN, build, run
from tests.models.test_var import built, logits, transformer_state

pytestmark = pytest.mark.usefixtures("on_host")


@pytest.mark.parametrize("config", [PLAIN, ADAPTIVE], ids=["plain", "adaptive"])
def test_a_transformer(config):
    """As near to fp64 as with PyTorch's norms: depth multiplies what each of them rounds."""
    torch.manual_seed(1)
    context = torch.randn(1, config.context_token, config.context_dim)
    mask = torch.tensor([[True, True, True, False, False, False]])

    def outputs(backend: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        with use_backend(backend):
            transformer = build(config).to(dtype)
            given, hidden = run(transformer, context.to(dtype), mask)
            return hidden, transformer.head(hidden, given.modulation.head[:1])

    exact = outputs("torch", torch.float64)
    found, expected = (
        [(x - y).norm() for x, y in zip(outputs(b, torch.float32), exact, strict=True)] for b in ("cuda", "torch")
    )
    assert all(0 < x <= 2 * y for x, y in zip(found, expected, strict=True))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_var_s_transformer(dtype, tmp_path):
    """Its blocks add within the norm, and its head's norm takes fp32 with vectors of the weights' dtype."""

    def by(backend: str, dtype: torch.dtype) -> torch.Tensor:
        with use_backend(backend):
            return logits(built(transformer_state(), tmp_path).to(dtype))

    exact = by("torch", torch.float64)
    found, expected = ((by(backend, dtype) - exact).norm() for backend in ("cuda", "torch"))
    assert 0 < found <= 2 * expected


def test_a_residual_diffusion():
    torch.manual_seed(0)
    network = ResidualDiffusion(channels=4, condition_dim=32, width=16, depth=3).requires_grad_(False)
    arguments = (torch.randn(5, 4), network.time_embed(torch.tensor([571])), torch.randn(10, 16))
    expected = network(*arguments)
    with use_backend("cuda"):
        torch.testing.assert_close(network(*arguments), expected)
