"""Small layers: where they round, and that an image does not depend on its batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hart_infer.models.parts.layers import MANY_ROWS, RMSNorm, SteadyLinear, sinusoid


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_rounds_before_the_weight(dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((64, 128), (128,)))
    norm = RMSNorm(128, 1e-6).to(dtype)
    norm.weight.data = weight
    normalised = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    rounded_once = (normalised * weight.double()).to(dtype)
    rounded_twice = (normalised.to(dtype).double() * weight.double()).to(dtype)
    assert not rounded_once.equal(rounded_twice)
    # fp32 against fp64 moves a value that lies between two neighbours now and then, not more often.
    assert (norm(x) != rounded_twice).float().mean() < 0.01
    assert (norm(x) != rounded_once).float().mean() > 0.1


def test_sinusoid_has_cosines_first():
    features = sinusoid(torch.tensor([0.0, 3.0]), width=8)
    assert features[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    angles = 3 / 10000 ** (torch.arange(4) / 4)
    torch.testing.assert_close(features[1], torch.cat([angles.cos(), angles.sin()]))


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, MANY_ROWS, 3 * MANY_ROWS])
def test_steady_linear_is_linear(rows, halves):
    torch.manual_seed(0)
    layer = SteadyLinear(128, 384, halves=halves)
    x = torch.randn(rows, 128)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert layer(x[:, None]).shape == (rows, 1, 384)


@pytest.mark.parametrize("halves", [False, True])
def test_a_row_of_steady_linear_does_not_depend_on_the_others(halves):
    torch.manual_seed(0)
    layer = SteadyLinear(128, 384, halves=halves)
    x = torch.randn(3 * MANY_ROWS, 128)
    together = layer(x)
    for rows in (1, 2, 3, 7):
        assert layer(x[:rows]).equal(together[:rows])
