"""Declare operations and choose what runs them: the PyTorch reference, which is the specification, or a kernel."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..errors import BackendError, InputError

P = ParamSpec("P")
R = TypeVar("R")
REFERENCE = "torch"
CPU = "cpu"  # the backend of kernels for CPUs; those of all others are for GPUs
BACKENDS = ("cuda", "triton", CPU, REFERENCE)  # in order of preference
logger = logging.getLogger(__name__)
_forced: ContextVar[str | None] = ContextVar("backend", default=None)
_told: set[str] = set()
OPS: dict[str, Op[Any, Any]] = {}


@dataclass(frozen=True)
class Where:
    """All that the choice of a backend depends on: device, dtype and compute capability, never a shape."""

    device: str  # "cuda", "cpu", "mps"
    dtype: torch.dtype
    capability: tuple[int, int] | None = None  # of a CUDA device

    @staticmethod
    def of(x: Tensor) -> Where:
        """Return the device, dtype and capability of `x`."""
        capability = torch.cuda.get_device_capability(x.device) if x.device.type == "cuda" else None
        return Where(x.device.type, x.dtype, capability)

    def __str__(self) -> str:
        """Return it for messages, such as: cuda sm_90 in bfloat16."""
        generation = f" sm_{self.capability[0]}{self.capability[1]}" if self.capability else ""
        return f"{self.device}{generation} in {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Backend:
    """A kernel: "module:function" relative to this package, imported when first asked about.

    The module defines `refusal(where)`: None, or why it can't run there. It may define an exception `LimitExceeded`, which its
    function raises, before any launch, for valid arguments that exceed its `LIMIT` (a text).
    """

    target: str

    def module(self) -> Any:
        """Import the kernel's module. Raises ImportError."""
        return importlib.import_module(self.target.partition(":")[0], __package__)

    def refusal(self, where: Where) -> str | None:
        """Return why it can't run there, or None if it can."""
        try:
            module = self.module()
        except ImportError as error:
            return f"it can't be imported ({error})"
        reason: str | None = module.refusal(where)
        return reason

    def function(self) -> Any:
        """Return the function to call."""
        return getattr(self.module(), self.target.partition(":")[2])

    def limit(self) -> str | None:
        """Return its limit in words, or None if it has none."""
        return getattr(self.module(), "LIMIT", None)

    def limit_error(self) -> Any:
        """Return the exception that it raises for arguments beyond its limit; () if it has none."""
        return getattr(self.module(), "LimitExceeded", ())


@dataclass(frozen=True)
class Default:
    """A row of an operation's table of defaults on CUDA: what runs the calls it is for, and why.

    `backend`: the reference, or a kernel, which is looked for in the usual order.
    `uses`: the row is for calls that give one of these arguments a value other than its default; () for all calls.
    """

    backend: str
    why: str
    uses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice(Generic[P, R]):
    """The chosen backend, and why preferred ones were refused or, by a table of defaults, not asked."""

    backend: str
    function: Callable[P, R]
    refusals: dict[str, str]
    limit_error: Any = ()
    why: str = ""


class Op(Generic[P, R]):
    """An operation; calling it runs the backend chosen for its first argument's device and dtype.

    If gradients are enabled and an argument needs them the reference runs: kernels have no backward pass. So it does where
    autocast has mixed the arguments' dtypes: kernels want one. Under `torch.compile` it is the custom op
    `torch.ops.hart_infer.<name>`, with the reference, or `fake`, as fake implementation; on the CPU, and where it has no kernel
    for GPUs, the reference, which compilers see into.
    """

    def __init__(self, reference: Callable[P, R], backends: dict[str, Backend], defaults: Sequence[Default] = ()) -> None:
        """Wrap `reference`, which takes a tensor first; it is the specification and the fallback.

        On CUDA the first row of `defaults` that fits a call names its backend; without one the first of `backends` that runs
        there is taken.
        """
        functools.update_wrapper(self, reference)
        self.name = reference.__name__
        self.reference = reference
        self.traced: Callable[P, R] = reference
        self.backends = {name: backends[name] for name in BACKENDS if name in backends}
        self.defaults = tuple(defaults)
        self._parameters = inspect.signature(reference).parameters
        self._mutated: list[int] = []  # places of the arguments that it writes to
        self._chosen: dict[tuple[torch.device, torch.dtype, str | None, Default | None], Choice[P, R]] = {}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the chosen backend. Raises BackendError if `use_backend` names one that can't run it."""
        x: Any = args[0]
        given = (*args, *kwargs.values())
        if _is_learning(given) or (autocast_dtype(x.device.type) and _is_mixed(given)):
            return self.reference(*args, **kwargs)
        if torch.compiler.is_compiling():
            opaque = x.device.type != "cpu" and self._has_kernels(x.device.type)
            return self._trace(*args, **kwargs) if opaque else self.reference(*args, **kwargs)
        return self._run(*args, **kwargs)

    def _has_kernels(self, device: str) -> bool:
        """Return whether there are kernels for this type of device, loaded or not."""
        return CPU in self.backends if device == "cpu" else bool(self.backends.keys() - {CPU})

    def _trace(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run as a custom op that writes to fresh tensors, then copy these to the arguments that it mutates.

        Inductor (torch 2.13) misplaces a custom op's write to a slice at a symbolic offset.
        """
        given: list[Any] = list(args)
        for place in self._mutated:
            given[place] = torch.empty_like(given[place], memory_format=torch.contiguous_format)
        result = self.traced(*given, **kwargs)
        for place in self._mutated:
            args[place].copy_(given[place])  # type: ignore[attr-defined]
        return result

    def _run(self, *args: P.args, **kwargs: P.kwargs) -> R:
        x: Any = args[0]
        forced = _forced.get()
        if forced is None and not self._has_kernels(x.device.type):
            return self.reference(*args, **kwargs)
        with torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext():  # Triton launches on the current one
            key = (x.device, x.dtype, forced, self._default(kwargs))
            choice = self._chosen.get(key)
            if choice is None:
                choice = self._chosen[key] = self._choose(Where.of(x), *key[2:])
                _tell(self.name, Where.of(x), choice)
            try:
                return choice.function(*args, **kwargs)
            except choice.limit_error as limit:
                if forced:
                    raise BackendError(f"{limit} Leave the choice to the library.") from None
                _warn_once(f"{self.name} runs on PyTorch: {limit}")
            return self.reference(*args, **kwargs)

    def register(self, mutates: Sequence[str], keeps_layout: bool, fake: Callable[..., Any] | None) -> None:
        """Register it with PyTorch's dispatcher; the arguments are those of `op`."""

        def laid_out(run: Callable[P, R]) -> Callable[P, R]:
            """Make results contiguous, unless `keeps_layout`: compilers have to know the strides of the kernels' results."""
            return run if keeps_layout else lambda *args, **kwargs: _contiguous(run(*args, **kwargs))

        self._mutated = [list(inspect.signature(self.reference).parameters).index(name) for name in mutates]
        schema = torch.library.infer_schema(self.reference, mutates_args=mutates)
        name = f"hart_infer::{self.name}"
        traced = torch.library.custom_op(name, laid_out(self._run), mutates_args=mutates, schema=schema)
        returns = inspect.signature(self.reference).return_annotation
        traced.register_fake(fake or (_nothing if returns in (None, "None") else laid_out(self.reference)))
        self.traced = traced

    def choose(self, where: Where, **options: Any) -> Choice[P, R]:
        """Return what runs a call with `options` there now. Raises BackendError if `use_backend` names a backend that can't."""
        return self._choose(where, _forced.get(), self._default(options))

    def _default(self, options: Mapping[str, Any]) -> Default | None:
        """Return the row of the table for a call with these keyword arguments."""
        for row in self.defaults:
            if not row.uses or any(options.get(name) not in (None, self._parameters[name].default) for name in row.uses):
                return row
        return None

    def _choose(self, where: Where, forced: str | None, default: Default | None) -> Choice[P, R]:
        if forced == REFERENCE:
            return Choice(REFERENCE, self.reference, {})
        if forced in self.backends:
            reason = self.backends[forced].refusal(where)
            if reason is not None:
                raise BackendError(f"{self.name} can't run by {forced} on {where}: {reason}. Leave the choice to the library.")
            return Choice(forced, self.backends[forced].function(), {}, self.backends[forced].limit_error())
        refusals: dict[str, str] = {}
        why = default.why if default and where.device == "cuda" else ""
        if why and default and default.backend == REFERENCE:
            return Choice(REFERENCE, self.reference, {}, why=why)
        for name, backend in self.backends.items():
            if name == CPU and where.device != "cpu":
                continue
            reason = "it is for GPUs" if name != CPU and where.device == "cpu" else backend.refusal(where)
            if reason is None:
                return Choice(name, backend.function(), refusals, backend.limit_error(), why)
            refusals[name] = reason
        return Choice(REFERENCE, self.reference, refusals)


def _nothing(*_: Any, **__: Any) -> None:
    """Return None: what an operation that only writes over its arguments tells a compiler."""


def _is_learning(args: tuple[Any, ...]) -> bool:
    """Return whether gradients are enabled and an argument needs them."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)


def _is_mixed(args: tuple[Any, ...]) -> bool:
    """Return whether the arguments are of several floating-point dtypes."""
    return len({arg.dtype for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()}) > 1


def _tell(name: str, where: Where, choice: Choice[Any, Any]) -> None:
    """Warn once per reason when a CUDA device falls back to PyTorch, whatever operations share the reason."""
    listed = "; ".join(f"{backend}: {reason}" for backend, reason in choice.refusals.items())
    if where.device == "cuda" and choice.backend == REFERENCE and listed:
        _warn_once(f"{name} and operations like it run on PyTorch on {where} ({listed}).", key=listed)


def _warn_once(message: str, key: str | None = None) -> None:
    """Log a warning, unless one of the same key (default: its text) was logged before."""
    key = key or message
    if key not in _told:
        _told.add(key)
        logger.warning("%s", message)


def _contiguous(result: Any) -> Any:
    """Make a tensor, or each of a tuple, contiguous."""
    return tuple(x.contiguous() for x in result) if isinstance(result, tuple) else result.contiguous()


def op(
    *,
    mutates: Sequence[str] = (),
    keeps_layout: bool = False,
    defaults: Sequence[Default] = (),
    fake: Callable[..., Any] | None = None,
    **backends: Backend,
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Declare an operation: decorates its reference, and names its kernels by backend.

    `mutates`: arguments written in place. `keeps_layout`: results keep the reference's strides, else they are contiguous.
    `defaults`: as of `Op`. `fake`: returns what tells a compiler the result's shape; by default the reference does.
    """

    def declare(reference: Callable[P, R]) -> Op[P, R]:
        declared = Op(reference, backends, defaults)
        declared.register(mutates, keeps_layout, fake)
        OPS[declared.name] = declared
        return declared

    return declare


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return to which dtype autocast casts on a type of device, None outside of it."""
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return None
    return torch.get_autocast_dtype(device)


def forced_backend() -> str | None:
    """Return the backend that `use_backend` names, None outside of it."""
    return _forced.get()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the context run operations by backend `name` ("torch", "triton", "cuda" or "cpu"), or raise BackendError.

    Operations without that backend are unaffected, and so are those whose arguments need gradients, or have several dtypes
    under autocast. Raises InputError for an unknown name.
    """
    if name not in BACKENDS:
        raise InputError(f"There is no backend {name!r}; {', '.join(BACKENDS)} are.")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
