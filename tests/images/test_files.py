"""Pictures on disk: whole or not at all, with what made them inside."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from hart_infer.errors import InputError, OutputError
from hart_infer.images import files as pictures
from hart_infer.images.files import (
    NameTakenError,
    check_writable,
    grid_size,
    make_grid,
    picture_format,
    read_metadata,
    save_picture,
)

METADATA = {"prompt": 'a "cat" 😺 ネコ', "seed": 7, "guidance_scale": 4.5, "software": "hart-infer 9"}
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX permissions and links")


@pytest.fixture
def image() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (48, 32, 3), dtype=np.uint8)
    return Image.fromarray(values)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG", "a.webp"])
def test_every_format_round_trips_with_its_metadata(tmp_path: Path, image: Image.Image, name: str) -> None:
    path = save_picture(image, tmp_path / name, metadata=METADATA)
    assert path == tmp_path / name
    with Image.open(path) as read:
        assert read.size == image.size
        assert read.mode == "RGB"
        if name.endswith("png"):
            assert np.array_equal(np.asarray(read), np.asarray(image))
            assert read.text["Software"] == "hart-infer 9"
    assert read_metadata(path) == METADATA
    assert files(tmp_path) == [name]


def test_a_description_in_json_by_another_program_is_not_ours(tmp_path: Path, image: Image.Image) -> None:
    exif = Image.Exif()
    exif[pictures.EXIF_DESCRIPTION] = '{"seed": 7}'
    exif[pictures.EXIF_SOFTWARE] = "a camera"
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_metadata(tmp_path / "a.jpg") is None


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_no_metadata_means_none_at_all(tmp_path: Path, image: Image.Image, name: str) -> None:
    save_picture(image, tmp_path / name)
    assert read_metadata(tmp_path / name) is None
    assert b"hart" not in (tmp_path / name).read_bytes()


def test_metadata_of_others_is_not_ours(tmp_path: Path, image: Image.Image) -> None:
    exif = Image.Exif()
    exif[pictures.EXIF_DESCRIPTION] = "OLYMPUS DIGITAL CAMERA"
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_metadata(tmp_path / "a.jpg") is None
    (tmp_path / "b.png").write_text("not a picture")
    with pytest.raises(InputError, match="cannot be read as a picture"):
        read_metadata(tmp_path / "b.png")
    with pytest.raises(InputError, match="c.png does not exist"):
        read_metadata(tmp_path / "c.png")


@pytest.mark.parametrize("name", ["a.gif", "a", "a.png.txt", ".png"])
def test_unknown_extensions_are_refused_by_name(tmp_path: Path, image: Image.Image, name: str) -> None:
    for attempt in (
        lambda: picture_format(name),
        lambda: check_writable([tmp_path / name]),
        lambda: save_picture(image, tmp_path / name),
    ):
        with pytest.raises(InputError, match=r"\.png, \.jpg, \.jpeg, \.webp"):
            attempt()
    assert files(tmp_path) == []


def test_missing_folders_are_made_but_not_by_the_check(tmp_path: Path, image: Image.Image) -> None:
    path = tmp_path / "a" / "b" / "c.png"
    check_writable([path])
    assert files(tmp_path) == []
    save_picture(image, path)
    assert path.is_file()


def test_a_file_is_replaced_in_one_step(tmp_path: Path, image: Image.Image) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    check_writable([path])
    assert path.read_bytes() == b"old"
    save_picture(image, path)
    assert Image.open(path).size == image.size
    assert files(tmp_path) == ["a.png"]


def test_without_overwrite_a_taken_name_is_left_alone(
    tmp_path: Path, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    save_picture(image, path, overwrite=False)
    path.write_bytes(b"old")
    for no_links in (False, True):
        if no_links:
            monkeypatch.setattr(os, "link", _raise(OSError(errno.EPERM, "no links here")))
        with pytest.raises(NameTakenError, match="exists already"):
            save_picture(image, path, overwrite=False)
        assert path.read_bytes() == b"old"
        assert files(tmp_path) == ["a.png"]
    save_picture(image, tmp_path / "b.png", overwrite=False)
    assert files(tmp_path) == ["a.png", "b.png"]


@posix
def test_new_files_have_the_usual_permissions(tmp_path: Path, image: Image.Image) -> None:
    (tmp_path / "usual").touch()
    save_picture(image, tmp_path / "a.png")
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


@posix
def test_a_symbolic_link_stays_one(tmp_path: Path, image: Image.Image) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.png"
    link.symlink_to(tmp_path / "real" / "a.png")
    check_writable([link])
    save_picture(image, link)
    assert link.is_symlink()
    assert files(tmp_path) == ["link.png", "real", "real/a.png"]


def test_a_folder_or_a_file_in_the_way(tmp_path: Path, image: Image.Image) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("x")
    for path, reason in (
        (tmp_path / "folder.png", "it is a folder"),
        (tmp_path / "file" / "a.png", "is a file, not a folder"),
        (tmp_path / ("n" * 300 + ".png"), "the name is too long"),
        (tmp_path / "new" / ("n" * 300 + ".png"), "the name is too long"),
    ):
        for attempt in (lambda p=path: check_writable([p]), lambda p=path: save_picture(image, p)):
            with pytest.raises(OutputError, match=reason) as caught:
                attempt()
            assert isinstance(caught.value, OSError)
            assert caught.value.errno
    assert files(tmp_path) == ["file", "folder.png"]


@posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write anywhere")
def test_permission_denied(tmp_path: Path, image: Image.Image) -> None:
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0o500)
    (tmp_path / "read-only.png").write_bytes(b"old")
    (tmp_path / "read-only.png").chmod(0o400)
    for path in (
        tmp_path / "locked" / "a.png",
        tmp_path / "locked" / "new" / "a.png",
        tmp_path / "read-only.png",
    ):
        with pytest.raises(OutputError, match="permission denied"):
            check_writable([path])
    with pytest.raises(OutputError, match="permission denied"):
        save_picture(image, tmp_path / "locked" / "a.png")


@pytest.mark.parametrize(
    ("code", "reason"),
    [(errno.EACCES, "permission denied"), (errno.EROFS, "read-only"), (errno.ENOSPC, "the disk is full")],
)
def test_what_the_system_refuses_is_said_before_and_after(
    tmp_path: Path, image: Image.Image, monkeypatch: pytest.MonkeyPatch, code: int, reason: str
) -> None:
    path = tmp_path / "new" / "a.png"
    monkeypatch.setattr("builtins.open", _raise(OSError(code, os.strerror(code))))
    for attempt in (lambda: check_writable([path]), lambda: save_picture(image, path)):
        with pytest.raises(OutputError, match=f"a.png cannot be written: .*{reason}") as caught:
            attempt()
        assert caught.value.errno == code
    monkeypatch.undo()
    assert files(tmp_path) == []


@pytest.mark.parametrize("where", ["write", "fsync"])
def test_a_disk_that_fills_up_leaves_nothing_and_spares_the_old_file(
    tmp_path: Path, image: Image.Image, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill_up(self: Image.Image, file: object, **_: object) -> None:
        file.write(b"half a pict")  # type: ignore[attr-defined]
        raise full

    if where == "write":
        monkeypatch.setattr(Image.Image, "save", fill_up)
    else:
        monkeypatch.setattr(os, "fsync", _raise(full))
    (tmp_path / "old.png").write_bytes(b"old")
    for path in (tmp_path / "new" / "deep" / "a.png", tmp_path / "old.png"):
        with pytest.raises(OutputError, match=r"\.png cannot be written: the disk is full\."):
            save_picture(image, path, metadata=METADATA)
    assert files(tmp_path) == ["old.png"]
    assert (tmp_path / "old.png").read_bytes() == b"old"


@posix
def test_a_real_write_error_leaves_nothing(tmp_path: Path) -> None:
    script = """
        import resource, sys
        from PIL import Image
        from hart_infer.errors import OutputError
        from hart_infer.images.files import save_picture
        image = Image.effect_noise((256, 256), 50)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            save_picture(image, sys.argv[1])
        except OutputError as error:
            sys.exit(str(error))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "a.png")],
        capture_output=True,
        text=True,
    )
    assert "cannot be written: file too large." in result.stderr
    assert files(tmp_path) == []


def test_ctrl_c_while_writing_leaves_nothing(tmp_path: Path, image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", _raise(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        save_picture(image, tmp_path / "new" / "a.png")
    assert files(tmp_path) == []


@pytest.mark.parametrize(("name", "side"), [("a.webp", 16384), ("a.jpg", 65501)])
def test_too_large_for_the_format(tmp_path: Path, name: str, side: int) -> None:
    with pytest.raises(OutputError, match=f"{side} x 1 pixels are too many"):
        save_picture(Image.new("RGB", (side, 1)), tmp_path / name)
    save_picture(Image.new("RGB", (side, 1)), tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
def test_metadata_too_long_for_exif(tmp_path: Path, image: Image.Image, name: str) -> None:
    with pytest.raises(OutputError, match="metadata is too long"):
        save_picture(image, tmp_path / name, metadata={"prompt": "x" * 70_000})
    save_picture(image, tmp_path / name, metadata={"prompt": "x" * 64_000})
    assert save_picture(image, tmp_path / "a.png", metadata={"prompt": "x" * 2_000_000}).exists()


def test_grids() -> None:
    images = [Image.new("RGB", (10, 20), color) for color in ("red", "green", "blue", "black", "yellow")]
    grid = make_grid(images)
    assert grid.size == grid_size(5, 3, (10, 20)) == (3 * 10 + 2 * 4, 2 * 20 + 4)
    assert grid.getpixel((0, 0)) == (255, 0, 0)
    assert grid.getpixel((14, 24)) == (255, 255, 0)
    assert grid.getpixel((28, 24)) == (255, 255, 255)  # the empty cell
    assert make_grid(images, 1, gap=0).size == (10, 100)
    assert make_grid(images, 9, gap=0).size == (50, 20)
    assert make_grid(images[:1]).size == (10, 20)
    mixed = make_grid([images[0], Image.new("RGB", (30, 5), "red")], gap=0)
    assert mixed.size == (60, 20)
    for wrong in ([], images):
        with pytest.raises(InputError, match="at least one"):
            make_grid(wrong, 0)


def _raise(error: BaseException):
    def raiser(*_: object, **__: object) -> None:
        raise error

    return raiser


def test_metadata_is_read_without_decoding_a_pixel(tmp_path: Path, image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bomb explodes only where it is decoded; a far larger one is refused by its header."""
    save_picture(image, tmp_path / "a.png", metadata={"prompt": "a"})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", image.width * image.height * 2 // 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_metadata(tmp_path / "a.png") == {"prompt": "a"}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    with pytest.raises(InputError, match="cannot be read as a picture"):
        read_metadata(tmp_path / "a.png")


def test_metadata_nested_too_deeply_is_none(tmp_path: Path, image: Image.Image) -> None:
    chunks = PngInfo()
    chunks.add_text("hart_infer", "[" * 100_000)
    image.save(tmp_path / "a.png", pnginfo=chunks)
    assert read_metadata(tmp_path / "a.png") is None
