"""What every family's pipeline shares: devices and dtypes, offloading, copies, the progress bar, `describe`."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm

from ..errors import InputError
from .arguments import check_device, check_dtype
from .checks import check_bool
from .describe import describe
from .out_of_memory import out_of_memory_advice

CPU = torch.device("cpu")
PipelineT = TypeVar("PipelineT", bound="Pipeline")

# What users of diffusers look for, and what there is instead.
_LORA = "there are no adapters; put changed weights into pipe.transformer by load_state_dict"
_ATTENTION = "attention stores no matrix of scores; to save memory use dtype=torch.bfloat16 or enable_model_cpu_offload()"
INSTEAD = {
    "vae": "it is pipe.autoencoder",
    "unet": "it is pipe.transformer",
    "tokenizer": "it is pipe.text_encoder.tokenizer",
    "scheduler": "there is none; a call's arguments say how codes are drawn (guidance_scale, top_k, top_p, more_smooth)",
    "safety_checker": "there is none; what a prompt says is drawn",
    "negative_prompt_embeds": "it is a call's argument of this name",
    "load_lora_weights": _LORA,
    "fuse_lora": _LORA,
    "set_adapters": _LORA,
    "load_textual_inversion": _LORA,
    "enable_attention_slicing": _ATTENTION,
    "enable_xformers_memory_efficient_attention": _ATTENTION,
    "enable_sequential_cpu_offload": "it is enable_model_cpu_offload()",
    "enable_freeu": "it needs a network with skip connections, which these are not",
}


class Pipeline(ABC):
    """Loaded parts that make pictures together."""

    _instead: Mapping[str, str] = INSTEAD

    def __init__(self, name: str) -> None:
        self.name = name
        self._progress: dict[str, Any] = {"disable": None, "unit": "scale"}
        self._offloads_from: torch.device | None = None
        self._offloading = threading.RLock()
        self._users: dict[nn.Module, int] = {}  # how many blocks have an offloaded module on the device
        self._interrupts = 0
        self.num_threads: int | None = None  # of the CPU, for a call; None: as many as PyTorch takes

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            """Raise AttributeError; for a name of diffusers', with what replaces it."""
            if hasattr(type(self), name):  # a property has raised: raise its own error again
                object.__getattribute__(self, name)
            instead = f": {type(self)._instead[name]}." if name in type(self)._instead else ""
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{instead}")

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the lock, for copies and pickles."""
        return self.__dict__ | {"_offloading": None, "_users": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a lock of its own."""
        self.__dict__.update(state, _offloading=threading.RLock())

    @property
    def _interrupt(self) -> bool:
        """Set to True, it ends the calls that are drawing now, after their scale, as in diffusers; calls made later run.

        Of HART's and VAR's pictures that run one after the other, those not begun are black.
        """
        return False

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self._interrupts += bool(value)

    @property
    @abstractmethod
    def components(self) -> dict[str, Any]:
        """The parts by name; None for one that was not loaded."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the parts compute."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """dtype of the transformer's weights."""

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, ...]:
        """Sides in pixels of the square images that the checkpoint was trained for."""

    @property
    @abstractmethod
    def num_scales(self) -> int:
        """Steps of a picture, after each of which a callback is called."""

    @abstractmethod
    def _move(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """Move and cast the parts in place."""

    @abstractmethod
    def _facts(self) -> Mapping[str, str]:
        """Return this family's lines for `describe`, {label: text}."""

    def to(
        self: PipelineT,
        *args: torch.device | str | torch.dtype,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> PipelineT:
        """Move and cast in place: `to("cuda")`, `to(torch.bfloat16)`, `to(device=..., dtype=...)`; return self.

        `torch_dtype` is an alias of `dtype`. Raises InputError for an unsupported device or dtype, before anything moves, and
        OutOfMemoryError.
        """
        dtype = dtype or torch_dtype
        for argument in args:
            if isinstance(argument, torch.dtype):
                dtype = argument
            else:
                device = argument
        check_dtype(dtype)
        target = None if device is None else check_device(device)
        if target is not None:
            self._offloads_from = None
        with out_of_memory_advice():
            self._move(target, dtype)
        return self

    def enable_model_cpu_offload(self, device: torch.device | str | None = None) -> None:
        """Keep the weights on the CPU and move each component to `device` only while it runs.

        Needs device memory for the largest component, and copies its weights in every call; calls from several threads take
        turns. `device` None: CUDA, else MPS. `to(device)` turns it off. Raises InputError where there is no such device.
        """
        target = check_device(device)
        if target.type == "cpu":
            raise InputError(
                "enable_model_cpu_offload needs a CUDA or MPS device; on the CPU all weights are in main memory anyway."
            )
        self._move(CPU, None)
        self._offloads_from = target

    @contextmanager
    def _using(self, *modules: nn.Module | None) -> Iterator[None]:
        """Where weights are kept on the CPU, have those of `modules` on the device within the block; threads take turns."""
        if self._offloads_from is None:
            yield
            return
        with self._offloading, self._holding(*modules):
            yield

    @contextmanager
    def _holding(self, *modules: nn.Module | None) -> Iterator[None]:
        """As `_using`, for a block of a generator: other calls, and other threads, may run before it goes on."""
        held: list[nn.Module] = []
        try:
            with self._offloading:
                for module in modules if self._offloads_from is not None else ():
                    if module is not None:
                        held.append(module)
                        self._users[module] = self._users.get(module, 0) + 1
                        if self._users[module] == 1:
                            module.to(self._offloads_from)
            yield
        finally:
            with self._offloading:
                for module in held:
                    self._users[module] -= 1
                    if not self._users[module]:
                        del self._users[module]
                        if self._offloads_from is not None:  # `to` may have turned it off
                            module.to(CPU)

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Options for tqdm's bar over the scales, e.g. `disable=True`; by default it shows on terminals only."""
        self._progress |= kwargs

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        """Return tqdm's bar with the options of `set_progress_bar_config`."""
        return tqdm(iterable, **{"desc": "scales", "total": total, **self._progress})

    def describe(self) -> str:
        """Return lines that say which model this is, on which device, in what dtype, and what runs each operation."""
        return describe(self.name or type(self).__name__, self.components, self.device, self.dtype, self._facts())

    @abstractmethod
    def _save(self, path: Path, max_shard_size: str) -> Path:
        """Write the parts; return the resolved path."""

    def save_pretrained(self, path: str | Path, *, max_shard_size: str = "5GB", safe_serialization: bool = True) -> Path:
        """Write one clean folder in the current dtype, from which `from_pretrained` gives an identical pipeline.

        A HART without a text encoder is loaded with the released one again, unless by `text_encoder=False`.
        The folder appears whole or not at all. Raises OutputError, or InputError for a bad `max_shard_size`, for weights in
        int8, and for `safe_serialization=False`: pickles are read, never written.
        """
        if not check_bool(safe_serialization, "safe_serialization"):
            raise InputError("safe_serialization must be True: weights are written as safetensors, never as pickles.")
        return self._save(Path(path), max_shard_size)

    def _batch_size(self, reproducible: bool | None, limit: int) -> int:
        """Return how many images go through a network together: 1 if reproducible (on a CPU by default), else `limit`."""
        alone = self.device.type == "cpu" if reproducible is None else reproducible
        return 1 if alone else max(1, limit)
