"""A worker's model: a pipeline, and how it is called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .protocol import Facts

if TYPE_CHECKING:
    from .safety import Judge

CLIENT_OPTIONS = (  # arguments of a call that a client may give, where the model's pipeline has them
    "guidance_scale",
    "negative_prompt",
    "num_inference_steps",
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
            device=str(self.pipe.device),
            dtype=str(self.pipe.dtype).removeprefix("torch."),
        )
