"""HART (arXiv:2410.10812), VAR (arXiv:2404.02905) and VILA-U (arXiv:2409.04429): texts or classes in, pictures out.

>>> from hart_infer import HartPipeline
>>> pipe = HartPipeline.from_pretrained("mit-han-lab/hart-0.7b-1024px")
>>> pipe("a cat").images[0].save("cat.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import (
    BackendError,
    CheckpointNotFoundError,
    ConfigError,
    HartError,
    InputError,
    OutOfMemoryError,
    OutputError,
    WeightsError,
)
from .moved import install as _find_old_names
from .version import __version__

if TYPE_CHECKING:
    from .generation.speed import Prune
    from .models.text import PromptEmbeds
    from .pipelines.conversation import Frames
    from .pipelines.hart import HartPipeline
    from .pipelines.outputs import HartOutput, ImageOutput, Step, VideoOutput, VilaUOutput
    from .pipelines.var import VarPipeline
    from .pipelines.vila_u import VilaUPipeline

__all__ = [
    "BackendError",
    "CheckpointNotFoundError",
    "ConfigError",
    "Frames",
    "HartError",
    "HartOutput",
    "HartPipeline",
    "ImageOutput",
    "InputError",
    "OutOfMemoryError",
    "OutputError",
    "PromptEmbeds",
    "Prune",
    "Step",
    "VarPipeline",
    "VideoOutput",
    "VilaUOutput",
    "VilaUPipeline",
    "WeightsError",
    "__version__",
]
_LAZY = {
    "Frames": "pipelines.conversation",
    "HartOutput": "pipelines.outputs",
    "HartPipeline": "pipelines.hart",
    "ImageOutput": "pipelines.outputs",
    "PromptEmbeds": "models.text",
    "Prune": "generation.speed",
    "Step": "pipelines.outputs",
    "VarPipeline": "pipelines.var",
    "VideoOutput": "pipelines.outputs",
    "VilaUOutput": "pipelines.outputs",
    "VilaUPipeline": "pipelines.vila_u",
}


_find_old_names()


def __getattr__(name: str) -> object:
    """Import what needs torch on first use, so that `import hart_infer` is quick."""
    from importlib import import_module

    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
