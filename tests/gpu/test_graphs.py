"""CUDA graphs of whole generations: the eager pictures, steady memory, no waiting of the host in between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hart_infer import HartPipeline

PROMPT = "a red heart, fluent style"


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def pipe(request: pytest.FixtureRequest) -> Iterator[HartPipeline]:
    pipe = HartPipeline.from_pretrained(torch_dtype=request.param, device="cuda")
    pipe.set_progress_bar_config(disable=True)
    yield pipe


def latents(pipe: HartPipeline, **arguments: Any) -> Tensor:
    found: Tensor = pipe(PROMPT, output_type="latent", **arguments).images
    return found


CALLS: list[dict[str, Any]] = [
    {"seed": 1, "guidance_scale": 1.0},
    {"seed": 2, "guidance_scale": 2.5},
    {"seed": 3, "guidance_scale": 1.0, "top_k": 40},
    {"seed": 4, "guidance_scale": 1.0},
]


@pytest.mark.parametrize(
    "kind", [{}, {"num_images_per_prompt": 4}, {"speed": "fast"}, {"top_p": 0.9}, {"negative_prompt": "a dog"}], ids=str
)
def test_replayed_pictures_are_the_eager_ones(pipe: HartPipeline, kind: dict[str, Any]) -> None:
    calls = [kind | call for call in CALLS]
    expected = [latents(pipe, **call) for call in calls]
    pipe.enable_graphs()
    try:
        for _ in range(2):
            for call, eager in zip(calls, expected, strict=True):
                assert torch.equal(latents(pipe, **call), eager), call
    finally:
        pipe.disable_graphs()


def test_replays_take_no_more_memory_and_the_pictures_are_the_eager_ones(pipe: HartPipeline) -> None:
    eager = pipe(PROMPT, seed=9, output_type="pt").images
    pipe.enable_graphs()
    try:
        for seed in (1, 2, 3):
            pipe(PROMPT, seed=seed)
        torch.cuda.synchronize()
        before = torch.cuda.memory_reserved()
        for seed in range(10):
            pipe(PROMPT, seed=seed)
        assert torch.cuda.memory_reserved() == before
        assert torch.equal(pipe(PROMPT, seed=9, output_type="pt").images, eager)
    finally:
        pipe.disable_graphs()


def test_no_scale_waits_for_the_device(pipe: HartPipeline) -> None:
    """Between the first callback and the last nothing synchronises: torch raises where something does."""
    pipe.enable_graphs()
    last = len(pipe.transformer.config.patch_nums) - 1

    def watched(step: Any) -> None:
        torch.cuda.set_sync_debug_mode("default" if step.index == last else "error")

    try:
        for seed in (1, 2):
            pipe(PROMPT, seed=seed)
        pipe(PROMPT, seed=3, callback_on_step_end=watched)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        pipe.disable_graphs()


def test_a_seed_s_residual_noise_is_the_cpus() -> None:
    """Philox by seed, step, token and channel: the reference on the CPU draws the same numbers, within rounding."""
    from hart_infer import ops

    seeds = torch.tensor([5, -3])
    found = ops.normal_noise(seeds.cuda(), step=2, tokens=70, channels=32).cpu()
    torch.testing.assert_close(found, ops.normal_noise(seeds, step=2, tokens=70, channels=32), rtol=1e-4, atol=1e-5)
