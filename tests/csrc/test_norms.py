"""The CUDA norms, compiled for the CPU, against fp64: every dtype, odd widths, strided and poisoned memory, any order.

A kernel's error is at most twice PyTorch's own in that dtype. In fp32 that is the root mean square of the errors: the largest
of a few thousand is a matter of luck, in PyTorch as in a kernel. In half precision, where the roundings between the steps are
part of the definition, all but a few numbers are PyTorch's.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hart_infer import ops
from hart_infer.errors import BackendError
from hart_infer.ops.cuda import library
from hart_infer.ops.registry import use_backend
from tests.ops.checks import check, every_dtype, strided

pytestmark = pytest.mark.usefixtures("on_host")

EPS = 1e-5
WIDTHS = [1, 7, 33, 256, 1000, 1536, 5000, 8200, 9001]  # the last two: beyond what a block holds in registers
ORDERS = ["forward", "reverse", "random:1", "random:2"]
every_width = pytest.mark.parametrize("width", WIDTHS)
every_order = pytest.mark.parametrize("order", ORDERS)


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Around one: a mean that is not zero tells the variance from the mean square."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return (drawn + 1).to(torch.get_default_device(), dtype)


def length(width: int) -> int:
    """How many rows: a thousand numbers if possible, as the errors of a handful say little."""
    return min(max(3, -(-1000 // width)), 200)


def by_kernel(operation, *arguments):
    """What the kernel makes of the arguments."""
    with use_backend("cuda"):
        return operation(*arguments)


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


def distance(x: Tensor, exact: Tensor) -> float:
    return (x.double() - exact).square().mean().sqrt().item()


def compare(found: Tensor, reference: Tensor, exact: Tensor) -> None:
    if found.dtype == torch.float32:
        assert found.shape == exact.shape
        assert distance(found, exact) <= 2 * distance(reference, exact)
    else:
        check(found, reference, exact)
        if found.shape[-1] > 1:  # the layer norm of one number is zero, PyTorch's nearly
            assert (found != reference).float().mean() < 0.01, "rounds elsewhere than the reference"


@every_dtype
@every_width
def test_rms_norm(width, dtype):
    x, weight = strided(numbers(2, length(width), width, dtype=dtype)), numbers(width, dtype=dtype, seed=1)
    exact = rms(x.double()) * weight.double()
    compare(by_kernel(ops.rms_norm, x, weight, EPS), ops.rms_norm.reference(x, weight, EPS), exact)


@every_dtype
@every_width
def test_add_rms_norm(width, dtype):
    x, update = (strided(numbers(2, length(width), width, dtype=dtype, seed=seed)) for seed in (0, 1))
    weight = numbers(width, dtype=dtype, seed=2)
    total, normed = by_kernel(ops.add_rms_norm, x, update, weight, EPS)
    assert torch.equal(total, x + update)
    compare(normed, ops.add_rms_norm.reference(x, update, weight, EPS)[1], rms(total.double()) * weight.double())


@every_dtype
@every_width
def test_rms_norm_modulate(width, dtype):
    x, six = strided(numbers(3, length(width), width, dtype=dtype)), numbers(3, 6, width, dtype=dtype, seed=1)
    scale, _, shift = six[:, ::2, None].unbind(1)
    weight = numbers(width, dtype=dtype, seed=2)
    exact = rms(x.double()) * weight.double() * (1 + scale.double()) + shift.double()
    arguments = (x, weight, scale, shift, EPS)
    compare(by_kernel(ops.rms_norm_modulate, *arguments), ops.rms_norm_modulate.reference(*arguments), exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [7, 256, 1000])
def test_rms_norm_modulate_of_an_input_wider_than_its_parameters(width, dtype):
    """As the head has it: 1 + scale is rounded to the parameters' dtype, everything else is fp32."""
    x = strided(numbers(2, length(width), width, dtype=torch.float32))
    weight, scale, shift = (numbers(*shape, width, dtype=dtype, seed=1) for shape in ((), (2, 1), (2, 1)))
    found = by_kernel(ops.rms_norm_modulate, x, weight, scale, shift, EPS)
    reference = ops.rms_norm_modulate.reference(x, weight, scale, shift, EPS)
    exact = rms(x.double()) * weight.double() * (1 + scale).double() + shift.double()
    compare(found, reference, exact)


@every_dtype
@every_width
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_layer_norm_modulate(width, dtype, affine):
    x, three = strided(numbers(length(width), width, dtype=dtype)), numbers(length(width), 3 * width, dtype=dtype, seed=1)
    shift, scale, _ = three.chunk(3, dim=-1)
    weight, bias = numbers(2, width, dtype=dtype, seed=2) if affine else (None, None)
    wide = [None if y is None else y.double() for y in (weight, bias)]
    exact = F.layer_norm(x.double(), (width,), *wide, EPS) * (1 + scale.double()) + shift.double()
    arguments = (x, weight, bias, scale, shift, EPS)
    compare(by_kernel(ops.layer_norm_modulate, *arguments), ops.layer_norm_modulate.reference(*arguments), exact)


@every_dtype
@every_width
def test_gated_layer_norm_modulate(width, dtype):
    x, update = (strided(numbers(length(width), width, dtype=dtype, seed=seed)) for seed in (0, 1))
    shift, scale, gate = numbers(length(width), 3 * width, dtype=dtype, seed=2).chunk(3, dim=-1)
    weight, bias = numbers(2, width, dtype=dtype, seed=3)
    arguments = (x, update, gate, weight, bias, scale, shift, EPS)
    total, normed = by_kernel(ops.gated_layer_norm_modulate, *arguments)
    assert torch.equal(total, x + gate * update)
    exact = F.layer_norm(total.double(), (width,), weight.double(), bias.double(), EPS)
    compare(normed, ops.gated_layer_norm_modulate.reference(*arguments)[1], exact * (1 + scale.double()) + shift.double())


@every_dtype
@pytest.mark.parametrize("width", [7, 256, 1000])
def test_gated_layer_norm_modulate_of_rows_that_share_their_vectors(width, dtype):
    """As VAR's blocks have it."""
    x, update = (strided(numbers(2, length(width), width, dtype=dtype, seed=seed)) for seed in (0, 1))
    six = numbers(2, 6, width, dtype=dtype, seed=2)
    gate, scale, shift = six[:, ::2, None].unbind(1)
    arguments = (x, update, gate, None, None, scale, shift, EPS)
    total, normed = by_kernel(ops.gated_layer_norm_modulate, *arguments)
    assert torch.equal(total, x + gate * update)
    exact = F.layer_norm(total.double(), (width,), eps=EPS) * (1 + scale.double()) + shift.double()
    compare(normed, ops.gated_layer_norm_modulate.reference(*arguments)[1], exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [7, 256, 1000])
def test_layer_norm_modulate_of_an_input_wider_than_its_parameters(width, dtype):
    """As VAR's head has it: 1 + scale is rounded to the parameters' dtype, everything else is fp32."""
    x = strided(numbers(2, length(width), width, dtype=torch.float32))
    scale, shift = (numbers(2, 1, width, dtype=dtype, seed=seed) for seed in (1, 2))
    arguments = (x, None, None, scale, shift, EPS)
    exact = F.layer_norm(x.double(), (width,), eps=EPS) * (1 + scale).double() + shift.double()
    compare(by_kernel(ops.layer_norm_modulate, *arguments), ops.layer_norm_modulate.reference(*arguments), exact)


@every_dtype
@every_width
@pytest.mark.parametrize("quantized", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
def test_rms_norm_quantized(width, dtype, quantized):
    """Each row's largest number becomes the dtype's largest, and none is further off than its rounding."""
    x, weight = strided(numbers(2, length(width), width, dtype=dtype) - 1), numbers(width, dtype=dtype, seed=1)
    x[0, 0] = 0
    values, scales = by_kernel(ops.rms_norm_quantized, x, weight, EPS, quantized)
    reference, reference_scales = ops.rms_norm_quantized.reference(x, weight, EPS, quantized)
    assert values.dtype == quantized and values.shape == x.shape and scales.shape == x.shape[:-1]
    torch.testing.assert_close(scales, reference_scales, rtol=4 * torch.finfo(dtype).eps, atol=0)
    assert (values.float() != reference.float()).float().mean() <= (0.01 if width > 100 else 0.1)
    normed = ops.rms_norm.reference(x, weight, EPS).float()
    step = 0.5 if quantized == torch.int8 else values.float().abs() / 16 + 2.0**-10
    assert ((values.float() * scales[..., None] - normed).abs() <= step * scales[..., None] * 1.01).all()


@every_order
@pytest.mark.parametrize("width", [33, 1000, 5000])
def test_the_order_of_threads_does_not_matter(width, order, monkeypatch):
    """A missing barrier shows where warps run far ahead of each other."""
    x, update, scale, shift = numbers(4, 2, width, dtype=torch.float32)
    weight = numbers(width, dtype=torch.float32, seed=1)
    calls = (
        (ops.add_rms_norm, (x, update, weight, EPS)),
        (ops.rms_norm_quantized, (x, weight, EPS, torch.int8)),
        (ops.gated_layer_norm_modulate, (x, update, scale, weight, weight, scale, shift, EPS)),
    )
    expected = [by_kernel(operation, *arguments) for operation, arguments in calls]
    monkeypatch.setenv("HOST_ORDER", order)
    for (operation, arguments), results in zip(calls, expected, strict=True):
        for found, result in zip(by_kernel(operation, *arguments), results, strict=True):
            assert torch.equal(found, result)


@every_dtype
def test_rows_may_begin_anywhere(dtype):
    """Where packs of 16 bytes would not be aligned, single elements are read; sizes of one have any stride."""
    around = numbers(3, 257, dtype=dtype)
    x, weight = around[:, 1:], numbers(257, dtype=dtype, seed=1)[1:]
    expected = ops.rms_norm.reference(x, weight, EPS)
    torch.testing.assert_close(by_kernel(ops.rms_norm, x, weight, EPS), expected)
    single = x[1:2].as_strided((1, 256), (1, 1), x[1:2].storage_offset())
    torch.testing.assert_close(by_kernel(ops.rms_norm, single, weight, EPS), expected[1:2])
    transposed = numbers(8, 4, 6, dtype=dtype).transpose(0, 2)
    torch.testing.assert_close(
        by_kernel(ops.rms_norm, transposed, weight[:8], EPS), ops.rms_norm.reference(transposed, weight[:8], EPS)
    )


@every_dtype
@pytest.mark.parametrize("width", [1, 7, 33, 255])
def test_a_single_row_has_any_width(width, dtype):
    """No stride tells that its end is not the end of a pack; NaN is behind it."""
    x, weight = (torch.full((width + 64,), torch.nan, dtype=dtype)[:width] for _ in range(2))
    x.copy_(numbers(width, dtype=dtype))
    weight.copy_(numbers(width, dtype=dtype, seed=1))
    torch.testing.assert_close(by_kernel(ops.rms_norm, x, weight, EPS), ops.rms_norm.reference(x, weight, EPS))


def test_rows_may_be_four_billion_bytes_apart():
    apart = 2**31 + 8
    x = torch.empty(apart + 64, dtype=torch.float16).as_strided((2, 64), (apart, 1))  # most of it is never touched
    x.copy_(numbers(2, 64, dtype=torch.float16))
    weight = numbers(64, dtype=torch.float16, seed=1)
    torch.testing.assert_close(by_kernel(ops.rms_norm, x, weight, EPS), ops.rms_norm.reference(x, weight, EPS))


def test_groups_share_a_modulation_or_have_their_own():
    x = numbers(3, 4, 64, dtype=torch.float32)
    weight = numbers(64, dtype=torch.float32, seed=1)
    for shape in ((3, 1, 64), (3, 4, 64), (1, 4, 64), (1, 1, 64)):
        scale, shift = numbers(2, *shape, dtype=torch.float32, seed=2)
        arguments = (x, weight, scale, shift, EPS)
        torch.testing.assert_close(by_kernel(ops.rms_norm_modulate, *arguments), ops.rms_norm_modulate.reference(*arguments))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 8), (3, 0)])
def test_nothing_is_fine(shape):
    x, weight = torch.zeros(shape), torch.zeros(shape[-1])
    assert by_kernel(ops.rms_norm, x, weight, EPS).shape == shape
    assert by_kernel(ops.layer_norm_modulate, x, None, None, x, x, EPS).shape == shape
    assert by_kernel(ops.rms_norm_quantized, x, weight, EPS, torch.int8)[1].shape == shape[:-1]


def test_gradients_flow_through_the_reference():
    x, weight = numbers(2, 8, dtype=torch.float32), torch.ones(8, requires_grad=True)
    total, normed = by_kernel(ops.add_rms_norm, x, x, weight, EPS)
    normed.sum().backward()
    assert weight.grad is not None and weight.grad.abs().min() > 0


def test_the_door_refuses_what_does_not_fit():
    x, d, row = torch.zeros(2, 3, 8), torch.zeros(8), torch.zeros(2, 1, 8)
    for operation, arguments, message in (
        (ops.rms_norm, (x, torch.zeros(7), EPS), r"rms_norm: weight must be \[8\], not \[7\]"),
        (ops.rms_norm, (x.half(), d, EPS), "rms_norm: weight must be in torch.float16, not torch.float32"),
        (ops.rms_norm, (x, d.to("meta"), EPS), f"rms_norm: weight must be on {x.device}, as x is, not on meta"),
        (ops.rms_norm, (torch.zeros(()), d, EPS), "rms_norm: x must have a last dimension"),
        (ops.add_rms_norm, (x, row, d, EPS), r"add_rms_norm: update must be \[2, 3, 8\], not \[2, 1, 8\]"),
        (ops.add_rms_norm, (x, x.half(), d, EPS), "add_rms_norm: update must be in torch.float32"),
        (ops.rms_norm_modulate, (x, d, row[:, 0], row, EPS), r"scale must be \[2, 3, 8\], or 1 before the last dimension"),
        (ops.rms_norm_modulate, (x, d, row, row[..., :1], EPS), r"shift must be \[2, 3, 8\]"),
        (ops.rms_norm_modulate, (x, d.half(), row, row, EPS), "scale must be in torch.float16"),
        (ops.layer_norm_modulate, (x, d, d[:4], x, x, EPS), r"layer_norm_modulate: bias must be \[8\], not \[4\]"),
        (ops.gated_layer_norm_modulate, (x, x, x[0], d, d, x, x, EPS), "gated_layer_norm_modulate: gate must be"),
        (ops.rms_norm_quantized, (x, d, EPS, torch.int16), "dtype must be torch.int8 or torch.float8_e4m3fn"),
    ):
        with pytest.raises(ValueError, match=message):
            by_kernel(operation, *arguments)


def test_what_a_launcher_refuses_is_a_backend_error(host_library):
    none, shape = library.View(), library.Shape(0, 1, 1)
    with pytest.raises(BackendError, match="layer_norm_modulate could not be launched: a shape that the launcher can't take"):
        views = [none, none, none, None, None, none, none, none, none]
        host_library.launch("layer_norm_modulate", torch.zeros(1), *views, shape, EPS, 0)
    with pytest.raises(BackendError, match="a dtype that the launcher doesn't know"):
        host_library.launch("rms_norm_quantized", torch.zeros(1), none, None, none, None, library.Shape(1, 1, 1), EPS, 0, 0)
