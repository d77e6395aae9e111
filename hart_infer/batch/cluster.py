"""Have chunks drawn by actors on a Ray cluster, one a GPU or a share of CPUs. An actor that dies is replaced."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from platform import node
from typing import Any

from ..errors import HartError, InputError, OutputError
from .claim import is_claimed
from .driver import record_deaths
from .plan import Chunk
from .storage import open_storage
from .worker import BrokenWorkerError, Done, Worker, WorkerOptions

HERE = "local"
CPUS = 4.0  # of a worker without a GPU
MAX_DEATHS = 2  # of workers that had a chunk, before it is halved; of those that had one row, before that is given up
MAX_FAILED_STARTS = 3  # in a row


@dataclass(frozen=True)
class Cluster:
    """A cluster, and what of it is used."""

    address: str = HERE
    workers: int | None = None  # None: as many as fit
    gpus_per_worker: float | None = None  # None: 1 where there are GPUs
    cpus_per_worker: float | None = None  # None: 1 beside a GPU, else CPUS

    def __call__(self, options: WorkerOptions, chunks: Sequence[Chunk]) -> Iterator[Done]:
        """Finish all chunks, in any order. Raises HartError."""
        ray = import_ray()
        _connect(ray, self.address)
        try:
            count, cpus, gpus = self._sizes(ray.cluster_resources())
            actor = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(RayWorker)
            yield from _Run(ray, actor, options).finish(chunks, min(count, len(chunks)))
        finally:
            ray.shutdown()

    def _sizes(self, resources: dict[str, float]) -> tuple[int, float, float]:
        """Return the number of workers, and the CPUs and GPUs of each. Raises InputError if none fits."""
        there = {kind: resources.get(kind, 0.0) for kind in ("CPU", "GPU")}
        gpus = min(there["GPU"], 1.0) if self.gpus_per_worker is None else self.gpus_per_worker
        cpus = (1.0 if gpus else min(there["CPU"], CPUS)) if self.cpus_per_worker is None else self.cpus_per_worker
        shares = {kind: share for kind, share in (("CPU", cpus), ("GPU", gpus)) if share}
        room = min((int(there[kind] / share) for kind, share in shares.items()), default=0)
        if not room:
            asked = " and ".join(f"{share:g} {kind}" for kind, share in shares.items()) or "nothing"
            raise InputError(
                f"A worker was to have {asked}, and the cluster has {there['CPU']:g} CPU and {there['GPU']:g} GPU."
            )
        return min(self.workers or room, room), cpus, gpus


def import_ray() -> Any:
    """Return Ray. Raises InputError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise InputError("--ray needs Ray: pip install 'hart-infer[batch]'.") from error
    return ray


def _connect(ray: Any, address: str) -> None:
    """Connect to a cluster, or start one of this machine. Raises InputError."""
    started_here: dict[str, Any] = {"include_dashboard": False} if address == HERE else {}
    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False, **started_here)
    except Exception as error:  # ConnectionError, RuntimeError, ValueError, gRPC's
        raise InputError(f"There is no Ray cluster at {address} ({str(error).splitlines()[0]}).") from error


class RayWorker:
    """A Worker as an actor."""

    def start(self, options: WorkerOptions) -> None:
        """Load the model. Raises HartError."""
        if not is_claimed(open_storage(options.out)):
            raise OutputError(f"{options.out} is not the same folder on {node()}; give a shared one, or an object store's URL.")
        self._worker = Worker(options)

    def finish(self, chunk: Chunk) -> Done:
        """Draw, write and record a chunk."""
        return self._worker.finish(chunk)


class _Run:
    """The queue of chunks, and who has which."""

    def __init__(self, ray: Any, actor: Any, options: WorkerOptions) -> None:
        self._ray = ray
        self._actor = actor
        self._options = options
        self._storage = open_storage(options.out)
        self._waiting: list[Chunk] = []
        self._calls: dict[Any, tuple[Any, Chunk | None]] = {}  # by the call's reference; None: it loads the model
        self._failed_starts = 0

    def finish(self, chunks: Sequence[Chunk], workers: int) -> Iterator[Done]:
        """Yield as chunks are finished."""
        self._waiting = list(reversed(chunks))
        for _ in range(workers):
            self._start_worker()
        while self._waiting or any(chunk for _, chunk in self._calls.values()):
            ready, _ = self._ray.wait(list(self._calls), num_returns=1)
            worker, chunk = self._calls.pop(ready[0])
            try:
                done = self._ray.get(ready[0])
            except self._ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, BrokenWorkerError):
                    raise (error.cause if isinstance(error.cause, HartError) else error) from None
                self._ray.kill(worker)
                yield from self._after_death(chunk, str(error.cause))
            except self._ray.exceptions.RayActorError:
                self._ray.kill(worker)  # it may only be out of reach
                yield from self._after_death(chunk, "the worker's process died")
            else:
                self._failed_starts = 0
                if done is not None:
                    yield done
                self._give_work(worker)

    def _start_worker(self) -> None:
        worker = self._actor.remote()
        self._calls[worker.start.remote(self._options)] = (worker, None)

    def _give_work(self, worker: Any) -> None:
        if self._waiting:
            chunk = self._waiting.pop()
            self._calls[worker.finish.remote(chunk)] = (worker, chunk)

    def _after_death(self, chunk: Chunk | None, reason: str) -> Iterator[Done]:
        """Put the chunk back, or halve it, or give up its one row; start another worker."""
        if chunk is None:
            self._failed_starts += 1
            if self._failed_starts == MAX_FAILED_STARTS:
                raise OutputError(f"Workers die while they load the model ({reason}); is there enough memory?")
        elif chunk.deaths + 1 < MAX_DEATHS:
            self._waiting.append(chunk.after_death())
        elif len(chunk.rows) > 1:
            self._waiting += [half.after_death() for half in chunk.halves()]
        else:
            yield record_deaths(self._storage, chunk, f"{reason} while it drew this row")
        self._start_worker()
