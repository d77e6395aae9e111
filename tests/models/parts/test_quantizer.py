"""The multi-scale residual quantizer."""

from __future__ import annotations

import pytest
import torch

from hart_infer.models.config import AutoencoderConfig
from hart_infer.models.parts.quantizer import Quantizer

SIDES = (1, 2, 3, 5)
CONFIG = AutoencoderConfig(v_patch_nums=SIDES, vocab_size=64, z_channels=8)


@pytest.fixture(scope="module")
def quantizer():
    torch.manual_seed(0)
    return Quantizer(CONFIG).requires_grad_(False)


@pytest.fixture
def latent():
    return torch.randn(2, CONFIG.z_channels, SIDES[-1], SIDES[-1], generator=torch.Generator().manual_seed(1))


def test_nearest_code(quantizer, latent):
    vectors = latent.permute(0, 2, 3, 1).flatten(0, 2).double()
    expected = torch.cdist(vectors, quantizer.codebook.weight.double()).argmin(dim=1).view(2, -1)
    assert quantizer.nearest(latent).equal(expected)


def test_a_code_is_its_own_nearest(quantizer):
    indices = torch.randint(CONFIG.vocab_size, (2, 9), generator=torch.Generator().manual_seed(2))
    assert quantizer.nearest(quantizer.embed(indices)).equal(indices)


def test_what_the_codes_leave(quantizer, latent):
    """The residual is what all scales but the last leave: their refined codes and it make the latent."""
    tokens = quantizer.encode(latent)
    codes = [quantizer.enlarge(embedding, quantizer._phi(i)) for i, embedding in enumerate(tokens.embeddings[:-1])]
    torch.testing.assert_close(sum(codes) + tokens.residual, latent)
    assert tokens.indices[-1].equal(quantizer.nearest(tokens.residual))


def test_the_last_scale_is_refined_in_the_discrete_sum_only(quantizer, latent):
    tokens = quantizer.encode(latent)
    generated = latent - tokens.residual + tokens.embeddings[-1]
    refined = latent - tokens.residual + quantizer.refine(tokens.embeddings[-1], quantizer._phi(len(SIDES) - 1))
    discrete = quantizer.discrete(tokens.embeddings)
    torch.testing.assert_close(discrete, refined)
    assert not torch.allclose(discrete, generated, atol=1e-3)


def test_next_inputs_are_those_of_generation(quantizer, latent):
    """Teacher forcing sees what the loop of generation makes of the same codes."""
    embeddings = quantizer.encode(latent).embeddings
    f_hat = torch.zeros_like(latent)
    for index, given in enumerate(quantizer.inputs(embeddings)):
        f_hat = f_hat + quantizer.enlarge(embeddings[index], quantizer._phi(index))
        torch.testing.assert_close(given, quantizer.next_input(f_hat, SIDES[index + 1]))
