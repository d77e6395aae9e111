"""What a call returns, and what its callback sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..images import tensors

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class HartOutput:
    """Result of a call: `images` in the asked form, prompt by prompt, and each image's `seeds` entry, which redraws it."""

    images: Any  # list of PIL images, or [N, H, W, 3] numpy / [N, 3, H, W] torch in 0..1, or latents [N, C, P, P]
    seeds: list[int]


@dataclass
class Step:
    """One finished scale, as a callback sees it."""

    index: int
    side: int  # of this scale's token grid
    num_scales: int
    f_hat: Tensor  # [N, C, P, P] fp32: the latent so far
    _decode: Callable[[Tensor], Tensor] = field(repr=False)
    stopped: bool = False

    def preview(self) -> list[Image]:
        """Decode the latent so far into full-size pictures, one per image."""
        return tensors.to_pil(self._decode(self.f_hat))

    def stop(self) -> None:
        """End the generation after this scale; the call returns what `preview` would show."""
        self.stopped = True
