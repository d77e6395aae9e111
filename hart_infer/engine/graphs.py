"""Capture generations and other functions of tensors into CUDA graphs, and replay them on the same memory.

A graph bakes in addresses and Python's numbers. So all that differs between two calls of a kind lies in tensors that a plan
owns: the conditions, the seeds, the guidance, top-k and top-p. What else would change a graph is part of `PlanKey`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..generation.next_scale import GenerationState, run_scale
from ..generation.sampling import PhiloxSampler, Sampler
from ..generation.schedule import Schedule, Stage
from ..models.next_scale import Condition
from ..models.parts.cache import KVCache
from ..models.parts.stamp import Stamp

MAX_PLANS = 8  # of generations and of calls together; the least recently used go
Shapes = tuple[tuple[int, ...], ...]


class Graph(Protocol):
    """Device work that was captured."""

    def replay(self) -> None:
        """Do it again, on the same memory."""
        ...


class Recorder(Protocol):
    """Captures what a function launches, without running it; its results get values by the first replay."""

    def record(self, run: Callable[[], object]) -> Graph:
        """Capture `run`; all graphs of a recorder share one pool of memory."""
        ...


class CudaRecorder:
    """PyTorch's CUDA graphs of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)  # PyTorch's own for captures is of the first device that captured

    def record(self, run: Callable[[], object]) -> Graph:
        """As `Recorder.record`. Other threads may go on to use the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            run()
        return graph


@dataclass(frozen=True)
class CacheKey:
    """Shapes, dtype and device of a key/value cache: equal keys mean interchangeable caches."""

    depth: int
    rows: int
    num_heads: int
    head_dim: int
    length: int
    scratch_length: int
    dtype: torch.dtype
    device: torch.device
    is_inference: bool  # made under torch.inference_mode, outside of which it can't be written


@dataclass(frozen=True)
class PlanKey:
    """All that a generation's graphs bake in: `stages` without the numbers that lie on the device."""

    stages: tuple[Stage, ...]
    cache: CacheKey
    prompts: Shapes
    negatives: Shapes

    @staticmethod
    def of(schedule: Schedule, vocab_size: int, cache: CacheKey, prompts: Shapes, negatives: Shapes) -> PlanKey:
        """Make the key of a generation with a codebook of `vocab_size` codes."""
        return PlanKey(tuple(_without_numbers(stage, vocab_size) for stage in schedule), cache, prompts, negatives)


def _without_numbers(stage: Stage, vocab_size: int) -> Stage:
    """Keep of guidance, top-k and top-p only whether they are on."""
    filters = {"top_k": int(0 < stage.top_k < vocab_size), "top_p": float(stage.top_p > 0)}
    return replace(stage, guidance=float(stage.guided), **filters)  # type: ignore[arg-type]


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a Condition, or of anything made of dataclasses and tuples, in order."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_of(getattr(value, field.name))
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors_of(part)


def shapes_of(condition: Condition | None) -> Shapes:
    """Return the shapes of a condition's tensors, and how many copies of each row it holds."""
    return (*(tuple(x.shape) for x in tensors_of(condition)), (condition.copies,)) if condition else ()


def _copied(value: Any) -> Any:
    """Return a Condition, or what it is made of, in memory of its own."""
    if isinstance(value, Tensor):
        return value.clone()
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _copied(getattr(value, field.name)) for field in fields(value)})
    return tuple(map(_copied, value)) if isinstance(value, tuple) else value


Begin = Callable[[PhiloxSampler, Condition, Condition | None], GenerationState]


class CapturedGeneration:
    """A generation by graphs: one for the prefill and all that is computed once, and one for each scale.

    A scale is captured when it is first run, behind those before it. A callback may run between any two.
    """

    def __init__(
        self, recorder: Recorder, begin: Begin, sampler: PhiloxSampler, prompt: Condition, negative: Condition | None
    ) -> None:
        """Capture `begin`, which starts a generation, over copies of the conditions; `sampler` is kept."""
        self.sampler: Sampler = sampler
        self.is_broken = False
        self._own, self._recorder = sampler, recorder
        self._held = begin  # and with it the unconditional prefix that the graph reads
        self._conditions: tuple[Condition, Condition | None] = (_copied(prompt), _copied(negative))
        self._release: Callable[[], None] | None = None
        self._scales: dict[int, Graph] = {}
        self._done = 0
        states: list[GenerationState] = []
        self._begin = recorder.record(lambda: states.append(begin(sampler, *self._conditions)))
        (self._state,) = states

    def restart(
        self, sampler: PhiloxSampler, prompt: Condition, negative: Condition | None, release: Callable[[], None]
    ) -> None:
        """Start the generation of another call of the same kind; `release` is called when it ends."""
        self._release, self._done = release, 0
        self._own.become(sampler)
        for own, given in zip(tensors_of(self._conditions), tensors_of((prompt, negative)), strict=True):
            own.copy_(given)
        self._begin.replay()

    @property
    def f_hat(self) -> Tensor:
        """As `Generation.f_hat`."""
        return self._state.f_hat

    @property
    def indices(self) -> list[Tensor]:
        """As `Generation.indices`."""
        return self._state.indices[: self._done]

    def advance(self, stage: Stage) -> None:
        """As `Generation.advance`."""
        if stage.index not in self._scales:
            try:
                self._scales[stage.index] = self._recorder.record(lambda: run_scale(self._state, stage))
            except BaseException:
                self.is_broken = True
                raise
        self._scales[stage.index].replay()
        self._done += 1

    def end_cache(self) -> None:
        """Do nothing: the memory stays."""

    def drop_cache(self) -> None:
        """Let another generation use the memory."""
        release, self._release = self._release, None
        if release is not None:
            release()


class CapturedCall:
    """A function of one tensor by a graph."""

    is_broken = False

    def __init__(self, recorder: Recorder, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self._x = x.clone()
        results: list[Tensor] = []
        self._graph = recorder.record(lambda: results.append(function(self._x)))
        (self._result,) = results

    def __call__(self, x: Tensor) -> Tensor:
        """Return the function's result for `x`, in memory of its own."""
        self._x.copy_(x)
        self._graph.replay()
        return self._result.clone()


PlanT = TypeVar("PlanT", CapturedGeneration, CapturedCall)


class Graphs:
    """What was captured of one pipeline, by kind. One plan runs at a time, since all share one pool of memory.

    The first call of a kind runs eagerly, which compiles and loads all that it needs; the second is captured on its way. So is
    the first, and the second, after its weights or settings have changed.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._busy = threading.Lock()
        self._plans: OrderedDict[Hashable, tuple[Stamp, CapturedGeneration | CapturedCall | None]] = OrderedDict()
        self._caches: WeakValueDictionary[CacheKey, KVCache] = WeakValueDictionary()  # the plans' graphs hold them

    def take(self, key: Hashable, module: nn.Module, capture: Callable[[Recorder], PlanT]) -> PlanT | None:
        """Return the plan of a kind, which nobody else has until `release`.

        None if the call is the first of its kind, or another plan runs: it has to run eagerly then.
        """
        if not self._busy.acquire(blocking=False):
            return None
        plan = None
        try:
            plan = self._plan(key, module, capture)
        finally:
            if plan is None:
                self.release()
        return plan

    def _plan(self, key: Hashable, module: nn.Module, capture: Callable[[Recorder], PlanT]) -> PlanT | None:
        stamp, plan = self._plans.pop(key, (None, None))
        if stamp is None or not stamp.fits(module) or (plan is not None and plan.is_broken):
            self._plans[key] = (Stamp(module), None)
            while len(self._plans) > MAX_PLANS:
                self._plans.popitem(last=False)
            return None
        found = capture(self._recorder) if plan is None else cast(PlanT, plan)
        self._plans[key] = (stamp, found)
        return found

    def release(self) -> None:
        """Let other plans run."""
        self._busy.release()

    def call(self, name: Hashable, module: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return function(x), where `name` says which function it is and `module` holds its weights."""
        key = (name, x.shape, x.dtype, torch.is_inference_mode_enabled())
        plan = self.take(key, module, lambda recorder: CapturedCall(recorder, function, x))
        if plan is None:
            return function(x)
        try:
            return plan(x)
        finally:
            self.release()

    def cache(self, key: CacheKey, allocate: Callable[[CacheKey], KVCache]) -> KVCache:
        """Return the cache that all plans of a key share."""
        cache = self._caches.get(key)
        if cache is None:
            cache = self._caches[key] = allocate(key)
        return cache

    def clear(self) -> None:
        """Forget what was captured; a plan that runs is freed when it ends."""
        self._plans = OrderedDict()
