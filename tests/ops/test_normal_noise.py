"""Normal noise by Philox: its distribution, on what it depends, and the Triton kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from hart_infer import ops
from hart_infer.ops.normal_noise import normal_noise
from hart_infer.ops.registry import use_backend

SEEDS = [7, -1, 2**40 + 3]


def noise(seeds: list[int], **shape: int) -> torch.Tensor:
    return ops.normal_noise(torch.tensor(seeds), **{"step": 0, "tokens": 5, "channels": 4} | shape)


@pytest.mark.parametrize("shape", [(1, 1), (5, 4), (70, 32)], ids=str)
@pytest.mark.parametrize("step", [0, 8])
def test_kernel_and_reference_draw_alike(shape, step):
    pytest.importorskip("triton")
    options = {"step": step, "tokens": shape[0], "channels": shape[1]}
    with use_backend("triton"):
        found = noise(SEEDS, **options)
    torch.testing.assert_close(found, normal_noise.reference(torch.tensor(SEEDS), **options), rtol=1e-5, atol=1e-6)


def test_an_image_depends_on_its_seed_and_on_the_step_alone():
    together = noise(SEEDS)
    for i, seed in enumerate(SEEDS):
        assert torch.equal(together[i : i + 1], noise([seed]))
    assert torch.equal(together[:, :3], noise(SEEDS, tokens=3)), "a token's noise does not depend on how many there are"
    flat = torch.cat([together.flatten(), noise(SEEDS, step=1).flatten()])
    assert len(flat.unique()) == len(flat), "no number twice"


def test_it_is_standard_normal():
    """Moments of 200,000 draws, within five of their standard errors; neighbours are not correlated."""
    x = noise([3, 4], tokens=3125, channels=32).double().flatten()
    count = len(x)
    assert x.mean().abs() < 5 / count**0.5 and (x.var() - 1).abs() < 5 * (2 / count) ** 0.5
    assert (x**3).mean().abs() < 5 * (15 / count) ** 0.5 and ((x**4).mean() - 3).abs() < 5 * (96 / count) ** 0.5
    assert (x[1:] * x[:-1]).mean().abs() < 5 / count**0.5
    assert x.abs().max() > 4


def test_seeds_that_do_not_fit_are_refused():
    pytest.importorskip("triton")
    with use_backend("triton"), pytest.raises(ValueError, match="normal_noise: seeds must be int64, one for each image"):
        ops.normal_noise(torch.tensor([[1]]), step=0, tokens=1, channels=1)
