"""The multi-scale residual quantizer."""

from __future__ import annotations

import pytest
import torch

from hart_infer.models.parts.quantizer import Quantizer, phi_index

SIDES = (1, 2, 3, 5)
CODES, CHANNELS = 64, 8


def phi(index: int) -> int:
    return phi_index(index, len(SIDES), 4)


@pytest.fixture(scope="module")
def quantizer():
    torch.manual_seed(0)
    return Quantizer(vocab_size=CODES, channels=CHANNELS, patch_nums=SIDES, share_quant_resi=4).requires_grad_(False)


@pytest.fixture
def latent():
    return torch.randn(2, CHANNELS, SIDES[-1], SIDES[-1], generator=torch.Generator().manual_seed(1))


def test_nearest_code(quantizer, latent):
    vectors = latent.permute(0, 2, 3, 1).flatten(0, 2).double()
    expected = torch.cdist(vectors, quantizer.codebook.weight.double()).argmin(dim=1).view(2, -1)
    assert quantizer.nearest(latent).equal(expected)


def test_a_code_is_its_own_nearest(quantizer):
    indices = torch.randint(CODES, (2, 9), generator=torch.Generator().manual_seed(2))
    assert quantizer.nearest(quantizer.embed(indices)).equal(indices)


def test_what_the_codes_leave(quantizer, latent):
    """The residual is what all scales but the last leave: their refined codes and it make the latent."""
    tokens = quantizer.encode(latent)
    codes = [quantizer.contribution(embedding, phi(i)) for i, embedding in enumerate(tokens.embeddings[:-1])]
    torch.testing.assert_close(sum(codes) + tokens.residual, latent)
    assert tokens.indices[-1].equal(quantizer.nearest(tokens.residual))


def test_the_last_scale_is_refined_in_the_discrete_sum_only(quantizer, latent):
    tokens = quantizer.encode(latent)
    generated = latent - tokens.residual + tokens.embeddings[-1]
    refined = latent - tokens.residual + quantizer.refine(tokens.embeddings[-1], phi(len(SIDES) - 1))
    discrete = quantizer.discrete(tokens.embeddings)
    torch.testing.assert_close(discrete, refined)
    assert not torch.allclose(discrete, generated, atol=1e-3)


def test_next_inputs_are_those_of_generation(quantizer, latent):
    """Teacher forcing sees what the loop of generation makes of the same codes."""
    embeddings = quantizer.encode(latent).embeddings
    f_hat = torch.zeros_like(latent)
    for index, given in enumerate(quantizer.inputs(embeddings)):
        f_hat = f_hat + quantizer.contribution(embeddings[index], phi(index))
        torch.testing.assert_close(given, quantizer.next_input(f_hat, SIDES[index + 1]))


def test_a_full_size_scale_is_not_resized(quantizer, latent):
    assert quantizer.contribution(latent, None) is latent
    assert torch.equal(quantizer.contribution(latent, 2), quantizer.refine(latent, 2))


def test_the_last_scale_s_convolution_is_the_last_one():
    """In the tokenizer's discrete sum, and in VAR."""
    assert phi_index(13, 14, 4) == 3
    assert phi_index(13, 14, 0) == 13


def test_two_ticks_are_equally_near_and_rounding_decides():
    """Ten scales, four convolutions (VAR at 256 px): the third and the eighth lie midway."""
    assert [phi_index(index, 10, 4) for index in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
