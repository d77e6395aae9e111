"""Pictures of every kind become the same upright RGB, whether they come as a file or from PIL."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hart_infer import InputError
from hart_infer.images.files import read_metadata
from hart_infer.images.reading import read_image, to_rgb
from hart_infer.images.tensors import to_tensor

SIZE = 16
RAMP = np.linspace(0, 1, SIZE * SIZE).reshape(SIZE, SIZE)
LEVELS = (RAMP * 255).round().astype(np.uint8)


def saved(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


GREYS = {
    "8-bit png": lambda p: saved(Image.fromarray(LEVELS), p / "a.png"),
    "16-bit png": lambda p: saved(Image.fromarray((RAMP * 65535).round().astype(np.uint16)), p / "a.png"),
    "16-bit tiff": lambda p: saved(Image.fromarray((RAMP * 65535).round().astype(np.uint16)), p / "a.tiff"),
    "32-bit tiff": lambda p: saved(Image.fromarray((RAMP * 65535).round().astype(np.int32)), p / "a.tiff"),
    "float tiff": lambda p: saved(Image.fromarray(RAMP.astype(np.float32)), p / "a.tiff"),
}


@pytest.mark.parametrize("kind", GREYS)
def test_greys_of_every_depth_are_one_picture(kind: str, tmp_path: Path) -> None:
    path = GREYS[kind](tmp_path)
    image = read_image(path)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.repeat(LEVELS[..., None], 3, axis=2))
    with Image.open(path) as file:
        pixels = to_tensor(file, SIZE)
    assert np.array_equal((pixels[0, 0].numpy() * 255).round(), LEVELS)


@pytest.mark.parametrize(
    "values", [np.full((4, 4), 1.5), np.full((4, 4), -0.1), np.full((4, 4), np.nan), np.full((4, 4), 255.0)]
)
def test_floats_outside_0_to_1_are_refused(values: np.ndarray, tmp_path: Path) -> None:
    path = saved(Image.fromarray(values.astype(np.float32)), tmp_path / "a.tiff")
    with pytest.raises(InputError, match=r"a.tiff: its values are floats from .* to .*; expected 0 to 1\."):
        read_image(path)
    with pytest.raises(InputError, match="its values are floats"), Image.open(path) as file:
        to_tensor(file, 4)


def test_integers_over_16_bits_are_refused(tmp_path: Path) -> None:
    path = saved(Image.fromarray(np.full((4, 4), 70000, np.int32)), tmp_path / "a.tiff")
    with pytest.raises(InputError, match="integers from 70000 to 70000; expected 0 to 65535"):
        read_image(path)


def test_a_picture_is_upright_as_its_camera_said(tmp_path: Path) -> None:
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    path = saved(upright.rotate(90), tmp_path / "a.png", exif=exif)
    assert read_image(path).tobytes() == upright.tobytes()
    with Image.open(path) as file:
        assert np.array_equal((to_tensor(file, SIZE)[0].permute(1, 2, 0).numpy() * 255).round(), np.asarray(upright))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_is_white_and_shows_nothing_hidden(mode: str, tmp_path: Path) -> None:
    hidden = Image.new("RGBA", (SIZE, SIZE), (10, 200, 30, 0))
    if mode == "P":
        path = saved(hidden.convert("RGB").quantize(2), tmp_path / "a.png", transparency=0)
    elif mode == "RGB":
        path = saved(hidden.convert("RGB"), tmp_path / "a.png", transparency=(10, 200, 30))
    else:
        path = saved(hidden.convert(mode), tmp_path / "a.png")
    assert read_image(path).getcolors() == [(SIZE * SIZE, (255, 255, 255))]
    with Image.open(path) as file:
        assert (to_tensor(file, SIZE) == 1).all()


def test_half_transparent_is_half_way_to_white() -> None:
    assert to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 128))).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "CMYK", "YCbCr", "HSV", "LAB"])
def test_opaque_modes_are_converted_by_pillow(mode: str) -> None:
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8))
    given = colours if mode == "LAB" else colours.convert(mode)
    assert to_rgb(given).tobytes() == given.convert("RGB").tobytes()


@pytest.mark.parametrize("read", [read_image, read_metadata])
def test_broken_exif_is_told_in_a_sentence(read: Callable[[Path], object], tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", exif=b"MM\0*")
    with pytest.raises(InputError, match="cannot be read as a picture"):
        read(tmp_path / "a.png")


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(Image.new("L", (100, 100)), tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="a.png cannot be read as a picture"):
        read_image(path)


def test_integers_in_memory_are_of_8_bits_as_pillow_has_it() -> None:
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(LEVELS).convert("I")))[..., 0], LEVELS)
    with pytest.raises(InputError, match="integers from 0 to 256; expected 0 to 255"):
        to_rgb(Image.fromarray(np.array([[0, 256]], dtype=np.int32)))


def test_the_transparent_value_of_a_16_bit_grey_is_white(tmp_path: Path) -> None:
    values = np.array([[0, 1000], [30000, 65535]], dtype=np.uint16)
    try:
        Image.fromarray(values).save(tmp_path / "a.png", transparency=1000)
    except OSError:
        pytest.skip("this version of Pillow writes no such file")
    assert np.asarray(read_image(tmp_path / "a.png"))[..., 0].tolist() == [[0, 255], [117, 255]]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes in the file system")
@pytest.mark.parametrize("read", [read_image, read_metadata])
def test_a_pipe_is_not_waited_for(read: object, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(InputError, match="is not a file"):
        read(tmp_path / "a.png")
