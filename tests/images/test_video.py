"""Frames in and out: which are chosen, from what, and in which formats they are written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hart_infer.errors import InputError, OutputError
from hart_infer.images import video
from hart_infer.images.files import NameTakenError, read_metadata
from hart_infer.images.video import check_video_path, frame_indices, is_video, read_video, save_video


def frames(count: int, size: tuple[int, int] = (32, 16)) -> list[Image.Image]:
    """Grey frames, 10 levels apart."""
    return [Image.new("RGB", size, (10 * i,) * 3) for i in range(count)]


def shades(images: list[Image.Image]) -> list[int]:
    """Which frames these are."""
    return [round(float(np.asarray(image.convert("L")).mean()) / 10) for image in images]


@pytest.mark.parametrize(
    ("total", "indices"),
    [
        (8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (13, [0, 2, 3, 5, 7, 9, 10, 12]),
        (3, [0, 0, 1, 1, 1, 1, 2, 2]),
        (1, [0] * 8),
        (100, [0, 14, 28, 42, 57, 71, 85, 99]),
        (2, [0, 0, 0, 0, 1, 1, 1, 1]),
    ],
)
def test_frames_are_chosen_evenly(total: int, indices: list[int]) -> None:
    assert frame_indices(total, 8) == indices
    assert shades(read_video(frames(min(total, 25)), 8)) == frame_indices(min(total, 25), 8)


def test_halves_are_rounded_to_even() -> None:
    assert frame_indices(6, 3) == [0, 2, 5]  # 2.5
    assert frame_indices(8, 3) == [0, 4, 7]  # 3.5


def test_no_frames() -> None:
    for empty in ([], ()):
        with pytest.raises(InputError, match="no frames; give at least one"):
            read_video(empty, 8)


def test_a_frame_that_is_no_picture() -> None:
    with pytest.raises(InputError, match="must be a PIL image, not str"):
        read_video(["a.png"], 8)  # type: ignore[list-item]


def test_frames_become_rgb() -> None:
    palette = Image.new("RGB", (4, 4), "red").convert("P")
    assert {image.getpixel((0, 0)) for image in read_video([palette], 2)} == {(255, 0, 0)}


def test_a_folder_is_sorted_by_name(tmp_path: Path) -> None:
    for i, image in enumerate(frames(13)):
        image.save(tmp_path / f"{i:03}.{'png' if i % 2 else 'PNG'}")
    (tmp_path / "000.txt").write_text("notes")
    (tmp_path / "more.png").mkdir()
    assert is_video(tmp_path)
    assert shades(read_video(tmp_path, 8)) == frame_indices(13, 8)


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("notes")
    with pytest.raises(InputError, match=r"holds no frames: no .*\.png"):
        read_video(tmp_path, 8)


def test_a_broken_picture_in_a_folder_is_named(tmp_path: Path) -> None:
    frames(1)[0].save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"1\.png cannot be read"):
        read_video(tmp_path, 8)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".GIF"])
def test_animations_go_there_and_back(tmp_path: Path, suffix: str) -> None:
    path = save_video(frames(13), tmp_path / f"v{suffix}", fps=10)
    with Image.open(path) as file:
        assert (file.n_frames, file.info["loop"], file.size) == (13, 0, (32, 16))  # type: ignore[attr-defined]
        file.seek(1)
        file.load()
        assert file.info["duration"] == 100
    assert is_video(path)
    assert shades(read_video(path, 8)) == frame_indices(13, 8)
    assert {image.mode for image in read_video(path, 2)} == {"RGB"}


def test_a_strip_has_the_frames_side_by_side(tmp_path: Path) -> None:
    path = save_video(frames(8), tmp_path / "v.png", metadata={"seed": 1})
    with Image.open(path) as file:
        assert file.size == (8 * 32, 16)
        assert [file.getpixel((32 * i + 31, 15)) for i in range(8)] == [(10 * i,) * 3 for i in range(8)]
    assert read_metadata(path) == {"seed": 1}
    assert not is_video(path)


def test_webp_keeps_metadata(tmp_path: Path) -> None:
    assert read_metadata(save_video(frames(3), tmp_path / "v.webp", metadata={"prompt": "é"})) == {"prompt": "é"}


def test_a_still_picture_is_a_video_of_one_frame(tmp_path: Path) -> None:
    frames(3)[2].save(tmp_path / "a.png")
    assert shades(read_video(tmp_path / "a.png", 3)) == [2, 2, 2]


@pytest.mark.parametrize("name", ["v.avi", "v", "v.jpg"])
def test_an_unknown_extension(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"videos are written as \.webp, \.gif, \.png, \.mp4"):
        save_video(frames(2), tmp_path / name)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), 1e9])
def test_an_impossible_rate(tmp_path: Path, fps: float) -> None:
    with pytest.raises(InputError, match="fps must be above 0"):
        save_video(frames(2), tmp_path / "v.gif", fps=fps)


def test_frames_of_no_or_different_sizes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one frame"):
        save_video([], tmp_path / "v.gif")
    with pytest.raises(InputError, match="of one size"):
        save_video([*frames(1), *frames(1, (8, 8))], tmp_path / "v.gif")


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_nothing_is_replaced_unless_wanted(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"v{suffix}"
    path.write_bytes(b"old")
    with pytest.raises(NameTakenError):
        save_video(frames(2), path, overwrite=False)
    assert path.read_bytes() == b"old"
    save_video(frames(2), path)
    assert path.read_bytes() != b"old"


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        save_video(frames(2), tmp_path / "a/v.gif")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither PyAV nor imageio."""
    monkeypatch.setattr(video, "_has", lambda module: False)


def test_mp4_without_a_library(bare: None, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"needs PyAV or imageio: pip install 'hart-infer\[video\]'. Or write .webp"):
        check_video_path(tmp_path / "v.mp4")


def test_a_video_file_without_a_library(bare: None, tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(b"\0\0\0 ftypisom" + bytes(100))
    assert is_video(tmp_path / "v.mp4")
    with pytest.raises(InputError, match=r"neither PyAV nor imageio is installed .*: pip install 'hart-infer\[video\]'"):
        read_video(tmp_path / "v.mp4", 8)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for use in (is_video, lambda path: read_video(path, 8)):
        with pytest.raises(InputError, match=r"v\.mp4 cannot be read: no such file"):
            use(tmp_path / "v.mp4")


class Reader:
    """Stands for a library that decodes some frames and then meets a broken one."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, path: Any) -> Iterator[Image.Image]:
        def decoded() -> Iterator[Image.Image]:
            yield from frames(self.count)
            raise ValueError("broken")

        return video._until_broken(decoded())


def test_frames_count_up_to_the_last_that_can_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(b"\0" * 100)
    monkeypatch.setattr(video, "_has", lambda module: module == "av")
    monkeypatch.setattr(video, "_by_av", Reader(13))
    assert shades(read_video(tmp_path / "v.mp4", 8)) == frame_indices(13, 8)


def test_a_video_that_no_reader_opens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(b"\0" * 100)
    monkeypatch.setattr(video, "_has", lambda module: True)
    monkeypatch.setattr(video, "_by_av", Reader(0))
    monkeypatch.setattr(video, "_by_imageio", Reader(0))
    with pytest.raises(InputError, match=r"cannot be read as a video by PyAV or imageio"):
        read_video(tmp_path / "v.mp4", 8)
    monkeypatch.setattr(video, "_by_imageio", Reader(1))
    assert shades(read_video(tmp_path / "v.mp4", 2)) == [0, 0]


@pytest.mark.parametrize("writer", ["av", "imageio"])
@pytest.mark.parametrize("reader", ["av", "imageio"])
def test_mp4_goes_there_and_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, writer: str, reader: str) -> None:
    for module in {writer, reader}:
        pytest.importorskip(module)
    if "imageio" in (writer, reader):
        pytest.importorskip("imageio_ffmpeg")
    monkeypatch.setattr(video, "_has", lambda module: module == writer)
    path = save_video(frames(13, (64, 32)), tmp_path / "v.mp4", fps=8)
    monkeypatch.setattr(video, "_has", lambda module: module == reader)
    found = read_video(path, 8)
    assert shades(found) == frame_indices(13, 8)
    assert {image.size for image in found} == {(64, 32)}
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match="cannot be read as a video"):
        read_video(path, 8)
