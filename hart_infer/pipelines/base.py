"""What every family's pipeline shares: devices and dtypes, saving, the progress bar, decoding in tiles, describing itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..models.parts.autoencoder import Autoencoder
from .arguments import check_device, check_dtype
from .checks import check_int
from .describe import describe

DECODED_PIXELS = 1024 * 1024  # decoded at once, which bounds the memory of a batch
PipelineT = TypeVar("PipelineT", bound="Pipeline")


class Pipeline(ABC):
    """Loaded parts that make pictures together."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._progress: dict[str, Any] = {"disable": None, "unit": "scale"}
        self._tile: int | None = None

    @property
    @abstractmethod
    def components(self) -> dict[str, Any]:
        """The parts by name; None for one that was not loaded."""

    @property
    @abstractmethod
    def autoencoder(self) -> Autoencoder:
        """What decodes latents."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weights are."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """That of the weights which make up most of the model."""

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, ...]:
        """Sides in pixels of the square pictures that the checkpoint was trained for."""

    @abstractmethod
    def _move(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """Move and cast the parts in place."""

    @abstractmethod
    def _facts(self) -> Mapping[str, str]:
        """Lines of `describe` that this family alone has, by their names."""

    def to(
        self: PipelineT,
        *args: torch.device | str | torch.dtype,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> PipelineT:
        """Move and cast in place: `to("cuda")`, `to(torch.bfloat16)`, `to(device=..., dtype=...)`; returns self.

        Raises InputError, and leaves all as it was, for a device or dtype that the models don't run on.
        """
        for argument in args:
            if isinstance(argument, torch.dtype):
                dtype = argument
            else:
                device = argument
        check_dtype(dtype)
        self._move(None if device is None else check_device(device), dtype)
        return self

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Options for tqdm's bar over the scales, e.g. `disable=True`; by default it shows on terminals only."""
        self._progress |= kwargs

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        """tqdm's bar with the options of `set_progress_bar_config`."""
        return tqdm(iterable, **{"desc": "scales", "total": total, **self._progress})

    def enable_decoder_tiling(self, tile: int | None = 32) -> None:
        """Decode in tiles of `tile` latent cells, to save memory; None turns it off.

        Approximate: group norms see a tile instead of the picture. docs/memory.md has what it saves and costs.
        """
        self._tile = None if tile is None else check_int(tile, "tile", 8)

    def describe(self) -> str:
        """Which model, where, in what precision, and which implementation runs each operation."""
        return describe(self.name or type(self).__name__, self.components, self.device, self.dtype, self._facts())

    @abstractmethod
    def save_pretrained(self, path: str | Path, *, max_shard_size: str = "5GB") -> Path:
        """Write one clean folder in the current dtype, from which `from_pretrained` gives an identical pipeline.

        The folder appears whole or not at all. Raises OutputError.
        """

    def _together(self, reproducible: bool | None, limit: int) -> int:
        """How many images, of `limit`, to take through a network together; see `reproducible` of a call."""
        alone = self.device.type == "cpu" if reproducible is None else reproducible
        return 1 if alone else max(1, limit)

    def _decode(self, latents: Tensor, reproducible: bool | None = None) -> Tensor:
        """Latents [N, C, P, P] -> pictures [N, 3, H, W] fp32 in 0..1, few at a time."""
        at_once = self._together(reproducible, DECODED_PIXELS // self.sizes[0] ** 2)
        parts = [self.autoencoder.decode(part, tile=self._tile) for part in latents.split(at_once)]
        return torch.cat(parts).add_(1).mul_(0.5)
