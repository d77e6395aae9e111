"""The result of a call, and the Step that its callback gets."""

from __future__ import annotations

import base64
import inspect
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import InputError
from ..images import tensors
from ..images.video import FPS, save_video
from .checks import check_float, check_int

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN_IN_NOTEBOOKS = 16
Callback = Callable[["Step"], object]


@dataclass
class ImageOutput:
    """Result of a call: `images` in the requested form, prompt by prompt; `seeds`: the seed that reproduces each.

    `out[0]` and `out["images"]` are the images, as in diffusers. A notebook shows them.
    """

    images: Any  # list of PIL images, or [N, H, W, 3] numpy / [N, 3, H, W] torch in 0..1, or latents
    seeds: list[int]

    def __getitem__(self, key: int | str | slice) -> Any:
        """The images for 0 or "images", the seeds for 1 or "seeds"."""
        return getattr(self, key) if isinstance(key, str) else (self.images, self.seeds)[key]

    def _repr_html_(self) -> str | None:
        """Return HTML with the images and their seeds, for notebooks; None, for the repr, unless they are PIL images."""
        if not isinstance(self.images, list):
            return None
        files = [("png", _png(image)) for image in self.images[:SHOWN_IN_NOTEBOOKS]]
        return _html(files, self.seeds, len(self.images))


@dataclass
class VideoOutput:
    """Result of `video`: `frames` in the requested form; `seeds`: the seed that reproduces each. A notebook shows them."""

    frames: Any  # each video's PIL images, or [N, F, H, W, 3] numpy / [N, F, 3, H, W] torch in 0..1, or latents
    seeds: list[int]

    def __getitem__(self, index: int | str | slice) -> Any:
        """The frames for 0 or "frames", the seeds for 1 or "seeds"."""
        return getattr(self, index) if isinstance(index, str) else (self.frames, self.seeds)[index]

    def save(self, path: str | Path, index: int = 0, *, fps: float = FPS) -> Path:
        """Write video `index` as the extension says: animated .webp or .gif, .mp4, or a .png with all frames side by side.

        Raises InputError or OutputError, as `save_video` does, and InputError where the frames are no PIL images.
        """
        if not isinstance(self.frames, list):
            raise InputError('Only PIL images are saved: draw the video with output_type="pil".')
        chosen = self.frames[check_int(index, "index", 0, len(self.frames) - 1)]
        return save_video(chosen, path, fps=check_float(fps, "fps", 0))

    def _repr_html_(self) -> str | None:
        """Return HTML with the videos, side by side and moving, and their seeds, for notebooks; None unless of PIL images."""
        if not isinstance(self.frames, list):
            return None
        files = [("webp", _webp(frames)) for frames in self.frames[:SHOWN_IN_NOTEBOOKS]]
        return _html(files, self.seeds, len(self.frames))


VilaUOutput = ImageOutput
HartOutput = ImageOutput  # its name before other families


def _html(files: Sequence[tuple[str, bytes]], seeds: Sequence[int], count: int) -> str:
    """Return HTML with pictures, (format, content), their seeds, and how many of `count` are not shown."""
    figures = "".join(
        f'<figure style="display:inline-block;margin:4px">'
        f'<img src="data:image/{kind};base64,{base64.b64encode(content).decode("ascii")}">'
        f"<figcaption>seed {seed}</figcaption></figure>"
        for (kind, content), seed in zip(files, seeds, strict=False)
    )
    more = count - len(files)
    return f"<div>{figures}{f'<p>and {more} more</p>' if more > 0 else ''}</div>"


def _png(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _webp(frames: Sequence[Image]) -> bytes:
    buffer = io.BytesIO()
    options: Any = {"save_all": True, "append_images": frames[1:], "duration": round(1000 / FPS), "loop": 0}
    frames[0].save(buffer, format="WEBP", **options)
    return buffer.getvalue()


@dataclass
class Step:
    """One finished scale, or of VILA-U one row of positions, as a callback sees it."""

    index: int
    side: int  # of this scale's token grid; a row's length
    num_scales: int  # or rows, of all frames
    f_hat: Tensor  # fp32, the latent so far: [N, C, P, P]; of VILA-U [N, g, g, C], of the frame that is being drawn
    _decode: Callable[[Tensor], Tensor] = field(repr=False)
    stopped: bool = False

    def preview(self) -> list[Image]:
        """Decode the latent so far into full-size pictures, one per image."""
        return tensors.to_pil(self._decode(self.f_hat))

    def stop(self) -> None:
        """End the generation after this scale; the call returns what `preview` would show, and a video's frames before."""
        self.stopped = True


def check_callback(callback: Any, pipe: Any) -> Callback | None:
    """Adapt `callback` to callback(step); None stays None.

    It may have diffusers' form, callback(pipe, step_index, timestep, callback_kwargs): callback_kwargs then has "latents", the
    latent so far, and "step", the Step. Its return value is ignored; `pipe._interrupt = True` stops. Raises InputError.
    """
    if callback is None:
        return None
    if not callable(callback):
        raise InputError(f"callback_on_step_end must be a function, not {type(callback).__name__}.")
    if _takes(callback, 1):
        return callback
    if not _takes(callback, 4):
        raise InputError(
            "callback_on_step_end must take one argument, a Step, or diffusers' four (pipe, step_index, timestep, "
            "callback_kwargs)."
        )

    def adapted(step: Step) -> None:
        callback(pipe, step.index, step.index, {"latents": step.f_hat, "step": step})

    return adapted


def _takes(function: Callable[..., object], count: int) -> bool:
    """Whether `function` accepts `count` positional arguments; without a signature, only 1."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # it has no signature
        return count == 1
    return True
