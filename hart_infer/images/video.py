"""Read the frames of a video that a model looks at, and write the frames that it drew.

Animated pictures (GIF, WebP, PNG) are read and written by Pillow; other files need PyAV or imageio, the extra `[video]`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, OutputError, is_out_of_memory
from .files import NameTakenError, make_grid, save_options, save_picture, whole_file, write_failure
from .reading import check_regular, read_image, to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

FPS = 8  # of written videos; the released model's frames have no rate
FORMATS = (".webp", ".gif", ".png", ".mp4")
PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}  # what counts in a folder of frames
ANIMATED = {"AVIF", "GIF", "PNG", "WEBP"}  # Pillow's formats whose several pictures are frames
MAX_FPS = 1000
HOW = "pip install 'hart-infer[video]'"
Frames = Iterator["Image"]


def read_video(source: str | Path | Sequence[Image], count: int) -> list[Image]:
    """Return `count` frames, evenly chosen, as 8-bit RGB.

    `source`: the frames, a folder of pictures (sorted by name), or a video file, whose frames count up to the last that can be
    read. Raises InputError if there is none, and OutOfMemoryError.
    """
    if not isinstance(source, str | Path):
        return [_rgb(source[i]) for i in frame_indices(len(source), count)]
    if Path(source).is_dir():
        files = frame_files(source)
        return [read_image(files[i]) for i in frame_indices(len(files), count)]
    frames = _reader(source)
    total = sum(1 for _ in frames(source))
    if not total:
        raise InputError(f"{source} cannot be read as a video: none of its frames can be decoded.")
    wanted = frame_indices(total, count)
    chosen = set(wanted)
    found = {i: frame for i, frame in enumerate(frames(source)) if i in chosen}
    return [to_rgb(found[i]) for i in wanted]


def is_video(path: str | Path) -> bool:
    """Return whether a path is a folder, an animated picture, or a file that Pillow can't open. Raises InputError.

    The pages of a TIFF and the second picture of a phone's JPEG (MPO) are not frames.
    """
    if Path(path).is_dir():
        return True
    still = _open_picture(path)
    if still is None:
        return True
    with still:
        return still.format in ANIMATED and getattr(still, "n_frames", 1) > 1


def check_video(path: str | Path) -> None:
    """Raise InputError unless a folder has frames, or a file has a first one that can be read; quick in any video."""
    if Path(path).is_dir():
        frame_files(path)
    else:
        _reader(path)


def frame_indices(total: int, count: int) -> list[int]:
    """Return which `count` of `total` frames are taken: evenly from the first to the last, some twice in a short video.

    Rounded to the nearest, halves to even, as numpy does. Raises InputError for a video without frames.
    """
    import numpy as np

    if total < 1:
        raise InputError("The video has no frames; give at least one.")
    return [int(i) for i in np.round(np.linspace(0, total - 1, count))]


def frame_files(folder: str | Path) -> list[Path]:
    """Return the pictures of a folder, sorted by name. Raises InputError if it has none."""
    files = sorted(file for file in Path(folder).iterdir() if file.suffix.lower() in PICTURES and file.is_file())
    if not files:
        raise InputError(f"{folder} holds no frames: no {', '.join(sorted(PICTURES))} is in it.")
    return files


def save_video(
    frames: Sequence[Image],
    path: str | Path,
    *,
    fps: float = FPS,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = True,
) -> Path:
    """Write frames as the extension says: an animated .webp or .gif, an .mp4, or a .png with all frames side by side.

    WebP and PNG keep the metadata. Raises InputError for an unknown extension, OutputError if it can't be written; as
    `save_picture`, leaves no partial file.
    """
    suffix = check_video_path(path)
    if not frames:
        raise InputError("A video needs at least one frame.")
    if not 0 < fps <= MAX_FPS:
        raise InputError(f"fps must be above 0 and at most {MAX_FPS}, not {fps}.")
    if len({frame.size for frame in frames}) > 1:
        raise InputError("The frames of a video must be of one size.")
    images = [_rgb(frame) for frame in frames]
    if suffix == ".png":
        return save_picture(make_grid(images, len(images), gap=0), path, metadata=metadata, overwrite=overwrite)
    content = _mp4(images, path, fps) if suffix == ".mp4" else _animation(images, path, fps, metadata)
    try:
        with whole_file(path, overwrite=overwrite) as file:
            file.write(content)
    except NameTakenError:
        raise
    except OSError as error:
        raise write_failure(path, error) from error
    return Path(path)


def check_video_path(path: str | Path) -> str:
    """Return the extension in lower case.

    Raises InputError that lists the known ones, and OutputError for .mp4 if nothing that is installed writes it.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        found = f"the extension {suffix}" if suffix else "no extension"
        raise InputError(f"{path} has {found}; videos are written as {', '.join(FORMATS)}.")
    if suffix == ".mp4" and not (_has("av") or _has("imageio")):
        raise OutputError(f"{path} needs PyAV or imageio: {HOW}. Or write {', '.join(FORMATS[:-1])}.")
    return suffix


def _rgb(frame: Image) -> Image:
    from PIL import Image as Pillow

    if not isinstance(frame, Pillow.Image):
        raise InputError(f"A frame must be a PIL image, not {type(frame).__name__}.")
    return to_rgb(frame)


def _has(module: str) -> bool:
    return find_spec(module) is not None


def _open_picture(path: str | Path) -> Image | None:
    """Open a file by Pillow, without its pixels; None if it is of no format that Pillow knows. Raises InputError."""
    from PIL import Image as Pillow
    from PIL import UnidentifiedImageError

    try:
        check_regular(path)
        return Pillow.open(path)
    except UnidentifiedImageError:
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}.") from error
    except (ValueError, SyntaxError, Pillow.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as a picture: {error}.") from error


def _reader(path: str | Path) -> Callable[[str | Path], Frames]:
    """Choose what reads a file. Raises InputError if nothing that is installed does."""
    still = _open_picture(path)
    if still is not None:
        still.close()
        return _by_pillow
    installed = [(name, read) for name, read in (("PyAV", _by_av), ("imageio", _by_imageio)) if _has(_MODULES[name])]
    if not installed:
        raise InputError(f"{path} is a video, and neither PyAV nor imageio is installed to read it: {HOW}.")
    for _, read in installed:
        if next(read(path), None) is not None:
            return read
    raise InputError(f"{path} cannot be read as a video by {' or '.join(name for name, _ in installed)}.")


_MODULES = {"PyAV": "av", "imageio": "imageio"}


def _until_broken(frames: Frames) -> Frames:
    """Yield frames up to the last that can be read."""
    while True:
        try:
            frame = next(frames)
        except StopIteration:
            return
        except Exception as error:  # arbitrary bytes can raise anything
            if is_out_of_memory(error):
                raise
            return
        yield frame


def _by_pillow(path: str | Path) -> Frames:
    from PIL import Image as Pillow
    from PIL import ImageSequence

    with Pillow.open(path) as file:
        yield from _until_broken(frame.copy() for frame in ImageSequence.Iterator(file))


def _by_av(path: str | Path) -> Frames:
    def decoded() -> Frames:
        import av

        with av.open(os.fspath(path)) as container:
            for frame in container.decode(video=0):
                image: Image = frame.to_image()
                turned = getattr(frame, "rotation", 0)  # counterclockwise; older versions don't tell
                yield image.rotate(turned, expand=True) if turned else image

    yield from _until_broken(decoded())


def _by_imageio(path: str | Path) -> Frames:
    from PIL import Image as Pillow

    def decoded() -> Frames:
        import imageio.v3

        for frame in imageio.v3.imiter(os.fspath(path)):
            yield Pillow.fromarray(frame)

    yield from _until_broken(decoded())


def _animation(images: Sequence[Image], path: str | Path, fps: float, metadata: Mapping[str, Any] | None) -> bytes:
    """Return an animated GIF, or a WebP with metadata, that plays for ever."""
    is_webp = Path(path).suffix.lower() == ".webp"
    options = save_options(images[0], path, "WEBP", metadata) if is_webp else {}
    file = io.BytesIO()
    try:
        images[0].save(
            file,
            format="WEBP" if is_webp else "GIF",
            save_all=True,
            append_images=images[1:],
            duration=round(1000 / fps),
            loop=0,
            **options,
        )
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be written: {str(error).lower()}.") from error
    return file.getvalue()


def _mp4(images: Sequence[Image], path: str | Path, fps: float) -> bytes:
    """Return an MP4 in H.264. Raises OutputError if no encoder takes the frames."""
    problems = []
    for module, encode in (("av", _mp4_by_av), ("imageio", _mp4_by_imageio)):
        if _has(module):
            try:
                return encode(images, fps)
            except Exception as error:  # each library has its own, and an encoder may be missing from its build
                if is_out_of_memory(error):
                    raise
                problems.append(f"{module}: {error}")
    raise OutputError(f"{path} cannot be written as MP4 ({'; '.join(problems)}); write {', '.join(FORMATS[:-1])} instead.")


def _mp4_by_av(images: Sequence[Image], fps: float) -> bytes:
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = *images[0].size, "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return file.getvalue()


def _mp4_by_imageio(images: Sequence[Image], fps: float) -> bytes:
    import imageio.v3
    import numpy as np

    frames = np.stack([np.asarray(image) for image in images])
    content: bytes = imageio.v3.imwrite("<bytes>", frames, extension=".mp4", fps=fps, macro_block_size=2)
    return content
