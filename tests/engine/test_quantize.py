"""Weights in int8: half a step off at most, a quarter of fp32's memory, and never touched by a cast."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from hart_infer.engine import quantize
from hart_infer.engine.quantize import Int8Linear, quantize_weights
from hart_infer.models.parts.layers import Linear


@pytest.fixture
def linear() -> Linear:
    torch.manual_seed(0)
    return Linear(64, 48).requires_grad_(False)


@torch.no_grad()
def test_weights_are_at_most_half_a_step_off(linear: Linear) -> None:
    small = Int8Linear(linear)
    step = linear.weight.abs().amax(dim=1, keepdim=True) / 127
    assert small.weight.dtype == torch.int8
    assert int(small.weight.abs().amax(dim=1).min()) == 127  # every row uses its whole range
    assert ((small.weight * small.scale[:, None] - linear.weight).abs() <= step * 0.5001).all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_the_rounded_weights(linear: Linear, dtype: torch.dtype) -> None:
    small, x = Int8Linear(linear.to(dtype)), torch.randn(3, 5, 64).to(dtype)
    rounded = small.weight.double() * small.scale.double()[:, None]
    expected = x.double() @ rounded.T + linear.bias.double()
    out = small(x)
    assert (out.dtype, out.shape) == (dtype, (3, 5, 48))
    torch.testing.assert_close(out.double(), expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


@torch.no_grad()
def test_a_row_of_zeros_stays_one(linear: Linear) -> None:
    linear.weight[3] = 0
    assert (Int8Linear(linear)(torch.ones(1, 64))[0, 3] == linear.bias[3]).all()


def test_a_cast_leaves_weight_and_scale_alone(linear: Linear) -> None:
    small = Int8Linear(linear)
    scale = small.scale.clone()
    small.to(torch.bfloat16)
    assert small.weight.dtype == torch.int8
    assert small.bias is not None and small.bias.dtype == torch.bfloat16
    assert torch.equal(small.scale, scale)


def test_every_linear_map_is_replaced_but_those_to_keep() -> None:
    module = nn.ModuleDict({"a": Linear(4, 4), "b": nn.Sequential(Linear(4, 8, bias=False)), "head": Linear(8, 2)})
    quantize_weights(module, keep=("head",))
    assert [type(each) for each in (module["a"], module["b"][0], module["head"])] == [Int8Linear, Int8Linear, Linear]
    assert module["b"][0].bias is None


@torch.no_grad()
def test_half_precision_overflows_no_sooner_than_the_result() -> None:
    """A single large activation, as Llamas have them: times plain levels it would be beyond fp16's range."""
    torch.manual_seed(0)
    linear = Linear(512, 64, bias=False).requires_grad_(False)
    linear.weight.normal_(std=0.02)
    x = torch.zeros(1, 512)
    x[0, 3] = 2000.0
    out = Int8Linear(linear)(x.half())
    assert out.isfinite().all()
    torch.testing.assert_close(out.float(), linear(x), rtol=2e-2, atol=2.0)


def test_a_replaced_weight_is_freed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(*(Linear(8, 8) for _ in range(4)))
    weights = [weakref.ref(layer.weight) for layer in module]
    alive: list[int] = []
    made = quantize.Int8Linear

    def spy(linear: nn.Linear) -> nn.Module:
        alive.append(sum(ref() is not None for ref in weights))
        return made(linear)

    monkeypatch.setattr(quantize, "Int8Linear", spy)
    quantize_weights(module)
    assert alive == [4, 3, 2, 1]
