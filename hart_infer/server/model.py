"""A worker's model: a pipeline, and how it is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..generation.speed import SPEEDS
from .protocol import Facts

if TYPE_CHECKING:
    from PIL.Image import Image

    from .safety import Judge

CLIENT_OPTIONS = (  # arguments of a call that a client may give, where the model's pipeline has them
    "guidance_scale",
    "negative_prompt",
    "num_inference_steps",
    "residual_temperature",
    "speed",
    "top_k",
    "top_p",
)


@dataclass(frozen=True)
class Model:
    """A loaded pipeline, and how it is called."""

    pipe: Any
    name: str  # that clients use
    family: str
    argument: Callable[[str], Any]  # a call's first argument of a prompt; raises InputError
    reproducible: bool = True
    judge: Judge | None = None

    @property
    def modes(self) -> tuple[str, ...]:
        """In which it reconstructs a picture: what its codes hold, and what its tokenizer knows."""
        return ("discrete", "hybrid") if "mode" in inspect.signature(self.pipe.reconstruct).parameters else ("discrete",)

    def reconstructed(self, image: Image, mode: str) -> Image:
        """Return what the tokenizer makes of a picture."""
        rebuilt: Image = self.pipe.reconstruct(image) if self.modes == (mode,) else self.pipe.reconstruct(image, mode=mode)
        return rebuilt

    def _knows(self, speed: str) -> bool:
        """Return whether the model has scales enough for a fast mode."""
        try:
            self.pipe.knobs(speed)
        except InputError:
            return False
        return True

    def facts(self) -> Facts:
        """Return what the server has to know."""
        taken = inspect.signature(self.pipe.__call__).parameters
        return Facts(
            name=self.name,
            family=self.family,
            sizes=tuple(self.pipe.sizes),
            options=frozenset(taken).intersection(CLIENT_OPTIONS),
            edits=hasattr(self.pipe, "edit"),
            answers=hasattr(self.pipe, "answer"),
            modes=self.modes,
            speeds=tuple(speed for speed in SPEEDS if self._knows(speed)) if "speed" in taken else (),
            guidance_scale=self.pipe.defaults.guidance_scale,
            num_scales=self.pipe.num_scales,
            device=str(self.pipe.device),
            dtype=str(self.pipe.dtype).removeprefix("torch."),
        )
