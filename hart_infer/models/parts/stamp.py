"""Tell whether a result that was kept still holds."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.registry import autocast_dtype, forced_backend


class Stamp:
    """Tells whether a module would compute now what it computed at the stamp: by the same weights, under the same settings.

    The same weights are the same tensors, at the same addresses, in the same versions. Assignment, loading, moving and
    operations in place make them others; writes through `parameter.data` go unnoticed. Tensors made under
    `torch.inference_mode` have no versions, so no stamp fits them. Settings are a forced backend, autocast, the number of
    threads of a CPU and the precision of fp32 products: each changes the last bits.
    """

    def __init__(self, module: nn.Module) -> None:
        tensors = [*module.parameters(), *module.buffers()]
        self._versioned = not any(tensor.is_inference() for tensor in tensors)
        self._seen = [(weakref.ref(tensor), _state(tensor)) for tensor in tensors] if self._versioned else []
        self._settings = _settings(tensors)

    def __getstate__(self) -> dict[str, Any]:
        """Copy to a stamp that nothing fits: a copy's weights are others."""
        return {"_versioned": False, "_seen": [], "_settings": ()}

    def fits(self, module: nn.Module) -> bool:
        """Return whether the weights of `module` and the settings are unchanged."""
        tensors = [*module.parameters(), *module.buffers()]
        same = len(tensors) == len(self._seen) and all(
            ref() is tensor and not tensor.is_inference() and state == _state(tensor)
            for (ref, state), tensor in zip(self._seen, tensors, strict=True)
        )
        return self._versioned and same and self._settings == _settings(tensors)


def _state(tensor: Tensor) -> tuple[int, int, torch.dtype]:
    return tensor.data_ptr(), tensor._version, tensor.dtype


def _settings(tensors: list[Tensor]) -> tuple[Hashable, ...]:
    device = tensors[0].device.type if tensors else "cpu"
    threads = torch.get_num_threads() if device == "cpu" else None
    return forced_backend(), autocast_dtype(device), threads, *_precisions()


def _precisions() -> tuple[str, ...]:
    """What fp32 products are computed in; the older getter raises where the newer settings were used."""
    backends: list[Any] = [getattr(part, "matmul", None) for part in (torch.backends.cuda, torch.backends.mkldnn)]
    if all(hasattr(backend, "fp32_precision") for backend in backends):
        return tuple(backend.fp32_precision for backend in backends)
    return (torch.get_float32_matmul_precision(),)
