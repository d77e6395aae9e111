"""A stand-in for CUDA graphs on the CPU: records the operators that a function dispatches, and runs them on the same memory.

As a graph it bakes in Python's numbers and every address: nothing of Python runs in a replay. As a capture it fails on what
CUDA's fails on: reading a value to the host, results whose size depends on values, copies between devices, torch's generators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FORBIDDEN_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}


class NotCapturable(RuntimeError):
    """What a CUDA graph could not hold."""


def tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operator writes to."""
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += tensors(value)
    return found


def harmless(func: Any, args: tuple[Any, ...]) -> bool:
    """Attention is tagged for its dropout, which is off, and indexing for masks, which are not whole numbers."""
    if func.overloadpacket is torch.ops.aten.index:
        return all(index.dtype == torch.int64 for index in tensors(args[1]))
    return "scaled_dot_product" in func.overloadpacket.__name__


class Tape(TorchDispatchMode):
    """One captured function."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self._made: set[int] = set()  # storages that were allocated within
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # outside memory, and what it held
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if FORBIDDEN_TAGS & set(func.tags) and not harmless(func, args):
            raise NotCapturable(f"{func} in a graph")
        devices = {x.device.type for x in tensors(args, kwargs)} | ({kwargs["device"].type} if kwargs.get("device") else set())
        if len(devices - {"cpu"}) and "cpu" in devices:
            raise NotCapturable(f"{func} between devices in a graph")
        for x in written(func, args, kwargs):
            storage = x.untyped_storage()
            if storage.data_ptr() not in self._made and storage.data_ptr() not in self._before:
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                self._before[storage.data_ptr()] = whole, whole.clone()
        out = func(*args, **kwargs)
        inside = {x.untyped_storage().data_ptr() for x in tensors(args, kwargs)}
        fresh = [x for x in tensors(out) if x.untyped_storage().data_ptr() not in inside]
        self._made |= {x.untyped_storage().data_ptr() for x in fresh}
        self.calls.append((func, args, kwargs, tensors(out)))
        return out

    def end(self) -> None:
        """Put back what was written outside, and poison what was made: a capture computes nothing."""
        for _, _, _, out in self.calls:
            for x in out:
                if x.untyped_storage().data_ptr() in self._made and x.is_floating_point():
                    x.fill_(torch.nan)
        for whole, data in self._before.values():
            whole.copy_(data)

    @torch.no_grad()
    def replay(self) -> None:
        """Run every operator on the tensors that it was recorded with."""
        self.replays += 1
        for func, args, kwargs, results in self.calls:
            for old, new in zip(results, tensors(func(*args, **kwargs)), strict=True):
                if new.untyped_storage().data_ptr() != old.untyped_storage().data_ptr():
                    old.copy_(new)


class TapeRecorder:
    """A `Recorder`."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []

    def record(self, run: Callable[[], object]) -> Tape:
        tape = Tape()
        with tape:
            run()
        tape.end()
        self.tapes.append(tape)
        return tape
