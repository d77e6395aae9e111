"""Pictures for VILA-U's vision tower."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from hart_infer import InputError
from hart_infer.images.preprocess import ASPECT_RATIOS, AspectRatio, to_pixel_values

every_aspect_ratio = pytest.mark.parametrize("aspect_ratio", [*ASPECT_RATIOS])


def levels(pixels: torch.Tensor) -> torch.Tensor:
    return ((pixels + 1) * 127.5).round()


@every_aspect_ratio
def test_white_is_1_and_black_is_minus_1(aspect_ratio: AspectRatio) -> None:
    pixels = to_pixel_values([Image.new("RGB", (8, 8), colour) for colour in ("white", "black")], 4, aspect_ratio)
    assert (pixels.shape, pixels.dtype) == ((2, 3, 4, 4), torch.float32)
    assert (pixels[0] == 1).all() and (pixels[1] == -1).all()


def test_values_are_the_released_processor_s() -> None:
    """x / 255, minus .5, over .5, each in fp32, for every level."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = to_pixel_values(Image.fromarray(np.stack([ramp] * 3, axis=-1)), 16)
    released = (ramp.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    assert np.array_equal(pixels[0, 0].numpy(), released)


@pytest.mark.parametrize(("size", "box"), [((8, 3), (0, 2, 8, 5)), ((3, 8), (2, 0, 5, 8))])
def test_pad_adds_grey_and_puts_the_odd_row_behind(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    pixels = levels(to_pixel_values(Image.new("RGB", size, "white"), 8, "pad"))[0]
    expected = torch.full((3, 8, 8), 127.0)
    expected[:, box[1] : box[3], box[0] : box[2]] = 255
    assert torch.equal(pixels, expected)


def test_resize_ignores_the_aspect_ratio() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 17, 3), dtype=np.uint8))
    expected = np.asarray(picture.resize((6, 6), Image.Resampling.BICUBIC))
    assert np.array_equal(levels(to_pixel_values(picture, 6))[0].permute(1, 2, 0).numpy(), expected)


@every_aspect_ratio
def test_a_palette_becomes_rgb_before_it_is_resized(aspect_ratio: AspectRatio) -> None:
    """Resized as a palette, the indices of colours would be mixed, as the released code mixes them."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)).quantize(32)
    assert picture.mode == "P"
    given, converted = (to_pixel_values(each, 6, aspect_ratio) for each in (picture, picture.convert("RGB")))
    assert torch.equal(given, converted)


def test_a_tensor_passes_in_0_to_1() -> None:
    assert torch.equal(to_pixel_values(torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1), 1).flatten(), torch.tensor([-1.0, 0, 1]))
    with pytest.raises(InputError, match="values in 0..1"):
        to_pixel_values(torch.full((1, 3, 1, 1), -1.0), 1)
    with pytest.raises(InputError, match="empty"):
        to_pixel_values([], 1)
