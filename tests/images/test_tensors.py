"""Pictures in, pictures out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from hart_infer import InputError
from hart_infer.images import tensors
from hart_infer.pipelines.checks import OUTPUT_TYPES

SIZE = 16


def noise(width: int = SIZE, height: int = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_every_decoded_output_type_has_a_form() -> None:
    assert {*tensors.FORMS, "latent"} == set(OUTPUT_TYPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numpy_form_is_fp32_with_the_colours_last(dtype: torch.dtype) -> None:
    pixels = torch.rand(2, 3, 4, 5).to(dtype)
    array = tensors.to_numpy(pixels)
    assert (array.shape, array.dtype) == ((2, 4, 5, 3), np.float32)
    assert array[1, 2, 3, 0] == pixels[1, 0, 2, 3].float().item()


def test_pil_form_rounds_to_the_nearest_level_and_clips() -> None:
    levels = torch.arange(256) / 255
    around = torch.cat([levels - 0.49 / 255, levels, levels + 0.49 / 255, torch.tensor([-3.0, 7.0])])
    (picture,) = tensors.to_pil(around.expand(1, 3, 1, -1))
    assert (picture.mode, picture.size) == ("RGB", (len(around), 1))
    expected = [*range(256)] * 3 + [0, 255]
    assert np.asarray(picture)[0, :, 1].tolist() == expected


def test_truncated_bytes_are_the_level_below() -> None:
    """As the released VILA-U writes them: 127.5 (x + 1) of x in -1..1, clamped, and cut off."""
    x = torch.linspace(-1.1, 1.1, 5001)
    pixels = ((x + 1) / 2).expand(1, 3, 1, -1)
    expected = (127.5 * (x + 1)).clamp(0, 255).to(torch.uint8)
    assert torch.equal(tensors.to_uint8(pixels, truncated=True)[0, 0, :, 0], expected)
    assert (tensors.to_uint8(pixels)[0, 0, :, 0] != expected).float().mean() > 0.4
    (picture,) = tensors.to_pil(pixels, truncated=True)
    assert np.asarray(picture)[0, :, 1].tolist() == expected.tolist()


def test_a_fitting_picture_passes_unchanged() -> None:
    pixels = tensors.to_tensor(noise(), SIZE)
    assert (pixels.shape, pixels.dtype) == ((1, 3, SIZE, SIZE), torch.float32)
    assert tensors.to_pil(pixels)[0].tobytes() == noise().tobytes()


@pytest.mark.parametrize("many", [list, tuple])
def test_several_pictures_are_a_batch(many: type[list[Image.Image]] | type[tuple[Image.Image, ...]]) -> None:
    pixels = tensors.to_tensor(many([noise(), noise().rotate(90)]), SIZE)
    assert pixels.shape == (2, 3, SIZE, SIZE)
    assert torch.equal(pixels[1], pixels[0].rot90(1, (1, 2)))


@pytest.mark.parametrize("tall", [False, True])
def test_a_picture_that_is_not_square_is_cropped_to_its_middle(tall: bool) -> None:
    array = np.zeros((SIZE, 3 * SIZE, 3), dtype=np.uint8)
    array[:, SIZE : 2 * SIZE, 2] = 255
    picture = Image.fromarray(array.swapaxes(0, 1) if tall else array)
    (pixels,) = tensors.to_tensor(picture, SIZE)
    assert torch.equal(pixels, torch.tensor([0.0, 0.0, 1.0])[:, None, None].expand(-1, SIZE, SIZE))


@pytest.mark.parametrize("side", [5, 40])
def test_pictures_of_other_sizes_are_scaled(side: int) -> None:
    flat = Image.new("RGB", (side, side), (10, 200, 30))
    assert tensors.to_pil(tensors.to_tensor(flat, SIZE))[0].getcolors() == [(SIZE * SIZE, (10, 200, 30))]


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "CMYK", "LA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    given = noise().convert(mode)
    assert tensors.to_pil(tensors.to_tensor(given, SIZE))[0].tobytes() == given.convert("RGB").tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_come_as_they_are_in_fp32(dtype: torch.dtype) -> None:
    given = torch.rand(2, 3, SIZE, SIZE).to(dtype)
    assert torch.equal(tensors.to_tensor(given, SIZE), given.float())


OK = torch.zeros(1, 3, SIZE, SIZE)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(3, SIZE, SIZE), r"must have shape \[N, 3, 16, 16\], not \[3, 16, 16\]"),
        (torch.zeros(1, 4, SIZE, SIZE), r"not \[1, 4, 16, 16\]"),
        (torch.zeros(1, 3, SIZE, SIZE + 1), r"not \[1, 3, 16, 17\]"),
        (torch.zeros(0, 3, SIZE, SIZE), r"not \[0, 3, 16, 16\]"),
        (OK.byte(), "floating-point with values in 0..1"),
        (OK - 0.01, "values in 0..1"),
        (OK + 1.01, "values in 0..1"),
        (OK + torch.nan, "values in 0..1"),
        ([], "list of images is empty"),
        ("a.png", "must be a PIL image or a tensor, not str"),
        (np.zeros((SIZE, SIZE, 3)), "not ndarray"),
        ([noise(), None], "not NoneType"),
        (None, "not NoneType"),
    ],
)
def test_what_is_no_picture_is_refused(given: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tensors.to_tensor(given, SIZE)  # type: ignore[arg-type]
