"""Operations and what runs them: a PyTorch reference, which is the specification, and kernels where a device takes them."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
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
BACKENDS = ("cuda", "triton", REFERENCE)  # in the order of preference
logger = logging.getLogger(__name__)
_forced: ContextVar[str | None] = ContextVar("backend", default=None)
_told: set[str] = set()
OPS: dict[str, Op[Any, Any]] = {}


@dataclass(frozen=True)
class Where:
    """All that the choice of a backend may depend on: never a shape."""

    device: str  # "cuda", "cpu", "mps"
    dtype: torch.dtype
    capability: tuple[int, int] | None = None  # of a CUDA device

    @staticmethod
    def of(x: Tensor) -> Where:
        """Where `x` lives and in what dtype."""
        capability = torch.cuda.get_device_capability(x.device) if x.device.type == "cuda" else None
        return Where(x.device.type, x.dtype, capability)

    def __str__(self) -> str:
        """For messages."""
        generation = f" sm_{self.capability[0]}{self.capability[1]}" if self.capability else ""
        return f"{self.device}{generation} in {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Backend:
    """A kernel: "module:function" under this package, imported when first asked about.

    The module says where it works: its `refusal(where)` gives None, or why not. If it has an exception `LimitExceeded`, its function
    raises that, before it does anything, for arguments that are right but larger than it was made for, which its LIMIT tells.
    """

    target: str

    def module(self) -> Any:
        """The kernel's module; ImportError where it can't be imported."""
        return importlib.import_module(self.target.partition(":")[0], __package__)

    def refusal(self, where: Where) -> str | None:
        """None if it runs there, else the reason."""
        try:
            module = self.module()
        except ImportError as error:
            return f"it can't be imported ({error})"
        reason: str | None = module.refusal(where)
        return reason

    def function(self) -> Any:
        """What to call."""
        return getattr(self.module(), self.target.partition(":")[2])

    def limit(self) -> str | None:
        """What it is made for, in words, if that is not everything."""
        return getattr(self.module(), "LIMIT", None)

    def beyond(self) -> Any:
        """The exceptions that say that arguments are beyond it."""
        return getattr(self.module(), "LimitExceeded", ())


@dataclass(frozen=True)
class Choice(Generic[P, R]):
    """What runs an operation somewhere, and why not the backends before it."""

    backend: str
    function: Callable[P, R]
    refusals: dict[str, str]
    beyond: Any = ()


class Op(Generic[P, R]):
    """An operation; calling it runs the backend chosen for its first argument's device and dtype.

    Where gradients have to flow that is the reference, which alone has a backward pass. `torch.compile` sees one opaque
    operation, `torch.ops.hart_infer.<name>`, whose shapes the reference tells; on the CPU it sees the reference.
    """

    def __init__(self, reference: Callable[P, R], backends: dict[str, Backend]) -> None:
        """`reference` takes a tensor first; it is the specification and the fallback."""
        functools.update_wrapper(self, reference)
        self.name = reference.__name__
        self.reference = reference
        self.traced: Callable[P, R] = reference
        self.backends = {name: backends[name] for name in BACKENDS if name in backends}
        self._mutated: list[int] = []  # places of the arguments that it writes to
        self._chosen: dict[tuple[torch.device, torch.dtype, str | None], Choice[P, R]] = {}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the chosen backend."""
        x: Any = args[0]
        if _is_learning((*args, *kwargs.values())):
            return self.reference(*args, **kwargs)
        if torch.compiler.is_compiling():
            return self.reference(*args, **kwargs) if x.device.type == "cpu" else self._trace(*args, **kwargs)
        return self._run(*args, **kwargs)

    def _trace(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """As one opaque operation. It writes to fresh tensors, which are copied to those that it mutates.

        Inductor (torch 2.13) puts what an opaque operation writes to a slice at a symbolic offset in another place.
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
        if forced is None and x.device.type == "cpu":
            return self.reference(*args, **kwargs)
        with torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext():  # Triton launches on the current one
            choice = self._chosen.get((x.device, x.dtype, forced))
            if choice is None:
                choice = self._chosen[x.device, x.dtype, forced] = self._choose(Where.of(x), forced)
                _tell(self.name, Where.of(x), choice)
            try:
                return choice.function(*args, **kwargs)
            except choice.beyond as limit:
                if forced:
                    raise BackendError(f"{limit} Leave the choice to the library.") from None
                _warn_once(f"{self.name} runs on PyTorch: {limit}")
            return self.reference(*args, **kwargs)

    def register(self, mutates: Sequence[str], keeps_layout: bool) -> None:
        """Make it known to PyTorch's dispatcher; the arguments are `op`'s."""

        def laid_out(run: Callable[P, R]) -> Callable[P, R]:
            """Compilers need to know strides: the kernels' results are contiguous, so the reference's have to be."""
            return run if keeps_layout else lambda *args, **kwargs: _contiguous(run(*args, **kwargs))

        self._mutated = [list(inspect.signature(self.reference).parameters).index(name) for name in mutates]
        schema = torch.library.infer_schema(self.reference, mutates_args=mutates)
        name = f"hart_infer::{self.name}"
        traced = torch.library.custom_op(name, laid_out(self._run), mutates_args=mutates, schema=schema)
        traced.register_fake(laid_out(self.reference))
        self.traced = traced

    def choose(self, where: Where) -> Choice[P, R]:
        """What runs there now."""
        return self._choose(where, _forced.get())

    def _choose(self, where: Where, forced: str | None) -> Choice[P, R]:
        if forced == REFERENCE:
            return Choice(REFERENCE, self.reference, {})
        if forced in self.backends:
            reason = self.backends[forced].refusal(where)
            if reason is not None:
                raise BackendError(f"{self.name} can't run by {forced} on {where}: {reason}. Leave the choice to the library.")
            return Choice(forced, self.backends[forced].function(), {}, self.backends[forced].beyond())
        refusals: dict[str, str] = {}
        if where.device == "cpu":
            return Choice(REFERENCE, self.reference, dict.fromkeys(self.backends, "kernels are for GPUs"))
        for name, backend in self.backends.items():
            reason = backend.refusal(where)
            if reason is None:
                return Choice(name, backend.function(), refusals, backend.beyond())
            refusals[name] = reason
        return Choice(REFERENCE, self.reference, refusals)


def _is_learning(args: tuple[Any, ...]) -> bool:
    """Whether gradients have to flow: kernels have no backward pass."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)


def _tell(name: str, where: Where, choice: Choice[Any, Any]) -> None:
    """Say that a GPU which has kernels can't use them: each reason once, whatever operations share it."""
    listed = "; ".join(f"{backend}: {reason}" for backend, reason in choice.refusals.items())
    if where.device == "cuda" and choice.backend == REFERENCE and listed:
        _warn_once(f"{name} and operations like it run on PyTorch on {where} ({listed}).", key=listed)


def _warn_once(message: str, key: str | None = None) -> None:
    """Log a message, unless one of the same key, by default its own text, has been logged."""
    key = key or message
    if key not in _told:
        _told.add(key)
        logger.warning("%s", message)


def _contiguous(result: Any) -> Any:
    """A tensor, or each of a tuple."""
    return tuple(x.contiguous() for x in result) if isinstance(result, tuple) else result.contiguous()


def op(*, mutates: Sequence[str] = (), keeps_layout: bool = False, **backends: Backend) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Declare an operation: decorates its reference, and names its kernels.

    It writes to the arguments `mutates`. Its kernels' results are contiguous, or with `keeps_layout` as the reference's are.
    """

    def declare(reference: Callable[P, R]) -> Op[P, R]:
        declared = Op(reference, backends)
        declared.register(mutates, keeps_layout)
        OPS[declared.name] = declared
        return declared

    return declare


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within it, every operation that has a backend of this `name` runs by it, or raises BackendError: never another.

    "torch", "triton" or "cuda". Operations without such a backend are chosen for as always. Raises InputError.
    """
    if name not in BACKENDS:
        raise InputError(f"There is no backend {name!r}; {', '.join(BACKENDS)} are.")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
