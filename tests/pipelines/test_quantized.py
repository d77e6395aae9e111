"""Pipelines whose blocks run in int8: near to what they compute otherwise, smaller, not saved."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hart_infer import HartPipeline
from hart_infer.engine.quantize import DynamicInt8Linear, Int8Linear
from hart_infer.errors import InputError
from hart_infer.generation.next_scale import prefill_alone
from hart_infer.models.parts.layers import Linear
from hart_infer.models.parts.modulation import LinearModulation

KINDS = {"int8": DynamicInt8Linear, "int8_weight_only": Int8Linear}


def mini(dtype: torch.dtype, quantize: str | None) -> HartPipeline:
    return HartPipeline.from_pretrained(dtype=dtype, quantize=quantize, device="cpu")


@torch.no_grad()
def hidden_states(pipe: HartPipeline) -> Tensor:
    """Of a context's last token, after all blocks."""
    config = pipe.transformer.config
    context = torch.randn(4, config.context_token, config.context_dim, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(context.shape[:2], dtype=torch.bool)
    positions = torch.arange(config.context_token).expand(4, -1)
    return prefill_alone(pipe.transformer, pipe.transformer.condition(context, mask, positions)).hidden_states.float()


@pytest.mark.parametrize(("mode", "most"), [("int8", 0.05), ("int8_weight_only", 0.03)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_hidden_states_are_near_the_exact_ones(mode: str, most: float, dtype: torch.dtype) -> None:
    exact, found = (hidden_states(mini(dtype, quantize)) for quantize in (None, mode))
    error = (found - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error < most


@pytest.mark.parametrize("mode", KINDS)
def test_the_blocks_linear_maps_are_int8_and_no_others(mode: str, tmp_path: Path) -> None:
    pipe = mini(torch.bfloat16, mode)
    transformer = pipe.transformer
    linear = [part for part in transformer.blocks.modules() if isinstance(part, (Linear, *KINDS.values()))]
    modulations = [part for part in linear if isinstance(part, LinearModulation)]  # those run once a picture
    assert len(modulations) == transformer.depth
    inside = [part for part in linear if not isinstance(part, LinearModulation)]
    assert len(inside) >= 4 * transformer.depth and {type(part) for part in inside} == {KINDS[mode]}
    assert type(transformer.word_embed) is Linear and isinstance(transformer.head.linear, Linear)
    assert not any(isinstance(part, tuple(KINDS.values())) for part in transformer.diffusion.modules())
    assert "most in int8" in pipe.describe()
    with pytest.raises(InputError, match="Weights in int8 are not saved"):
        pipe.save_pretrained(tmp_path / "saved")
    assert pipe("a cat, noto style", seed=0).images[0].size == (128, 128)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not say what is mapped")
def test_the_old_weights_are_no_longer_mapped(hart_tiny: Path, tmp_path: Path) -> None:
    HartPipeline.from_pretrained(hart_tiny, text_encoder=False, device="cpu").save_pretrained(tmp_path / "own")
    options: dict[str, Any] = {"text_encoder": False, "device": "cpu"}
    exact, found = (HartPipeline.from_pretrained(tmp_path / "own", quantize=mode, **options) for mode in (None, "int8"))
    weights = str(tmp_path / "own" / "transformer" / "model.safetensors")
    assert exact.transformer.depth and weights in Path("/proc/self/maps").read_text()
    del exact
    gc.collect()
    assert found.transformer.depth and weights not in Path("/proc/self/maps").read_text()


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(InputError, match="quantize must be 'int8', 'int8_weight_only' or None, not 'fp8'"):
        mini(torch.float32, "fp8")
