"""Products in half precision on a CPU: as they are where it has instructions for them, else in fp32 and rounded once."""

from __future__ import annotations

import platform

import pytest
import torch
import torch.nn.functional as F

from hart_infer import ops
from hart_infer.ops import precision
from hart_infer.ops.precision import MIN_ROWS, NATIVE, instructions, widens

HALF = [torch.bfloat16, torch.float16]
PRODUCTS = ["linear", "conv2d", "attention"]


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch):
    """Pretend to be an x86 CPU with the given instructions."""

    def pretend(*names: str) -> None:
        monkeypatch.setattr(platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(precision, "instructions", lambda: frozenset(names))

    return pretend


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(
    ("names", "dtype", "widened"),
    [
        ((), torch.bfloat16, True),
        ((), torch.float16, True),
        (("avx512_vnni",), torch.bfloat16, True),
        (("avx512_bf16",), torch.bfloat16, False),
        (("avx512_bf16",), torch.float16, True),
        (("amx_tile",), torch.bfloat16, False),
        (("amx_tile", "avx512_bf16"), torch.float16, True),
        (("amx_fp16",), torch.float16, False),
        ((), torch.float32, False),
    ],
)
def test_the_choice_rests_on_instructions_dtype_and_product(cpu, names, dtype, widened, product) -> None:
    cpu(*names)
    assert widens(torch.empty(1, dtype=dtype), product) is widened


def test_other_cpus_and_devices_multiply_as_it_is(cpu, monkeypatch) -> None:
    cpu()
    assert not widens(torch.empty(1, dtype=torch.bfloat16, device="meta"), "linear")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert not widens(torch.empty(1, dtype=torch.bfloat16), "linear")


def test_this_cpu_s_instructions_are_what_torch_says() -> None:
    assert ("avx512_bf16" in instructions()) == torch.cpu._is_avx512_bf16_supported()
    assert ("amx_tile" in instructions()) == torch.cpu._is_amx_tile_supported()


def test_every_product_has_a_row_for_each_dtype() -> None:
    assert {dtype: list(products) for dtype, products in NATIVE.items()} == dict.fromkeys(HALF, PRODUCTS)


@pytest.mark.parametrize("dtype", HALF)
def test_widened_products_round_once(cpu, dtype) -> None:
    cpu()
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, weight, bias = draw(MIN_ROWS, 40), draw(24, 40), draw(24)
    assert torch.equal(ops.linear(x, weight, bias), F.linear(x.float(), weight.float(), bias.float()).to(dtype))
    image, kernel, bias = draw(1, 8, 6, 6), draw(4, 8, 3, 3), draw(4)
    expected = F.conv2d(image.float(), kernel.float(), bias.float(), 1, 1).to(dtype)
    assert torch.equal(ops.conv2d(image, kernel, bias, stride=1, padding=1), expected)
    q, k, v = draw(1, 2, 5, 16), draw(1, 2, 9, 16), draw(1, 2, 9, 16)
    attended = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=0.5).to(dtype)
    assert torch.equal(ops.attention.reference(q, k, v, scale=0.5), attended.transpose(1, 2).reshape(1, 5, 32))


def test_a_linear_map_of_few_rows_is_not_widened(cpu, monkeypatch) -> None:
    """Reading the weights is its cost, and a widened copy of them more than doubles that."""
    cpu()
    seen: list[torch.dtype] = []
    monkeypatch.setattr(F, "linear", lambda x, *_: seen.append(x.dtype) or x)
    for rows in (MIN_ROWS - 1, MIN_ROWS):
        ops.linear(torch.ones(rows, 4, dtype=torch.bfloat16), torch.ones(4, 4, dtype=torch.bfloat16), None)
    assert seen == [torch.bfloat16, torch.float32]
